"""Benchmark of log-probs against those of other frameworks."""
