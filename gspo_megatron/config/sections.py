"""One run's settings: typed sections, YAML over presets over defaults, `section.key=value` on top.

    config = load_config("examples/cpu_tiny_moe.yaml", ["optimizer.lr=3e-4"])     # strict: an unknown key is an error

The rules between settings, which need the number of processes, are in build/checks.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from gspo_megatron.models.family import ModelShape
from gspo_megatron.models.presets import PRESETS


@dataclass
class RunConfig:
    dir: str = "runs/default"
    """Everything the run writes goes below this directory."""
    seed: int = 1


@dataclass
class ModelConfig:
    """Qwen3-MoE architecture: RMSNorm, q/k norm, grouped-query attention, SwiGLU experts, RoPE, softmax-top-k
    router."""

    preset: str = "tiny_moe"
    """A row of PRESETS; every other key of this section, where given, overrides it."""
    num_layers: int = 4
    hidden_size: int = 64
    num_attention_heads: int = 4
    num_query_groups: int = 2
    head_dim: int = 16
    num_experts: int = 8
    experts_per_token: int = 2
    expert_ffn_size: int = 128
    vocab_size: int | None = None
    """None: the tokenizer's size."""
    max_sequence_length: int = 256
    """Prompt + response tokens."""
    rope_base: float = 10_000.0
    norm_epsilon: float = 1e-6
    tie_embeddings: bool = False
    init_std: float = 0.02
    aux_loss_coef: float = 0.0
    """Megatron's load-balancing loss. It is defined per micro-batch, so a value above 0 makes the gradient depend on
    the layout."""

    @property
    def shape(self) -> ModelShape:
        """The settings of this section that decide the tensors and the maths."""
        settings = {f.name: getattr(self, f.name) for f in fields(ModelShape) if f.name != "family"}
        return ModelShape(family="qwen3_moe", **settings)


@dataclass
class ParallelConfig:
    """Sizes of the parallel axes; data parallel takes what is left of the processes."""

    tp: int = 1
    """Tensor parallel, with sequence parallel."""
    pp: int = 1
    """Pipeline stages."""
    vpp: int = 1
    """Virtual stages on each pipeline rank (Megatron's interleaved schedule)."""
    cp: int = 1
    """Context parallel: ranks that share the tokens of every sequence."""
    ep: int = 1
    """Expert parallel: ranks that share the experts of a layer."""
    etp: int = 1
    """Tensor parallel inside an expert."""
    token_dispatcher: str = "alltoall"
    """How tokens reach their experts: `alltoall`, or `allgather`, which pads micro-batches to one length."""
    recompute: str = "none"
    """`selective` recomputes the attention core in the backward pass, `full` every layer."""
    timeout_s: float = 600.0
    """How long a collective may wait for a rank."""


@dataclass
class PrecisionConfig:
    device: str = "auto"
    dtype: str = "fp32"
    """fp32, bf16 (float32 main weights and gradients), or fp64 (CPU, for exactness tests)."""
    fp8: str = "none"
    """`none`, or a Transformer Engine recipe: `tensorwise`, `blockwise`, `delayed`."""
    transformer_engine: str = "auto"
    """auto: Transformer Engine layers where it can be imported; on, off."""


@dataclass
class DataConfig:
    train: str = "task:sort_digits"
    """`task:NAME` (generated) or the path of a JSONL file."""
    eval: str = "task:sort_digits"
    tokenizer: str = "characters"
    """`characters` (printable ASCII), `characters:<alphabet>`, or the path of a SentencePiece .model file."""
    task: dict[str, Any] = field(default_factory=dict)
    """Parameters of a generated task, such as min_length and max_length."""
    eval_size: int = 256
    """Held-out prompts used by an evaluation: the first ones of data.eval."""
    prompt_field: str = "prompt"
    answer_field: str = "answer"
    solution_field: str | None = None
    """JSONL field that a supervised warm start learns to write; None: the answer."""
    prompt_template: str = "{prompt}"
    max_prompt_tokens: int | None = None
    """None: what model.max_sequence_length leaves beside rollout.max_new_tokens."""
    overlong: str = "error"
    """A prompt that is too long is an `error`, or is dropped with a count (`drop`)."""


@dataclass
class RolloutConfig:
    backend: str = "megatron"
    """megatron: the model under training decodes by itself."""
    group_size: int = 8
    prompts_per_step: int = 32
    max_new_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0
    """0: off."""
    top_p: float = 1.0
    max_batch: int = 256
    """Rollouts of one data-parallel rank that are decoded together."""


@dataclass
class RewardConfig:
    functions: dict[str, float] = field(default_factory=dict)
    """Weights by name: a row of REWARDS, or `package.module:function` (prompt=, response=, answer= -> number). Empty:
    the generated task's own reward, or exact_match for a file."""
    accuracy: str | None = None
    """The function whose value 1 counts as correct in eval/accuracy. None: the first one."""
    on_error: str = "stop"
    """A function that raises or returns NaN: `stop` the run, or `count` it as reward 0."""


@dataclass
class AlgorithmConfig:
    variant: str = "gspo"
    clip_low: float | None = None
    clip_high: float | None = None
    kl_coef: float | None = None
    """None: the variant's. Above 0 a frozen copy of the starting policy is kept and scored."""
    kl_estimator: str = "k3"
    entropy_coef: float = 0.0
    advantage: str | None = None
    """None: the variant's baseline; mean_std or mean."""
    updates_per_rollout: int = 4
    """Mini-batches a rollout batch is cut into; each is used for one update."""
    old_log_probs: str = "auto"
    """`recompute`: by a forward of the trainer ahead of the updates. `auto`: the same, except where a rollout batch has
    one update, whose own forward tells them. `rollout`: the ones the sampler drew with."""


@dataclass
class OptimizerConfig:
    lr: float = 1e-6
    min_lr: float = 0.0
    lr_decay: str = "constant"
    """constant, cosine or linear, from the end of the warm-up to the end of the run."""
    lr_warmup_updates: int = 0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    distributed: bool = True
    """Megatron's distributed optimizer: state sharded over data-parallel ranks (not in fp64)."""
    overlap: str = "auto"
    """Reduce gradients while the backward still runs, and gather the distributed optimizer's parameters while the next
    forward does: `on`, `off`, or `auto`, on a device that computes while others send."""


@dataclass
class TrainConfig:
    steps: int = 100
    warm_start_steps: int = 0
    """Supervised updates on the training prompts' solutions before the first step; for models that begin from nothing.
    They fit the distribution that is sampled, softmax(z / rollout.temperature)."""
    warm_start_batch: int = 64
    warm_start_lr: float = 1e-3
    eval_every: int = 0
    """0: only before the first and after the last step."""
    tokens_per_micro_batch: int = 4096
    skip_zero_gradient: bool = True
    """Leave out what has no gradient: sequences of advantage 0 altogether, where neither KL, entropy nor balancing asks
    for them, and in the backward of the vocabulary matrix the tokens that the clip holds."""
    log_prob_store_gib: float = 0.0
    """Memory in which log-probs may keep exponentials for their backward. 0: all of them are computed again, least
    memory; all of a micro-batch's takes 2 to 8 bytes a response token and id of the vocabulary. Not with an entropy
    bonus, whose gradient needs the logits."""


@dataclass
class CheckpointConfig:
    save_every: int = 0
    """0: after the last step only."""
    keep: int = 2
    """The newest ones that stay."""
    keep_every: int = 0
    """Every so many steps one that stays for good. 0: none."""
    load: str = "none"
    """`latest` (the newest whole one of run.dir; a fresh start when there is none), a path, or `none`."""
    asynchronous: bool = True
    """Training goes on while the files are written."""
    exit_after_s: float = 0.0
    """Save and exit with status 75 so many seconds after the start. 0: never."""
    grace_s: float = 600.0
    """After SIGTERM or SIGUSR1, print all stacks and give up when so many seconds were not enough to save."""


