"""Does a parallel layout change the numbers? One rollout batch and one update on each of two layouts, compared.

    python tools/check_layout.py --config run.yaml --layout tp=2,pp=2,ep=4,dp=2
    python tools/check_layout.py --config run.yaml --layout tp=4,ep=8,dp=16 --max-processes 16

Both layouts start from the same weights and draw the same random numbers, so the rollouts must be equal token for
token, and the loss, every metric, the gradient norm and the gradient of every parameter up to rounding. So that a wrong
ratio or a wrong clip cannot hide, the update is not made at ratio 1: advantages and old and reference log-probs are
drawn around the policy's own, by sequence, wide enough that some responses are clipped.

A model of more than SMALL parameters is shrunk, and a layout of more than --max-processes reduced, by rules that are
printed; the axes of the layout stay above 1 where they were. Runs in float64 on the CPU, unless precision.device is
given among the overrides. Exit status: 0 equal, 1 not equal, 2 a layout or a setting that cannot work.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import math
import os
import random
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gspo_megatron.base.errors import ConfigError, DataError, plural, printable
from gspo_megatron.base.ragged import Ragged
from gspo_megatron.build.checks import check_config
from gspo_megatron.build.inputs import settle, tokenizer_spec
from gspo_megatron.build.trainer import device_of, open_trainer
from gspo_megatron.config.hugging_face import folder_settings
from gspo_megatron.config.loading import load_config, replaced
from gspo_megatron.config.sections import Config, DataConfig, RewardConfig
from gspo_megatron.data.tokenizers import load_tokenizer
from gspo_megatron.layout.layout import AXES
from gspo_megatron.layout.stages import stage_layers
from gspo_megatron.models.counts import count_parameters
from gspo_megatron.models.families import family_of
from gspo_megatron.monitor.catalogue import OF_THE_MACHINE
from gspo_megatron.monitor.console import Console
from gspo_megatron.run.stages import reduced as reduced_metrics
from gspo_megatron.run.step_state import StepState
from gspo_megatron.run.trainer import Trainer
from gspo_megatron.testing.local_ranks import RankError, run_distributed

with warnings.catch_warnings():
    # Megatron-Core warns about every optional package it does without.
    warnings.simplefilter("ignore")
    import gspo_megatron.mcore.sampler
    import gspo_megatron.mcore.saving  # noqa: F401  (both for the forked ranks)
    from gspo_megatron.checkpoint.place import Place
    from gspo_megatron.mcore.parameters import is_vocabulary
    from gspo_megatron.mcore.policy import MegatronPolicy

SMALL = 20_000_000
ON_CPU = ("precision.device=cpu", "precision.dtype=fp64", "precision.fp8=none", "precision.transformer_engine=auto")
"""Where and how both layouts run, unless the overrides say otherwise."""
FIXED = (
    # Complete, unclipped gradients on every rank; one update for all mini-batches.
    "optimizer.distributed=false",
    "optimizer.clip_grad=1e9",
    "algorithm.updates_per_rollout=1",
    "checkpoint.load=none",
    "logging.tensorboard=false",
)
# The gradient norm is summed in float32 by Megatron whatever the precision.
TOLERANCES = {"fp64": (1e-12, 1e-12, 1e-6), "fp32": (1e-5, 1e-4, 1e-4), "bf16": (3e-2, 1e-1, 1e-1)}
"""By precision.dtype, relative: of the loss and the metrics, of gradients, of the gradient norm."""


@dataclass(frozen=True)
class LayoutRequest:
    """A layout as it is written: `tp=2,pp=2,dp=2`. Axes that are not named are 1. `first` and `last` are layers of the
    outer pipeline stages (parallel.first_stage_layers, parallel.last_stage_layers); 0: as many as the others."""

    dp: int = 1
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    first: int = 0
    last: int = 0

    @classmethod
    def parse(cls, text: str) -> LayoutRequest:
        """The layout that `text` describes.

        Raises:
            ConfigError: `text` is not of this form.
        """
        parts = [part.partition("=") for part in text.split(",")]
        try:
            sizes = {axis.strip(): int(size) for axis, _, size in parts}
            if len(sizes) < len(parts) or min(sizes.values()) < 1:
                raise ValueError
            return cls(**sizes)
        except (TypeError, ValueError):
            raise ConfigError(
                f"layout {text!r}: write it as tp=2,pp=2,dp=4, with sizes above 0, each at most once, of the axes dp, "
                f"{', '.join(AXES)}, and first and last for the layers of the outer pipeline stages"
            ) from None

    @classmethod
    def of_run(cls, config: Config) -> LayoutRequest:
        """The run's own layout, with the fewest data-parallel ranks that can share its experts."""
        p = config.parallel
        layout = cls(
            **{axis: getattr(p, axis) for axis in AXES}, first=p.first_stage_layers or 0, last=p.last_stage_layers or 0
        )
        experts, dense = p.ep * p.etp, p.tp * p.cp
        return replace(layout, dp=math.lcm(experts, dense) // dense)

    @property
    def world_size(self) -> int:
        return self.dp * self.tp * self.pp * self.cp

    @property
    def overrides(self) -> list[str]:
        stages = [f"parallel.{name}_stage_layers={getattr(self, name) or 'null'}" for name in ("first", "last")]
        return [f"parallel.{axis}={getattr(self, axis)}" for axis in AXES] + stages

    def __str__(self) -> str:
        least = LayoutRequest()
        shown = [f"{name}={size}" for name, size in vars(self).items() if size > getattr(least, name)]
        return " ".join(shown) or "one process"


Drawn = list[tuple[int, list[int], list[float], Ragged | None, Tensor | None]]
"""(rollout id, tokens, log-probs, ids kept for each token, experts of each token) of every rollout, as the sampler drew
them."""


@dataclass
class Report:
    """What one layout computed: the same on every process, gradients by their names in the whole model."""

    rollouts: Drawn
    metrics: dict[str, float]
    gradients: dict[str, Tensor]
    replicas: dict[str, float]
    """Largest difference between two ranks that hold the same slice of a gradient, relative to it."""


# --- on a rank ---


def measure(config: Config, given: Drawn | None) -> tuple[Drawn, dict[str, float], list[tuple[Place, Tensor]]]:
    """(rollouts, metrics, slices of gradients) of one rollout batch and one update, as this rank has them. With `given`
    the update is made from those rollouts instead of its own."""
    # 0.19.2 warns on every rank that its own GPTModel is deprecated.
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    device = device_of(config)
    with tempfile.TemporaryDirectory() as folder:
        inputs = settle(replaced(config, {"run.dir": folder}), device.world_size)
        with open_trainer(inputs, device, Console(on=False)) as trainer:
            drawn, metrics = one_update(trainer, given)
            assert isinstance(trainer.policy, MegatronPolicy)
            slices = [(place, grad.detach().cpu().clone()) for place, grad in trainer.policy.gradients()]
    return drawn, metrics, slices


def one_update(trainer: Trainer, given: Drawn | None) -> tuple[Drawn, dict[str, float]]:
    """Samples, perturbs, scores and updates; returns what was sampled and the metrics of all ranks."""
    algorithm = trainer.algorithm
    trainer.policy.begin(with_reference=algorithm.needs_reference)
    groups = trainer.sample(1)
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    held = [(r.id, r.routed_experts) for r in rollouts if r.routed_experts is not None]
    experts = dict(trainer.ranks.gather(held))
    drawn = [(r.id, r.tokens, r.log_probs, r.support, experts.get(r.id)) for r in rollouts]
    for rollout, (_, tokens, log_probs, support, routed) in zip(rollouts, given or drawn, strict=True):
        rollout.tokens, rollout.log_probs, rollout.support = tokens, log_probs, support
        rollout.routed_experts = routed
    sequences = trainer.advantages(groups)
    clip = algorithm.variant.clip.reach
    for rollout, sequence in zip(rollouts, sequences, strict=True):
        draw = random.Random(f"{trainer.config.run.seed}:{rollout.id}")
        own = torch.tensor(rollout.log_probs, dtype=trainer.policy.score_dtype)
        sequence.advantage = draw.gauss(0, 1)
        # A shift of the whole response, which moves a sequence's ratio, and one of each token.
        shift = draw.gauss(0, 2 * clip) / (len(own) if algorithm.variant.level.name == "sequence_sum" else 1)
        noise = torch.tensor([shift + draw.gauss(0, clip) for _ in own])
        sequence.columns["old_log_probs"] = own + noise.to(own)
        if algorithm.needs_reference:
            sequence.columns["ref_log_probs"] = own + torch.tensor([draw.gauss(0, 0.3) for _ in own]).to(own)
    step = StepState(1, groups, sequences)
    trainer.pack(step)
    [batch] = step.batches
    scored = trainer.policy.log_probs(batch.micro_batches, as_old=True)
    update = trainer.policy.update(batch, trainer.loss, lr=trainer.config.optimizer.lr)
    reduced = reduced_metrics([update], trainer.ranks)
    metrics = {name: value for name, value in reduced.items() if not name.startswith(OF_THE_MACHINE)}
    # Each context-parallel rank has scored its own part of the sequences.
    metrics["log_probs"] = math.fsum(trainer.ranks.gather([sum(float(part.sum()) for part in scored)]))
    if broken := [f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)]:
        raise FloatingPointError(f"{', '.join(broken)}: nothing can be compared; start from other weights or settings")
    return drawn, metrics


