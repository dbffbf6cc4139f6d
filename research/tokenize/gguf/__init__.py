"""Tokenizers in the words of llama.cpp's files."""
