# Two commands on a bare machine: `make repro` and `make test`. Both set up .venv first, once.
PYTHON ?= python3
BIN := .venv/bin
PORT := 5000
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: repro paper test lint ui clean

repro: .venv/installed
	dvc repro
	@echo "The page: file://$(CURDIR)/reports/index.html"

# Both published tables; goes on where it stopped. SET adds settings: make paper SET='-S seed=[0]'
paper: .venv/installed
	dvc exp run -S +paper=cub200_512 $(SET)
	dvc exp run -S +paper=cub200_64 $(SET)
	PYTHONPATH=src python -m pipeline.tabulate cub200 --all

test: .venv/installed
	pytest

lint: .venv/installed
	ruff check

ui: .venv/installed
	PYTHONPATH=src python -m pipeline.ui --port $(PORT)

.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

clean:
	rm -rf .venv .cache .checkpoints
