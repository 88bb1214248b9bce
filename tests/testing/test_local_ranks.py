"""Ranks of a test: forked from a server, or fresh interpreters."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from gspo_megatron.testing.local_ranks import run_distributed


def sum_and_imports() -> tuple[float, bool]:
    """The sum over the ranks, and whether the package's Megatron room was imported before this function."""
    total = torch.ones(1)
    dist.all_reduce(total)
    return float(total), "gspo_megatron.mcore.model" in sys.modules


def test_fresh_ranks_have_nothing_imported_and_meet_all_the_same() -> None:
    import gspo_megatron.mcore.model  # noqa: F401  (what a forked rank would share)

    assert run_distributed(sum_and_imports, 2, fresh=True) == [(2.0, False)] * 2
