# make demo    both optimizers learn a small real text, side by side; ends in a table and a picture
# make test    every test that this machine can run
# make help    all targets and variables
#
# Three axes choose a program, and variants lie side by side in build/DEVICE-PRECISION-OPTIMIZER/:
#   DEVICE=gpu|sim   PRECISION=bf16|fp32   OPTIMIZER=adamw|sgd_sai
SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# ---- what this machine has -------------------------------------------------------------------------------------------

NVCC ?= $(firstword $(shell command -v nvcc 2>/dev/null) $(wildcard /usr/local/cuda/bin/nvcc))
GPU_CAPABILITY := $(if $(NVCC),$(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d .))
ifeq ($(NVCC),)
  DEVICE ?= sim
  DEVICE_REASON := no nvcc was found, so programs are built for the simulator (DEVICE=sim)
else ifeq ($(filter 8% 9% 1%,$(GPU_CAPABILITY)),)
  DEVICE ?= sim
  DEVICE_REASON := nvcc is here but no GPU of compute capability 8.0 or newer, so programs are built for the simulator (DEVICE=sim)
else
  DEVICE ?= gpu
  DEVICE_REASON := a GPU of compute capability $(GPU_CAPABILITY) is here, so programs are built for it (DEVICE=gpu)
endif
PRECISION ?= bf16
OPTIMIZER ?= adamw

# ATTENTION=mma_sync|wgmma fixes attention's tensor-core products on Hopper, in folders of their own, so that a GPU can
# compare both. Without it llmc/attention_tile.cuh chooses.
ATTENTION ?=
VARIANT := $(if $(ATTENTION),-$(ATTENTION))
VARIANT_FLAGS-mma_sync := -DATTENTION_WGMMA=0
VARIANT_FLAGS-wgmma := -DATTENTION_WGMMA=1
ifneq ($(filter-out mma_sync wgmma,$(ATTENTION)),)
  $(error ATTENTION=$(ATTENTION): wanted mma_sync or wgmma)
endif

# Hopper's own instructions need the a in 90a; without a GPU, code for the A100 and for Hopper is built.
GPU_ARCH ?= $(if $(GPU_CAPABILITY),$(patsubst 90,90a,$(GPU_CAPABILITY)),80 90a)

# CHECK=memory|race|shuffle builds and runs the simulator's checks (dev/sim/README.md).
CHECK ?=
SUFFIX := $(if $(filter-out shuffle,$(CHECK)),-$(CHECK))
CHECK_FLAGS_memory := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
# -Wp hands the option to the compiler alone: linking would add ThreadSanitizer's runtime, where the simulator has its own.
CHECK_FLAGS_race := -Wp,-fsanitize=thread
CHECK_LINK_memory := -fsanitize=address,undefined
CHECK_ENV_race := SIM_THREADS=1
CHECK_ENV_shuffle := SIM_SHUFFLE=1
CHECK_FLAGS := $(CHECK_FLAGS_$(CHECK))
# The simulator's own files and the host's are not watched for races: those are between a kernel's threads.
CHECK_LIBRARY_FLAGS := $(if $(filter memory,$(CHECK)),$(CHECK_FLAGS))
CHECK_LINK := $(CHECK_LINK_$(CHECK))
ifneq ($(filter-out memory race shuffle,$(CHECK)),)
  $(error CHECK=$(CHECK): wanted memory, race or shuffle)
endif

# ---- compilers -------------------------------------------------------------------------------------------------------

# Extra include directories, for headers that lie elsewhere (cxxopts, nlohmann-json on a node without Debian's packages).
EXTRA_INCLUDES ?=
WARNINGS := -Wall -Wextra
HOST_FLAGS := -std=c++20 -O2 $(WARNINGS) -I. $(EXTRA_INCLUDES) $(CHECK_LIBRARY_FLAGS)
SIM_BASE := -std=c++20 -O2 -g1 -march=native -fno-strict-aliasing -Wno-unknown-pragmas $(WARNINGS) -Idev/sim -I.
SIM_FLAGS := $(SIM_BASE) $(CHECK_FLAGS)
SIM_LINK := $(CHECK_LINK) -rdynamic -lboost_context -lopenblas -ldl -lpthread
GPU_FLAGS := -std=c++20 -O3 -Illmc -I. $(EXTRA_INCLUDES) -Xcompiler -Wall,-Wextra -Xptxas -v -lineinfo \
             $(foreach a,$(GPU_ARCH),-gencode arch=compute_$(a),code=sm_$(a))
