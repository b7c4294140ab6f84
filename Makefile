# `make run` does the main job, `make test` runs all tests. Both make the environment first when it is missing.

# What each target reads. Another variable on the command line would change nothing, so it is an error (below).
READS_run := DATASET VARIANT SEED ARGS
READS_paper := DATASETS STUDY J ARGS
READS_tables := DATASETS J ARGS
READS_publish := RUN ARGS
READS_notebooks := ARGS
READS_ask := CMI_MTL_MODEL
READS := $(foreach goal,$(MAKECMDGOALS),$(READS_$(goal))) PYTHON CMI_MTL_DATA CMI_MTL_WEIGHTS CMI_MTL_CACHE OMP_NUM_THREADS OMP_WAIT_POLICY
UNREAD := $(filter-out $(READS),$(foreach v,$(.VARIABLES),$(if $(filter command,$(origin $(v))),$(v))))

override DATASET := $(or $(DATASET),phantom)
override VARIANT := $(or $(VARIANT),cmi_mtl)
override SEED := $(or $(SEED),0)
IS_311 := -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null
PYTHON := $(or $(PYTHON),$(shell for p in python3.11 python3 python; do $$p $(IS_311) && echo $$p && break; done),python3)
BIN := .venv/bin

ifneq ($(UNREAD),)
ODD := $(firstword $(UNREAD))
NEAREST := $(shell $(PYTHON) -c 'import difflib, sys; _, a, *b = sys.argv; print(*difflib.get_close_matches(a.upper(), b, 1))' '$(ODD)' $(READS))
$(error make $(or $(MAKECMDGOALS),help) does not read $(ODD).$(if $(NEAREST), Is $(NEAREST) meant?) It reads $(strip $(READS)). \
  What another program reads from the environment goes before make)
endif

# Data and weights: what the environment names, else what lies in ../shared. An empty variable counts as none.
# The shell looks, since make's own functions take a blank in a path for the end of a name.
found = $(shell cd ../shared/$(1) 2>/dev/null && pwd)
CMI_MTL_DATA := $(or $(CMI_MTL_DATA),$(call found,datasets))
CMI_MTL_WEIGHTS := $(or $(CMI_MTL_WEIGHTS),$(call found,weights))
TOKENIZERS_PARALLELISM := false
PIP_DISABLE_PIP_VERSION_CHECK := 1
# Waiting threads sleep instead of spinning, which beside another busy process costs a factor of 10 to 20.
OMP_WAIT_POLICY ?= PASSIVE
export CMI_MTL_DATA CMI_MTL_WEIGHTS TOKENIZERS_PARALLELISM PIP_DISABLE_PIP_VERSION_CHECK OMP_WAIT_POLICY

.PHONY: help run paper tables test lint lab docs ask publish notebooks readme clean
.DEFAULT_GOAL := help

help:
	@echo 'make run                    train on the phantom data, score, show the result (15 to 30 minutes)'
	@echo 'make run DATASET=vqa_rad    the same on VQA-RAD; slake, ovqa, vqa_rad_hub likewise. Also SEED=1, VARIANT=pooled'
	@echo '                            or no_cifr, only_cifr, ...: rows of VARIANTS in nbs/30_settings.ipynb'
	@echo 'make run DATASET=table ARGS="-p data_root my.csv"     on your own table; ARGS takes any parameter of the notebook'
	@echo 'make paper DATASETS="vqa_rad slake phantom"     all runs and tables that are left. J=2 at once, STUDY=smoke: nbs/46_study.ipynb'
	@echo 'make tables                 make the tables and pictures of figures/ anew from figures/records/ (about a minute)'
	@echo 'make test                   run all tests: the notebooks, then tests/. make lint: ruff alone'
	@echo 'make ask                    serve the page that answers questions about pictures'
	@echo 'make docs                   build the site, _docs/index.html. make lab: the notebooks in JupyterLab'
	@echo 'make publish RUN=folder     copy a run'"'"'s record to figures/records/, without texts or pixels; over another one: ARGS=--replace'
	@echo 'make notebooks              execute the notebooks whose code changed, store their outputs; all: ARGS=--all'
	@echo 'make readme                 make README.md from nbs/index.ipynb'
	@echo 'make clean                  delete the environment; runs/ stays'
	@echo 'The first call makes the environment in .venv: about 3 minutes, 2 GB. Python 3.11 and pip are all it needs.'

