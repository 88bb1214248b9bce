"""A complete RL step against one of TRL's GRPOTrainer with importance_sampling_level="sequence", one CPU process each.

TRL trains transformers' Qwen3MoeForCausalLM of the same sizes, with the weights that our policy has after its warm
start, so both sample alike. The logits of the two models are compared before the first step. Same prompts in the same
order, group size, longest response, vocabulary, EOS, rewards, clip, learning rate and number of updates for a batch of
rollouts. The two alternate, a step each, in separate processes, so that other load on the machine affects both.

A step of TRL lasts from the end of the previous one to its own end, data loader included. What a user would turn off
for speed is off: gradient checkpointing, mixed precision, reports, logs, progress bars, saving, the auxiliary loss.
"""

from __future__ import annotations

import itertools
import multiprocessing
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.reports import median_ratio
from gspo_megatron.base.errors import ConfigError
from gspo_megatron.build.inputs import settle
from gspo_megatron.build.trainer import open_trainer
from gspo_megatron.config.model import ModelConfig
from gspo_megatron.config.sections import Config
from gspo_megatron.data.token_ids import Tokenizer
from gspo_megatron.device import open_device
from gspo_megatron.models.families import family_of
from gspo_megatron.monitor.console import Console
from gspo_megatron.rewards.functions import find
from gspo_megatron.run.algorithm import Algorithm
from gspo_megatron.run.trainer import Trainer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3MoeForCausalLM

    from gspo_megatron.mcore.policy import MegatronPolicy

TOLERANCE = 1e-4
"""Largest difference of two logits of the two models, float32."""


def measure(config: Config, steps: int, warmup: int, experts: str) -> dict[str, Any]:
    """Seconds and tokens of `steps` steps of each. `experts`: transformers' implementation of the experts."""
    total = warmup + steps
    with tempfile.TemporaryDirectory() as folder:
        exchange = Path(folder) / "exchange.pt"
        with (
            started(run_ours, config, total, exchange) as ours,
            started(run_trl, config, total, exchange, experts) as trl,
        ):
            rows = [(turn(ours), turn(trl)) for _ in range(total)][warmup:]
            difference, versions = trl.recv()
    columns = {
        column: {name: [pair[i][j] for pair in rows] for i, name in enumerate(("ours", "trl"))}
        for j, column in enumerate(("seconds", "cpu_seconds", "tokens"))
    }
    median = {
        column: {name: statistics.median(values) for name, values in of.items()} for column, of in columns.items()
    }
    return {
        "ratio": median_ratio(columns["seconds"]["ours"], columns["seconds"]["trl"]),
        **median,
        "largest_difference_of_logits": difference,
        "experts": experts,
        "versions": versions,
        **{f"{column}_all": of for column, of in columns.items()},
    }


