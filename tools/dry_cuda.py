"""Builds the policy of a large run for any of its ranks, with a CUDA build of torch and without a GPU.

    python tools/dry_cuda.py --config examples/qwen3_235b_a22b_gspo.yaml --ranks 0,15        (`make dry-cuda`: all)
    python tools/dry_cuda.py --config run.yaml --world-size 128 --ranks all --layers 8 precision.fp8=blockwise

Each rank's model, gradient buffers, optimizer and reference are built as in a run, from fake tensors over a fake
process group (gspo_megatron/testing/dry_build.py), and compared with what does not come from them:

- with --ranks all, every element of every tensor is written into a checkpoint by exactly one rank, and `Policy.weights`
  gives the names and sizes that transformers has for this model;
- every rank has the parameters, and needs the memory, that the planner says (layout/memory.py).

The layers and FusedAdam are Transformer Engine's own; tests/te/stand_in, which must be on PYTHONPATH, takes the place
of its compiled extension. With --without-te they are what a run without it falls back to: Megatron-Core's local layers
and torch's AdamW. Exit status: 0 all equal, 1 not, 2 a setting that cannot work.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import date
from importlib.metadata import version
from math import lcm
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mock_cuda
import torch

from gspo_megatron.base.errors import ConfigError, plural, printable
from gspo_megatron.build.checks import check_config
from gspo_megatron.build.trainer import wants_transformer_engine
from gspo_megatron.config.loading import load_config
from gspo_megatron.config.sections import Config, ParallelConfig
from gspo_megatron.device import open_device
from gspo_megatron.layout.layout import Layout
from gspo_megatron.layout.memory import held_sizes, stage_parameters
from gspo_megatron.models.counts import count_parameters
from gspo_megatron.models.families import family_of
from gspo_megatron.models.shape import ModelShape

if TYPE_CHECKING:
    from gspo_megatron.testing.dry_build import RankContents

GIB = 2**30
TOLERANCE = 0.005
"""Relative, of memory: the distributed optimizer pads its buffers, so that each of its ranks has an equal shard."""
UNPLANNED_GIB = 0.1
"""What no purpose accounts for may take; cosines and sines of RoPE take less."""
PACKAGES = ("gspo_megatron", "torch", "megatron-core", "transformer-engine", "transformers")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", help="YAML file of the run")
    parser.add_argument("--world-size", type=int, help="processes of the run (default: the fewest of the layout)")
    parser.add_argument(
        "--ranks",
        default="stages",
        help="all; such as 0,15; or stages (default): first, middle and last rank of each pipeline stage",
    )
    parser.add_argument("--layers", type=int, help="a shallower model, on stages of equal depth")
    parser.add_argument("--without-te", action="store_true", help="as where Transformer Engine is not installed")
    parser.add_argument("--output", type=Path, help="JSON file to which the result is added, or where it is replaced")
    parser.add_argument("--table", type=Path, help="with --output: Markdown file with its table")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args(argv)
    if options.table and not options.output:
        parser.error("--table shows the results of --output")
    warnings.filterwarnings("ignore")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    overrides = list(options.overrides)
    if options.layers:
        even = ("first_stage_layers", "last_stage_layers")
        overrides += [f"model.num_layers={options.layers}", *(f"parallel.{name}=null" for name in even)]
    if options.without_te:
        sys.modules["transformer_engine"] = None  # type: ignore[assignment]  # an import raises ImportError
        overrides.append("precision.transformer_engine=off")
    try:
        config = load_config(options.config, overrides)
        world_size = options.world_size or fewest_processes(config.parallel)
        layout = check_config(config, world_size)
        ranks = chosen(options.ranks, layout)
        result = built(config, layout, ranks)
    except ConfigError as error:
        print(printable(f"ConfigError: {error}"), file=sys.stderr)
        return 2
    what = {"config": options.config, "ranks": options.ranks, "overrides": overrides}
    show(what | result)
    if options.output:
        record(options.output, what | result)
        if options.table:
            write_table(options.table, json.loads(options.output.read_text()))
    return 0 if not result["faults"] else 1


def fewest_processes(p: ParallelConfig) -> int:
    return lcm(p.tp * p.pp * p.cp, p.etp * p.ep * p.pp)


def chosen(ranks: str, layout: Layout) -> list[int]:
    """The ranks that --ranks names.

    Raises:
        ConfigError: it names none, or one that does not exist.
    """
    if ranks == "all":
        return list(range(layout.world_size))
    if ranks == "stages":
        size = layout.world_size // layout.pp
        return sorted({stage * size + place for stage in range(layout.pp) for place in (0, size // 2, size - 1)})
    try:
        numbers = [int(rank) for rank in ranks.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(0 <= rank < layout.world_size for rank in numbers):
        raise ConfigError(
            f"--ranks {ranks}: write all, stages, or ranks from 0 to {layout.world_size - 1} with commas between them"
        )
    return sorted(set(numbers))


def built(config: Config, layout: Layout, ranks: Sequence[int]) -> dict[str, Any]:
    """Builds the ranks and compares; `faults` lists all that is not as it should be."""
    mock_cuda.install()
    p = config.precision
    device = open_device("cuda", p.dtype, fp8=p.fp8, deterministic=p.deterministic)
    use_te = wants_transformer_engine(config, device)
    # Megatron-Core is imported only here: the device has to be open before that.
    from gspo_megatron.testing.dry_build import Coverage, DryBuild

    dry = DryBuild(config, layout, device.torch_device, use_te)
    started = time.monotonic()
    shape, coverage = config.model.shape, Coverage()
    contents: list[RankContents] = []
    faults: list[str] = []
    memory: dict[int, dict[str, tuple[float, float]]] = {}
    for rank in ranks:
        contents.append(found := dry.rank(rank))
        coverage.add(found.written)
        planned = stage_parameters(shape, layout, found.stage)
        if (held := found.num_parameters()) != planned:
            faults.append(f"rank {rank} holds {held} dense and expert parameters, the planner says {planned}")
        memory[rank] = compared(config, layout, found)
        faults += [
            f"rank {rank} needs {gib:.3f} GiB for {purpose}, the planner says {plan:.3f}"
            for purpose, (gib, plan) in memory[rank].items()
            if abs(gib - plan) > (UNPLANNED_GIB if purpose == "other" else TOLERANCE * plan)
        ]
    build_s = time.monotonic() - started
    complete = len(ranks) == layout.world_size
    total = count_parameters(shape).total
    names = None
    if complete:
        faults += coverage.faults()
        whole = dry.whole_weights([found.sources for found in sorted(contents, key=lambda found: found.rank)])
        trained = sum(rows * columns for key, (rows, columns) in coverage.shapes.items() if key.startswith("exp_avg."))
        if trained != total:
            faults.append(f"{trained:,} elements are trained, the model has {total:,}")
        names = equal_names(whole, shape, faults)
    fullest = max(memory, key=lambda rank: sum(gib for gib, _ in memory[rank].values()))
    return {
        "date": date.today().isoformat(),
        "versions": {name: version(name) for name in PACKAGES},
        "layout": f"{plural(layout.world_size, 'process')} = {layout}",
        "num_layers": shape.num_layers,
        "precision": p.dtype if p.fp8 == "none" else f"fp8 {p.fp8}",
        "layers": "Transformer Engine" if use_te else "Megatron-Core",
        "optimizers": sorted(set().union(*(found.optimizers for found in contents))),
        "num_ranks": len(ranks),
        "num_parameters": total,
        "tensors_of_a_rank": max(len(found.parameters) for found in contents),
        "tensors_written_once": len(coverage.shapes) if complete else None,
        "names": names,
        "fullest_rank": fullest,
        "gib": {purpose: [round(x, 4) for x in pair] for purpose, pair in memory[fullest].items()},
        "worst_difference": max(
            abs(gib / plan - 1) for of_rank in memory.values() for gib, plan in of_rank.values() if plan
        ),
        "build_s": round(build_s, 1),
        "check_s": round(time.monotonic() - started - build_s, 1),
        "host_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "faults": faults,
    }


def compared(config: Config, layout: Layout, found: RankContents) -> dict[str, tuple[float, float]]:
    """(GiB built, GiB planned) by purpose; `other` is not planned. FP8 copies of weights come with a first forward."""
    plan = held_sizes(config, layout, found.stage, with_reference=bool(found.num_bytes["reference"]))
    return {purpose: (size / GIB, plan.get(purpose, 0.0) / GIB) for purpose, size in found.num_bytes.items() if size}


def equal_names(whole: dict[str, tuple[int, ...]], shape: ModelShape, faults: list[str]) -> dict[str, Any]:
    """Compares names and sizes with those that transformers writes for a model of this shape."""
    theirs = names_of_transformers(shape)
    differing = sorted(name for name in whole.keys() | theirs.keys() if whole.get(name) != theirs.get(name))
    if differing:
        some = ", ".join(f"{name} {whole.get(name)} / {theirs.get(name)}" for name in differing[:3])
        faults.append(f"{len(differing)} names or sizes differ from those of transformers, such as {some}")
    return {"compared_with": f"transformers {version('transformers')}", "equal": len(whole.items() & theirs.items())}


def names_of_transformers(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """The size of each tensor of a checkpoint, by its name, from the class of this family in transformers."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    settings = dict(family_of(shape).hf_config(shape))
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    # transformers 5 keeps the experts of a layer in one tensor; on the hub each has its own.
    return {name: tuple(x.shape) for name, x in revert_weight_conversion(model, model.state_dict()).items()}


