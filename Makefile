# Environments are built once and reused: .venv, and others on top of it. `make help` lists the targets.
#
#   PYTHON=python3.12    the interpreter the environments are made from (3.10 or newer; .venv-next: 3.11 or newer)
#   TORCH=torch==2.11.0  a PyTorch other than the pinned one; TORCH=system: that of PYTHON, as in a container image
#   GSM8K=data/gsm8k     the folder with train.jsonl and test.jsonl of GSM8K, for `make gsm8k`
#   ARGS="..."           more arguments for the command of a target
#
# After changing PYTHON or TORCH, remove the environments first.

PYTHON ?= python3
TORCH ?= -r requirements/torch.txt
ARGS ?=
GSM8K ?= data/gsm8k
# The processes of a run share the cores; more threads in each would only compete for them.
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL := help
.PHONY: help venv venv-next venv-te venv-cuda venv-hf venv-engine venv-trl demo demo-vllm gsm8k bench bench-log-probs bench-engine bench-trl study planner grid test test-next test-triton test-hf test-engine test-peers fuzz test-slurm test-te dry-cuda check docs doctor gpu gpu-hour clean

help: ## This list
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "  make %-15s %s\n", $$1, $$2 }'

venv: .venv/.installed ## Install the pinned packages into .venv

venv-next: .venv-next/.installed ## The same with the next Megatron-Core, into .venv-next

venv-te: .venv-te/.installed ## Transformer Engine's Python layers without CUDA, in two versions, for `make test-te`, into .venv-te

venv-cuda: .venv-cuda/.installed ## A CUDA build of torch (5.7 GB) and Transformer Engine's Python layers, for `make dry-cuda`, into .venv-cuda

venv-hf: .venv-hf/.installed ## The packages of .venv, transformers, datasets and wandb, for `make test-hf`, into .venv-hf

venv-engine: .venv-engine/.installed ## The packages of .venv and vLLM for CPUs, for `make test-engine`, into .venv-engine

venv-trl: .venv-trl/.installed ## The packages of .venv, TRL and verl's source, for `make bench-trl` and `make test-peers`, into .venv-trl

demo: .venv/.installed ## Train a tiny mixture-of-experts model on two CPU processes (ARGS="train.steps=3")
	.venv/bin/torchrun --nproc_per_node 2 -m gspo_megatron.train --config examples/cpu_tiny_moe.yaml $(ARGS)

demo-vllm: .venv/.installed .venv-engine/.installed ## The demo with rollouts from vLLM on the same machine (docs/engines.md)
	.venv/bin/torchrun --nproc_per_node 2 -m gspo_megatron.train --config examples/cpu_tiny_vllm.yaml $(ARGS)

gsm8k: .venv/.installed ## Train a small model on GSM8K (GSM8K=folder): tokenizer, warm start, GSPO, plot; minutes
	.venv/bin/python tools/train_tokenizer.py $(GSM8K)/train.jsonl --fields question answer --vocab-size 2048 \
		--output runs/gsm8k/tokenizer.model
	.venv/bin/torchrun --nproc_per_node 2 -m gspo_megatron.train --config examples/gsm8k_tiny.yaml \
		data.train=$(GSM8K)/train.jsonl data.eval=$(GSM8K)/test.jsonl $(ARGS)
	.venv/bin/python tools/plot_run.py runs/gsm8k --output runs/gsm8k/plot.png --title "GSM8K, 3.9M-parameter MoE"

STEP = -m benchmarks.step --config examples/cpu_tiny_moe.yaml
ALONE = parallel.ep=1
# Large enough that the vocabulary is most of the work.
LARGE = model.hidden_size=256 model.num_attention_heads=8 model.num_query_groups=4 model.head_dim=32 \
	model.expert_ffn_size=512 model.vocab_size=32768 model.max_sequence_length=128 rollout.max_new_tokens=64 \
	rollout.prompts_per_step=8 data.task.min_length=20 data.task.max_length=60
RUNS = benchmarks/results/bench_step

