"""A model as a Hugging Face folder: config.json, safetensors and a tokenizer."""