@contextmanager
def started(run: Callable[..., None], *args: Any) -> Iterator[Connection]:
    """Runs `run(connection, *args)` in a new process; yields this end of the connection once it is ready."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=run, args=(there, *args))
    process.start()
    there.close()
    try:
        here.recv()
        yield here
        process.join()
    finally:
        process.kill()


def turn(connection: Connection) -> tuple[float, float, int]:
    """Lets the other process make one step; returns its seconds, its processor seconds, and its tokens."""
    connection.send(None)
    return connection.recv()


def clocks() -> tuple[float, float]:
    """Wall-clock time, and processor time of this process, which is more reliable on a busy machine."""
    return time.perf_counter(), time.process_time()


def since(start: tuple[float, float]) -> tuple[float, float]:
    wall, cpu = clocks()
    return wall - start[0], cpu - start[1]


# ------------------------------------------------------------------------------------------------------------- ours


def run_ours(connection: Connection, config: Config, steps: int, exchange: Path) -> None:
    """Warm start, export, then one step per turn."""
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    warnings.filterwarnings("ignore", category=FutureWarning)
    device = open_device("cpu", config.precision.dtype)
    with open_trainer(settle(config, 1), device, Console(on=False)) as trainer:
        trainer.begin()
        warm_start = trainer.parts.warm_start
        solved = [warm_start.with_solution(warm_start.prompts.source[i]) for i in range(8)]
        samples = [sequence.tokens.tolist() for sequence in solved]
        policy: Any = trainer.policy
        rules = family_of(config.model.shape).rules
        torch.save(
            {
                "weights": {name: weight.clone() for name, weight in policy.weights(rules)},
                "samples": samples,
                "logits": logits(policy, samples),
                "prompts": prompts(trainer, steps),
            },
            exchange,
        )
        connection.send(None)
        for step in range(1, steps + 1):
            connection.recv()
            start = clocks()
            row = trainer.step(step)
            connection.send((*since(start), row["tokens"]))


def prompts(trainer: Trainer, steps: int) -> list[dict[str, str]]:
    """The prompts of `Trainer.sample`, step by step."""
    t, size = trainer.config.train, trainer.config.rollout.prompts_per_step
    first = t.warm_start_steps * t.warm_start_batch
    chosen = trainer.parts.warm_start.prompts.take(first, steps * size)
    return [{"prompt": prompt.text, "answer": prompt.answer} for prompt in chosen]


@torch.no_grad()
def logits(policy: MegatronPolicy, samples: list[list[int]]) -> Tensor:
    """[T, V] of all samples, concatenated."""
    from gspo_megatron.log_probs import vocab_parallel_logits
    from gspo_megatron.mcore.packed_tokens import packed

    borders = torch.tensor([0, *itertools.accumulate(map(len, samples))], dtype=torch.int32)
    positions = torch.cat([torch.arange(len(tokens)) for tokens in samples])
    [model] = policy.model
    hidden = model(torch.tensor([*itertools.chain(*samples)]), packed(positions, borders, max(map(len, samples))))
    return vocab_parallel_logits(hidden.squeeze(1), model.head_weight(), vocab_size=model.true_vocab_size)


# -------------------------------------------------------------------------------------------------------------- TRL


def run_trl(connection: Connection, config: Config, steps: int, exchange: Path, experts: str) -> None:
    """A GRPOTrainer on the exported weights that makes one step per turn, then sends the difference of the logits and
    the versions."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    import accelerate
    import datasets
    import transformers
    import trl

    given = torch.load(exchange)
    inputs = settle(config, 1)
    config, tokenizer = inputs.config, inputs.tokenizer
    model = hf_model(config.model, tokenizer, given["weights"], experts)
    difference = compare(model, given["samples"], given["logits"])
    steps_of_update = config.algorithm.updates_per_rollout
    tokens: list[int] = []

    def reward(
        prompts: list[str], completions: list[str], completion_ids: list[list[int]], answer: list[str], **_: Any
    ) -> list[float]:
        tokens.append(sum(map(len, completion_ids)) + sum(len(tokenizer.encode(prompt)) for prompt in prompts))
        functions = {find(name).call: weight for name, weight in config.reward.functions.items()}
        return [
            sum(weight * function(prompt=p, response=c, answer=a) for function, weight in functions.items())
            for p, c, a in zip(prompts, completions, answer, strict=True)
        ]

    class Turns(transformers.TrainerCallback):
        """Waits for its turn between two steps, and times from there to the end of the next step."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            connection.recv()
            self.start = clocks()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % steps_of_update == 0:
                connection.send((*since(self.start), tokens[-1]))
                if state.global_step < steps * steps_of_update:
                    connection.recv()
                    self.start = clocks()

    trainer = trl.GRPOTrainer(
        model,
        reward,
        trl.GRPOConfig(str(exchange.parent / "trl"), **settings(config, steps)),
        datasets.Dataset.from_list(given["prompts"]),
        processing_class=hf_tokenizer(tokenizer, [row["prompt"] for row in given["prompts"]]),
        callbacks=[Turns()],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    connection.send(None)
    trainer.train()
    libraries = (trl, transformers, accelerate, datasets, torch)
    connection.send((difference, {library.__name__: library.__version__ for library in libraries}))


def settings(config: Config, steps: int) -> dict[str, Any]:
    """GRPOConfig's arguments: one generation of all the step's rollouts, one optimizer step on each of their parts."""
    r, a, o, variant = config.rollout, config.algorithm, config.optimizer, Algorithm.of(config).variant
    names = {kind: dial.name for kind, dial in variant.dials.items()}
    if names != {"level": "sequence_mean", "clip": "ppo", "aggregate": "sequence_mean", "baseline": "mean_std"}:
        raise ConfigError(f"algorithm.variant={a.variant} is not what TRL runs here; set algorithm.variant=gspo")
    return {
        "importance_sampling_level": "sequence",
        "loss_type": "grpo",  # the mean over sequences of the mean over their tokens
        "scale_rewards": "group",
        "epsilon": variant.clip_low,
        "epsilon_high": variant.clip_high,
        "beta": variant.kl_coef,
        "router_aux_loss_coef": config.model.aux_loss_coef,
        "num_generations": r.group_size,
        "per_device_train_batch_size": r.prompts_per_step * r.group_size // a.updates_per_rollout,
        "steps_per_generation": a.updates_per_rollout,
        "gradient_accumulation_steps": 1,
        "num_iterations": 1,
        "max_steps": steps * a.updates_per_rollout,
        "shuffle_dataset": False,
        "max_completion_length": r.max_new_tokens,
        "temperature": r.temperature,
        "top_p": r.top_p,
        "top_k": r.top_k,
        "learning_rate": o.lr,
        "lr_scheduler_type": "constant",
        "adam_beta1": o.adam_beta1,
        "adam_beta2": o.adam_beta2,
        "adam_epsilon": o.adam_eps,
        "weight_decay": o.weight_decay,
        "max_grad_norm": o.clip_grad,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "report_to": "none",
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": config.run.seed,
    }


def hf_model(m: ModelConfig, tokenizer: Tokenizer, weights: dict[str, Tensor], experts: str) -> Qwen3MoeForCausalLM:
    """transformers' Qwen3-MoE with these weights, float32."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    family = family_of(m.shape)
    ids = {"pad_token_id": tokenizer.pad_id, "eos_token_id": tokenizer.eos_id}
    config = Qwen3MoeConfig(**family.hf_config(m.shape), **ids)
    # It merges the experts of a layer. It returns a model in evaluation mode, unlike the constructor.
    model = Qwen3MoeForCausalLM.from_pretrained(None, config=config, state_dict=weights, dtype=torch.float32).train()
    model.set_experts_implementation(experts)
    return model


