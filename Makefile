# `make run` does the main job, `make test` runs all tests. Both make the environment when it is missing.
DATASET ?= phantom
SEED ?= 0
VARIANT ?= cmi_mtl
ARGS ?=
PYTHON ?= $(shell command -v python3.11 || command -v python3)
SHARED := $(abspath ../shared)
export CMI_MTL_DATA ?= $(if $(wildcard $(SHARED)/datasets),$(SHARED)/datasets)
export CMI_MTL_WEIGHTS ?= $(if $(wildcard $(SHARED)/weights),$(SHARED)/weights)
export TOKENIZERS_PARALLELISM ?= false
BIN := .venv/bin

.PHONY: run test tables readme clean

run: .venv/ready
	$(BIN)/python -m cmi_mtl.run nbs/experiments/train.ipynb -p dataset $(DATASET) -p variant $(VARIANT) -p seed $(SEED) \
	  -p data_options '{}' -p epochs null $(ARGS)

test: .venv/ready
	$(BIN)/nbdev_test --n_workers 2 --pause 0.2
	$(BIN)/python -m pytest

readme: .venv/ready
	$(BIN)/python tests/readme.py

clean:
	rm -rf .venv runs build *.egg-info

.venv/ready: pyproject.toml .ci/constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v[:2] == (3, 11) else f"error: Python 3.11 is needed, {sys.executable} is {v[0]}.{v[1]}. Give its path: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv .venv
	@echo "installing the pinned packages (about 3 minutes, 2 GB)"
	$(BIN)/python -m pip install --progress-bar off -q -c .ci/constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --progress-bar off -q -c .ci/constraints.txt -e '.[dev]'
	@touch $@
