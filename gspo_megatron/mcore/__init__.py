"""The only folder of the package that imports Megatron-Core."""
