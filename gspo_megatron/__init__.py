"""gspo_megatron: GSPO reinforcement learning for mixture-of-experts models on Megatron-Core.

Importing the package imports neither Megatron nor torch.distributed state; the parts are imported where they are used.
"""

__version__ = "0.1.0"
