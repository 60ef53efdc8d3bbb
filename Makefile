# Each target sets up the environment that it needs in .venv. To use another interpreter: make test PYTHON=python3.12
PYTHON ?= python3
VENV := .venv$(patsubst python3%,%,$(notdir $(PYTHON)))
BIN := $(VENV)/bin
WORKDIR ?= runs/fashion_mnist
# Interpreters with the packages of benchmarks/requirements.txt, of the extra [tpu] and of tests/launch/requirements.txt. By
# default the first target that needs them sets up .venv-peers, .venv-plan and .venv-launch.
PEERS ?=
PLAN ?=
LAUNCH ?=
# For `make fuzz`: seconds for each target, and one target instead of all.
SECONDS ?= 60
TARGET ?=

# The lock files hold exact versions and hashes for one Python and one platform. Elsewhere pip takes the newest versions
# that requirements*.txt allow.
LOCKED_PLATFORM := 3 11 Linux x86_64
PLATFORM := $(shell $(PYTHON) -c 'import platform, sys; print(*sys.version_info[:2], platform.system(), platform.machine())')
ifeq ($(PLATFORM),$(LOCKED_PLATFORM))
REQUIREMENTS := requirements.lock
REQUIREMENTS_DEV := requirements-dev.lock
REQUIREMENTS_BUILD := requirements-build.lock
REQUIREMENTS_TOOLS := requirements-tools.lock
HASHES := --require-hashes
else
REQUIREMENTS := requirements.txt
REQUIREMENTS_DEV := requirements-dev.txt
REQUIREMENTS_BUILD := requirements-build.txt
REQUIREMENTS_TOOLS := requirements-tools.txt
endif
PIP_INSTALL := pip install --disable-pip-version-check --progress-bar off
UV_COMPILE := .venv-lock/bin/uv pip compile --quiet --generate-hashes --no-annotate --custom-compile-command 'make lock' \
	--python-version 3.11 --python-platform x86_64-unknown-linux-gnu

.PHONY: help train smoke test test-slow test-kernels test-faults soak test-peers test-launch test-slurm test-plan fuzz check format docs lock audit sbom bench clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

train: $(VENV)/.installed ## Train a small Xception on the shipped images; ARGS overrides fields: make train WORKDIR=runs/seed1 ARGS=--config.seed=1
	$(BIN)/xception-jax train --config=fashion_mnist --workdir=$(WORKDIR) $(ARGS)

# Only the files with marked tests are collected, because importing all others would take several seconds in each worker.
smoke: $(VENV)/.installed-dev ## Run the tests marked `smoke`, in less than a minute
	$(BIN)/python -m pytest -m smoke $$(grep -rl --include='test_*.py' 'mark\.smoke' tests) $(ARGS)

test: $(VENV)/.installed-dev ## Run the tests; ARGS='tests/models -k parity' selects some
	$(BIN)/python -m pytest $(ARGS)

test-peers: $(VENV)/.installed-dev $(if $(PEERS),,.venv-peers/.installed) ## Compare with timm itself; see docs/howto/weights.md
	PEERS=$(abspath $(or $(PEERS),.venv-peers/bin/python)) $(BIN)/python -m pytest tests/peers $(ARGS)

test-kernels: $(VENV)/.installed-dev ## Test the CPU kernels from clang++, for AVX2, and with an address sanitizer
	$(BIN)/python -m pytest -m kernels --dist=load tests/ops $(ARGS)

test-slow: $(VENV)/.installed-dev ## Run the tests that take ten seconds or more; `make test` leaves them out
	$(BIN)/python -m pytest -m slow $$(grep -rl --include='test_*.py' 'mark\.slow' tests) $(ARGS)

test-faults: $(VENV)/.installed-dev ## Inject the faults of docs/explanation/reliability.md; ARGS='1 44' selects some
	$(BIN)/python -m tests.faults $(ARGS)

soak: ## Kill one run thirty times, and compare its bits with those of a run that was left alone
	$(MAKE) test-faults ARGS=44

test-launch: $(VENV)/.installed-dev $(if $(LAUNCH),,.venv-launch/.installed) ## Check launch/ with the tools of its places, and run it here
	LAUNCH=$(abspath $(or $(LAUNCH),.venv-launch/bin/python)) $(BIN)/python -m pytest -m 'not slurm' tests/launch $(ARGS)

test-slurm: $(VENV)/.installed-dev ## Run launch/slurm.sh on a real Slurm with two nodes, from Debian's packages
	$(BIN)/python -m pytest -m slurm --numprocesses=0 tests/launch $(ARGS)

