"""PEFT's adapter folders, in both directions."""
