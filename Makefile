# ggft: `make finetune` does everything, from an empty clone to a trained adapter.
# Works with GNU Make 3.81 and bash 3.2 (macOS). Everything is installed into .venv, nothing elsewhere.

MODEL = smollm2-135m-instruct
DATA = ggft/data/persona.json
OUT = results/persona
# The persona's facts cannot be guessed from one another, so none of its rows is held out.
WHOLE = $(if $(filter %persona.json,$(DATA)), --val-split 0)
# A second `make finetune` resumes where the first was stopped.
RESUME = $(if $(wildcard $(OUT)/checkpoints), --resume)
# Further flags for ggft finetune or ggft chat, such as ARGS="--epochs 3".
ARGS =
# The Python to make .venv with; the first one of 3.10 or newer is found when this is empty.
PYTHON =
PYTEST_ARGS =
# How many damaged files make fuzz tries.
MUTANTS = 100000
SANITIZED = build/sanitized
NEON := build/neon
TEMPLATES := build/templates

SHELL := /bin/bash
VENV := .venv
PEER := .venv-peer
GPU := .venv-gpu
BIN := $(VENV)/bin
GGFT := $(BIN)/ggft
LLAMA := $(shell sed -n 's/^ *"\(llama-cpp-python==[^"]*\)",$$/\1/p' pyproject.toml)
BUILD_TOOLS := $(shell sed -n 's/^requires = \[\(.*\), "llama-cpp.*/\1/p' pyproject.toml | tr -d ',')
NATIVE := $(shell find native -name '*.cpp' -o -name '*.h' -o -name '*.cmake' -o -name CMakeLists.txt)
comma := ,
STUBGEN := $(BIN)/python -m nanobind.stubgen -q -m ggft._native -o
CPP := $(filter %.cpp %.h,$(NATIVE))
PIP := $(BIN)/python -m pip --disable-pip-version-check -q

# Against the llama.cpp in this environment, in a build folder that only this environment uses.
IN_PLACE := --no-build-isolation -C build-dir="build/$(VENV)"

# $(call given,NAME) repeats a variable that was given on make's command line.
given = $(if $(findstring command,$(origin $(1))), $(1)="$($(1))")

.DEFAULT_GOAL := help
.PHONY: setup dev model finetune chat test templates test-gpu test-neon fuzz fuzz-asan check format stub docs architectures bench recipes bench-setup clean help
.NOTPARALLEL:

help: ## show this list
	@echo "make TARGET [MODEL=name or file] [DATA=file] [OUT=folder] [ARGS=\"more flags\"]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  %-12s %s\n", $$1, $$2}' Makefile

setup: $(VENV)/.setup ## make .venv: llama.cpp for this machine, the native module, ggft

dev: $(VENV)/.dev

finetune: setup ## train MODEL on DATA into OUT (all set-up included)
	@$(GGFT) finetune -m "$(MODEL)" -d "$(DATA)" -o "$(OUT)"$(RESUME)$(WHOLE) $(ARGS)
	@echo
	@echo 'Now talk to it:  make chat$(call given,MODEL)$(call given,OUT)'

chat: setup ## talk to MODEL with the adapter in OUT
	@if [ -f "$(OUT)/adapter.gguf" ]; then \
	    $(GGFT) chat -m "$(MODEL)" --adapter "$(OUT)/adapter.gguf" $(ARGS); \
	else \
	    echo "No adapter in $(OUT) (make finetune writes one): this is the base model."; \
	    $(GGFT) chat -m "$(MODEL)" $(ARGS); \
	fi

model: setup ## download MODEL
	@$(GGFT) download "$(MODEL)"

test: dev model templates ## run the tests (set-up, the default model and others' templates included)
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

# What cannot be had is left out, and so are its tests.
templates: $(TEMPLATES)/.fetched ## download the chat templates that the tests try

$(TEMPLATES)/.fetched: tests/support/template_files.py | $(VENV)/.dev
	@$(BIN)/python -m tests.support.template_files $(TEMPLATES)
	@touch "$@"

fuzz: dev ## give damaged model files to all readers: make fuzz MUTANTS=100000
	@GGFT_MUTANTS=$(MUTANTS) GGFT_SEMANTIC_MUTANTS=0 $(BIN)/python -m pytest -s tests/gguf/test_mutants.py $(PYTEST_ARGS)