# --- results ---


def show(result: dict[str, Any]) -> None:
    print(
        f"{result['config']}: {result['num_layers']} layers, {result['precision']}, {result['layout']}\n"
        f"  {result['num_ranks']} ranks built in {result['build_s']} s with {result['host_gib']} GiB on the host, "
        f"{result['layers']} layers, {', '.join(result['optimizers'])}"
    )
    if names := result["names"]:
        print(
            f"  {result['num_parameters']:,} parameters; {result['tensors_written_once']:,} tensors of weights and "
            f"optimizer; {names['equal']:,} names and sizes equal those of {names['compared_with']}"
        )
    sizes = [f"{purpose} {gib:.3f} ({plan:.3f})" for purpose, (gib, plan) in result["gib"].items()]
    print(f"  GiB of rank {result['fullest_rank']}, and planned: {', '.join(sizes)}")
    print(f"  largest difference of a rank's memory from the plan: {result['worst_difference']:.3%}")
    for fault, times in Counter(result["faults"][:20]).items():
        print(f"  FAULT: {fault}" + (f" ({times} times)" if times > 1 else ""))
    print(f"  {len(result['faults'])} faults", flush=True)


def record(path: Path, result: dict[str, Any]) -> None:
    """Adds the result to the file; that of an earlier run of the same build is replaced."""

    def build(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["config"], row["ranks"], row["overrides"], row["layers"]

    rows = json.loads(path.read_text()) if path.exists() else []
    rows = [row for row in rows if build(row) != build(result)] + [result]
    path.write_text(json.dumps(rows, indent=1) + "\n")


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Replaces the table between the marks of dry_cuda."""
    head, tail = "<!-- dry_cuda -->\n", "<!-- end of dry_cuda -->"
    before, mark, rest = path.read_text().partition(head)
    assert mark and tail in rest, f"{path} has no lines {head!r} and {tail!r} to write between"
    path.write_text(before + head + "\n".join(table(rows)) + "\n" + tail + rest.partition(tail)[2])


def table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A line for each build."""
    purposes = ("weights", "gradients", "optimizer")
    yield (
        "| recipe | layers | formats, layers of | layout | ranks built | written once | names equal | "
        + " | ".join(f"{purpose}, GiB" for purpose in purposes)
        + " | largest difference | seconds |"
    )
    yield "|---" * 2 + "|---|---" + "|--:" * (5 + len(purposes)) + "|"
    for row in rows:
        names, once = row["names"], row["tensors_written_once"]
        sizes = (row["gib"][purpose] for purpose in purposes)
        yield (
            "| "
            + " | ".join(
                (
                    Path(row["config"]).stem,
                    str(row["num_layers"]),
                    f"{row['precision']}, {row['layers']}",
                    row["layout"],
                    f"{row['num_ranks']}",
                    f"{once:,} tensors" if once else "-",
                    f"{names['equal']:,}" if names else "-",
                    *(f"{built:.2f} ({plan:.2f})" for built, plan in sizes),
                    f"{row['worst_difference']:.3%}",
                    f"{row['build_s'] + row['check_s']:.0f}",
                )
            )
            + " |"
        )


if __name__ == "__main__":
    sys.exit(main())
