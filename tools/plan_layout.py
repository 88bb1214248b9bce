"""Which layout for this model on these GPUs: memory, seconds and cost of every one that fits, on paper.

    python tools/plan_layout.py --model qwen3_30b_a3b --gpu h100 --gpus 32 --prompt 1024 --response 8192
    python tools/plan_layout.py --model DIR/Qwen3-235B-A22B --gpu h200 --gpus 128 --precision fp8 --write run.yaml

--model is a preset or a Hugging Face folder (its config.json is read). Everything printed is a prediction;
docs/planner.md has the formula of every column, its assumptions, and its errors against published measurements. --write
writes the recommended settings, or those of another row (--choose), for `python -m gspo_megatron.train --config`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from gspo_megatron.base.errors import ConfigError, printable
from gspo_megatron.build.checks import check_config
from gspo_megatron.config.loading import load_config
from gspo_megatron.config.sections import Config, DataConfig
from gspo_megatron.layout.hardware import GPUS
from gspo_megatron.layout.memory import GIB, RESERVED_GIB, checkpoint_bytes, counts_of, rollouts_at_once
from gspo_megatron.layout.planner import Plan, distinct, search
from gspo_megatron.layout.timing import Cluster, Work
from gspo_megatron.models.families import FAMILIES
from gspo_megatron.models.presets import DEMOS, PRESETS
from gspo_megatron.models.rope import beyond_trained_length
from gspo_megatron.models.shape import ModelShape
from gspo_megatron.run.algorithm import Algorithm

PRECISIONS = ("bf16", "fp8")


def model_settings(model: str) -> list[str]:
    """Overrides of section `model` for a preset or a Hugging Face folder.

    Raises:
        ConfigError: it is neither, or a model that is not implemented.
    """
    if model in PRESETS:
        return [f"model.preset={model}"]
    path = Path(model) / "config.json"
    if not path.is_file():
        raise ConfigError(f"--model {model} is neither a preset ({', '.join(PRESETS)}) nor a folder with a config.json")
    try:
        hf = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON in UTF-8 ({error}); copy the model's file again") from error
    if not isinstance(hf, dict):
        raise ConfigError(f"{path} holds {type(hf).__name__}, expected a JSON object; copy the model's file again")
    family = hf.get("model_type")
    if family not in FAMILIES:
        raise ConfigError(f"{path} has model_type={family!r}; implemented: {', '.join(FAMILIES)}")
    shape = FAMILIES[family].shape(hf)
    given = {f.name: getattr(shape, f.name) for f in fields(ModelShape)}
    defaults = {f.name: f.default for f in fields(ModelShape)}
    return [f"model.{name}={value}" for name, value in given.items() if value != defaults[name]]


def check_amounts(options: argparse.Namespace) -> None:
    """Refuses what no run can have.

    Raises:
        ConfigError: an amount below its least, or a mean above the longest.
    """
    least_one = ("gpus", "gpus_per_node", "prompt", "response", "group_size", "prompts", "updates", "max_batch")
    for name in (*least_one, "rows", "choose", "save_every"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value} must be at least 1")
    for name in ("mean_prompt", "mean_response", "gpu_memory", "price"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise ConfigError(f"--{name.replace('_', '-')} {value:g} must be above 0")
    for mean, longest in (("mean_prompt", "prompt"), ("mean_response", "response")):
        if (getattr(options, mean) or 0) > getattr(options, longest):
            raise ConfigError(
                f"--{mean.replace('_', '-')} {getattr(options, mean):g} exceeds the longest, --{longest} "
                f"{getattr(options, longest)}"
            )


def settings_of(options: argparse.Namespace) -> list[str]:
    """The run's settings but for its layout."""
    fp8 = GPUS[options.gpu].fp8_recipe if options.precision == "fp8" else "none"
    length = options.prompt + options.response
    # Context parallelism cuts a sequence into 2 cp equal parts.
    length = -(-length // 16) * 16
    return [
        *model_settings(options.model),
        f"model.max_sequence_length={length}",
        f"train.tokens_per_micro_batch={length}",
        "precision.dtype=bf16",
        f"precision.fp8={fp8}",
        f"rollout.max_new_tokens={options.response}",
        f"rollout.group_size={options.group_size}",
        f"rollout.prompts_per_step={options.prompts}",
        f"rollout.max_batch={options.max_batch}",
        f"algorithm.updates_per_rollout={options.updates}",
        *options.overrides,
    ]


def work_of(config: Config, options: argparse.Namespace) -> Work:
    algorithm = Algorithm.of(config)
    return Work(
        sequences=config.rollout.prompts_per_step * config.rollout.group_size,
        prompt=options.mean_prompt or options.prompt,
        response=options.mean_response or options.response,
        longest=options.response,
        updates=config.algorithm.updates_per_rollout,
        scorings=algorithm.scores_old + algorithm.needs_reference,
        save_every=options.save_every,
        engine=options.engine,
        overlaps=config.optimizer.overlap != "off",
    )


# --- printing ---

COLUMNS = (
    "layout",
    "recompute",
    "tokens",
    "rows",
    "GiB",
    "bubble",
    "rollout",
    "log_probs",
    "update",
    "communication",
    "save",
    "s/step",
    "tok/s/GPU",
)


def row(plan: Plan, work: Work) -> list[str]:
    """A line of the table."""
    p, parts = plan.config.parallel, plan.time.parts
    tokens = work.sequences * work.length
    return [
        short(plan),
        p.recompute,
        str(plan.config.train.tokens_per_micro_batch),
        str(rollouts_at_once(plan.config, plan.layout)),
        f"{plan.peak_gib:.1f}",
        f"{plan.time.bubble:.0%}",
        *(f"{seconds:.1f}" for seconds in parts.values()),
        f"{plan.time.total:.1f}",
        f"{tokens / plan.time.total / plan.layout.world_size:.0f}",
    ]


def short(plan: Plan) -> str:
    """tp2 pp8(11..11) ep16 dp8"""
    ranks = plan.layout
    stages = "" if (ranks.first, ranks.last) == (None, None) else f"({ranks.first or ''}..{ranks.last or ''})"
    axes = {"tp": ranks.tp, "pp": ranks.pp, "vpp": ranks.vpp, "cp": ranks.cp, "ep": ranks.ep, "etp": ranks.etp}
    shown = [f"{axis}{size}{stages if axis == 'pp' else ''}" for axis, size in axes.items() if size > 1]
    return " ".join([*shown, f"dp{ranks.dp}"])


def show(plans: Sequence[Plan], work: Work, options: argparse.Namespace) -> None:
    """The table, then what the recommended layout consists of."""
    rows = [list(COLUMNS), *(row(plan, work) for plan in plans)]
    widths = [max(len(line[i]) for line in rows) for i in range(len(COLUMNS))]
    for number, line in enumerate(rows):
        cells = [
            f"{cell:<{w}}" if i < 2 else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ]
        print(f"{number or '':>3}  {'  '.join(cells)}")
    print()
    show_plan(plans[options.choose - 1], work, options)


def show_plan(plan: Plan, work: Work, options: argparse.Namespace) -> None:
    time_, gpus = plan.time, plan.layout.world_size
    print(f"number {options.choose}: {plan.layout}")
    print(f"stages of {', '.join(map(str, plan.layout.stage_layers(plan.config.model.num_layers)))} layers")
    for phase in plan.memory.phases:
        parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in plan.memory.of(phase).items())
        total = plan.memory.total(phase) / GIB
        print(f"memory, {phase}: {parts}; total {total:.2f} GiB on each GPU of the stage with the largest peak")
    axes = ", ".join(f"{axis} {seconds:.2f} s over {link}" for axis, (link, seconds) in time_.by_axis().items())
    print(f"communication of an update: {axes or 'none'}")
    flops = sum(time_.flops.values())
    peak = gpus * time_.cluster.gpu.peak_flops(fp8=False)
    mfu = time_.flops["update"] / (time_.parts["update"] + time_.parts["communication"]) / peak
    print(
        f"a step: {work.sequences * work.length:,.0f} tokens, {flops:.3g} FLOP; {time_.micro_batches} micro-batches a "
        f"rank and update; the updates reach {mfu:.0%} of the bf16 peak"
    )
    saved = checkpoint_bytes(plan.config, with_reference=Algorithm.of(plan.config).needs_reference)
    print(f"a checkpoint: {saved / 1e9:,.0f} GB, {plan.memory.host / GIB:.1f} GiB of host memory for each GPU")
    hours = gpus * time_.total / 3600
    price = f", {hours * options.price:.2f} at {options.price} per GPU-hour" if options.price else ""
    print(f"cost: {hours:.3f} GPU-hours a step, {1000 * hours:,.0f} for 1,000 steps{price and price + ' a step'}")


