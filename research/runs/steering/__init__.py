"""A running job is stopped or steered here: by signals, requests and the watchdog."""
