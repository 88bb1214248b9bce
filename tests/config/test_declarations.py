"""The declarations of settings, the page made from them, and the tables of other packages that they must agree with."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pytest
from megatron.core.enums import Fp8Recipe
from settings_page import PAGE, page

from gspo_megatron.config.declarations import setting, settings_of
from gspo_megatron.config.loading import REMOVED, RENAMED, load_config
from gspo_megatron.config.sections import Config
from gspo_megatron.device import DTYPES
from gspo_megatron.models.presets import PRESETS
from gspo_megatron.objective.kl import KL_ESTIMATORS
from gspo_megatron.train import main

SETTINGS = settings_of(Config)
ENTRIES = {key: entry for s in SETTINGS.values() for key, entry in s.declared_entries().items()}
"""Of mappings."""


@dataclass
class House:
    rooms: float = setting(2.0, "Rooms.", least=1)
    owner: str | None = setting(None, "Who lives there.")


@dataclass
class Zoo:
    """Some animals."""

    bears: int = setting(2, "Bears in all.", least=1, below=5)
    keeper: str | None = setting(None, "Who feeds them.", choices=("Ann", "Bob"))
    share: float = setting(0.5, "Share of honey.", above=0, most=1)
    rations: dict[str, float] = setting({"honey": 1.0}, "Kilograms | a day.")
    notes: dict[str, Any] = setting({}, "Anything.")
    house: dict[str, Any] = setting({}, "A house.", entries=House)
    fed: list[str] = setting([], "Which of them eat.")
    meals: list[dict[str, Any]] = setting([], "What they eat.")
    signs: list[Any] = setting([], "What they read.")


@dataclass
class ZooConfig:
    zoo: Zoo = field(default_factory=Zoo)


# --- declarations ---


def test_types_are_the_resolved_annotations() -> None:
    assert {key: s.type for key, s in settings_of(ZooConfig).items()} == {
        "zoo.bears": int,
        "zoo.keeper": str | None,
        "zoo.share": float,
        "zoo.rations": dict[str, float],
        "zoo.notes": dict[str, Any],
        "zoo.house": dict[str, Any],
        "zoo.fed": list[str],
        "zoo.meals": list[dict[str, Any]],
        "zoo.signs": list[Any],
    }


def test_entries_of_a_mapping_that_are_declared_follow_their_declarations() -> None:
    complaint = settings_of(ZooConfig)["zoo.house"].complaint
    assert complaint({}) is complaint({"rooms": 3, "owner": None}) is complaint({"rooms": 1.5, "owner": "Ann"}) is None
    assert complaint({"rooms": 0}) == "zoo.house.rooms=0 must be at least 1; the default is 2.0"
    assert complaint({"rooms": True}) == "zoo.house.rooms=True must be a value of type float"
    assert complaint({"owner": 3}) == "zoo.house.owner=3 must be a value of type str or null"
    assert complaint({"room": 3}) == (
        "unknown config key 'zoo.house.room'; did you mean 'rooms'? Keys of zoo.house: rooms, owner"
    )


def test_every_instance_has_a_mapping_of_its_own() -> None:
    one, other = Zoo(), Zoo()
    one.rations["fish"] = 2.0
    assert other.rations == settings_of(ZooConfig)["zoo.rations"].default == {"honey": 1.0}


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("bears", 1, None),
        ("bears", 4, None),
        ("bears", 0, "zoo.bears=0 must be at least 1 and below 5; the default is 2"),
        ("bears", 5, "zoo.bears=5 must be at least 1 and below 5; the default is 2"),
        ("share", 1.0, None),
        ("share", 0.0, "zoo.share=0.0 must be above 0 and at most 1; the default is 0.5"),
        ("share", float("nan"), "zoo.share=nan must be a finite number"),
        ("keeper", None, None),
        ("keeper", "Ann", None),
        ("keeper", "An", "zoo.keeper='An' is not one of Ann, Bob; did you mean 'Ann'?"),
        ("rations", {}, None),
        ("rations", {"honey": float("inf")}, "zoo.rations.honey=inf must be a finite number"),
        ("rations", {"honey": {}}, "zoo.rations.honey={} must be a finite number"),
        ("notes", {"honey": {"a": float("inf")}}, None),
    ],
)
def test_a_value_is_held_against_its_declaration(key: str, value: Any, complaint: str | None) -> None:
    assert settings_of(ZooConfig)[f"zoo.{key}"].complaint(value) == complaint


def test_a_field_without_a_declaration_is_found() -> None:
    @dataclass
    class Undeclared:
        zoo: Bare = field(default_factory=Bare)

    with pytest.raises(AssertionError, match=r"zoo.bears is not declared: write bears: int = setting\(default, help\)"):
        settings_of(Undeclared)


@dataclass
class Bare:
    bears: int = 2


@pytest.mark.parametrize("key", [*SETTINGS, *ENTRIES])
def test_every_declaration_is_one_that_a_user_can_act_on(key: str) -> None:
    """The default passes its own rule and can be given on the command line; the help is a sentence or two."""
    declared = {**SETTINGS, **ENTRIES}[key]
    assert declared.complaint(declared.default) is None
    text = declared.default if isinstance(declared.default, str) else json.dumps(declared.default)
    if key in ENTRIES:
        mapping, _, name = key.rpartition(".")
        assert SETTINGS[mapping].complaint({name: declared.default}) is None
    elif not declared.is_mapping:
        assert load_config(None, [f"{key}={text}"]) == Config()
    assert declared.help.endswith(".") and declared.help.isprintable()


# --- tables of other rooms ---


def test_choices_are_the_rows_of_the_tables_they_name() -> None:
    choices = {key: s.choices for key, s in SETTINGS.items()}
    assert choices["model.preset"] == tuple(PRESETS)
    assert choices["algorithm.kl_estimator"] == tuple(KL_ESTIMATORS)
    assert set(choices["precision.dtype"]) == set(DTYPES)


def test_fp8_recipes_are_names_of_megatron_core() -> None:
    assert set(SETTINGS["precision.fp8"].choices) - {"none"} <= {recipe.value for recipe in Fp8Recipe}


# --- the page ---


def test_a_line_of_the_page() -> None:
    assert page(ZooConfig).split("## zoo\n")[1].splitlines() == [
        "",
        "Some animals.",
        "",
        "| Key | Type | Default | Range or choices | Meaning |",
        "|---|---|---|---|---|",
        "| `zoo.bears` | integer | `2` | at least 1 and below 5 | Bears in all. |",
        "| `zoo.keeper` | text or null | `null` | `Ann`, `Bob` | Who feeds them. |",
        "| `zoo.share` | number | `0.5` | above 0 and at most 1 | Share of honey. |",
        '| `zoo.rations` | names with numbers | `{"honey": 1.0}` |  | Kilograms \\| a day. |',
        "| `zoo.notes` | names with values | `{}` |  | Anything. |",
        "| `zoo.house` | names with values | `{}` |  | A house. |",
        "| `zoo.house.rooms` | number | `2.0` | at least 1 | Rooms. |",
        "| `zoo.house.owner` | text or null | `null` |  | Who lives there. |",
        "| `zoo.fed` | list of names | `[]` |  | Which of them eat. |",
        "| `zoo.meals` | list of mappings | `[]` |  | What they eat. |",
        "| `zoo.signs` | list of texts and ids | `[]` |  | What they read. |",
    ]


def test_the_page_in_the_repository_is_the_one_that_the_declarations_make() -> None:
    assert PAGE.read_text() == page(), "docs/settings.md is out of date: run `make docs`"


def test_the_page_lists_what_a_user_can_set_and_nothing_else() -> None:
    listed = [line.split("`")[1] for line in page().splitlines() if line.startswith("| `")]
    assert listed == [name for key, s in SETTINGS.items() for name in (key, *s.declared_entries())]
    assert not {*RENAMED, *REMOVED} & set(listed)


def test_the_command_points_to_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "docs/settings.md" in " ".join(capsys.readouterr().out.split())
