# `make demo` and `make test` work in a fresh clone: each makes .venv and installs what it needs.
# Another interpreter: make clean, then make PYTHON=python3.12 test   (Python 3.11 or newer)

PYTHON ?= python3
# The newest of everything in place of the pins: make CONSTRAINTS=/dev/null test
CONSTRAINTS ?= constraints.txt
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c $(CONSTRAINTS)

.PHONY: demo test lint bench docs targets targets-test tflite-test release-check clean

demo: .venv/demo.done
	$(BIN)/python examples/cifar10/train.py

# One process a core, up to eight. Each begins with as many files as the others, whose tests share what
# is compiled; a process that is done takes over half of what another has left.
test: .venv/test.done
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal $(ARGS)

lint: .venv/test.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/bench.done
	$(BIN)/python -m benchmarks $(ARGS)

# The compilers for an H100 and a TPU, on any Linux machine. Apart from .venv, where JAX would take
# them for devices of this machine.
targets: .venv-targets/done
	.venv-targets/bin/python -m benchmarks.studies.compiled $(or $(ARGS),h100 v5e)

targets-test: .venv-targets/done
	.venv-targets/bin/python -m pytest tests/accelerators

# LiteRT's converter asks for older packages than the other tests.
tflite-test: .venv-tflite/done
	.venv-tflite/bin/python -m pytest tests/export/test_tflite.py

docs: .venv/docs.done
	$(BIN)/python docs/notebook.py
	$(BIN)/sphinx-build --fail-on-warning docs docs/_build

# The wheel in empty environments: each Python, with the oldest and the newest jax and flax.
release-check: .venv/release.done
	$(BIN)/python -m tests.release $(ARGS)

clean:
	rm -rf .venv .venv-targets .venv-tflite .pytest_cache .mypy_cache .ruff_cache docs/_build build dist

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo.done: .venv/bin/python pyproject.toml constraints.txt
	@echo "Installing jaxbn and its examples into .venv (about a minute the first time) ..."
	$(PIP) -e '.[examples]'
	touch $@

.venv/test.done: .venv/bin/python pyproject.toml constraints.txt
	@echo "Installing jaxbn, its examples and its tests into .venv (about a minute the first time) ..."
	$(PIP) -e '.[examples,test]'
	touch $@

.venv/bench.done: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) -e '.[examples,test,bench]'
	touch $@

.venv/docs.done: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) -e '.[docs]'
	touch $@

.venv/release.done: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) -e '.[release]'
	touch $@

.venv-targets/done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-targets
	.venv-targets/bin/python -m pip --disable-pip-version-check install --quiet \
		-c $(CONSTRAINTS) -e '.[bench,targets]'
	touch $@

.venv-tflite/done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-tflite
	.venv-tflite/bin/python -m pip --disable-pip-version-check install --quiet \
		-c $(CONSTRAINTS) -e '.[tflite]' pytest
	touch $@
