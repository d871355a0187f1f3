# The developer's commands. CI runs the same ones (.ci/run). Options for a command go in ARGS:
#     make serve MODEL=demo-vlm      make serve ARGS="--prefill 2 --decode 2"      make test ARGS="-k arena"
# Another interpreter: make install PYTHON=/path/to/python3.12

.DEFAULT_GOAL := help
.PHONY: help install serve test test-slow check format generate bench clean

ARGS ?=
MODEL ?=
BIN := .venv/bin
STAMP := .venv/.installed

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

install: $(STAMP)  ## make .venv and install everything into it; instant when nothing changed

$(STAMP): pyproject.toml constraints.txt scripts/install.sh
	@PYTHON="$(PYTHON)" scripts/install.sh
	@touch $@

serve: install  ## serve a model on this machine (HTTP 8000, admin 8001, gRPC 50051); the default one, or MODEL
	@exec $(BIN)/triptych serve $(if $(MODEL),--model $(MODEL)) $(ARGS)

test: install  ## every test but the slow ones, cheapest first, in random order
	@$(BIN)/python scripts/test.py units cluster model procs -- $(ARGS)

test-slow: install  ## the slow suites
	@$(BIN)/python scripts/test.py slow -- $(ARGS)

check: install  ## format, lint, types, import floors, generated files current
	@scripts/check.sh

format: install  ## rewrite the sources the way `make check` wants them
	@$(BIN)/ruff format
	@$(BIN)/ruff check --fix

generate: install  ## rewrite what is generated: the wire code from proto/, METHODS.md
	@$(BIN)/python scripts/proto.py
	@$(BIN)/python scripts/methods.py

bench: install  ## measure; tables go to the terminal
	@exec $(BIN)/python -m bench $(ARGS)

clean:  ## remove everything that was installed or built
	rm -rf .venv build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
