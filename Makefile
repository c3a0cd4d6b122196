# make pretrain   train the tiny preset on this machine, under a plan: make pretrain PLAN="--tensor 2 --data 2"; Ctrl-C saves
#                 and stops; the same command resumes a run, also one that was killed; FRESH=1 begins it anew
# make test       everything that CI runs: lint, format, types, tests; of a test with many cases, those that fit in its time
# make long       every case of every test, and many more draws; with SLICE=3/8 the third eighth of them
# make matrix     every kind of model under every release of transformers that is supported; with VERSIONS="4.53.3 5.23.0"
#                 or MODELS="llama gpt2" only these, with TORCH="2.11.0" under that as well, with JSON=file written there too
# make gpu        on a machine with a GPU: is everything right there, and how fast are the kernels? Ends within 8 minutes
# make gpu-train  training steps of LLaMA shapes on one GPU beside HuggingFace, torch.compile and FSDP2. Ends within 9 minutes
# make compare    training steps beside HuggingFace, DDP, FSDP2, tensor parallel and pipelining of torch, Accelerate and DeepSpeed
#                 where they are installed, in turns on CPU ranks: make compare COMPARE="--quick" takes under 5 minutes
# make docs       build these pages as a site in build/site; make docs-serve shows them and follows what is edited
# make format     rewrite the sources as `make test` wants them
#
# Each does its own set-up, once: a virtual environment in .venv with the versions that constraints.txt pins. The two for GPUs
# take what is there, installed or not: a Python that has torch for the GPU, make gpu PYTHON=python3, and further options,
# make gpu GPU="--dry-run".

PYTHON ?= python3
PLAN ?= --tensor 2
TRAIN ?= --config tiny --max-length 256 --batch-size 8 --steps 300 --warmup 20 --lr 2e-3

BIN := .venv/bin
READY := .venv/installed

# Where a run keeps its checkpoints, its model, its log and its chart.
NOTHING :=
RUN ?= runs/$(or $(subst $(NOTHING) ,_,$(strip $(subst --,,$(PLAN)))),one-rank)

# The variables of a run that were given, so that the command can be given again.
OVERRIDES = $(foreach name,TRAIN RUN,$(if $(filter command environment,$(word 1,$(origin $(name)))),$(name)="$($(name))"))

# One process for each rank of the plan: the product of its degrees.
RANKS = $(shell echo "$(PLAN)" | awk -F '[ =]+' '{n = 1; for (i = 1; i < NF; i++) if ($$i ~ /^--(tensor|data|pipeline)$$/) n *= $$(i + 1); print n}')
THREADS = $(shell echo "$$(getconf _NPROCESSORS_ONLN) $(RANKS)" | awk '{n = int($$1 / $$2); print (n > 1 ? n : 1)}')

# What `make matrix` is asked for, as options.
MATRIX = $(if $(VERSIONS),--versions $(VERSIONS)) $(if $(MODELS),--models $(MODELS)) $(if $(TORCH),--torch $(TORCH)) \
	$(if $(JSON),--json $(JSON))

# The Python that is named, else that of .venv where there is one.
NAMED := $(filter command environment,$(word 1,$(origin PYTHON)))
GPU_PYTHON = $(if $(NAMED),$(PYTHON),$(or $(wildcard $(BIN)/python),$(PYTHON)))

.PHONY: pretrain test long matrix gpu gpu-train compare docs docs-serve format clean

# Ctrl-C would kill the ranks in the middle of a step. In the background they do not get it, and the trap sends them SIGTERM
# instead: they end the step, save and stop. A second Ctrl-C ends torchrun. A signal also ends `wait`, hence the loop.
pretrain: $(READY)
	$(if $(FRESH),rm -rf $(RUN))
	OMP_NUM_THREADS=$(THREADS) $(BIN)/torchrun --standalone --signals-to-handle SIGTERM --nproc-per-node $(RANKS) \
		examples/llama/pretrain.py $(TRAIN) $(PLAN) \
		--checkpoint-dir $(RUN) --save-interval 25 --save-dir $(RUN)/model --log-file $(RUN)/log.jsonl & \
	run=$$!; trap 'trap "kill -TERM $$run" INT TERM HUP; kill -TERM $$(pgrep -P $$run || echo $$run)' INT TERM HUP; \
	wait $$run; status=$$?; \
	while kill -0 $$run 2>/dev/null; do wait $$run; status=$$?; done; exit $$status
	@echo '            make pretrain PLAN="--data 2 --zero 3"   another plan'
	@echo '            make pretrain PLAN="$(PLAN)" $(if $(OVERRIDES),$(OVERRIDES) )FRESH=1   this run anew'
	@command -v shardcomp >/dev/null || echo '            source .venv/bin/activate   lets this shell find shardcomp'

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -q -n 2 --dist worksteal --durations=20

long: $(READY)
	SHARDCOMP_LONG=1 SHARDCOMP_SLICE="$(SLICE)" $(BIN)/pytest -q -n 2 --dist worksteal --durations=20

matrix: $(READY)
	PYTHONPATH=tests $(BIN)/python -m system.matrix.run $(MATRIX)

gpu:
	$(GPU_PYTHON) benchmarks/gpu/check.py $(GPU)

gpu-train:
	$(GPU_PYTHON) benchmarks/gpu/train_benchmark.py $(GPU)

compare: $(READY)
	$(BIN)/python benchmarks/compare.py $(COMPARE)

docs: $(READY)
	$(BIN)/mkdocs build --strict --quiet

docs-serve: $(READY)
	$(BIN)/mkdocs serve

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .matrix build runs *.egg-info shardcomp/_kernels.so

# torch comes first and alone: resolved together with ranges that admit a newer release, pip may fetch that one as well.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("shardcomp needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt $$(grep '^torch==' constraints.txt)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,docs]'
	touch $@