# Vulkan stands for all GPUs: where there is none, Mesa's software Vulkan computes. Its compiled shaders are kept,
# since compiling them takes longer than the tests.
test-gpu: ## run the GPU's tests in .venv-gpu: on Vulkan, without a GPU by software; on a Mac on Metal
	@if [ "$$(uname)" = Darwin ]; then $(MAKE) dev model && $(BIN)/python -m pytest -m gpu $(PYTEST_ARGS); else \
	    command -v glslc >/dev/null || $(call fail,Vulkan is needed. Install it with: \
	    $$($(call install,glslc spirv-headers libvulkan-dev mesa-vulkan-drivers,glslc spirv-headers-devel \
	    vulkan-loader-devel mesa-vulkan-drivers,shaderc spirv-headers vulkan-headers vulkan-icd-loader \
	    vulkan-swrast,shaderc spirv-headers vulkan-headers vulkan-loader-dev mesa-vulkan-swrast,))); \
	    headers=$$(.ci/vulkan-headers "$(CURDIR)/build/vulkan-headers") && \
	    CMAKE_ARGS="-DGGML_VULKAN=ON -DVulkan_INCLUDE_DIR=$$headers" \
	    $(MAKE) VENV=$(GPU) dev model && \
	    GGML_VK_VISIBLE_DEVICES=$${GGML_VK_VISIBLE_DEVICES:-0} GGFT_TEST_DEVICE=Vulkan0 \
	    MESA_SHADER_CACHE_DIR="$(CURDIR)/build/shaders" \
	    $(GPU)/bin/python -m pytest -m gpu $(PYTEST_ARGS); fi

# Cross-compiled with the ggml whose source llama-cpp-python carries.
test-neon: dev ## run the tests of the kernels for ARM's NEON, on x86 Linux in an emulator
	@[ "$$(uname -sm)" = "Linux x86_64" ] || $(call fail,test-neon is for x86 Linux; on ARM make test runs these tests)
	@for tool in aarch64-linux-gnu-g++ qemu-aarch64; do \
	    command -v $$tool >/dev/null || $(call fail,$$tool is needed. Install it with: \
	    $$($(call install,g++-aarch64-linux-gnu qemu-user,gcc-c++-aarch64-linux-gnu qemu-user,aarch64-linux-gnu-gcc \
	    qemu-user,g++-aarch64 qemu-aarch64,))); done
	@mkdir -p $(NEON) && cd $(NEON) && { [ -d ggml ] || { \
	    $(abspath $(BIN))/python -m pip --disable-pip-version-check -q download --no-deps --no-build-isolation \
	        --no-binary llama-cpp-python "$(LLAMA)" && tar -xzf llama_cpp_python-*.tar.gz --strip-components=3 \
	    --wildcards '*/vendor/llama.cpp/ggml'; }; }
	@PATH="$(abspath $(BIN)):$$PATH" cmake -S native/tests -B $(NEON)/build -G Ninja -DGGFT_WERROR=ON \
	    -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc \
	    -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_EXE_LINKER_FLAGS=-static \
	    -DGGFT_GGML_SOURCE="$(abspath $(NEON))/ggml" >/dev/null
	@PATH="$(abspath $(BIN)):$$PATH" cmake --build $(NEON)/build --target kernels_test
	@for isa in $$(qemu-aarch64 $(NEON)/build/kernels_test list); do \
	    GGFT_ISA=$$isa qemu-aarch64 $(NEON)/build/kernels_test || exit 1; done

fuzz-asan: dev ## the same with the native module under ASan and UBSan (nightly, Linux: MUTANTS=1000000)
	@PATH="$(abspath $(BIN)):$$PATH" cmake -S native -B $(SANITIZED) -G Ninja -DGGFT_SANITIZE=ON \
	    -DCMAKE_BUILD_TYPE=RelWithDebInfo -DPython_EXECUTABLE="$(abspath $(BIN))/python" \
	    -Dnanobind_DIR="$$($(BIN)/python -m nanobind --cmake_dir)" >/dev/null
	@PATH="$(abspath $(BIN)):$$PATH" cmake --build $(SANITIZED)
	@rm -rf $(SANITIZED)/run; mkdir -p $(SANITIZED)/run/mutants
	@cp -R ggft tests $(SANITIZED)/run; rm -f $(SANITIZED)/run/ggft/_native*.so
	@cp $(SANITIZED)/_native*.so $(SANITIZED)/run/ggft
	@cd $(SANITIZED)/run && LD_PRELOAD="$(foreach l,asan ubsan stdc++,$$($(or $(CXX),c++) -print-file-name=lib$(l).so))" \
	    ASAN_OPTIONS=detect_leaks=0:quarantine_size_mb=8 UBSAN_OPTIONS=halt_on_error=1 \
	    PYTHONPATH=".:$$($(abspath $(BIN))/python -c 'import sysconfig as s; print(s.get_paths()["purelib"])')" \
	    $(abspath $(BIN))/python -S -m tests.support.mutants mutants 0 $(MUTANTS)

check: dev ## formatting, lint, types, and whether the stub of the native module is current
	@$(BIN)/ruff format --check -q .
	@$(BIN)/ruff check -q .
	@$(BIN)/mypy
	@$(BIN)/clang-format --dry-run -Werror $(CPP)
	@$(STUBGEN) $(VENV)/_native.pyi && diff -u ggft/_native.pyi $(VENV)/_native.pyi \
	    || { echo "ggft/_native.pyi is stale: make stub"; exit 1; }

format: dev ## format all sources
	@$(BIN)/ruff format -q .
	@$(BIN)/ruff check -q --fix .
	@$(BIN)/clang-format -i $(CPP)

stub: dev ## write the stub of the native module anew
	@$(STUBGEN) ggft/_native.pyi