bench: .venv/.installed ## Time a step of the demo, also against plain pre-training, a checkpoint, and log-probs on a small shape
	.venv/bin/torchrun --nproc_per_node 2 $(STEP) --steps 20 --output $(RUNS).json
	.venv/bin/python $(STEP) $(ALONE) --steps 20 --output $(RUNS)_one_process.json
	.venv/bin/python $(STEP) $(ALONE) --against pretraining --steps 40 --warmup 5 --output $(RUNS)_pretraining.json
	.venv/bin/python $(STEP) $(ALONE) --against pretraining $(LARGE) --output $(RUNS)_pretraining_large.json
	.venv/bin/python $(STEP) $(ALONE) --against pretraining $(LARGE) train.log_prob_store_gib=1 \
		--output $(RUNS)_pretraining_large_kept.json
	.venv/bin/python -m benchmarks.step --from $(RUNS).json $(RUNS)_one_process.json $(RUNS)_pretraining.json \
		$(RUNS)_pretraining_large.json $(RUNS)_pretraining_large_kept.json --markdown docs/benchmarks.md
	.venv/bin/python -W ignore -m benchmarks.log_probs.run --quick
	.venv/bin/python -W ignore -m benchmarks.checkpoint --output benchmarks/results/bench_checkpoint.json
	.venv/bin/python -W ignore -m benchmarks.step_state --output benchmarks/results/step_state.json
	.venv/bin/python -W ignore -m benchmarks.hugging_face --output benchmarks/results/hugging_face.json --markdown docs/models.md
	.venv/bin/python -W ignore -m benchmarks.numerics --output benchmarks/results/numerics.json --markdown docs/numerics.md
	.venv/bin/python -W ignore -m benchmarks.routing_replay --output benchmarks/results/routing_replay.json --markdown docs/stability.md
	.venv/bin/python -W ignore -m benchmarks.objective --output benchmarks/results/objective.json --markdown docs/benchmarks.md
	.venv/bin/python -W ignore -m benchmarks.sampler_routing --output benchmarks/results/sampler_routing.json --markdown docs/stability.md
	.venv/bin/python -m benchmarks.prompts --output benchmarks/results/prompts.json --markdown docs/benchmarks.md

bench-log-probs: .venv/.installed ## Log-probs at a vocabulary of 151,936 against Megatron-Core and other frameworks; half an hour
	.venv/bin/python -W ignore -m benchmarks.log_probs.run --threads 2 --repeats 5 --output benchmarks/results/log_probs_cpu.json $(ARGS)
	.venv/bin/python -W ignore -m benchmarks.log_probs.run --threads 2 --scaling --output benchmarks/results/log_probs_scaling.json
	.venv/bin/python -m benchmarks.log_probs.run --from benchmarks/results/log_probs_cpu.json benchmarks/results/log_probs_scaling.json \
		--markdown docs/benchmarks.md

bench-engine: .venv-engine/.installed ## Time weights on their way to an engine, 200 syncs of a real vLLM server, and the demo by what samples
	.venv-engine/bin/python -W ignore -m benchmarks.weight_sync --output benchmarks/results/weight_sync.json --markdown docs/engines.md $(ARGS)
	.venv-engine/bin/python -W ignore -m benchmarks.demo_engines --output benchmarks/results/demo_engines.json --markdown docs/engines.md

bench-trl: .venv-trl/.installed ## Time a step against one of TRL's GRPOTrainer, on one process
	.venv-trl/bin/python $(STEP) $(ALONE) --against trl --steps 20 --warmup 3 --output $(RUNS)_trl.json
	.venv-trl/bin/python $(STEP) $(ALONE) --against trl --steps 20 --warmup 3 train.skip_zero_gradient=false \
		--output $(RUNS)_trl_all.json
	OMP_NUM_THREADS=2 .venv-trl/bin/python $(STEP) $(ALONE) --against trl --steps 20 --warmup 3 \
		--output $(RUNS)_trl_2threads.json
	.venv-trl/bin/python -m benchmarks.step --from $(RUNS)_trl.json $(RUNS)_trl_all.json $(RUNS)_trl_2threads.json \
		--markdown docs/benchmarks.md

