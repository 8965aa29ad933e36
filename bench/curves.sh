#!/bin/bash
# The same training in f32, bf16 and f16 on real text: losses of every step as CSV, one picture, and the bar: at the end (mean of the last 10 steps) within 2 % of f32.
#   bench/curves.sh TEXT_FILE [STEPS] [OUT]      (default 200 steps, into build/curves/curves.csv and .svg)
case $1 in -h | --help) sed -n '2,${/^#/!q;s/^# \{0,1\}//p;}' "$0"; exit ;; esac
data=$1 steps=${2:-200} out=${3:-build/curves/curves}
[ -r "$data" ] || { echo "usage: bench/curves.sh TEXT_FILE [STEPS] [OUT]" >&2; exit 2; }
cd "$(dirname "$0")/.." && make --no-print-directory -s build/train_llama || exit 1
mkdir -p build/curves "$(dirname "$out")"
for dtype in f32 bf16 f16; do
    build/train_llama --model tiny --data "$data" --dp-shard 2 --seq-len 128 --batch 8 --steps $steps --lr 2e-3 --dtype $dtype --log build/curves/$dtype.jsonl --log-every $steps >build/curves/$dtype.txt || exit 1
    sed -n -E 's/.*"loss":([^,]*),.*/\1/p' build/curves/$dtype.jsonl >build/curves/$dtype.loss
done
{ echo step,f32,bf16,f16; paste -d, <(seq $steps) build/curves/f32.loss build/curves/bf16.loss build/curves/f16.loss; } >"$out.csv"
bench/plot "$out.csv" "$out.svg" "training loss, $steps steps, tiny model, dp_shard 2" step "loss (nats a byte)" || exit 1
awk -F, -v steps=$steps 'NR > 1 && NR > steps - 9 { for (i = 2; i <= 4; i++) sum[i] += $i; n++ }
    END { printf "mean loss of the last %d steps: f32 %.4f, bf16 %.4f (%+.2f %%), f16 %.4f (%+.2f %%); bar 2 %%\n", n, sum[2] / n, sum[3] / n, 100 * (sum[3] / sum[2] - 1), sum[4] / n, 100 * (sum[4] / sum[2] - 1)
          bad = sum[3] > sum[2] * 1.02 || sum[4] > sum[2] * 1.02 || sum[3] < sum[2] * 0.98 || sum[4] < sum[2] * 0.98; exit bad }' "$out.csv"
