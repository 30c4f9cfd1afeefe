# Every target sets itself up: .venv is made on first use and renewed when its inputs change.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
ARGS ?=
# A process a core, of one thread each; a file's tests share what is costly to make.
PYTEST := -m pytest -n auto --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help setup distill test test-slow test-oldest audit lint format teacher bench benchmark clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $(READY)

setup: $(READY) ## Make .venv with the pinned packages

distill: $(READY) ## Distil the bundled teacher into a 4-step student (ARGS="--num-steps 2 --seed 1")
	$(BIN)/python examples/distill.py $(ARGS)

test: $(READY) ## Run the tests, except the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) -m "not slow" $(ARGS)

test-slow: $(READY) ## Run the slow tests
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) -m slow $(ARGS)

test-oldest: ## Run the tests with the oldest packages that pyproject allows, but for torch
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt -e ".[dev]"
	OMP_NUM_THREADS=1 .venv-oldest/bin/python $(PYTEST) -m "not slow" $(ARGS)

audit: ## Look for known vulnerabilities in the pinned packages; fails where one is not known
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit
	.venv-audit/bin/pip-audit --strict --disable-pip --no-deps -r constraints.txt

lint: $(READY) ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## Bring the code into style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

teacher: $(READY) ## Retrain the bundled teacher (under ten minutes on two cores)
	$(BIN)/python examples/train_teacher.py $(ARGS)

bench: $(READY) ## Measure time, memory and growth against the bare network (ARGS="--network pixels")
	$(BIN)/python -m benchmarks.overhead $(ARGS)

benchmark: $(READY) ## Compare every few-step technique; hours, resumable (ARGS="--task mixture --seeds 0")
	OMP_NUM_THREADS=1 $(BIN)/python examples/compare.py $(ARGS)

clean: ## Remove .venv and caches; runs/ stays
	rm -rf .venv .venv-oldest .venv-audit .pytest_cache .mypy_cache .ruff_cache *.egg-info
