"""Rules across settings: layout and model, precision and device, batch sizes, and settings without effect.

`check_config` is called with the number of processes, before any process group exists. A value that would be ignored
is an error; one that works but is unusual is a warning.
"""

from __future__ import annotations

from datetime import date

from gspo_megatron.base.errors import ConfigError, did_you_mean, lookup, plural, shortened
from gspo_megatron.build.data import SETTINGS, is_chat, shown, sources_of
from gspo_megatron.build.engine_checks import check_engine
from gspo_megatron.build.replay import check_replay, replay_warnings
from gspo_megatron.build.set_specs import all_sources, metric_names
from gspo_megatron.config.evaluation import EvalConfig
from gspo_megatron.config.guards import GuardConfig
from gspo_megatron.config.loading import check_values
from gspo_megatron.config.model import ModelConfig
from gspo_megatron.config.sections import Config, DataConfig, OptimizerConfig, TrainConfig
from gspo_megatron.data.examples import fields_of
from gspo_megatron.data.sources import SOURCES, scheme_of
from gspo_megatron.device.precision import RECIPES, expects_te_layers
from gspo_megatron.layout.layout import Layout
from gspo_megatron.layout.refusal import layout_of
from gspo_megatron.models.families import FAMILIES, family_of
from gspo_megatron.models.presets import DEMOS, PRESETS
from gspo_megatron.models.rope import beyond_trained_length
from gspo_megatron.run.algorithm import Algorithm
from gspo_megatron.run.concerns import RULES, Limit

HOPPER = (9, 0)


def check_config(config: Config, world_size: int) -> Layout:
    """Checks every rule that depends on the settings and the number of processes alone.

    Raises:
        ConfigError: a rule is broken.
    """
    check_values(config)
    algorithm = Algorithm.of(config)
    _check_model(config.model)
    _check_precision(config)
    _check_layers(config)
    _check_kernels(config)
    layout = layout_of(config, world_size)
    _check_optimizer(config.optimizer)
    _check_guards(config.guards, algorithm)
    _check_data(config)
    _check_evaluation(config)
    _check_batches(config, algorithm)
    _check_kl(config, algorithm)
    _check_savings(config, algorithm)
    check_replay(config, algorithm)
    _check_folders(config)
    check_engine(config)
    return layout


def _check_folders(config: Config) -> None:
    """Hugging Face folders that a run reads and writes."""
    t, load = config.train, config.checkpoint.load
    exports = t.hf_every or t.hf_at_end == "on" or (t.hf_at_end == "auto" and config.model.hf)
    if config.model.hf_allow_nan and not config.model.hf:
        raise ConfigError("model.hf_allow_nan=true has no effect without model.hf; remove it")
    if t.hf_dtype != TrainConfig().hf_dtype and not exports:
        raise ConfigError(
            f"train.hf_dtype={t.hf_dtype} has no effect: no folder is written; set train.hf_every or train.hf_at_end=on"
        )
    if t.hf_dtype == "fp32" and config.precision.dtype == "bf16":
        raise ConfigError(
            "train.hf_dtype=fp32 with precision.dtype=bf16 would write bf16 numbers in twice the space; use bf16, or "
            "`python -m gspo_megatron.convert to-hf CHECKPOINT OUT --dtype fp32` for the optimizer's float32 weights"
        )
    if config.checkpoint.allow_other_variant and load == "none":
        raise ConfigError("checkpoint.allow_other_variant=true has no effect with checkpoint.load=none; remove it")


def _check_model(m: ModelConfig) -> None:
    for key in m.ignored:
        families = " and ".join(name for name, family in FAMILIES.items() if key in family.uses)
        raise ConfigError(
            f"model.{key}={getattr(m, key)} has no effect with model.family={m.family}, only with {families}; remove "
            "it, or set model.family"
        )
    if m.num_experts == 1:
        raise ConfigError("model.num_experts=1 leaves the router nothing to choose; use 2 or more")
    if complaint := next(family_of(m.shape).complaints(m.shape), None):
        raise ConfigError(complaint)
    if m.aux_loss_coef and not m.shape.num_experts:
        raise ConfigError(
            f"model.aux_loss_coef={m.aux_loss_coef} has no effect with model.family={m.family}, which has no experts "
            "to balance; set it to 0"
        )


