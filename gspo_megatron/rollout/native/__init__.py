"""Sampling by the model under training."""
