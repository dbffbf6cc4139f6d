"""Metrics of a run as they are written: columns, thinned curves, and a stream."""