def _check_precision(config: Config) -> None:
    precision, recipe = config.precision, RECIPES[config.precision.fp8]
    if precision.dtype == "fp64" and precision.device == "cuda":
        raise ConfigError(
            "precision.dtype=fp64 is for exactness tests on the CPU; use fp32 or bf16, or precision.device=cpu"
        )
    if "local" not in recipe.layers and (precision.device == "cpu" or precision.transformer_engine == "off"):
        raise ConfigError(
            f"precision.fp8={precision.fp8} needs Transformer Engine on a GPU; set precision.fp8=none, "
            "or precision.device=cuda and precision.transformer_engine=auto"
        )
    if precision.dtype not in recipe.dtypes:
        allowed = " or ".join(recipe.dtypes)
        raise ConfigError(f"precision.fp8={precision.fp8} needs precision.dtype={allowed}, got {precision.dtype}")
    ends, a_stage = precision.first_last_layers_bf16, config.model.num_layers // config.parallel.pp
    if ends and not recipe.quantizes:
        raise ConfigError(
            f"precision.first_last_layers_bf16={ends} has no effect with precision.fp8={precision.fp8}, which "
            "quantizes no layer; set it to 0"
        )
    if ends > a_stage:
        raise ConfigError(
            f"precision.first_last_layers_bf16={ends} exceeds the {plural(a_stage, 'layer')} of a pipeline stage "
            f"(model.num_layers / parallel.pp), which is as many as Megatron-Core allows; set it to {a_stage} or fewer"
        )


def _check_layers(config: Config) -> None:
    """What a model needs and Transformer Engine's layers are not built with here."""
    m, family = config.model.shape, family_of(config.model.shape)
    if not expects_te_layers(config.precision):
        return
    if family.only_local:
        raise ConfigError(
            f"model.family={family.name} has {family.only_local}, which Transformer Engine's layers are not built with "
            "here; set precision.transformer_engine=off and precision.fp8=none"
        )
    if m.sliding_window and config.parallel.cp > 1:
        raise ConfigError(
            f"model.sliding_window={m.sliding_window} with parallel.cp={config.parallel.cp}: Transformer Engine's ring "
            "over context-parallel ranks has no windows; set parallel.cp=1, or precision.transformer_engine=off"
        )


def _check_kernels(config: Config) -> None:
    backend, precision = config.train.log_prob_backend, config.precision
    if backend == "triton" and (precision.device == "cpu" or precision.dtype == "fp64"):
        raise ConfigError(
            f"train.log_prob_backend=triton needs a GPU and fp32 or bf16, not precision.device={precision.device} with "
            f"precision.dtype={precision.dtype}; use auto"
        )


def _check_data(config: Config) -> None:
    d = config.data
    _check_sources(config)
    if d.curriculum and all(scheme_of(source.spec.source) == "task" for source in sources_of(config, "train")):
        raise ConfigError(
            f"data.curriculum={d.curriculum} has no effect with data.train={shown(d.train)}: a generated task never "
            "gives a prompt twice; set it to 0"
        )
    if not d.curriculum and d.curriculum_retry != DataConfig().curriculum_retry:
        raise ConfigError(f"data.curriculum_retry={d.curriculum_retry} has no effect with data.curriculum=0; remove it")
    try:
        date.fromisoformat(d.chat_date or "2026-11-26")
    except ValueError as error:
        raise ConfigError(f"data.chat_date={d.chat_date} is not a day ({error}); write it as 2026-11-26") from error
    if d.chat_date and not any(map(is_chat, all_sources(config))):
        raise ConfigError(f"data.chat_date={d.chat_date} has no effect without a chat template; remove it")


def _check_sources(config: Config) -> None:
    """A setting that only some sources read must be read by one that is used, and a file has no held-out prompts."""
    d = config.data
    train = sources_of(config, "train")
    if d.eval is None and (len(train) > 1 or scheme_of(train[0].spec.source) != "task"):
        raise ConfigError(
            f"data.eval=null with data.train={shown(d.train)}: only a generated task has held-out prompts of its own; "
            "set data.eval to a file of prompts that training does not see"
        )
    used = all_sources(config)
    for key in SETTINGS:
        readers = " or ".join(scheme for scheme, source in SOURCES.items() if key in source.reads)
        read_by = [source for source in used if key in SOURCES[scheme_of(source.spec.source)].reads]
        for source in used:
            if key in source.own and source not in read_by:
                raise ConfigError(
                    f"{key} of the source {source.spec.source} has no effect: only sources of kind {readers} read it; "
                    "remove it"
                )
        if getattr(d, key) != getattr(DataConfig(), key) and all(key in source.own for source in read_by):
            raise ConfigError(
                f"data.{key}={getattr(d, key)!r} has no effect: data.train={shown(d.train)} and "
                f"data.eval={shown(d.eval or d.train)} do not read it, only sources of kind {readers} do; remove it"
            )


