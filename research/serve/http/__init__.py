"""What the API and the studio share: sockets, the server on them, and its keys."""
