"""Text to token ids and back, chat templates included; `python -m research.tokenize`
trains a tokenizer.
"""