study: .venv/.installed ## Compare algorithms over seeds (docs/study.md), two runs at a time; hours, Ctrl-C and the same command go on
	.venv/bin/python tools/compare_algorithms.py examples/sweeps/figure2.yaml --document docs/study.md $(ARGS)
	cp runs/figure2/report.json benchmarks/results/figure2.json
	.venv/bin/python -W ignore -m benchmarks.ratio_spread --output benchmarks/results/ratio_spread.json --markdown docs/study.md
	.venv/bin/python tools/compare_algorithms.py examples/sweeps/updates.yaml --document docs/study.md $(ARGS)
	cp runs/updates/report.json benchmarks/results/updates.json
	.venv/bin/python tools/compare_algorithms.py examples/sweeps/noise.yaml --document docs/study.md $(ARGS)
	cp runs/noise/report.json benchmarks/results/noise.json

planner: .venv/.installed ## Write the tables of docs/planner.md: published numbers, scaling; minutes
	.venv/bin/python -m benchmarks.planner

grid: .venv/.installed ## Compare every layout of up to 8 processes with one process, and runs on ten of them; half an hour
	.venv/bin/python -W ignore tools/layout_grid.py --output benchmarks/results/grid.json --table docs/layouts.md $(ARGS)
	.venv/bin/python -W ignore tools/run_layouts.py --output benchmarks/results/layouts.json

# Installed aside, for the Python and torch of .venv. TESTED_TRITON in log_probs/backends.py names the same ones.
TRITONS = 3.5.1 3.6.0 3.8.0 3.9.0

# One worker for each core, at most eight. Tests that start processes often wait for them, and another test has the cores
# meanwhile. worksteal gives a worker a run of tests that share fixtures, and one that has finished takes tests from
# another. ARGS="-n 0" stays in one process, for a debugger.
WORKERS = -n logical --maxprocesses 8 --dist worksteal

test: .venv/.installed ## Run the test-suite (ARGS="-k objective")
test-next: .venv-next/.installed ## Run what depends on Megatron-Core with the next one
# A test file that never reaches Megatron-Core, by any import, has nothing new to show there: tests/support/imports.py
# reads that from the imports. A file that ARGS names runs all the same.
test-next: SELECTED = --depends-on-megatron
test test-next:
	$(<D)/bin/python -m pytest $(WORKERS) $(SELECTED) $(ARGS)

# The oldest and the newest one also run the kernels, in Triton's interpreter, and fail on purpose.
test-triton: $(TRITONS:%=.venv-triton/%/.installed) ## Compile the log-prob kernels for GPUs with each supported Triton
	@set -e; for version in $(TRITONS); do \
		export PYTHONPATH=.venv-triton/$$version; \
		.venv/bin/python -c 'import triton; assert triton.__version__ == "'$$version'"; print("Triton", triton.__version__)'; \
		tests=tests/log_probs/test_triton_compile.py; \
		case $$version in $(firstword $(TRITONS)) | $(lastword $(TRITONS))) \
			tests="$$tests tests/log_probs/test_triton_kernels.py tests/log_probs/test_backends.py" ;; esac; \
		.venv/bin/python -m pytest $(WORKERS) $$tests $(ARGS); \
	done

# What transformers computes is the reference for weights, log-probs, gradients and tokens; the other tests skip it, and
# wandb, which writes its files here. With the next Megatron-Core, every variant of every family on tp 2.
test-hf: .venv-hf/.installed .venv-next/.installed ## Compare model families with transformers; metrics in wandb
	.venv-hf/bin/python -m pytest $(WORKERS) tests/data/test_hugging_face.py tests/data/test_chat_templates.py tests/data/test_rows.py \
		tests/models/test_families.py tests/mcore/test_weights.py tests/mcore/test_against_transformers.py \
		tests/mcore/test_hugging_face.py tests/monitor/test_sinks.py \
		tests/rewards/test_reward_model.py tests/rollout/test_stopping.py tests/rollout/test_sampling.py tests/test_score.py \
		tests/test_convert.py tests/test_real_model.py $(ARGS)
	PYTHONPATH="$$($(call PACKAGES_OF,.venv-next))" .venv-hf/bin/python -m pytest $(WORKERS) \
		tests/mcore/test_against_transformers.py -k "gradients and tp2 and not (ep2 or pp2 or etp2)" $(ARGS)

# Much of their time is the start of servers, one core each; the tests of a file share one.
test-engine: .venv-engine/.installed ## Let vLLM load the folders that runs write, and sample for runs
	.venv-engine/bin/python -m pytest -n logical --maxprocesses 2 --dist loadfile tests/engine $(ARGS)

