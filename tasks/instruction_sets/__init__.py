"""Where instructions come from, and how they become prompts. Needs no SeqIO."""
