# make train   set-up, then the whole pipeline with the settings in luigi.cfg  [DATASET=name]
# make card    draft a data card for a folder of photographs: NAME=name FOLDER=path [NOUN=bird]
# make test    set-up, then the tests, two files at a time
# make help    what else there is

PYTHON ?= python3
BIN := .venv/bin
# A machine with an NVIDIA driver gets the CUDA build of vLLM, and any other the CPU build.
DEVICE ?= $(if $(wildcard /dev/nvidia0),cuda,cpu)
READY := .venv/.ready-$(DEVICE)

# Options for every resolution of packages: the overrides and the pinned versions.
RESOLVED = --override requirements/overrides.txt --constraint requirements/$(1).txt

.PHONY: help setup card train test pythons lint audit chaos clean

train: $(READY)
	@$(BIN)/python -c "import pipeline"  # refuses a luigi.cfg that Luigi cannot read
	@$(BIN)/luigi --module pipeline.tasks TrainDiVE $(if $(DATASET),--dataset $(DATASET))
	@$(BIN)/python -m pipeline results $(if $(DATASET),--dataset $(DATASET))

card: $(READY)
	@test -n "$(NAME)" -a -n "$(FOLDER)" || { echo "error: make card NAME=my_birds FOLDER=path"; exit 1; }
	@$(BIN)/python -m tasks.draft_card "$(NAME)" "$(FOLDER)" $(if $(NOUN),--noun "$(NOUN)") $(if $(KIND),--kind "$(KIND)")

# A test that ends its process ends the run: with a new process pytest-xdist can wait for ever.
test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart 0

pythons: $(READY)
	@$(BIN)/python -m tests.interpreters $(DEVICE) $(call RESOLVED,$(DEVICE))

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy pipeline tasks training data_cards
	@for build in cpu cuda; do $(BIN)/python -m tests.pins $$build $(call RESOLVED,$$build) || exit 1; done

# Look up known vulnerabilities of the pinned versions. A failed look-up is an error.
AUDIT := pip-audit==2.10.1 --strict --no-deps --disable-pip --progress-spinner off
audit: $(READY)
	@$(BIN)/uvx --quiet $(AUDIT) --requirement requirements/$(DEVICE).txt 2>.venv/audit.log || { \
	  if grep -qE 'known vulnerabilit' .venv/audit.log; then cat .venv/audit.log; \
	  else echo "error: the list of known vulnerabilities cannot be read (.venv/audit.log says why);" \
	    "run this where https://pypi.org can be reached"; fi; exit 1; }

chaos: $(READY)
	$(BIN)/python -m tests.chaos $(if $(LONG),--long) $(FAULTS)

setup: $(READY)

$(READY): pyproject.toml requirements/$(DEVICE).txt requirements/overrides.txt
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; install Python 3.11, 3.12 or 3.13"; exit 1; }
	@# An interrupted set-up may have left an interpreter without pip. Then the environment is made anew.
	@test ! -e .venv || $(BIN)/python -m pip --version >/dev/null 2>&1 || rm -rf .venv
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "error: $(PYTHON) is $$($(PYTHON) -V); name another: make PYTHON=python3.11 (or 3.12, 3.13)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv >/dev/null || { rm -rf .venv; \
	  echo "error: $(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt-get install" \
	    "$$($(PYTHON) -c 'import sys; print("python{}.{}-venv".format(*sys.version_info))')"; exit 1; }
	@$(BIN)/python -m tasks.runtime.machine $(DEVICE)
	@test -x $(BIN)/uv || echo "fetching uv, which installs the packages"
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@echo "installing into .venv ($(DEVICE)): about 6 GB, some minutes on a slow line; cut off, it goes on from there"
	@# The CPU build of vLLM pins a torch without torchvision's operators. The overrides replace it by a
	@# build that works with and without a GPU. Bytecode is compiled here, once: each stage is a process,
	@# and with PYTHONDONTWRITEBYTECODE set each would compile everything again.
	@quiet=--quiet; test ! -t 2 || quiet=; set -x; \
	$(BIN)/uv pip install $$quiet --compile-bytecode --python .venv $(call RESOLVED,$(DEVICE)) --editable ".[$(DEVICE),test]" || { \
	  { set +x; } 2>/dev/null; echo "error: not all packages could be installed; what is downloaded is kept: run the same" \
	    "make again, and it goes on from there"; exit 1; }
	@echo "loading torch for the first time"
	@$(BIN)/python -m tasks.runtime.machine torch
	@rm -f .venv/.ready-*
	@touch $@

clean:
	@test ! -d artifacts || chmod -R u+w artifacts
	rm -rf artifacts

help:
	@sed -n 's/^# make/make/p' Makefile
	@echo "make pythons the quick tests on each other Python (3.11 to 3.13) of this machine"
	@echo "make lint    format, lint and types, and whether the pinned versions fit together"
	@echo "make audit   known vulnerabilities of the pinned versions"
	@echo "make chaos   faults done on purpose, and counted  [LONG=1] [FAULTS='kills flips']"
	@echo "make clean   delete all artifacts"
