"""Opens an evaluator on this process: a model without an optimizer, and the source that samples from it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gspo_megatron.base.errors import plural
from gspo_megatron.base.files import written_aside
from gspo_megatron.base.protocols import Ranks
from gspo_megatron.build.environments import in_conversation
from gspo_megatron.build.eval_sets import rewards_in
from gspo_megatron.build.inputs import EvaluationInputs
from gspo_megatron.build.scoring import load_model
from gspo_megatron.build.trainer import at_work, open_groups
from gspo_megatron.device import Device
from gspo_megatron.monitor.console import Console
from gspo_megatron.monitor.run_directory import write_json_lines
from gspo_megatron.rollout.collective import HeldOutSource
from gspo_megatron.rollout.native.stopping import stops_of
from gspo_megatron.run.evaluation import EvalSet
from gspo_megatron.run.evaluation_table import markdown, table_of

TABLE = "table"
"""TABLE.json and TABLE.md are beside the responses."""


@dataclass(frozen=True)
class Evaluator:
    """Held-out sets, answered by the model at `weights`. Every process of the layout calls it together."""

    source: HeldOutSource
    ranks: Ranks
    sets: tuple[EvalSet, ...]
    weights: Path
    console: Console

    def write(self, folder: Path) -> None:
        """Writes SET.jsonl of each set, then the table, into `folder`, on the main process; prints the table.

        Raises:
            DataError: a response could not be scored.
        """
        results = []
        for each in self.sets:
            started = time.monotonic()
            self.console.say(f"{each.name}: {plural(each.num_prompts, 'prompt')}, {plural(each.n, 'response')} each")
            answered = each.answered(self.source)
            results.append((answered, time.monotonic() - started))
            if self.ranks.is_main:
                folder.mkdir(parents=True, exist_ok=True)
                write_json_lines(folder / f"{each.name}.jsonl", answered.rows())
        if not self.ranks.is_main:
            return
        table = table_of(str(self.weights), results)
        with written_aside(folder / f"{TABLE}.json") as file:
            json.dump(table, file, indent=1)
        with written_aside(folder / f"{TABLE}.md") as file:
            file.write(markdown(table))
        self.console.say(markdown(table))
        self.console.say(
            f"written to {folder}: {', '.join(s.name + '.jsonl' for s in self.sets)}, {TABLE}.json, {TABLE}.md"
        )


@contextmanager
def open_evaluator(inputs: EvaluationInputs, device: Device, console: Console) -> Iterator[Evaluator]:
    """Opens the evaluator of this process with the weights that the settings name. Collective.

    Raises:
        ConfigError: a service gives no score.
        CheckpointError: they cannot be loaded.
    """
    from gspo_megatron.mcore.sampler import MegatronSampler

    config, tokenizer = inputs.config, inputs.tokenizer
    assert config.model.vocab_size is not None, "settle_model sets model.vocab_size"
    # As in training, ids that the tokenizer does not have are not sampled.
    with (
        open_groups(config, inputs.layout, device, console) as (groups, use_te, _),
        at_work(rewards_in(inputs.rewards, inputs.sets), inputs.environment, config, device, groups),
    ):
        model, weights = load_model(inputs, device, console, groups, use_te, num_ids=tokenizer.vocab_size)
        sampler = MegatronSampler(
            model,
            stops=stops_of([*config.rollout.stop, *inputs.environment.stop], tokenizer),
            pad_id=tokenizer.pad_id,
            sign_of_life=console.sign_of_life,
        )
        asked = in_conversation(sampler, inputs.environment, config, tokenizer, groups)
        source = HeldOutSource(sampler=asked, ranks=groups, tokenizer=tokenizer, vocab_size=config.model.vocab_size)
        yield Evaluator(source, groups, inputs.sets, weights, console)
