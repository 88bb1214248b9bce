"""The data of a run before the run: rows as the model sees them, lengths, what is left out, and what the reward says.

    python tools/inspect_data.py examples/own_data.yaml
    python tools/inspect_data.py CONFIG [section.key=value ...] [--split eval] [--rows 3] [--limit 100000] [--judge 16]

Nothing stops at a bad row: all are counted by reason, and the first ones of each are shown. The reward is asked about
written solutions, and about the same number of wrong answers: the solution of another row, whose answer is another.
Exit status 1: a row that would stop the run, or a reward that does not tell right from wrong.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from gspo_megatron.base.batches import Prompt, Rollout
from gspo_megatron.base.errors import ConfigError, DataError, plural, printable, shortened
from gspo_megatron.build.data import NamedSource, sources_of
from gspo_megatron.build.inputs import tokenizer_spec, with_rewards
from gspo_megatron.build.rewards import rewards_of
from gspo_megatron.config.loading import load_config, replaced
from gspo_megatron.config.sections import Config
from gspo_megatron.data.prompts import Read, read_rows
from gspo_megatron.data.sources import SOURCES, filters_of, open_source, reader_of, scheme_of
from gspo_megatron.data.token_ids import Tokenizer
from gspo_megatron.data.tokenizers import load_tokenizer
from gspo_megatron.rewards.rewards import Reward, score_rollouts
from gspo_megatron.rewards.user_code import plain

SHOWN_CHARACTERS, SHOWN_TOKENS, SHOWN_PLACES = 2000, 60, 3
BAR = 40
"""Characters of the longest bar of the histogram."""


@dataclass
class Found:
    """What the rows of a source have become."""

    prompts: list[Prompt] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    solutions: list[int] = field(default_factory=list)
    """Tokens of the solutions, with EOS; none where the tokenizer cannot write one."""
    unwritten: list[str] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)

    def add(self, read: Read, tokenizer: Tokenizer, kept: int) -> None:
        if read.error:
            self.reasons[read.error.reason] += 1
            if len(shown := self.places.setdefault(read.error.reason, [])) < SHOWN_PLACES:
                shown.append(str(read.error))
        if read.example is None:
            return
        if read.tokens:
            self.lengths.append(len(read.tokens))
        if read.error is None:
            text, answer, solution, messages, metadata = read.example
            prompt = Prompt(read.row, text, tuple(read.tokens), answer, solution, messages, metadata)
            self.add_prompt(prompt, read.place, tokenizer, kept)

    def add_prompt(self, prompt: Prompt, place: str, tokenizer: Tokenizer, kept: int) -> None:
        if len(self.prompts) < kept:
            self.prompts.append(prompt)
        try:
            self.solutions.append(len(tokenizer.encode(prompt.solution)) + 1)
        except DataError as error:
            self.unwritten.append(f"{place}: {error}")


def inspect_source(
    config: Config, source: NamedSource, tokenizer: Tokenizer, *, rows: int, limit: int, kept: int
) -> tuple[Found, Iterator[str]]:
    """What is found in a source, and the report about it."""
    spec, found = source.spec, Found()
    of_rows = SOURCES[scheme_of(spec.source)].rows
    if of_rows is None:
        prompts = open_source(spec, tokenizer, seed=config.run.seed)
        for index in range(min(kept, prompts.size or kept)):
            found.lengths.append(len(prompts[index].tokens))
            found.add_prompt(prompts[index], f"prompt {index}", tokenizer, kept)
    else:
        reads = read_rows(of_rows(spec), reader_of(spec, tokenizer), tokenizer, filters_of(spec))
        for read in islice(reads, limit):
            found.add(read, tokenizer, kept)
    return found, _report(config, source, tokenizer, found, rows)


def _report(config: Config, source: NamedSource, tokenizer: Tokenizer, found: Found, rows: int) -> Iterator[str]:
    yield f"== {source.name or source.spec.source}: {plural(len(found.solutions) + len(found.unwritten), 'prompt')}"
    for number, prompt in enumerate(found.prompts[:rows], start=1):
        yield from _row(number, prompt, tokenizer)
    if found.lengths:
        limit = source.spec.max_prompt_tokens
        yield "-- tokens of a prompt (data.max_prompt_tokens and the room in the model allow " + f"{limit:,})"
        yield from _histogram(found.lengths)
    if found.solutions:
        most = config.rollout.max_new_tokens
        cut = sum(length > most for length in found.solutions)
        yield "-- tokens of a written solution, with its end"
        yield from _histogram(found.solutions)
        if cut:
            yield f"   {cut:,} of {len(found.solutions):,} are longer than rollout.max_new_tokens={most} allows"
    for reason, number in found.reasons.most_common():
        yield f"-- {number:,} {reason}"
        yield from (f"   {shortened(text, 400)}" for text in found.places[reason])
    if found.unwritten:
        yield f"-- {len(found.unwritten):,} solutions that the tokenizer cannot write"
        yield from (f"   {shortened(text, 400)}" for text in found.unwritten[:SHOWN_PLACES])


def _row(number: int, prompt: Prompt, tokenizer: Tokenizer) -> Iterator[str]:
    pieces = " ".join(repr(tokenizer.piece(token))[1:-1] for token in prompt.tokens[:SHOWN_TOKENS])
    more = f" ... ({len(prompt.tokens) - SHOWN_TOKENS} more)" if len(prompt.tokens) > SHOWN_TOKENS else ""
    yield f"-- prompt {number}: {plural(len(prompt.tokens), 'token')}"
    # A prompt may hold NUL, or what steers a terminal.
    yield from (f"   | {line}" for line in plain(prompt.text, SHOWN_CHARACTERS).split("\n"))
    yield f"   pieces:   {pieces}{more}"
    yield f"   answer:   {shortened(prompt.answer)!r}"
    if prompt.solution != prompt.answer:
        yield f"   solution: {shortened(prompt.solution)!r}"
    if prompt.metadata:
        yield f"   metadata: {shortened(str(prompt.metadata))}"


def _histogram(lengths: Sequence[int]) -> Iterator[str]:
    """By powers of two."""
    counts = Counter(max(length - 1, 0).bit_length() for length in lengths)
    for power in range(min(counts), max(counts) + 1):
        first, last = (1 << power >> 1) + 1 if power else 1, 1 << power
        bar = "#" * -(-BAR * counts[power] // max(counts.values()))
        yield f"   {first:>7,} to {last:>7,}  {counts[power]:>9,}  {bar}"
    ordered = sorted(lengths)
    half, most = ordered[(len(ordered) - 1) // 2], ordered[min(len(ordered) * 9 // 10, len(ordered) - 1)]
    yield f"   median {half:,}, nine in ten at most {most:,}, longest {ordered[-1]:,}"


def judge(rewards: Reward, prompts: Sequence[Prompt]) -> tuple[bool, Iterator[str]]:
    """Whether the reward tells written solutions from wrong answers, and the report about it."""
    pairs = [(p, next((q for q in prompts if q.answer != p.answer), None)) for p in prompts]
    cases = [(p, p.solution, wrong.solution) for p, wrong in pairs if wrong is not None]
    right = _scored(rewards, [(prompt, solution) for prompt, solution, _ in cases])
    wrong = _scored(rewards, [(prompt, other) for prompt, _, other in cases])
    if not cases:
        return True, iter(["-- rewards: fewer than two prompts with different answers; nothing to compare"])
    good = statistics.fmean(r.reward for r in right), statistics.fmean(r.reward for r in wrong)
    tells = good[0] > good[1]

    def report() -> Iterator[str]:
        solutions = plural(len(cases), "written solution")
        yield f"-- rewards of {solutions}: mean {good[0]:g}; of wrong answers: mean {good[1]:g}"
        if not tells:
            yield "   the reward does not tell right from wrong; look at what it expects of a response"
        for said, scored in (("the written solution", right), ("a wrong answer", wrong)):
            odd = [r for r in scored if r.reward_error or (r.reward > good[1]) is not (scored is right)]
            for r in odd[:SHOWN_PLACES]:
                yield (
                    f"   {r.reward:g} for {said} {shortened(r.text, 80)!r} to {shortened(r.prompt.text, 60)!r}, whose "
                    f"answer is {shortened(r.prompt.answer, 60)!r} {r.reward_error}".rstrip()
                )

    return tells, report()


def _scored(rewards: Reward, asked: Sequence[tuple[Prompt, str]]) -> list[Rollout]:
    rollouts = [
        Rollout(i, prompt, [], [], truncated=False, policy_version=0, text=text)
        for i, (prompt, text) in enumerate(asked)
    ]
    score_rollouts(rewards, rollouts)
    return rollouts


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("config", help="the YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--split", choices=("train", "eval"), default="train")
    parser.add_argument("--rows", type=int, default=3, help="prompts to show")
    parser.add_argument("--limit", type=int, default=100_000, help="rows to read of each source")
    parser.add_argument("--judge", type=int, default=16, help="solutions to give to the reward")
    options = parser.parse_intermixed_args(argv)
    try:
        return inspect(load_config(options.config, options.overrides), options)
    except (ConfigError, DataError) as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return 2


def inspect(config: Config, options: argparse.Namespace) -> int:
    config = with_rewards(replaced(config, {"data.tokenizer": tokenizer_spec(config)}))
    tokenizer = load_tokenizer(config.data.tokenizer)
    rewards = rewards_of(replaced(config, {"reward.on_error": "count"}))
    kept, good = max(options.rows, options.judge), True
    for source in sources_of(config, options.split):
        found, report = inspect_source(config, source, tokenizer, rows=options.rows, limit=options.limit, kept=kept)
        print(*report, sep="\n")
        named = [replace(prompt, source=source.name) for prompt in found.prompts[: options.judge]]
        tells, verdict = judge(rewards, named)
        print(*verdict, sep="\n")
        filters = filters_of(source.spec)
        stops = [reason for reason in found.reasons if filters.rule(reason) == "error"]
        if stops:
            print(f"-- such rows would stop the run (data.overlong, data.bad_rows): {', '.join(stops)}")
        good = good and tells and not stops
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
