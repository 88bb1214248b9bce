"""The support S of a row: the ids that its softmax runs over, where these are not all.

    log p(y) = z_y - log sum_{v in S} e^{z_v},   p_v = 0 and dL/dz_v = 0 for v outside S

S is given, as top-k and top-p have chosen it when y was sampled; nothing is differentiated through the choice. Logits
are computed block by block as without a support, and those outside are then replaced: the time hardly depends on how
many ids a row keeps, and besides their places it takes no memory.

Shape suffixes: b rows and c columns of a block, e ids within a block, E all ids of some rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gspo_megatron.base.ragged import Ragged
from gspo_megatron.base.tensors import on_device

OUTSIDE = -1e30
"""In place of a logit outside the support: e^{OUTSIDE - max} is 0. It is finite, so a block or shard that has no id
of a row gives numbers, with weight 0 where parts are merged."""


class Places:
    """Where the ids of a chunk of rows lie in each block of a vocabulary shard."""

    def __init__(self, support: Ragged, first_id: int, num_columns: int, width: int, device: torch.device) -> None:
        """The shard holds ids from `first_id` on, in blocks of `width` columns."""
        column_E = support.ids_E.long() - first_id
        inside_E = (column_E >= 0) & (column_E < num_columns)
        row_E, column_E = support.token_E[inside_E], column_E[inside_E]
        block_E = column_E // width
        order_E = block_E.argsort(stable=True)
        at_2E = on_device(torch.stack([row_E, column_E % width])[:, order_E], device)
        self._of_block = at_2E.split(block_E.bincount(minlength=-(-num_columns // width)).tolist(), dim=1)

    def keep(self, block: int, z_bc: Tensor) -> Tensor:
        """z with OUTSIDE in all other places, in its memory."""
        row_e, column_e = self._of_block[block]
        z_e = z_bc[row_e, column_e]
        z_bc.fill_(OUTSIDE)
        z_bc[row_e, column_e] = z_e
        return z_bc
