# Everything is set up by the first command that needs it, in .venv; another interpreter: make test PYTHON=python3.12
PYTHON ?= python3
VENV := .venv$(patsubst python3%,%,$(notdir $(PYTHON)))
BIN := $(VENV)/bin
WORKDIR ?= runs/fashion_mnist
# Interpreters that have benchmarks/requirements.txt and requirements-plan.txt; by default .venv-peers and .venv-plan, set up
# by the first target that needs them
PEERS ?=
PLAN ?=

# Memory in huge pages, and less than 1 GiB of it kept for the next step: a third of a training step on a CPU is otherwise
# spent on page faults.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=0x40000000:glibc.malloc.trim_threshold=0x40000000

.PHONY: train test test-peers test-plan check bench format clean

train: $(VENV)/.installed ## Train a small Xception on the shipped images; ARGS='--config.seed=1' overrides fields
	$(BIN)/python train.py --config=configs/fashion_mnist.py --workdir=$(WORKDIR) $(ARGS)

test: $(VENV)/.installed-dev ## Run the tests; ARGS='tests/models -k parity' selects some
	$(BIN)/python -m pytest $(ARGS)

test-peers: $(VENV)/.installed-dev $(if $(PEERS),,.venv-peers/.installed) ## Compare with timm itself; see docs/weights.md
	PEERS=$(abspath $(or $(PEERS),.venv-peers/bin/python)) $(BIN)/python -m pytest tests/peers $(ARGS)

test-plan: $(VENV)/.installed-dev $(if $(PLAN),,.venv-plan/.installed) ## Compile for TPUs; see docs/pods.md
	PLAN=$(abspath $(or $(PLAN),.venv-plan/bin/python)) $(BIN)/python -m pytest tests/tools/test_tpu.py $(ARGS)

check: $(VENV)/.installed-dev ## Format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev ## Rewrite the files as `make check` wants them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.installed-dev $(if $(PEERS),,.venv-peers/.installed) ## Measure beside peers; ARGS='--cases=small,train'
	$(BIN)/python -m benchmarks --peers=$(or $(PEERS),.venv-peers/bin/python) $(ARGS)

clean: ## Remove the virtual environments and caches; runs stay
	rm -rf .venv .venv.* .venv-peers .venv-plan .pytest_cache .ruff_cache .mypy_cache

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check --progress-bar off -r requirements.txt
	touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(BIN)/pip install --disable-pip-version-check --progress-bar off -r requirements-dev.txt
	touch $@

.venv-peers/.installed: benchmarks/requirements.txt
.venv-plan/.installed: requirements-plan.txt requirements.txt
.venv-peers/.installed .venv-plan/.installed:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --disable-pip-version-check --progress-bar off -r $<
	touch $@
