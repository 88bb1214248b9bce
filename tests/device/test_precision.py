"""The table of number formats, and the code that uses it."""

from __future__ import annotations

import pytest

from gspo_megatron.base.errors import ConfigError
from gspo_megatron.build.checks import check_config
from gspo_megatron.config.loading import load_config
from gspo_megatron.config.sections import CHOICES
from gspo_megatron.device.precision import RECIPES
from gspo_megatron.layout.layout import token_multiple


def test_every_choice_has_a_recipe() -> None:
    assert tuple(RECIPES) == CHOICES["precision.fp8"]
    assert set().union(*(recipe.dtypes for recipe in RECIPES.values())) == set(CHOICES["precision.dtype"])


@pytest.mark.parametrize("fp8", RECIPES)
def test_layout_and_checks_go_by_the_recipe(fp8: str) -> None:
    recipe = RECIPES[fp8]
    config = load_config(None, [f"precision.fp8={fp8}", "precision.dtype=bf16", "parallel.tp=2", "model.vocab_size=9"])
    assert token_multiple(config) == 2 * recipe.row_multiple
    check_config(config, 2)
    config.model.hidden_size = 8 + 16 * 4
    if recipe.column_multiple == 1:
        check_config(config, 2)
    else:
        with pytest.raises(ConfigError, match=r"model.hidden_size=72 is not divisible by 16 .*16 columns at a time"):
            check_config(config, 2)
    config.model.hidden_size = 64
    config.precision.dtype = "fp32"
    if "fp32" in recipe.dtypes:
        check_config(config, 2)
    else:
        with pytest.raises(ConfigError, match=f"precision.fp8={fp8} needs precision.dtype=bf16, got fp32"):
            check_config(config, 2)
