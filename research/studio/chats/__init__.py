"""Conversations with served models: kept as files, voted on, and made training rows."""
