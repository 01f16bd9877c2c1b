"""Text to token ids and back: the kinds of tokenizers, what a folder says of their ids, training, export."""
