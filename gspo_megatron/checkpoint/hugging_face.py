"""The weights of a Hugging Face folder, read slice by slice.

    folder = HuggingFaceFolder("/models/Qwen3-30B-A3B")
    rows = folder.read("lm_head.weight")[0:1000, :]     # only these bytes are read

Files are safetensors: one model.safetensors, or several that model.safetensors.index.json lists. stored.py has their
tensors, quantised.py those that are numbers and scales.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gspo_megatron.base.errors import CheckpointError, did_you_mean
from gspo_megatron.checkpoint.quantised import BLOCKS, FP8, SCALE, SCALES, Quantisation, Weight
from gspo_megatron.checkpoint.stored import FLOATS, StoredTensor, tensors_of
from gspo_megatron.models.names import Sliceable

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LAYER = re.compile(r"model\.layers\.(\d+)\.")
COMPUTED = re.compile(r".*\.rotary_emb\.inv_freq")
"""Tensors of older files that are computed, not read."""


class HuggingFaceFolder:
    """config.json and the weights of a folder.

    Attributes:
        path: the folder.
        config: config.json.
        weights: by name. One that is stored as numbers and scales counts once.

    Raises:
        CheckpointError: a file that is missing, damaged or not what it says; weights in another format.
    """

    def __init__(self, path: str | Path, *, allow_nan: bool = False) -> None:
        self.path = Path(path)
        self.config = read_json(self.path / "config.json")
        quantisation = Quantisation(self.config, self.path / "config.json")
        tensors = {tensor.name: tensor for file in self._files() for tensor in tensors_of(file, allow_nan)}
        self._check_index(tensors)
        self.weights: dict[str, Weight] = dict(quantisation.weights(tensors))

    def read(self, name: str) -> Sliceable:
        """A weight; one in FP8 or MXFP4 is multiplied by its scales.

        Raises:
            CheckpointError: it is missing, or has a format that is not a weight's.
        """
        if name not in self.weights:
            near = did_you_mean(name, self.weights) or "."
            raise CheckpointError(f"{self.path} has no tensor {name!r}{near} Its config.json asks for it")
        if reason := self.unreadable(name):
            raise CheckpointError(f"{self.path}: {reason}")
        return self.weights[name]

    def unreadable(self, name: str) -> str | None:
        """Why a weight of the folder has a format that is not a weight's; None where it is one."""
        weight = self.weights[name]
        if not isinstance(weight, StoredTensor) or weight.dtype in FLOATS:
            return None
        return (
            f"{weight.file.name}: {name} has the number format {weight.dtype}; readable are {', '.join(FLOATS)}, {FP8} "
            f"with {name}{SCALE}, and MXFP4 as NAME{BLOCKS} with NAME{SCALES}"
        )

    def left_out(self, name: str) -> str | None:
        """Why a tensor is not part of the language model; None where it should be: layers after the last one, which
        predict several tokens at once (config.json counts them, or they are called mtp), and what is computed."""
        layer, depth = LAYER.match(name), self.config.get("num_hidden_layers", 0)
        if layer and 0 <= int(layer[1]) - depth < (self.config.get("num_nextn_predict_layers") or 0):
            return f"layer {layer[1]} predicts several tokens at once, and is not trained"
        if self.config.get("model_type") == "qwen3_next" and name.startswith("mtp."):
            return "predicts several tokens at once, and is not trained"
        if self.config.get("tie_word_embeddings", False) and name == "lm_head.weight":
            return "tied to the embedding"
        return "computed" if COMPUTED.fullmatch(name) else None

    def _files(self) -> list[Path]:
        """
        Raises:
            CheckpointError: there are none, or one that the index names is missing.
        """
        if (self.path / INDEX).is_file():
            files = sorted({self.path / name for name in self._index().values()})
            if missing := [file.name for file in files if not file.is_file()]:
                raise CheckpointError(
                    f"{self.path / INDEX} names {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not "
                    "in the folder; download the missing files"
                )
            return files
        if (self.path / SINGLE).is_file():
            return [self.path / SINGLE]
        pickles = sorted(file.name for file in self.path.glob("*.bin"))
        if pickles:
            raise CheckpointError(
                f"{self.path} has its weights as a pickle ({pickles[0]}), which can run code when it is read; convert "
                f"it once: python -c 'from transformers import AutoModelForCausalLM as M; "
                f'M.from_pretrained("{self.path}", dtype="auto").save_pretrained("{self.path}-safetensors")\''
            )
        raise CheckpointError(f"{self.path} has neither {SINGLE} nor {INDEX}; download the weights of the model")

    def _index(self) -> Mapping[str, str]:
        index = read_json(self.path / INDEX).get("weight_map")
        if not isinstance(index, dict) or not all(
            isinstance(name, str) and name == Path(name).name for name in index.values()
        ):
            raise CheckpointError(f"{self.path / INDEX} has no weight_map from tensors to files of this folder")
        return index

    def _check_index(self, tensors: Mapping[str, StoredTensor]) -> None:
        """
        Raises:
            CheckpointError: the index names a tensor that its file does not hold.
        """
        if not (self.path / INDEX).is_file():
            return
        for name, file in self._index().items():
            if name not in tensors or tensors[name].file.name != file:
                raise CheckpointError(
                    f"{self.path / INDEX} says that {name} is in {file}, and it is not; download both again"
                )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a folder.

    Raises:
        CheckpointError: it is missing, or something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; {path.parent} is not the folder of a Hugging Face model") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}: {error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return content
