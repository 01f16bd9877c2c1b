"""Sources of instructions, and their conversion to prompts. Needs no SeqIO."""
