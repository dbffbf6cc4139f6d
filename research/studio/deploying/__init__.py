"""From a run to users: aliases, exports, and servers with keys and adapters."""
