"""Data types, errors and protocols that the whole package shares."""