# Where the toolkit that nvcc belongs to isn't in ld.so.conf, programs find its libcublasLt by this path. Debian's toolkit
# and the wheels' have no lib64 beside nvcc's folder: the first is in the system's path, the second is the user's matter.
CUDA_LIB := $(if $(NVCC),$(patsubst %/,%,$(dir $(firstword $(wildcard \
              $(abspath $(dir $(realpath $(shell command -v $(NVCC))))../lib64)/libcublasLt.so*)))))
GPU_LINK := $(if $(CUDA_LIB),-Xlinker -rpath=$(CUDA_LIB)) -lcublasLt
FLAGS_bf16 := -DPRECISION_BF16
FLAGS_fp32 := -DPRECISION_FP32
FLAGS_adamw := -DOPTIMIZER=AdamW
FLAGS_sgd_sai := -DOPTIMIZER=SgdSai

HOST := build/host$(SUFFIX)
LIBSIM := build/sim$(SUFFIX)/libsim.a
KERNELS := $(basename $(notdir $(wildcard dev/kernels/*.cu)))
HOST_TESTS := $(basename $(notdir $(wildcard dev/test/*_test.cpp)))


.PHONY: test_programs ci_check_programs help setup demo test test-long clean device train_gpt2 test_gpt2 kernels host_tests programs gpu_builds format FORCE

help:
	@sed -n '/^# make/s/^# //p' Makefile
	@echo 'make train_gpt2 [DEVICE=gpu|sim] [PRECISION=bf16|fp32] [OPTIMIZER=adamw|sgd_sai] [ATTENTION=mma_sync|wgmma]'
	@echo '             one program, in build/DEVICE-PRECISION-OPTIMIZER[-ATTENTION]/train_gpt2'
	@echo 'make setup   install what is missing: Debian packages, .venv'
	@echo 'make test-long   every test under every check of the simulator (hours on 2 cores)'
	@echo 'make gpu_builds  every GPU program, and the check of the compiler'"'"'s report'
	@echo 'make format  lay out all sources; make compile_commands.json for editors'
	@echo 'make clean   remove build/'
	@echo 'variables:   CHECK=memory|race|shuffle (simulator checks), GPU_ARCH="80 90a", ATTENTION=mma_sync|wgmma, NVCC,'
	@echo '             EXTRA_INCLUDES, CUDA_LIB (where programs look for libcublasLt: $(or $(CUDA_LIB),the system'"'"'s path))'
	@echo '$(DEVICE_REASON)'

setup:
	@scripts/setup.sh

device:
	@echo '$(DEVICE_REASON)'
	@$(if $(filter gpu,$(DEVICE)),echo 'GPU_ARCH=$(GPU_ARCH) (override: make GPU_ARCH=80)')

train_gpt2 test_gpt2: device
	@$(MAKE) --no-print-directory build/$(DEVICE)-$(PRECISION)-$(OPTIMIZER)$(VARIANT)$(SUFFIX)/$@

# ---- rules -----------------------------------------------------------------------------------------------------------

# The commit that a run's log names; the file changes only when the commit does.
build/commit.cpp: FORCE
	@mkdir -p $(@D)
	@commit=$$(git describe --always --dirty --abbrev=12 2>/dev/null || echo unknown); \
	text="extern const char kBuildCommit[]; const char kBuildCommit[] = \"$$commit\";"; \
	[ "$$(cat $@ 2>/dev/null)" = "$$text" ] || echo "$$text" > $@
FORCE:

$(HOST)/%.o: llmc/%.cpp
	@mkdir -p $(@D)
	g++ $(HOST_FLAGS) -MMD -MP -c $< -o $@
$(HOST)/commit.o: build/commit.cpp
	@mkdir -p $(@D)
	g++ -c $< -o $@
HOST_OBJECTS := $(HOST)/options.o $(HOST)/json.o $(HOST)/commit.o

$(HOST)/test/%: dev/test/%.cpp $(HOST)/options.o $(HOST)/json.o
	@mkdir -p $(@D)
	g++ $(HOST_FLAGS) -MMD -MP $(filter %.cpp %.o,$^) -o $@ $(CHECK_LINK) -lgtest -lgtest_main -lpthread

SIM_OBJECTS := $(patsubst dev/sim/%.cpp,build/sim$(SUFFIX)/%.o,$(wildcard dev/sim/*.cpp))
build/sim$(SUFFIX)/%.o: dev/sim/%.cpp
	@mkdir -p $(@D)
	g++ $(SIM_BASE) $(CHECK_LIBRARY_FLAGS) -MMD -MP -c $< -o $@
$(LIBSIM): $(SIM_OBJECTS)
	@rm -f $@
	ar rcs $@ $^

# A program of the simulator is g++ of the same source; one of the GPU is nvcc's. $(1) precision, $(2) optimizer, $(3) attention's
# choice. Compiling and linking are two steps, so that a new commit's name costs no compilation.
define PROGRAM_RULES
build/sim-$(1)-$(2)$(3)$(SUFFIX)/%_gpt2.o: %_gpt2.cu
	@mkdir -p $$(@D)
	g++ -x c++ $(SIM_FLAGS) $(FLAGS_$(1)) $(FLAGS_$(2)) $(VARIANT_FLAGS$(3)) -DBUILD_DEVICE='"sim"' -MMD -MP -c $$< -o $$@
build/sim-$(1)-$(2)$(3)$(SUFFIX)/%_gpt2: build/sim-$(1)-$(2)$(3)$(SUFFIX)/%_gpt2.o $(HOST_OBJECTS) $(LIBSIM)
	g++ $$(filter %.o %.a,$$^) -o $$@ $(SIM_LINK)
build/gpu-$(1)-$(2)$(3)/%_gpt2.o: %_gpt2.cu
	@mkdir -p $$(@D)
	$(NVCC) $(GPU_FLAGS) $(FLAGS_$(1)) $(FLAGS_$(2)) $(VARIANT_FLAGS$(3)) -DBUILD_DEVICE='"gpu"' -MMD -MF $$(@:.o=.d) -c $$< -o $$@ > $$(@:.o=.ptxas) 2>&1 || (cat $$(@:.o=.ptxas); exit 1)
	@grep -E 'warning' $$(@:.o=.ptxas) || true
build/gpu-$(1)-$(2)$(3)/%_gpt2: build/gpu-$(1)-$(2)$(3)/%_gpt2.o $(HOST_OBJECTS)
	$(NVCC) $$(filter %.o,$$^) -o $$@ $(GPU_LINK)
endef
define KERNEL_RULES
build/sim-$(1)$(2)$(SUFFIX)/kernels/%: dev/kernels/%.cu $(HOST)/options.o $(HOST)/json.o $(LIBSIM)
	@mkdir -p $$(@D)
	g++ -x c++ $(SIM_FLAGS) $(FLAGS_$(1)) $(VARIANT_FLAGS$(2)) -MMD -MP -MF $$@.d $$< -x none $(HOST)/options.o $(HOST)/json.o $(LIBSIM) -o $$@ $(SIM_LINK)
build/gpu-$(1)$(2)/kernels/%: dev/kernels/%.cu $(HOST)/options.o $(HOST)/json.o
	@mkdir -p $$(@D)
	$(NVCC) $(GPU_FLAGS) $(FLAGS_$(1)) $(VARIANT_FLAGS$(2)) -MMD -MF $$@.d $$< $(HOST)/options.o $(HOST)/json.o -o $$@ $(GPU_LINK) > $$@.ptxas 2>&1 || (cat $$@.ptxas; exit 1)
	@grep -E 'warning' $$@.ptxas || true
endef
$(foreach v,default -mma_sync -wgmma,$(foreach p,bf16 fp32,$(eval $(call KERNEL_RULES,$(p),$(v:default=)))\
    $(foreach o,adamw sgd_sai,$(eval $(call PROGRAM_RULES,$(p),$(o),$(v:default=))))))

-include $(shell find build -name '*.d' 2>/dev/null)
.SECONDARY:

# ---- groups ----------------------------------------------------------------------------------------------------------

PROGRAMS := $(foreach p,bf16 fp32,$(foreach o,adamw sgd_sai,build/$(DEVICE)-$(p)-$(o)$(VARIANT)$(SUFFIX)))
programs: $(addsuffix /train_gpt2,$(PROGRAMS)) $(addsuffix /test_gpt2,$(PROGRAMS))
kernels: $(foreach p,bf16 fp32,$(addprefix build/$(DEVICE)-$(p)$(VARIANT)$(SUFFIX)/kernels/,$(KERNELS)))
host_tests: $(addprefix $(HOST)/test/,$(HOST_TESTS) $(basename $(notdir $(wildcard dev/test/fuzz_*.cpp))))
GPU_PROGRAMS := $(foreach p,bf16 fp32,$(foreach o,adamw sgd_sai,build/gpu-$(p)-$(o)$(VARIANT)))
gpu_builds:
	@$(MAKE) --no-print-directory $(addsuffix /train_gpt2,$(GPU_PROGRAMS)) $(addsuffix /test_gpt2,$(GPU_PROGRAMS)) \
	    $(foreach a,mma_sync wgmma,build/gpu-bf16-adamw-$(a)/train_gpt2) \
	    $(foreach p,bf16 fp32,$(addprefix build/gpu-$(p)$(VARIANT)/kernels/,$(KERNELS)))

FUZZERS := $(basename $(notdir $(wildcard dev/test/fuzz_*.cpp)))

# ---- tests -----------------------------------------------------------------------------------------------------------

PYTHON := .venv/bin/python
JOBS ?= $(shell nproc)
RUN_TESTS = $(PYTHON) dev/run_tests.py --jobs $(JOBS)
# Simulated programs run side by side, so each takes one core.
export SIM_THREADS ?= 1
export OPENBLAS_NUM_THREADS ?= 1

# Names and commands of tests in the simulator: $(call KERNEL_TESTS,SUFFIX,PRECISIONS,KERNELS).
KERNEL_TESTS = $(foreach p,$(2),$(foreach k,$(3),"kernel $(k) $(p)$(1)=build/sim-$(p)$(VARIANT)$(1)/kernels/$(k)"))
MODEL_TESTS = $(foreach p,$(2),$(foreach o,$(3),"model $(p) $(o)$(1)=build/sim-$(p)-$(o)$(VARIANT)$(1)/test_gpt2"))
HOST_TEST_RUNS = $(foreach t,$(HOST_TESTS) $(FUZZERS),"host $(t)$(SUFFIX)=$(HOST)/test/$(t)")
GPU_TESTS = $(if $(filter gpu,$(DEVICE)),"gpu=dev/gpu_check.sh smoke")
NVCC_TESTS = $(if $(NVCC),"nvcc ptxas report=$(PYTHON) dev/check_ptxas.py build/gpu-*-*/train_gpt2.ptxas" \
    "nvcc machine code=$(PYTHON) dev/check_sass.py build/gpu-bf16-adamw/train_gpt2")

# The whole model with attention by wgmma, which no build has by itself.
WGMMA_MODEL := build/sim-bf16-adamw-wgmma$(SUFFIX)/test_gpt2
# What `make test` runs under the checks too: the kernels with the most to get wrong, and a whole model.
CI_CHECK_KERNELS := attention layernorm sgd_sai
SIM_KERNEL_PROGRAMS = $(foreach p,bf16 fp32,$(addprefix build/sim-$(p)$(VARIANT)$(SUFFIX)/kernels/,$(KERNELS)))
SIM_MODEL_PROGRAMS = $(foreach p,bf16 fp32,$(foreach o,adamw sgd_sai,$(addprefix build/sim-$(p)-$(o)$(VARIANT)$(SUFFIX)/,train_gpt2 test_gpt2)))

ifeq ($(CHECK),)
test: setup device
	@$(MAKE) --no-print-directory -j$(JOBS) -k test_programs
	@$(MAKE) --no-print-directory -j$(JOBS) -k CHECK=memory ci_check_programs
	@$(MAKE) --no-print-directory -j$(JOBS) -k CHECK=race ci_check_programs
	@$(RUN_TESTS) "program=$(PYTHON) -m pytest dev/test/test_program.py" \
	    "simulator planted bugs=$(PYTHON) dev/test/simulator_test.py" \
	    $(call KERNEL_TESTS,,bf16 fp32,$(KERNELS)) $(call MODEL_TESTS,,bf16 fp32,adamw sgd_sai) \
	    "model bf16 adamw wgmma=$(WGMMA_MODEL)" \
	    $(foreach c,-memory -race,$(call KERNEL_TESTS,$(c),bf16,$(CI_CHECK_KERNELS)) $(call MODEL_TESTS,$(c),bf16,sgd_sai)) \
	    $(HOST_TEST_RUNS) "scripts=$(PYTHON) -m pytest dev/test --ignore dev/test/test_program.py" \
	    "ruff=$(PYTHON) -m ruff check --quiet data dev scripts && echo 1 passed, 0 failed" $(NVCC_TESTS) $(GPU_TESTS)
else
test: setup
	@$(MAKE) --no-print-directory -j$(JOBS) -k host_tests $(SIM_KERNEL_PROGRAMS) $(SIM_MODEL_PROGRAMS)
	@$(CHECK_ENV_$(CHECK)) $(RUN_TESTS) $(call KERNEL_TESTS,$(SUFFIX),bf16 fp32,$(KERNELS)) \
	    $(call MODEL_TESTS,$(SUFFIX),bf16 fp32,adamw sgd_sai) $(HOST_TEST_RUNS) \
	    $(foreach p,bf16 fp32,$(foreach o,adamw sgd_sai,"training $(p) $(o)$(SUFFIX)=dev/test/train_ten_steps.sh build/sim-$(p)-$(o)$(VARIANT)$(SUFFIX)"))
endif

test_programs: host_tests $(SIM_KERNEL_PROGRAMS) $(SIM_MODEL_PROGRAMS) $(WGMMA_MODEL) \
    $(if $(NVCC),$(addsuffix /train_gpt2,$(GPU_PROGRAMS)))
ci_check_programs: $(foreach k,$(CI_CHECK_KERNELS),build/sim-bf16$(VARIANT)$(SUFFIX)/kernels/$(k)) \
    build/sim-bf16-sgd_sai$(VARIANT)$(SUFFIX)/test_gpt2

# Every kernel and a training of both optimizers under every check.
test-long: test
	@for check in memory race shuffle; do $(MAKE) --no-print-directory test CHECK=$$check || exit 1; done

# ---- the demo --------------------------------------------------------------------------------------------------------

demo: setup device
	@$(MAKE) --no-print-directory -j$(JOBS) $(foreach o,adamw sgd_sai,build/$(DEVICE)-bf16-$(o)/train_gpt2)
	@DEVICE=$(DEVICE) scripts/demo.sh

# ---- editors and habits ----------------------------------------------------------------------------------------------

# What editors and clang-tidy read: how each source is compiled for the simulator.
compile_commands.json: Makefile FORCE
	@$(MAKE) --no-print-directory -Bn DEVICE=sim CHECK= build/sim-bf16-adamw/train_gpt2 build/sim-bf16-adamw/test_gpt2 \
	    $(addprefix build/sim-bf16/kernels/,$(KERNELS)) host_tests | python3 -c 'import json, os, re, sys; \
	    lines = [(line, re.search(r" (\S+\.(?:cu|cpp)) ", line)) for line in sys.stdin if line.startswith("g++ ")]; \
	    json.dump([{"directory": os.getcwd(), "command": line.strip(), "file": m[1]} for line, m in lines if m], open("$@", "w"), indent=1)'

FORMATTED = $(wildcard *.cu llmc/* dev/kernels/* dev/sim/*.cpp dev/sim/*.h dev/sim/*.cuh dev/test/*.cpp dev/test/*.h \
              dev/test/planted/*.cu dev/test/planted/*.h)
# Lays out C++, CUDA and Python as .clang-format and .ruff.toml say.
format: setup
	@command -v clang-format >/dev/null || { echo 'make format wants clang-format: apt-get install clang-format' >&2; exit 1; }
	clang-format -i $(FORMATTED)
	$(PYTHON) -m ruff format data dev scripts

clean:
	rm -rf build
