# `make help` lists the targets. Each makes the virtual environment first where it is missing or out of date.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV ?= .venv
# Which build of torch: the one that is installed, else the CPU's. `make setup TORCH=cuda` changes it.
TORCH ?= $(patsubst $(VENV)/.installed-%,%,$(firstword $(wildcard $(VENV)/.installed-cpu $(VENV)/.installed-cuda) cpu))
STAMP := $(VENV)/.installed-$(TORCH)
PYTEST := $(VENV)/bin/python -m pytest
# What a plain test run leaves out: it takes long, or wants something that a machine may not have.
REST := slow or dist or real_data or browser or server or gpu

.PHONY: help setup demo test test-rest test-all lint format type bench bench-frappe wheel clean distclean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP)  ## the virtual environment with everything pinned (TORCH=cuda for a GPU)

$(STAMP): $(wildcard requirements/*) pyproject.toml
	@PYTHON="$(PYTHON)" requirements/install.sh $(VENV) $(TORCH)

demo: $(STAMP)  ## the whole road in a few minutes: simulate, train, export, serve, rank
	@$(VENV)/bin/recsys demo

test: $(STAMP)  ## the tests that need nothing special, on all cores
	$(PYTEST) -n logical --maxprocesses 8 --dist worksteal -m "not ($(REST))"

test-rest: $(STAMP)  ## the tests that `make test` leaves out; what is not there is skipped with its reason
	$(PYTEST) -m "$(REST)" || [ $$? -eq 5 ]

test-all: test test-rest  ## every test, once

lint: $(STAMP)  ## ruff: rules and format
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check

format: $(STAMP)  ## mend what ruff can mend
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

type: $(STAMP)  ## mypy, strict
	$(VENV)/bin/mypy

bench: $(STAMP)  ## every benchmark but build-peers, as one JSON object
	@$(VENV)/bin/recsys bench all --json

bench-frappe: $(STAMP)  ## seven models on Frappe, five seeds (RAW=folder; FUXICTR=its Python, to train it too)
	$(VENV)/bin/python -m benchmarks.frappe --raw "$(RAW)" --output runs/frappe $(if $(FUXICTR),--fuxictr "$(FUXICTR)")

wheel: $(STAMP)  ## dist/*.whl
	$(VENV)/bin/python -m pip wheel --disable-pip-version-check -q --no-deps --no-build-isolation --wheel-dir dist .

clean:  ## caches and builds; never the environment, runs or data
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## the environment too
	rm -rf $(VENV) $(VENV).lock