# --- from ranks to one report ---


def run(
    config: Config, world_size: int, timeout_s: float, given: Drawn | None = None, work: Callable[..., Any] = measure
) -> Report:
    """Measures a layout on `world_size` processes of this machine, and joins the slices of gradients."""
    results = run_distributed(
        work,
        world_size,
        config,
        given,
        timeout_s=timeout_s,
        like_torchrun=True,
        fresh=config.precision.device != "cpu" and torch.cuda.is_available(),
    )
    drawn, metrics, _ = results[0]
    found: dict[str, dict[int, Tensor]] = {}
    replicas: dict[str, float] = {}
    places = {place.name: place for _, _, slices in results for place, _ in slices}
    for _, _, slices in results:
        for place, gradient in slices:
            first = found.setdefault(place.name, {}).setdefault(place.index, gradient.double())
            difference = relative_difference(gradient.double(), first)
            replicas[place.name] = max(replicas.get(place.name, 0.0), difference)
    gradients = {name: place.join([found[name][i] for i in range(place.count)]) for name, place in places.items()}
    for name in filter(is_vocabulary, gradients):
        # The rows after the vocabulary pad it to a multiple of tp.
        gradients[name] = gradients[name][: config.model.vocab_size]
    return Report(drawn, metrics, gradients, replicas)


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """max |ours - theirs| / max |theirs|; 0 or infinity if theirs is zero; infinity if either has a NaN."""
    difference, size = float((ours - theirs).abs().max()), float(theirs.abs().max())
    if math.isnan(difference):
        return math.inf
    return difference / size if size else (0.0 if difference == 0 else math.inf)


