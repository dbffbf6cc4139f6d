"""The parts of a decoder block: layers, rotary embeddings, and the block."""
