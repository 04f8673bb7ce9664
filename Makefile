# The one door, for people and for CI. The first use makes .venv from constraints.txt; nothing outside the checkout changes.
#
#   make demo      train in high precision and in FP8, write, reload, generate; prints one table (about 3 minutes on 2 cores)
#   make readme    the demo, and its table into README.md
#   make test      the tests              make test ARGS="tests/test_formats.py -x"
#   make check     format, lint, types
#   make bench     benchmarks; on a Hopper GPU, side by side with BF16
#   make readme    the README's tables, from runs/demo and bench/results
#   make format    rewrite the sources as `make check` wants them
#   make clean     remove .venv, caches and results
#
# PYTHON=python3.12     the interpreter that .venv is made with
# VENV=path             an environment of your own: one that exists is used as it is, one that does not is made there
# PIP_ARGS="..."        more arguments for pip; on Linux without a GPU this saves a download of 3 GB:
#                       PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
ARGS ?=

RUN := $(VENV)/bin/python
export PYTHONPATH := $(CURDIR)/src

READY := $(VENV)/.ready
ifneq ($(origin VENV),file)
ifneq ($(wildcard $(RUN)),)
READY :=
endif
endif

.PHONY: demo test check bench readme format clean
.DEFAULT_GOAL := test

demo: $(READY)
	$(RUN) -m fp8 demo $(ARGS)

test: $(READY)
	$(RUN) -m pytest $(ARGS)

check: $(READY)
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m pyright --pythonpath $(RUN)

bench: $(READY)
	$(RUN) -m fp8 bench $(ARGS)

readme: demo
	$(RUN) -m fp8.report.readme runs/demo/demo.json README.md
	$(RUN) -m fp8.bench.table bench/results README.md

format: $(READY)
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis runs build dist
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("fp8 needs Python 3.11 or newer: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	@touch $@
