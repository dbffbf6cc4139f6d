"""`python -m research.train.together`: several LoRA runs as one program."""
