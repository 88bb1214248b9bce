"""One run's settings: typed sections, YAML over presets over defaults, `section.key=value` on top.

    config = load_config("examples/cpu_tiny_moe.yaml", ["optimizer.lr=3e-4"])     # strict: an unknown key is an error

A setting is declared once, here or, of sections `model`, `eval`, `engine`, `algorithm`, `reward` and `guards`, in
files of their names; `make docs` writes docs/settings.md from these declarations. Rules that involve several settings,
or the number of processes, are in build/checks.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gspo_megatron.config.algorithm import AlgorithmConfig
from gspo_megatron.config.declarations import setting
from gspo_megatron.config.engine import EngineConfig
from gspo_megatron.config.evaluation import EvalConfig
from gspo_megatron.config.guards import GuardConfig
from gspo_megatron.config.model import ModelConfig
from gspo_megatron.config.reward import RewardConfig


@dataclass(frozen=True)
class RunConfig:
    """Where the run writes, and its random numbers."""

    dir: str = setting("runs/default", "The run writes everything below this directory.")
    seed: int = setting(
        1, "Seed of the weights, generated prompts, the order of prompts and the sampler.", least=0, below=2**63
    )
    cache: str | None = setting(
        None,
        "Folder for what is derived from large data once: tokens, indices of lines, Arrow files and unpacked ones. The "
        "processes of a node share it, and nodes may. null: ~/.cache/gspo_megatron.",
    )


@dataclass(frozen=True)
class ParallelConfig:
    """Sizes of the parallel axes; data parallel takes what is left of the processes."""

    tp: int = setting(1, "Tensor parallel, with sequence parallel.", least=1)
    pp: int = setting(1, "Pipeline stages.", least=1)
    vpp: int = setting(1, "Virtual stages on each pipeline rank (Megatron's interleaved schedule).", least=1)
    first_stage_layers: int | None = setting(
        None,
        "Layers of the first pipeline stage, over all of its virtual stages. null: as many as the others.",
        least=1,
    )
    last_stage_layers: int | None = setting(None, "Layers of the last pipeline stage, in the same way.", least=1)
    cp: int = setting(1, "Context parallel: ranks that share the tokens of every sequence.", least=1)
    ep: int = setting(1, "Expert parallel: ranks that share the experts of a layer.", least=1)
    etp: int = setting(1, "Tensor parallel inside an expert.", least=1)
    token_dispatcher: str = setting(
        "alltoall",
        "How tokens reach their experts. allgather pads micro-batches to one length.",
        choices=("alltoall", "allgather"),
    )
    recompute: str = setting(
        "none",
        "What the backward pass recomputes to save memory: selective, the attention core; full, every layer.",
        choices=("none", "selective", "full"),
    )
    timeout_s: float = setting(600.0, "How long a collective may wait for a rank.", least=1, most=1e7)


@dataclass(frozen=True)
class PrecisionConfig:
    """The device and its number formats."""

    device: str = setting("auto", "auto: a GPU where torch sees one.", choices=("auto", "cpu", "cuda"))
    dtype: str = setting(
        "fp32",
        "Format of weights and activations. bf16 keeps float32 main weights and gradients; fp64 runs on the CPU, for "
        "exactness tests.",
        choices=("fp32", "bf16", "fp64"),
    )
    fp8: str = setting(
        "none",
        "Transformer Engine's recipe for FP8 matmuls; docs/precision.md compares them. Needs a GPU and dtype=bf16.",
        choices=("none", "blockwise", "mxfp8", "tensorwise"),
    )
    first_last_layers_bf16: int = setting(
        0,
        "With fp8: this many layers at each end of the model stay in bf16 (Megatron's first_last_layers_bf16).",
        least=0,
    )
    deterministic: bool = setting(
        False,
        "Equal inputs give equal bits on a GPU, run after run. Slower attention, reductions and embeddings; see "
        "docs/precision.md.",
    )
    transformer_engine: str = setting(
        "auto",
        "Whether the model is built from Transformer Engine layers. auto: on a GPU where it can be imported.",
        choices=("auto", "on", "off"),
    )


@dataclass(frozen=True)
class DataConfig:
    """Prompts and the tokenizer."""

    train: Any = setting(
        "task:sort_digits",
        "Training prompts: task:NAME (generated), a file, folder or pattern of JSONL (.gz and .zst, too) or Parquet, "
        "hf:NAME[:CONFIG[:SPLIT]], or module:function. Or a list of {source: ..., weight: 1, name: ...}, each with "
        "settings of this section for itself, and with reward: NAME, or {NAME: weight}, for its rollouts.",
    )
    eval: Any = setting(
        None,
        "Held-out prompts, one source in the same form as data.train. null: those that the task of data.train holds "
        "out.",
    )
    tokenizer: str = setting(
        "auto",
        "auto (that of the folder model.hf; without one, characters), characters (printable ASCII), "
        "characters:ALPHABET, the path of a SentencePiece .model file, or of a Hugging Face folder with a "
        "tokenizer.json.",
    )
    task: dict[str, Any] = setting({}, "Parameters of a generated task, such as min_length and max_length.")
    eval_size: int = setting(256, "Prompts per evaluation: the first ones of data.eval.", least=1)
    prompt_field: str = setting("prompt", "JSONL field of the prompt.")
    answer_field: str = setting("answer", "JSONL field of the answer that rewards compare with.")
    solution_field: str | None = setting(
        None, "JSONL field that a supervised warm start learns to write. null: the answer."
    )
    prompt_template: str = setting("{prompt}", "Text around a JSONL prompt, which {prompt} stands for.")
    messages_field: str | None = setting(
        None,
        "JSONL field that holds a conversation, [{role: user, content: ...}], for the tokenizer's chat template. null: "
        "the prompt is text.",
    )
    chat: bool = setting(False, "Put the prompt into the tokenizer's chat template, as the user's message.")
    chat_arguments: dict[str, Any] = setting({}, "Parameters of the chat template, such as {enable_thinking: false}.")
    chat_date: str | None = setting(
        None,
        "The day that a chat template's strftime_now tells, as 2026-11-26. null: the day (UTC) on which the run "
        "begins, for the whole run: config.yaml keeps it, and a run that continues reads it there.",
    )
    max_prompt_tokens: int | None = setting(
        None, "Longest prompt in tokens. null: model.max_sequence_length - rollout.max_new_tokens.", least=1
    )
    overlong: str = setting(
        "error",
        "A longer prompt is an error, or is dropped and counted (drop).",
        choices=("error", "drop"),
    )
    duplicates: str = setting(
        "keep",
        "What becomes of a prompt whose text an earlier row of its source has: it is kept and counted, or dropped.",
        choices=("keep", "drop"),
    )
    curriculum: int = setting(
        0,
        "Set a prompt aside when its rollouts were all right, or all wrong, in each of its last visits, this many. 0: "
        "off.",
        least=0,
    )
    curriculum_retry: int = setting(
        4, "Visit a prompt that was set aside once more after skipping it this many times. 0: never.", least=0
    )
    bad_rows: str = setting(
        "error",
        "A row that is not JSON, lacks a field, or has an empty prompt or one that the tokenizer refuses is an error, "
        "or is dropped and counted.",
        choices=("error", "drop"),
    )


@dataclass(frozen=True)
class RolloutConfig:
    """How responses are sampled."""

    engine: str = setting(
        "collective",
        "What samples: the model under training on its own processes (collective), or vLLM with a copy of its weights, "
        "in programs of its own (vllm) or in the run's processes (vllm_colocated; docs/engines.md).",
        choices=("collective", "vllm", "vllm_colocated"),
    )
    group_size: int = setting(8, "Rollouts per prompt.", least=1, most=2**20)
    prompts_per_step: int = setting(32, "Prompts per step.", least=1, most=2**24)
    max_new_tokens: int = setting(
        16, "Longest response in tokens; with an environment, all that follows the prompt.", least=1
    )
    temperature: float = setting(1.0, "Logits are divided by it, in sampling and in training.", above=0)
    top_k: int = setting(0, "Sample from the k most likely tokens. 0: from all.", least=0)
    top_p: float = setting(
        1.0, "Sample from the most likely tokens that hold this probability. 1: from all.", above=0, most=1
    )
    stop: list[Any] = setting(
        [],
        "Texts and token ids that end a response, or a turn of it, besides the tokenizer's own end, such as "
        "['</answer>', 151643]. The response, and its text, keep everything up to the token that completes one.",
    )
    environment: str = setting(
        "single_turn",
        "Who answers the model: single_turn (nobody: a rollout is one response), calculator (`<<48/2>>` becomes "
        "`<<48/2>>24`), python (runs programs in a sandbox, as reward.code says), or package.module:function of your "
        "own. What it says is not trained on.",
    )
    environment_arguments: dict[str, Any] = setting({}, "Parameters of the environment.")
    max_turns: int = setting(8, "Most turns of the model in a rollout, with an environment.", least=1, most=1000)
    reply_timeout_s: float = setting(
        60.0,
        "How long your own environment may take to answer a turn; then the rollout ends there, and counts as failed.",
        above=0,
        most=1e6,
    )
    dynamic_sampling: int = setting(
        0,
        "Replace groups whose rewards are all equal by those of further prompts, in up to this many further rounds of "
        "sampling (DAPO). What is missing then is filled with such groups. 0: off.",
        least=0,
    )
    max_lag: int = setting(
        0,
        "With an engine: most steps between the beginning of a group and the step that trains on it. Above 0, engines "
        "sample while the trainer trains (docs/engines.md). 0: a step samples with its own weights.",
        least=0,
        most=1000,
    )
    max_batch: int = setting(256, "Largest number of rollouts that one data-parallel rank decodes together.", least=1)

    @property
    def truncates(self) -> bool:
        """Whether tokens are drawn from a part of the vocabulary."""
        return self.top_k > 0 or self.top_p < 1


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam and its learning rate."""

    lr: float = setting(1e-6, "Learning rate after the warm-up.", above=0, below=1e38)
    min_lr: float = setting(0.0, "Learning rate at which the decay ends.", least=0)
    lr_decay: str = setting(
        "constant",
        "Shape of the decay, from the end of the warm-up to the end of the run.",
        choices=("constant", "cosine", "linear"),
    )
    lr_warmup_updates: int = setting(0, "Updates over which the learning rate rises to lr.", least=0)
    adam_beta1: float = setting(0.9, "Decay of the running mean of the gradient.", least=0, below=1)
    adam_beta2: float = setting(0.95, "Decay of the running mean of its square.", least=0, below=1)
    adam_eps: float = setting(1e-8, "Added to the root of that mean.", above=0)
    weight_decay: float = setting(0.0, "Decoupled weight decay of the matrices.", least=0)
    clip_grad: float = setting(1.0, "Largest gradient norm; a larger gradient is scaled down to it. 0: off.", least=0)
    distributed: bool = setting(
        True, "Megatron's distributed optimizer: state sharded over data-parallel ranks. Not in fp64."
    )
    overlap: str = setting(
        "auto",
        "Reduce gradients while the backward still runs, and gather the distributed optimizer's parameters during the "
        "next forward. auto: on GPUs, where communication overlaps with computation.",
        choices=("auto", "on", "off"),
    )


