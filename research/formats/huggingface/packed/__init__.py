"""Tensors of Hugging Face folders that lie in codes: one file for each library."""