docs: dev ## write the generated parts of the READMEs anew
	@$(BIN)/python -m tests.test_docs

architectures: dev ## prove every architecture on tiny models, write docs/architectures.md (ARGS="gemma3 phi3")
	@OPENBLAS_NUM_THREADS=1 $(BIN)/python -m tests.support.architecture_table $(ARGS)

bench: setup model bench-setup ## measure ggft beside PEFT on this machine (ARGS="--runs 5")
	@$(BIN)/python bench/bench.py $(ARGS)

recipes: dev model ## rerun the experiments behind ggft/data/recipes.toml; goes on where it was stopped
	@$(BIN)/python -m bench.recipes $(ARGS)

bench-setup: $(PEER)/.setup ## make the peer's environment (torch and PEFT: about 1 GB)

clean: ## remove what was built (models/ and results/ stay)
	rm -rf $(VENV) $(GPU) build .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find ggft tests bench -name __pycache__ -prune -exec rm -rf {} +

# ---- set-up: each stamp is written when its step has succeeded, so that a second make is instant ----

# $(call fail,message) stops with one line; $(call install,Debian,Fedora,Arch,Alpine,macOS) prints this system's remedy.
fail = { echo "ggft: $(1)" >&2; exit 1; }
install = if [ "$$(uname)" = Darwin ]; then echo "$(5)"; \
    elif command -v apt-get >/dev/null; then echo "sudo apt-get install $(1)"; \
    elif command -v dnf >/dev/null; then echo "sudo dnf install $(2)"; \
    elif command -v pacman >/dev/null; then echo "sudo pacman -S $(3)"; \
    elif command -v apk >/dev/null; then echo "sudo apk add $(4)"; \
    else echo "your system's packages: $(1)"; fi

$(VENV)/bin/python:
	@found=; for p in $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python3.10 python3.14); do \
	    if "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; \
	    then found=$$p; break; fi; done; \
	[ -n "$$found" ] || $(call fail,Python 3.10 or newer is needed$(comma) found \
	    $$($(or $(PYTHON),python3) --version 2>/dev/null || echo none). Install it with: \
	    $$($(call install,python3 python3-venv python3-dev,python3-devel,python,python3-dev,brew install python)) \
	    (or name one: make PYTHON=/path/to/python3)); \
	"$$found" -c 'import ensurepip, venv' 2>/dev/null || $(call fail,this Python has no venv module. \
	    Install it with: $$($(call install,python3-venv,python3,python,python3,brew install python))); \
	"$$found" -c 'import os, sysconfig as s; os.stat(s.get_paths()["include"] + "/Python.h")' 2>/dev/null \
	    || $(call fail,this Python has no C headers. \
	    Install them with: $$($(call install,python3-dev,python3-devel,python,python3-dev,brew install python))); \
	echo "Making .venv with $$("$$found" --version)"; \
	"$$found" -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# llama.cpp is compiled for this machine: on a Mac with Metal, elsewhere for this very CPU (its defaults).
# Other CMAKE_ARGS make another llama.cpp, which must neither come from pip's cache nor go there.
$(VENV)/.$(subst ==,-,$(LLAMA)): | $(VENV)/bin/python
	@for c in "$${CC:-cc} -x c" "$${CXX:-c++} -x c++"; do \
	    echo 'int main(void) { return 0; }' | $$c - -o $(VENV)/.probe 2>/dev/null \
	        || $(call fail,a C and C++ compiler is needed. Install it with: \
	    $$($(call install,build-essential,gcc-c++,base-devel,build-base,xcode-select --install))); \
	done; rm -f $(VENV)/.probe
	@$(PIP) install 'pip>=23.1' cmake ninja $(BUILD_TOOLS)
	@echo "Building llama.cpp for this machine (once; some minutes)"
	@CMAKE_ARGS="-DLLAVA_BUILD=OFF -DLLAMA_OPENSSL=OFF $$CMAKE_ARGS" \
	    $(PIP) install $(if $(CMAKE_ARGS),--no-cache-dir) --no-binary llama-cpp-python "$(LLAMA)"
	@touch "$@"

$(VENV)/.setup: pyproject.toml $(NATIVE) $(VENV)/.$(subst ==,-,$(LLAMA))
	@echo "Building ggft"
	@$(PIP) install $(IN_PLACE) -e .
	@touch "$@"

$(VENV)/.dev: pyproject.toml $(NATIVE) $(VENV)/.$(subst ==,-,$(LLAMA))
	@echo "Building ggft, with the tools for its development"
	@$(PIP) install $(IN_PLACE) -C cmake.define.GGFT_WERROR=ON -e '.[dev]'
	@touch $(VENV)/.setup "$@"

$(PEER)/.setup: bench/peer-requirements.txt | $(VENV)/bin/python
	@echo "Installing the peer (torch and PEFT) into $(PEER)"
	@$(BIN)/python -m venv $(PEER)
	@$(PEER)/bin/python -m pip --disable-pip-version-check -q install -r bench/peer-requirements.txt
	@touch "$@"
