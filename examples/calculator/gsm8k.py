"""GSM8K with calls of a calculator: `data.train: gsm8k:rows`. Files: data/gsm8k/train.jsonl and test.jsonl."""

from __future__ import annotations

import json
import re
from pathlib import Path

FOLDER = Path("data/gsm8k")
FILES = {"train": "train.jsonl", "eval": "test.jsonl"}
ANNOTATION = re.compile(r"<<([^=<>]*)=([^<>]*)>>")


def rows(split: str) -> list[dict[str, str]]:
    """Of an annotated calculation such as `<<48/2=24>>24`, the solution keeps the call, `<<48/2>>24`: what follows it
    is what the calculator will answer."""
    made = []
    for line in (FOLDER / FILES[split]).read_text().splitlines():
        row = json.loads(line)
        made.append({**row, "solution": ANNOTATION.sub(r"<<\1>>", row["answer"])})
    return made
