"""The RL loop, and the state, guards, stopping and resuming of a run."""