@dataclass
class Row:
    """One line of the comparison. `difference` is relative."""

    name: str
    reference: float | None
    layout: float | None
    difference: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.difference <= self.tolerance


def compare(reference: Report, layout: Report, dtype: str) -> list[Row]:
    """Everything that has to be equal: rollouts, metrics, then gradients, worst first."""
    of_metrics, of_gradients, of_norm = TOLERANCES[dtype]
    pairs = list(zip(reference.rollouts, layout.rollouts, strict=True))
    # Below float64 the rounding of a log-prob may move the boundary between two tokens past a random number.
    unequal = sum(theirs[:2] != ours[:2] for theirs, ours in pairs)
    rows = [Row("rollouts that differ", 0, unequal, float(unequal), 0.0 if dtype == "fp64" else math.inf)]
    for name, expected in sorted(reference.metrics.items()):
        found = layout.metrics[name]
        size = abs(expected) if name in ("loss", "grad_norm", "log_probs") else max(1.0, abs(expected))
        tolerance = of_norm if name == "grad_norm" else of_metrics
        rows.append(Row(name, expected, found, abs(found - expected) / size if size else abs(found), tolerance))
    assert reference.gradients.keys() == layout.gradients.keys()
    gradients = [
        Row(name, None, None, relative_difference(layout.gradients[name], expected), of_gradients)
        for name, expected in reference.gradients.items()
    ]
    replicas = [Row(f"{name}, between ranks", None, None, x, of_gradients) for name, x in layout.replicas.items()]
    return rows + sorted(gradients + replicas, key=lambda row: -row.difference)


