"""The real train step, compiled by libtpu without a TPU: its memory and collectives."""
