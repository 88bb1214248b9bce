"""What a run shows: console, run directory, watchdog."""
