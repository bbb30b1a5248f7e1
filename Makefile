# make train   set-up, then the whole line from the settings in luigi.cfg  [DATASET=name]
# make card    draft a data card for a folder of photographs: NAME=name FOLDER=path [NOUN=bird]
# make test    set-up, then the tests
# make help    what else there is

PYTHON ?= python3
BIN := .venv/bin
# A machine with an NVIDIA driver gets the CUDA build of vLLM, any other the CPU build.
DEVICE ?= $(if $(wildcard /dev/nvidia0),cuda,cpu)
READY := .venv/.ready-$(DEVICE)

.PHONY: help setup card train test lint clean

train: $(READY)
	@$(BIN)/luigi --module pipeline.tasks TrainDiVE $(if $(DATASET),--dataset $(DATASET))
	@$(BIN)/python -m pipeline where $(if $(DATASET),--dataset $(DATASET))

card: $(READY)
	@test -n "$(NAME)" -a -n "$(FOLDER)" || { echo "error: make card NAME=my_birds FOLDER=path"; exit 1; }
	@$(BIN)/python -m tasks.draft_card "$(NAME)" "$(FOLDER)" $(if $(NOUN),--noun "$(NOUN)") $(if $(KIND),--kind "$(KIND)")

test: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy pipeline tasks training data_cards

setup: $(READY)

$(READY): pyproject.toml requirements/$(DEVICE).txt requirements/overrides.txt
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; install Python 3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@echo "installing into .venv ($(DEVICE)): about 6 GB, some minutes on a slow line"
	@# torch first: the CPU build of vLLM pins a torch without torchvision's operators, which the
	@# overrides replace by the build that works on machines with and without a GPU.
	$(BIN)/uv pip install --quiet --python .venv --override requirements/overrides.txt \
	  --constraint requirements/$(DEVICE).txt --editable ".[$(DEVICE),test]"
	@rm -f .venv/.ready-*
	@touch $@

clean:
	@test ! -d artifacts || chmod -R u+w artifacts
	rm -rf artifacts

help:
	@sed -n 's/^# make/make/p' Makefile
	@echo "make lint    format, lint and types"
	@echo "make clean   delete all artifacts"
