"""Weights that are stored as numbers and scales: FP8 in blocks of rows and columns, MXFP4 in groups of 32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gspo_megatron.base.errors import CheckpointError
from gspo_megatron.checkpoint.hugging_face import HuggingFaceFolder
from tests.checkpoint.test_hugging_face import WHOLE, write


def test_fp8_blocks_are_multiplied_by_their_scales(tmp_path: Path) -> None:
    """Any slice, also one that begins inside a block; the last blocks are smaller."""
    numbers, scales = torch.randn(5, 7).to(torch.float8_e4m3fn), torch.rand(3, 3) + 0.5
    tensors = {"w.weight": numbers, "w.weight_scale_inv": scales}
    folder = HuggingFaceFolder(write(tmp_path, tensors, quantization_config={"weight_block_size": [2, 3]}))
    read = folder.read("w.weight")
    for i in range(5):
        for j in range(7):
            one = numbers[i, j].float() * scales[i // 2, j // 3]
            assert torch.equal(read[slice(i, i + 1), slice(j, j + 1)], one.view(1, 1))
    assert torch.equal(read[1:4, 2:6], read[WHOLE][1:4, 2:6])
    assert folder.weights.keys() == {"w.weight"}


@pytest.mark.parametrize("size", [(1, 3), (3, 2), (9,)])
def test_fp8_scales_of_another_size_are_refused(size: tuple[int, ...], tmp_path: Path) -> None:
    tensors = {"w.weight": torch.ones(5, 7).to(torch.float8_e4m3fn), "w.weight_scale_inv": torch.ones(size)}
    write(tmp_path, tensors, quantization_config={"weight_block_size": [2, 3]})
    with pytest.raises(CheckpointError, match=r"w\.weight_scale_inv has size .*has \[3, 3\] of them"):
        HuggingFaceFolder(tmp_path)


@pytest.mark.parametrize("block", [128, [128], ["128", 128], [0, 128]])
def test_a_block_size_that_is_none_is_refused(block: object, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="weight_block_size"):
        HuggingFaceFolder(write(tmp_path, quantization_config={"weight_block_size": block}))


EXPERTS, ROWS, GROUPS = 3, 5, 2
BLOCKS, SCALES = (EXPERTS, ROWS, GROUPS, 16), (EXPERTS, ROWS, GROUPS)
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""E2M1 without its sign: OCP Microscaling Formats (MX) specification 1.0, table 5."""


def mxfp4(folder: Path, **changed: torch.Tensor) -> Path:
    generator = torch.Generator().manual_seed(3)
    tensors = {
        "w_blocks": torch.randint(256, BLOCKS, generator=generator).to(torch.uint8),
        "w_scales": torch.randint(250, SCALES, generator=generator).to(torch.uint8),
    }
    return write(folder, tensors | changed, quantization_config={"quant_method": "mxfp4"})


def test_mxfp4_is_multiplied_by_its_scales(tmp_path: Path) -> None:
    """Number by number after the specification, and any slice, also one that begins inside a group. The scales are
    all that cannot overflow, 2^-127 among them."""
    scales = torch.arange(30).view(SCALES) * 8
    scales[0, 0, 0] = 0
    folder = HuggingFaceFolder(mxfp4(tmp_path, w_scales=scales.to(torch.uint8)))
    blocks = folder.weights["w"].stored[0].mapped
    read = folder.read("w")
    assert read.get_shape() == [EXPERTS, 32 * GROUPS, ROWS]
    whole = read[(*WHOLE, slice(None))]
    assert whole.dtype == torch.bfloat16
    for e in range(EXPERTS):
        for r in range(ROWS):
            for column in range(32 * GROUPS):
                byte = int(blocks[e, r, column // 32, column % 32 // 2])
                nibble = byte >> 4 if column % 2 else byte & 15
                one = (-1) ** (nibble >> 3) * FP4[nibble & 7] * 2.0 ** (int(scales[e, r, column // 32]) - 127)
                assert float(whole[e, column, r]) == one
    for part in ((slice(1, 2), slice(0, 64), slice(0, 5)), (slice(0, 3), slice(5, 40), slice(2, 4))):
        assert torch.equal(read[part], whole[part])
    assert read[slice(1, 1), slice(3, 40), slice(0, 5)].shape == (0, 37, 5)
    assert folder.weights.keys() == {"w"}


@pytest.mark.parametrize(("scale", "found"), [(255, "nan"), (254, "inf")])
def test_mxfp4_that_is_not_finite(scale: int, found: str, tmp_path: Path) -> None:
    scales = torch.full(SCALES, 120, dtype=torch.uint8)
    scales[1, 2, 1] = scale
    blocks = torch.full(BLOCKS, 7 * 17, dtype=torch.uint8)
    mxfp4(tmp_path, w_scales=scales, w_blocks=blocks)
    read = HuggingFaceFolder(tmp_path).read("w")
    whole = (slice(None), slice(None))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: w_scales holds {found}"):
        read[(slice(1, 2), *whole)]
    assert read[(slice(2, 3), *whole)].isfinite().all()
    assert not HuggingFaceFolder(tmp_path, allow_nan=True).read("w")[(slice(1, 2), *whole)].isfinite().all()


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("w_blocks", torch.zeros(BLOCKS), r"w_blocks has size \[3, 5, 2, 16\] and format F32, but MXFP4 has"),
        ("w_blocks", torch.zeros(3, 5, 2, 8, dtype=torch.uint8), r"w_blocks has size \[3, 5, 2, 8\]"),
        ("w_blocks", torch.zeros(3, 5, 32, dtype=torch.uint8), r"w_blocks has size \[3, 5, 32\]"),
        ("w_scales", torch.zeros(3, 5, 3, dtype=torch.uint8), r"w_scales has size \[3, 5, 3\].*\[3, 5, 2\] scales"),
        ("w_scales", torch.zeros(SCALES), r"w_scales has size \[3, 5, 2\] and format F32"),
    ],
)
def test_mxfp4_of_another_size_is_refused(name: str, tensor: torch.Tensor, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: {message}"):
        HuggingFaceFolder(mxfp4(tmp_path, **{name: tensor}))


def test_a_method_that_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json says .*quant_method='awq'; readable are fp8 and mxfp4"):
        HuggingFaceFolder(write(tmp_path, quantization_config={"quant_method": "awq", "bits": 4}))


def test_numbers_without_scales(tmp_path: Path) -> None:
    eight = torch.ones(2, 2).to(torch.float8_e4m3fn)
    tensors = {"w_blocks": torch.zeros(BLOCKS, dtype=torch.uint8), "v": eight}
    folder = HuggingFaceFolder(write(tmp_path, tensors))
    with pytest.raises(CheckpointError, match=r"no tensor 'w'"):
        folder.read("w")
    with pytest.raises(CheckpointError, match=r"v has the number format F8_E4M3.*with v_scale_inv"):
        folder.read("v")
