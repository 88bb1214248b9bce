"""One checkpoint, any layout: weights, moments and step counts are restored on other sizes of every axis, and the run
continues like one that never stopped.

The files are read here by code independent of the reader: slices are joined by `Place.join`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence as Seq
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gspo_megatron.base.batches import MicroBatch, Position, Sequence, UpdateBatch
from gspo_megatron.base.metrics import LossTerms
from gspo_megatron.build.checks import check_config
from gspo_megatron.checkpoint.contents import other_settings
from gspo_megatron.checkpoint.directory import CheckpointDirectory
from gspo_megatron.checkpoint.place import Place
from gspo_megatron.config.loading import load_config
from gspo_megatron.data.packing import pack
from gspo_megatron.device import open_device
from gspo_megatron.layout.layout import packing_rules
from gspo_megatron.mcore import compat
from gspo_megatron.mcore.groups import Groups
from gspo_megatron.mcore.parameters import global_name
from gspo_megatron.mcore.policy import MegatronPolicy
from gspo_megatron.mcore.saving import MegatronCheckpoints
from gspo_megatron.objective import LikelihoodObjective, Segments
from gspo_megatron.run.algorithm import Algorithm
from gspo_megatron.testing.fakes import PlainState, plain
from gspo_megatron.testing.local_ranks import RankError, run_distributed
from tests.support.small import SMALL

SETTINGS = (*SMALL, "model.num_layers=4", "model.init_std=0.2", "model.max_sequence_length=32")
OPTIMIZER = ("optimizer.weight_decay=0.1", "optimizer.clip_grad=1e9")


class Run:
    """A policy on this rank with a store below `folder`, and one update after the other."""

    def __init__(self, world_size: int, folder: Path, *settings: str) -> None:
        config = load_config(None, [*SETTINGS, *OPTIMIZER, *settings])
        device = open_device("cpu", config.precision.dtype)
        self.config, self.groups = config, Groups(check_config(config, world_size), device.torch_device)
        compat.apply_patches(on_cpu=True)
        self.policy = MegatronPolicy(config, self.groups, device, False, Algorithm.of(config).scoring)
        self.warnings: list[str] = []
        self.checkpoints = MegatronCheckpoints(self.policy, CheckpointDirectory(folder, keep=100), self.warnings.append)

    def update(self, number: int) -> None:
        """Update `number` of any run: the same sequences whatever the layout."""
        draw, sequences = random.Random(number), []
        for _ in range(12):
            tokens = [draw.randrange(2, 13) for _ in range(draw.randint(4, 12))]
            sequences.append(Sequence.after_prompt(tokens, 2))
        ranks, rules = self.groups, packing_rules(self.config)
        share = {"dp_rank": ranks.dp_rank, "dp_size": ranks.dp_size, "cp_rank": ranks.cp_rank, "cp_size": ranks.cp_size}
        micro_batches = pack(sequences, pad_id=0, max_tokens=48, rules=rules, **share)
        responses = sum(s.num_trained for s in sequences)
        over_ranks = ranks.sum_over_parts if ranks.cp_size > 1 else None

        def loss(log_probs_R: Tensor, entropy_R: Tensor | None, m: MicroBatch, batch: UpdateBatch) -> LossTerms:
            segments = Segments.from_lengths(m.trained_lengths, index_R=m.sequence_R, over_ranks=over_ranks)
            return LikelihoodObjective()(log_probs_R, segments, num_tokens=batch.num_tokens)

        self.policy.update(UpdateBatch(micro_batches, len(sequences), responses), loss, lr=0.01)

    def save(self, updates: int, *, wait: bool = True) -> None:
        self.checkpoints.save(Position(0, 0, updates), PlainState({"updates": updates}), wait=wait)


def first_run(world_size: int, folder: Path, settings: Seq[str], updates: int) -> None:
    """Trains from the beginning, and saves after every update."""
    run = Run(world_size, folder, *settings)
    for number in range(1, updates + 1):
        run.update(number)
        if number == 1:
            run.policy.freeze_reference()
        run.save(number)


def continued(world_size: int, folder: Path, settings: Seq[str], checkpoint: str) -> None:
    """Loads a checkpoint and saves it again as it stands, in `loaded`; then makes the next update and saves that."""
    run = Run(world_size, folder, *settings)
    state = run.checkpoints.load(checkpoint, plain)
    assert state is not None and run.policy.version == state["updates"]
    for chunk in run.policy.model:
        for parameter in chunk.parameters():
            if getattr(parameter, "main_param", None) is not None and parameter.main_param.numel() == parameter.numel():
                assert torch.equal(parameter, parameter.main_param.view_as(parameter).to(parameter.dtype))
    again = MegatronCheckpoints(run.policy, CheckpointDirectory(folder / "loaded", keep=100), print)
    again.save(Position(0, 0, state["updates"]), PlainState(state), wait=True)
    run.update(state["updates"] + 1)
    run.save(state["updates"] + 1)


def tensors(checkpoint: Path) -> dict[str, Tensor]:
    """The whole tensors in a checkpoint, by their keys. Every element has to be there once."""
    flat: dict[tuple[str, Place], Tensor] = {}
    about: dict[str, dict[str, Any]] = {}
    formats = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16}
    for path in checkpoint.glob("*.safetensors"):
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        for key, shard in json.loads(header.pop("__metadata__")["pieces"]).items():
            start, end = header[key]["data_offsets"]
            part = torch.frombuffer(bytearray(content[8 + length + start : 8 + length + end]), dtype=torch.uint8)
            place, about[key] = Place(**shard["place"]), shard
            numel = shard["height"] * shard["width"]
            whole = flat.setdefault((key, place), torch.full((numel,), float("nan"), dtype=torch.float64))
            assert whole[shard["start"] : shard["end"]].isnan().all(), f"{key} is there twice"
            whole[shard["start"] : shard["end"]] = part.view(formats[header[key]["dtype"]]).double()
    found = {}
    for key, place in flat:
        places = [replace(place, index=i) for i in range(place.count)]
        shape = about[key]["height"], about[key]["width"]
        found[key] = place.join([flat[key, p].view(shape) for p in places])[: about[key]["num_rows"]]
        assert found[key].isfinite().all(), f"{key} is not complete"
    return found


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert ours.keys() == theirs.keys()
    for key, expected in theirs.items():
        assert ours[key].shape == expected.shape
        difference = float((ours[key] - expected).abs().max())
        assert difference <= tolerance * float(expected.abs().max()), f"{key}: {difference}"


def axes(**sizes: int) -> tuple[str, ...]:
    return tuple(f"parallel.{axis}={size}" for axis, size in sizes.items())


FP64 = ("precision.dtype=fp64",)
CHAIN: list[tuple[int, tuple[str, ...]]] = [
    (2, axes()),
    (2, axes(tp=2)),
    (2, axes(pp=2)),
    (2, axes(ep=2)),
    (1, axes()),
    (4, axes(tp=2, ep=2)),
    (2, axes(pp=2, vpp=2)),
    (4, axes(tp=2, etp=2, ep=2)),
    (2, axes(cp=2)),
    (2, axes(pp=2, first_stage_layers=3)),
    (1, axes()),
]
"""Each continues the one before it, the first a run on one process."""


def test_from_layout_to_layout(tmp_path: Path) -> None:
    """A run that is stopped after every update, and continued on another layout each time. In float64 a layout may
    change the rounding of sums: 1e-12. Loading itself changes no bit, of no tensor."""
    whole = tmp_path / "whole"
    run_distributed(first_run, 1, 1, whole, FP64, len(CHAIN) + 1)
    names = {key.partition(".")[2] for key in tensors(whole / "step_000000_update_001")}
    assert {
        "embedding.word_embeddings.weight",
        "decoder.layers.3.mlp.experts.local_experts.3.linear_fc2.weight",
    } < names
    before = whole / "step_000000_update_001"
    for number, (world_size, layout) in enumerate(CHAIN, start=2):
        folder = tmp_path / f"{number}"
        run_distributed(continued, world_size, world_size, folder, (*FP64, *layout), str(before))
        assert_equal(tensors(folder / "loaded" / before.name), tensors(before))
        before = folder / f"step_000000_update_{number:03d}"
        assert_equal(tensors(before), tensors(whole / before.name), tolerance=1e-12)
        assert json.loads((before / "run.json").read_text())["adam_step"] == number


TIED = ("model.tie_embeddings=true",)


def test_tied_embeddings_of_a_pipeline_are_saved_once(tmp_path: Path) -> None:
    """In bf16 with the distributed optimizer on four ranks; in float64 the next update is that of one process."""
    first, second = tmp_path / "first", tmp_path / "second"
    run_distributed(first_run, 4, 4, first, ("precision.dtype=bf16", *axes(pp=2), *TIED), 1)
    saved = first / "step_000000_update_001"
    assert "policy.output_layer.weight" not in tensors(saved)
    for world_size, layout in ((1, ()), (2, axes(pp=2, vpp=2))):
        folder = second / str(world_size)
        run_distributed(continued, world_size, world_size, folder, (*FP64, *layout, *TIED), str(saved))
        assert_equal(tensors(folder / "loaded" / saved.name), tensors(saved))
    after = [tensors(second / f"{n}" / "step_000000_update_002") for n in (1, 2)]
    assert_equal(after[1], after[0], tolerance=1e-12)


@pytest.mark.parametrize(
    ("dtype", "saved_by", "loaded_by"),
    [
        ("bf16", (2, axes()), (2, axes())),
        ("bf16", (2, axes(tp=2)), (4, axes(ep=2))),
        ("bf16", (4, axes(ep=2)), (1, axes())),
        ("fp32", (2, axes()), (1, ("optimizer.distributed=false",))),
        ("fp32", (2, (*axes(pp=2), "optimizer.distributed=false")), (2, axes())),
        ("bf16", (1, ("optimizer.distributed=false",)), (2, axes(tp=2))),
    ],
)
def test_with_the_distributed_optimizer_and_without(
    dtype: str, saved_by: tuple[int, Any], loaded_by: tuple[int, Any], tmp_path: Path
) -> None:
    """On the same layout the next update is the same to the last bit."""
    first, second = tmp_path / "first", tmp_path / "second"
    precision = f"precision.dtype={dtype}"
    (size_a, layout_a), (size_b, layout_b) = saved_by, loaded_by
    run_distributed(first_run, size_a, size_a, first, (precision, *layout_a), 3)
    saved = first / "step_000000_update_002"
    run_distributed(continued, size_b, size_b, second, (precision, *layout_b), str(saved))
    assert_equal(tensors(second / "loaded" / saved.name), tensors(saved))
    after = "step_000000_update_003"
    if saved_by == loaded_by:
        assert_equal(tensors(second / after), tensors(first / after))
    else:
        # Adam's step is 0.01 whatever the gradient, and its sign may be rounding where that is nearly 0.
        ours, theirs = tensors(second / after), tensors(first / after)
        for key in theirs:
            if key.startswith("policy."):
                assert float((ours[key] - theirs[key]).abs().mean()) < (1e-3 if dtype == "bf16" else 1e-5), key


def test_other_number_formats(tmp_path: Path) -> None:
    """A float32 run is continued in bfloat16 from its float32 values, and so with float64."""
    run_distributed(first_run, 1, 1, tmp_path / "fp32", ("precision.dtype=fp32",), 1)
    saved = tmp_path / "fp32" / "step_000000_update_001"
    for dtype in ("bf16", "fp64"):
        run_distributed(continued, 1, 1, tmp_path / dtype, (f"precision.dtype={dtype}",), str(saved))
        ours, theirs = tensors(tmp_path / dtype / "loaded" / saved.name), tensors(saved)
        for key, expected in theirs.items():
            rounded = expected.bfloat16().double() if dtype == "bf16" and key.startswith("reference.") else expected
            assert torch.equal(ours[key], rounded), key


# ------------------------------------------------------------------------------------------------------- while training


def saves_beside(folder: Path) -> tuple[list[str], list[str]]:
    """Two saves that are still being written while the next update changes every tensor; what is complete before
    `finish`, and after it."""
    run = Run(2, folder / "beside", *axes(ep=2))
    twin = MegatronCheckpoints(run.policy, CheckpointDirectory(folder / "waiting", keep=100), print)
    for number in (1, 2):
        run.update(number)
        twin.save(Position(0, 0, number), PlainState({}), wait=True)
        run.save(number, wait=False)
    run.update(3)
    before = sorted(path.name for path in (folder / "beside").glob("step_*"))
    run.checkpoints.finish()
    run.checkpoints.finish()
    return before, sorted(path.name for path in (folder / "beside").glob("step_*"))


def test_a_save_beside_training_holds_the_moment_it_began(tmp_path: Path) -> None:
    names = ["step_000000_update_001", "step_000000_update_002"]
    for before, after in run_distributed(saves_beside, 2, tmp_path):
        assert after == names
        # The second one waited for the first; nothing but `finish` completes the second.
        assert before == [names[0], names[1] + ".tmp"]
    for name in names:
        assert_equal(tensors(tmp_path / "beside" / name), tensors(tmp_path / "waiting" / name))
    first, second = (tensors(tmp_path / "beside" / name) for name in names)
    assert all(not torch.equal(first[key], second[key]) for key in first if key.startswith("exp_avg."))


def finished_without_waiting(folder: Path) -> int:
    run = Run(2, folder)
    run.update(1)
    run.save(1, wait=False)
    asked = 0
    while not run.groups.any_rank((folder / "latest").exists()):
        run.checkpoints.finish(wait=False)
        asked += 1
    return asked


def test_finish_need_not_wait(tmp_path: Path) -> None:
    """Asked now and then, it completes the checkpoint as soon as all ranks have written theirs."""
    assert all(asked > 0 for asked in run_distributed(finished_without_waiting, 2, tmp_path))
    assert (tmp_path / "latest").read_text() == "step_000000_update_001\n"


class Obstructed(CheckpointDirectory):
    def begin(self, position: Position, num_bytes: int | None) -> Path:
        directory = super().begin(position, num_bytes)
        (directory / "rank_00001.safetensors").mkdir()
        return directory


def obstructed(folder: Path, wait: bool) -> list[str]:
    """What is raised when process 1 cannot write; then a save that works."""
    run = Run(2, folder)
    run.checkpoints.directory = Obstructed(folder, keep=1)
    errors = []
    for action in (lambda: run.save(1, wait=wait), run.checkpoints.finish):
        try:
            action()
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
    run.checkpoints.directory = CheckpointDirectory(folder, keep=1)
    run.save(2)
    return errors


@pytest.mark.parametrize("wait", [True, False])
def test_one_rank_that_cannot_write_is_an_error_on_all(wait: bool, tmp_path: Path) -> None:
    for errors in run_distributed(obstructed, 2, tmp_path, wait):
        [error] = errors
        assert error.startswith(
            f"CheckpointError: {tmp_path}/step_000000_update_001.tmp could not be written: FileExists"
        )
        assert error.endswith("(process 1)")
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_000000_update_002"]


# ------------------------------------------------------------------------------------------------------ what is in it


def test_names_of_both_layer_specs_are_one() -> None:
    """Left, as Transformer Engine's layers call it; right, as the local ones do."""
    layer = "decoder.layers.7"
    for te, local in {
        f"{layer}.self_attention.linear_qkv.layer_norm_weight": f"{layer}.input_layernorm.weight",
        f"{layer}.self_attention.linear_qkv.weight": f"{layer}.self_attention.linear_qkv.weight",
        f"{layer}.self_attention.q_layernorm.weight": f"{layer}.self_attention.q_layernorm.weight",
        f"{layer}.pre_mlp_layernorm.weight": f"{layer}.pre_mlp_layernorm.weight",
        f"{layer}.mlp.router.weight": f"{layer}.mlp.router.weight",
        f"{layer}.mlp.experts.linear_fc1.weight11": f"{layer}.mlp.experts.local_experts.11.linear_fc1.weight",
        f"{layer}.mlp.experts.linear_fc2.weight0": f"{layer}.mlp.experts.local_experts.0.linear_fc2.weight",
        "embedding.word_embeddings.weight": "embedding.word_embeddings.weight",
        "decoder.final_layernorm.weight": "decoder.final_layernorm.weight",
        "output_layer.weight": "output_layer.weight",
    }.items():
        assert global_name(te, 0, 0) == local == global_name(local, 0, 0)


