# Everything from a bare clone: needs make and Python 3.11 or newer, nothing else.

VENV = .venv
BIN = $(VENV)/bin
MODELS = .forebay/models
TRITON = .forebay/triton
PYTHONS = $(PYTHON) python3.13 python3.12 python3.11 python3 python

# A half-made virtual environment is no virtual environment.
.DELETE_ON_ERROR:

.PHONY: help run test test-all checks bench gpu-check models triton clean packages-local packages-local,dev

help:
	@echo "make run       two small real models behind Forebay on port 8080   (ARGS='--port 9000' and others)"
	@echo "             BACKEND=triton: the same on a real Triton Inference Server"
	@echo "make test      lint, types, import rule and the tests, without the slow ones"
	@echo "make test-all  the slow tests too"
	@echo "make bench     the measurements in tests/bench"
	@echo "make triton    a Triton server for CPUs, into $(TRITON)   (Linux, Python 3.11 or 3.12)"
	@echo "make gpu-check the suite of a live model on a Triton that serves one on a GPU   (TRITON_URL=grpc://host:8001)"
	@echo "make clean     removes $(VENV) and caches; keeps the models and data in .forebay"

run: $(VENV)/local.ready
	@exec $(BIN)/forebay demo $(if $(BACKEND),--backend $(BACKEND)) $(ARGS)

test: checks
	@$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-all: checks
	@$(BIN)/python -m pytest $(ARGS)

checks: $(VENV)/local,dev.ready
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports > $(VENV)/imports.log || { cat $(VENV)/imports.log; exit 1; }

bench: $(VENV)/local,dev.ready
	@for file in tests/bench/[!_]*.py; do \
	  module=$$(basename "$$file" .py); echo "== $$module"; $(BIN)/python -m "tests.bench.$$module" || exit 1; \
	done

# Make's own variables reach the suite under names of its own.
gpu-check: $(VENV)/local,dev.ready
	@$(if $(TRITON_URL),FOREBAY_CHECK_TRITON='$(TRITON_URL)') $(if $(BACKEND),FOREBAY_CHECK_BACKEND='$(BACKEND)') \
	  $(BIN)/python -m tests.live.gpu_check

clean:
	@rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

# The packages and the models arrive at the same time. Once they are here, this rule has nothing to do.
$(VENV)/%.ready: pyproject.toml constraints.txt | $(BIN)/python
	@$(MAKE) --no-print-directory -j2 packages-$* models
	@touch $@

models: | $(BIN)/python
	@$(BIN)/python -m gateway.demo_models $(MODELS)

triton: | $(BIN)/python
	@$(BIN)/python -m gateway.triton_install $(TRITON)

# pip's own output is in the log; shown is that it moves, and what went wrong.
packages-local packages-local,dev: packages-%: | $(BIN)/python
	@rm -f $(VENV)/installed
	@{ $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt -e '.[$*]' 2>&1 \
	  && touch $(VENV)/installed; } | tee $(VENV)/install.log | { n=0; while IFS= read -r line; do case $$line in \
	    "Collecting "*|"Processing /"*) n=$$((n + 1)); [ $$((n % 20)) -ne 0 ] || echo "  packages $$n found";; \
	    "Installing collected"*) echo "  packages $$n fetched, installing";; \
	    ERROR*|error*) echo "  $$line";; \
	  esac; done; }
	@test -f $(VENV)/installed || { echo "The packages could not be installed; $(VENV)/install.log says why."; exit 1; }
	@echo "  packages installed"

$(BIN)/python:
	@for python in $(PYTHONS); do \
	  if $$python -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "  python   $$($$python --version)"; exec $$python -m venv $(VENV); \
	  fi; \
	done; \
	echo "No Python 3.11 or newer with venv and ensurepip was found (looked for: $(PYTHONS))."; \
	echo "Install one (Debian, Ubuntu: apt install python3-venv), or name it: make PYTHON=/path/to/python3"; \
	exit 1
