# Two commands on a bare machine: `make repro` and `make test`. Both set up .venv first, once, with the releases of
# requirements.lock. CPU=1, when .venv is made, takes PyTorch without CUDA, which is 5 GB less: make repro CPU=1
PYTHON ?= python3
CPU_INDEX ?= https://download.pytorch.org/whl/cpu
BIN := .venv/bin
PORT := 5000
PIP := $(BIN)/python -m pip install --disable-pip-version-check
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: repro paper test lint ui lock clean

repro: .venv/installed
	dvc repro
	@echo "The page: file://$(CURDIR)/reports/index.html"

# Both published tables; goes on where it stopped. SET adds settings: make paper SET='-S seed=[0]'
# On several GPUs cells are trained side by side, where Ray is installed.
SEVERAL = python -c 'import importlib.util, sys, torch; sys.exit(not importlib.util.find_spec("ray") or torch.cuda.device_count() < 2)'
paper: .venv/installed
	for preset in cub200_512 cub200_64; do \
		if $(SEVERAL); then \
			dvc exp run -S +paper=$$preset $(SET) build_lists && python -m pipeline.launch && dvc repro; \
		else \
			dvc exp run -S +paper=$$preset $(SET); \
		fi || exit 1; \
	done
	PYTHONPATH=src python -m pipeline.tabulate cub200 --all

test: .venv/installed
	pytest -n auto --dist loadfile --no-loadscope-reorder --durations=10

lint: .venv/installed
	ruff check
	ruff format --check
	mypy

# In an environment of one's own, which is active, no other is made
ui: $(if $(wildcard .venv/installed)$(if $(VIRTUAL_ENV)$(CONDA_PREFIX),,none),.venv/installed)
	PYTHONPATH=src python -m pipeline.ui --port $(PORT)

.venv/installed: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	@echo "Making .venv: a few minutes, $(if $(filter 1,$(CPU)),2,6.5) GB of disk"
	$(PYTHON) -m venv .venv
	$(PIP) --quiet 'pip>=25.1' # from there on it shows how far it is when it installs, too
ifeq ($(CPU),1)
	grep -E '^torch(vision)?==' requirements.lock > .venv/torch.lock
	grep -vE '^(torch|torchvision|triton)==|^(nvidia|cuda)-' requirements.lock > .venv/rest.lock
	$(PIP) --no-deps --index-url $(CPU_INDEX) -r .venv/torch.lock
	$(PIP) --no-deps -r .venv/rest.lock -e .
else
	$(PIP) --no-deps -r requirements.lock -e .
endif
	$(BIN)/python -c 'import torchvision' || { echo 'PyTorch does not load: docs/faults.md'; exit 1; }
	touch $@

# Writes requirements.lock again after pyproject.toml changed; newer releases of everything: make lock UPGRADE=--upgrade
lock:
	$(PYTHON) -m venv .cache/uv
	.cache/uv/bin/python -m pip install --quiet --disable-pip-version-check uv
	.cache/uv/bin/uv pip compile --quiet --universal --python-version 3.11 --extra dev --no-annotate --no-emit-index-url \
		--custom-compile-command 'make lock' $(UPGRADE) pyproject.toml -o requirements.lock

clean:
	rm -rf .venv .cache .checkpoints
