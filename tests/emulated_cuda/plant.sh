#!/bin/bash
# Leaves out one barrier or wait of the kernels at a time, and expects the tests of that file to notice, on one of a few seeds. tests/emulated_cuda/plant.sh [--sample] [FILE:LINE...]; after `make test-cuda`.
# --sample: every eighth. A line that ends in "no test can tell: why" after its call is passed over.
folder=build/emulated
passed=0 failed=0
declare -A tests=([norm]=rows [rope]=rows [swiglu]=rows [elementwise]=rows [rows_internal]=rows [embedding]=vocabulary [xent]=vocabulary [cast]=sums [tree_sum]=sums [squares]=sums [xent_loss]=sums [exact_internal]=sums
    [optim]=optim [adalomo]=optim [gemm]=gemm [gemm_half]=gemm [gemm_f32]=gemm [tiles_internal]=gemm [shared_comm]=comm)
test_of() { case $1 in attention*) echo test_cuda_attention ;; *) echo "test_cuda_${tests[$1]:-$1}" ;; esac; }

sites=()
if [ $# -gt 0 ] && [ "$1" != --sample ]; then sites=("$@")
else
    k=0
    while IFS=: read -r file line text; do
        case $text in *'no test can tell:'*) continue ;; esac
        k=$((k + 1))
        [ "$1" != --sample ] || [ $((k % 8)) -eq 1 ] || continue
        sites+=("$(basename "$file"):$line")
    done < <(grep -nE '^[^*]*(__syncthreads|__syncwarp|copy_async_wait<[^>]*>) *\(' src/cuda/*.cu src/cuda/*_internal.h)
fi
for site in "${sites[@]}"; do
    test=$(test_of "${site%%.*}")
    caught=
    for seed in 1 2 3; do
        EMULATED_CUDA_SKIP=$site EMULATED_CUDA_SEED=$seed timeout 120 "$folder/$test" >$folder/plant.log 2>&1 && continue
        caught=$(grep -m 1 -E 'emulated_cuda:|:[0-9]+: ' $folder/plant.log | cut -c 1-140)
        [ -n "$caught" ] || caught='it crashed'
        break
    done
    if [ -n "$caught" ]; then passed=$((passed + 1)); echo "$site caught by $test (seed $seed): $caught"
    else failed=$((failed + 1)); echo "FAILED $site: $test does not miss it"; fi
done
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
