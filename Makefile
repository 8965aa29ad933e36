# llmpar. `make help` lists the targets. Needs a C compiler, make, libm and pthreads; what else a suite wants, it names.

CC = cc
CXX = c++
# Of the implementation, in the suite that gdb and tests use.
OPT = -O3
# Of the suites: `make check` has -g1, line numbers alone, which saves a quarter of a compilation.
DEBUG ?= -g
CLANG = clang
LDLIBS = -lpthread -lm
# TEST=test_gemm runs one program of a suite.
TEST =

SRC := $(sort $(shell find src -type f))
MODULES := $(filter-out src/nccl/%,$(filter %.c,$(SRC)))
HEADERS := llmpar.h llmpar_cuda.h llmpar_nccl.h
EXAMPLES := $(patsubst examples/%.c,build/%,$(wildcard examples/*.c))
# Where there is a C++ compiler.
CXX_EXAMPLES := $(if $(shell command -v $(CXX)),$(patsubst examples/%.cc,build/%,$(wildcard examples/*.cc)))
BENCHES := $(patsubst bench/%.c,build/bench/%,$(filter-out bench/gpu_%.c,$(wildcard bench/*.c)))
SUITE := $(or $(TEST),$(filter-out test_exact test_mpi% test_cuda% test_nccl%,$(patsubst tests/%.c,%,$(wildcard tests/test_*.c))))

# What ThreadSanitizer has something to find in: rank threads and worker pools.
THREADED := $(filter $(SUITE),$(basename $(notdir $(shell grep -lE 'launch|threads|train.h|checkpoints.h' tests/test_*.c))))

all: $(EXAMPLES) $(CXX_EXAMPLES)

help:
	@echo 'make               the examples, from the committed llmpar.h, into build/'
	@echo 'make build/train_llama_mpi, build/generate_mpi: the same with ranks as MPI processes (mpicc)'
	@echo 'make demo          trains a small Llama on a 2x2 mesh and compares the bits with one rank'
	@echo 'make gen           writes llmpar.h, llmpar_cuda.h and llmpar_nccl.h from src/'
	@echo 'make test          the suite (TEST=test_gemm: one program of it)'
	@echo 'make test-exact    the same bits on every mesh: losses, gradients, saved models'
	@echo 'make build/train_llama_cuda, build/generate_cuda: the same on GPUs (nvcc; docs/gpu.md), CUDNN=1: with cuDNN; _nccl: with NCCL too; _emulated: with the CUDA device emulated on the CPU'
	@echo 'make test-nccl     the NCCL communicator on a stand-in for NCCL; test-nccl-asan, test-nccl-tsan: under the sanitizers; check-nccl: compiles and links with the real one'
	@echo 'make test-cuda     the CUDA device emulated on the CPU (TEST=test_cuda_device: one program); test-cuda-asan, test-cuda-tsan: under the sanitizers; test-cuda-plant: without each barrier once'
	@echo 'make cuda          the CUDA device as an object, by nvcc; check-cuda: its warnings, spills and linkage, without a GPU; check-cuda-memory: sectors and bank conflicts of each kernel, counted on the emulated device; tools/gpu_check: everything, with one'
	@echo 'make test-mpi      ranks as MPI processes: 1, 2 and 4 of them; test-mpi-full: 8, Open MPI and MPICH, every fault'
	@echo 'make test-plant    plants faults and expects the tests to find them'
	@echo 'make test-asan     the suite under AddressSanitizer and UndefinedBehaviorSanitizer'
	@echo 'make test-tsan     the suite under ThreadSanitizer'
	@echo 'make test-valgrind samples of the kernels under valgrind (AVX2)'
	@echo 'make test-fuzz     the parsers on their corpus and on FUZZ=8 seconds of mutations each (clang, libFuzzer)'
	@echo 'make test-header   the suite on the committed header (clang); test-cxx: compiled as C++; test-separate: module by module'
	@echo 'make grade COMM=file.c   a communicator of your own against the conformance suite; OP=file.c: operations; ASSIGNMENT=1_collectives FILE=file.c'
	@echo 'make test-grade    the graders themselves    make test-gdb: a training step in lockstep under gdb'
	@echo 'make check         everything that a commit has to pass; check-full: with the long runs'
	@echo 'make check-gen     are the committed headers those of src/?    make check-layers: does a module reach above its layer?'
	@echo 'make check-compile every compiler, standard and order of includes    make check-budget: lines, bytes, compile time'
	@echo 'make coverage      branches of the readers of foreign files that their tests take'
	@echo 'make install       headers, pkg-config file, CMake package, documents (PREFIX=/usr/local, DESTDIR=); make uninstall'
	@echo 'make test-bf16     a part of the suite with the instruction for BF16 products emulated on AVX-512'
	@echo 'make test-aarch64  a part of the suite for aarch64, emulated by qemu; test-musl: linked statically with musl'
	@echo 'make test-package  installs, and builds a C and a C++ program in every way a project can take llmpar in'
	@echo 'make test-docs     runs the commands of README.md and docs/ and compares what they print; links, pictures'
	@echo 'make bench         the benchmarks (BENCH=gemm: one part: peak gemm ops attention comm train generate ..)    make clean: removes build/'

# ---- generated headers ----

amalgamate = awk -v src=src $(1) -f tools/amalgamate.awk src/$(basename $(notdir $@)).spine.h > $@.$$$$ && mv $@.$$$$ $@

gen: $(HEADERS:%=build/gen/%)
	cp $(HEADERS:%=build/gen/%) .
	tools/tour.sh

build/gen/%.h: FORCE
	@mkdir -p $(@D)
	@$(call amalgamate)

# The same text with #line directives: what tests, sanitizers and gdb see.
build/dev/llmpar.h: $(filter-out src/cuda/% src/nccl/% src/llmpar_%,$(SRC))
build/dev/llmpar_cuda.h: $(filter src/cuda/% src/llmpar_cuda.spine.h,$(SRC))
build/dev/llmpar_nccl.h: $(filter src/nccl/% src/llmpar_nccl.spine.h,$(SRC))
build/dev/%.h: tools/amalgamate.awk
	@mkdir -p $(@D)
	@$(call amalgamate,-v lines=1)

check-gen: $(HEADERS:%=build/gen/%)
	@for h in $(HEADERS); do cmp -s $$h build/gen/$$h || { echo "$$h is not what src/ gives: run \`make gen\` and commit it"; exit 1; }; done
	@echo "generated headers are those of src/"
	@tools/tour.sh check

# ---- examples and benchmarks ----

# An example is one file that `cc -O3 -I. examples/NAME.c -o NAME -lpthread -lm` builds. Here the implementation, from the
# committed header, is compiled once for all of them (LLMPAR__IMPLEMENTED: "it is already there").
# EXAMPLE_LIB=build/plain/llmpar.o, from the environment, links what the suite has compiled already (the same text).
EXAMPLE_LIB ?= build/examples/llmpar.o
build/examples/llmpar.o: llmpar.h
	@mkdir -p $(@D)
	$(CC) -O3 -g -x c -DLLMPAR_IMPLEMENTATION -c $< -o $@

$(EXAMPLES): build/%: examples/%.c $(EXAMPLE_LIB) $(wildcard examples/common/*.h)
	@mkdir -p $(@D)
	$(CC) -O2 -g -DLLMPAR__IMPLEMENTED -I. $< $(EXAMPLE_LIB) -o $@ $(LDLIBS)

build/%: examples/%.cc $(EXAMPLE_LIB)
	@mkdir -p $(@D)
	$(CXX) -O2 -g -DLLMPAR__IMPLEMENTED -I. $< $(EXAMPLE_LIB) -o $@ $(LDLIBS)

# The same programs with MPI processes as ranks: mpirun -n 4 build/train_llama_mpi ...
MPICC = $(firstword $(shell command -v mpicc.openmpi mpicc) mpicc)
build/examples/llmpar_mpi.o: llmpar.h
	@mkdir -p $(@D)
	$(MPICC) -O3 -g -x c -DLLMPAR_IMPLEMENTATION -DLLMPAR_USE_MPI -c $< -o $@

MPI_EXAMPLES := build/train_llama_mpi build/generate_mpi
$(MPI_EXAMPLES): build/%_mpi: examples/%.c build/examples/llmpar_mpi.o $(wildcard examples/common/*.h)
	@mkdir -p $(@D)
	$(MPICC) -O2 -g -DLLMPAR__IMPLEMENTED -DLLMPAR_USE_MPI -I. $< build/examples/llmpar_mpi.o -o $@ $(LDLIBS)

build-bench: $(BENCHES)
$(BENCHES): build/bench/%: bench/%.c build/plain/llmpar.o $(wildcard bench/*.h)
	@mkdir -p $(@D)
	$(CC) -O2 -g -D_GNU_SOURCE -DBENCH_FLAGS='"$(OPT)"' -Ibuild/dev $(filter %.c %.o,$^) -o $@ $(LDLIBS)

# The MPI side of bench_comm, where there is an MPI.
build/bench/bench_comm: | $(if $(shell command -v $(MPICC)),build/bench/peer_open_mpi)
build/bench/peer_open_mpi: bench/peers/open_mpi.c build/mpi/llmpar.o bench/bench.h bench/comm.h
	@mkdir -p $(@D)
	$(MPICC) -O2 -g -D_GNU_SOURCE -DLLMPAR_USE_MPI -DLLMPAR__IMPLEMENTED -Ibuild/dev $(filter %.c %.o,$^) -o $@ $(LDLIBS)

# The product beside a BLAS library's: build/bench/gemm_blas libopenblas.so.0
build/bench/gemm_blas: bench/peers/gemm_blas.c build/plain/llmpar.o $(wildcard bench/*.h)
	@mkdir -p $(@D)
	$(CC) -O2 -g -D_GNU_SOURCE -DBENCH_FLAGS='"$(OPT)"' -Ibuild/dev $(filter %.c %.o,$^) -o $@ $(LDLIBS) -ldl

demo: build/demo
	build/demo $(if $(DATA),--data $(DATA))

# BENCH=gemm: one part. A part is the program of its name, train the one of train_step.c; its table comes to the terminal and as JSON to bench/results/.
BENCH = peak gemm ops attention comm train generate check longest_sequence model_io checkpoint
bench_program = build/bench/$(or $(patsubst bench/%.c,%,$(firstword $(wildcard bench/bench_$(1).c bench/$(1).c bench/$(1)_step.c))),$(error bench: no part "$(1)", expected peak, gemm, ops, attention, comm, train, generate, check, longest_sequence, model_io or checkpoint))
bench_machine = $(shell sed -n 's/^model name[^:]*: //p' /proc/cpuinfo 2>/dev/null | head -n 1 | tr 'A-Z' 'a-z' | grep -oE 'xeon|epyc|ryzen|core|graviton|neoverse' | head -n 1)
bench_file = bench/results/$(shell date -u +%Y-%m-%d)-$(or $(bench_machine),$(shell uname -m))

bench: $(if $(filter bench,$(MAKECMDGOALS)),$(foreach part,$(BENCH),$(call bench_program,$(part))))
	@$(foreach part,$(BENCH),echo "== $(part)" && BENCH_JSON=$(bench_file)-$(part).json $(call bench_program,$(part)) &&) true

# ---- the suite: the implementation is compiled once a configuration and linked by all tests ----

# After a build that failed: programs that are not up to date go, so that none of an earlier build is run in their place.
drop_stale = for t in $(2); do $(MAKE) -q $(1)/$$t 2>/dev/null || rm -f $(1)/$$t; done

# $(1) folder in build/, $(2) its programs
define suite
build-$(1): $(2:%=build/$(1)/%)
run-$(1):
	@$$(MAKE) --no-print-directory -k build-$(1) || $$(call drop_stale,build/$(1),$(2))
	@tests/run.sh build/$(1) $(2)

-include $(wildcard build/$(1)/*.d)
.PHONY: build-$(1) run-$(1)
endef

# $(1) name, $(2) folder of llmpar.h, $(3) compiler of the tests and linker, $(4) their flags, $(5) command that compiles the implementation
define configuration
build/$(1)/llmpar.o: $(if $(filter .,$(2)),llmpar.h,build/dev/llmpar.h)
	@mkdir -p $$(@D)
	$(5) -DLLMPAR_IMPLEMENTATION -c $$< -o $$@
$(call programs,$(1),$(2),$(3),$(4))
endef

define programs
build/$(1)/test_%: tests/test_%.c build/$(1)/llmpar.o
	@mkdir -p $$(@D)
	@$(3) $(4) -Wall -Wextra -MMD -MP -MF $$@.d -I$(2) -Itests $$< build/$(1)/llmpar.o -o $$@ $(LDLIBS)

$(call suite,$(1),$(SUITE))
endef

# The same with PARTS=1, as `make check` has it, for a configuration that only the modules with its macro know of: those alone are compiled, and linked with the others of build/separate.
# $(5) macro, $(6) flags of the modules
define parts
parts_$(1) := $(patsubst src/%.c,%.o,$(shell grep -l '$(5)' $(MODULES)))
build/$(1)/parts/%.o: src/%.c
	@mkdir -p $$(@D)
	@$(3) $(6) -D$(5) -MMD -MP -c $$< -o $$@
build/$(1)/llmpar.o: $$(parts_$(1):%=build/$(1)/parts/%) $$(filter-out $$(parts_$(1):%=build/separate/%),$(SEPARATE))
	@$(LD) -r $$^ -o $$@
-include $(wildcard build/$(1)/parts/*/*.d)
$(call programs,$(1),$(2),$(3),$(4))
endef

asan = -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
tsan = -fsanitize=thread
# gcc looks up every line of a file for -Wmisleading-indentation: four seconds of seven for the whole header. check-layers has it, module by module, and the compile matrix once as C and once as C++.
WARN = -Wall -Wextra -Wshadow -Wundef -Wno-misleading-indentation

# Module by module: extern instead of static between them, one object each.
SEPARATE := $(MODULES:src/%.c=build/separate/%.o)
SEPARATE_FLAGS = -std=c99 -pedantic $(WARN) -Wconversion -Wno-sign-conversion -ffp-contract=off -DLLMPAR__SEPARATE -Isrc

$(eval $(call configuration,plain,build/dev,$(CC),-O1 $(DEBUG),$(CC) $(OPT) $(DEBUG) $(WARN) -x c))
$(eval $(call configuration,header,.,$(CLANG),-O0 $(DEBUG),$(CLANG) -O2 $(DEBUG) -std=c99 $(WARN) -x c))
$(eval $(call configuration,cxx,build/dev,$(CC),-O1 $(DEBUG),$(CXX) -O1 $(DEBUG) -std=c++11 $(WARN) -x c++))
$(eval $(call configuration,asan,build/dev,$(CC),-O0 $(DEBUG) $(asan),$(CC) -O1 $(DEBUG) $(asan) -x c))
$(eval $(call configuration,tsan,build/dev,$(CC),-O0 $(DEBUG) $(tsan),$(CC) -O1 $(DEBUG) $(tsan) -x c))
$(eval $(call configuration,aarch64,build/dev,aarch64-linux-gnu-gcc,-O1 $(DEBUG) -static,aarch64-linux-gnu-gcc -O2 $(DEBUG) $(WARN) -x c))
$(eval $(call configuration,aarch64_portable,build/dev,aarch64-linux-gnu-gcc,-O1 $(DEBUG) -static,aarch64-linux-gnu-gcc -O2 $(DEBUG) $(WARN) -DLLMPAR_NO_SIMD -DLLMPAR_NO_LLAMA -DLLMPAR_NO_TEXT -DLLMPAR_NO_IO -Wno-unused-function -x c))
$(eval $(call configuration,musl,build/dev,musl-gcc,-O1 $(DEBUG) -static,musl-gcc -O2 $(DEBUG) $(WARN) -x c))

ifndef PARTS
$(eval $(call configuration,bf16,build/dev,$(CC),-O1 $(DEBUG),$(CC) -O1 $(DEBUG) $(WARN) -DLLMPAR_BF16_EMULATED -x c))
$(eval $(call configuration,mpi,build/dev,$(MPICC) -DLLMPAR_USE_MPI,-O1 $(DEBUG),$(MPICC) -DLLMPAR_USE_MPI $(OPT) $(DEBUG) $(WARN) -x c))
else
$(eval $(call parts,bf16,build/dev,$(CC),-O1 $(DEBUG),LLMPAR_BF16_EMULATED,-O1 $(DEBUG) $(SEPARATE_FLAGS)))
$(eval $(call parts,mpi,build/dev,$(MPICC) -DLLMPAR_USE_MPI,-O1 $(DEBUG),LLMPAR_USE_MPI,-O1 $(DEBUG) $(SEPARATE_FLAGS)))
endif
$(eval $(call configuration,mpich,build/dev,mpicc.mpich -DLLMPAR_USE_MPI,-O1 $(DEBUG),mpicc.mpich -DLLMPAR_USE_MPI $(OPT) $(DEBUG) $(WARN) -x c))

# The modules one by one.
build/separate/%.o: src/%.c
	@mkdir -p $(@D)
	@$(CC) -O3 $(DEBUG) $(SEPARATE_FLAGS) -MMD -MP -c $< -o $@

build/separate/llmpar.a: $(SEPARATE)
	@rm -f $@
	@ar rcs $@ $^

build/separate/llmpar.h:
	@mkdir -p $(@D)
	@echo '#include "llmpar.spine.h"' > $@

build/separate/test_%: tests/test_%.c build/separate/llmpar.a build/separate/llmpar.h
	@$(CC) -O1 $(DEBUG) -Wall -Wextra -DLLMPAR__SEPARATE -Ibuild/separate -Isrc -Itests -MMD -MP -MF $@.d $< build/separate/llmpar.a -o $@ $(LDLIBS)

$(eval $(call suite,separate,$(SUITE)))
-include $(wildcard build/separate/*/*.d)

print-suite:
	@echo $(SUITE)

test: run-plain
test-separate: run-separate
test-header:
	@tests/need.sh clang clang -- $(MAKE) --no-print-directory run-header
test-cxx:
	@tests/need.sh $(CXX) g++ -- $(MAKE) --no-print-directory run-cxx
test-asan:
	@tests/need.sh -fsanitize=address,undefined gcc -- $(MAKE) --no-print-directory run-asan
test-tsan:
	@tests/need.sh -fsanitize=thread gcc -- $(MAKE) --no-print-directory run-tsan SUITE='$(THREADED)'

# Another processor, emulated (NEON and the portable kernels), and another C library: the programs that have something to find there.
build/aarch64/train_llama build/musl/train_llama: build/%/train_llama: examples/train_llama.c build/%/llmpar.o
	@$(if $(findstring musl,$@),musl-gcc,aarch64-linux-gnu-gcc) -O1 $(DEBUG) -static -DLLMPAR__IMPLEMENTED -Ibuild/dev $^ -o $@ $(LDLIBS)

AARCH64 = $(or $(TEST),test_base test_ops test_gemm test_interleave test_attention test_generate test_elementwise test_tp test_mesh test_fsdp test_fsdp_fail test_config test_launch test_model)
MUSL = $(or $(TEST),test_base test_comm test_launch test_mesh test_fsdp test_fsdp_fail test_safetensors test_hf test_model)

test-aarch64:
	@tests/need.sh aarch64-linux-gnu-gcc gcc-aarch64-linux-gnu -- tests/need.sh qemu-aarch64 qemu-user -- $(MAKE) --no-print-directory run-ported SUITE='$(AARCH64)' PORT=aarch64 RUNNER=qemu-aarch64
test-aarch64-portable:
	@tests/need.sh aarch64-linux-gnu-gcc gcc-aarch64-linux-gnu -- tests/need.sh qemu-aarch64 qemu-user -- $(MAKE) --no-print-directory run-ported SUITE='test_gemm test_ops' PORT=aarch64_portable RUNNER=qemu-aarch64
# The level avx512bf16 on a processor that has AVX-512 but no BF16 units.
test-bf16:
	@$(MAKE) --no-print-directory run-bf16 SUITE='$(or $(TEST),test_cpu test_gemm test_interleave test_attention test_generate test_half test_half_products test_tp test_model test_launch)'

# The AVX2 path of the kernels, as valgrind sees it.
VALGRIND := test_kernels test_elementwise test_half test_ops test_gemm test_interleave test_attention
build-valgrind: $(VALGRIND:%=build/plain/%)
test-valgrind:
	@tests/need.sh valgrind valgrind -- $(MAKE) --no-print-directory run-valgrind
run-valgrind: build-valgrind
	@tests/valgrind.sh build/plain

test-musl:
	@tests/need.sh musl-gcc musl-tools -- $(MAKE) --no-print-directory run-ported SUITE='$(MUSL)' PORT=musl
run-ported:
	@$(MAKE) --no-print-directory -k build-$(PORT) $(if $(findstring portable,$(PORT)),,build/$(PORT)/train_llama) || $(call drop_stale,build/$(PORT),$(SUITE) train_llama)
	@LLMPAR_TEST_RUNNER='$(RUNNER)' tests/ported.sh build/$(PORT) $(SUITE)

test-exact: build/plain/test_exact
	@tests/run.sh build/plain test_exact

# ---- the CUDA device: on the CPU (tests/emulated_cuda), and as nvcc builds it ----

CUDA_SUITE := $(or $(TEST),test_emulation $(patsubst tests/%.c,%,$(wildcard tests/test_cuda_*.c)))
# What programs of the emulated device link beside it: another object or archive of llmpar.h is as good (CUDA_LIB=build/separate/llmpar.a).
CUDA_LIB = build/plain/llmpar.o
CUDA_CXXFLAGS = -std=c++17 $(DEBUG) -Wall -Wextra -fno-strict-aliasing -Wno-unknown-pragmas -Wno-unused-function -ffp-contract=off -Itests/emulated_cuda -Ibuild/dev

# $(1) name, $(2) flags, $(3) llmpar.h as an object
define emulated
build/$(1)/cuda.o: $(wildcard tests/emulated_cuda/*)
	@mkdir -p $$(@D)
	$(CXX) $(CUDA_CXXFLAGS) $(2) -c tests/emulated_cuda/emulated_cuda.cc -o $$@

build/$(1)/llmpar_cuda.o: build/dev/llmpar_cuda.h build/dev/llmpar.h $(wildcard tests/emulated_cuda/*.h)
	@mkdir -p $$(@D)
	$(CXX) $(CUDA_CXXFLAGS) $(2) -DLLMPAR_CUDA_EMULATED -DLLMPAR_CUDA_IMPLEMENTATION -x c++ -c $$< -o $$@

build/$(1)/test_%: tests/test_%.c build/$(1)/llmpar_cuda.o build/$(1)/cuda.o $(3)
	@$(CC) $(2) $(DEBUG) -Wall -Wextra -MMD -MP -MF $$@.d -Ibuild/dev -Itests $$(filter %.c %.o %.a,$$^) -o $$@ -lstdc++ $(LDLIBS)

build/$(1)/gpu_%: bench/gpu_%.c build/$(1)/llmpar_cuda.o build/$(1)/cuda.o $(3) $(wildcard bench/*.h)
	@$(CC) $(2) $(DEBUG) -Wall -Wextra -D_GNU_SOURCE -DBENCH_FLAGS='"$(OPT)"' -Ibuild/dev -Itests $$(filter %.c %.o %.a,$$^) -o $$@ -lstdc++ $(LDLIBS)

build/$(1)/test_emulation: tests/emulated_cuda/test_emulation.cc build/$(1)/cuda.o
	@$(CXX) $(CUDA_CXXFLAGS) $(2) $$^ -o $$@ $(LDLIBS)

$(call suite,$(1),$(CUDA_SUITE))
endef
$(eval $(call emulated,emulated,-O1,$(CUDA_LIB)))
$(eval $(call emulated,emulated_asan,-O1 $(asan),build/asan/llmpar.o))
$(eval $(call emulated,emulated_tsan,-O1 $(tsan),build/tsan/llmpar.o))

# How kernels use memory, counted: gcc's calls for ThreadSanitizer come to memory.cc. An access has to stay what it is in the source: 16 bytes are not taken apart, nothing that was read is kept.
GXX = g++
COUNTED = -O1 -fsanitize=thread -fno-tree-sra -fno-tree-fre -fno-tree-pre -fno-tree-forwprop -finline-small-functions
build/emulated_memory/memory.o: tests/emulated_cuda/memory.cc $(wildcard tests/emulated_cuda/*.h)
	@mkdir -p $(@D)
	$(GXX) $(CUDA_CXXFLAGS) -O2 -c $< -o $@
build/emulated_memory/llmpar_cuda.o: build/dev/llmpar_cuda.h build/dev/llmpar.h $(wildcard tests/emulated_cuda/*.h)
	@mkdir -p $(@D)
	$(GXX) $(CUDA_CXXFLAGS) $(COUNTED) -DLLMPAR_CUDA_EMULATED -DLLMPAR_CUDA_IMPLEMENTATION -x c++ -c $< -o $@
build/emulated_memory/test_memory.o: tests/emulated_cuda/test_memory.cc $(wildcard tests/emulated_cuda/*.h)
	@mkdir -p $(@D)
	$(GXX) $(CUDA_CXXFLAGS) $(COUNTED) -c $< -o $@
build/emulated_memory/test_memory: build/emulated_memory/test_memory.o build/emulated_memory/memory.o build/emulated/cuda.o
	@$(GXX) -no-pie $^ -o $@ $(LDLIBS)
build/emulated_memory/memory_kernels: tests/emulated_cuda/memory_kernels.c build/emulated_memory/llmpar_cuda.o build/emulated_memory/memory.o build/emulated/cuda.o $(CUDA_LIB)
	@$(CC) -O1 $(DEBUG) -Wall -Wextra -no-pie -Ibuild/dev -Itests/emulated_cuda $^ -o $@ -lstdc++ $(LDLIBS)
check-cuda-memory:
	@tests/need.sh $(GXX) g++ -- $(MAKE) --no-print-directory run-check-cuda-memory
run-check-cuda-memory: build/emulated_memory/test_memory build/emulated_memory/memory_kernels
	@build/emulated_memory/test_memory && build/emulated_memory/memory_kernels

test-cuda:
	@tests/need.sh $(CXX) g++ -- $(MAKE) --no-print-directory run-emulated $(if $(TEST),,run-gpu-small)
run-gpu-small: run-emulated
	@$(MAKE) --no-print-directory build/emulated/gpu_ops
	@build/emulated/gpu_ops --small --json build/emulated/gpu_ops.json >build/emulated/gpu_ops.log || { tail -n 5 build/emulated/gpu_ops.log; exit 1; }
	@echo "gpu_ops --small          $$(grep -c ' of ' build/emulated/gpu_ops.log) lines"
test-cuda-asan:
	@tests/need.sh -fsanitize=address,undefined gcc -- $(MAKE) --no-print-directory run-emulated_asan

# What has rank threads.
test-cuda-tsan:
	@tests/need.sh -fsanitize=thread gcc -- $(MAKE) --no-print-directory run-emulated_tsan TEST='$(or $(TEST),test_emulation $(filter $(CUDA_SUITE),$(basename $(notdir $(shell grep -lE 'launch' tests/test_cuda_*.c)))))'

# The NCCL communicator on a stand-in for NCCL between rank threads; test_nccl_processes: on one between processes. $(1) name, $(2) flags, $(3) llmpar.h as an object
NCCL_SUITE := $(filter test_nccl%,$(or $(TEST),$(patsubst tests/%.c,%,$(wildcard tests/test_nccl*.c))))
NCCL_FLAGS = -Wall -Wextra -Wshadow -Wundef -D_GNU_SOURCE -Ibuild/dev -Itests -Itests/fake_nccl
define nccl
build/$(1)/llmpar_nccl.o: build/dev/llmpar_nccl.h build/dev/llmpar.h tests/fake_nccl/nccl.h
	@mkdir -p $$(@D)
	@$(CC) -O1 $(DEBUG) $(2) $(NCCL_FLAGS) -DLLMPAR_NCCL_IMPLEMENTATION -x c -c $$< -o $$@

build/$(1)/fake_nccl.o build/$(1)/fake_nccl_processes.o: build/$(1)/%.o: tests/%.c tests/fake_nccl.h tests/fake_nccl/nccl.h
	@mkdir -p $$(@D)
	@$(CC) -O1 $(DEBUG) $(2) $(NCCL_FLAGS) -c $$< -o $$@

build/$(1)/test_nccl_processes: build/$(1)/fake_nccl_processes.o
$(filter-out build/$(1)/test_nccl_processes,$(NCCL_SUITE:%=build/$(1)/%)): build/$(1)/fake_nccl.o
build/$(1)/test_nccl_options: build/dev/llmpar_cuda.h
build/$(1)/test_%: tests/test_%.c build/$(1)/llmpar_nccl.o $(3)
	@$(CC) -O1 $(DEBUG) $(2) $(NCCL_FLAGS) -MMD -MP -MF $$@.d $$(filter %.c %.o %.a,$$^) -o $$@ $(LDLIBS)

$(call suite,$(1),$(NCCL_SUITE))
endef
$(eval $(call nccl,nccl,,$(CUDA_LIB)))
$(eval $(call nccl,nccl_asan,$(asan),build/asan/llmpar.o))
$(eval $(call nccl,nccl_tsan,$(tsan),build/tsan/llmpar.o))

# The real header, as C99 and as C++11, and every symbol in the real library.
# NCCL is a package of the system, or Python's wheel (nvidia-nccl-cu13), which has no libnccl.so without a number.
NCCL_HOME = $(patsubst %/include/,%,$(dir $(firstword $(wildcard /usr/local/cuda/include/nccl.h /usr/local/include/nccl.h /usr/include/nccl.h) $(wildcard $(addsuffix /include/nccl.h,$(nccl_wheel))))))
nccl_wheel = $(if $(wildcard /usr/local/cuda/include/nccl.h /usr/local/include/nccl.h /usr/include/nccl.h),,$(shell python3 -c 'import nvidia.nccl; print(nvidia.nccl.__path__[0])' 2>/dev/null))
check-nccl: build/dev/llmpar_nccl.h build/dev/llmpar.h $(CUDA_LIB)
	@if [ -z '$(NCCL_HOME)' ]; then echo 'skipped: there is no nccl.h (Debian package: libnccl-dev; NCCL_HOME=/where/it/is)'; exit 0; fi; \
	mkdir -p build/nccl && printf '#include "llmpar_nccl.h"\nint main(void) { llmpar_backend b; llmpar_nccl_backend(NULL, &b); return b.comm_create == NULL; }\n' >build/nccl/real.c && \
	flags='-Wall -Wextra -Wshadow -Wundef -Werror -Ibuild/dev -isystem $(NCCL_HOME)/include -isystem $(cuda_home)include' && \
	$(CC) -std=c99 -pedantic $$flags -DLLMPAR_NCCL_IMPLEMENTATION -x c -c build/dev/llmpar_nccl.h -o build/nccl/real_c.o && \
	$(CXX) -std=c++11 $$flags -DLLMPAR_NCCL_IMPLEMENTATION -x c++ -c build/dev/llmpar_nccl.h -o build/nccl/real_cxx.o && \
	for o in real_c real_cxx; do $(CC) -Ibuild/dev build/nccl/real.c build/nccl/$$o.o $(CUDA_LIB) -o build/nccl/$$o -L$(NCCL_HOME)/lib -L$(NCCL_HOME)/lib64 -L$(cuda_home)lib64 -l:libnccl.so.2 -lcudart $(LDLIBS) && \
	LD_LIBRARY_PATH=$(NCCL_HOME)/lib:$(cuda_home)lib64 build/nccl/$$o || exit 1; done; \
	echo "llmpar_nccl.h: compiles with $(NCCL_HOME)/include/nccl.h as C99 and C++11, and links"

# The CUDA device, emulated, with the NCCL communicator: rank threads; processes, by their environment.
build/nccl/real_nccl: build/nccl/fake_nccl.o
build/nccl/real_nccl_processes: build/nccl/fake_nccl_processes.o
build/nccl/real_nccl build/nccl/real_nccl_processes: tests/real_nccl.c build/nccl/llmpar_nccl.o build/emulated/llmpar_cuda.o build/emulated/cuda.o $(CUDA_LIB)
	@$(CC) -O1 $(DEBUG) -D_GNU_SOURCE -Wall -Wextra -MMD -MP -MF $@.d -Ibuild/dev -Itests $(filter %.c %.o %.a,$^) -o $@ -lstdc++ $(LDLIBS)

test-nccl: run-nccl $(if $(TEST),,run-nccl-cuda)
run-nccl-cuda: run-nccl
	@$(MAKE) --no-print-directory build/nccl/real_nccl build/nccl/real_nccl_processes
	@for run in 'real_nccl --threads 1' 'real_nccl --threads 2' 'real_nccl --threads 4' 'real_nccl_processes --processes 2' 'real_nccl_processes --faults 3'; do \
		build/nccl/$$run >build/nccl/real.log 2>&1 || { echo "emulated $$run"; cat build/nccl/real.log; exit 1; }; \
		echo "emulated $$run: $$(tail -n 1 build/nccl/real.log)"; done
test-nccl-asan:
	@tests/need.sh -fsanitize=address,undefined gcc -- $(MAKE) --no-print-directory run-nccl_asan
test-nccl-tsan:
	@tests/need.sh -fsanitize=thread gcc -- $(MAKE) --no-print-directory run-nccl_tsan

# Every barrier and every wait of the kernels left out once (PLANT=sample: every eighth).
test-cuda-plant: build-emulated
	@tests/emulated_cuda/plant.sh $(PLANT:%=--%)

NVCC = nvcc
# Which GPUs `make cuda` compiles for: all, or native (this machine's).
CUDA_FOR = all
cuda_home = $(dir $(shell dirname $$(readlink -f $$(command -v $(NVCC)))))
cuda_libs = -lcublasLt $(if $(CUDNN),$(if $(CUDNN_HOME),-L$(CUDNN_HOME)/lib -Xlinker -rpath=$(CUDNN_HOME)/lib -l:libcudnn.so.9,-lcudnn) -lnvrtc) -Xlinker -rpath=$(cuda_home)lib64 $(LDLIBS)
# CUDNN=1: with cuDNN's attention (--cudnn). CUDNN_FRONTEND: the folder that cudnn_frontend.h is in, CUDNN_HOME: that of cuDNN's include and lib (of PyTorch's wheels: nvidia/cudnn), if nvcc does not know them.
CUDNN =
CUDNN_HOME =
CUDNN_FRONTEND =
nccl_libs = -L$(NCCL_HOME)/lib -L$(NCCL_HOME)/lib64 -Xlinker -rpath=$(NCCL_HOME)/lib -l:libnccl.so.2
# Where the object of nvcc and what is linked with it are: tools/check_cuda.sh has another one.
CUDA_ROOM = build/cuda$(if $(CUDNN),-cudnn)

cuda:
	@tests/need.sh $(NVCC) nvidia-cuda-toolkit -- $(MAKE) --no-print-directory $(CUDA_ROOM)/llmpar_cuda.o
$(CUDA_ROOM)/llmpar_cuda.o: build/dev/llmpar_cuda.h build/dev/llmpar.h
	@mkdir -p $(@D)
	$(NVCC) -std=c++17 -O3 -t 0 -lineinfo $$(tools/cuda_flags.sh $(NVCC) $(CUDA_FOR)) --Werror all-warnings -DLLMPAR_CUDA_IMPLEMENTATION $(if $(CUDNN),-DLLMPAR_USE_CUDNN $(CUDNN_FRONTEND:%=-I%) $(CUDNN_HOME:%=-I%/include)) -x cu -c $< -o $@
$(CUDA_ROOM)/test_%: tests/test_%.c $(CUDA_ROOM)/llmpar_cuda.o $(CUDA_LIB)
	@$(NVCC) -O1 -g -Ibuild/dev -Itests $(filter %.c %.o %.a,$^) -o $@ $(cuda_libs)
$(CUDA_ROOM)/gpu_%: bench/gpu_%.c $(CUDA_ROOM)/llmpar_cuda.o $(CUDA_LIB) $(wildcard bench/*.h)
	@$(NVCC) -O2 -g -D_GNU_SOURCE -DBENCH_FLAGS='"$(OPT)"' -Ibuild/dev -Itests $(filter %.c %.o %.a,$^) -o $@ $(cuda_libs)
# Against the real NCCL.
print-nccl-home:
	@echo $(NCCL_HOME)
$(CUDA_ROOM)/llmpar_nccl.o: build/dev/llmpar_nccl.h build/dev/llmpar.h
	@[ -n '$(NCCL_HOME)' ] || { echo 'there is no nccl.h (Debian package: libnccl-dev; NCCL_HOME=/where/it/is)'; exit 1; }
	@mkdir -p $(@D)
	$(CC) -O1 $(DEBUG) -DLLMPAR_NCCL_IMPLEMENTATION -Ibuild/dev -I$(NCCL_HOME)/include -I$(cuda_home)include -x c -c $< -o $@
$(CUDA_ROOM)/real_nccl: tests/real_nccl.c $(CUDA_ROOM)/llmpar_nccl.o $(CUDA_ROOM)/llmpar_cuda.o $(CUDA_LIB) $(wildcard tests/*.h)
	$(NVCC) -O1 -g -D_GNU_SOURCE -Ibuild/dev -Itests $(filter %.c %.o %.a,$^) -o $@ $(nccl_libs) $(cuda_libs)
$(eval $(call suite,cuda,$(filter-out test_emulation,$(CUDA_SUITE))))

# The programs with --device cuda: on GPUs, with NCCL as well, and with the device emulated on the CPU.
CUDA_PROGRAMS := train_llama generate
define cuda_programs
$(CUDA_PROGRAMS:%=$(1)/%_cuda): $(1)/%_cuda: examples/%.c $(CUDA_ROOM)/llmpar_cuda.o $(CUDA_LIB) $(wildcard examples/common/*.h)
	$(NVCC) -O2 -g -DLLMPAR__IMPLEMENTED -DLLMPAR_USE_CUDA -Ibuild/dev $$(filter %.c %.o %.a,$$^) -o $$@ $$(cuda_libs)
$(CUDA_PROGRAMS:%=$(1)/%_nccl): $(1)/%_nccl: examples/%.c $(CUDA_ROOM)/llmpar_nccl.o $(CUDA_ROOM)/llmpar_cuda.o $(CUDA_LIB) $(wildcard examples/common/*.h)
	$(NVCC) -O2 -g -DLLMPAR__IMPLEMENTED -DLLMPAR__NCCL_IMPLEMENTED -DLLMPAR_USE_CUDA -DLLMPAR_USE_NCCL -Ibuild/dev $$(filter %.c %.o %.a,$$^) -o $$@ $$(nccl_libs) $$(cuda_libs)
endef
$(foreach place,build $(CUDA_ROOM),$(eval $(call cuda_programs,$(place))))
$(CUDA_PROGRAMS:%=build/%_emulated): build/%_emulated: examples/%.c build/emulated/llmpar_cuda.o build/emulated/cuda.o $(CUDA_LIB) $(wildcard examples/common/*.h)
	$(CC) -O2 $(DEBUG) -DLLMPAR__IMPLEMENTED -DLLMPAR_USE_CUDA -Ibuild/dev $(filter %.c %.o %.a,$^) -o $@ -lstdc++ $(LDLIBS)

check-cuda:
	@tests/need.sh $(NVCC) nvidia-cuda-toolkit -- $(MAKE) --no-print-directory run-check-cuda
run-check-cuda: build/dev/llmpar_cuda.h build/dev/llmpar.h build/plain/llmpar.o
	@tools/check_cuda.sh $(NVCC)

# 1, 2 and 4 processes, a sample of the faults; test-mpi-full: 8 processes, both MPIs, every fault, five minutes of random delays.
MPI_PROGRAMS = test_mpi test_mpi_errors test_mpi_life test_mpi_fault test_exact
build-mpi-programs: $(MPI_PROGRAMS:%=build/mpi/%) build/mpi/test_nccl_processes build/mpi/train_llama
build-mpich-programs: $(MPI_PROGRAMS:%=build/mpich/%)
# Ranks that meet through MPI and then have NCCL's stand-in between them.
build/mpi/test_nccl_processes: tests/test_nccl_processes.c build/nccl/llmpar_nccl.o build/nccl/fake_nccl_processes.o build/mpi/llmpar.o $(wildcard tests/*.h)
	@$(MPICC) -DLLMPAR_USE_MPI -O1 $(DEBUG) $(NCCL_FLAGS) $(filter %.c %.o,$^) -o $@ $(LDLIBS)
build/mpi/train_llama: examples/train_llama.c build/mpi/llmpar.o
	@$(MPICC) -O2 $(DEBUG) -DLLMPAR__IMPLEMENTED -DLLMPAR_USE_MPI -Ibuild/dev -Iexamples $^ -o $@ $(LDLIBS)
test-mpi:
	@tests/need.sh $(MPICC) 'openmpi-bin libopenmpi-dev' -- $(MAKE) --no-print-directory run-mpi-quick
run-mpi-quick: build-mpi-programs
	@tests/mpi.sh quick
test-mpi-full:
	@tests/need.sh $(MPICC) 'openmpi-bin libopenmpi-dev' -- tests/need.sh mpicc.mpich mpich -- $(MAKE) --no-print-directory run-mpi-full
run-mpi-full: build-mpi-programs build-mpich-programs
	@tests/mpi.sh full

# PLANT=sample: every sixteenth of them.
test-plant:
	@tests/plant/run.sh $(PLANT:%=--%)

# FUZZ=60: seconds for each parser, on top of its corpus.
FUZZ = 8
FUZZERS := $(patsubst tests/fuzz/fuzz_%.c,%,$(wildcard tests/fuzz/fuzz_*.c))
# Two sanitizers and -O1 take clang minutes for the header; check-full has them.
FUZZ_OPT = -O0
fuzz_flags = $(DEBUG) $(FUZZ_OPT) -fno-sanitize-recover=all -fsanitize=address,undefined

build/fuzz/llmpar.o: build/dev/llmpar.h
	@mkdir -p $(@D)
	@$(CLANG) $(fuzz_flags),fuzzer-no-link -DLLMPAR_IMPLEMENTATION -DLLMPAR_NO_SIMD -x c -c $< -o $@ # parsers have no kernels

build/fuzz/fuzz_%: tests/fuzz/fuzz_%.c build/fuzz/llmpar.o tests/fuzz/fuzz.h examples/common/llama2c.h
	@$(CLANG) $(fuzz_flags),fuzzer -Ibuild/dev $(filter %.c %.o,$^) -o $@ $(LDLIBS)

# A private reader: its module and the JSON reader with sanitizers, the rest as it is.
build/fuzz/fuzz_manifest: tests/fuzz/fuzz_manifest.c src/model_io/manifest.c src/base/json.c build/separate/llmpar.a build/separate/llmpar.h tests/fuzz/fuzz.h
	@mkdir -p $(@D)
	@$(CLANG) $(fuzz_flags),fuzzer -DLLMPAR__SEPARATE -Ibuild/separate -Isrc $(filter %.c,$^) build/separate/llmpar.a -o $@ $(LDLIBS)

build-fuzz: $(FUZZERS:%=build/fuzz/fuzz_%)
run-fuzz: build-fuzz
	@tests/fuzz/run.sh $(FUZZ) $(FUZZERS)

test-fuzz:
	@CC=$(CLANG) tests/need.sh -fsanitize=fuzzer 'clang and libclang-rt-14-dev' -- $(MAKE) --no-print-directory run-fuzz

# ---- installation ----

PREFIX = /usr/local
# Below PREFIX unless absolute.
INCLUDEDIR = include

install uninstall:
	@DESTDIR='$(DESTDIR)' PREFIX='$(PREFIX)' INCLUDEDIR='$(INCLUDEDIR)' tools/install.sh $@

test-package: $(HEADERS:%=build/gen/%)
	@CC='$(CC)' CXX='$(CXX)' tests/need.sh $(CXX) g++ -- tests/package.sh

# ---- grading, and a step under gdb ----

include tests/conformance/grade.mk

# The commands of README.md and docs/, with the programs in build/; links and pictures.
test-docs: all
	@tests/docs.sh build

# ---- checks ----

# Symbols and warnings only, so without optimization, and what many modules include is parsed once: 20 seconds.
LAYERS := $(MODULES:src/%.c=build/layers/%.o) $(patsubst src/%.c,build/layers/%.o,$(filter src/nccl/%.c,$(SRC))) $(patsubst src/%.cu,build/layers/%.o,$(filter %.cu,$(SRC)))
# llmpar_cuda.h and llmpar_nccl.h on stand-ins for the headers of CUDA and NCCL.
layers_cc = $(CC) -O0 $(SEPARATE_FLAGS) -Wmisleading-indentation -Werror
layers_cuda = $(CXX) $(subst build/dev,build/gen,$(CUDA_CXXFLAGS)) -O0 -g0 -w -fno-exceptions -DLLMPAR_CUDA_EMULATED -Isrc
layers_nccl = $(layers_cc) -D_DEFAULT_SOURCE -D_POSIX_C_SOURCE=200809L -Ibuild/gen -Itests/fake_nccl

build/layers/%.o: src/%.c
	@mkdir -p $(@D)
	@$(layers_cc) -MMD -MP -c $< -o $@
build/layers/cpu/%.o: src/cpu/%.c build/layers/first_cpu.h.gch
	@mkdir -p $(@D)
	@$(layers_cc) -include build/layers/first_cpu.h -MMD -MP -c $< -o $@
build/layers/cuda/%.o: src/cuda/%.cu build/layers/first_cuda.h.gch
	@mkdir -p $(@D)
	@$(layers_cuda) -include build/layers/first_cuda.h -MMD -MP -x c++ -c $< -o $@
build/layers/nccl/%.o: src/nccl/%.c build/gen/llmpar.h
	@mkdir -p $(@D)
	@$(layers_nccl) -MMD -MP -c $< -o $@

build/layers/first_cpu.h.gch: src/cpu/vector.h src/base/platform.h
	@mkdir -p $(@D)
	@printf '#include "base/platform.h"\n#if defined(__x86_64__)\n#include <immintrin.h>\n#endif\n' >$(@:.gch=)
	@$(layers_cc) -x c-header $(@:.gch=) -o $@
build/layers/first_cuda.h.gch: build/gen/llmpar.h $(wildcard src/cuda/*.h tests/emulated_cuda/*.h)
	@mkdir -p $(@D)
	@echo '#include "cuda/cuda_internal.h"' >$(@:.gch=)
	@$(layers_cuda) -x c++-header $(@:.gch=) -o $@

-include $(wildcard build/layers/*/*.d)

check-layers: build/gen/llmpar.h
	@mkdir -p build/layers
	@rm -rf build/layers/failed $(filter-out $(LAYERS),$(wildcard build/layers/*/*.o))
	@$(MAKE) -s -k $(if $(filter -j%,$(MAKEFLAGS)),,-j$$(nproc 2>/dev/null || echo 1)) $(LAYERS) || touch build/layers/failed
	@tools/check_layers.sh

check-compile: $(HEADERS:%=build/gen/%)
	@tests/compile/run.sh

check-budget: $(HEADERS:%=build/gen/%)
	@tools/check_budget.sh

# Needs gcc's gcov.
coverage: build/separate/llmpar.a build/separate/llmpar.h
	@tests/need.sh gcov gcc -- tools/coverage.sh

check:
	@tools/check.sh

check-full:
	@tools/check.sh full

clean:
	rm -rf build

.PHONY: all help build-bench gen check-gen demo bench print-suite test test-separate test-header test-cxx test-asan test-tsan test-bf16 test-aarch64 test-aarch64-portable test-musl run-ported test-valgrind build-valgrind run-valgrind test-exact \
	test-cuda test-cuda-asan test-cuda-tsan test-cuda-plant check-cuda-memory run-check-cuda-memory run-gpu-small cuda check-cuda run-check-cuda test-nccl run-nccl-cuda test-nccl-asan test-nccl-tsan check-nccl print-nccl-home \
	test-mpi test-mpi-full run-mpi-quick run-mpi-full build-mpi-programs build-mpich-programs test-plant test-fuzz build-fuzz run-fuzz \
	check-layers check-compile check-budget coverage check check-full install uninstall test-package test-docs clean FORCE
.SECONDARY:
