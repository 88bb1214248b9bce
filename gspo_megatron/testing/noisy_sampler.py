"""Trains with a sampler whose weights are not quite the policy's: what another engine or number format does to a run.

    python -m gspo_megatron.testing.noisy_sampler --router 0.1 --bf16 -- --config examples/cpu_tiny_moe.yaml ...

While training rollouts are sampled, every router's weights have noise added, as large as `--router` times their own
standard deviation, and with `--bf16` all weights are rounded to bfloat16. Scoring, updates and evaluation use the
policy. Everything after `--` is for `gspo_megatron.train`, and so is the exit status.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from gspo_megatron.base.batches import Prompt, Rollout, Sampling
from gspo_megatron.base.protocols import Sampler
from gspo_megatron.mcore.parameters import named_parameters
from gspo_megatron.mcore.policy import MegatronPolicy
from gspo_megatron.run.trainer import Trainer
from gspo_megatron.train import main as train


@dataclass
class NoisySampler:
    """`Sampler` of base/protocols.py around that of a policy. The noise follows from the run's seed, the policy's
    version and the weight's name, so a run that continues has the same."""

    sampler: Sampler
    policy: MegatronPolicy
    router: float
    bf16: bool

    def generate(
        self,
        prompts: Sequence[Prompt],
        ids: Sequence[int],
        *,
        greedy: bool = False,
        sampling: Sampling | None = None,
        ended: Callable[[Rollout], None] = lambda rollout: None,
        begun: Sequence[int] = (),
    ) -> list[Rollout]:
        """See `Sampler.generate`."""
        generate = partial(self.sampler.generate, prompts, ids, greedy=greedy, sampling=sampling, ended=ended)
        if greedy or sampling is not None:
            return generate(begun=begun)
        with self._perturbed():
            return generate(begun=begun)

    @contextmanager
    @torch.no_grad()
    def _perturbed(self) -> Iterator[None]:
        shape, groups = self.policy.config.model.shape, self.policy.groups
        weights = [pair for chunk in self.policy.model for pair in named_parameters(chunk, shape, groups)]
        kept = [parameter.detach().clone() for _, parameter in weights]
        try:
            for place, parameter in weights:
                if ".router." in place.name:
                    draws = random.Random(f"{self.policy.config.run.seed}:{self.policy.version}:{place.name}")
                    seeded = torch.Generator().manual_seed(draws.getrandbits(62))
                    noise = torch.randn(parameter.shape, generator=seeded).to(parameter)
                    parameter += self.router * parameter.std() * noise
                if self.bf16:
                    parameter.copy_(parameter.bfloat16())
            yield
        finally:
            for (_, parameter), before in zip(weights, kept, strict=True):
                parameter.copy_(before)


def with_noise(trainer: Trainer, router: float, bf16: bool) -> None:
    """Puts a NoisySampler around the sampler of a trainer that has not begun."""
    source: Any = trainer.parts.source
    while not hasattr(source, "sampler"):
        source = source.source
    assert isinstance(trainer.policy, MegatronPolicy)
    source.sampler = NoisySampler(source.sampler, trainer.policy, router, bf16)


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    split = given.index("--") if "--" in given else len(given)
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--router", type=float, default=0.0, help="noise of router weights / their standard deviation")
    parser.add_argument("--bf16", action="store_true", help="round all weights to bfloat16")
    options = parser.parse_args(given[:split])
    return train(given[split + 1 :], prepare=partial(with_noise, router=options.router, bf16=options.bf16))


if __name__ == "__main__":
    sys.exit(main())
