"""A model that answers prompts: decoding, sampling, streaming. Knows no training."""
