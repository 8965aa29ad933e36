#!/bin/bash
# The CUDA device as nvcc builds it, without a GPU: no warnings, no spills in hot kernels, no more instructions in their loops than are known; every program of it links, those with NCCL where there is one, and says cleanly that there is no device.
# tools/check_cuda.sh [NVCC]; the compiler's report is build/cuda_ci/ptxas.log.
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

# Main loops of the kernels on the matrix units. CUOBJDUMP: where that is, if neither beside nvcc nor in the path.
loops() { awk -v allowed=tools/sass_allowed.txt -f tools/sass.awk "$@"; }
disassemble=${CUOBJDUMP:-$(command -v "$(dirname "$(command -v "$nvcc")")/cuobjdump" || command -v cuobjdump)}
if [ -z "$disassemble" ]; then echo "skipped: no cuobjdump: main loops are not counted"
elif ! "$disassemble" -sass $folder/llmpar_cuda.o >$folder/sass.txt 2>$folder/sass.log; then bad "cuobjdump: $(head -n 1 $folder/sass.log)"
elif ! loops $folder/sass.txt; then bad "main loops: see above"
else
    good "main loops issue no more than tools/sass_allowed.txt allows"
    if sed 's/MUFU\.EX2/LDL/' $folder/sass.txt | loops >/dev/null; then bad "local memory in a main loop is not noticed"; else good "local memory in a main loop is noticed"; fi
fi

# Refused: what would change the bits.
for flag in --use_fast_math --ftz=true; do
    echo '#include "cuda/probe.cu"
          void *kernel = (void *)llmpar__cuda_probe;' >$folder/probe.cu
    if ! "$nvcc" -std=c++17 -arch=sm_80 -Isrc -Ibuild/dev -c $folder/probe.cu -o $folder/probe.o >$folder/fast.log 2>&1; then bad "probe.cu does not compile"
    elif "$nvcc" -std=c++17 $flag -arch=sm_80 -Isrc -Ibuild/dev -c $folder/probe.cu -o $folder/probe.o >$folder/fast.log 2>&1 || ! grep -q 'compiled_without_use_fast_math' $folder/fast.log; then bad "$flag is not refused"
    else good "$flag is refused"; fi
done

# Every program links, and says why it cannot run where no device is to be seen, whatever this machine has: tests are skipped, the others end with one line on stderr.
tests=$(cd tests && ls test_cuda_*.c | sed 's/\.c$//')
nccl=$(make -s print-nccl-home NVCC="$nvcc")
programs=$(printf "$folder/%s " $tests train_llama_cuda generate_cuda gpu_train gpu_ops ${nccl:+train_llama_nccl real_nccl})
rm -f $programs
make -k -j "$(nproc 2>/dev/null || echo 1)" --no-print-directory NVCC="$nvcc" CUDA_ROOM=$folder $programs >$folder/link.log 2>&1
export CUDA_VISIBLE_DEVICES=-1
for test in $tests; do
    [ -x "$folder/$test" ] || { bad "$test does not link"; continue; }
    timeout 300 "$folder/$test" >$folder/run.log 2>&1
    code=$?
    if [ $code -eq 0 ] && grep -q 'skipped: cuda: no device: ' $folder/run.log && grep -qE '^[01] passed, 0 failed, [1-9][0-9]* skipped$' $folder/run.log; then good "$test links; without a device: $(grep -m 1 -o 'cuda: no device.*' $folder/run.log)"
    else
        bad "$test without a device: exit code $code"
        tail -n 5 $folder/run.log
    fi
done
# ends PROGRAM ARGUMENTS...: with exit code 1, nothing on stdout, and one line on stderr
ends()
{
    local program=$1 code
    shift
    [ -x "$folder/$program" ] || { bad "$program does not link"; return; }
    timeout 300 "$folder/$program" "$@" >$folder/run.out 2>$folder/run.log </dev/null
    code=$?
    if [ $code -eq 1 ] && [ ! -s $folder/run.out ] && [ "$(wc -l <$folder/run.log)" -eq 1 ] && grep -q 'cuda: no device: ' $folder/run.log; then good "$program links; without a device: $(cat $folder/run.log)"
    else
        bad "$program $* without a device: exit code $code"
        head -n 5 $folder/run.out $folder/run.log
    fi
}
ends train_llama_cuda --device cuda --model tiny --data README.md
[ -z "$nccl" ] || ends train_llama_nccl --device cuda --comm nccl --model tiny --data README.md
ends gpu_train --model tiny
ends gpu_ops
for program in generate_cuda ${nccl:+real_nccl}; do
    if [ -x "$folder/$program" ]; then good "$program links"; else bad "$program does not link"; fi
done
[ $failed -eq 0 ] || grep -E 'error|undefined|cannot find' $folder/link.log | head -n 20
rm -f $programs
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
