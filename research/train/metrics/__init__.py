"""Measurements while a run trains: step metrics, throughput, traces."""
