# One Python, one virtual environment, exact versions. `make help` lists what there is.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

S3 ?= .s3
ROUNDS ?= 3
TORCH_WHEELS ?= https://download.pytorch.org/whl/cpu/torch/

.DEFAULT_GOAL := help
.PHONY: help setup model demo scan test test-faults test-infra check format families coverage settings dashboard bench s3-up s3-down lock lock-image clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# pip compiles on one processor, which takes longer than all else it does; here it is done on all of them, and what is
# seldom or never loaded is left to whoever loads it.
SELDOM := /(tests|testing|_inductor|pip|networkx|hive_metastore)/|/transformers/models/|/ray/(rllib|serve|tune|train|llm)/
$(READY): requirements.lock pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile --requirement requirements.lock
	$(BIN)/python -m compileall -qq -j 0 -x '$(SELDOM)' $(VENV)/lib || true
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

setup: $(READY) ## make the virtual environment with the locked versions

model: $(READY) ## fetch and unpack the default model, once
	@$(BIN)/python -c 'from neg_service.models.source import fetch; print("model:", fetch("smollm2").directory)'

demo: model ## scan the facts with the default model; prints, plots and names the results
	$(BIN)/python -m jobs.demo

scan: model ## python -m jobs.scan with ARGS="..."
	$(BIN)/python -m jobs.scan $(ARGS)

# Three processes on two cores, each with one thread: a fourth makes it no faster.
test: check model ## checks, then all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --durations=25

test-faults: model ## every fault, ROUNDS=3 times at random moments; FAULT_SEED=... repeats one
	FAULT_ROUNDS=$(ROUNDS) $(BIN)/python -m pytest tests/faults -m '' -v
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --ignore tests/faults -m faults -n 2 --dist loadfile --no-loadscope-reorder -v

test-infra: model ## as root: build the image, make hosts, cut their links, start servers; a quarter of an hour
	$(BIN)/python -m pytest tests/infra -m '' -n 3 --dist loadfile --no-loadscope-reorder -v -rsP --durations=25

check: $(READY) ## format, lint, types and the direction of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY) ## format and sort imports
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

families: $(READY) ## compare every model family with the textbook way, and write the table of families in neg_service/models
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.families_table

coverage: $(READY) ## measure a tiny model of every configuration of transformers, and write what is measured into neg_service/models
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.coverage --write

settings: $(READY) ## write the reference of settings into conf/README.md
	$(BIN)/python -m tests.settings_reference

dashboard: $(READY) ## write infra/grafana/dashboard.json from infra/grafana/dashboard.py
	$(BIN)/python -m infra.grafana.dashboard

bench: model ## time the engine, the driver and storage; JSON on stdout
	$(BIN)/python -m jobs.bench benchmark=neurgrad
	$(BIN)/python -m jobs.bench benchmark=sweep
	$(BIN)/python -m tests.families_speed
	$(BIN)/python -m jobs.bench benchmark=driver
	$(BIN)/python -m jobs.bench benchmark=storage

s3-up: $(READY) ## start an S3 server on this machine, on the loopback address, with its data in S3=.s3
	@$(BIN)/python -m infra.s3.server up $(S3)

s3-down: $(READY) ## end it; its data stay
	@$(BIN)/python -m infra.s3.server down $(S3)

lock: ## write requirements.lock anew from pyproject.toml's ranges, in an empty environment
	rm -rf $(VENV)/lock && $(PYTHON) -m venv $(VENV)/lock
	$(VENV)/lock/bin/pip install --quiet torch==2.13.0 setuptools
	$(VENV)/lock/bin/pip install --quiet '.[compute,datasets,catalogue,lineage,probe,report,dev]'
	$(VENV)/lock/bin/pip freeze --all --exclude pip --exclude neg-service | sed 's/+cpu$$//' > requirements.lock
	rm -rf $(VENV)/lock build

lock-image: ## write the image's lists of packages with hashes from requirements.lock; TORCH_WHEELS=... has torch for CPUs
	rm -rf $(VENV)/lock && $(PYTHON) -m venv $(VENV)/lock
	$(VENV)/lock/bin/pip install --quiet uv==0.13.9
	$(VENV)/lock/bin/python -m infra.docker.lock $(VENV)/lock/bin/uv $(TORCH_WHEELS)
	rm -rf $(VENV)/lock

clean: ## remove the environment, caches and local results
	rm -rf $(VENV) results .mypy_cache .ruff_cache .pytest_cache .import_linter_cache *.egg-info
