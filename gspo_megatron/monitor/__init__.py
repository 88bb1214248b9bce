"""Monitoring of a run: console, run directory, watchdog."""
