"""Text to token ids and back: kinds of tokenizers, the special ids of published ones, training, export."""