def _check_evaluation(config: Config) -> None:
    """Metrics that decide something are those of a set, and of enough evaluations."""
    known, e = metric_names(config), config.eval
    watched = {"checkpoint.keep_best": config.checkpoint.keep_best, "eval.stop_metric": e.stop_metric}
    for key, name in watched.items():
        if name is not None and name not in known:
            near = did_you_mean(name, known) or "."
            raise ConfigError(
                f"{key}={name} is no metric of an evaluation of which more is better{near} There are {', '.join(known)}"
            )
    if e.patience and not config.train.eval_every:
        raise ConfigError(
            f"eval.patience={e.patience} has no effect with train.eval_every=0: there is no evaluation before the last "
            "step; set train.eval_every"
        )
    if not e.patience and e.stop_metric != EvalConfig().stop_metric:
        raise ConfigError(f"eval.stop_metric={e.stop_metric} has no effect with eval.patience=0; set eval.patience")


def _check_optimizer(o: OptimizerConfig) -> None:
    if o.min_lr > 0 and o.lr_decay == "constant":
        raise ConfigError(
            f"optimizer.min_lr={o.min_lr} has no effect with optimizer.lr_decay=constant; set min_lr=0, or lr_decay to "
            "cosine or linear"
        )
    if o.min_lr > o.lr:
        raise ConfigError(f"optimizer.min_lr={o.min_lr} exceeds optimizer.lr={o.lr}; the decay goes from lr to min_lr")


def _check_guards(g: GuardConfig, algorithm: Algorithm) -> None:
    if g.grad_norm_spike and g.grad_norm_spike <= 1:
        raise ConfigError(
            f"guards.grad_norm_spike={g.grad_norm_spike} would refuse ordinary updates; set it above 1, such as 10, or "
            "to 0 to switch the rule off"
        )
    if not g.grad_norm_spike and g.on_spike != GuardConfig().on_spike:
        raise ConfigError(
            f"guards.on_spike={g.on_spike} has no effect with guards.grad_norm_spike=0; set that above 1, such as 10"
        )
    if 0 < g.length_growth <= 1:
        raise ConfigError(
            f"guards.length_growth={g.length_growth} would object to ordinary steps; set it above 1, such as 3, or to "
            "0 to switch the rule off"
        )
    if g.kl_ref and not algorithm.needs_reference:
        raise ConfigError(
            f"guards.kl_ref={g.kl_ref} has no effect with algorithm.kl_coef=0, which keeps no reference; set kl_coef "
            "above 0, or kl_ref to 0"
        )
    if g.sampler_far != GuardConfig().sampler_far and g.sampler_far and algorithm.old_log_probs == "sampler":
        raise ConfigError(
            f"guards.sampler_far={g.sampler_far} has no effect with algorithm.old_log_probs=rollout, which compares "
            "nothing with the sampler; remove it"
        )
    if g.left_out != GuardConfig().left_out and g.left_out and not algorithm.variant.correction.acts:
        raise ConfigError(
            f"guards.left_out={g.left_out} has no effect without algorithm.correction, which alone leaves tokens out; "
            "remove it"
        )
    rules = {rule.name: rule for rule in RULES}
    for name in g.stop_on:
        rule = lookup(rules, name, "rule of guards.stop_on")
        if isinstance(rule, Limit) and not getattr(g, name):
            raise ConfigError(f"guards.stop_on has {name}, which guards.{name}=0 switches off; set that, or remove it")


