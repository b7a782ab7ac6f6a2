PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint clean

demo: $(VENV)/installed
	$(BIN)/surgeon demo demo-output --overwrite

test: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_architecture.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --site-dir build/site
	$(BIN)/clang-format --dry-run --Werror $$(find csrc tests/kernels -name '*.cu' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.h')

# The markers are written last, so an interrupted install is taken up again.
INSTALL = $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable

$(VENV)/installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(INSTALL) .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(INSTALL) ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
