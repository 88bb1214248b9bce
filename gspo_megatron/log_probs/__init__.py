"""Log-probabilities of given tokens from hidden states and the vocabulary matrix, without materialising the logits.

linear.py           the public functions and the autograd node
arguments.py        checks of their arguments, which fail on all ranks together
backends.py         which kernels a call uses, agreed on by the ranks of a run, or of a vocabulary
rows.py             which rows are scored, and how hidden states and their gradients move between ranks
support.py          the ids that a row's softmax runs over, where not all
shards.py           vocabulary shards: how their results are merged, and the collectives between ranks
products.py         matrix products with wide accumulators
blocks.py           a chunk of rows times one shard, block by block, and what is kept for the backward
torch_kernels.py    the arithmetic of a block, element by element; triton_kernels.py the same for accelerators
"""

from gspo_megatron.log_probs.linear import Scoring, linear_log_probs, vocab_parallel_logits

__all__ = ["Scoring", "linear_log_probs", "vocab_parallel_logits"]
