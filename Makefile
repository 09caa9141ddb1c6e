# Each target is one command, which can also be typed by itself after `make env`.
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
IMAGE ?=
NOTEBOOK ?=
ENDPOINT_PORT ?= 8090
DOCS_PORT ?= 8000
INSTANCES ?= 2
ENDPOINT ?=
WEB ?=
WEB_PORT ?= 8100
TESTS ?=
CONFIG ?=
DOCTOR ?=
LOAD ?=
URL ?=

PYTHON := .venv/bin/python

.DEFAULT_GOAL := help
.NOTPARALLEL:  # Java is checked first, even with -j
.PHONY: help demo check doctor load test test-clients unit coverage serve endpoint web notebook docs docs-serve lint \
	model bench bench-cuda soak image image-test board screenshots env clients java haproxy prometheus chromium clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# An option's error names the variable (deploy/options.py).
demo: export LLAVA_MAKE = demo --seed=SEED
serve: export LLAVA_MAKE = serve --model=MODEL --sessions=SESSIONS --dtype=DTYPE --port=PORT
endpoint: export LLAVA_MAKE = endpoint --model=MODEL --sessions=SESSIONS --dtype=DTYPE --instances=INSTANCES --port=ENDPOINT_PORT
doctor: export LLAVA_MAKE = doctor --port=PORT --model=MODEL --sessions=SESSIONS --dtype=DTYPE --config=CONFIG
load: export LLAVA_MAKE = load --model=MODEL --url=URL
image: export LLAVA_MAKE = image --torch=TORCH --base=BASE --tag=TAG
web: export LLAVA_MAKE = web --endpoint=ENDPOINT --port=WEB_PORT --model=MODEL --sessions=SESSIONS --dtype=DTYPE
soak: export LLAVA_MAKE = soak NAME=SOAK

demo: java env  ## run a five-turn picture chat through a real TorchServe (SEED= repeats one)
	@$(PYTHON) -m demo.chat $(if $(SEED),--seed '$(SEED)')

check: env lint unit  ## lint, types and unit tests: for every save

test: java haproxy prometheus chromium env clients lint  ## lint, then all tests (TESTS="tests/server -k chat" for some)
	@$(PYTHON) -m pytest -n 2 $(TESTS)

test-clients: java haproxy env  ## test with all clients, AIPerf too (1.2 GB more, once)
	@scripts/clients.sh openai-3 openai-2 aiperf
	@$(PYTHON) -m pytest tests/deploy/test_clients.py tests/deploy/test_aws_clients.py tests/deploy/test_aiperf.py

unit: env
	@$(PYTHON) -m pytest -q -n 2 tests/unit

coverage: env  ## measure what unit, engine and worker tests execute of the handler (floor 94 %)
	@$(PYTHON) -m pytest -q -n 2 tests/unit tests/engine tests/worker \
		--cov=handler/llava_sessions --cov-report=term-missing:skip-covered --cov-fail-under=94

serve: java env  ## serve with TorchServe behind HAProxy, in the foreground (PORT= MODEL= SESSIONS= DTYPE=)
	@$(PYTHON) -m deploy.serve --port '$(PORT)' --check
	@./build_mar.sh --model '$(MODEL)' $(if $(SESSIONS),--sessions '$(SESSIONS)') $(if $(DTYPE),--dtype '$(DTYPE)') >/dev/null
	@exec $(PYTHON) -m deploy.serve --port '$(PORT)'

doctor:  ## check this machine, MODEL= and CONFIG= before serving (PORT= SESSIONS= DTYPE= DOCTOR="--live --json")
	@$(if $(wildcard $(PYTHON)),$(PYTHON),python3) -m deploy.doctor --port '$(PORT)' --model '$(MODEL)' \
		$(if $(SESSIONS),--sessions '$(SESSIONS)') $(if $(DTYPE),--dtype '$(DTYPE)') $(if $(CONFIG),--config '$(CONFIG)') $(DOCTOR)

