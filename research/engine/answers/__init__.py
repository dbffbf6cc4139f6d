"""The answer to one request: its pieces, their text, and where it ends."""
