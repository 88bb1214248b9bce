"""Benchmarks, with their results in results/: `python -m benchmarks.step --help`."""
