"""Prompts a minute through chat template and tokenizer, and the same by transformers where it is installed.

    python -m benchmarks.prompts --output benchmarks/results/prompts.json --markdown docs/benchmarks.md

Conversations of a system prompt and one to three questions, cut from this repository's Python files, about 200 tokens
each, are written as JSONL. A byte-level BPE tokenizer is trained on the same files. `file` is what the start of a run
does: `RowPrompts` reads, renders and encodes every line. Every process of a run reads all prompts, so it is measured
on one process, and on two at once.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

# One thread a process, in both libraries; set before either is imported.
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from benchmarks.reports import keep, machine, median_ratio, table, versions
from gspo_megatron.data.cache import Cache
from gspo_megatron.data.examples import RowReader
from gspo_megatron.data.hugging_face import HuggingFaceTokenizer
from gspo_megatron.data.jsonl import JsonlRows
from gspo_megatron.data.prompts import Filters, RowPrompts
from gspo_megatron.device import open_device

ROOT = Path(__file__).parents[1]
GOAL = 50_000
"""Prompts a minute."""
TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' + (tools | tojson) + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' and ns.last < 0 %}
        {%- set ns.last = messages | length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' and loop.index0 < ns.last %}
        {{- message.content.split('</think>')[-1].lstrip('\\n') }}
    {%- else %}
        {{- message.content }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def folder_of_tokenizer(folder: Path, texts: Sequence[str], vocab_size: int) -> Path:
    model = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(
        # The pattern of Qwen's tokenizers.
        pattern=_regex(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"),
        behavior="isolated",
    )
    model.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    model.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(texts, trainer)
    model.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def _regex(pattern: str) -> Any:
    from tokenizers import Regex

    return Regex(pattern)


def conversations(texts: Sequence[str], number: int) -> list[list[dict[str, str]]]:
    """Of one, three or five messages after a system prompt."""
    draw, text = random.Random(1), "\n".join(texts)

    def piece(length: int) -> str:
        start = draw.randrange(len(text) - length)
        return text[start : start + length]

    found = []
    for _ in range(number):
        messages = [{"role": "system", "content": piece(80)}]
        turns = draw.choice([0, 0, 0, 1, 2])
        for _ in range(turns):
            messages += [{"role": "user", "content": piece(200)}]
            messages += [{"role": "assistant", "content": f"<think>\n{piece(150)}\n</think>\n\n{piece(100)}"}]
        found.append([*messages, {"role": "user", "content": piece(draw.randint(200, 800))}])
    return found


class Time(NamedTuple):
    """Seconds of the clock, and of the processor: on a busy machine the clock also counts other people's work."""

    clock: float
    processor: float

    @classmethod
    def of(cls, work: Callable[[], Any]) -> Time:
        clock, processor = time.perf_counter(), time.process_time()
        work()
        return cls(time.perf_counter() - clock, time.process_time() - processor)


def read_file(folder: Path, file: Path) -> int:
    """The start of a run; the number of tokens."""
    tokenizer = HuggingFaceTokenizer(folder)
    template = tokenizer.chat_template
    assert template is not None
    reader = RowReader(chat=template, messages_field="messages")
    with tempfile.TemporaryDirectory(dir=folder) as new:
        cache = Cache(Path(new))
        return RowPrompts("bench", JsonlRows(file, cache), reader, tokenizer, Filters(100_000), cache).num_tokens


def timed_file(folder: Path, file: Path) -> Time:
    return Time.of(lambda: read_file(folder, file))


