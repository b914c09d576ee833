# Every target can be run again: what did not change is not built anew.
# CONTEXT=… REGISTRY=… make demo: use that cluster and a registry that it can pull from.

PYTHON ?= .venv/bin/python
# A machine with a GPU may have torch and triton in a Python of its own, and no network.
GPU_PYTHON ?= python3
GPU_ARGUMENTS = $(if $(OUT),--out $(OUT)) $(if $(COMMIT),--commit $(COMMIT)) $(if $(REHEARSE),--rehearse)
GPU_ENV = PYTHONPATH=kernels:runtime:benchmarks:out/gpu-packages

.PHONY: demo demo-down images manifests test check lint types unit interpreted venv model kubeconfig lock \
  gpu-check gpu-bench gpu-packages gpu-compile gpu-rehearse \
  bench-cpu bench-versions bench-long bench-waste bench-overhead llama-cpp bench-quantization \
  bench-grouped-linear bench-loading-memory bench-kv-cache bench-attention-bytes bench-strangers \
  bench-embed bench-grammar bench-operator soak quant-real quant-tiny fuzz-api playground-check faults \
  clients

demo:           ## the main job: cluster, images, operator, a model, an answer
	@python3 e2e/phases.py demo

images:         ## build Pagoda's images, push them: make images REGISTRY=… TAG=…
	@python3 e2e/cluster images --registry $(REGISTRY) --tag $(TAG)

manifests: venv ## deploy/operator.yaml from the chart, with helm on the PATH
	@PYTHONPATH=e2e $(PYTHON) e2e/manifests.py

demo-down:      ## stop the local cluster and leave nothing of it behind
	@python3 e2e/cluster down

test:           ## everything: units, engine, server, operator, and the system on a real cluster
	@python3 e2e/phases.py test

check: venv     ## lint, types, unit tests: nine minutes on two cores
	@$(MAKE) --no-print-directory lint types unit

lint:
	@$(PYTHON) -m ruff format --check . && $(PYTHON) -m ruff check .
	@$(dir $(PYTHON))lint-imports --no-cache --no-logo

types:
	@$(PYTHON) -m mypy operator/pagoda_operator kernels/pagoda_kernels runtime/pagoda_runtime
	@$(PYTHON) -m mypy -p cluster -p gpu -p faults

unit: interpreted
	@$(PYTHON) -m pytest -q tests -m "not model and not slow"

interpreted:    ## Triton kernels, run by Python on the CPU
	@TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q tests/interpreted \
	  tests/kernels/test_attention_backends.py

venv:           ## .venv with everything, the project editable
	@python3 e2e/phases.py venv

model: venv     ## Gemma 3 270M, converted into the cache folder
	@$(PYTHON) e2e/model.py

kubeconfig:     ## the path of the local cluster's kubeconfig
	@python3 e2e/cluster kubeconfig

bench-cpu: model ## speed against transformers: make bench-cpu [SHAPE=qwen3-1.7b] [ROUNDS=5] [OUT=FILE]
	@$(PYTHON) benchmarks/cpu.py --shape $(or $(SHAPE),gemma-3-270m) --rounds $(or $(ROUNDS),5) \
	  --out $(or $(OUT),out/bench-cpu-$(or $(SHAPE),gemma-3-270m).json)

bench-versions: model ## this tree beside another checkout: make bench-versions OLD=DIR [ROUNDS=10] [OUT=FILE]
	@$(PYTHON) benchmarks/versions.py --old $(OLD) --rounds $(or $(ROUNDS),10) \
	  --out $(or $(OUT),out/bench-versions.json)

bench-long: model ## a 16k-token prompt among decoding requests: make bench-long [OUT=FILE]
	@$(PYTHON) benchmarks/long_prompt.py --out $(or $(OUT),out/bench-long.json)

bench-waste: venv ## slots of the KV cache that are held and not filled: make bench-waste [OUT=FILE]
	@$(PYTHON) benchmarks/waste.py --out $(or $(OUT),out/bench-waste.json)

bench-overhead: model ## what a decode step costs outside the model: make bench-overhead [OUT=FILE]
	@$(PYTHON) benchmarks/overhead.py --out $(or $(OUT),out/bench-overhead.json)

llama-cpp: venv ## in the cache folder: llama.cpp from PyPI, built for this processor in ten minutes
	@$(PYTHON) benchmarks/llamacpp.py

bench-quantization: model llama-cpp ## int8, int4 and fp8 beside bf16 and llama.cpp: make bench-quantization [ROUNDS=5] [OUT=FILE]
	@$(PYTHON) benchmarks/quantization.py --rounds $(or $(ROUNDS),5) \
	  --out $(or $(OUT),out/bench-quantization.json)

bench-grouped-linear: venv ## products with matrices of 4 and 8 bits beside bf16: make bench-grouped-linear [OUT=FILE]
	@$(PYTHON) benchmarks/grouped_linear.py --out $(or $(OUT),out/bench-grouped-linear.json)

bench-loading-memory: venv ## what loading 2 GB takes, by format: make bench-loading-memory [OUT=FILE]
	@$(PYTHON) benchmarks/loading_memory.py --out $(or $(OUT),out/bench-loading-memory.json)

