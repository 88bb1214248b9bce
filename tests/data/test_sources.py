from __future__ import annotations

import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from gspo_megatron.base.errors import ConfigError, DataError
from gspo_megatron.data.order import PromptOrder
from gspo_megatron.data.sources import DataSpec, PromptSource, open_source
from gspo_megatron.data.tokenizers import CharacterTokenizer
from gspo_megatron.rewards.rules import REWARDS

GSM8K_LIKE = [
    {"question": "Ann has 3 pens and buys 4. How many has she?", "answer": "She has 3+4=<<3+4=7>>7 pens.\n#### 7"},
    {"question": "A robe takes 2 bolts, 600 robes?", "answer": "600*2=<<600*2=1200>>1200.\n#### 1,200"},
    {"question": "He owes $5 more than $3. Balance?", "answer": "0-8=<<0-8=-8>>-8\n#### -8"},
]
TOKENIZER = CharacterTokenizer()


@pytest.fixture
def gsm8k(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in GSM8K_LIKE))
    return path


def load(path: str | Path, **options: Any) -> PromptSource:
    defaults = {"split": "train", "max_prompt_tokens": 200}
    return open_source(DataSpec(str(path), **{**defaults, **options}), TOKENIZER, seed=0)


def write(tmp_path: Path, *lines: bytes | dict[str, Any]) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines))
    return path


def test_a_gsm8k_file_becomes_prompts_whose_answers_the_rewards_understand(gsm8k: Path) -> None:
    source = load(gsm8k, prompt_field="question", prompt_template="Question: {prompt}\nAnswer: ")
    assert source.size == 3
    for index, (record, number) in enumerate(zip(GSM8K_LIKE, ["7", "1200", "-8.0"], strict=True)):
        prompt = source[index]
        assert prompt.id == index
        assert prompt.text == f"Question: {record['question']}\nAnswer: "
        assert TOKENIZER.decode(prompt.tokens) == prompt.text
        assert prompt.answer == prompt.solution == record["answer"]
        judge = {"prompt": prompt.text, "response": f"It is\n#### {number}", "answer": prompt.answer}
        assert REWARDS["final_number"](**judge) == REWARDS["format"](response=judge["response"]) == 1


def test_template_fills_any_field_and_leaves_other_braces_alone(tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": "1+{n}", "unit": "kg", "answer": 3, "steps": "1+2=3"})
    prompt = load(path, prompt_template="{prompt} in {unit}, \\boxed{} {1 2}", solution_field="steps")[0]
    assert prompt.text == "1+{n} in kg, \\boxed{} {1 2}"
    assert (prompt.answer, prompt.solution) == ("3", "1+2=3")
    literal = load(path, prompt_template=r"{prompt} as \frac{{1}}{{prompt}}, {{}} and {{1 2}}")[0].text
    assert literal == r"1+{n} as \frac{1}{prompt}, {{}} and {{1 2}}"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            b"{'prompt': 1}\n",
            r"prompts.jsonl:3: not JSON in UTF-8 \(Expecting .*, character 2\); expected",
        ),
        (b'{"prompt": "\xff", "answer": ""}\n', r"prompts.jsonl:3: not JSON in UTF-8"),
        (b"[1, 2]\n", r"prompts.jsonl:3: found '\[1, 2\]'; expected a JSON object"),
        (b"null\n", r"prompts.jsonl:3: found 'null'"),
        ({"promt": "a", "answer": "b"}, r":3: no field 'prompt'; did you mean 'promt'\? Fields: promt, answer"),
        ({"prompt": "a"}, r":3: no field 'answer'"),
        ({"prompt": "a", "answer": ["b"]}, r""":3: field 'answer' is \["b"\]; expected text or a number"""),
        ({"prompt": " \n", "answer": "b"}, r":3: field 'prompt' is empty"),
        (b'{"prompt": "a", "answer": NaN}', r":3: field 'answer' is nan, which JSON does not have"),
        (b'{"prompt": "a", "answer": -Infinity}', r":3: field 'answer' is -inf"),
        (b'{"prompt": ' + b"[" * 100_000, r":3: not JSON in UTF-8 \(maximum recursion"),
        ({f"field {i}": 1 for i in range(5000)}, r":3: no field 'prompt'.*characters\)$"),
        ({"prompt": "na\u00efve", "answer": "b"}, r":3: character 'ï' at position 5 of 'Q: naïve'"),
        ({"prompt": "x" * 198, "answer": "b"}, r":3: the prompt has 201 tokens, the limit is 200 "),
    ],
)
def test_a_line_that_is_no_prompt_is_named(tmp_path: Path, line: bytes | dict[str, Any], message: str) -> None:
    path = write(tmp_path, {"prompt": "x" * 197, "answer": "b"}, b"\n", line)
    with pytest.raises(DataError, match=message):
        load(path, prompt_template="Q: {prompt}")


