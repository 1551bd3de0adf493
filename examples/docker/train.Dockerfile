# Image for training, from the project's folder:
#   docker build --file examples/docker/train.Dockerfile --tag megatron-vita-train .
# The driver of the host must support CUDA 13 (580 or later). Transformer Engine is built here: about 25 minutes
# on 2 cores; set MAX_JOBS to the cores you have, and ARCHS to the GPUs you have (90: H100 and H200).
ARG CUDA=13.0.2
FROM nvidia/cuda:${CUDA}-cudnn-devel-ubuntu24.04 AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends --yes python3-dev python3-venv git \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1
WORKDIR /opt/megatron_vita
COPY requirements.txt requirements-gpu.txt ./
RUN pip install --requirement requirements.txt
ARG MAX_JOBS=8
ARG ARCHS=90
RUN NVTE_CUDA_ARCHS=${ARCHS} pip install --no-build-isolation --requirement requirements-gpu.txt
COPY . .
RUN pip install --no-build-isolation --no-deps --editable . \
    && python examples/docker/native_libraries.py > /opt/venv/native.cdx.json

# Kernels are compiled at their first call: the toolkit's compiler stays in the image.
FROM nvidia/cuda:${CUDA}-devel-ubuntu24.04
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends --yes python3 libpython3.12-dev libibverbs1 librdmacm1 ibverbs-providers \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 vita
COPY --from=build /opt/venv /opt/venv
COPY --from=build /opt/megatron_vita /opt/megatron_vita
ENV PATH=/opt/venv/bin:$PATH PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
WORKDIR /opt/megatron_vita
USER 10001
CMD ["vita", "--help"]
