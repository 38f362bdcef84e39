# make demo: set up and run the packed-documents example.   make test: everything CI checks.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TEST_MINUTES ?= 14
# GNU coreutils ends a hung run; macOS has no `timeout`, and goes without.
LIMIT := $(if $(shell command -v timeout),timeout $(TEST_MINUTES)m)
INPUTS := pyproject.toml constraints.txt
# Beside the installed one, those that kernels are compiled with.
TRITONS := $(addprefix $(VENV)/tritons/,$(shell cat tests/backends/tritons.txt))

export OMP_NUM_THREADS ?= 1
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo test lint types unit fuzz format clean

demo: $(VENV)/.installed
	env -u OMP_NUM_THREADS $(BIN)/attncc run examples/packed.attn

test: lint types unit

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy --strict attncc

unit: $(VENV)/.installed-dev $(TRITONS)
	$(LIMIT) $(BIN)/python -m pytest -n 2 -q -m "not slow"
	TRITON_INTERPRET=1 $(LIMIT) $(BIN)/python -m pytest -n 2 -q tests/interpreted

# Tens of thousands of random programs; hours. FUZZ=1000 sets the examples per property.
fuzz: $(VENV)/.installed-dev
	HYPOTHESIS_PROFILE=fuzz FUZZ=$(FUZZ) $(BIN)/python -m pytest -n 2 -q -m fuzz
	TRITON_INTERPRET=1 HYPOTHESIS_PROFILE=fuzz FUZZ=$(FUZZ) \
		$(BIN)/python -m pytest -n 2 -q -m fuzz tests/interpreted

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The stamps are older than their inputs only when the environment must be made anew.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(INPUTS) | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[plot]'
	touch $@

# Where one cannot be fetched, the tests that want it are skipped.
$(VENV)/tritons/%: | $(BIN)/python
	-rm -rf $@.part; $(BIN)/python -m pip install -q --no-deps --target $@.part triton==$* && \
		mv $@.part $@

$(VENV)/.installed-dev: $(INPUTS) | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@ $(VENV)/.installed
