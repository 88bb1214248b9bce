"""The gradient of every parameter on a choice of layouts in which every pair of axis sizes occurs. `make grid` runs all
of them (tools/layout_grid.py)."""

from __future__ import annotations

import pytest
from check_layout import LayoutRequest
from layout_grid import Case, cases, compared, cover, layouts

# By itself Megatron-Core 0.16.1 trains wrongly where the experts' tokens are split over tensor-parallel ranks and the
# experts are not: compat.mark_expert_parameters.
WRONG_IN_MEGATRON = LayoutRequest(tp=2)
CHOSEN = [WRONG_IN_MEGATRON, *(layout for layout in cover() if layout.world_size > 1)]


def test_the_grid_has_every_layout_that_can_be() -> None:
    """Counted by hand: with tp * cp * dp = 1, 2, 4, 8 there are 1, 3, 5 and 6 ways to spread up to 4 experts over ep
    and etp; 1, 3, 3 and 1 ways to make that product; and pp = 2, with vpp 1 and 2, where it leaves 4 processes."""
    one_stage = 1 * 1 + 3 * 3 + 3 * 5 + 1 * 6
    assert len(layouts()) == one_stage + 2 * (one_stage - 6)


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [(dtype, layout) for dtype in ("fp64", "fp32") for layout in CHOSEN if dtype == "fp64" or layout.world_size < 8],
    ids=str,
)
def test_every_gradient_is_that_of_one_process(layout: LayoutRequest, dtype: str) -> None:
    # The algorithm, dispatcher and recompute change from layout to layout.
    mine: list[Case] = [case for case in cases(layout) if case.dtype == dtype]
    rows = compared(layout, mine[CHOSEN.index(layout) % len(mine)])
    assert len(rows) > 60
    assert [row for row in rows if not row.ok] == []