bench-kv-cache: model ## keys and values of 8 bits beside bf16's: make bench-kv-cache [ROUNDS=20] [OUT=FILE]
	@$(PYTHON) benchmarks/kv_cache.py --rounds $(or $(ROUNDS),20) \
	  --out $(or $(OUT),out/bench-kv-cache.json)

bench-embed: venv ## texts that become vectors, against sentence-transformers: make bench-embed [ROUNDS=5] [OUT=FILE]
	@PYTHONPATH=e2e $(PYTHON) benchmarks/embed.py --rounds $(or $(ROUNDS),5) \
	  --out $(or $(OUT),out/bench-embed.json)

quant-real: model ## what independent tools quantize, loaded and measured: make quant-real [KINDS=...] [OUT=FILE]
	@PYTHONPATH=e2e $(PYTHON) benchmarks/quant_real.py $(if $(KINDS),--only $(KINDS)) \
	  --out $(or $(OUT),out/quant-real.json)

quant-tiny: venv ## the same of a tiny model, for the tests: tests/data/quantized
	@PYTHONPATH=e2e $(PYTHON) benchmarks/quant_real.py --tiny tests/data/quantized

bench-attention-bytes: ## what attention on a GPU loads, counted: make bench-attention-bytes [OUT=FILE]
	@TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PYTHON) benchmarks/attention_bytes.py \
	  --out $(or $(OUT),out/bench-attention-bytes.json)

bench-strangers: venv ## what attacks cost a server and its other clients: make bench-strangers [OUT=FILE]
	@$(PYTHON) benchmarks/strangers.py --out $(or $(OUT),out/bench-strangers.json)

bench-grammar: model ## what grammars cost a step, and 300 schemas answered: make bench-grammar [ROUNDS=5] [OUT=FILE]
	@$(PYTHON) benchmarks/grammar.py --rounds $(or $(ROUNDS),5) --out $(or $(OUT),out/bench-grammar.json)

bench-operator: venv ## a thousand LLMServices on an API server of their own, in half an hour: make bench-operator [SERVICES=1000] [OUT=FILE]
	@PYTHONPATH=e2e $(PYTHON) benchmarks/operator_scale.py \
	  --num-services $(or $(SERVICES),1000) --out $(or $(OUT),out/bench-operator.json)

playground-check: venv ## the page at / in a headless Chromium, and its picture for the docs
	@PYTHONPATH=e2e $(PYTHON) e2e/playground.py

clients: venv   ## other people's clients in tool loops, with schemas and embeddings
	@PYTHONPATH=e2e $(PYTHON) e2e/clients.py

fuzz-api: venv  ## schemathesis on the whole API: make fuzz-api [SECONDS=300] [OUT=FILE]
	@PYTHONPATH=e2e $(PYTHON) e2e/fuzz.py --seconds $(or $(SECONDS),300) $(if $(OUT),--out $(OUT))

faults: venv    ## the operator killed at every write, and every API error: make faults [OUT=FILE]
	@PYTHONPATH=e2e $(PYTHON) -m faults --out $(or $(OUT),out/faults.json)

soak: venv      ## a server's memory over 10,000 requests: make soak [OUT=FILE]
	@$(PYTHON) benchmarks/soak.py --out $(or $(OUT),out/soak.json)

gpu-compile: venv ## every kernel of GPU engines, compiled without a GPU: make gpu-compile [OUT=FILE]
	@PYTHONPATH=benchmarks $(PYTHON) -m gpu.compile \
	  --out $(or $(OUT),benchmarks/results/gpu-compile.json)

gpu-rehearse:   ## whole steps on a GPU that is not there, and gpu-bench on a CPU
	@REHEARSE=1 OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q tests/runtime/execution/test_rehearsal.py \
	  tests/runtime/execution/test_pooling_rehearsal.py tests/benchmarks/gpu/test_bench.py

gpu-packages:   ## in out/gpu-packages: what gpu-check and gpu-bench need on a machine without a network
	@python3 e2e/phases.py gpu-packages

gpu-check:      ## on a machine with a GPU: every test that needs one, in nine minutes at most; REHEARSE=1 on a CPU
	@$(GPU_ENV) $(GPU_PYTHON) -m gpu.check $(GPU_ARGUMENTS)

gpu-bench:      ## on a machine with a GPU: speed, in nine minutes at most; REHEARSE=1 on a CPU
	@$(GPU_ENV) $(GPU_PYTHON) -m gpu.bench $(GPU_ARGUMENTS)

lock:           ## renew requirements/*.txt from pyproject.toml
	@for extra in operator router runtime; do \
	  uv pip compile -q pyproject.toml --extra $$extra --generate-hashes --no-header --no-annotate \
	    --python-version 3.11 -o requirements/$$extra.txt; done
	@uv pip compile -q --group gpu --no-deps --generate-hashes --no-header --no-annotate \
	  --python-version 3.11 -o requirements/gpu.txt
	@uv pip compile -q pyproject.toml --all-extras --group dev --generate-hashes --no-header \
	  --no-annotate --python-version 3.11 -o requirements/dev.txt