@dataclass(frozen=True)
class TrainConfig:
    """The length of the run, and what a step may cost."""

    steps: int = setting(100, "RL steps.", least=0)
    warm_start_steps: int = setting(
        0,
        "Supervised updates on the training prompts' solutions before the first step, for a model that starts from "
        "random weights. They fit the distribution that is sampled, softmax(z / rollout.temperature).",
        least=0,
    )
    warm_start_batch: int = setting(64, "Prompts per warm-start update.", least=1)
    hf_every: int = setting(0, "Steps between Hugging Face folders of the model, RUN/hf/step_000010. 0: off.", least=0)
    hf_at_end: str = setting(
        "auto",
        "One more after the last step. auto: where the run started from model.hf.",
        choices=("auto", "on", "off"),
    )
    hf_dtype: str = setting("bf16", "Number format of these weights.", choices=("bf16", "fp32"))
    warm_start_lr: float = setting(1e-3, "Learning rate of the warm start.", above=0, below=1e38)
    eval_every: int = setting(
        0, "Steps between evaluations. 0: only before the first and after the last step.", least=0
    )
    tokens_per_micro_batch: int = setting(4096, "Largest number of tokens packed into a micro-batch.", least=1)
    skip_zero_gradient: bool = setting(
        True,
        "Leave out what has no gradient: sequences of advantage 0, unless a KL, entropy or balancing term uses them, "
        "and, in the backward of the vocabulary matrix, clipped tokens.",
    )
    log_prob_store_gib: float = setting(
        0.0,
        "Memory for the exponentials that log-probs keep for their backward; all those of a micro-batch take 2 to 8 "
        "bytes per response token and vocabulary id. 0: all are recomputed. Not used with an entropy bonus, whose "
        "gradient needs the logits.",
        least=0,
        most=2**20,
    )
    log_prob_backend: str = setting(
        "auto",
        "Kernels of the log-probs. auto: Triton's on Hopper and newer GPUs; where they do not compile or run, torch's, "
        "with a warning. triton: an error instead.",
        choices=("auto", "torch", "triton"),
    )


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved, and where it resumes from."""

    save_every_s: float = setting(
        600.0,
        "Seconds between checkpoints, each written at the next safe point: between updates or steps. 0: off.",
        least=0,
    )
    save_every: int = setting(
        0, "Steps between checkpoints, besides those of save_every_s and after the last step. 0: off.", least=0
    )
    keep: int = setting(2, "How many of the newest checkpoints to keep.", least=1)
    keep_every: int = setting(0, "Checkpoints of steps divisible by this are never deleted. 0: off.", least=0)
    keep_best: str | None = setting(
        None,
        "A metric of evaluations, such as eval/accuracy: each evaluation with a new largest value saves the run, and "
        "that checkpoint stays until a better one; the file RUN/checkpoints/best names it. null: off.",
    )
    load: str = setting(
        "none",
        "latest (the newest intact checkpoint of run.dir; a fresh start where nothing was saved), best (the one of "
        "keep_best), a path, or none.",
    )
    allow_other_variant: bool = setting(
        False, "Go on from a checkpoint of another algorithm.variant, which is refused otherwise."
    )
    asynchronous: bool = setting(True, "Keep training while the files are written.")
    exit_after_s: float = setting(
        0.0, "Save and exit with status 75 this many seconds after the start. 0: never.", least=0
    )
    grace_s: float = setting(
        600.0,
        "Seconds to save after SIGTERM, SIGINT or SIGUSR1; then the run prints all stacks and exits.",
        above=0,
    )


@dataclass(frozen=True)
class LoggingConfig:
    """What is written besides metrics.jsonl."""

    tensorboard: bool = setting(True, "Write TensorBoard events.")
    wandb: str | None = setting(
        None,
        "Project of Weights & Biases that gets the metrics, by the package wandb. WANDB_MODE=offline keeps them in "
        "RUN/wandb. null: off.",
    )
    console_every: int = setting(
        1, "Steps between printed lines. Evaluations and the last step are always printed.", least=1
    )
    rollouts_per_step: int = setting(16, "Rollouts written to rollouts/step_*.jsonl. -1: all.", least=-1)


@dataclass(frozen=True)
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guards: GuardConfig = field(default_factory=GuardConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
