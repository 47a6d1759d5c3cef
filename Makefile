# make install   create .venv with pinned dependencies and the compiled extensions
# make demo      train a small model on real text with tp 2 x pp 2 on a CPU, tune it on questions, and test it
# make test      run all tests (downloads 110 MB of real tokenizers and weights once: make assets)
# make soak      kill ranks at random a hundred times, and run every campaign of random variations in full
# make check     lint, formats, types, import floors, names of tests
# make slurm     test a preempted job on a two-node Slurm cluster in this machine (root, Debian; 1 to 2 minutes)
# make format    fix formats          make clean    remove everything made here except runs/
#
# PYTHON=python3.12 make install     use another interpreter
# SYSTEM_TORCH=1 make install        use the torch that is already installed (GPU machines), 2.9 to 2.13

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := setup.py pyproject.toml requirements.txt requirements-torch.txt $(shell find csrc -type f)
CPP := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')

.PHONY: install assets demo test soak slurm check format clean

install: $(STAMP)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo "error: megalite needs Python 3.11 or later; try PYTHON=python3.12 make install"; exit 1; }
	@$(PYTHON) -m venv $(if $(SYSTEM_TORCH),--system-site-packages) $(VENV) || { echo "error: no venv; on Debian and Ubuntu: apt-get install python3-venv python3-dev"; exit 1; }

$(STAMP): $(BIN)/python $(SOURCES)
	@command -v c++ >/dev/null || { echo "error: no C++ compiler; on Debian and Ubuntu: apt-get install g++"; exit 1; }
ifdef SYSTEM_TORCH
	@$(BIN)/python -c 'import torch; v = tuple(int(x) for x in torch.__version__.split("+")[0].split(".")[:2]); assert (2, 9) <= v < (2, 14)' 2>/dev/null || { echo "error: SYSTEM_TORCH=1 needs a torch of 2.9 to 2.13 in $(PYTHON)"; exit 1; }
else
	$(BIN)/python -m pip install -q -r requirements-torch.txt
endif
	$(BIN)/python -m pip install -q -r requirements.txt
	$(BIN)/python -m pip install -q --no-build-isolation --no-deps -e .
	@touch $@

demo: install
	@$(BIN)/python examples/demo.py

# reference packages, and real tokenizers, weights and instruction rows in ~/.cache/megalite/assets, for the tests
assets: install $(VENV)/.assets
	@$(BIN)/python tests/assets.py

$(VENV)/.assets: $(STAMP) requirements-test.txt
	$(BIN)/python -m pip install -q -r requirements-test.txt
	@touch $@

# single-process tests run in parallel; those that start ranks run one at a time
test: assets
	@$(BIN)/python -m pytest tests/unit -n 2
	@$(BIN)/python -m pytest tests/dist

soak: assets
	@KILLS=50 $(BIN)/python -m pytest -s tests/dist/test_checkpoint_kills.py
	@SOAK=1 $(BIN)/python -m pytest -s --timeout 3600 $(shell grep -rl --include='test_*.py' 'from campaign import' tests)

slurm: install
	@$(BIN)/python tests/slurm/two_nodes.py

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy megalite tools examples docs benchmarks
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/python -m pytest tests/unit/test_floors.py tests/unit/test_mirror.py

format:
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

clean:
	rm -rf $(VENV) build *.egg-info megalite/*.so .cache .pytest_cache .mypy_cache .ruff_cache
