#!/bin/sh
# tests/bench.sh [FOLDER]: the command lines of the benchmarks: each says what it takes, and refuses what it does not, by name, before anything runs. FOLDER holds them (default build/bench).
# The last line is "N passed, M failed".
folder=$(cd "${1:-build/bench}" 2>/dev/null && pwd)
[ -x "$folder/train_step" ] || { echo "bench: ${1:-build/bench}/train_step is not there: run make build-bench first"; echo "0 passed, 1 failed"; exit 1; }
. tests/commands.sh
run() # CODE PROGRAM ARGUMENTS..: ends in time and with this code
{
    code=$1 program=$2
    shift 2
    timeout 60 "$folder/$program" "$@" >stdout 2>stderr
    got=$?
    [ "$got" -eq "$code" ] || { echo "exit code $got, expected $code" >>stderr; false; }
}
helps() # PROGRAM WORD: to stdout, what it is called by and about each argument something, in lines of a terminal
{
    run 0 "$1" "$2" && [ ! -s stderr ] && head -n 1 stdout | grep -q "^usage: $1 *" && [ "$(wc -l <stdout)" -ge 3 ] && ! grep -qE '.{140}' stdout
}
refuses() # PATTERN PROGRAM ARGUMENTS..: one line on stderr that names the program and has the pattern, nothing on stdout, no file
{
    pattern=$1 name=$2
    shift
    run 2 "$@" && [ ! -s stdout ] && [ "$(wc -l <stderr)" -eq 1 ] && grep -q "^$name: .*$pattern.*expected" stderr && [ -z "$(ls | grep -v -e '^stdout$' -e '^stderr$')" ]
}

programs="bench_attention bench_check bench_checkpoint bench_comm bench_gemm bench_generate bench_model_io bench_ops bench_peak longest_sequence train_step"
for program in $programs; do
    check "$program --help" helps "$program" --help
    check "$program -h" helps "$program" -h
    check "$program --nonsense" refuses '"--nonsense"' "$program" --nonsense
done
for program in bench_attention bench_comm bench_gemm bench_generate bench_ops bench_peak train_step; do check "$program --json" refuses '--json ""' "$program" --json; done

# Scripts: what stands at their top.
for script in tools/gpu_check tools/install.sh bench/gpu_train bench/curves.sh; do
    check "$script --help" eval '"$top/$script" --help >stdout 2>stderr && [ ! -s stderr ] && grep -q "$(basename "$script")" stdout && [ "$(wc -l <stdout)" -ge 2 ] && ! grep -q "^cd " stdout'
done

# What is no number, or none of these; one argument too many.
check "level" refuses 'LEVEL "avx521"' bench_gemm avx521
check "kind" refuses 'KIND "nx"' bench_gemm portable nx 8 8 8
check "half a shape" refuses '"nt"' bench_gemm portable nt 8 8
check "no number" refuses 'K "8x"' bench_gemm portable nt 8 8 8x
check "too small" refuses 'M "0"' bench_gemm portable nt 0 8 8
check "too large" refuses 'M "99999999999999999999"' bench_gemm portable nt 99999999999999999999 8 8
check "pieces" refuses 'PIECES "65"' bench_gemm portable nt 8 8 8 65
check "type" refuses 'DTYPE "f64"' bench_gemm portable nt 8 8 8 8 f64
check "threads" refuses 'THREADS "3"' bench_gemm portable nt 8 8 8 8 f32 3
check "more" refuses '"more"' bench_gemm portable nt 8 8 8 8 f32 1 more
check "pairs" refuses '--pairs "-1"' bench_attention --pairs -1
check "pairs of nothing" refuses '--pairs ""' bench_attention --pairs
check "heads" refuses 'HEADS "3"' bench_attention portable 1 16 3 2 8
check "half an attention" refuses '"16"' bench_attention portable 1 16 3
check "attention's type" refuses 'DTYPE "i8"' bench_attention portable 1 16 2 2 8 i8
check "operation" refuses '"swigloo"' bench_ops swigloo
check "operation's type" refuses 'adamw "bf16"' bench_ops bf16 adamw
check "peak" refuses '"1"' bench_peak 1
check "steps" refuses 'STEPS "4001"' bench_check 4001
check "ranks" refuses '--ranks "1"' bench_comm --ranks 1
check "ranks of nothing" refuses '--ranks ""' bench_comm --ranks
check "megabytes" refuses 'MB "15"' bench_checkpoint . 15
check "rounds" refuses 'ROUNDS "5.5"' bench_checkpoint . 16 5.5
check "directory" refuses "DIRECTORY" bench_checkpoint "it's"
check "mebibytes" refuses 'MIB "1e3"' bench_model_io . 1e3
check "folder" refuses 'FOLDER ""' bench_model_io ""
check "limit" refuses 'LIMIT_MIB "nan"' longest_sequence nan
check "multiples" refuses 'STEP "1"' longest_sequence 24 1
check "lengths" refuses '--seq "256;512"' train_step --model 15m --seq '256;512'
check "no lengths" refuses '--seq ""' train_step --seq ""
check "layout" refuses '--layout "pp2"' train_step --model 15m --seq 16 --layout pp2
check "no layout" refuses '--layout ""' train_step --model 15m --seq 16 --layout
check "recompute" refuses '--recompute "half"' train_step --recompute half
check "recompute every" refuses '--recompute "0"' train_step --recompute full,0
check "step's type" refuses '--dtype "f16"' train_step --dtype f16
check "step's level" refuses '--level "sse"' train_step --model 15m --seq 16 --layout 1x1 --level sse
check "batch" refuses '--batch "2 "' train_step --batch '2 '
check "model" refuses '--model.*"7b"' train_step --model 7b --layout 1x1
check "options without a word" refuses '"--texts"' bench_generate --texts 2
check "texts" refuses '--texts "17"' bench_generate tokens --texts 17

# What serves answers a line at a time, until the input ends; what is no request ends it with a word.
serves() { printf '%b' "$2" | run "$1" train_step --model tiny --seq 32 --dtype f32 --layout 1x1 --serve && [ "$(wc -l <stdout)" -eq "$3" ] && grep -q '^ready [0-9.]* loss [0-9.]*$' stdout; }
check "two steps" serves 0 'step\nstep' 3
check "no step" serves 0 '' 1
check "stepp" serves 2 'step\nstepp\nstep\n' 2
check "its word" grep -q '^train_step: --serve: line "stepp": expected "step"$' stderr

# And what is right runs, and says the same in its file.
check "a product" run 0 bench_gemm portable nt 16 16 16 1 f32 --json gemm.json
check "its line" grep -q 'portable f32 nt 16 x 16 x 16, 1 piece .*GFLOP/s.* % .* of mul+add' stdout
check "its file" eval 'grep -q "\"part\": \"gemm\"" gemm.json && grep -q "\"command\": \".*bench_gemm portable nt 16 16 16 1 f32 --json gemm.json\"" gemm.json && [ "$(grep -c "\"name\": \"portable f32 nt 16 x 16 x 16, 1 piece\"" gemm.json)" -eq 1 ]'
check "a step" run 0 train_step --model tiny --seq 32 --dtype f32 --layout 1x1 --steps 1
check "its line" grep -q 'tiny .*1x1' stdout

ends
