"""Checkpoint files and their directory. Independent of Megatron."""