test-peers: .venv-trl/.installed ## Compare the rows of the objective with the loss functions of TRL and verl
	.venv-trl/bin/python -W ignore -m pytest -n 0 tests/objective/test_against_peers.py $(ARGS)

fuzz: .venv/.installed ## Hostile settings, data, checkpoint headers and rewards: 5,000 cases (ARGS="--seed 7")
	.venv/bin/python tools/fuzz.py $(ARGS)

test-slurm: .venv/.installed ## Run the batch script on a real Slurm of two nodes on this machine (root or sudo; Debian)
	.venv/bin/python -m pytest -m slurm tests/slurm $(ARGS)

# The newest Transformer Engine with the older Megatron-Core runs everything; the other pairs what can differ. PYTHONPATH
# puts another version before the installed one.
TEST_TE = .venv-te/bin/python -W ignore -m pytest -m te $(WORKERS)
OLDER_TE = .venv-te/te-2.10
OLDER_MEGATRON = .venv-te/megatron

test-te: .venv-te/.installed ## Compare Transformer Engine's Python layers with the local ones, on the CPU; two versions of each
	PYTHONPATH=tests/te/stand_in:$(OLDER_MEGATRON) $(TEST_TE) tests/te $(ARGS)
	PYTHONPATH=tests/te/stand_in $(TEST_TE) tests/te -k smoke $(ARGS)
	PYTHONPATH=tests/te/stand_in:$(OLDER_MEGATRON):$(OLDER_TE) $(TEST_TE) tests/te -k smoke $(ARGS)
	PYTHONPATH=tests/te/stand_in:$(OLDER_TE) $(TEST_TE) tests/te -k smoke $(ARGS)

DRY_BUILD = .venv-cuda/bin/python -W ignore tools/dry_cuda.py --output benchmarks/results/dry_cuda.json --table docs/dry_cuda.md
DRY = PYTHONPATH=tests/te/stand_in $(DRY_BUILD)
# Recipe, its number of GPUs, layers: some ranks at full depth in both formats, and all ranks with these few layers. Of
# random weights, whatever folder a recipe starts from.
WITHOUT_FOLDER = model.hf=null model.preset=$(1) data.chat=false
define DRY_RUNS
	$(DRY) --config examples/$(1)_gspo.yaml --world-size $(2) precision.fp8=none $(WITHOUT_FOLDER)
	$(DRY) --config examples/$(1)_gspo.yaml --world-size $(2) precision.fp8=blockwise $(WITHOUT_FOLDER)
	$(DRY) --config examples/$(1)_gspo.yaml --world-size $(2) --ranks all --layers $(3) $(WITHOUT_FOLDER)
endef

dry-cuda: .venv-cuda/.installed ## Build the large recipes rank by rank from fake tensors, without a GPU; by hand, monthly; half an hour
	$(call DRY_RUNS,qwen3_30b_a3b,32,4)
	$(call DRY_RUNS,qwen3_235b_a22b,128,4)
	$(call DRY_RUNS,deepseek_v3,512,16)
	$(DRY_BUILD) --config examples/qwen3_30b_a3b_gspo.yaml --world-size 32 --without-te parallel.cp=1 \
		$(call WITHOUT_FOLDER,qwen3_30b_a3b)

check: .venv/.installed ## Lint, format and types: ruff and mypy
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

docs: .venv/.installed ## Write the pages of settings, metrics and algorithms from their tables, and the picture of the rooms
	.venv/bin/python tools/settings_page.py
	.venv/bin/python tools/metrics_page.py
	.venv/bin/python tools/algorithms_page.py
	.venv/bin/python tools/draw_rooms.py

doctor: .venv/.installed ## Can a run start here? What is wrong, and what to do
	.venv/bin/python -m gspo_megatron.doctor $(ARGS)

gpu: .venv/.installed ## Run the tests that need a CUDA device
	@.venv/bin/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make gpu: this torch sees no CUDA device"); \
		print("Tests marked gpu, on", torch.cuda.get_device_name())'
	.venv/bin/python -m pytest -m gpu $(ARGS)

gpu-hour: .venv/.installed ## Measure on a GPU what only a GPU can show; at most 28 minutes (ARGS="--parts kernels update")
	.venv/bin/python -m benchmarks.gpu_hour $(ARGS)

