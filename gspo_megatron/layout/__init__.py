"""Parallel layouts: their rules, and what they need in memory."""
