"""Other tools' files, in and out: safetensors, GGUF, Hugging Face folders, one tensor-
name table.
"""
