# One door to everything: `make help`.
SHELL := /bin/bash
.DEFAULT_GOAL := help
VENV ?= .venv
PY := $(VENV)/bin/python
export OPENBLAS_NUM_THREADS := 1

.PHONY: help setup check format test test-unit test-system demo bench fuzz soak-crash conformance clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: ## make .venv with everything a developer needs (apt where it may, else one clear error)
	@bash scripts/setup.sh dev

check: setup ## format, lint, types, import contracts, unit and contract tests
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(PY) -m pytest tests/unit

format: setup ## let ruff write the format
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

test-unit: setup ## unit and contract tests only
	$(PY) -m pytest tests/unit

test-system: setup ## system tests: real Mosquitto, real models, real browser
	$(PY) -m pytest tests/system

test: ## everything CI runs; installs what it needs
	@$(MAKE) check
	$(PY) -m pytest tests/system
	@$(MAKE) demo ONCE=1

demo: ## the main story on real parts; ONCE=1 checks it and exits
	@bash scripts/setup.sh demo
	$(PY) -m demo $(if $(ONCE),--once,)

bench: setup ## every question in benchmarks/, side by side (benchmarks/models.py first); QUICK=1 for a short look
	@for question in inference_overhead inference_parallel swap restart push footprint delta batching; do \
	    echo "== $$question"; $(PY) benchmarks/$$question.py $(if $(QUICK),--quick,) || exit 1; done

fuzz: setup ## every reader of a stranger's bytes, guided by coverage; SECONDS_EACH=60, TARGETS="head tensors"
	@$(PY) -m pip install --quiet --disable-pip-version-check -r tests/fuzz/requirements.txt
	$(PY) tests/fuzz/fuzz_atheris.py --seconds $(or $(SECONDS_EACH),60) $(TARGETS)

soak-crash: setup ## kill the agent at every moment its disk changes, and start it again; STORIES="update delta", KILLS=36
	$(PY) tests/soak/crash_sweep.py --kills $(or $(KILLS),36) $(STORIES)

conformance: setup ## the public TUF conformance suite on the agent's update client; SUITE=its checkout (needs faketime)
	@test -d "$(SUITE)/tuf_conformance" || { echo "SUITE=<a checkout of theupdateframework/tuf-conformance>"; exit 2; }
	cd "$(SUITE)" && PATH="$(abspath $(VENV))/bin:$$PATH" PYTHONPATH=. $(abspath $(PY)) -m pytest -q -c pyproject.toml -W default \
	    -p no:cacheprovider tuf_conformance --entrypoint $(CURDIR)/tests/conformance/tuf_client

clean: ## remove everything the targets above made
	rm -rf $(VENV) .demo .mypy_cache .ruff_cache .pytest_cache .import_linter_cache build *.egg-info
