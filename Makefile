# A machine without a GPU is spared gigabytes of CUDA packages with
#   make align TORCH="torch --index-url <PyTorch's CPU index>"
PYTHON ?= python3
TORCH ?= torch==2.13.0
ARGS ?=
PYTEST_ARGS ?= -n 2

BIN := .venv/bin
INSTALLED := .venv/installed
INSTALLED_DEV := .venv/installed-dev

.PHONY: align test test-lowest test-newest clean
.DELETE_ON_ERROR:

align: $(INSTALLED)  ## train and align a planner on Nav1D; ARGS="--controller policy" for a policy
	$(BIN)/dmc-hub align --task nav1d-full --output-dir runs/nav1d-full $(ARGS)

test: export OMP_NUM_THREADS = 1
test: $(INSTALLED_DEV)  ## check style, types and floors, then run the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# A part of the tests on the lowest versions that pyproject.toml allows, and on the newest that there are.
REDUCED := tests/test_checkpoint.py tests/test_cli.py tests/test_scheduler.py tests/test_adapters.py \
	tests/data/test_episodes.py tests/trainers/test_base.py tests/hub/test_roundtrip.py tests/faults/test_datasets.py
RESOLUTION_lowest := lowest-direct
RESOLUTION_newest := highest

test-lowest test-newest: export OMP_NUM_THREADS = 1
test-lowest test-newest: test-%:
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install uv
	.venv-$*/bin/uv pip install --python .venv-$*/bin/python --resolution $(RESOLUTION_$*) --upgrade --editable . \
		"pytest>=8.2" "pytest-timeout>=2.3" "hypothesis>=6.100" "h5py>=3.11"
	.venv-$*/bin/python -m pip list
	.venv-$*/bin/python -m pytest -o filterwarnings=default $(REDUCED)  # old libraries warn of newer ones

clean:  ## remove the environment, builds and caches; runs/ is kept
	rm -rf .venv .venv-lowest .venv-newest build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and alone: its build (CPU or CUDA) is chosen by $(TORCH), and the package then finds it installed.
$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install --editable .
	touch $@

$(INSTALLED_DEV): $(INSTALLED)
	$(BIN)/python -m pip install --editable ".[dev]"
	touch $@
