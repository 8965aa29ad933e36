#!/bin/bash
# tests/verify_parity.sh [FOLDER]: what verify_parity says about runs that are known to be equal, near, and wrong. FOLDER holds the example programs (default build). With LLMPAR_TEST_DATA also about a trained model.
# The last line is "N passed, N failed[, N skipped]".
programs=$(cd "${1:-build}" 2>/dev/null && pwd)
[ -x "$programs/verify_parity" ] || { echo "verify_parity: ${1:-build}/verify_parity is not there: run make first"; echo "0 passed, 1 failed"; exit 1; }
top=$(pwd)
work=$(mktemp -d "${TMPDIR:-/tmp}/parity.XXXXXX") || exit 1
trap 'rm -rf "$work"' EXIT
trap 'exit 1' INT TERM HUP
export LC_ALL=C TMPDIR=$work/tmp
mkdir "$TMPDIR"
cd "$work" || exit 1
passed=0 failed=0 skipped=0
${CC:-cc} -O1 "$top/tests/scale_tensor.c" -o scale_tensor || { echo "0 passed, 1 failed"; exit 1; }

# expect NAME CODE PATTERN COMMAND...: exit code, and a line of the output (an extended regular expression)
expect()
{
    local name=$1 code=$2 pattern=$3 got
    shift 3
    timeout 600 "$@" >output 2>&1 </dev/null
    got=$?
    if [ $got -eq "$code" ] && grep -Eq -- "$pattern" output && [ -z "$(ls -A tmp)" ]; then passed=$((passed + 1)); else
        failed=$((failed + 1))
        echo "FAILED $name: exit code $got, expected $code and a line $pattern, and nothing left in TMPDIR"
        tail -n 12 output | sed 's/^/    /'
    fi
}

# The ids of a golden file: each sequence and its last target.
golden_tokens()
{
    awk '{ gsub(/[^0-9]+/, " ", $0); print }' <<<"$(grep -o '"ids": \[\[.*' "$1" | sed 's/, "loss".*//')" >numbers
    read -r -a n <numbers
    local t=24 i k
    for i in 0 1; do
        for ((k = 0; k < t; k++)); do echo "${n[i * t + k]}"; done
        echo "${n[(3 + i) * t - 1]}"
    done
}
# Numbers, one a line, as u32.
u32() { while read -r n; do printf "\\x$(printf %02x $((n & 255)))\\x$(printf %02x $((n >> 8 & 255)))\\0\\0"; done; }

for model in linear_tied llama3_untied; do
    golden=$top/tests/golden/$model
    golden_tokens "$golden/expected.json" | u32 >"$model.u32"
    run=("$programs/verify_parity" --model "$golden" --tokens "$model.u32" --seq-len 24)
    expect "$model: twice the same" 0 '^equal: every number' "${run[@]}" --a tp=1 --b tp=1
    expect "$model: bf16 twice the same" 0 '^equal: every number' "${run[@]}" --a dtype=bf16 --b dtype=bf16
    expect "$model: f32, tp 2" 0 '^equal: every number' "${run[@]}" --a '' --b tp=2
    expect "$model: every policy at once" 0 '^equal: every number' "${run[@]}" --a grad-accum=2 --b dp-shard=2,tp=2,sp=on,wrap=half,recompute=full,prefetch=2+1,offload=optimizer=file+activations=host,overlap=on
    expect "$model: lomo on two replicas" 0 '^equal: every number' "${run[@]}" --a wrap=2 --b dp-replicate=2,zero=1,optimizer=lomo,threads=2,logits-bytes=1K
    expect "$model: other order of sums" 0 '^within: no tensor' "${run[@]}" --a exact=off --b tp=2
    expect "$model: bf16" 0 '^within: no tensor' "${run[@]}" --a '' --b dp-shard=2,tp=2,dtype=bf16
    expect "$model: f16" 0 '^within: no tensor' "${run[@]}" --a dtype=f64 --b dtype=f16
    expect "$model: a frozen unit has no gradient" 0 '^not compared: [1-9]' "${run[@]}" --a '' --b freeze=2
    # what a run writes is what it compares equal with, also without activations
    for list in '' tp=2,dtype=bf16,wrap=half dtype=f16; do
        rm -rf dump
        expect "$model: dump of $list" 0 'written to dump$' "${run[@]}" --b "$list" --dump dump
        expect "$model: reference of $list" 0 '^equal: every number' "${run[@]}" --b "$list" --reference dump
        rm dump/activations.safetensors
        expect "$model: reference of $list without activations" 0 '^equal: every number' "${run[@]}" --b "$list" --reference dump
    done
    "${run[@]}" --b dtype=bf16 --dump dump >/dev/null
    expect "$model: a reference that is in bf16, unsaid" 1 '^outside: the first is embed' "${run[@]}" --reference dump
    expect "$model: and said" 0 '^within: no tensor' "${run[@]}" --reference dump --reference-dtype bf16
    # float64 by transformers
    rm -rf dump
    mkdir dump
    cp "$golden/logits.safetensors" dump/
    cp "$golden/gradients.safetensors" dump/grads.safetensors
    expect "$model: golden file, f64" 0 '^within: no tensor' "${run[@]}" --b dtype=f64 --reference dump
    expect "$model: golden file, f32 on four ranks, and a" 0 '^== b against reference' "${run[@]}" --a tp=4 --b dp-shard=2,tp=2 --reference dump
    # planted errors: one tensor is a thousandth too large
    while read -r tensor first policy; do
        case $model-$tensor in linear_tied-lm_head*) continue ;; esac
        rm -rf planted
        cp -r "$golden" planted
        chmod -R u+w planted
        ./scale_tensor planted/model.safetensors "$tensor" 1.001 || { echo "FAILED $model: no tensor $tensor to scale"; failed=$((failed + 1)); continue; }
        expect "$model: $tensor scaled" 1 "^outside: the first is $first \\(" "${run[@]}" --a "$policy" --b "$policy${policy:+,}model=planted"
        cmp -s "$golden/model.safetensors" planted/model.safetensors && { echo "FAILED $tensor is not changed"; failed=$((failed + 1)); }
    done <<'END'