@dataclass
class GuardConfig:
    """Checks while running. `stop` ends the run with status 70, `skip` leaves the update out; either way its rollouts
    are written to guards/."""

    on_nonfinite: str = "stop"
    """A loss or a gradient that is not finite: stop or skip. A log-prob that is not, ahead of the updates, always
    stops."""
    grad_norm_spike: float = 0.0
    """A gradient norm is a spike above so many times the median of the last 20 updates. 0: none is."""
    on_spike: str = "skip"
    ratio_noise: float = 0.0
    """Stop when a ratio of a step's first update is farther from 1 than this. 0: off."""
    check_replicas_every: int = 0
    """Steps between two checks that all copies of a parameter are equal. 0: off."""


@dataclass
class LoggingConfig:
    tensorboard: bool = True
    rollouts_per_step: int = 16
    """Rollouts written to rollouts/step_*.jsonl; -1: all."""


@dataclass
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guards: GuardConfig = field(default_factory=GuardConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)


CHOICES: dict[str, tuple[str, ...]] = {
    "model.preset": tuple(PRESETS),
    "parallel.token_dispatcher": ("alltoall", "allgather"),
    "parallel.recompute": ("none", "selective", "full"),
    "precision.device": ("auto", "cpu", "cuda"),
    "precision.dtype": ("fp32", "bf16", "fp64"),
    "precision.fp8": ("none", "tensorwise", "blockwise", "delayed"),
    "precision.transformer_engine": ("auto", "on", "off"),
    "data.overlong": ("error", "drop"),
    "rollout.backend": ("megatron",),
    "reward.on_error": ("stop", "count"),
    "algorithm.kl_estimator": ("k1", "k2", "k3"),
    "algorithm.old_log_probs": ("auto", "recompute", "rollout"),
    "optimizer.overlap": ("auto", "on", "off"),
    "optimizer.lr_decay": ("constant", "cosine", "linear"),
    "guards.on_nonfinite": ("stop", "skip"),
    "guards.on_spike": ("stop", "skip"),
}

MINIMA: dict[str, float] = {
    **{f"parallel.{axis}": 1 for axis in ("tp", "pp", "vpp", "cp", "ep", "etp")},
    **{
        f"model.{key}": 1
        for key in ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "head_dim", "num_experts")
    },
    "model.vocab_size": 1,
    "model.experts_per_token": 1,
    "model.expert_ffn_size": 1,
    "model.max_sequence_length": 2,
    "model.aux_loss_coef": 0,
    "run.seed": 0,
    "data.eval_size": 1,
    "data.max_prompt_tokens": 1,
    "rollout.group_size": 1,
    "rollout.prompts_per_step": 1,
    "rollout.max_new_tokens": 1,
    "rollout.top_k": 0,
    "rollout.max_batch": 1,
    "algorithm.updates_per_rollout": 1,
    "algorithm.entropy_coef": 0,
    "optimizer.min_lr": 0,
    "optimizer.lr_warmup_updates": 0,
    "optimizer.weight_decay": 0,
    "optimizer.clip_grad": 0,
    "train.steps": 0,
    "train.warm_start_steps": 0,
    "train.warm_start_batch": 1,
    "train.eval_every": 0,
    "train.tokens_per_micro_batch": 1,
    "train.log_prob_store_gib": 0,
    "checkpoint.save_every": 0,
    "checkpoint.keep_every": 0,
    "checkpoint.exit_after_s": 0,
    "checkpoint.keep": 1,
    "guards.ratio_noise": 0,
    "guards.check_replicas_every": 0,
    "logging.rollouts_per_step": -1,
}

POSITIVE = (
    "model.init_std",
    "model.rope_base",
    "model.norm_epsilon",
    "rollout.temperature",
    "rollout.top_p",
    "optimizer.lr",
    "optimizer.adam_eps",
    "train.warm_start_lr",
    "parallel.timeout_s",
    "checkpoint.grace_s",
)
