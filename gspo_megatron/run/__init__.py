"""The algorithm, and what keeps a run alive."""