# --- what makes a large run small ---


def reduced(asked: LayoutRequest, max_processes: int) -> LayoutRequest:
    """The layout with at most `max_processes`. Its axes divide those asked for and stay above 1 where they were; of all
    such layouts it has the largest tp, then pp, cp, etp, ep and dp."""
    kept = ("tp", "pp", "cp", "etp", "ep", "dp")
    sizes = [[d for d in range(n, 1, -1) if n % d == 0] or [1] for n in (getattr(asked, axis) for axis in kept)]
    smaller = [replace(asked, **dict(zip(kept, chosen, strict=True))) for chosen in itertools.product(*sizes)]
    # Experts are spread over the ranks of a pipeline stage.
    smaller = [x for x in smaller if x.world_size // x.pp % (x.ep * x.etp) == 0]
    fitting = [x for x in smaller if x.world_size <= max_processes]
    if not fitting:
        raise ConfigError(
            f"layout {asked} needs {min(x.world_size for x in smaller)} processes to keep every axis above 1, more "
            f"than --max-processes {max_processes}; raise it, or check the axes in two layouts"
        )
    return fitting[0]


def with_shallow_stages(asked: LayoutRequest, smaller: LayoutRequest, num_layers: int) -> tuple[LayoutRequest, int]:
    """`smaller`, a reduction of `asked`, and a number of layers that it splits as unevenly: one layer in each virtual
    stage of the shallowest stages, one more in each of deeper ones. Of two stages the last is one deeper, if `asked`
    has equal ones around those between."""
    sizes = stage_layers(num_layers, asked.pp, asked.first or None, asked.last or None)
    depths = sorted({*sizes})
    first, middle, last = (smaller.vpp * (1 + depths.index(size)) for size in (sizes[0], sizes[1], sizes[-1]))
    if smaller.pp == 2 and first == last:
        last += smaller.vpp
    return replace(smaller, first=first, last=last), first + last + (smaller.pp - 2) * middle


def shrunk(config: Config, layouts: Sequence[LayoutRequest]) -> list[str]:
    """Overrides for a model that is as small as the layouts allow, with every part of the large one."""
    axis = {a: math.lcm(*(getattr(layout, a) for layout in layouts)) for a in (*AXES, "dp")}
    shape = config.model.shape
    length = math.lcm(32, 2 * axis["cp"])
    sizes = {
        **{f"model.{name}": size for name, size in family_of(shape).small(shape, axis).items()},
        "model.max_sequence_length": length,
        "model.vocab_size": "null",
        "rollout.max_new_tokens": 16,
        "rollout.group_size": 4,
        "rollout.prompts_per_step": max(4, axis["dp"] * axis["cp"]),
        "train.tokens_per_micro_batch": 2 * length,
    }
    return [f"{key}={value}" for key, value in sizes.items()]


def without_folder(config: Config) -> list[str]:
    """Overrides that give the model the sizes of its folder, but not the folder, with which others would not agree."""
    if config.model.hf is None:
        return []
    sizes = folder_settings(config.model.hf)
    return ["model.hf=null", *(f"model.{name}={'null' if size is None else size}" for name, size in sizes.items())]


def task_instead() -> list[str]:
    """Overrides that replace the run's own data, tokenizer and rewards with a task of short prompts."""
    name, sizes = "task:sort_digits", {"min_length": 2, "max_length": 12}
    task = DataConfig(train=name, eval=name, tokenizer="characters:0123456789>", task=sizes, eval_size=4)
    return [
        f"{section}.{key}={'null' if value is None else value}"
        for section, settings in (("data", task), ("reward", RewardConfig()))
        for key, value in asdict(settings).items()
    ]


# --- the command ---


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", help="YAML file of the run")
    parser.add_argument(
        "--layout",
        help="the layout to check, such as tp=2,pp=2,ep=4,dp=2 (default: the config's own, with as few data-parallel "
        "ranks as share its experts)",
    )
    parser.add_argument("--reference", default="dp=1", help="the layout to compare it with (default: one process)")
    parser.add_argument("--max-processes", type=int, default=16, help="a larger layout is reduced (default: 16)")
    parser.add_argument("--worst", type=int, default=8, help="gradients shown, worst first (default: 8)")
    parser.add_argument(
        "--timeout-s", type=float, default=600.0, help="of each layout's run on a quiet machine (default: 600)"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args(argv)
    try:
        rows = check(options)
    except (ConfigError, DataError, RankError) as error:
        print(printable(f"{type(error).__name__}: {error}"), file=sys.stderr)
        return 2
    show(rows, options.worst)
    return 0 if all(row.ok for row in rows) else 1


def check(options: argparse.Namespace) -> list[Row]:
    """Shrinks a large run, measures both layouts and compares them."""
    settings = [*ON_CPU, *options.overrides, *FIXED]
    config = load_config(options.config, settings)
    layout = LayoutRequest.parse(options.layout) if options.layout else LayoutRequest.of_run(config)
    asked = {"reference": LayoutRequest.parse(options.reference), "layout": layout}
    for layout in asked.values():
        check_config(load_config(options.config, [*settings, *layout.overrides]), layout.world_size)
    layouts = {name: reduced(layout, options.max_processes) for name, layout in asked.items()}
    for name, layout in layouts.items():
        if layout != asked[name]:
            print(f"{name} {asked[name]} is reduced to {layout}, for --max-processes {options.max_processes}")
    # Without `settle`: the files of a large run may be elsewhere, and its own layout is that of another world size.
    vocab_size = config.model.vocab_size or load_tokenizer(tokenizer_spec(config)).vocab_size
    shape = replace(config.model.shape, vocab_size=vocab_size)
    if count_parameters(shape).total > SMALL:
        smaller = shrunk(config, list(layouts.values()))
        for name, layout in asked.items():
            if layout.first or layout.last:
                layouts[name], num_layers = with_shallow_stages(layout, layouts[name], shape.num_layers)
                print(f"{name}: stages of unequal depth become {layouts[name]}")
                smaller.append(f"model.num_layers={num_layers}")
        weights = " with random weights" if config.model.hf else ""
        print(
            f"the model has more than {SMALL:,} parameters and is shrunk{weights}: {' '.join(smaller)}, on "
            "task:sort_digits"
        )
        settings += [*without_folder(config), *smaller, *task_instead()]
    reports: dict[str, Report] = {}
    for name, layout in layouts.items():
        inputs = settle(load_config(options.config, [*settings, *layout.overrides]), layout.world_size)
        config = inputs.config
        print(f"{name}: {plural(layout.world_size, 'process')} = {inputs.layout}, {config.precision.dtype}", flush=True)
        given = reports["reference"].rollouts if reports else None
        reports[name] = run(config, layout.world_size, options.timeout_s, given)
    return compare(reports["reference"], reports["layout"], config.precision.dtype)


def show(rows: Sequence[Row], worst: int) -> None:
    """The table: metrics, the worst gradients, and the verdict."""
    metrics = [row for row in rows if row.reference is not None]
    gradients = [row for row in rows if row.reference is None]
    width = max(len(row.name) for row in metrics + gradients[:worst])
    print(f"\n{'':{width}}  {'reference':>22}  {'layout':>22}  {'difference':>10}  tolerance")
    for row in metrics:
        print(f"{row.name:{width}}  {row.reference:>22.15g}  {row.layout:>22.15g}  {_judged(row)}")
    print(
        f"\ngradients of {len(gradients) // 2} parameters, relative to the largest element of each; differences from "
        "the reference and between ranks that hold the same, the worst first"
    )
    for row in gradients[:worst]:
        print(f"{row.name:{width}}  {'':>22}  {'':>22}  {_judged(row)}")
    failed = [row for row in rows if not row.ok]
    verdict = f"NOT EQUAL: {len(failed)} of {len(rows)} comparisons, worst {_worst(failed).name}" if failed else "EQUAL"
    print(f"\n{verdict}")


def _judged(row: Row) -> str:
    return f"{row.difference:>10.1e}  {row.tolerance:>9.0e}{'' if row.ok else '  <-- differs'}"


def _worst(rows: Sequence[Row]) -> Row:
    return max(rows, key=lambda row: row.difference / row.tolerance if row.tolerance else math.inf)


if __name__ == "__main__":
    # Inherited by the ranks: each would print Megatron-Core's warnings again.
    os.environ["PYTHONWARNINGS"] = "ignore"
    sys.exit(main())
