"""The HTTP side of a server: requests, answers, errors, keys, metrics."""
