"""What runs inside vLLM's workers: it takes the policy's weights, by vLLM's own interface for such engines.

    python -m vllm.entrypoints.openai.api_server ... --weight-transfer-config '{"backend": "gspo"}'
        --worker-extension-cls gspo_megatron.rollout.vllm_worker.Extension

vLLM imports the extension in every worker, and with it this file, which adds the backend to vLLM's table. Written for
vLLM 0.32.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from gspo_megatron.base.errors import EngineError
from gspo_megatron.rollout.weight_receivers import Receiver
from gspo_megatron.rollout.weight_stream import Unpacker

BACKEND = "gspo"


@dataclass
class Group(WeightTransferInitInfo):
    """The group of the channel broadcast. `first_rank`: of the engine's first worker."""

    session: str
    host: str
    port: int
    first_rank: int
    size: int
    timeout_s: float


@dataclass
class Order(WeightTransferUpdateInfo):
    """See `Receiver.buckets`."""

    channel: str
    header: dict[str, Any] | None
    place: str


class WeightEngine(WeightTransferEngine[Group, Order]):
    """Takes the buckets of one version between start and finish. What raises here leaves the version as it was."""

    init_info_cls, update_info_cls = Group, Order

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.receiver = Receiver(torch.device(self.device))
        self.unpacker = Unpacker()
        self.awaited: dict[str, set[str]] = {}
        """Parameters of the model, each with all names that it has; tied embeddings have two."""
        self.loaded: set[str] | None = set()

    def init_transfer_engine(self, init_info: Group) -> None:
        here = self.parallel_config.data_parallel_index * self.parallel_config.world_size + self.parallel_config.rank
        place = {name: value for name, value in vars(init_info).items() if name != "first_rank"}
        self.receiver.join(rank=init_info.first_rank + here, **place)

    def start_weight_update(self) -> None:
        self.unpacker, self.loaded = Unpacker(), set()
        self.receiver.release()
        names: dict[Tensor, set[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            names.setdefault(parameter, set()).add(name)
        tied = {name: group for group in names.values() for name in group}
        forget_packed_experts(self.model)
        forget_half_loaded(self.model)
        initialize_layerwise_reload(self.model)
        # Only now: what vLLM computes from weights, such as the absorbed matrices of latent attention, is gone.
        self.awaited = {name: tied.get(name, {name}) for name, _ in self.model.named_parameters()}

    @torch.no_grad()
    def receive_weights(self, update_info: Order) -> None:
        for bucket in self.receiver.buckets(update_info.channel, update_info.header, update_info.place):
            self._load(self.unpacker.tensors(bucket))

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # vLLM's own waits for torch.accelerator, which raises where there is none.
        self.receive_weights(self.parse_update_info(update_info))
        if self.receiver.device.type != "cpu":
            torch.accelerator.synchronize()

    @torch.no_grad()
    def take(self, tensors: Iterator[tuple[str, Tensor]]) -> None:
        """All of the policy's tensors, from the trainer in the same process."""
        self._load(tensors)
        self.unpacker.complete = True

    def finish_weight_update(self) -> None:
        if not self.unpacker.complete:
            raise EngineError("the weights ended early: the last bucket did not come; start the engine again")
        if self.loaded is not None and (missing := [n for n, names in self.awaited.items() if not names & self.loaded]):
            raise EngineError(
                f"{_some(missing)} of the engine's model got no weights; start the engine with the folder of the "
                "model that is trained"
            )
        if lost := lost_layers(self.model):
            raise EngineError(
                f"vLLM's loader of this model does not put new weights into {_some(lost)}, which would keep the old "
                "ones; docs/engines.md lists the models that a running engine can be given weights of"
            )
        finalize_layerwise_reload(self.model, self.model_config)
        self.receiver.release()

    def shutdown(self) -> None:
        self.receiver.leave()

    def _load(self, tensors: Iterator[tuple[str, Tensor]]) -> None:
        loaded = self.model.load_weights(tensors)  # None: this model does not tell
        self.loaded = None if loaded is None or self.loaded is None else self.loaded | loaded


def forget_packed_experts(model: torch.nn.Module) -> None:
    """Lets vLLM pack reloaded experts for its CPU kernel, as it does when it starts.

    vLLM 0.32 packs them only where a layer has no kernel yet (`UnquantizedFusedMoEMethod._setup_kernel`), so after a
    reload the kernel would read unpacked weights as packed ones: wrong log-probs, without an error. Without a kernel
    it makes both again. tests/engine/test_weights.py tells when vLLM no longer needs this.
    """
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        kernel = getattr(method, "moe_kernel", None)
        if kernel is not None and type(kernel.fused_experts).__module__.endswith(".cpu_moe"):
            method.moe_kernel = None


def forget_half_loaded(model: torch.nn.Module) -> None:
    """Drops what an earlier update left that did not end: vLLM keeps the tensors of layers that were not whole, and
    would count them as a part of the next update."""
    for layer in model.modules():
        info = get_layerwise_info(layer)
        if info.can_load():
            info.load_numel = 0
            info.loaded_weights.clear()


def lost_layers(model: torch.nn.Module) -> list[str]:
    """Layers with parameters into which nothing was loaded since the reload began; vLLM would put back what they had,
    with a warning. A model's own loader may write around the loaders of its parameters, which a reload needs. A layer
    that shares its parameters with one that was loaded, as tied embeddings do, is not lost, and neither is a shard of
    the vocabulary that is nothing but padding."""
    untouched: dict[str, set[int]] = {}
    loaded: set[int] = set()
    for name, layer in model.named_modules():
        info = get_layerwise_info(layer)
        shard = getattr(layer, "shard_indices", None)
        if shard is not None and not shard.num_org_elements:
            continue
        # While a layer has no weights yet, the tensors that its kernel reads are kept aside.
        kept = info.kernel_tensors[0] if info.kernel_tensors else dict(layer.named_parameters(recurse=False))
        parameters = {id(parameter) for parameter in kept.values()}
        if not info.can_load() or info.load_numel:
            loaded |= parameters
        elif any(True for _ in layer.parameters(recurse=False)) and not is_deferred_attention_layer(layer):
            untouched[name] = parameters
    return [name for name, parameters in untouched.items() if not parameters <= loaded]


def _some(names: Collection[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


class Extension:
    """Mixed into vLLM's worker; its methods are called by name (`/collective_rpc`)."""

    weight_transfer_engine: WeightEngine
    model_config: Any
    device: torch.device
    _weight_update_active: bool
    """vLLM's own: between start and finish of an update."""

    def gspo_about(self) -> dict[str, Any]:
        """What a run that did not start the engine compares with its own."""
        model = json.loads(self.model_config.hf_config.to_json_string(use_diff=False))
        return {"vocab_size": self.model_config.get_vocab_size(), "device": self.device.type, "model": model}

    def gspo_forget_update(self) -> None:
        """After a trainer that was killed within an update, of which vLLM waits for the end."""
        self._weight_update_active = False

    def gspo_session(self) -> str:
        """The group that this worker is in; empty where it is in none."""
        return self.weight_transfer_engine.receiver.session

    def gspo_take(self, tensors: Iterator[tuple[str, Tensor]]) -> None:
        """New weights from the trainer in the same process."""
        worker: Any = self
        worker.start_weight_update()
        self.weight_transfer_engine.take(tensors)
        worker.finish_weight_update()


WeightTransferEngineFactory.register_engine(BACKEND, WeightEngine)