def kept_by_megatron(folder: Path) -> list[str]:
    """Names of the tensors in the model's own state."""
    run = Run(1, folder)
    run.update(1)
    run.save(1)
    [model] = run.policy.model
    return [name for name, value in model.state_dict().items() if isinstance(value, Tensor) and value.numel()]


def test_nothing_of_the_models_state_is_left_out(tmp_path: Path) -> None:
    [names] = run_distributed(kept_by_megatron, 1, tmp_path)
    found = tensors(tmp_path / "step_000000_update_001")
    for kind in ("policy", "exp_avg", "exp_avg_sq"):
        assert sorted(key.removeprefix(f"{kind}.") for key in found if key.startswith(f"{kind}.")) == sorted(names)


def test_a_checkpoint_that_names_no_family_is_of_the_first_one() -> None:
    shape = load_config(None, SMALL).model.shape
    saved = shape.tensor_settings()
    del saved["family"]
    assert other_settings(saved, shape) == []
    assert other_settings(saved | {"num_layers": 3, "tie_embeddings": True}, shape) == [
        "model.num_layers=3, not 2",
        "model.tie_embeddings=True, not False",
    ]
    assert other_settings(saved, replace(shape, family="other")) == ["model.family=qwen3_moe, not other"]
    # Other mathematics on the same tensors.
    assert other_settings(saved, replace(shape, rope_base=5e5, norm_epsilon=1e-5, experts_per_token=3)) == []


def test_another_model_is_refused(tmp_path: Path) -> None:
    run_distributed(first_run, 1, 1, tmp_path / "run", FP64, 1)
    saved = str(tmp_path / "run" / "step_000000_update_001")
    for setting, complaint in {
        "model.hidden_size=24": "model.hidden_size=16, not 24",
        "model.num_layers=2": "model.num_layers=4, not 2",
        "model.num_attention_heads=8": "model.num_attention_heads=4, not 8",
    }.items():
        with pytest.raises(RankError, match=f"CheckpointError: {saved} holds another model, with {complaint}"):
            run_distributed(continued, 1, 1, tmp_path / "other", (*FP64, setting), saved)
