# Everything installs into .venv from the pinned set; nothing else on the machine is touched.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: demo install test test-faults test-peers test-fast lint format clean

demo: .venv/.installed
	$(BIN)/darkroom run demo

install: .venv/.installed

# uv installs the set several times faster than pip does; where only pip's own settings know the package index, pip does it.
# Compiled once here: a run starts dozens of processes, and where PYTHONDONTWRITEBYTECODE is set each would compile all it imports.
define install_set
$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt --editable '$(1)' \
	|| $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '$(1)'
endef

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] < (3, 13) else "Python 3.11 or 3.12 is needed: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv .venv
	$(call install_set,.)
	touch $@

.venv/.installed-dev: .venv/.installed
	$(call install_set,.[dev])
	touch $@

# Two files of tests at a time: starting Ray and Prefect is mostly one process that imports.
SIDE_BY_SIDE := -n 2 --dist loadfile --no-loadscope-reorder

# Hundreds of processes import what is here; where PYTHONDONTWRITEBYTECODE is set, each would compile it.
test: .venv/.installed-dev
	$(BIN)/python -m compileall -q data flows stages training
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not peers and not faults"

test-peers: .venv/.installed-dev
	$(BIN)/python -m pytest -m peers

test-faults: .venv/.installed-dev
	$(BIN)/python -m pytest -m faults

test-fast: .venv/.installed-dev
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not slow and not peers"

lint: .venv/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: .venv/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf runs .pytest_cache .ruff_cache .hypothesis
