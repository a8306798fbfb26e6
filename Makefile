# Everything lives in .venv; the stamp file is newer than what decides on its contents, so a second run installs nothing.
# The lowest versions that pyproject.toml allows: make test CONSTRAINTS=lowest.txt VENV=.venv-lowest
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DELETE_ON_ERROR:
.PHONY: demo test matrix resume fuzz docs lint clean

demo: $(STAMP)
	$(BIN)/qakd demo

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist worksteal

matrix: $(STAMP)
	$(BIN)/python -m pytest -m '' tests/test_matrix.py

resume: $(STAMP)
	$(BIN)/python -m pytest -m '' tests/test_resume.py tests/test_two_processes.py

fuzz: $(STAMP)
	$(BIN)/python -m pytest -m fuzz tests/test_fuzz.py

docs: $(STAMP)
	$(BIN)/python -m mkdocs build --strict

lint: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/mypy

docs/report.png: runs/demo/report.html
	chromium --headless --hide-scrollbars --window-size=1280,2000 --screenshot=$@ file://$(abspath $<)

$(STAMP): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) torch torchvision
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev]'
	touch $(STAMP)

lowest.txt: pyproject.toml .ci/lowest.py
	$(PYTHON) .ci/lowest.py > $@

clean:
	rm -rf $(VENV) .venv-lowest lowest.txt build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache
