"""Peak extra memory and CPU time of log-probs, forward and backward, on the CPU: linear_log_probs against log_softmax.

    python tools/bench_log_probs_memory.py [--rows 256 512 1024 2048] [--hidden 256] [--vocab 151936] [--output FILE]

Every measurement has a process of its own: the peak resident set after forward and backward, less the resident set
before, when the inputs lie in memory. The two gradients, H (N + V) numbers, are part of it. Logits are N V numbers;
linear_log_probs must not grow with them: only with N H and V H.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import resource
import time
from pathlib import Path

import psutil
import torch
from torch import Tensor

from gspo_megatron.log_probs import linear_log_probs

MIB = 1 << 20


def plain(hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor) -> Tensor:
    log_p_NV = torch.log_softmax(hidden_NH @ weight_VH.T, dim=-1)
    return log_p_NV.gather(1, targets_N[:, None])[:, 0]


def linear(hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor) -> Tensor:
    return linear_log_probs(hidden_NH, weight_VH, targets_N)[0]


METHODS = {"linear_log_probs": linear, "log_softmax": plain}


def measure(method: str, num_rows: int, hidden_size: int, vocab_size: int, num_threads: int) -> dict[str, float | str]:
    """Runs in a fresh process."""
    torch.set_num_threads(num_threads)
    # One small run first: the libraries' own buffers and threads are not what is measured.
    METHODS[method](torch.randn(8, 8, requires_grad=True), torch.randn(64, 8), torch.arange(8)).sum().backward()
    hidden_NH = torch.randn(num_rows, hidden_size, requires_grad=True)
    weight_VH = torch.randn(vocab_size, hidden_size, requires_grad=True)
    targets_N = torch.randint(vocab_size, (num_rows,))
    before = psutil.Process().memory_info().rss
    start_s = time.process_time()
    METHODS[method](hidden_NH, weight_VH, targets_N).sum().backward()
    cpu_s = time.process_time() - start_s
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"method": method, "rows": num_rows, "peak_extra_mib": (peak - before) / MIB, "cpu_s": cpu_s}


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak extra memory of log-probs, forward and backward.")
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="also write the table there, as JSON")
    args = parser.parse_args()

    gradients_mib = 4 * args.hidden * args.vocab / MIB
    print(f"float32, H={args.hidden}, V={args.vocab}; the weight gradient alone is {gradients_mib:.0f} MiB")
    print(f"{'method':>18} {'rows':>6} {'logits MiB':>11} {'peak extra MiB':>15} {'cpu s':>8}")
    results = []
    # A new process for every task, and a spawned one: a forked process would inherit this one's memory.
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for method in METHODS:
            for num_rows in args.rows:
                row = pool.apply(measure, (method, num_rows, args.hidden, args.vocab, args.threads))
                row["logits_mib"] = 4 * num_rows * args.vocab / MIB
                results.append(row)
                print(
                    f"{method:>18} {num_rows:>6} {row['logits_mib']:>11.0f} "
                    f"{row['peak_extra_mib']:>15.0f} {row['cpu_s']:>8.2f}"
                )
    if args.output:
        machine = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__}
        setting = {"hidden": args.hidden, "vocab": args.vocab, "threads": args.threads, "dtype": "float32"}
        args.output.write_text(
            json.dumps({"machine": machine, "setting": setting, "results": results}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
