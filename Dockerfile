# gspo_megatron for GPUs (docs/gpu.md). The CPU image is docker/Dockerfile.cpu.
#
#   docker build -t gspo_megatron .
#   docker run --rm --gpus all --ipc=host --ulimit memlock=-1 --ulimit stack=67108864 --user "$(id -u)" \
#       -v "$PWD/runs:/gspo/runs" gspo_megatron \
#       torchrun --nproc_per_node 8 -m gspo_megatron.train --config my_run.yaml run.dir=runs/my_run

# Python 3.12, PyTorch 2.13.0a0, CUDA 13.3, with the Transformer Engine, Triton and Apex that were built for them. Megatron-LM
# itself builds on this tag. The digest is what the tag was on 2026-07-11; `docker buildx imagetools inspect` shows a tag's.
# Another image: --build-arg BASE=nvcr.io/nvidia/pytorch:26.09-py3
ARG IMAGE=nvcr.io/nvidia/pytorch:26.06-py3
ARG DIGEST=sha256:43c018d6a12963f1a1bad85ef8574b5c2a978eec2be0ebcacfb87f69e0d210e1
ARG BASE=${IMAGE}@${DIGEST}
FROM ${BASE}

# The image pins every package to its own version through this variable, even where Megatron-Core needs a newer one.
ENV PIP_CONSTRAINT= \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1

# What was compiled together stays: PyTorch, its Triton, Transformer Engine, Apex, and the NumPy they were built with. What
# setup.py names gets the versions that are tested together; what those bring along stays the image's where it can.
# `import megatron.core` of Megatron-Core 0.17 and newer fails with nvidia-resiliency-ext before 0.6, which the image has
# and nothing here uses.
COPY requirements/ /opt/gspo_megatron/requirements/
RUN pip list --format=freeze \
        | grep -iE '^(torch|pytorch[-_]triton|triton|transformer[-_]engine.*|apex|numpy|flash[-_]attn)==' > /opt/keep.txt \
    && sed -e '/^# Brought by those/,$d' -e '/^numpy==/d' /opt/gspo_megatron/requirements/pins.txt > /opt/pins.txt \
    && cat /opt/gspo_megatron/requirements/trl.txt >> /opt/pins.txt \
    && pip uninstall --yes nvidia-resiliency-ext

ARG MEGATRON_CORE=0.19.2
RUN pip install --constraint /opt/keep.txt --constraint /opt/pins.txt "megatron-core==${MEGATRON_CORE}"

# The image's Transformer Engine satisfies the te extra, so nothing is built. pip warns that this build has no extra
# named pytorch: it includes the PyTorch part. dev is for `make gpu` and `make gpu-hour`.
COPY LICENSE pyproject.toml setup.py /opt/gspo_megatron/
COPY gspo_megatron/ /opt/gspo_megatron/gspo_megatron/
RUN pip install --constraint /opt/keep.txt --constraint /opt/pins.txt "/opt/gspo_megatron[te,hf,dev]"

# Kernels start in the order they were queued, so that communication overlaps as Megatron plans it; blockwise FP8 scales
# are not rounded to powers of 2; packs of ragged length do not fragment the memory.
ENV CUDA_DEVICE_MAX_CONNECTIONS=1 \
    NVTE_FP8_BLOCK_SCALING_FP32_SCALES=1 \
    PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True

# For root and for any --user: everyone may write to the working directory, as to /tmp, and caches go there.
RUN install --directory --mode 1777 /gspo
WORKDIR /gspo
ENV HOME=/gspo \
    USER=gspo
COPY pyproject.toml ./
COPY benchmarks/ benchmarks/
COPY examples/ examples/
COPY tests/ tests/
COPY tools/ tools/
RUN chmod -R a+rwX /gspo

# Imports Transformer Engine and Megatron-Core, and compiles the log-prob kernel for Hopper: an image that cannot do that
# is not made. The cache that Triton writes is this layer's, so it is removed.
USER 65534
RUN python -m gspo_megatron.doctor --build --pins /opt/gspo_megatron/requirements/pins.txt && rm -rf /gspo/.triton /gspo/.cache

CMD ["python", "-m", "gspo_megatron.doctor"]
