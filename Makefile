# Two commands: `make demo` and `make test`. Each builds what it needs.

PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e

.PHONY: demo lint test test-slow parity clean

demo: .venv/.demo
	$(BIN)/python train.py digits
	$(BIN)/python sample.py runs/digits --guidance 2 --frames 9 --out demo.png
	@echo "From noise to digits, one class a row: runs/digits/demo.png"

lint: .venv/.lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check

test: .venv/.test
	$(PYTEST) -m 'not slow and not parity'

test-slow: .venv/.test
	$(PYTEST) -m 'slow and not parity'

parity: .venv/.parity
	PYTHONPATH=.venv/plan $(BIN)/python -m pytest -m parity

clean:
	rm -rf .venv runs

$(BIN)/python:
	$(PYTHON) -m venv .venv

.venv/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) .
	@touch $@

.venv/.lint: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt ruff
	@touch $@

.venv/.test: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) '.[test]'
	@touch $@ .venv/.demo

.venv/.parity: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) '.[test,parity]'
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt \
		--no-deps --upgrade --target .venv/plan libtpu jax-cuda13-pjrt  # apart: they print in CPU runs
	@touch $@ .venv/.demo .venv/.test