endpoint: java env  ## run a SageMaker endpoint on this machine (INSTANCES= ENDPOINT_PORT= MODEL= ENDPOINT="--help")
	@$(PYTHON) -m deploy.local_endpoint --instances '$(INSTANCES)' --port '$(ENDPOINT_PORT)' $(ENDPOINT) --check >/dev/null
	@./build_mar.sh --model '$(MODEL)' --output model_store/endpoint \
		$(if $(SESSIONS),--sessions '$(SESSIONS)') $(if $(DTYPE),--dtype '$(DTYPE)') >/dev/null
	@exec $(PYTHON) -m deploy.local_endpoint --model-store model_store/endpoint \
		--instances '$(INSTANCES)' --port '$(ENDPOINT_PORT)' $(ENDPOINT)

web: $(if $(ENDPOINT),,java) env  ## chat in the browser (WEB_PORT= MODEL=, or ENDPOINT= of a server that runs; WEB="--help")
	@$(PYTHON) -m web --port '$(WEB_PORT)' $(WEB) --check
	@$(if $(ENDPOINT),true,./build_mar.sh --model '$(MODEL)' $(if $(SESSIONS),--sessions '$(SESSIONS)') $(if $(DTYPE),--dtype '$(DTYPE)') >/dev/null)
	@exec $(PYTHON) -m web --port '$(WEB_PORT)' $(if $(ENDPOINT),--endpoint '$(ENDPOINT)') $(WEB)

notebook: java env  ## run docs/notebook.ipynb against such an endpoint (NOTEBOOK=--save stores its outputs in it)
	@$(PYTHON) -m tests.notebook $(NOTEBOOK)

docs: env  ## build the documentation into site/ (open site/index.html)
	@NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict

docs-serve: env  ## show the documentation on loopback while you write (DOCS_PORT=)
	@NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs serve --strict --dev-addr '127.0.0.1:$(DOCS_PORT)'

lint: env  ## check code, types, imports, structure, words, Dockerfile, template and scripts
	@scripts/lint.sh

model: env  ## train models/shapes from scratch (an hour or more)
	@$(PYTHON) models/shapes/train.py

bench: env  ## measure the engine against transformers (half an hour; BENCH="--rounds 2")
	@$(PYTHON) -m bench $(BENCH)

bench-cuda: env  ## measure it on a CUDA device (BENCH="--preset 7b")
	@$(PYTHON) -m bench.cuda $(BENCH)

load: java haproxy env  ## load the served /v1 with AIPerf's conversations (URL= MODEL= LOAD="--conversations 50 --rate 2")
	@scripts/clients.sh aiperf
	@$(PYTHON) -m bench.load $(if $(URL),--url '$(URL)') --model '$(MODEL)' $(LOAD)

soak: java haproxy env  ## run long fault tests, an hour or more (SOAK="engine-kills --times 5")
	@$(PYTHON) -m tests.soak $(SOAK)

image: env  ## build the image of the SageMaker container (TORCH=cuda|cpu BASE= TAG= IMAGE="--help")
	@$(PYTHON) -m deploy.container.image \
		$(if $(TORCH),--torch '$(TORCH)') $(if $(BASE),--base '$(BASE)') $(if $(TAG),--tag '$(TAG)') $(IMAGE)

image-test: env  ## build the image with buildah, run it as SageMaker does, measure it (root; 12 GB of disk)
	@$(PYTHON) -m tests.image

board: java haproxy prometheus env  ## draw docs/img/board.png: Grafana's board with the data of two minutes of load
	@$(PYTHON) -m tests.board

screenshots: java chromium env  ## take the pictures of the web chat in docs/img
	@$(PYTHON) -m tests.browser.screenshots

env:  ## make .venv with the packages that requirements-dev.txt pins
	@scripts/env.sh

clients:  # of other projects, for the tests
	@scripts/clients.sh

java:  # before env, so that a missing Java is reported before a long install
	@scripts/need_java.sh

haproxy:  # required by the tests; make serve works without it
	@scripts/need_haproxy.sh --install

prometheus:  # required by tests
	@scripts/need_prometheus.sh --install

chromium:  # required by the tests of the web chat
	@scripts/need_chromium.sh --install

clean:  ## delete archives, caches, logs and the site; the environments stay
	@find model_store -mindepth 1 -maxdepth 1 ! -name README.md -exec rm -rf {} +
	@find . -path './.venv*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
	@rm -rf .pytest_cache .ruff_cache .mypy_cache .import_linter_cache logs site
