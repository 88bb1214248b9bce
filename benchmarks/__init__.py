"""Measurements, and under results/ what they found: `python -m benchmarks.step --help`."""
