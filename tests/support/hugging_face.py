"""A small Hugging Face tokenizer folder, trained here with the `tokenizers` library, with a chat template that uses
what templates on the hub use."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from gspo_megatron.models.families import family_of
from gspo_megatron.models.shape import ModelShape
from tests.support.families import HUB_SIZES

TEMPLATE = """\
{%- macro said(message) -%}
{%- if message.content is string -%}{{ message.content }}{%- else -%}{{ message.content | tojson }}{%- endif -%}
{%- endmacro -%}
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}{{ '\\n' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last_query=-1) %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' and ns.last_query < 0 %}
        {%- set ns.last_query = messages | length - 1 - loop.index0 %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant', 'tool'] %}
        {{- raise_exception('Unexpected role ' + message.role) }}
    {%- endif %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
            {%- if message.reasoning_content and loop.index0 > ns.last_query %}
                {{- '<think>\\n' + message.reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}
            {%- endif %}
            {{- said(message) }}
            {%- for call in message.tool_calls or [] %}
                {{- '<tool_call>\\n' + (call.function | tojson) + '\\n</tool_call>' }}
            {%- endfor %}
            {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + said(message) + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

TEXT = [
    "What is 12 plus 30? The answer is 42.",
    "user system assistant tool, 一二三 über naïve 🙂",
    "Sort 3 1 2 and say why: because 1 < 2 < 3.",
] * 20


def model_folder(folder: Path, shape: ModelShape, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """A model of random weights, under the names on the hub."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: (torch.randn(size, generator=generator) * 0.2 + (len(size) == 1)).to(dtype)
        for name, size in HUB_SIZES[shape.family](shape).items()
    }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(family_of(shape).hf_config(shape)))
    return folder


def tokenizer_folder(folder: Path, *, bos: bool = False, template: str | None = TEMPLATE) -> Path:
    """A byte-level BPE tokenizer with ChatML's tokens; with `bos` it puts <|bos|> before a text, as Llama's does."""
    folder.mkdir(parents=True, exist_ok=True)
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|bos|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(TEXT, trainer)
    model.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    if bos:
        number = model.token_to_id("<|bos|>")
        model.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", number)])
    model.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": {"__type": "AddedToken", "content": "<|endoftext|>", "special": True},
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | ({"bos_token": "<|bos|>"} if bos else {})))
    stops = [model.token_to_id("<|im_end|>"), model.token_to_id("<|endoftext|>")]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder
