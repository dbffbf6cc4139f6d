"""Shared by all launches: jobs, flags, the fit check, settings and restarts."""