def test_overlong_prompts_can_be_dropped_with_a_count(tmp_path: Path) -> None:
    path = write(tmp_path, *({"prompt": "x" * length, "answer": str(length)} for length in (11, 10, 12, 9)))
    source = load(path, max_prompt_tokens=10, overlong="drop")
    assert [(source[i].id, source[i].answer) for i in range(2)] == [(0, "10"), (1, "9")]
    assert (source.size, source.dropped) == (2, {"too long": 2})
    with pytest.raises(DataError, match=r"contains no prompts.*4 too long were left out"):
        load(path, max_prompt_tokens=8, overlong="drop")


def test_size_takes_the_first_prompts_of_a_file(gsm8k: Path) -> None:
    source = load(gsm8k, prompt_field="question", size=2)
    assert source.size == 2
    assert [source[i].text for i in range(2)] == [record["question"] for record in GSM8K_LIKE[:2]]
    assert load(gsm8k, prompt_field="question", size=9).size == 3


def test_missing_and_empty_files(gsm8k: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"trian.jsonl does not exist; did you mean 'train.jsonl'\?"):
        load(gsm8k.with_name("trian.jsonl"))
    with pytest.raises(DataError, match=r"does not exist\. Expected a JSONL or Parquet file"):
        load(tmp_path / "nowhere" / "x.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"is a folder without files that end in \.parquet, \.jsonl"):
        load(tmp_path / "empty")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(DataError, match=r"fifo is not a regular file\. Expected"):
        load(tmp_path / "fifo")
    with pytest.raises(DataError, match="contains no prompts"):
        load(write(tmp_path, b"\n  \n"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlong": "cut"}, "must be 'error' or 'drop'"),
        ({"prompt_template": "Solve it:"}, "has no {prompt}"),
        ({"size": 0}, "at least 1"),
    ],
)
def test_settings_that_cannot_work(gsm8k: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(gsm8k, prompt_field="question", **options)


def test_a_task_is_an_endless_source_to_train_on_and_a_fixed_list_to_evaluate() -> None:
    train = load("task:sort_digits")
    held_out = load("task:sort_digits", split="eval", size=50)
    assert (train.size, held_out.size) == (None, 50)
    for source, index in ((train, 10**9), (held_out, 49)):
        prompt = source[index]
        assert prompt.id == index
        assert TOKENIZER.decode(prompt.tokens) == prompt.text == source[index].text
        assert prompt.answer == "".join(sorted(prompt.text.removesuffix(">")))
    longer = load("task:sort_digits", task={"min_length": 12, "max_length": 12})
    assert len(longer[0].tokens) == 13


def test_a_task_that_the_tokenizer_or_the_limit_cannot_hold() -> None:
    with pytest.raises(DataError, match="character '>'"):
        open_source(DataSpec("task:sort_digits", "train", 9), CharacterTokenizer("0123456789"), seed=0)
    with pytest.raises(DataError, match="has 9 tokens, the limit is 8 "):
        load("task:sort_digits", task={"min_length": 8}, max_prompt_tokens=8)
    with pytest.raises(ConfigError, match="needs a size"):
        load("task:sort_digits", split="eval")
    with pytest.raises(ConfigError, match="'train' or 'eval'"):
        load("task:sort_digits", split="test")


def test_order_is_a_fresh_permutation_each_epoch() -> None:
    order = PromptOrder(50, seed=3)
    epochs = [[order[50 * epoch + k] for k in range(50)] for epoch in range(3)]
    assert all(Counter(epoch) == Counter(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != list(range(50))
    assert [PromptOrder(50, seed=4)[k] for k in range(50)] != epochs[0]


def test_order_needs_only_the_position_to_resume() -> None:
    whole = [PromptOrder(7, seed=0)[k] for k in range(40)]
    running = PromptOrder(7, seed=0)
    assert [running[k] for k in range(40)] == whole
    assert [running[k] for k in reversed(range(40))] == whole[::-1]
    assert whole[:7] == [3, 6, 0, 1, 5, 2, 4]


def test_all_permutations_are_equally_likely() -> None:
    """chi^2 over the 24 orders of four prompts, in 2,400 epochs; 23 degrees of freedom exceed 50 once in 1,000."""
    drawn = PromptOrder(4, seed=0).slice(0, 4 * 2400)
    found = Counter(tuple(drawn[i : i + 4]) for i in range(0, len(drawn), 4))
    assert len(found) == 24
    assert sum((number - 100) ** 2 / 100 for number in found.values()) < 50


def test_an_order_of_a_billion_needs_no_memory() -> None:
    order = PromptOrder(10**9, seed=1)
    start = time.perf_counter()
    drawn = order.slice(10**9 - 500, 1000)
    assert time.perf_counter() - start < 5
    assert len(set(drawn[:500])) == len(set(drawn[500:])) == 500 and 0 <= min(drawn) <= max(drawn) < 10**9


def test_an_endless_source_is_taken_as_it_comes() -> None:
    assert [PromptOrder(None, seed=5)[k] for k in (0, 7, 10**12)] == [0, 7, 10**12]
