# For RunPod's GitHub integration and its Hub, which build a Dockerfile. It makes the image that
# `bentoml containerize` makes: the same bento in the same places, with the same entrypoint and
# environment (tests/bundle compares them). Only the default differs: it starts as a RunPod worker.

# The one image that is taken from elsewhere. Its tag brings Debian's security fixes; for builds that
# are the same for ever: --build-arg PYTHON_IMAGE=python:3.11-slim@sha256:...
ARG PYTHON_IMAGE=python:3.11-slim
FROM $PYTHON_IMAGE AS packages
ENV LANG=C.UTF-8 LC_ALL=C.UTF-8 PYTHONIOENCODING=UTF-8 PYTHONUNBUFFERED=1
RUN groupadd -g 1034 bentoml && useradd -m -r -u 1034 -g 1034 bentoml
# A C compiler for Triton's kernels.
RUN apt-get update \
    && apt-get install -q -y --no-install-recommends ca-certificates build-essential \
    && rm -rf /var/lib/apt/lists/*
COPY docker/uv.lock /app/
RUN pip install --no-cache-dir --root-user-action=ignore --require-hashes -r /app/uv.lock \
    && uv venv --python 3.11 /app/.venv
ENV VIRTUAL_ENV=/app/.venv \
    UV_COMPILE_BYTECODE=1 \
    UV_NO_PROGRESS=1 \
    PATH=/app/.venv/bin:$PATH
COPY requirements.lock /app/
RUN uv pip install --no-cache -r /app/requirements.lock

FROM packages AS bento
WORKDIR /project
COPY . .
RUN BENTOML_HOME=/bentoml BENTOML_DO_NOT_TRACK=True bentoml build \
    && mv "$(dirname /bentoml/bentos/klein/*/bento.yaml)" /bento

FROM packages
ENV BENTO_PATH=/home/bentoml/bento \
    BENTOML_HOME=/home/bentoml/ \
    BENTOML_HF_CACHE_DIR=/home/bentoml/bento/hf-models \
    BENTOML_CONTAINERIZED=true \
    PYTHONPATH=/home/bentoml/bento/src \
    MODEL_ID=black-forest-labs/FLUX.2-klein-base-9B \
    HF_HOME=/cache/huggingface \
    KLEIN_LORA_CACHE=/cache/loras \
    KLEIN_TRANSFORMER_CACHE=/cache/transformers \
    KLEIN_KERNEL_CACHE=/cache/kernels \
    XDG_CACHE_HOME=/cache \
    TORCHINDUCTOR_CACHE_DIR=/cache/torchinductor \
    TRITON_CACHE_DIR=/cache/triton \
    CUDA_CACHE_PATH=/cache/cuda \
    BENTOML_DO_NOT_TRACK=True \
    HF_HUB_DISABLE_TELEMETRY=1
WORKDIR /home/bentoml/bento
ARG FLASH_ATTN=off
ENV FLASH_ATTN=$FLASH_ATTN
COPY --from=bento /bento/env/docker ./env/docker/
RUN chown bentoml:bentoml . && bash env/docker/script__*
COPY --from=bento --chown=bentoml:bentoml /bento ./
RUN chmod +x env/docker/entrypoint.sh
# A number, so that Kubernetes' runAsNonRoot can be checked.
USER 1034:1034
EXPOSE 3000
ENV KLEIN_MODE=runpod
ENTRYPOINT ["/home/bentoml/bento/env/docker/entrypoint.sh"]
