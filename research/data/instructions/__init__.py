"""Instruction rows: read, split, tokenise, pack into batches."""
