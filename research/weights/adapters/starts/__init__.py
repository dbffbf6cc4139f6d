"""LoRA with another start: one file for each, and what two of them share."""
