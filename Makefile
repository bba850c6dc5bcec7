# make demo, make test: each sets up what it needs in .venv. PYTHON chooses the interpreter.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test slow lint bench gpu clean

demo: .venv/run
	$(BIN)/nanopack pack

test: .venv/dev
	$(BIN)/python -m pytest

# Longer runs of what `make test` runs in short.
slow: .venv/dev
	$(BIN)/python -m pytest -m slow

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Each stage alone, then the whole beside what it replaces: minutes, best on a machine that does nothing else.
bench: .venv/dev
	$(BIN)/python -m pytest bench --benchmark-only --benchmark-columns=median,iqr,ops,rounds
	$(BIN)/nanopack bench --plot bench.png

# What only a GPU can tell: the tests marked gpu, the memory checker over the kernel, the benchmarks.
gpu: .venv/dev
	$(BIN)/python -m pytest -m gpu

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/run: .venv/bin/python setup.py pyproject.toml constraints.txt
	$(PIP) install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/dev: .venv/bin/python setup.py pyproject.toml constraints.txt
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@ .venv/run

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
