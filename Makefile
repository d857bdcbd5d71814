# Every target sets up what it needs: nothing has to be typed or exported before it. `make` alone lists them.
.DEFAULT_GOAL := help
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-print-directory
.PHONY: help setup env test test-unit test-integration test-browser test-e2e test-compose browser lint format demo docs lock clean

PY := .venv/bin/python
# More arguments for pytest: make test-unit PYTEST_ARGS="-k pairs -x"
PYTEST_ARGS ?=
# More arguments for the renewal of the locks: make lock LOCK_ARGS=--upgrade
LOCK_ARGS ?=

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' Makefile

setup:  ## make .venv with everything in it (RATCHET_EXTRAS=gpu for NVIDIA GPUs)
	@scripts/setup.sh

env:  ## write .env for docker compose: generated secrets (GPU=1: the NVIDIA GPUs too)
	@scripts/compose-env.sh $(if $(GPU),gpu)

test: setup browser  ## all tests but the containers': unit, integration, end to end, browser (PYTEST_ARGS="...")
	$(PY) -m pytest tests/unit tests/integration tests/e2e tests/browser $(PYTEST_ARGS)

test-unit: setup  ## unit tests: seconds, no process, no socket
	$(PY) -m pytest tests/unit $(PYTEST_ARGS)

test-integration: setup  ## integration tests: a real Redis, HTTP on loopback
	$(PY) -m pytest tests/integration $(PYTEST_ARGS)

test-browser: setup browser  ## browser tests: the dashboard in a real Chromium
	$(PY) -m pytest tests/browser $(PYTEST_ARGS)

browser:  ## find a Chromium for the browser tests, or install Debian's
	@found=$$(scripts/browser.sh) && echo "==> browser: $$found"

test-e2e: setup  ## end-to-end tests: every service as a process, real models
	$(PY) -m pytest tests/e2e $(PYTEST_ARGS)

test-compose: setup  ## the containers, built and run on a real engine (docker must be there); takes minutes
	$(PY) -m pytest tests/compose $(PYTEST_ARGS)

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

docs: setup  ## write docs/api, docs/settings.md, docs/metrics.md and the recipe table from the code
	$(PY) -m scripts.api_docs
	$(PY) -m scripts.reference_docs

lock: setup  ## renew requirements/*.lock from pyproject.toml (LOCK_ARGS=--upgrade)
	scripts/lock.sh $(LOCK_ARGS)

clean:  ## remove .venv, caches and build output
	rm -rf .venv .setup.lock build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
