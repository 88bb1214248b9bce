"""Sources of rollouts."""
