"""Jobs of this machine: a queue in files, and the process that works it off."""
