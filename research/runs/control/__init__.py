"""A running job is controlled from here: by signals, request files and the watchdog."""
