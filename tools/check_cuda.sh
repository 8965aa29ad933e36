#!/bin/bash
# The CUDA device as nvcc builds it, without a GPU: no warnings, no spills in hot kernels, links, and says cleanly that there is no device. tools/check_cuda.sh [NVCC]; the compiler's report is build/cuda_ci/ptxas.log.
nvcc=${1:-nvcc}
folder=build/cuda_ci
passed=0 failed=0
mkdir -p $folder
good() { passed=$((passed + 1)); echo "$1"; }
bad() { failed=$((failed + 1)); echo "FAILED $1"; }

start=$(date +%s)
if "$nvcc" -std=c++17 -O3 -t 2 $(tools/cuda_flags.sh "$nvcc" ci) --Werror all-warnings -Xcompiler -Wall -Xptxas -v -DLLMPAR_CUDA_IMPLEMENTATION -x cu -c build/dev/llmpar_cuda.h -o $folder/llmpar_cuda.o >$folder/ptxas.log 2>&1; then
    good "nvcc: sm_80 and sm_90a, no warnings, $(($(date +%s) - start)) s"
else
    bad "nvcc:"
    grep -v '^ptxas info' $folder/ptxas.log | grep -E 'error|warning' | head -n 20
    echo "$passed passed, $failed failed"
    exit 1
fi

# A kernel's lines: "Compiling entry function 'NAME' for 'sm_80'", "N bytes stack frame, N bytes spill stores, N bytes spill loads", "Used N registers".
# Not hot: attention of f32 and of head dims that the tiled kernels do not take.
awk -v slow='llmpar__cuda_simple_(keys|queries)' '
    /Compiling entry function/ { split($0, part, "\047"); name = part[2]; arch = part[4]; kernels[arch]++ }
    /bytes spill stores/ { if (($5 + 0 || $9 + 0) && name ~ slow) printf "  %s on %s, which is not hot: %s\n", name, arch, $0
        else if ($5 + 0 || $9 + 0) { spills++; printf "FAILED %s on %s: %s\n", name, arch, $0 } else if ($1 + 0) { frames++; printf "  %s on %s has a stack frame: %s bytes\n", name, arch, $1 } }
    /Used [0-9]+ registers/ { match($0, /Used [0-9]+/); r = substr($0, RSTART + 5, RLENGTH - 5) + 0; if (r > most[arch]) { most[arch] = r; by[arch] = name } }
    END {
        for (a in kernels) printf "  %s: %d kernels, at most %d registers (%s)\n", a, kernels[a], most[a], by[a]
        exit spills > 0 || !length(kernels)
    }' $folder/ptxas.log && good "no hot kernel spills registers" || bad "registers: see above"

# Refused: what would change the bits.
for flag in --use_fast_math --ftz=true; do
    echo '#include "cuda/probe.cu"
          void *kernel = (void *)llmpar__cuda_probe;' >$folder/probe.cu
    if ! "$nvcc" -std=c++17 -arch=sm_80 -Isrc -Ibuild/dev -c $folder/probe.cu -o $folder/probe.o >$folder/fast.log 2>&1; then bad "probe.cu does not compile"
    elif "$nvcc" -std=c++17 $flag -arch=sm_80 -Isrc -Ibuild/dev -c $folder/probe.cu -o $folder/probe.o >$folder/fast.log 2>&1 || ! grep -q 'compiled_without_use_fast_math' $folder/fast.log; then bad "$flag is not refused"
    else good "$flag is refused"; fi
done

# Every test program links, and is skipped where no device is to be seen, whatever this machine has.
home=$(dirname "$(dirname "$(readlink -f "$(command -v "$nvcc")")")")
for source in tests/test_cuda_*.c; do
    test=$(basename "$source" .c)
    if ! "$nvcc" -O0 -Ibuild/dev -Itests "$source" $folder/llmpar_cuda.o "${CUDA_LIB:-build/plain/llmpar.o}" -o "$folder/$test" -lcublasLt -Xlinker "-rpath=$home/lib64" -lpthread -lm >$folder/link.log 2>&1; then
        bad "$test does not link:"
        tail -n 5 $folder/link.log
        continue
    fi
    CUDA_VISIBLE_DEVICES=-1 timeout 60 "$folder/$test" >$folder/run.log 2>&1
    code=$?
    if [ $code -eq 0 ] && grep -q 'skipped: cuda: no device: ' $folder/run.log && grep -qE '^[01] passed, 0 failed, [1-9][0-9]* skipped$' $folder/run.log; then good "$test links; without a device: $(grep -m 1 -o 'cuda: no device.*' $folder/run.log)"
    else
        bad "$test without a device: exit code $code"
        tail -n 5 $folder/run.log
    fi
    rm -f "$folder/$test"
done
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
