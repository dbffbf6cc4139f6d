"""Measurements while a run trains: step metrics, evaluation, throughput, traces."""
