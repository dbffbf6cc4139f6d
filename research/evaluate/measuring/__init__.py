"""The losses and answers of models on rows, kept line by line."""
