# Everything lives in .venv; the stamp file is newer than what decides on its contents, so a second run installs nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test matrix resume fuzz docs lint clean

demo: $(STAMP)
	$(BIN)/qakd demo

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist worksteal

matrix: $(STAMP)
	$(BIN)/python -m pytest -m '' tests/conformance/test_matrix.py

resume: $(STAMP)
	$(BIN)/python -m pytest -m '' tests/training/test_resume.py tests/training/test_two_processes.py

fuzz: $(STAMP)
	$(BIN)/python -m pytest -m fuzz tests/deploy/test_fuzz.py

docs: $(STAMP)
	$(BIN)/python -m mkdocs build --strict

lint: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/mypy

docs/report.png: runs/demo/report.html
	chromium --headless --hide-scrollbars --window-size=1280,2000 --screenshot=$@ file://$(abspath $<)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch torchvision
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache
