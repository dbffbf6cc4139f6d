"""Sockets, the HTTP server on them, and its keys: for the API and for the studio."""