def works(folder: Path, file: Path) -> dict[str, Callable[[], Any]]:
    """What is timed on one process, by name; all do every conversation."""
    tokenizer = HuggingFaceTokenizer(folder)
    template = tokenizer.chat_template
    assert template is not None
    asked = [json.loads(line)["messages"] for line in file.read_text().splitlines()]
    rendered = [template.render(messages) for messages in asked]
    found: dict[str, Callable[[], Any]] = {
        "file": lambda: read_file(folder, file),
        "template": lambda: [template.render(messages) for messages in asked],
        "tokenizer": lambda: [tokenizer.encode(text) for text in rendered],
    }
    try:
        from transformers import AutoTokenizer
    except ImportError:
        return found
    theirs = AutoTokenizer.from_pretrained(folder)
    ids = theirs.apply_chat_template(asked[0], add_generation_prompt=True, return_dict=False)
    assert tokenizer.encode(rendered[0]) == ids
    found["transformers"] = lambda: [
        theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        for messages in (json.loads(line)["messages"] for line in file.read_text().splitlines())
    ]
    return found


def measure(number: int, repeats: int, vocab_size: int) -> dict[str, Any]:
    texts = [path.read_text() for path in sorted((ROOT / "gspo_megatron").rglob("*.py"))]
    with tempfile.TemporaryDirectory() as name:
        folder = folder_of_tokenizer(Path(name), texts, vocab_size)
        file = folder / "prompts.jsonl"
        rows = [{"messages": messages, "answer": ""} for messages in conversations(texts, number)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        timed = works(folder, file)
        tokens = read_file(folder, file)
        seconds: dict[str, list[Time]] = {name: [] for name in timed}
        for _ in range(repeats):
            for name, work in timed.items():
                seconds[name].append(Time.of(work))
        with ProcessPoolExecutor(2) as pool:
            list(pool.map(read_file, [folder] * 2, [file] * 2))  # the first use of a process imports
            seconds["file on each of two processes"] = [
                max(pool.map(timed_file, [folder] * 2, [file] * 2)) for _ in range(repeats)
            ]
    found = {
        "prompts": number,
        "tokens_per_prompt": tokens / number,
        "vocab_size": vocab_size,
        "goal": GOAL,
        "prompts_per_minute": {
            kind: {name: 60 * number / min(getattr(s, kind) for s in times) for name, times in seconds.items()}
            for kind in Time._fields
        },
        "seconds_all": {name: [s._asdict() for s in times] for name, times in seconds.items()},
        "machine": machine(open_device("cpu", "fp32"), 1),
        "versions": versions(["tokenizers", "jinja2", "transformers"]),
        "command": f"python -m benchmarks.prompts {' '.join(sys.argv[1:])}",
    }
    if "transformers" in seconds:
        ours, theirs = ([s.processor for s in seconds[name]] for name in ("file", "transformers"))
        found["ratio"] = median_ratio(ours, theirs)
    return found


MEANING = {
    "file on each of two processes": "start of a run, two processes at once, each",
    "file": "start of a run: read, render, encode, check",
    "template": "of these, the chat template",
    "tokenizer": "of these, the tokenizer",
    "transformers": "the same lines by transformers' `apply_chat_template`",
}


def markdown(result: dict[str, Any]) -> str:
    clock, processor = (result["prompts_per_minute"][kind] for kind in Time._fields)
    rows = [
        [MEANING[name], f"{processor[name]:,.0f}", f"{clock[name]:,.0f}", f"{processor[name] / GOAL:.1f}"]
        for name in MEANING
        if name in clock
    ]
    names = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    ratio = f" Processor time, ours / transformers: {result['ratio']:.2f}." if "ratio" in result else ""
    return (
        f"`{result['command']}`: {result['prompts']:,} conversations of {result['tokens_per_prompt']:.0f} tokens on "
        f"average, {names}; {result['machine']}.{ratio}\n\n"
        f"{table(['', 'prompts a minute of processor time', 'of the clock', f'of {GOAL:,}'], rows)}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--prompts", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--vocab-size", type=int, default=8000, help="of the tokenizer that is trained")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--markdown", type=Path, help="page whose table is replaced")
    options = parser.parse_args(argv)
    result = measure(options.prompts, options.repeats, options.vocab_size)
    print(markdown(result))
    keep(result, markdown(result), "prompts", output=options.output, markdown=options.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
