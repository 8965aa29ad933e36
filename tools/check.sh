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
    table+=$(printf '%-10s %5d s  %5d passed, %d failed, %d skipped' "$name" "$seconds" "$p" "$f" "$s")$'\n'
}

make="make --no-print-directory"
phase gen $make check-gen
phase layers $make $jobs check-layers
phase budget $make check-budget
# The compile matrix is one command after the other: it runs beside the builds.
$make check-compile >build/check/matrix.log 2>&1 &
matrix=$!
# All configurations at once keep the processors busy. A warning is a failure; what cannot be built here is reported by its own phase.
build()
{
    $make $jobs -k build-plain build-separate build-cxx build-header build-asan build-tsan build-fuzz all >build/check/make.log 2>&1
    ! grep -A 6 'warning:' build/check/make.log
}
phase build build
wait $matrix
matrix=$?
compile() { cat build/check/matrix.log; return $matrix; }
phase compile compile
phase suite $make $jobs test
# The same tests in other builds of the same code: a quarter of what they draw at random.
LLMPAR_TEST_QUICK=1 phase header $make $jobs test-header
LLMPAR_TEST_QUICK=1 phase separate $make $jobs test-separate
LLMPAR_TEST_QUICK=1 phase cxx $make $jobs test-cxx
phase examples $make all
phase docs $make test-docs
[ -f tests/bad_input.sh ] && phase bad_input sh tests/bad_input.sh
[ -f tests/test_exact.c ] && LLMPAR_TEST_QUICK=1 phase exact $make test-exact
phase mpi $make $jobs test-mpi
phase aarch64 $make $jobs test-aarch64
phase musl $make $jobs test-musl
phase package $make test-package
phase grade $make test-grade
phase gdb $make test-gdb
phase plant $make test-plant
phase asan $make $jobs test-asan
phase tsan $make $jobs test-tsan
phase fuzz $make test-fuzz FUZZ=$([ -n "$full" ] && echo 60 || echo 8)
if [ -n "$full" ]; then
    [ -f tests/test_exact.c ] && LLMPAR_TEST_TIMEOUT=3600 LLMPAR_TEST_FULL=1 phase exact-full $make test-exact
    LLMPAR_TEST_SOAK=300 phase soak $make test TEST=test_stuck
    phase mpi-full $make $jobs test-mpi-full
    phase aarch64-portable $make test-aarch64-portable
    [ -f examples/demo.c ] && phase demo $make demo
fi

echo
echo "$table"
if [ "$skipped" -gt 0 ]; then echo "$passed passed, $failed failed, $skipped skipped"; else echo "$passed passed, $failed failed"; fi
[ "$failed" -eq 0 ]
