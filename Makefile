# Every target sets up what it needs: a virtual environment and the tested versions.
#   make run     warm start, then the main job, on the embedded default
#   make test    every test
#   make check   format, lint, types, import directions, fast tests
#   make bench   the side-by-side measurements under benchmarks/; hours. make bench BENCH=--quick: minutes
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A folder or an index with CPU builds of torch, for a CPU machine whose default index serves CUDA:
#   make run TORCH_SOURCE="--extra-index-url https://..."
TORCH_SOURCE ?=
# DeepSpeed is built for the accelerator it is told of; on a machine with a GPU: make test DEEPSPEED=
DEEPSPEED ?= DS_ACCELERATOR=cpu
# RUN passes more settings to the main job: make run RUN="--max_steps 20 --report_to tensorboard"
RUN ?=
# BENCH=--quick runs every benchmark at its smallest size; the recorded results stay, but for those of diffusion.
BENCH ?=
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: run test check bench setup clean
setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml setup.py constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt $(TORCH_SOURCE) torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt $(TORCH_SOURCE) -e ".[train,recipes,diffusion,track,test]"
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt wheel "setuptools<80"
	$(DEEPSPEED) $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt $(TORCH_SOURCE) \
	    --no-build-isolation -e ".[deepspeed]"
	@touch $@

run: setup
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	    recipes/train.py --config recipes/arithmetic/fast.yaml $(RUN)

# Tests use one thread each and no network: every model is built from its config.
test check: export OMP_NUM_THREADS := 1
test check: export HF_HUB_OFFLINE := 1
# What DeepSpeed compiles is this environment's alone; a lock left by a killed build elsewhere does not matter.
test check: export TORCH_EXTENSIONS_DIR := $(abspath $(VENV))/torch_extensions
test: setup
	$(BIN)/python -m pytest -n 2

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy & types=$$!; $(BIN)/python -m pytest -n 2 -m "not slow"; tests=$$?; wait $$types && exit $$tests

bench: setup
	$(BIN)/python benchmarks/engine.py $(BENCH)
	$(BIN)/python benchmarks/samplers.py $(BENCH)
	$(BIN)/python benchmarks/search.py $(BENCH)
	$(BIN)/python benchmarks/trace.py $(BENCH)
	$(BIN)/python benchmarks/update.py --device cpu --threads 1 $(BENCH)
	$(BIN)/python -m benchmarks.processes $(BENCH)
	$(BIN)/python benchmarks/allocation_arms.py --seeds 5 --max_steps 60 $(BENCH)
	$(BIN)/python benchmarks/recipe_arms.py --seeds 5 --tokens 150000 $(BENCH)
	$(BIN)/python benchmarks/image_arms.py $(BENCH)
	$(BIN)/python benchmarks/diffusion.py --quick --threads 1

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
