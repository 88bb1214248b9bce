"""GPUs on paper: what their data sheets state. One row a type; a new one is a line here.

Tensor-core peaks are dense (without 2:4 sparsity). Links are one direction of one GPU: NVLink inside a domain, and the
network card that the named server gives each GPU.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

GIB_OF_GB = 1e9 / 2**30


@dataclass(frozen=True)
class Gpu:
    """One type of GPU in its usual server.

    Attributes:
        memory_gib: what the driver reports.
        bf16_tflops, fp8_tflops: dense peaks; fp8 0 where there is none.
        hbm_gb_s, nvlink_gb_s, network_gb_s, host_gb_s: of memory, NVLink, the network and the host link.
        domain: GPUs that NVLink joins.
        fp8_recipe: the value of precision.fp8 that suits it; empty where there is none.
        source: where the numbers are from.
        fp32_tflops: without tensor cores, which a float32 run does not use: torch leaves TF32 off. 0: not known.
    """

    name: str
    memory_gib: float
    bf16_tflops: float
    fp8_tflops: float
    hbm_gb_s: float
    nvlink_gb_s: float
    network_gb_s: float
    host_gb_s: float
    domain: int
    fp8_recipe: str
    source: str
    fp32_tflops: float = 0.0

    def peak_flops(self, *, fp8: bool) -> float:
        """Per second, of products in bf16 or FP8."""
        return 1e12 * (self.fp8_tflops if fp8 else self.bf16_tflops)

    def peak_of(self, dtype: str, *, fp8: bool) -> float | None:
        """Per second, of products in precision.dtype; None where it is not known."""
        if fp8 or dtype == "bf16":
            return self.peak_flops(fp8=fp8)
        return 1e12 * self.fp32_tflops if dtype == "fp32" and self.fp32_tflops else None


_A100 = "NVIDIA A100 80GB SXM data sheet; DGX A100 data sheet (8 x 200 Gb/s for compute)"
_H100 = "NVIDIA H100 SXM data sheet; DGX H100 data sheet (8 x 400 Gb/s)"
_H200 = "NVIDIA H200 SXM data sheet; DGX H200 data sheet (8 x 400 Gb/s)"
_H20 = "NVIDIA HGX H20 specification as its vendors publish it (no public NVIDIA data sheet)"
_B200 = "NVIDIA HGX B200 and DGX B200 data sheets (1,440 GB and 64 TB/s for 8; 8 x 400 Gb/s)"
_GB200 = "NVIDIA GB200 NVL72 data sheet (13.4 TB, 576 TB/s for 72; 400 Gb/s a GPU)"
_GB300 = "NVIDIA GB300 NVL72 data sheet (20 TB, 576 TB/s for 72; 800 Gb/s a GPU)"

GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", 79.3, 312, 0, 2039, 300, 25, 32, 8, "", _A100, 19.5),
        Gpu("h100", 79.6, 989.4, 1978.9, 3350, 450, 50, 64, 8, "blockwise", _H100, 66.9),
        Gpu("h200", 140.4, 989.4, 1978.9, 4800, 450, 50, 64, 8, "blockwise", _H200, 66.9),
        Gpu("h20", 95.6, 148, 296, 4000, 450, 50, 64, 8, "blockwise", _H20, 44),
        Gpu("b200", 178.4, 2250, 4500, 8000, 900, 50, 64, 8, "mxfp8", _B200),
        Gpu("gb200", 184.0, 2500, 5000, 8000, 900, 50, 225, 72, "mxfp8", _GB200),
        Gpu("gb300", 276.0, 2500, 5000, 8000, 900, 100, 225, 72, "mxfp8", _GB300),
    )
}


def gpu_named(name: str) -> Gpu | None:
    """The row of GPUS that a driver's name means (`NVIDIA H100 80GB HBM3`); None where there is none. The H100s on
    PCIe cards are slower than the row."""
    words = re.split(r"[^a-z0-9]+", name.lower())
    if "h100" in words and {"pcie", "nvl"} & set(words):
        return None
    return next((GPUS[word] for word in words if word in GPUS), None)


@dataclass(frozen=True)
class Efficiency:
    """The fraction of a data sheet's peak that work gets, one set for every GPU, model and layout: published by others,
    not fitted to the rows of docs/planner.md.

    Attributes:
        dense: matrix products of attention, networks and the output head. DeepGEMM's tables for H800, FP8 and 4,096
            rows: 0.52 to 0.69 of the peak; Liger-Kernel PR 1422, bf16, H100: 0.48 to 0.80.
        grouped: products of experts. DeepGEMM's tables, grouped, 4,096 to 8,192 rows a group: 0.55 to 0.66.
        attention: FlashMLA on H800: 580 to 660 of 989 TFLOP/s.
        memory: FlashMLA on H800: 3,000 of 3,350 GB/s.
        nvlink: DeepEP on H800: 153 to 158 of 160 GB/s, in kernels of its own; NCCL's collectives stay at about 0.8.
        network: DeepEP on H800: 43 to 47 of 50 GB/s.
        launch_s: seconds between two kernels when Python launches them. NVIDIA's "Getting Started with CUDA Graphs"
            measures 3.8 us for a kernel of 2.9 us, from C++.
        kernels: of one layer's forward, counted on the CPU lane: 96 operators that compute, with the experts as one.
        message_s: latency of a collective in a node. NCCL's all-reduce of a few bytes there takes 10 to 20 us.
        network_message_s: what every other node adds to it. NCCL's own model (src/graph/tuning.cc, 2.2x) charges each
            step over the network 14 us, and one over NVLink 3.4.
    """

    dense: float = 0.70
    grouped: float = 0.60
    attention: float = 0.60
    memory: float = 0.90
    nvlink: float = 0.80
    network: float = 0.86
    launch_s: float = 3.8e-6
    kernels: int = 96
    message_s: float = 15e-6
    network_message_s: float = 14e-6