model.embed_tokens.weight embed
model.layers.0.input_layernorm.weight layers.0.attention wrap=half
model.layers.0.self_attn.o_proj.weight layers.0
model.layers.1.self_attn.q_proj.weight layers.1
model.layers.1.self_attn.k_proj.weight layers.1.attention wrap=half,tp=2
model.layers.1.mlp.up_proj.weight layers.1 wrap=half
model.layers.1.mlp.down_proj.weight layers.1 sp=on,tp=2
model.norm.weight logits
lm_head.weight logits
END
    # ... and one gradient
    rm -rf dump
    "${run[@]}" --b '' --dump dump >/dev/null
    ./scale_tensor dump/grads.safetensors model.layers.1.self_attn.v_proj.weight 1.001
    expect "$model: a gradient scaled" 1 '^outside: the first is model.layers.1.self_attn.v_proj.weight \(gradient\)' "${run[@]}" --reference dump
    echo '{"loss": 1}' >dump/loss.json
    expect "$model: another loss" 1 '^outside: the first is loss \(loss\)' "${run[@]}" --reference dump --json out.json
    grep -q '"first_outside": "loss"' out.json || { echo "FAILED $model: --json"; failed=$((failed + 1)); }
done
# the relatives, each with a planted error in what it has and Llama has not
while read -r model tensor; do
    golden=$top/tests/golden/$model
    golden_tokens "$golden/expected.json" | u32 >"$model.u32"
    run=("$programs/verify_parity" --model "$golden" --tokens "$model.u32" --seq-len 24)
    expect "$model: every policy at once" 0 '^equal: every number' "${run[@]}" --a '' --b dp-shard=2,tp=2,sp=on,wrap=half,recompute=selective
    expect "$model: bf16" 0 '^within: no tensor' "${run[@]}" --a '' --b dtype=bf16
    rm -rf dump planted
    mkdir dump
    cp "$golden/logits.safetensors" dump/
    cp "$golden/gradients.safetensors" dump/grads.safetensors
    expect "$model: golden file" 0 '^within: no tensor' "${run[@]}" --b tp=2 --reference dump
    [ -n "$tensor" ] || continue
    cp -r "$golden" planted
    chmod -R u+w planted
    ./scale_tensor planted/model.safetensors "$tensor" 1.01 || { echo "FAILED $model: no tensor $tensor to scale"; failed=$((failed + 1)); }
    expect "$model: $tensor scaled" 1 '^outside: the first is layers.1.attention \(' "${run[@]}" --a wrap=half --b wrap=half,model=planted
done <<'END'
mistral_window
qwen2_yarn model.layers.1.self_attn.k_proj.bias
qwen3_dynamic model.layers.1.self_attn.q_norm.weight
END
# a rest that is shorter than a sequence
head -c 196 linear_tied.u32 >short.u32
expect 'a rest' 0 'the last 24 ids make no sequence' "$programs/verify_parity" --model "$top/tests/golden/linear_tied" --tokens short.u32 --seq-len 24 --a '' --b tp=2

if [ -n "$LLMPAR_TEST_DATA" ]; then
    stories=$LLMPAR_TEST_DATA/stories260K/hf
    for ((i = 0; i < 4 * 65; i++)); do echo $(((i * i * 7 + i * 13 + 1) % 512)); done | u32 >stories.u32
    run=("$programs/verify_parity" --model "$stories" --tokens stories.u32 --seq-len 64)
    expect 'stories260K: four ranks' 0 '^equal: every number' "${run[@]}" --a '' --b dp-shard=2,tp=2,sp=on
    expect 'stories260K: bf16' 0 '^within: no tensor' "${run[@]}" --a '' --b dp-shard=2,tp=2,dtype=bf16
    expect 'stories260K: f16' 0 '^within: no tensor' "${run[@]}" --a '' --b dtype=f16
    expect 'stories260K: f64' 0 '^within: no tensor' "${run[@]}" --a '' --b dtype=f64
else
    echo 'skipped: stories260K: LLMPAR_TEST_DATA is not set'
    skipped=4
fi
if [ $skipped -gt 0 ]; then echo "$passed passed, $failed failed, $skipped skipped"; else echo "$passed passed, $failed failed"; fi
[ "$failed" -eq 0 ]
