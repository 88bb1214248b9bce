"""Hostile input by the thousand: settings, JSONL files, checkpoint headers and the errors of rewards (`make fuzz`).

    python tools/fuzz.py [--cases 5000] [--seed 0] [--only config] [--case 17]

A case passes where the input is used, or refused with one of the package's errors in a message that a terminal can
show. Anything else is printed with the command that repeats it. Exit status: 0 all passed, 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch

from gspo_megatron.base.batches import Prompt, Rollout
from gspo_megatron.base.errors import CheckpointError, ConfigError, DataError
from gspo_megatron.build.checks import check_config
from gspo_megatron.checkpoint.place import Place
from gspo_megatron.checkpoint.shards import Shard, ShardFiles, write_shards
from gspo_megatron.config.loading import SETTINGS, load_config, to_yaml
from gspo_megatron.data.cache import Cache
from gspo_megatron.data.examples import RowReader
from gspo_megatron.data.jsonl import JsonlRows
from gspo_megatron.data.prompts import Filters, RowPrompts
from gspo_megatron.data.tokenizers import CharacterTokenizer
from gspo_megatron.rewards.functions import RewardFunction
from gspo_megatron.rewards.rewards import Rewards, refuse_unscored, score_rollouts
from gspo_megatron.rewards.rules import REWARDS

REFUSALS = (ConfigError, DataError, CheckpointError)
LONGEST_MESSAGE = 10_000
SLOWEST_S = 10.0
NUMBERS = ("0", "-1", "1", "7", "1e-300", "1e38", "1e300", "-0.0", "nan", ".inf", str(2**63), "9" * 400, "0x1f", "1_0")
TEXTS = (
    "",
    "???",
    "${x}",
    "${run.dir}",
    "~",
    "~nobody/x",
    "a\0b",
    "x" * 5000,
    "é\u202e\x1b[31m",
    "{prompt}",
    "[",
    "off",
    "null",
)
FOLDER = tempfile.TemporaryDirectory()


def fuzz_config(random: Random) -> None:
    """Overrides of random settings with values that are plausible, absurd or of another type, then all checks."""
    overrides = []
    for _ in range(random.randint(1, 6)):
        setting = SETTINGS[random.choice(list(SETTINGS))]
        likely = [*setting.choices, str(setting.default), str(random.randint(1, 64)), repr(random.uniform(-1, 2))]
        absurd = [*NUMBERS, *TEXTS, "[1]", "{a: 1}"]
        value = random.choice(likely if random.random() < 0.7 else absurd)
        overrides.append(f"{setting.key}{'=' if random.random() < 0.9 else random.choice(('', '.x='))}{value}")
    config = load_config(None, overrides)
    check_config(config, random.choice((1, 2, 8, 64, 1_000_000_007)))
    path = Path(FOLDER.name) / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8", errors="surrogatepass")
    assert load_config(path) == config, "what to_yaml writes does not load as it was"


def fuzz_jsonl(random: Random) -> None:
    """Files of lines that are whole, cut, joined or bytes, and templates."""
    record: dict[str, Any] = {"prompt": "1+1", "answer": "2"}
    if random.random() < 0.5:
        odd: tuple[Any, ...] = (*TEXTS, "\ud800", 3, None, [1], float("nan"), True, {}, 10**400, "1" * 9999)
        record[random.choice(("prompt", "promt", "", "answer"))] = random.choice(odd)
    line = json.dumps(record).encode()
    cut = random.randrange(len(line) + 1)
    lines = [line, line[:cut], line[:cut] + bytes([random.randrange(256)]) + line[cut:], b"\n", b"\xef\xbb\xbf" + line]
    lines += [b"[" * random.choice((3, 10**5)), b"null", b'"', random.randbytes(20)]
    path = Path(FOLDER.name) / "prompts.jsonl"
    chosen = [random.choice([line] * 12 + lines) for _ in range(random.randint(0, 4))]
    path.write_bytes(b"\n".join(chosen))
    template = random.choice(
        ("{prompt}", "{prompt}", "{prompt}", "{prompt} {answer}", "{{prompt}}", "{", "{x} {{x}}", "a", "{prompt}" * 99)
    )
    filters = Filters(random.choice((0, 10**6)), bad_rows=random.choice(("error", "drop")))
    cache = Cache(Path(FOLDER.name) / "cache")
    RowPrompts("x", JsonlRows(path, cache), RowReader(prompt_template=template), CharacterTokenizer(), filters, cache)


def fuzz_header(random: Random) -> None:
    """A file of a checkpoint with a value of its header replaced, or a byte of it."""
    whole = torch.arange(24.0).view(4, 6)
    path = Path(FOLDER.name) / "0.safetensors"
    path.unlink(missing_ok=True)
    write_shards(path, [("w", Shard.of(Place("w"), whole), whole.flatten())])
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    if random.random() < 0.3:
        at = random.randrange(8 + length)
        content = content[:at] + bytes([random.randrange(256)]) + content[at + 1 :]
    else:
        header = json.loads(content[8 : 8 + length])
        shards = json.loads(header["__metadata__"]["pieces"])
        owner = random.choice((header["w"], shards["w"], shards["w"]["place"], header, shards))
        odd: tuple[Any, ...] = (-1, 0, 1, 10**15, 10**30, None, "4", [], [0, 1], {}, 1.5, True, "F64", "BF16")
        owner[random.choice((*owner, "other"))] = random.choice(odd)
        if isinstance(header.get("__metadata__"), dict):
            header["__metadata__"]["pieces"] = json.dumps(shards)
        text = json.dumps(header).encode()
        content = len(text).to_bytes(8, "little") + text + content[8 + length :]
    path.write_bytes(content)
    into = torch.empty(24)
    ShardFiles([path]).read("w", Shard.of(Place("w"), whole), into)


def fuzz_message(random: Random) -> None:
    """Rewards by rule on random text, and a reward whose error says anything."""
    said = "".join(chr(random.choice((27, 10, 0x202E, 0xD800, 233, random.randrange(32, 127)))) for _ in range(50))
    error = random.choice((ValueError, SystemExit, RecursionError, UnicodeError))(said * random.choice((1, 10**5)))

    def raising(*, prompt: str, response: str, answer: str) -> float:
        raise error

    text = "".join(
        random.choice(("#### ", "\\boxed{", "}", "12", "1,200", ".5", "-", "+", "\n", "x")) for _ in range(9)
    )
    answer = random.choice((text, "12", "7,5=12", "", said))
    rewards = Rewards({name: 1.0 for name in REWARDS if name != "length"}, on_error=random.choice(("stop", "count")))
    rewards._here["format"] = RewardFunction.of(random.choice((raising, REWARDS["format"])), {})
    rollout = Rollout(0, Prompt(0, said, (1,), answer), [], [], truncated=False, policy_version=0, text=text)
    score_rollouts(rewards, [rollout])
    refuse_unscored([rollout])


TARGETS: dict[str, Callable[[Random], None]] = {
    "config": fuzz_config,
    "jsonl": fuzz_jsonl,
    "header": fuzz_header,
    "message": fuzz_message,
}


def fault_of(target: str, seed: int, case: int) -> str:
    """What is wrong with how a case ended; empty where nothing is."""
    start, message = time.process_time(), ""
    try:
        TARGETS[target](Random(f"{target} {seed} {case}"))
    except REFUSALS as error:
        message = str(error)
    except BaseException:
        return traceback.format_exc(limit=-3)
    if len(message) > LONGEST_MESSAGE:
        return f"a message of {len(message)} characters: {message[:200]}"
    if "\x1b" in message:
        return f"a message that steers the terminal: {message[:200]!r}"
    if (took := time.process_time() - start) > SLOWEST_S:
        return f"it took {took:.0f} s of the processor"
    return ""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--cases", type=int, default=5000, help="over all targets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=TARGETS, help="one target")
    parser.add_argument("--case", type=int, help="one case of each target")
    options = parser.parse_args(arguments)
    targets = [options.only] if options.only else list(TARGETS)
    cases = [options.case] if options.case is not None else range(-(-options.cases // len(targets)))
    start, faults = time.perf_counter(), 0
    for target in targets:
        for case in cases:
            if fault := fault_of(target, options.seed, case):
                faults += 1
                again = f"python tools/fuzz.py --seed {options.seed} --only {target} --case {case}"
                print(f"{again}\n{fault}", file=sys.stderr)
    total = len(targets) * len(cases)
    print(f"{total} cases of {', '.join(targets)} in {time.perf_counter() - start:.0f} s: {faults} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
