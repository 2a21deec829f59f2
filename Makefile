# `make demo` and `make test` each set up what they need in .venv and run, from a fresh clone.

PYTHON ?= python3
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
# An install is repeated when pyproject.toml changes.
DEMO_STAMP := $(VENV)/.installed-demo
TEST_STAMP := $(VENV)/.installed-test
DOCS_STAMP := $(VENV)/.installed-docs
BENCH_STAMP := $(VENV)/.installed-bench
# One thread per test worker; more would fight over the cores.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: demo test lint types docs zoo bench clean help

demo: $(DEMO_STAMP)  ## train a small RepVGG on real images, fuse it and compare
	$(BIN)/python examples/repvgg.py $(ARGS)

test: $(TEST_STAMP)  ## the test suite
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

zoo: $(TEST_STAMP)  ## 2,000 random nets, then every family of timm and torchvision: writes docs/zoo.md
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS) -m long
	$(ONE_THREAD) $(BIN)/python benchmarks/zoo.py --jobs $(WORKERS) $(ARGS)

# One thread per core, and nothing else on the machine. What was measured is kept: an interrupted run goes on.
bench: $(BENCH_STAMP)  ## fused nets timed in six runtimes, about 40 minutes; ARGS=--quick takes a few: docs/speed.md
	$(BIN)/python -m benchmarks.outputs $(ARGS)
	$(BIN)/python -m benchmarks.paper $(ARGS)
	$(BIN)/python -m benchmarks.limit $(ARGS)
	$(BIN)/python -m benchmarks.fusing $(if $(filter --quick,$(ARGS)),--only repvgg_a0 --rounds 3 --dry)

lint: $(TEST_STAMP)  ## ruff
	$(BIN)/ruff check .

types: $(TEST_STAMP)  ## mypy, strict, on reparam/
	$(BIN)/mypy

docs: $(DOCS_STAMP)  ## the documentation as a site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:  ## remove .venv, caches and what the examples wrote
	rm -rf $(VENV) build dist out site .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-6s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(DEMO_STAMP): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --editable '.[examples]'
	touch $@

$(TEST_STAMP): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --editable '.[test,zoo,examples,train,packages]'
	touch $@

$(BENCH_STAMP): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --editable '.[bench]'
	touch $@

$(DOCS_STAMP): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --editable '.[docs]'
	touch $@
