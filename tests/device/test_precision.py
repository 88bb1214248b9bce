"""The table of number formats, and the code that uses it."""

from __future__ import annotations

from pathlib import Path

import pytest

from gspo_megatron.base.errors import ConfigError
from gspo_megatron.build.checks import check_config
from gspo_megatron.config.declarations import settings_of
from gspo_megatron.config.loading import load_config, replaced
from gspo_megatron.config.sections import Config
from gspo_megatron.device.cuda import variables_of
from gspo_megatron.device.precision import RECIPES
from gspo_megatron.layout.layout import token_multiple


def test_every_choice_has_a_recipe() -> None:
    choices = {key: declared.choices for key, declared in settings_of(Config).items()}
    assert tuple(RECIPES) == choices["precision.fp8"]
    assert set().union(*(recipe.dtypes for recipe in RECIPES.values())) == set(choices["precision.dtype"])


@pytest.mark.parametrize("fp8", RECIPES)
def test_layout_and_checks_go_by_the_recipe(fp8: str) -> None:
    recipe = RECIPES[fp8]
    settings = [
        f"precision.fp8={fp8}",
        "precision.dtype=bf16",
        "parallel.tp=2",
        "model.head_dim=32",
        "model.vocab_size=9",
    ]
    config = load_config(None, settings)
    assert token_multiple(config) == 2 * recipe.gathered_row_multiple
    check_config(config, 2)
    odd, columns = replaced(config, {"model.hidden_size": 72}), recipe.column_multiple
    if columns == 1:
        check_config(odd, 2)
    else:
        message = rf"model.hidden_size=72 is not divisible by {columns} .*{columns} columns at a time"
        with pytest.raises(ConfigError, match=message):
            check_config(odd, 2)
    other = replaced(config, {"precision.dtype": "fp32"})
    if "fp32" in recipe.dtypes:
        check_config(other, 2)
    else:
        with pytest.raises(ConfigError, match=f"precision.fp8={fp8} needs precision.dtype=bf16, got fp32"):
            check_config(other, 2)


def test_the_page_shows_the_table() -> None:
    page = (Path(__file__).parents[2] / "docs/precision.md").read_text()
    for name, recipe in RECIPES.items():
        if recipe.quantizes:
            [row] = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
            rows = f"{recipe.row_multiple} ({recipe.gathered_row_multiple})"
            cuda = ".".join(map(str, recipe.cuda)) if recipe.cuda > (0, 0) else "any"
            copies = f"{recipe.trained_copy_bytes:g}, {recipe.frozen_copy_bytes:g}"
            cells = [cell.strip() for cell in row.strip("|").split("|")]
            assert [cells[i] for i in (3, 4, 6, 7)] == [rows, str(recipe.column_multiple), cuda, copies]
            assert cells[5].startswith(".".join(map(str, recipe.capability)))
            assert cells[1].startswith("E4M3, E5M2" if recipe.megatron["fp8"] == "hybrid" else "E4M3, E4M3")
    for variable in (*variables_of("blockwise", True), *variables_of("none", False)):
        [row] = [line for line in page.splitlines() if line.startswith(f"| `{variable.name}` |")]
        assert variable.value in row
