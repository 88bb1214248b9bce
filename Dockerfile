# gspo_megatron for GPUs:
#
#   docker build -t gspo_megatron .
#   docker run --rm --gpus all --ipc=host --user "$(id -u)" -v "$PWD/runs:/gspo/runs" gspo_megatron \
#       torchrun --nproc_per_node 8 -m gspo_megatron.train --config my_run.yaml run.dir=runs/my_run

# Python 3.12, PyTorch 2.10.0a0, CUDA 13.1, Transformer Engine 2.10, Triton 3.5
# (https://docs.nvidia.com/deeplearning/frameworks/pytorch-release-notes/rel-25-12.html).
FROM nvcr.io/nvidia/pytorch:25.12-py3

# The image holds every package at its own version through this variable, also where Megatron-Core asks for a newer one.
ENV PIP_CONSTRAINT= \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1

# What was compiled together must stay: PyTorch, its Triton, Transformer Engine and the NumPy they were built with.
# With nvidia-resiliency-ext before 0.6, which the image brings and nothing here uses, `import megatron.core` of
# Megatron-Core 0.17 and newer fails.
RUN pip list --format=freeze | grep -iE '^(torch|pytorch[-_]triton|triton|transformer[-_]engine.*|numpy)==' > /opt/keep.txt \
    && pip uninstall --yes nvidia-resiliency-ext

ARG MEGATRON_CORE=0.19.2
RUN pip install --constraint /opt/keep.txt "megatron-core==${MEGATRON_CORE}"

# The te extra is met by the image's Transformer Engine, so nothing is built; pip remarks that this build has no extra
# named pytorch, because it has the PyTorch part inside.
COPY LICENSE pyproject.toml setup.py /opt/gspo_megatron/
COPY gspo_megatron/ /opt/gspo_megatron/gspo_megatron/
RUN pip install --constraint /opt/keep.txt "/opt/gspo_megatron[te,hf]"

# For root and for any --user alike: the work folder is open like /tmp, and is the home of caches.
RUN install --directory --mode 1777 /gspo
WORKDIR /gspo
ENV HOME=/gspo \
    USER=gspo
COPY examples/ examples/
COPY tools/ tools/

CMD ["python", "-m", "gspo_megatron.train", "--help"]
