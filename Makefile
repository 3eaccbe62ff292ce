# Everything from a fresh clone: `make demo`. Needs git, make and Python 3.11 or 3.12, nothing else.

CHECKPOINT := checkpoints/quire-small
REPOSITORY := model_repository
BIN        := .venv/bin
INSTALLED  := .venv/.installed

# The first Python of a supported version that has the shared library which Triton's Python backend loads.
CHECK_PYTHON := import sys, sysconfig, ctypes.util as c; v = "%d.%d" % sys.version_info[:2]; \
  sys.exit(v not in ("3.11", "3.12") or not (sysconfig.get_config_var("Py_ENABLE_SHARED") or c.find_library("python" + v)))
PYTHON ?= $(shell for python in python3.11 python3.12 python3 python; do \
  if $$python -c '$(CHECK_PYTHON)' 2>/dev/null; then command -v $$python; break; fi; done)

.PHONY: help install demo test lint bench gpu-check
help:
	@echo 'make install   make the environment in .venv from requirements.lock'
	@echo 'make demo      build the small checkpoint, serve it, stream a completion, stop'
	@echo 'make test      run every test'
	@echo 'make lint      check style and types'
	@echo 'make bench     measure the scheduler and a running server'
	@echo 'make gpu-check STAGE=builder|kernels|8b|hosted|7b|precision|narrow|weights|kv OUT=dir   check and measure on an NVIDIA GPU'

install: $(INSTALLED)

$(INSTALLED): requirements.lock pyproject.toml
	@test -n '$(PYTHON)' || { echo 'Quire needs Python 3.11 or 3.12 with its shared library (on Debian and Ubuntu:' \
	  'apt-get install python3 python3-venv libpython3.11); name another one with make PYTHON=…' >&2; exit 1; }
	@rm -f $@
	@if $(BIN)/python -c '$(CHECK_PYTHON)' 2>/dev/null; then echo '== .venv: using the one that is there'; \
	  elif command -v uv >/dev/null; then echo '== .venv: making it with uv and $(PYTHON)'; \
	    uv venv --quiet --clear --python '$(PYTHON)' .venv; \
	  else echo '== .venv: making it with $(PYTHON)'; '$(PYTHON)' -m venv --clear .venv || { \
	    echo 'this Python cannot make environments (on Debian and Ubuntu: apt-get install python3-venv)' >&2; exit 1; }; fi
	@echo '== installing the locked dependencies (a few GB the first time, most of it torch)'
	@if command -v uv >/dev/null; then export VIRTUAL_ENV="$$PWD/.venv"; \
	    uv pip install --no-deps --require-hashes -r requirements.lock && uv pip install --quiet --no-deps -e .; \
	  else \
	    $(BIN)/python -m pip install --disable-pip-version-check --no-deps --require-hashes -r requirements.lock && \
	    $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .; fi
	@touch $@
	@echo '== the environment is ready: $(BIN)/quire --help'

demo: $(INSTALLED)
	@$(BIN)/python examples/demo.py $(CHECKPOINT) $(REPOSITORY)

test: $(INSTALLED)
	@echo '== running every test'
	@$(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=worksteal

lint: $(INSTALLED)
	@echo '== style'
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@echo '== types'
	@$(BIN)/mypy backends build client checkpoints examples tests

bench: $(INSTALLED)
	@echo '== scheduler' >&2
	@$(BIN)/python tests/benchmarks/scheduler.py
	@echo '== serving' >&2
	@$(BIN)/quire build $(CHECKPOINT) --output $(REPOSITORY)
	@$(BIN)/python tests/benchmarks/serving.py --repository $(REPOSITORY)

# Needs TensorRT beside what is installed, and a GPU. PLANS=dir keeps the plans of 16 GB for the next stage.
gpu-check: $(INSTALLED)
	@test -n '$(STAGE)' -a -n '$(OUT)' || { echo 'usage: make gpu-check STAGE=… OUT=dir [PLANS=dir]' >&2; exit 2; }
	@$(BIN)/python tests/benchmarks/gpu_check.py --stage '$(STAGE)' --out '$(OUT)' $(if $(PLANS),--reuse '$(PLANS)')
