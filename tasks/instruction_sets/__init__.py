"""Sources of instructions, and how they become prompts. Needs no SeqIO."""