# The phantom's model is so small that a second thread costs more than it gives (0.42 against 0.30 s a step).
run: THREADS = $(if $(filter phantom,$(DATASET)),OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1})
run: .venv/ready
	@$(THREADS) $(BIN)/python -m cmi_mtl.run nbs/experiments/train.ipynb -p dataset $(DATASET) -p variant $(VARIANT) -p seed $(SEED) \
	  $(ARGS)

# J runs at once, by default one for each core; each takes one thread. ARGS goes to Snakemake.
paper: .venv/ready
	@$(BIN)/python -m cmi_mtl.study $(DATASETS) --study $(or $(STUDY),full) $(if $(J),-j $(J)) $(ARGS)

# figures/ anew from figures/records/ alone: no data, no weights, nothing trained.
tables: .venv/ready
	@$(BIN)/python -m cmi_mtl.study $(or $(DATASETS),phantom vqa_rad slake) --tables $(if $(J),-j $(J)) $(ARGS)

# Two notebooks at a time share the cores. In tests/ a file opened without its encoding is an error (pyproject.toml).
test: HALF = $(or $(OMP_NUM_THREADS),$$($(BIN)/python -c 'import os; print(max(1, os.cpu_count() // 2))'))
test: .venv/ready
	@echo 'tests, part 1 of 2: the notebooks'
	@OMP_NUM_THREADS=$(HALF) $(BIN)/nbdev_test --n_workers 2 --pause 0.2 --do_print --timing
	@echo 'tests, part 2 of 2: tests/'
	@$(BIN)/python -X warn_default_encoding -m pytest

# The layout of notebooks and tests, and what ruff finds in them; `ruff format .` lays out anew.
lint: .venv/ready
	@$(BIN)/ruff format --check --quiet . || { echo 'error: not laid out as ruff does: .venv/bin/ruff format .' >&2; exit 1; }
	@$(BIN)/ruff check .

lab: .venv/ready
	@$(BIN)/jupyter lab nbs

docs: .venv/ready
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo 'built: _docs/index.html. Its search needs a server: $(BIN)/python -m http.server -d _docs'

ask: .venv/ready
	@JUPYTER_PATH="$(CURDIR)/.venv/share/jupyter" $(BIN)/voila nbs/ask.ipynb --Voila.tornado_settings='{"websocket_max_message_size": 300000000}'

publish: .venv/ready
	@$(BIN)/python -m cmi_mtl.tables "$(or $(RUN),$(error Name a finished run: make publish RUN=runs/train/vqa_rad/cmi_mtl/seed0))" $(ARGS)

notebooks: .venv/ready
	@$(BIN)/nbdev_export
	@$(BIN)/python tests/notebooks.py $(ARGS)

readme: .venv/ready
	@$(BIN)/python tests/readme.py

clean:
	rm -rf .venv build *.egg-info

# A .venv that is half made, or of another Python, is made anew. Where Python comes without ensurepip (Debian), its own pip
# puts one there.
.venv/ready: pyproject.toml .ci/constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v[:2] == (3, 11) else f"error: Python 3.11 is needed, {sys.executable} is {v[0]}.{v[1]}. Give the path of one: make PYTHON=/path/to/python3.11")' \
	  || { command -v $(PYTHON) >/dev/null || echo 'error: there is no $(PYTHON). Install Python 3.11, or give its path: make PYTHON=/path/to/python3.11' >&2; exit 1; }
	@$(BIN)/python $(IS_311) && $(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	  echo 'making the environment in .venv'; \
	  if $(PYTHON) -c 'import ensurepip' 2>/dev/null; then $(PYTHON) -m venv --clear .venv; \
	  else $(PYTHON) -m venv --clear --without-pip .venv && $(PYTHON) -m pip --python $(BIN)/python install -q pip; fi; }
	@echo 'installing the pinned packages, 1 of 2: torch'
	@$(BIN)/python -m pip install -c .ci/constraints.txt torch==2.13.0
	@echo 'installing the pinned packages, 2 of 2: the others'
	@$(BIN)/python -m pip install -c .ci/constraints.txt -e '.[dev]'
	@touch $@
