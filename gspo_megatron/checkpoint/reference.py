"""Log-probs by transformers, to compare with."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from gspo_megatron.base.errors import CheckpointError, ConfigError


def transformers_log_probs(folder: Path, tokens: Sequence[int]) -> list[float]:
    """The log-prob of every token after the first, in float32, by the model that transformers makes of the folder. Call
    it before a device is opened: the stand-ins of device/cpu.py are not made for other people's models.

    Raises:
        ConfigError: transformers is not installed.
        CheckpointError: it cannot load the folder.
    """
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise ConfigError(
            "transformers is not installed, and verify compares with it: pip install transformers, or make venv-hf and "
            "use .venv-hf/bin/python"
        ) from error
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        except Exception as error:
            reason = " ".join(str(error).split())[:500]
            raise CheckpointError(f"transformers cannot load {folder} ({type(error).__name__}: {reason})") from error
        ids = torch.tensor(tokens)
        log_probs_TV = torch.log_softmax(model(ids[None]).logits[0].float(), dim=-1)
        return log_probs_TV[:-1].gather(1, ids[1:, None])[:, 0].tolist()
