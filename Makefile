# Thin on purpose: each target is one command that can be typed by itself once `make env` has run.
PORT ?= 8080
MODEL ?= models/shapes
SESSIONS ?=
DTYPE ?=
SEED ?=
BENCH ?=
SOAK ?=
TORCH ?=
BASE ?=
TAG ?=
ENDPOINT_PORT ?= 8090
INSTANCES ?= 2
ENDPOINT ?=

PYTHON := .venv/bin/python

.DEFAULT_GOAL := help
.NOTPARALLEL:  # Java is looked for first, whatever -j says
.PHONY: help demo test serve endpoint notebook lint model bench bench-cuda soak image image-test env java haproxy clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: java env  ## a five-turn picture chat through a real TorchServe (SEED= repeats one)
	@$(PYTHON) -m demo.chat $(if $(SEED),--seed $(SEED))

test: java haproxy env lint  ## lint, then every test
	@$(PYTHON) -m pytest -n 2

serve: java env  ## TorchServe behind HAProxy, in the foreground (PORT= MODEL= SESSIONS= DTYPE=)
	@./build_mar.sh --model $(MODEL) $(if $(SESSIONS),--sessions $(SESSIONS)) $(if $(DTYPE),--dtype $(DTYPE)) >/dev/null
	@exec $(PYTHON) -m deploy.serve --port $(PORT)

endpoint: java env  ## a SageMaker endpoint on this machine (INSTANCES= ENDPOINT_PORT= MODEL= ENDPOINT="--help")
	@./build_mar.sh --model $(MODEL) $(if $(SESSIONS),--sessions $(SESSIONS)) $(if $(DTYPE),--dtype $(DTYPE)) >/dev/null
	@exec $(PYTHON) -m deploy.local_endpoint --instances $(INSTANCES) --port $(ENDPOINT_PORT) $(ENDPOINT)

notebook: java env  ## run docs/notebook.ipynb against that endpoint, without an account, and keep its outputs
	@$(PYTHON) -m tests.notebook

lint: env  ## ruff, import-linter, hadolint, cfn-lint, and shellcheck where it is installed
	@scripts/lint.sh

model: env  ## train models/shapes again from nothing (an hour or more)
	@$(PYTHON) models/shapes/train.py

bench: env  ## measure the engine beside transformers (half an hour; BENCH="--rounds 2")
	@$(PYTHON) -m bench $(BENCH)

bench-cuda: env  ## the same on a CUDA device (BENCH="--preset 7b")
	@$(PYTHON) -m bench.cuda $(BENCH)

soak: java haproxy env  ## long fault tests, half an hour (SOAK="engine-kills --times 5")
	@$(PYTHON) -m tests.soak $(SOAK)

image: env  ## the SageMaker container's image (TORCH=cuda|cpu BASE= TAG=)
	@$(PYTHON) -m deploy.container.image $(if $(TORCH),--torch $(TORCH)) $(if $(BASE),--base $(BASE)) $(if $(TAG),--tag $(TAG))

image-test: env  ## build that image with buildah, run it as SageMaker does, chat, measure (root; 12 GB of disk)
	@$(PYTHON) -m tests.image

env:  ## .venv with what requirements-dev.txt pins
	@scripts/env.sh

java:  # before env, so that a machine without Java hears of it before a long install
	@scripts/need_java.sh

haproxy:  # the tests run it, so it is installed where that is possible; make serve can do without
	@scripts/need_haproxy.sh --install

clean:  ## remove archives, caches and logs; .venv stays
	@find model_store -mindepth 1 -maxdepth 1 ! -name README.md -exec rm -rf {} +
	@find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
	@rm -rf .pytest_cache .ruff_cache .import_linter_cache logs
