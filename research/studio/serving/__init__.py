"""Models that are served: processes with a folder, and the way from a page to them."""
