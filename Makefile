# What there is to do with this tree; `make` alone explains it.
#
# Every target sets up what it needs, and does so only once: Python's packages in
# .venv, other versions of QEMU and a kernel in .cache.  Nothing else is touched but
# for the system's own packages, where this user may install them.

PYTHON ?= python3
TESTS ?= tests
TRIALS ?= $(if $(filter 1,$(shell nproc)),1,2)
SECONDS ?= 600

VENV := .venv
BIN := $(VENV)/bin
HOST := tests/rig/host.sh

.PHONY: help setup qemus kernel demo test test-kernel lint bench docs fuzz clean

help:
	@echo "make demo   move a real QEMU guest between two daemons, there and back, and show how;"
	@echo "            GUEST=memory moves qmigd's own guest, which takes no QEMU"
	@echo "make test   run all tests; TESTS=tests.test_rig for some of them;"
	@echo "            TRIALS=1 for all of them in one process, where two at once are too much"
	@echo "make test-kernel  only those that boot a kernel with everything; KERNEL=bookworm-backports,"
	@echo "            or any other suite of Debian's, chooses which (now: $(or $(KERNEL),bookworm))"
	@echo "make lint   check style (ruff) and types (mypy)"
	@echo "make bench  measure, and write one table"
	@echo "make fuzz   look for bytes that what reads QEMU's stream cannot take; SECONDS=600"
	@echo "make docs   build the documentation into build/docs"
	@echo "make clean  remove everything that the others have made"
	@echo
	@echo "Each of them can be the first: it sets up what it needs in .venv and .cache."
	@echo "PYTHON=/path/to/python3.11 chooses the Python to start with (now: $(PYTHON))."

demo: setup
	@if [ "$(GUEST)" != memory ]; then $(HOST) qemu-system-x86_64; fi
	@$(BIN)/python -m tests.demo $(if $(GUEST),--guest $(GUEST))

test: kernel
ifeq ($(TESTS)$(TRIALS),tests2)
	@$(BIN)/python -m tests.rig.trials
else
	@$(BIN)/trial --temp-directory=build/trial $(TESTS)
endif

test-kernel: kernel
	@$(BIN)/trial --temp-directory=build/trial tests.kernel

lint: setup
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@$(BIN)/mypy --no-error-summary

bench: setup kernel
	@$(HOST) qemu-system-x86_64 socat haproxy
	@$(BIN)/python -m tests.bench

# Anew each time (-E): some pages are made out of the code, and Sphinx looks at their own age only.
docs: setup
	@$(BIN)/sphinx-build -q -E -W --keep-going -d build/doctrees docs build/docs
	@echo "build/docs/index.html"

# What it finds is in build/fuzz.  `python -m tests.fuzz --merge` makes a new corpus out of that.
fuzz: $(VENV)/.fuzz
	@$(BIN)/python -m tests.fuzz $(SECONDS)

clean:
	@rm -rf $(VENV) .cache build dist *.egg-info
	@rm -rf .hypothesis .mypy_cache .ruff_cache _trial_temp*
	@find . -name __pycache__ -prune -exec rm -rf {} +
	@find . -name dropin.cache -exec rm -f {} +

# -- set-up ---------------------------------------------------------------------

# Compiled even where Python is told to leave nothing behind (PYTHONDONTWRITEBYTECODE): the
# tests start a thousand daemons, some of them on an emulated CPU.
setup: $(VENV)/.qmigd
	@$(BIN)/python -m compileall -q qmigd tests

qemus: setup
	@$(HOST) qemu-system-x86_64 ip
	@$(BIN)/python -m tests.rig.qemus
	@$(BIN)/python -m tests.rig.ssh

kernel: qemus
	@$(HOST) /etc/libibverbs.d/rxe.driver /usr/lib/python3/dist-packages/pyverbs
	@$(BIN)/python -m tests.rig.kernel
	@$(BIN)/python -m tests.rig.rdma

$(VENV)/.python:
	@$(HOST) --python $(PYTHON)
	@echo "Making $(VENV) with $$($(PYTHON) --version) ..."
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.requirements: requirements.txt $(VENV)/.python
	@echo "Installing Python packages ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.qmigd: setup.py pyproject.toml $(VENV)/.requirements
	@echo "Installing qmigd from this tree ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -e .
	@touch $@

$(VENV)/.fuzz: tests/fuzz/requirements.txt $(VENV)/.qmigd
	@echo "Installing the fuzzer ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@
