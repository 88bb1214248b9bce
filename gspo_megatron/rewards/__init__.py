"""Rewards: how responses are scored."""
