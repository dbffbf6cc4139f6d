"""What every launch shares: the job, its checks, compiler settings, restart policy."""
