# The SageMaker container: Java, HAProxy, Python packages and the launcher. The model and its handler are not in it; they
# come at /opt/ml/model. Nothing is installed or fetched when it starts. `make image` builds it.

# Anything with Python 3.11 or later, pip and apt. AWS's own image instead, which follows its patch releases but brings a
# second torch of several GB that is not used here, is
# `pytorch-inference:2.6.0-gpu-py312-cu124-ubuntu22.04-sagemaker`, at the address that AWS's page on its images gives.
ARG BASE_IMAGE=python:3.11-slim-bookworm
FROM ${BASE_IMAGE}

# What is only noted comes first: a builder without overlays copies the whole image for each instruction.
# accept-bind-to-port: SAGEMAKER_BIND_TO_PORT, which SageMaker sets beside other containers, is heeded.
LABEL com.amazonaws.sagemaker.capabilities.accept-bind-to-port=true
ENV JAVA_HOME=/opt/java LANG=C.UTF-8 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
EXPOSE 8080
WORKDIR /opt/llava
# SageMaker runs its containers as root and with the argument `serve`, whatever CMD says; the entrypoint
# (deploy/container/entrypoint.py) gives up root before anything listens.
ENTRYPOINT ["/opt/venv/bin/python", "-m", "deploy.container"]
CMD ["serve"]

ARG DEBIAN_FRONTEND=noninteractive

# Of the Java packages only a runtime of the standard modules stays, 52 MB of 260. Versions of Debian packages can't be
# pinned: its mirrors keep the newest one only.
# hadolint ignore=DL3008
RUN mkdir -p /usr/share/man/man1 \
    && apt-get update \
    && apt-get install -y --no-install-recommends haproxy openjdk-17-jdk-headless \
    && jlink --add-modules java.se,jdk.unsupported,jdk.management,jdk.crypto.ec --output /opt/java \
        --strip-java-debug-attributes --no-header-files --no-man-pages --compress=2 \
    && apt-get purge -y --auto-remove openjdk-17-jdk-headless \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt /var/cache/debconf /var/log/apt /var/log/dpkg.log /tmp/hsperfdata_root \
    && useradd --uid 10001 --create-home --shell /usr/sbin/nologin llava

# pip's settings (an index, a proxy) come as a build secret and stay in no layer; as build arguments, neither do these.
ARG PIP_CONFIG_FILE=/run/secrets/pip
ARG PIP_NO_CACHE_DIR=1
ARG PIP_DISABLE_PIP_VERSION_CHECK=1
ARG PIP_ROOT_USER_ACTION=ignore

# cuda: PyPI's wheels of torch 2.13.0. They bring CUDA 13.0 and need an NVIDIA driver of 580 or later; on SageMaker that is
# InferenceAmiVersion al2023-ami-sagemaker-inference-gpu-4-1 (ml.g4dn to ml.g6e, ml.p4d to ml.p5en), or the default of
# ml.g7 and ml.p6. With the older default drivers of the other types the endpoint ends in CannotStartContainerError.
# cpu: PyTorch's wheels without CUDA, from the index that its page names for them, and what computes beside them.
ARG TORCH=cuda
ARG TORCH_CPU_INDEX=
# A layer of its own, since it is larger than all others and changes least.
RUN --mount=type=secret,id=pip --mount=type=secret,id=pip_cert \
    --mount=type=bind,source=requirements.txt,target=/tmp/requirements.txt \
    --mount=type=bind,source=requirements-cpu.txt,target=/tmp/requirements-cpu.txt \
    version="$(sed -n 's/^torch==//p' /tmp/requirements.txt)" \
    && case "$TORCH" in \
        cuda) set -- "torch===$version" ;; \
        cpu) set -- "torch==$version+cpu" -r /tmp/requirements-cpu.txt ${TORCH_CPU_INDEX:+--extra-index-url "$TORCH_CPU_INDEX"} ;; \
        *) echo "TORCH=$TORCH: wanted cuda or cpu" >&2 && exit 1 ;; \
    esac \
    && python3 -m venv --without-pip /opt/venv \
    && python3 -m pip --python /opt/venv/bin/python install --no-cache-dir "$@"

# Compiled is what the server may load: of transformers' 400 model families, those that LLaVA is built from. (Torch is.)
RUN --mount=type=secret,id=pip --mount=type=secret,id=pip_cert \
    --mount=type=bind,source=requirements.txt,target=/tmp/requirements.txt \
    python3 -m pip --python /opt/venv/bin/python install --no-cache-dir --no-compile -r /tmp/requirements.txt \
    && /opt/venv/bin/python -m compileall -q /opt/venv \
        -x '/torch/|/transformers/models/(?!(auto|clip|llama|llava|llava_next|llava_onevision|mistral|qwen2|siglip)/)\w+/'

COPY . .
