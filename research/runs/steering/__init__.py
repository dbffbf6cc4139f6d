"""What stops or steers a running job: signals, request files, and the watchdog."""