test-plan: $(VENV)/.installed-dev $(if $(PLAN),,.venv-plan/.installed) ## Compile for TPUs; see docs/howto/plan.md
	PLAN=$(abspath $(or $(PLAN),.venv-plan/bin/python)) $(BIN)/python -m pytest tests/tools/test_tpu.py $(ARGS)

fuzz: .venv-fuzz/.installed ## Fuzz the readers of strangers' files; SECONDS=600 for each, TARGET=image one of them
	.venv-fuzz/bin/python -m tests.fuzz --seconds=$(SECONDS) $(if $(TARGET),--target=$(TARGET)) $(ARGS)

check: $(VENV)/.installed-dev ## Format, lint, types, imports that point down, and documentation
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(MAKE) docs

format: $(VENV)/.installed-dev ## Rewrite the files as `make check` wants them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.installed-dev ## Build the documentation into docs/_build/html; warnings are errors
	JAX_PLATFORMS=cpu $(BIN)/python -m sphinx -b html -E -q -W --keep-going -d docs/_build/doctrees docs docs/_build/html $(ARGS)

lock: .venv-lock/.installed ## Write the lock files from requirements*.txt; ARGS=--upgrade takes the newest versions
	$(UV_COMPILE) $(ARGS) --output-file requirements.lock requirements.txt
	$(UV_COMPILE) $(ARGS) --constraints requirements.lock --output-file requirements-dev.lock requirements-dev.txt
	$(UV_COMPILE) $(ARGS) --constraints requirements-dev.lock --output-file requirements-build.lock requirements-build.txt
	$(UV_COMPILE) $(ARGS) --output-file requirements-tools.lock requirements-tools.txt

audit: .venv-lock/.installed ## Look up the known vulnerabilities of the locked packages; 74 if some cannot be checked
	@.venv-lock/bin/python .ci/audit.py .venv-lock/bin/pip-audit requirements-dev.lock requirements-build.lock requirements-tools.lock

sbom: .venv-lock/.installed ## Write sbom.json, the bill of materials (CycloneDX) of what requirements.lock installs
	.venv-lock/bin/python -W ignore -m cyclonedx_py requirements --pyproject pyproject.toml --output-reproducible --validate --output-file sbom.json requirements.lock

bench: $(VENV)/.installed-dev $(if $(PEERS),,.venv-peers/.installed) ## Measure beside peers; ARGS='--cases=small,train'
	$(BIN)/python -m benchmarks --peers=$(or $(PEERS),.venv-peers/bin/python) $(ARGS)

clean: ## Remove the virtual environments and caches, but not the runs
	rm -rf .venv .venv.* .venv-lock .venv-peers .venv-plan .venv-launch .venv-fuzz .pytest_cache .ruff_cache .mypy_cache

# The package itself is installed editable: notebooks find it, and changes take effect at once.
$(VENV)/.installed: requirements.txt $(REQUIREMENTS) $(REQUIREMENTS_BUILD) pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make ... PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/$(PIP_INSTALL) $(HASHES) -r $(REQUIREMENTS) -r $(REQUIREMENTS_BUILD)
	$(BIN)/$(PIP_INSTALL) --no-deps --no-build-isolation --editable .
	touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(REQUIREMENTS_DEV) $(VENV)/.installed
	$(BIN)/$(PIP_INSTALL) $(HASHES) -r $(REQUIREMENTS_DEV)
	touch $@

.venv-lock/.installed: $(REQUIREMENTS_TOOLS)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/$(PIP_INSTALL) $(HASHES) -r $<
	touch $@

.venv-peers/.installed: benchmarks/requirements.txt
.venv-launch/.installed: tests/launch/requirements.txt
.venv-peers/.installed .venv-launch/.installed:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/$(PIP_INSTALL) -r $<
	touch $@

# Atheris has no wheels for some Pythons and platforms, so it is apart. All else comes from the main environment.
.venv-fuzz/.installed: tests/fuzz/requirements.txt $(VENV)/.installed-dev
	$(PYTHON) -m venv $(@D)
	$(abspath $(BIN))/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> $$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/main.pth
	$(@D)/bin/$(PIP_INSTALL) -r $<
	touch $@

# In an environment of its own: wherever libtpu is installed, JAX looks for a TPU first.
.venv-plan/.installed: pyproject.toml setup.py requirements.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/$(PIP_INSTALL) --editable '.[tpu]'
	touch $@