def _check_batches(config: Config, algorithm: Algorithm) -> None:
    r, a, m = config.rollout, config.algorithm, config.model
    if r.prompts_per_step % a.updates_per_rollout:
        raise ConfigError(
            f"rollout.prompts_per_step={r.prompts_per_step} is not divisible by algorithm.updates_per_rollout="
            f"{a.updates_per_rollout}; every mini-batch holds complete groups"
        )
    if r.dynamic_sampling and r.group_size == 1:
        raise ConfigError(
            f"rollout.dynamic_sampling={r.dynamic_sampling} with rollout.group_size=1: the rewards of a group of one "
            "never differ, so every group would be replaced; use a group_size of 4 to 16, or dynamic_sampling=0"
        )
    if r.max_new_tokens >= m.max_sequence_length:
        raise ConfigError(
            f"rollout.max_new_tokens={r.max_new_tokens} leaves no room for a prompt in "
            f"model.max_sequence_length={m.max_sequence_length}"
        )
    if m.max_sequence_length > config.train.tokens_per_micro_batch:
        longest = config.train.tokens_per_micro_batch
        raise ConfigError(
            f"model.max_sequence_length={m.max_sequence_length} exceeds train.tokens_per_micro_batch={longest}: a long "
            f"sequence would not fit in a micro-batch; raise train.tokens_per_micro_batch to {m.max_sequence_length}"
        )
    if a.old_log_probs == "rollout" and algorithm.variant.correction.acts:
        raise ConfigError(
            f"algorithm.correction={a.correction} with algorithm.old_log_probs=rollout: the old log-probs are the "
            "sampler's own, so every weight is 1; set algorithm.old_log_probs=recompute, or remove the correction"
        )
    if a.old_log_probs == "rollout" and r.truncates and not a.sampling_mask:
        raise ConfigError(
            f"algorithm.old_log_probs=rollout with {_truncation(config)}: the sampler's log-probs are of the truncated "
            "distribution, the trainer's of the full one; use algorithm.old_log_probs=auto, or "
            "algorithm.sampling_mask=true"
        )
    if a.sampling_mask and not r.truncates:
        raise ConfigError(
            f"algorithm.sampling_mask=true has no effect with rollout.top_k={r.top_k}, rollout.top_p={r.top_p}, which "
            "keep every id; set sampling_mask=false, or top_p below 1"
        )


def _check_kl(config: Config, algorithm: Algorithm) -> None:
    a, baseline = config.algorithm, algorithm.variant.baseline.name
    if not algorithm.kl_in_reward:
        return
    if not algorithm.needs_reference:
        raise ConfigError(
            "algorithm.kl_in=reward has no effect with algorithm.kl_coef=0; set that above 0, such as "
            "1e-3, or remove kl_in"
        )
    if a.kl_estimator.endswith("+"):
        raise ConfigError(
            f"algorithm.kl_estimator={a.kl_estimator} is a value with another gradient, and a reward has none: with "
            f"algorithm.kl_in=reward use {a.kl_estimator.removesuffix('+')}"
        )
    if a.drop_truncated:
        raise ConfigError(
            "algorithm.kl_in=reward with algorithm.drop_truncated=true: truncated responses are not scored, so their "
            "rewards, which count in the baseline of their group, would lack the penalty; set one of them off"
        )
    if baseline == "mean_normalised":
        raise ConfigError(
            "algorithm.kl_in=reward with the baseline mean_normalised: a reward less its penalty may be negative, and "
            "this baseline divides by the mean; use algorithm.kl_in=loss, or another algorithm.advantage"
        )


def _truncation(config: Config) -> str:
    """The settings by which sampling leaves tokens out, in words; empty where none does."""
    r = config.rollout
    acting = {f"rollout.top_k={r.top_k}": r.top_k > 0, f"rollout.top_p={r.top_p}": r.top_p < 1}
    return ", ".join(setting for setting, acts in acting.items() if acts)


def _check_savings(config: Config, algorithm: Algorithm) -> None:
    a, t = config.algorithm, config.train
    if config.guards.ratio_noise and algorithm.old_log_probs == "update":
        raise ConfigError(
            f"guards.ratio_noise={config.guards.ratio_noise} has no effect when the one update of a rollout batch "
            "computes its own old log-probs: set algorithm.old_log_probs=recompute, or guards.ratio_noise=0"
        )
    if t.log_prob_store_gib and a.entropy_coef:
        raise ConfigError(
            f"train.log_prob_store_gib={t.log_prob_store_gib} has no effect with algorithm.entropy_coef="
            f"{a.entropy_coef}, whose gradient needs the logits themselves; set one of them to 0"
        )


