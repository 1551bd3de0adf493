# Image for serving, without training's kernels, from the project's folder:
#   docker build --file examples/docker/serve.Dockerfile --tag megatron-vita-serve .
#   docker run --gpus 1 --shm-size 8g -v /checkpoints:/data:ro -p 8000:8000 megatron-vita-serve /data/stage4 --host 0.0.0.0
ARG CUDA=13.0.2
FROM nvidia/cuda:${CUDA}-base-ubuntu24.04 AS build
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends --yes python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1
WORKDIR /opt/megatron_vita
COPY requirements.txt ./
RUN pip install --requirement requirements.txt
COPY . .
RUN pip install --no-build-isolation --no-deps . \
    && python examples/docker/native_libraries.py > /opt/venv/native.cdx.json

FROM nvidia/cuda:${CUDA}-base-ubuntu24.04
# gcc and Python's headers: Triton compiles the server's kernels at their first call.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends --yes python3 libpython3.12-dev gcc \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 vita
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH TRITON_CACHE_DIR=/tmp/triton
WORKDIR /home/vita
USER 10001
EXPOSE 8000
HEALTHCHECK --start-period=15m CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health')"]
ENTRYPOINT ["vita", "serve"]
