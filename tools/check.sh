#!/bin/bash
# make check: everything a commit has to pass, phase by phase, with the seconds of each. `full` adds the long runs.
# The last line sums up all phases: N passed, N failed[, N skipped].
# With LLMPAR_NO_SKIP=1, as .ci/run sets it, a suite that is skipped for want of a compiler or a sanitizer is a failure.
full=$1
jobs=-j$(nproc 2>/dev/null || echo 1)
mkdir -p build/check
passed=0 failed=0 skipped=0
table=

# phase NAME COMMAND...: counts the command's own "N passed, N failed", or its exit code as one test.
phase()
{
    local name=$1 log=build/check/$1.log start seconds code last p=0 f=0 s=0
    shift
    echo
    echo "== $name"
    start=$(date +%s)
    "$@" 2>&1 | tee "$log"
    code=${PIPESTATUS[0]}
    seconds=$(($(date +%s) - start))
    last=$(grep -E '^[0-9]+ passed, [0-9]+ failed(, [0-9]+ skipped)?$' "$log" | tail -n 1)
    if [[ $last =~ ^([0-9]+)\ passed,\ ([0-9]+)\ failed(,\ ([0-9]+)\ skipped)?$ ]]; then
        p=${BASH_REMATCH[1]} f=${BASH_REMATCH[2]} s=${BASH_REMATCH[4]:-0}
        if [ "$code" -ne 0 ] && [ "$f" -eq 0 ]; then f=1; fi
    elif [ "$code" -eq 0 ]; then p=1; else f=1; fi
    passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
    [ "$1" = behind ] && last=", $(cut -d' ' -f2 "build/check/beside.$2.code") s beside others" || last=
    table+=$(printf '%-10s %5d s  %5d passed, %d failed, %d skipped%s' "$name" "$seconds" "$p" "$f" "$s" "$last")$'\n'
}

# beside NAME COMMAND...: runs on while other phases do; `phase NAME behind NAME` waits for its end and counts it.
beside()
{
    local log=build/check/beside.$1
    shift
    rm -f "$log.code"
    { start=$(date +%s); "$@" >"$log" 2>&1; echo "$? $(($(date +%s) - start))" >"$log.end"; mv "$log.end" "$log.code"; } &
    echo $! >"$log.pid"
}
ended() # in a pipeline, whose shell cannot wait for a job of the outer one
{
    local log=build/check/beside.$1 lives=1
    while [ ! -s "$log.code" ]; do
        [ -n "$lives" ] || echo "137 0" >"$log.code" # killed, for want of memory perhaps
        kill -0 "$(cat "$log.pid")" 2>/dev/null || lives=
        sleep 0.2
    done
}
behind()
{
    ended "$1"
    cat "build/check/beside.$1"
    return "$(cut -d' ' -f1 "build/check/beside.$1.code")"
}
# patiently [after NAME] COMMAND...: with what time the tests leave, which wait for each other and for deadlines: beside compilers of low priority they find a processor as soon as they want one.
patiently()
{
    renice -n 15 -p "$BASHPID" >/dev/null
    if [ "$1" = after ]; then ended "$2"; shift 2; fi
    "$@"
}

