# make demo, make test: each sets up what it needs in .venv. PYTHON chooses the interpreter.
# WHEELS=folder: no network. .venv then uses the packages that PYTHON has, torch and triton say, and takes what is
# missing from the folder.
PYTHON ?= python3
WHEELS ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
ifdef WHEELS
INSTALL := $(PIP) install --quiet --no-index --find-links $(WHEELS) --no-build-isolation
else
INSTALL := $(PIP) install --quiet --constraint constraints.txt
endif
# A test process per core; `loadfile` runs a file in one of them, so that slow module fixtures are made once. In the order
# of their names: the last are those of doctests, which take a moment, so that no process ends long after the others.
PYTEST := $(BIN)/python -m pytest
PARALLEL := -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder

.PHONY: demo test slow test-trainers slow-trainers docs lint bench gpu gpu-tests gpu-memcheck gpu-racecheck gpu-bench clean

demo: .venv/run
	$(BIN)/nanopack pack

test: .venv/dev
	$(PYTEST) $(PARALLEL)

# Longer runs of what `make test` runs in short: the property tests with ten times as many examples, all combinations of
# choices, more kills, more targets, full sizes.
slow: .venv/dev
	$(PYTEST) $(PARALLEL) -m '(slow or hypothesis) and not trainers' --hypothesis-profile slow

# Trainers train, are killed and resume: minutes, and Lightning besides, so not part of `make test`.
test-trainers: .venv/trainers
	$(PYTEST) $(PARALLEL) -m 'trainers and not slow'

# The trainers' longest runs, killed dozens of times.
slow-trainers: .venv/trainers
	$(PYTEST) $(PARALLEL) -m 'trainers and slow'

# The documentation, in site/; a warning is an error.
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

# Each stage alone, then the whole next to what it replaces: minutes, best on an otherwise idle machine.
bench: .venv/dev
	$(BIN)/python -m pytest bench --benchmark-only --benchmark-columns=median,iqr,ops,rounds
	$(BIN)/nanopack bench --plot bench.png

# What only a GPU can show. Every step runs, also after one that fails; the target fails if any of them did.
gpu: .venv/gpu
	$(MAKE) --keep-going gpu-tests gpu-memcheck gpu-racecheck gpu-bench

# Each in a process of its own: an illegal access ends CUDA for the whole process.
gpu-tests: .venv/gpu
	$(PYTEST) -m gpu --continue-on-collection-errors

# Uncached, so that each tensor is an allocation of its own and an access beyond its end is seen. A minute each: rows with
# a mask (129) and without (640), and a counter; gpu-tests compares all lengths.
gpu-memcheck gpu-racecheck: gpu-%: .venv/gpu
	@if command -v compute-sanitizer; then \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $* --error-exitcode 1 \
	    $(PYTEST) tests/kernels -k 'agree and (129 or 640) or counter_names'; \
	else echo "$@ skipped: compute-sanitizer, which comes with the CUDA toolkit, is not on PATH"; fi

# About 100 s. The tables are for reading, each as soon as it is measured; the figures go to gpu.json, if all are there.
gpu-bench: .venv/gpu
	$(BIN)/nanopack bench --only gpu | tee gpu.txt | sed -u '/^{/d'
	@tail -n 1 gpu.txt | grep '^{' > gpu.json

# A .pth file and not --system-site-packages, which misses what PYTHON has where it is a virtual environment's; and
# PYTHON's pip and setuptools, since a setuptools that comes with venv is too old to build with.
.venv/bin/python:
	$(PYTHON) -m venv $(if $(WHEELS),--without-pip) .venv
ifdef WHEELS
	$(PYTHON) -c 'import sys; [print(p) for p in sys.path if p.endswith("-packages")]' \
	  > "$$($@ -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/python.pth"
endif

.venv/run: .venv/bin/python setup.py pyproject.toml constraints.txt
	$(INSTALL) --editable .
	touch $@

.venv/dev: .venv/bin/python setup.py pyproject.toml constraints.txt
	$(INSTALL) --editable '.[dev]'
	touch $@ .venv/run

.venv/trainers: .venv/dev
	$(INSTALL) --editable '.[trainers]'
	touch $@

.venv/docs: .venv/dev
	$(INSTALL) --editable '.[docs]'
	touch $@

# As little as the tests on a GPU need: not what the other tests compare with.
.venv/gpu: .venv/bin/python setup.py pyproject.toml constraints.txt
	$(INSTALL) --editable '.[gpu]'
	touch $@ .venv/run

clean:
	rm -rf .venv site build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
