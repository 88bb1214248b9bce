"""A sequence classifier's scores of conversations, by transformers. Called in a process of its own (`reward_model.py`).

The text is the chat template's of the model's own tokenizer, or, where it has none, prompt and response as the
tokenizer joins a pair. Sequences of a batch are padded on the right and masked. A causal classifier reads its score at
the last token that is not its padding id: where its config has none, one is taken that the batch does not hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch

try:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
except ImportError as error:
    raise ImportError("it needs the package transformers: pip install 'transformers', or '.[hf]' here") from error


class Classifier(NamedTuple):
    """A model, and its tokenizer."""

    model: Any
    tokenizer: Any


def scores(
    *,
    prompts: Sequence[str],
    responses: Sequence[str],
    messages: Sequence[Sequence[Mapping[str, Any]]],
    model: str,
    device: str = "cpu",
    dtype: str = "auto",
    label: int | None = None,
    max_tokens: int | None = None,
) -> list[float | Exception]:
    """For each conversation the model's one output, or the probability of class `label`; or why it has none.

    Raises:
        ValueError: the folder does not hold such a classifier.
    """
    classifier = _loaded(model, device, dtype)
    _check_label(classifier.model.config.num_labels, label)
    found: list[Any] = []
    for prompt, response, said in zip(prompts, responses, messages, strict=True):
        try:
            found.append(_encoded(classifier, prompt, response, said, max_tokens))
        except Exception as error:  # a template may refuse a conversation
            found.append(error)
    fits = [i for i, tokens in enumerate(found) if not isinstance(tokens, Exception)]
    for i, score in zip(fits, _forward(classifier, [found[i] for i in fits], label) if fits else [], strict=True):
        found[i] = score
    return found


@lru_cache(maxsize=1)
def _loaded(folder: str, device: str, dtype: str) -> Classifier:
    model, found = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=dtype, local_files_only=True, output_loading_info=True
    )
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"{folder} lacks the weights {', '.join(missing[:3])}: it was not trained as a classifier")
    return Classifier(model.to(device).eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True))


def _check_label(classes: int, label: int | None) -> None:
    if label is None and classes != 1:
        raise ValueError(f"the model has {classes} classes; set label to the one whose probability is the score")
    if label is not None and not (classes > 1 and 0 <= label < classes):
        raise ValueError(f"label={label} must be a class of the model, which has {classes}")


def _encoded(
    classifier: Classifier, prompt: str, response: str, messages: Sequence[Mapping[str, Any]], most: int | None
) -> dict[str, list[int]]:
    """What the tokenizer gives: input_ids, and for some models token_type_ids.

    Raises:
        ValueError: too long.
    """
    tokenizer = classifier.tokenizer
    if tokenizer.chat_template:
        said = [*(messages or [{"role": "user", "content": prompt}]), {"role": "assistant", "content": response}]
        text = tokenizer.apply_chat_template(said, tokenize=False)
        found = tokenizer(text, add_special_tokens=False, verbose=False)
    else:
        found = tokenizer(prompt, response, verbose=False)
    positions = getattr(classifier.model.config, "max_position_embeddings", None)
    most = min(x for x in (most, positions, tokenizer.model_max_length) if x)
    if (length := len(found["input_ids"])) > most:
        raise ValueError(f"the conversation has {length} tokens, more than the {most} that the reward model takes")
    return dict(found)


def _forward(classifier: Classifier, sequences: Sequence[dict[str, list[int]]], label: int | None) -> list[float]:
    model, config = classifier.model, classifier.model.config
    own = config.pad_token_id
    pad = own if own is not None else _absent({t for s in sequences for t in s["input_ids"]}, config.vocab_size)
    longest = max(len(s["input_ids"]) for s in sequences)
    fill = {"input_ids": pad}
    batch = {
        name: torch.tensor([s[name] + [fill.get(name, 0)] * (longest - len(s[name])) for s in sequences])
        for name in sequences[0]
    }
    config.pad_token_id = pad
    try:
        with torch.inference_mode():
            logits = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).logits.float()
    finally:
        config.pad_token_id = own
    scores = logits[:, 0] if label is None else logits.softmax(-1)[:, label]
    return [float(score) for score in scores.cpu()]


def _absent(tokens: set[int], vocab_size: int) -> int:
    return next(token for token in range(vocab_size) if token not in tokens)
