"""Writes docs/settings.md from the declarations in gspo_megatron/config/sections.py (`make docs`).

python tools/settings_page.py
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from gspo_megatron.config.declarations import Setting, settings_of
from gspo_megatron.config.sections import Config

WIDTH = 128
"""Of a line in docs/, but for tables."""
PAGE = Path(__file__).parents[1] / "docs" / "settings.md"

HEAD = """\
# Settings

<!-- Written by `make docs` from gspo_megatron/config/sections.py. -->

A run's settings are a YAML file of sections, and `section.key=value` on the command line, which wins:

    python -m gspo_megatron.train --config examples/cpu_tiny_moe.yaml parallel.ep=1 optimizer.lr=3e-4

A setting that neither names comes from `model.preset`, then from the defaults below. An unknown key is an error.
`--dry-run --verbose` prints all settings of a run. A mapping in a file replaces the default one;
`reward.functions.NAME=1` adds an entry to it.
"""

TYPES = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null", Any: "value"}
LISTS = {Any: "texts and ids", str: "names", dict: "mappings"}
"""Items of a list, by their kind."""


def page(config: type = Config) -> str:
    """The page: one table per section, one line per setting."""
    settings, sections = settings_of(config), get_type_hints(config)
    return "\n".join([HEAD, *(_section(name, of, settings) for name, of in sections.items())])


def _section(name: str, section: type, settings: dict[str, Setting]) -> str:
    own = [setting for key, setting in settings.items() if key.startswith(f"{name}.")]
    rows = [_row(row) for setting in own for row in (setting, *setting.declared_entries().values())]
    about = textwrap.fill(" ".join((section.__doc__ or "").split()), WIDTH, break_on_hyphens=False)
    head = ("| Key | Type | Default | Range or choices | Meaning |", "|---|---|---|---|---|")
    return "\n".join([f"## {name}", "", about, "", *head, *rows, ""])


def _row(setting: Setting) -> str:
    if setting.is_mapping:
        type_ = " with ".join(f"{word}s" for word in ("name", TYPES[setting.kinds[1]]))
    elif setting.type is Any:
        type_ = "source, or list of sources"
    elif setting.is_list:
        type_ = f"list of {LISTS[get_origin(setting.kinds[0]) or setting.kinds[0]]}"
    else:
        type_ = " or ".join(TYPES[kind] for kind in setting.kinds)
    default = setting.default if isinstance(setting.default, str) else json.dumps(setting.default)
    allowed = ", ".join(f"`{choice}`" for choice in setting.choices) or setting.range
    cells = (f"`{setting.key}`", type_, f"`{default}`", allowed, setting.help)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    PAGE.write_text(page())
