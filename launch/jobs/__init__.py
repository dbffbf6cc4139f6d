"""What every launch shares: jobs, flags, the fit check, settings and restarts."""