clean: ## Remove caches and build output; the environments and runs/ stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find gspo_megatron tests tools benchmarks -name __pycache__ -prune -exec rm -rf {} +

ifeq ($(TORCH),system)
VENV_FLAGS = --system-site-packages
INSTALL_TORCH = python -c 'import torch'
else
INSTALL_TORCH = pip install $(TORCH)
endif

# An environment of its own: torch first, then Megatron-Core, then this package.
.venv/.installed: MEGATRON = -r requirements/megatron.txt
.venv/.installed: PACKAGE = -e '.[code,data,dev,json,math,plot,remote,server]'
.venv-cuda/.installed: TORCH = -r requirements/torch-cuda.txt
.venv-cuda/.installed: MEGATRON = --no-deps --ignore-requires-python -r requirements/megatron-next.txt
.venv-cuda/.installed: PACKAGE = -c requirements/trl.txt -e '.[dev]' transformers
# torch has brought the Triton that it needs.
.venv-cuda/.installed: LAST = grep -v ^triton requirements/te.txt | .venv-cuda/bin/pip install --no-deps -r /dev/stdin
.venv-cuda/.installed: requirements/torch-cuda.txt requirements/megatron-next.txt requirements/te.txt requirements/trl.txt
.venv/.installed: requirements/megatron.txt
.venv/.installed .venv-cuda/.installed: setup.py requirements/torch.txt requirements/pins.txt
	$(PYTHON) -m venv $(VENV_FLAGS) $(@D)
	$(@D)/bin/$(INSTALL_TORCH)
	$(@D)/bin/pip install -c requirements/pins.txt $(MEGATRON)
	$(@D)/bin/pip install -c requirements/pins.txt $(PACKAGE)
	$(LAST)
	touch $@

# An environment on top of another (BASE): it sees the packages of that one, and its own come first. So torch is installed
# once, and an environment on top takes seconds.
PACKAGES_OF = $(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
PIP = $(@D)/bin/pip install -c requirements/pins.txt
NO_DEPS = $(@D)/bin/pip install --no-deps --ignore-requires-python
.venv-next/.installed: BASE = .venv
.venv-next/.installed: ADD = $(NO_DEPS) -r requirements/megatron-next.txt
.venv-next/.installed: .venv/.installed requirements/megatron-next.txt
.venv-hf/.installed: BASE = .venv
.venv-hf/.installed: ADD = $(PIP) -c requirements/trl.txt datasets transformers -r requirements/wandb.txt
.venv-hf/.installed: .venv/.installed requirements/trl.txt requirements/wandb.txt
.venv-engine/.installed: BASE = .venv
.venv-engine/.installed: ADD = $(NO_DEPS) -r requirements/engine.txt
.venv-engine/.installed: .venv/.installed requirements/engine.txt
.venv-trl/.installed: BASE = .venv
.venv-trl/.installed: ADD = $(PIP) -c requirements/trl.txt accelerate datasets transformers trl && \
	$(NO_DEPS) -c requirements/trl.txt verl
.venv-trl/.installed: .venv/.installed requirements/trl.txt
.venv-te/.installed: BASE = .venv-next
.venv-te/.installed: ADD = $(NO_DEPS) -r requirements/te.txt && \
	$(NO_DEPS) --upgrade --target $(@D)/te-2.10 transformer-engine==2.10.0 && \
	$(NO_DEPS) --upgrade --target $(@D)/megatron -r requirements/megatron.txt
.venv-te/.installed: .venv-next/.installed requirements/megatron.txt requirements/te.txt
.venv-next/.installed .venv-te/.installed .venv-hf/.installed .venv-engine/.installed .venv-trl/.installed:
	$(PYTHON) -m venv $(VENV_FLAGS) $(@D)
	echo "import site; site.addsitedir('$$($(call PACKAGES_OF,$(BASE)))')" > "$$($(call PACKAGES_OF,$(@D)))/base.pth"
	$(ADD)
	touch $@

# 200 MB to download and 1 GB on disk for each. The interpreters of the older ones need the older NumPy.
.venv-triton/%/.installed: | .venv/.installed
	.venv/bin/pip install --quiet --no-deps --target $(@D) triton==$* 'numpy<2.4'
	touch $@
