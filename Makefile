PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help install demo headline test test-slow test-slurm methods faults soak lint bench clean

help: ## show this text
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.installed ## create .venv with the package, its tested dependencies and the development tools

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,bench]'
	touch $@

demo: install ## compare LARS, LAMB and TVLARS on bundled images: six runs in under two minutes
	$(BIN)/python launch.py -m sweeps=demo

headline: install ## compare six optimizers at batch 128 to 8,192: tune, confirm on fresh seeds, report (hours on two cores)
	$(BIN)/python launch.py -m sweeps=large_batch runs_dir=runs/large_batch
	$(BIN)/largebatch confirm runs/large_batch cluster.parallel=2
	$(BIN)/largebatch report runs/large_batch --out large_batch.html
	$(BIN)/python launch.py -m sweeps=large_batch_steps runs_dir=runs/large_batch_steps
	$(BIN)/largebatch confirm runs/large_batch_steps cluster.parallel=2
	$(BIN)/largebatch report runs/large_batch_steps --out large_batch_steps.html

# Tests start hundreds of Python processes, which would compile all modules again without their compiled files.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest

test: install ## run all tests but the slow ones, methods, faults and SLURM's, three files at a time with a thread each
	LARGEBATCH_SLURM=skip $(PYTEST) -n 3 --dist loadfile --no-loadscope-reorder -m 'not slow' --ignore tests/faults --ignore tests/methods

test-slow: install ## run the slow tests: every benchmark in its smallest size, kernels for every GPU, little memory
	LARGEBATCH_SLURM=skip $(PYTEST) -n 3 --dist loadfile --no-loadscope-reorder -m slow $(SLOW)

test-slurm: install ## run SLURM's tests on a private cluster (Debian, root)
	$(BIN)/python tests/tools/private_slurm/cluster.py install
	LARGEBATCH_SLURM=required $(PYTEST) tests/slurm

methods: install ## train each method of a library whole, resumed, in two processes and with accumulation (under a minute)
	$(PYTEST) tests/methods

faults: install ## kill and damage runs at random points, with a fixed seed (under three minutes)
	$(PYTEST) -n 3 tests/faults

soak: install ## the same at every file operation and for hours, with long runs and a new seed: FAULTS_SEED=N repeats one
	FAULTS_SEED=$${FAULTS_SEED:-$$(date +%s)} FAULTS=100000 FAULTS_SIGNALS=100 FAULTS_EXAMPLES=100 FAULTS_LONG=1 $(PYTEST) -n 3 --timeout 100000 tests/faults

lint: install ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed-bench ## print the tables of all benchmarks but gpu.py, which needs a GPU (half an hour)
	for script in $(filter-out benchmarks/gpu.py,$(wildcard benchmarks/*.py)); do $(BIN)/python $$script || exit 1; done

clean: ## remove the environment and caches; runs and data stay
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
