"""docs/algorithms.md is what the tables of the objective say."""

from __future__ import annotations

import math
import re

import pytest
import torch
from algorithms_page import PAGE, page

from gspo_megatron.objective import KL_ESTIMATORS, VARIANTS, PolicyObjective, Segments, resolve_variant
from gspo_megatron.objective.corrections import CORRECTIONS
from gspo_megatron.objective.variants import DIALS


def test_the_page_in_the_repository_is_the_one_that_the_tables_make() -> None:
    assert PAGE.read_text() == page(), "docs/algorithms.md is out of date: run `make docs`"


def test_it_has_a_line_for_every_row_dial_and_estimator() -> None:
    listed = [line.split("`")[1] for line in page().splitlines() if line.startswith("| `")]
    kinds = ("level", "clip", "aggregate", "baseline")
    assert listed == [*VARIANTS, *(name for kind in kinds for name in DIALS[kind]), *KL_ESTIMATORS, *CORRECTIONS]


def test_equations_and_defaults_are_those_of_the_code() -> None:
    lines = page().splitlines()
    [grpo] = (line for line in lines if line.startswith("| `dapo`"))
    assert "[2503.14476](https://arxiv.org/abs/2503.14476) Eq. 8" in grpo and "`ppo`: low 0.2, high 0.28 |" in grpo
    [gate] = (line for line in lines if line.startswith("| `soft_gate`"))
    assert "| (4 / tau) sigmoid(tau (s - 1)) A, tau = tau_pos" in gate and gate.endswith("tau_neg 1.05. | `sapo` |")
    assert "`tau_pos, tau_neg`: above 0; the higher, the narrower. Default: tau_pos 1" in gate


@pytest.mark.parametrize("name", [name for name in CORRECTIONS if name != "none"])
def test_the_settings_of_a_correction_can_be_used_as_printed(name: str) -> None:
    [line] = (line for line in page().splitlines() if line.startswith(f"| `{name}` |"))
    printed = dict(re.findall(r"`algorithm\.dials\.(correction\.\w+)=([\d.]+)`", line))
    row = resolve_variant("gspo", correction=name, dials={key: float(value) for key, value in printed.items()})
    assert printed.keys() == {f"correction.{parameter}" for parameter in row.correction.parameter_names()}


@pytest.mark.parametrize("name", [name for name in CORRECTIONS if name != "none"])
def test_a_log_prob_that_is_nan_is_taken_for_the_policys_own(name: str) -> None:
    """What the page says of it, by the gradients of all tokens."""
    dials = {"correction.delta": 0.1} if name == "off_policy_mask" else {}
    objective = PolicyObjective(resolve_variant("gspo", correction=name, dials=dials))
    old_R = torch.tensor([-1.0, -2.0, -0.5, -1.5, -0.7, -0.9], dtype=torch.float64)
    # The geometric mask keeps the first sequence, and the off-policy mask leaves the second out: by the token without.
    sampler_R = old_R + torch.tensor([0.0, math.nan, 0.0, 0.2, math.nan, 0.2], dtype=torch.float64)
    own_R = torch.where(sampler_R.isnan(), old_R, sampler_R)
    gradients = []
    for given_R in (sampler_R, own_R):
        new_R = (old_R + 1e-5).requires_grad_()
        advantages_S = torch.tensor([1.0, -1.0], dtype=torch.float64)
        segments = Segments.from_lengths([3, 3])
        loss, _ = objective(new_R, old_R, advantages_S, segments, sampler_log_probs_T=given_R)
        gradients += torch.autograd.grad(loss, new_R)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
    assert gradients[0].isfinite().all()
