# Everything lives in .venv; the stamp file is newer than what decides on its contents, so a second run installs nothing.
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DELETE_ON_ERROR:
.PHONY: demo check test tests quick test-lowest coverage matrix resume fuzz faults docs lint clean

# A covering part: pure functions and formulas, the loop's pieces, one student of each large toolkit to a proven file.
QUICK := tests/test_losses.py tests/tasks tests/common tests/quantizers/test_quantizers.py tests/augment/test_cmi.py \
	tests/runtimes tests/project/test_moved.py tests/training/test_methods.py tests/training/test_batches.py \
	tests/training/test_objective.py tests/training/test_checkpoint.py

demo: $(STAMP)
	$(BIN)/qakd demo

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

test: check tests

tests: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal

quick: check
	$(BIN)/python -m pytest -n 2 --dist worksteal $(QUICK)
	$(BIN)/python -m pytest tests/conformance/test_matrix.py -k "modelopt-LSQ or pt2e-LSQ"

# The lowest versions that pyproject.toml allows; style and types are checked with current ones alone.
test-lowest: lowest.txt
	$(MAKE) tests CONSTRAINTS=lowest.txt VENV=.venv-lowest

coverage: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal --cov=qakd_plugin --cov-report=term:skip-covered

matrix: $(STAMP)
	$(BIN)/python -m pytest -m matrix

resume: $(STAMP)
	$(BIN)/python -m pytest -m '' tests/training/test_resume.py tests/training/test_two_processes.py \
		tests/cli/test_cli.py::test_the_demo_goes_on_where_it_was_stopped \
		tests/project/test_examples.py::test_a_resumed_run_ends_with_the_same_bits

fuzz: $(STAMP)
	$(BIN)/python -m pytest -m fuzz tests/deploy/test_fuzz.py

# Half an hour; with FAULTS="--record faults.jsonl" it goes on where it was stopped.
# A part of it: make faults FAULTS="--kills 20 --mutants 300 --injections 60"
faults: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore benchmarks/faults.py $(FAULTS)

docs: $(STAMP)
	$(BIN)/python -m mkdocs build --strict

lint: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

docs/report.png: runs/demo/report.html
	chromium --headless --hide-scrollbars $(if $(filter 0,$(shell id -u)),--no-sandbox) --window-size=1280,1640 \
		--screenshot=$@ file://$(abspath $<)

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
