# make demo and make test need nothing but Python and make.
#   TORCH_INDEX=URL   take torch from this package index (PyTorch's CPU index, say) and the rest from the default one
#   PYTHON=COMMAND    the Python that the virtual environment is made with
#   VENV=DIR          where that environment is

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python -m
PIP = $(RUN) pip --disable-pip-version-check install --constraint constraints.txt

.PHONY: help demo test test-all lint types check install install-dev clean
.DELETE_ON_ERROR:

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' Makefile

demo: install ## run the main job on the data that comes with the package, and say where the report is
	$(RUN) flyweight fit demo --budget "latency<=1ms, size<=200KB" --time 2m

test: install-dev ## run the tests, a file at a time on each core
	$(RUN) pytest --numprocesses auto --dist loadfile

test-all: install-dev ## run the tests and those that train at full size
	$(RUN) pytest --numprocesses auto --dist loadfile -m ""

lint: install-dev ## look for mistakes and check the format
	$(RUN) ruff check
	$(RUN) ruff format --check

types: install-dev ## check the types
	$(RUN) pyright --pythonpath $(VENV)/bin/python

check: lint types ## lint and types

install: $(VENV)/.installed ## make the virtual environment and install the package from this folder

install-dev: $(VENV)/.installed-dev ## the same with what the tests and checks need

# The stamps are written last, so that an interrupted install is taken up again.
$(VENV)/.installed: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON): install Python 3.11 or newer, or name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Flyweight needs Python 3.11 or newer and $(PYTHON) is %d.%d: install a newer one, or name it: make PYTHON=/path/to/python3" % sys.version_info[:2])'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) lacks the venv module: install it (Debian and Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	@$(RUN) pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(if $(wildcard $(VENV)/pyvenv.cfg),--clear) $(VENV)
	$(if $(TORCH_INDEX),$(PIP) --no-deps --index-url "$(TORCH_INDEX)" torch)
	$(PIP) --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --editable ".[dev]"
	@touch $@

clean: ## remove the virtual environment and the caches; runs/ stays
	@test ! -f $(VENV)/pyvenv.cfg || rm -rf $(VENV)
	rm -rf build dist .pytest_cache .ruff_cache
	find flyweight scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +
