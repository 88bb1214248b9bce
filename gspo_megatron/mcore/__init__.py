"""Everything that touches Megatron-Core, and nothing else does."""
