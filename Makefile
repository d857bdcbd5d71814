# Every target sets up what it needs: nothing has to be typed or exported before it. `make` alone lists them.
.DEFAULT_GOAL := help
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-print-directory
.PHONY: help setup test test-unit test-integration test-e2e lint format demo lock clean

PY := .venv/bin/python
# More arguments for pytest: make test-unit PYTEST_ARGS="-k pairs -x"
PYTEST_ARGS ?=
# More arguments for the renewal of the locks: make lock LOCK_ARGS=--upgrade
LOCK_ARGS ?=

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' Makefile

setup:  ## make .venv with everything in it (RATCHET_EXTRAS=gpu for NVIDIA GPUs)
	@scripts/setup.sh

test: setup  ## all tests: unit, integration, end to end (PYTEST_ARGS="...")
	$(PY) -m pytest tests $(PYTEST_ARGS)

test-unit: setup  ## unit tests: seconds, no process, no socket
	$(PY) -m pytest tests/unit $(PYTEST_ARGS)

test-integration: setup  ## integration tests: a real Redis, HTTP on loopback
	$(PY) -m pytest tests/integration $(PYTEST_ARGS)

test-e2e: setup  ## end-to-end tests: every service as a process, real models
	$(PY) -m pytest tests/e2e $(PYTEST_ARGS)

lint: setup  ## ruff (rules and format) and pyright
	@failed=""; \
	for check in "ruff check" "ruff format --check --quiet" "pyright"; do \
	  echo "==> $$check"; $(PY) -m $$check . || failed="$$failed; $$check"; \
	done; \
	[[ -z $$failed ]] || { echo "lint failed:$${failed#;}" >&2; exit 1; }

format: setup  ## mend what ruff can mend, then format
	$(PY) -m ruff check --fix-only .
	$(PY) -m ruff format .

demo: setup  ## the whole system on this machine: a tiny policy visibly improves, in minutes
	$(PY) -m examples.tiny_world.demo

lock: setup  ## renew requirements/*.lock from pyproject.toml (LOCK_ARGS=--upgrade)
	scripts/lock.sh $(LOCK_ARGS)

clean:  ## remove .venv, caches and build output
	rm -rf .venv .setup.lock build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
