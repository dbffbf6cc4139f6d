"""`python -m research.train_together`: several LoRA runs as one program."""
