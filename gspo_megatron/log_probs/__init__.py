"""Log-probabilities of given tokens from hidden states and the vocabulary matrix, without ever holding the logits.

linear.py         the public functions: which rows are scored, the autograd node, what crosses the ranks
shards.py         a vocabulary in parts: how the results of parts become one, and the collectives between ranks
torch_backend.py  the arithmetic of one shard, block by block, in plain torch
"""

from gspo_megatron.log_probs.linear import linear_log_probs, vocab_parallel_logits

__all__ = ["linear_log_probs", "vocab_parallel_logits"]
