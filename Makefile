# Everything from a bare clone: `make demo`, `make test`.
PYTHON ?= python3
# The version that edgelm is tested with; users' ranges are in pyproject.toml.
TORCH ?= torch==2.13.0
BIN := .venv/bin

.PHONY: install bindings demo test slow lint types docs wheel clean

install: .venv/installed

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "edgelm is developed on Python 3.11 or newer. Name one with PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[all,dev]"
	touch $@

# TensorRT's Python modules (21 MB with polygraphy), for the tests of their interface; they run nothing.
bindings: .venv/tensorrt-11/stubs/libcuda.so.1

.venv/tensorrt-11/stubs/libcuda.so.1: tests/tensorrt/bindings.py | install
	-$(BIN)/python tests/tensorrt/bindings.py .venv

demo: install
	$(BIN)/edgelm demo --force

test: install bindings
	$(BIN)/python -m pytest -n 2 --dist loadfile

slow: install
	$(BIN)/python -m pytest -m slow

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: install
	$(BIN)/mypy

# The site in build/site; a link that leads nowhere is an error. The variable only silences a notice of its theme.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

wheel: install
	rm -rf dist
	$(BIN)/python -m build --wheel --outdir dist .

clean:
	rm -rf .venv build dist demo-output *.egg-info .mypy_cache .ruff_cache .pytest_cache