@torch.no_grad()
def compare(model: Qwen3MoeForCausalLM, samples: list[list[int]], expected: Tensor) -> float:
    """The largest difference of a logit.

    Raises:
        RuntimeError: the models are not the same.
    """
    found = torch.cat([model(torch.tensor([tokens])).logits[0] for tokens in samples])
    difference = float((found - expected).abs().max())
    if not difference < TOLERANCE:
        raise RuntimeError(f"logits of the two models differ by up to {difference:.1e}, more than {TOLERANCE:g}")
    return difference


def hf_tokenizer(tokenizer: Tokenizer, texts: list[str]) -> PreTrainedTokenizerFast:
    """A fast tokenizer with the ids of ours.

    Raises:
        ConfigError: a text is not one token per character.
    """
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Fast
    from transformers import PreTrainedTokenizerFast

    special = {tokenizer.pad_id: "<pad>", tokenizer.eos_id: "<eos>"}
    vocabulary = {special.get(i) or tokenizer.decode([i]): i for i in range(tokenizer.vocab_size)}
    fast = Fast(models.WordLevel(vocabulary, unk_token="<pad>"))
    fast.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    fast.decoder = decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", eos_token="<eos>", padding_side="left")
    if wrapped(texts)["input_ids"] != [tokenizer.encode(text) for text in texts]:
        raise ConfigError("data.tokenizer must be a character tokenizer, such as characters:0123456789>, for TRL")
    return wrapped