def config_warnings(config: Config, algorithm: Algorithm) -> list[str]:
    """Settings that work but are probably not intended."""
    notes = algorithm.variant.warnings() + replay_warnings(config, algorithm)
    if not algorithm.variant.clip.corrects and algorithm.updates_per_rollout > 1:
        notes.append(
            f"algorithm.variant={algorithm.variant.name} has no ratio to correct with, and of the "
            f"{algorithm.updates_per_rollout} updates of a rollout batch only the first is on-policy; set "
            "algorithm.updates_per_rollout=1"
        )
    if algorithm.old_log_probs != "sampler" and algorithm.updates_per_rollout == 1 and algorithm.variant.clip.corrects:
        notes.append(
            f"algorithm.updates_per_rollout=1: the one update of a rollout batch finds ratios of 1, so the clip of "
            f"algorithm.variant={algorithm.variant.name} never acts; use 2 or more to use rollouts for several updates"
        )
    if config.rollout.dynamic_sampling and algorithm.variant.baseline.scope != "group":
        notes.append(
            f"rollout.dynamic_sampling={config.rollout.dynamic_sampling} with the baseline "
            f"{algorithm.variant.baseline.name}, which compares more than a group: groups of equal rewards have a "
            "gradient there, and are replaced"
        )
    if config.rollout.group_size == 1 and algorithm.variant.baseline.scope == "group":
        notes.append(
            "rollout.group_size=1: a group of one is its own mean, every advantage is 0 and no step has a gradient; "
            "use 4 to 16"
        )
    if config.rollout.truncates and not config.algorithm.sampling_mask:
        notes.append(
            f"{_truncation(config)}: responses come from the truncated distribution, but ratios and gradients are of "
            "the full one, so the policy that is improved is not the one that was sampled; set "
            "algorithm.sampling_mask=true, or top_k=0 and top_p=1"
        )
    starts_from = config.model.hf or config.train.warm_start_steps or config.checkpoint.load != "none"
    if config.train.steps and not starts_from:
        notes.append(
            "the run starts from random weights without a warm start, so rewards have next to nothing to improve; set "
            "model.hf to a folder with a model, or train.warm_start_steps, or checkpoint.load"
        )
    model = f"model.hf={config.model.hf}" if config.model.hf else f"model.preset={config.model.preset}"
    if config.data.train == DataConfig().train and (config.model.hf or config.model.preset not in DEMOS):
        notes.append(
            f"data.train={config.data.train}, on which {model} would train, is the demo's task; set data.train and "
            "data.eval to your own"
        )
    published = PRESETS[config.model.preset].get("max_sequence_length")
    if published and (note := beyond_trained_length(config.model.shape, published)):
        notes.append(note)
    if (needed := RECIPES[config.precision.fp8].capability) > HOPPER:
        notes.append(
            f"precision.fp8={config.precision.fp8} needs GPUs of compute capability {needed[0]}.{needed[1]} or newer; "
            "an H100 has 9.0"
        )
    for source in sources_of(config, "train"):
        template, fields = source.spec.prompt_template, (source.spec.answer_field, source.spec.solution_field)
        if set(fields) & set(fields_of(template)) and scheme_of(source.spec.source) != "task":
            notes.append(
                f"data.prompt_template={shortened(template)!r} writes the answer into the prompt; for the literal "
                f"text write {{{{{source.spec.answer_field}}}}}"
            )
    if algorithm.balances_load:
        notes.append(
            f"model.aux_loss_coef={config.model.aux_loss_coef}: Megatron's load-balancing loss is a mean per "
            f"micro-batch, so the gradient depends on the layout"
        )
    if algorithm.kl_in_reward and algorithm.kl_estimator in ("k2", "k3"):
        notes.append(
            f"algorithm.kl_estimator={algorithm.kl_estimator} with algorithm.kl_in=reward: the expected gradient is "
            "not that of the divergence; k1 has it"
        )
    if algorithm.kl_estimator == "k1" and algorithm.needs_reference and not algorithm.kl_in_reward:
        notes.append(
            "algorithm.kl_estimator=k1: the expected gradient of this loss term is 0, so it adds only noise; use k2, "
            "k3 or k1+"
        )
    if algorithm.kl_estimator != "k3" and not algorithm.needs_reference:
        notes.append(f"algorithm.kl_estimator={algorithm.kl_estimator} has no effect while algorithm.kl_coef is 0")
    return notes