# --- writing ---


def yaml_of(plan: Plan, settings: Sequence[str], options: argparse.Namespace) -> str:
    """The settings that were asked for and the layout, as a file of the run."""
    ranks, p = plan.layout, plan.config.parallel
    parallel = {
        "tp": ranks.tp,
        "pp": ranks.pp,
        "vpp": ranks.vpp,
        "cp": ranks.cp,
        "ep": ranks.ep,
        "etp": ranks.etp,
        "recompute": p.recompute,
    }
    stages = {"first_stage_layers": ranks.first, "last_stage_layers": ranks.last}
    parallel |= {name: size for name, size in stages.items() if size is not None}
    chosen = {f"parallel.{name}": str(value) for name, value in parallel.items()}
    chosen["rollout.max_batch"] = str(plan.config.rollout.max_batch)
    chosen["train.tokens_per_micro_batch"] = str(plan.config.train.tokens_per_micro_batch)
    sections: dict[str, dict[str, str]] = {}
    for key, value in {**dict(setting.split("=", 1) for setting in settings), **chosen}.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    if trains_demo(settings):
        sections["data"] = {
            name: f"{getattr(DataConfig(), name)}  # the demo's; set your own" for name in ("train", "tokenizer")
        }
    lines = [
        f"# {options.model} on {ranks.world_size} {options.gpu}, by tools/plan_layout.py. A prediction:",
        f"# {plan.time.total:.0f} s a step, {plan.peak_gib:.0f} GiB a GPU. Set data, reward and run.dir to your own.",
    ]
    for section, values in sections.items():
        lines += ["", f"{section}:", *(f"  {name}: {value}" for name, value in values.items())]
    return "\n".join(lines) + "\n"


