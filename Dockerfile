# The SageMaker container: Java, HAProxy, Python packages and the launcher. SageMaker mounts the model with its handler at
# /opt/ml/model. Nothing is installed or downloaded at start. `make image` builds it.

# Any image with Python 3.11 or later, pip and apt. AWS's PyTorch images have a second torch of several GB that is not used
# here, and AWS has not patched its images with TorchServe since 2026-06-30.
ARG BASE_IMAGE=python:3.11-slim-bookworm
FROM ${BASE_IMAGE}

# Metadata comes first: a builder without overlays copies the whole image for each instruction.
# accept-bind-to-port: the container reads SAGEMAKER_BIND_TO_PORT, which SageMaker sets for several containers on a host.
LABEL com.amazonaws.sagemaker.capabilities.accept-bind-to-port=true
ENV JAVA_HOME=/opt/java LANG=C.UTF-8 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
EXPOSE 8080
WORKDIR /opt/llava
# SageMaker runs its containers as root and with the argument `serve`, whatever CMD says; the entrypoint
# (deploy/container/entrypoint.py) drops root before it opens a port.
ENTRYPOINT ["/opt/venv/bin/python", "-m", "deploy.container"]
CMD ["serve"]

ARG DEBIAN_FRONTEND=noninteractive

# cuda: PyPI's wheels of torch 2.13.0. They contain CUDA 13.0 and need NVIDIA driver 580 or later. On SageMaker that is
# InferenceAmiVersion al2023-ami-sagemaker-inference-gpu-4-1 (ml.g4dn to ml.g6e, ml.p4d to ml.p5en), or the default of
# ml.g7 and ml.p6. With the older default drivers of the other types the endpoint fails with CannotStartContainerError.
# cpu: PyTorch's wheels without CUDA, from the index on its page, and requirements-cpu.txt.
ARG TORCH=cuda
ARG TORCH_CPU_INDEX=

# Only a runtime with the standard modules remains of the Java packages, 52 MB of 260. With CUDA, Triton compiles its
# launcher at the first start, which needs a C compiler and Python's headers. Versions of Debian packages cannot be pinned:
# its mirrors keep only the newest.
# hadolint ignore=DL3008
RUN mkdir -p /usr/share/man/man1 \
    && if [ "$TORCH" = cuda ]; then set -- gcc libc6-dev; else set --; fi \
    && headers="$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')" \
    && if [ "$TORCH" = cuda ] && [ ! -f "$headers/Python.h" ]; then set -- "$@" python3-dev; fi \
    && apt-get update \
    && apt-get install -y --no-install-recommends haproxy openjdk-17-jdk-headless "$@" \
    && jlink --add-modules java.se,jdk.unsupported,jdk.management,jdk.crypto.ec --output /opt/java \
        --strip-java-debug-attributes --no-header-files --no-man-pages --compress=2 \
    && apt-get purge -y --auto-remove openjdk-17-jdk-headless \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt /var/cache/debconf /var/log/apt /var/log/dpkg.log /tmp/hsperfdata_root \
    && useradd --uid 10001 --create-home --shell /usr/sbin/nologin llava

# pip's settings (an index, a proxy) are a build secret and are in no layer. Neither are these build arguments.
ARG PIP_CONFIG_FILE=/run/secrets/pip
ARG PIP_NO_CACHE_DIR=1
ARG PIP_DISABLE_PIP_VERSION_CHECK=1
ARG PIP_ROOT_USER_ACTION=ignore

# A separate layer, since it is the largest and changes least.
RUN --mount=type=secret,id=pip --mount=type=secret,id=pip_cert \
    --mount=type=bind,source=requirements.txt,target=/tmp/requirements.txt \
    --mount=type=bind,source=requirements-cpu.txt,target=/tmp/requirements-cpu.txt \
    version="$(sed -n 's/^torch==//p' /tmp/requirements.txt)" \
    && case "$TORCH" in \
        cuda) set -- "torch===$version" ;; \
        cpu) set -- "torch==$version+cpu" -r /tmp/requirements-cpu.txt ${TORCH_CPU_INDEX:+--extra-index-url "$TORCH_CPU_INDEX"} ;; \
        *) echo "TORCH must be cuda or cpu, got $TORCH" >&2 && exit 1 ;; \
    esac \
    && python3 -m venv --without-pip /opt/venv \
    && python3 -m pip --python /opt/venv/bin/python install --no-cache-dir "$@"

# Compile only modules that the server may load: of transformers' 400 models those that the table of families names.
RUN --mount=type=secret,id=pip --mount=type=secret,id=pip_cert \
    --mount=type=bind,source=requirements.txt,target=/tmp/requirements.txt \
    --mount=type=bind,source=handler/llava_sessions/text/families.toml,target=/tmp/families.toml \
    python3 -m pip --python /opt/venv/bin/python install --no-cache-dir --no-compile -r /tmp/requirements.txt \
    && served="$(sed -nE '/^\[(families|texts)\.(.+)\]$/{s//\2|/;H}; $!d; x; s/\n//g; p' /tmp/families.toml)" \
    && /opt/venv/bin/python -m compileall -q /opt/venv \
        -x "/torch/|/transformers/models/(?!(${served}auto|clip|got_ocr2|siglip)/)\w+/"

COPY . .
