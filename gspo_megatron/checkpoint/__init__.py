"""Checkpoint files and their directory. Knows no Megatron."""