def trains_demo(settings: Sequence[str]) -> bool:
    return not any(setting.startswith("data.train=") for setting in settings)


# --- the command ---


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True, help="a preset, or a Hugging Face folder")
    parser.add_argument("--gpu", choices=GPUS, default="h100")
    parser.add_argument("--gpus", type=int, required=True, help="how many")
    parser.add_argument("--gpus-per-node", type=int, help="GPUs that NVLink joins (default: the GPU's own server)")
    parser.add_argument("--gpu-memory", type=float, metavar="GIB", help="of a GPU (default: the GPU's)")
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16")
    parser.add_argument("--prompt", type=int, default=1024, help="longest prompt in tokens (default: 1024)")
    parser.add_argument("--response", type=int, default=8192, help="longest response in tokens (default: 8192)")
    parser.add_argument("--mean-prompt", type=float, help="mean tokens (default: the longest)")
    parser.add_argument("--mean-response", type=float, help="mean tokens (default: the longest)")
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=256, help="prompts a step (default: 256)")
    parser.add_argument("--updates", type=int, default=8, help="updates a step (default: 8)")
    parser.add_argument("--max-batch", type=int, default=256, help="rollout.max_batch (default: 256)")
    parser.add_argument("--save-every", type=int, default=10, help="steps between checkpoints (default: 10)")
    parser.add_argument(
        "--engine", action="store_true", help="predict an engine that decodes without waiting for kernel launches"
    )
    parser.add_argument("--price", type=float, help="money per GPU-hour")
    parser.add_argument("--rows", type=int, default=10, help="layouts shown (default: 10)")
    parser.add_argument("--choose", type=int, default=1, help="the row described and written (default: 1, the fastest)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write that row's settings as YAML")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="other settings of the run")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parsed(argv)
    try:
        check_amounts(options)
        if options.precision == "fp8" and not GPUS[options.gpu].fp8_recipe:
            raise ConfigError(f"--gpu {options.gpu} has no FP8; use --precision bf16")
        settings = settings_of(options)
        config = load_config(None, settings)
        trained_for = load_config(None, model_settings(options.model)).model.max_sequence_length
        too_long = None if options.model in DEMOS else beyond_trained_length(config.model.shape, trained_for)
        if config.model.vocab_size is None:
            raise ConfigError(f"--model {options.model} has no vocabulary size; add model.vocab_size=NUMBER")
        gpu = GPUS[options.gpu]
        cluster = Cluster(gpu, options.gpus_per_node or min(gpu.domain, options.gpus))
        work = work_of(config, options)
        with_reference = Algorithm.of(config).needs_reference
        usable = (options.gpu_memory or gpu.memory_gib) - RESERVED_GIB
        start = time.monotonic()
        plans = search(config, options.gpus, cluster, work, with_reference=with_reference, memory_gib=usable)
        best = distinct(plans, max(options.rows, options.choose))
        if not best:
            total = counts_of(config.model.shape)[0].total
            raise ConfigError(
                f"no layout of {options.gpus} {gpu.name} holds {total:,} parameters and sequences of "
                f"{config.model.max_sequence_length:,} tokens in {usable:.1f} GiB a GPU; fully sharded, weights, "
                f"gradients and optimizer state alone take {18 * total / GIB / options.gpus:.0f} GiB a GPU; use more "
                "GPUs, or shorter prompts and responses"
            )
        if options.choose > len(best):
            raise ConfigError(f"--choose {options.choose}: only {len(best)} layouts fit")
        check_config(best[options.choose - 1].config, options.gpus)
    except ConfigError as error:
        print(printable(f"ConfigError: {error}"), file=sys.stderr)
        return 2
    print(
        f"{options.model} on {options.gpus} {gpu.name} ({cluster.node} joined by NVLink), {options.precision}: "
        f"predictions, errors in docs/planner.md; {work.sequences} rollouts a step of {work.length:,.0f} tokens on "
        f"average; {len(plans)} plans fit in {usable:.1f} GiB, found in {time.monotonic() - start:.1f} s\n"
    )
    if too_long:
        print(f"warning: {too_long}\n")
    show(best, work, options)
    if options.write:
        options.write.write_text(yaml_of(best[options.choose - 1], settings, options))
        print(
            f"wrote {options.write}: python -m gspo_megatron.train --config {options.write} --dry-run "
            f"--world-size {options.gpus} --gpu-memory {gpu.memory_gib}"
        )
        if trains_demo(settings):
            print(f"it names no data: until you set data.train in it, a run trains the demo's {DataConfig().train}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
