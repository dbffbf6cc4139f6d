"""A model that answers prompts: sampling and decoding."""
