# Seven verbs; each sets up .venv first if needed. On a GPU machine: make EXTRA=cuda demo
#   make demo             derive a vector, serve a real model, show plain and steered answers
#   make test [ALL=1]     the test suites, each in its own process [with the long ones]; one of them: make test ONLY=engine-v1
#   make check            lint, format, types, import contracts
#   make bench            what steering costs, measured [QUICK=1: minutes; PEERS=1: other projects too; AGAIN=1: afresh]
#   make mutants          break the code in known ways and see the tests notice
#   make docs             the documentation, into site/
#   make setup            only .venv
EXTRA ?= cpu
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.ready-$(EXTRA)

.PHONY: help setup demo test check bench mutants docs
help:
	@sed -n '1,/^EXTRA/s/^#  *//p' Makefile

setup: $(STAMP)

$(STAMP): pyproject.toml scripts/setup.sh
	@PYTHON=$(PYTHON) scripts/setup.sh $(EXTRA)
	@touch $@

demo: $(STAMP)
	@$(BIN)/python -P -m steer_engine.demo

test: $(STAMP)
	@$(BIN)/python -P scripts/run_tests.py $(if $(ALL),--all) $(ONLY)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

bench: $(STAMP)
	@$(BIN)/python benchmarks/run.py $(if $(QUICK),--quick) $(if $(PEERS),--peers) $(if $(AGAIN),--again)

mutants: $(STAMP)
	@$(BIN)/python -P scripts/mutants.py

docs: $(STAMP)
	$(BIN)/mkdocs build --strict
