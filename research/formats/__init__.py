"""Files of other tools: Hugging Face folders are read and written, GGUF files read."""