make="make --no-print-directory"
export EXAMPLE_LIB=build/plain/llmpar.o DEBUG=-g1
[ -n "$full" ] || export PARTS=1 # the matrix compiles the whole header with both MPIs
phase gen $make check-gen
beside budget $make check-budget # one compilation after the other, in processor time
phase layers $make $jobs check-layers
# Many programs at once keep the processors busy. A warning is a failure; what cannot be built here is reported by its own phase.
# In the further builds of the same code not all programs run; in check-full they do.
all=$($make -s print-suite)
some="test_base test_comm test_gemm test_half test_fsdp test_schedule test_model test_checkpoint"
raced="test_cpu test_comm test_stream test_stream_ranks test_trace test_debug test_fail test_launch test_mismatch test_record test_stuck test_offload test_offload_trouble test_inside test_checkpoint_resume"
checked=${all/test_plan /} # under AddressSanitizer it takes as long as half of the others together;
checked=${checked/test_threads /} # these repeat what others run: for bits,
checked=${checked/test_checkpoint_crash /} # and with the power gone at every call, where test_checkpoint_calls has it fail
[ -z "$full" ] || some=$all raced=$all checked=$all
programs() { local folder=$1; shift; printf "build/$folder/%s " "$@"; }
build() # LOG TARGET...
{
    local log=build/check/make.$1
    shift
    $make $jobs -k "$@" >"$log" 2>&1
    ! grep -A 6 'warning:' "$log"
}
# What the first suites need; then, while those run, the rest, the compile matrix and nvcc. The implementations first: each takes one processor long, and what waits for it starts as soon as it is there.
build_first()
{
    build headers build/dev/llmpar.h build/dev/llmpar_cuda.h build/dev/llmpar_nccl.h # or make would begin with what does not wait for them
    build first $(programs header llmpar.o) $(programs plain llmpar.o) build/separate/llmpar.a ${full:+build/cxx/llmpar.o} build-plain build/plain/test_exact build-bench all $(programs header $some) build/bf16/test_gemm build-mpi-programs \
        ${full:+build-cxx build-separate}
}
build_rest()
{
    build rest build/asan/llmpar.o build/tsan/llmpar.o build/emulated/llmpar_cuda.o build-emulated build/emulated/gpu_ops build/emulated_memory/test_memory build/emulated_memory/memory_kernels build-nccl build/nccl/real_nccl build/nccl/real_nccl_processes \
        build-fuzz $(programs asan $checked) $(programs tsan $raced) build/nccl_tsan/test_nccl_train ${full:+FUZZ_OPT=-O1}
}
phase build build_first
phase budget behind budget
beside rest patiently build_rest
beside compile patiently after rest $make check-compile
beside cuda patiently after rest $make check-cuda
phase suite $make $jobs test
# The same tests in other builds: a quarter of what they draw at random.
LLMPAR_TEST_QUICK=1 phase header $make $jobs test-header SUITE="$some"
[ -z "$full" ] || LLMPAR_TEST_QUICK=1 phase separate $make $jobs test-separate # the planted faults are in such builds too
[ -z "$full" ] || LLMPAR_TEST_QUICK=1 phase cxx $make $jobs test-cxx
phase examples $make all
phase valgrind $make test-valgrind
emulated=TEST=test_gemm
[ -z "$full" ] || emulated=
LLMPAR_TEST_QUICK=1 phase bf16 $make $jobs test-bf16 $emulated
# Each of these is one command after the other: two at a time.
beside package $make test-package
beside bad_input sh tests/bad_input.sh
phase docs $make test-docs
phase trace tests/need.sh python3 python3 -- sh tests/trace.sh
phase peers tests/peers.sh
phase bench tests/bench.sh
phase parity tests/verify_parity.sh
phase bad_input behind bad_input
phase package behind package
beside grade $make test-grade
phase gdb $make test-gdb
LLMPAR_TEST_QUICK=1 phase exact $make test-exact
phase grade behind grade
phase mpi $make $jobs test-mpi
phase elastic tests/elastic.sh # also with the processes that mpi has built
phase rest behind rest
beside nccl $make test-nccl # mostly waits
LLMPAR_TEST_QUICK=1 phase emulated $make $jobs test-cuda
phase cuda-memory $make check-cuda-memory
LLMPAR_TEST_QUICK=1 phase asan $make $jobs test-asan SUITE="$checked"
phase nccl behind nccl
LLMPAR_TEST_QUICK=1 phase tsan $make $jobs test-tsan SUITE="$raced"
LLMPAR_TEST_QUICK=1 phase nccl-tsan $make $jobs test-nccl-tsan $([ -n "$full" ] || echo TEST=test_nccl_train)
[ -z "$full" ] || phase nccl-asan $make $jobs test-nccl-asan
[ -z "$full" ] || LLMPAR_TEST_QUICK=1 phase emulated-asan $make $jobs test-cuda-asan
[ -z "$full" ] || phase emulated-tsan $make $jobs test-cuda-tsan
[ -z "$full" ] || phase check-nccl $make check-nccl
LLMPAR_FUZZ_SEED=$([ -n "$full" ] && echo 0 || echo 1) phase fuzz $make test-fuzz ${full:+FUZZ_OPT=-O1} FUZZ=$([ -n "$full" ] && echo 60 || echo 8)
if [ -z "$full" ]; then
    phase plant $make test-plant PLANT=sample
    LLMPAR_TEST_QUICK=1 phase aarch64 $make $jobs test-aarch64 TEST='test_attention test_generate' # where products, and what decoding makes of them, have other kernels
else
    phase plant $make test-plant
    phase cuda-plant $make test-cuda-plant
    LLMPAR_TEST_TIMEOUT=3600 LLMPAR_TEST_FULL=1 phase exact-full $make test-exact
    LLMPAR_TEST_TIMEOUT=3600 LLMPAR_TEST_FULL=1 phase resume-full $make test TEST="test_checkpoint test_checkpoint_crash"
    LLMPAR_TEST_SOAK=300 phase soak $make test TEST=test_stuck
    phase mpi-full $make $jobs test-mpi-full
    phase aarch64 $make $jobs test-aarch64
    phase aarch64-portable $make test-aarch64-portable
    phase musl $make $jobs test-musl
    phase demo $make demo
    phase coverage $make $jobs coverage
fi
phase compile behind compile
phase cuda behind cuda

echo
echo "$table"
if [ "$skipped" -gt 0 ]; then echo "$passed passed, $failed failed, $skipped skipped"; else echo "$passed passed, $failed failed"; fi
[ "$failed" -eq 0 ]
