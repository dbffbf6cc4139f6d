"""One file per kind of adapter: functions from parameters to parameters."""
