# gspo_megatron for GPUs:
#
#   docker build -t gspo_megatron .
#   docker run --rm --gpus all --ipc=host --user "$(id -u)" -v "$PWD/runs:/gspo/runs" gspo_megatron \
#       torchrun --nproc_per_node 8 -m gspo_megatron.train --config my_run.yaml run.dir=runs/my_run

# Python 3.12, PyTorch 2.10.0a0, CUDA 13.1, Transformer Engine 2.10, Triton 3.5
# (https://docs.nvidia.com/deeplearning/frameworks/pytorch-release-notes/rel-25-12.html).
FROM nvcr.io/nvidia/pytorch:25.12-py3

# The image pins every package to its own version through this variable, even where Megatron-Core needs a newer one.
ENV PIP_CONSTRAINT= \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1

# What was compiled together must stay: PyTorch, its Triton, Transformer Engine and the NumPy they were built with.
# `import megatron.core` of Megatron-Core 0.17 and newer fails with nvidia-resiliency-ext before 0.6, which the image
# has and nothing here uses.
RUN pip list --format=freeze | grep -iE '^(torch|pytorch[-_]triton|triton|transformer[-_]engine.*|numpy)==' > /opt/keep.txt \
    && pip uninstall --yes nvidia-resiliency-ext

ARG MEGATRON_CORE=0.19.2
RUN pip install --constraint /opt/keep.txt "megatron-core==${MEGATRON_CORE}"

# The image's Transformer Engine satisfies the te extra, so nothing is built. pip warns that this build has no extra
# named pytorch: it includes the PyTorch part.
COPY LICENSE pyproject.toml setup.py /opt/gspo_megatron/
COPY gspo_megatron/ /opt/gspo_megatron/gspo_megatron/
RUN pip install --constraint /opt/keep.txt "/opt/gspo_megatron[te,hf]"

# For root and for any --user: everyone may write to the working directory, as to /tmp, and caches go there.
RUN install --directory --mode 1777 /gspo
WORKDIR /gspo
ENV HOME=/gspo \
    USER=gspo
COPY examples/ examples/
COPY tools/ tools/

CMD ["python", "-m", "gspo_megatron.train", "--help"]
