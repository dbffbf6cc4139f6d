"""Instruction data: rows are read, split, tokenised and packed into batches."""
