#!/bin/sh
# bad_input: what the programs say to wrong command lines and broken files.
#
#     tests/bad_input.sh [FOLDER]       FOLDER holds train_llama, generate, verify_parity and convert (default: build)
#
# Every row is: exit code, what the line on stderr has to contain (a shell pattern: * and ? as usual), the command. The command runs in an empty folder and is asked to save, to log and to write
# gradients there. It has to end within 300 seconds (ranks wait for each other, and other work may run beside), with exactly that code (2: wrong command line, 1: anything found later), exactly one line on stderr, nothing on stdout, and the folder still empty.
# Needs no test data: the model directory that is broken in many ways is trained here. With LLMPAR_TEST_DATA set there are a few rows more. The last line is "N passed, N failed".

programs=$(cd "${1:-build}" 2>/dev/null && pwd)
for program in train_llama generate verify_parity convert; do
    [ -x "$programs/$program" ] || { echo "bad_input: ${1:-build}/$program is not there: run make first"; echo "0 passed, 1 failed"; exit 1; }
done
work=$(mktemp -d "${TMPDIR:-/tmp}/bad_input.XXXXXX") || exit 1
trap 'rm -rf "$work"' EXIT
trap 'exit 1' INT TERM HUP
files=$work/files
mkdir "$work/run" "$files"
cd "$work/run" || exit 1
export LC_ALL=C
passed=0 failed=0
late= # for a failure after training: what has rightly been written by then

complain()
{
    [ -n "$bad" ] || echo "FAILED $command"
    echo "    $1"
    bad=1
}

# row CODE PATTERN COMMAND...
row()
{
    code=$1 pattern=$2 bad=
    shift 2
    command="$*"
    timeout 300 "$@" >"$work/stdout" 2>"$work/stderr" </dev/null
    got=$?
    [ "$got" -eq 124 ] && complain "still running after 300 seconds"
    [ "$got" -eq "$code" ] || complain "exit code $got, expected $code"
    lines=$(wc -l <"$work/stderr")
    [ "$lines" -eq 1 ] || complain "$lines lines on stderr, expected 1"
    case $(cat "$work/stderr") in
    *$pattern*) ;;
    *) complain "expected on stderr: $pattern" ;;
    esac
    [ -z "$late" ] && [ -s "$work/stdout" ] && complain "on stdout, expected nothing: $(head -c 200 "$work/stdout")"
    written=$(find . -mindepth 1 | sort | tr '\n' ' ')
    [ "$written" = "$late" ] || complain "was written: ${written:-nothing}, expected: ${late:-nothing}"
    [ -z "$bad" ] || sed 's/^/    stderr: /' "$work/stderr"
    rm -rf "$work/run/"* "$work/run/".[!.]*
    if [ -n "$bad" ]; then failed=$((failed + 1)); else passed=$((passed + 1)); fi
}

# A good command line that asks for output; what is under test follows it and wins.
train()
{
    row_code=$1 row_pattern=$2
    shift 2
    row "$row_code" "$row_pattern" "$programs/train_llama" --model tiny --data "$files/text" --seq-len 16 --batch 4 --steps 2 --save save --log log.jsonl --save-gradients gradients.safetensors "$@"
}
generate()
{
    row_code=$1 row_pattern=$2
    shift 2
    row "$row_code" "$row_pattern" "$programs/generate" --model "$files/good" --tokens 4 --ids "$@"
}

# ---- good files, of which bad ones are made ----

seq 1 2000 >"$files/text"
"$programs/train_llama" --model tiny --data "$files/text" --seq-len 16 --batch 4 --steps 1 --save "$files/good" >"$work/stdout" 2>&1 || { cat "$work/stdout"; echo "bad_input: no model to break"; echo "0 passed, 1 failed"; exit 1; }
good=$files/good/model.safetensors
header_bytes=$(od -An -tu8 -N8 "$good" | tr -d ' ')
tail -c +9 "$good" | head -c "$header_bytes" >"$files/header"
tail -c +$((9 + header_bytes)) "$good" >"$files/data"
data_bytes=$(wc -c <"$files/data")

# The number as eight bytes, least first.
u64()
{
    n=$1
    for _ in 1 2 3 4 5 6 7 8; do
        printf "\\$(printf %03o $((n % 256)))"
        n=$((n / 256))
    done
}

# safetensors HEADER DATA: a file with this header and data becomes $bad_model/model.safetensors
bad_model=$files/bad
safetensors()
{
    rm -rf "$bad_model"
    mkdir "$bad_model"
    cp "$files/good/config.json" "$bad_model/"
    { u64 "$(wc -c <"$1")"; cat "$1" "$2"; } >"$bad_model/model.safetensors"
}

# edited_header SED: a file whose header was edited
edited_header()
{
    sed "$1" "$files/header" >"$files/edited"
    cmp -s "$files/header" "$files/edited" && { echo "bad_input: \"$1\" changes nothing in the header"; failed=$((failed + 1)); }
    safetensors "$files/edited" "$files/data"
}

# edited_config SED: a model whose config.json was edited
edited_config()
{
    rm -rf "$bad_model"
    mkdir "$bad_model"
    sed "$1" "$files/good/config.json" >"$bad_model/config.json"
    cmp -s "$files/good/config.json" "$bad_model/config.json" && { echo "bad_input: \"$1\" changes nothing in config.json"; failed=$((failed + 1)); }
    cp "$good" "$bad_model/"
}

# Where the data of a tensor begins in the file.
tensor_at()
{
    echo $((8 + header_bytes + $(sed "s/.*\"$1\":{[^}]*\"data_offsets\":\[\([0-9]*\),.*/\1/" "$files/header")))
}

# ---- the command line ----

for number in dp-replicate dp-shard tp threads seq-len batch grad-accum steps log-every; do
    train 2 "--$number \"0\": expected a whole number 1 .." --$number 0
    train 2 "--$number \"-1\": expected a whole number 1 .." --$number -1
    train 2 "--$number \"two\": expected a whole number" --$number two
    train 2 "--$number \"2x\": expected a whole number" --$number 2x
    train 2 "--$number \"1.5\": expected a whole number" --$number 1.5
    train 2 "--$number \"\": expected a whole number" --$number ''
    train 2 "--$number \"99999999999999999999\": expected a whole number" --$number 99999999999999999999
    train 2 "--$number \"4294967297\": expected a whole number" --$number 4294967297
done
train 2 '--warmup "-1": expected a whole number 0 ..' --warmup -1
train 2 '--seed "-1": expected a whole number 0 ..' --seed -1
train 2 '--seed "18446744073709551616": expected a whole number 0 ..' --seed 18446744073709551616
train 2 '--seed " -1": expected a whole number 0 ..' --seed ' -1'
train 2 '--lr "0": expected a number' --lr 0
train 2 '--lr "-0.1": expected a number' --lr -0.1
train 2 '--lr "nan": expected a number' --lr nan
train 2 '--lr "inf": expected a number' --lr inf
train 2 '--lr "1e999": expected a number' --lr 1e999
train 2 '--lr "fast": expected a number' --lr fast
train 2 '--sp "maybe": expected one of off, on' --sp maybe
train 2 '--no-sync "": expected one of off, on' --no-sync ''
train 2 '--exact "yes": expected one of off, on, require' --exact yes
# words OPTION EXPECTED WORD...: each is refused, and so is nothing
words()
{
    option=$1 expected=$2
    shift 2
    for word in '' "$@"; do train 2 "--$option \"${word}\": expected $expected" --"$option" "$word"; done
}
words sp 'one of off, on' maybe 1
words overlap 'one of off, on' yes
words zero 'one of 0, 1, 2, 3' 4 -1 three
words reshard 'one of last, always, never' sometimes -1
words accumulate 'one of tree, chain' sum
words pin 'one of auto, on, off' yes 1
train 1 'launch: pin = on: too many threads, 2 ranks x 200 threads' --pin on --threads 200 --tp 2
words dtype 'one of f32, f64, bf16, f16' f8 float32 BF16
words reduce-dtype 'one of f32, bf16, f16' f64
words recompute 'one of none, selective, full, auto' all fully
words optimizer 'one of adamw, sgd, lomo, adalomo' adam
words schedule 'one of cosine, constant, linear, wsd, wsd-sqrt, one-cycle' flat
words prefetch 'a whole number 0 .. 4' -1 5 all
words freeze 'a whole number 0 ..' -1 all
words wrap 'half or a whole number 1 .. 8' whole -1
words decay-steps 'a whole number 1 ..' 0 -1
words momentum 'a number 0 .. 1' -0.1 1 nan
words weight-decay 'a number 0 ..' -1 inf
words clip 'a number 0 ..' -1 nan
words lr-min 'a number' 0 -1
words loss-scale 'a number' 0 -2 huge 1e40
words save-shard 'bytes 1 .. 2^60, with K, M or G behind the number' 0 -1 1T 1.5G
words save-dtype 'one of f32, f64, bf16, f16' f8 float32 i32
words memory-limit 'bytes 1 .. 2^60, with K, M or G behind the number' 0 -1 1T 1e6 16MB 1.5G 2000000000G 99999999999999999999
words logits-bytes 'bytes 1 .. 2^60' 0 -1 many
train 2 '--wrap "0": expected a whole number 1 .. 8' --wrap 0
train 2 '--wrap "9": expected a whole number 1 .. 8' --wrap 9
train 2 '--reshard "0": expected a whole number 1 ..' --reshard 0
train 2 '--prefetch "5": expected a whole number 0 .. 4' --prefetch 1,5
train 2 '--prefetch "": expected a whole number 0 .. 4' --prefetch 1,
train 2 '--prefetch "2,3": expected a whole number 0 .. 4' --prefetch 1,2,3
train 2 '--recompute "0": expected a whole number 1 ..' --recompute full,0
train 2 '--recompute "": expected a whole number 1 ..' --recompute full,
train 2 '--offload "": expected a list like' --offload ''
for list in optimizer optimizer= =file optimizer=disk optimiser=file optimizer=filed optimizer:file 'optimizer=file; params=host' ,params=file params=file,,grads=file; do
    train 2 "--offload \"$list\": * expected optimizer, params, grads or activations, with =device, =host or =file" --offload "$list"
done
train 2 '--offload "params=file,": expected another state behind the comma' --offload params=file,
train 2 '--learning-rate' --learning-rate 1
train 2 '--d*ambiguous' --d 1
train 2 '--steps*requires an argument' --steps
train 2 '--print-schedule*allow an argument' --print-schedule=1
train 2 'unexpected argument "extra"' extra
train 2 '--device "gpu": expected one of cpu, cuda' --device gpu
train 2 '--device cuda: this program was built without CUDA, expected build/train_llama_cuda' --device cuda
train 2 '--device cuda: this program was built without CUDA' --device cuda --cuda-mode fast --tf32 --cudnn
train 2 '--cuda-mode "slow": expected one of exact, fast' --device cuda --cuda-mode slow
train 2 '--tf32: expected --cuda-mode fast beside it' --device cuda --tf32
train 2 '--cudnn: expected --cuda-mode fast beside it' --device cuda --cudnn --cuda-mode exact
train 2 '--cuda-mode, --tf32, --cudnn and --comm nccl say how to compute with --device cuda' --cuda-mode exact
train 2 '--cuda-mode, --tf32, --cudnn and --comm nccl say how to compute with --device cuda' --device cpu --comm nccl
train 2 '--cuda-graphs: expected --device cuda --cuda-mode fast beside it' --cuda-graphs
train 2 '--cuda-graphs: expected --device cuda --cuda-mode fast beside it' --cuda-graphs --tp 2
train 2 '--comm "mpi": expected one of threads, nccl' --device cuda --comm mpi
generate 2 '--device cuda: this program was built without CUDA, expected build/generate_cuda' --prompt-ids 1 --device cuda
generate 2 '--dtype "f8": expected one of f32, f64, bf16, f16' --prompt-ids 1 --dtype f8
train 2 '4096 x dp-shard 4096 x tp 4096 = 68719476736 ranks, expected at most 4096' --dp-replicate 4096 --dp-shard 4096 --tp 4096
row 2 '--save-shard and --save-dtype say how to --save' "$programs/train_llama" --model tiny --data "$files/text" --save-shard 1M
row 2 '--save-shard and --save-dtype say how to --save' "$programs/train_llama" --model tiny --data "$files/text" --save-dtype bf16
row 2 '--checkpoint-every needs --checkpoint DIR' "$programs/train_llama" --model tiny --data "$files/text" --checkpoint-every 2
row 2 '--keep needs --checkpoint DIR' "$programs/train_llama" --model tiny --data "$files/text" --keep 2
row 2 '--checkpoint-background needs --checkpoint DIR' "$programs/train_llama" --model tiny --data "$files/text" --checkpoint-background on
row 2 '--resume auto needs --checkpoint DIR' "$programs/train_llama" --model tiny --data "$files/text" --resume auto
row 2 '--resume step-4 needs --checkpoint DIR' "$programs/train_llama" --model tiny --data "$files/text" --resume step-4
train 2 '--checkpoint-every "0": expected a whole number 1 ..' --checkpoint c --checkpoint-every 0
train 2 '--keep "-1": expected a whole number 1 ..' --checkpoint c --keep -1
train 2 '--checkpoint-background "yes": expected one of off, on' --checkpoint c --checkpoint-background yes
train 2 '--checkpoint "": expected a directory' --checkpoint ''
train 2 '--resume "": expected a word or directory' --checkpoint c --resume ''
train 1 'nowhere: no checkpoint: neither manifest.json nor latest is there' --resume nowhere
train 1 'c/step-3/manifest.json: cannot open: No such file or directory' --checkpoint c --resume step-3
row 2 '--model is missing' "$programs/train_llama" --data "$files/text" --save save
row 2 '--data is missing' "$programs/train_llama" --model tiny --save save
row 2 'OMPI_COMM_WORLD_SIZE = 2, but this program was built without MPI: expected build/train_llama_mpi' env OMPI_COMM_WORLD_SIZE=2 "$programs/train_llama" --model tiny --data "$files/text" --save save
row 2 'PMI_SIZE = 4, but this program was built without MPI: expected build/generate_mpi' env PMI_SIZE=4 "$programs/generate" --model "$files/good" --prompt-ids 1
row 1 'LLMPAR_CPU "abacus" is not a dispatch level' env LLMPAR_CPU=abacus "$programs/train_llama" --model tiny --data "$files/text" --save save

generate 2 '--tokens "0": expected a whole number 1 ..' --prompt-ids 1 --tokens 0
generate 2 '--tp "-2": expected a whole number 1 ..' --prompt-ids 1 --tp -2
generate 2 '--at-once "0": expected a whole number 1 ..' --prompt-ids 1 --at-once 0
generate 1 'generation of text 1: token id 300 at position 0, expected 0 .. 255' --prompt-ids 1 --prompt-ids 300
generate 2 '--threads "no": expected a whole number 1 ..' --prompt-ids 1 --threads no
generate 2 '--temperature "-1": expected a number 0 ..' --prompt-ids 1 --temperature -1
generate 2 '--temperature "nan": expected a number 0 ..' --prompt-ids 1 --temperature nan
generate 2 '--top-p "0": expected a number' --prompt-ids 1 --top-p 0
generate 2 '--top-p "1.1": expected a number' --prompt-ids 1 --top-p 1.1
generate 2 '--top-k "-1": expected a whole number 0 ..' --prompt-ids 1 --top-k -1
generate 2 '--repeat-penalty "0": expected a number' --prompt-ids 1 --repeat-penalty 0
generate 2 '--stop-ids "1,x": expected numbers 0 or more, separated by commas' --prompt-ids 1 --stop-ids 1,x
generate 2 '--stop is empty, expected at least one token' --prompt-ids 1 --stop ''
generate 1 '--stop-ids "1,256": token id 256, expected 0 .. 255' --prompt-ids 1 --stop-ids 1,256
generate 2 '--seed "x": expected a whole number 0 ..' --prompt-ids 1 --seed x
generate 2 'expected exactly one of --prompt and --prompt-ids'
generate 2 'expected exactly one of --prompt and --prompt-ids' --prompt a --prompt-ids 1
generate 2 '--prompt is empty' --prompt ''
generate 2 '--prompt-ids "": expected numbers' --prompt-ids ''
generate 2 '--prompt-ids "1,": expected numbers' --prompt-ids 1,
generate 2 '--prompt-ids "1,,2": expected numbers' --prompt-ids 1,,2
generate 2 '--prompt-ids "1;2": expected numbers' --prompt-ids '1;2'
generate 2 '--prompt-ids "-1": expected numbers 0 or more' --prompt-ids -1
generate 2 '--prompt-ids "2147483648": expected numbers' --prompt-ids 2147483648
generate 2 '--prompt-ids "99999999999999999999": expected numbers' --prompt-ids 99999999999999999999
generate 2 '--beam' --prompt-ids 1 --beam 4
generate 2 'unexpected argument "more"' --prompt-ids 1 more
row 2 '--save-shard and --save-dtype say how to --save' "$programs/train_llama" --model tiny --data "$files/text" --save-shard 1M
row 2 '--save-shard and --save-dtype say how to --save' "$programs/train_llama" --model tiny --data "$files/text" --save-dtype bf16
row 2 '--model is missing' "$programs/generate" --prompt a

# ---- degrees, sizes ----

train 1 'num_attention_heads = 8 is not divisible by tp = 3' --tp 3
train 1 'num_attention_heads = 8 is not divisible by tp = 16' --tp 16 --batch 1
train 1 'batch = 4 is not divisible by 3 data ranks (dp_replicate 1 x dp_shard 3) x grad_accum 1 = 3' --dp-shard 3
train 1 'batch = 4 is not divisible by 6 data ranks (dp_replicate 3 x dp_shard 2) x grad_accum 1 = 6' --dp-shard 2 --dp-replicate 3
train 1 'batch = 4 is not divisible by 2 data ranks (dp_replicate 1 x dp_shard 2) x grad_accum 4 = 8' --dp-shard 2 --grad-accum 4
train 1 'sequence length 17 is not divisible by tp = 2' --seq-len 17 --tp 2 --sp on
train 1 'exact = require: 3 data ranks x grad_accum 1 is not a power of two that divides the 2 leaves of batch 6' --dp-shard 3 --batch 6 --exact require
train 1 'exact = require: 2 data ranks x grad_accum 3 is not a power of two that divides the 2 leaves of batch 6' --dp-shard 2 --batch 6 --grad-accum 3 --exact require
train 1 'exact = require: reduce_dtype bf16 rounds every rank' --dp-shard 2 --reduce-dtype bf16 --exact require
train 1 'seq_len = 4096, expected at most the model*max_position_embeddings = 1024' --seq-len 4096
generate 1 'num_attention_heads = 8 is not divisible by tp = 3' --prompt-ids 1 --tp 3
generate 1 'prompt of 2 ids + 1023 tokens is more than the model*max_position_embeddings = 1024' --prompt-ids 1,2 --tokens 1023
generate 1 'token id 256 at position 1, expected 0 .. 255' --prompt-ids 1,256
generate 1 'token id 2147483647 at position 0, expected 0 .. 255' --prompt-ids 2147483647 --tp 2

# ---- policies that contradict each other, or what they are used with ----

train 1 'recompute = AUTO needs memory_limit' --recompute auto
train 1 'updates inside backward with 2 micro-batches, expected 1' --optimizer lomo --grad-accum 2
train 1 'updates inside backward with 2 micro-batches, expected 1' --optimizer adalomo --grad-accum 2 --dp-shard 2
train 1 'gradients offloaded with updates inside backward, expected one of them' --optimizer lomo --offload grads=file --tp 2
train 1 'optimizer state offloaded with lomo in f32, expected not: it has none' --optimizer lomo --offload optimizer=file
train 1 'optimizer state offloaded with sgd in f64, expected not: it has none' --optimizer sgd --momentum 0 --dtype f64 --offload optimizer=host --dp-shard 2
train 1 'optimizer state offloaded with adalomo in f32, expected not: its factors stay on the device' --optimizer adalomo --offload optimizer=host
train 1 'adamw: momentum = 0.5, expected 0: it has none' --momentum 0.5
train 1 'adamw: momentum is switched off, expected it not to be set: it has none' --momentum 0
train 1 'lomo: momentum = 0.9, expected 0: it has none' --optimizer lomo --momentum 0.9 --dp-shard 2
train 1 'parameters offloaded that are whole at rest' --zero 0 --offload params=file --dp-shard 2
train 1 'parameters offloaded that are whole at rest' --zero 2 --offload params=host --dp-shard 2 --dtype f64
train 1 'parameters offloaded that are whole at rest' --offload params=file --tp 2
train 1 'chain with no_sync, expected one of them' --accumulate chain --no-sync on --grad-accum 2
train 1 'all 6 units are frozen, expected one to train' --freeze 6
train 1 'all 10 units are frozen, expected one to train' --freeze 1000 --wrap half --dp-shard 2
train 1 'loss scale: scale = 3, * expected powers of two' --dtype f16 --loss-scale 3
train 1 'loss scale: scale = 1e+30, * expected powers of two' --dtype f16 --loss-scale 1e30 --tp 2
train 1 'loss_scale with dtype f32, expected none' --loss-scale 1024
train 1 'loss_scale with dtype bf16, expected none' --loss-scale 1024 --dtype bf16 --dp-shard 2
train 1 'exact = require: reduce_dtype bf16 rounds every rank' --reduce-dtype bf16 --exact require
train 1 'exact = require: reduce_dtype f16 rounds every rank' --dtype bf16 --reduce-dtype f16 --exact require --dp-shard 2
train 1 'reduce_dtype bf16 with dtype f64, expected f64' --dtype f64 --reduce-dtype bf16
train 1 'reduce_dtype f32 with dtype f64, expected f64' --dtype f64 --reduce-dtype f32 --dp-shard 2
train 2 '--offload-update "disk": expected one of device, host' --offload-update disk
train 1 'updates on the host without optimizer params grads offloaded, expected optimizer, params and grads in host memory' --offload-update host
train 1 'updates on the host without params grads offloaded' --offload-update host --offload optimizer=host --dtype bf16
train 1 'updates on the host with optimizer=host, params=file, grads=host, expected all three offloaded to host' --offload-update host --offload optimizer=host,params=file,grads=host --dtype bf16
train 1 'parameters offloaded that are whole at rest' --offload-update host --offload optimizer=host,params=host,grads=host
train 1 'offload_update = host with lomo, expected adamw or sgd' --offload-update host --offload params=host,grads=host --dtype bf16 --optimizer lomo
train 1 'decay_steps = 10, expected 0: cosine has none' --decay-steps 10
train 1 'decay_steps = 100, expected at most total - warmup' --schedule wsd --decay-steps 100
train 1 'warmup = 1, expected 0: one-cycle rises until half way' --schedule one-cycle --warmup 1
train 1 'lr_min = 1, expected 0 .. lr = 0.001' --lr-min 1
train 1 'lr_min = 0.0001, expected 0: a constant schedule ends where it was' --schedule constant --lr-min 1e-4

# ---- limits that are too low: what is needed, where it ended, what would help ----

# needs POLICY...: bytes that the largest rank takes; the same with one byte less is refused, naming that number
needs()
{
    limit=$("$programs/train_llama" --model tiny --data "$files/text" --seq-len 16 --batch 4 --print-memory "$@" 2>&1 | sed -n 's/^together .* \([0-9]*\)$/\1/p')
    train 1 "memory limit $((limit - 1)) bytes a rank: a step takes $limit*; with *less*arena: * bytes: over the limit (limit $((limit - 1)), live *: parameters *workspace" --memory-limit $((limit - 1)) "$@"
    passed_before=$passed
    "$programs/train_llama" --model tiny --data "$files/text" --seq-len 16 --batch 4 --steps 1 --memory-limit "$limit" "$@" >"$work/stdout" 2>&1 && passed=$((passed + 1))
    [ "$passed" -gt "$passed_before" ] || { failed=$((failed + 1)); echo "FAILED --memory-limit $limit $*: $(cat "$work/stdout")"; }
}
needs
needs --zero 1 --dp-shard 2
needs --dtype bf16 --tp 2 --recompute selective
needs --overlap on --offload activations=host --dp-shard 2
train 1 'memory limit 1 bytes a rank: a step takes *zero 3: *sp on: *offload optimizer=file: *(limit 1, live 0: ' --memory-limit 1 --dp-shard 2 --tp 2 --zero 0
train 1 'memory limit 1024 bytes a rank: a step takes *, whatever is recomputed; with offload optimizer=file' --memory-limit 1K --recompute auto
train 1 'arena: communication *over the limit (limit 1024' --memory-limit 1K --recompute auto --print-memory

# ---- models and data that are not there ----

train 2 '--model: no directory of that name; llama preset: "enormous" is unknown, expected tiny, 15m, 110m, 300m or 1b' --model enormous
train 2 '--model: no directory of that name; llama preset: "" is unknown, expected tiny' --model ''
train 1 "$files/nowhere: cannot open: No such file" --data "$files/nowhere"
train 1 "$files: expected a regular file, got a directory" --data "$files" --dp-shard 2
train 1 '/dev/null: expected a regular file, got a device' --data /dev/null
: >"$files/empty"
printf 'short' >"$files/short"
train 1 "$files/empty: no data: the text has 0 bytes" --data "$files/empty"
train 1 "$files/short: too short: " --data "$files/short"
train 1 "$files/short: too short: " --data "$files/short" --seq-len 5 --dp-shard 2 --tp 2
mkdir "$files/nothing"
train 1 "$files/nothing/config.json: cannot open: No such file" --model "$files/nothing"
generate 1 "$files/nothing/config.json: cannot open: No such file" --model "$files/nothing" --prompt-ids 1
generate 1 "$files/text/config.json: cannot open: No such file" --model "$files/text" --prompt-ids 1
cp "$files/good/config.json" "$files/nothing/"
train 1 "$files/nothing/model.safetensors: cannot open: No such file" --model "$files/nothing"
generate 1 "$files/nothing/model.safetensors: cannot open: No such file" --model "$files/nothing" --prompt-ids 1 --tp 4
: >"$files/nothing/model.safetensors.index.json"
generate 1 "$files/nothing/model.safetensors.index.json: byte 0: expected a value, got the end" --model "$files/nothing" --prompt-ids 1

# ---- config.json ----

config() { config_code=$1 config_pattern=$2; edited_config "$3"; train "$config_code" "$bad_model/config.json: $config_pattern" --model "$bad_model" --dp-shard 2 --tp 2; }
for field in vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads; do
    config 1 "$field is missing (byte 0)" "/\"$field\"/d"
    config 1 "$field = null, expected an integer" "s/\"$field\": [0-9]*/\"$field\": null/"
done
for field in vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim max_position_embeddings; do
    config 1 "$field = -8, expected * (byte " "s/\"$field\": [0-9]*/\"$field\": -8/"
    config 1 "$field = 0, expected * (byte " "s/\"$field\": [0-9]*/\"$field\": 0/"
    config 1 "$field = 8.5, expected an integer * (byte " "s/\"$field\": [0-9]*/\"$field\": 8.5/"
    config 1 "$field = 1000000000000000000000, expected an integer * (byte " "s/\"$field\": [0-9]*/\"$field\": 1000000000000000000000/"
    config 1 "$field = 2147483647, expected an integer * (byte " "s/\"$field\": [0-9]*/\"$field\": 2147483647/"
    config 1 "$field = \"8\", expected an integer * (byte " "s/\"$field\": [0-9]*/\"$field\": \"8\"/"
done
config 1 'num_attention_heads = 8 is not divisible by num_key_value_heads = 3' 's/"num_key_value_heads": 4/"num_key_value_heads": 3/'
config 1 'head_dim = 15, expected an even number' 's/"head_dim": 16/"head_dim": 15/'
config 1 'rms_norm_eps = 0, expected a number above 0' 's/"rms_norm_eps": [^,]*/"rms_norm_eps": 0/'
config 1 'byte 372: expected a number up to 1.8e308' 's/"rms_norm_eps": [^,]*/"rms_norm_eps": 1e999/'
config 1 "byte 372: expected a value, got 'N'" 's/"rms_norm_eps": [^,]*/"rms_norm_eps": NaN/'
config 1 'rope_theta = -10000, expected' 's/"rope_theta": [^,]*/"rope_theta": -10000/'
config 1 'rope_type = "longrope", expected' 's/"rope_scaling": null/"rope_scaling": {"rope_type": "longrope", "factor": 2}/'
config 1 'factor is missing from rope_scaling' 's/"rope_scaling": null/"rope_scaling": {"rope_type": "linear"}/'
config 1 'factor = 0, expected a number from 1' 's/"rope_scaling": null/"rope_scaling": {"rope_type": "linear", "factor": 0}/'
config 1 'model_type = "gpt2", expected "llama"' 's/"model_type": "llama"/"model_type": "gpt2"/'
config 1 'hidden_act = "gelu", expected "silu"' 's/"hidden_act": "silu"/"hidden_act": "gelu"/'
config 1 'attention_bias = true, expected false' 's/"attention_bias": false/"attention_bias": true/'
config 1 'architectures = ?"LlamaForCausalLM"?, expected ?"Qwen2ForCausalLM"?' 's/"model_type": "llama"/"model_type": "qwen2"/'
config 1 'attention_factor = -1, expected a number above 0' 's/"rope_scaling": null/"rope_scaling": {"rope_type": "yarn", "factor": 2, "attention_factor": -1}/'
config 1 'sliding_window = 4096, expected null' 's/"rope_scaling": null/"sliding_window": 4096/'
edited_config 's/LlamaForCausalLM/MistralForCausalLM/; s/"model_type": "llama"/"model_type": "mistral", "sliding_window": 15/'
train 1 'sliding_window = 15 is shorter than the sequence, expected at least its 16 positions' --model "$bad_model" --dp-shard 2 --tp 2
config 1 'eos_token_id = 256, expected a token id below vocab_size = 256' 's/"eos_token_id": null/"eos_token_id": 256/'
config 1 'tie_word_embeddings = 1, expected true or false' 's/"tie_word_embeddings": false/"tie_word_embeddings": 1/'
config 1 'byte 99: expected every member name once, got "vocab_size" again' 's/"hidden_size": 128/"vocab_size": 256/'
config 1 "byte 98: expected ',' or '}'" 's/"vocab_size": 256,/"vocab_size": 256/'
edited_config 's/"vocab_size": 256/"vocab_size": 128/'
train 1 'bytes as tokens need a vocabulary of at least 256, the model has 128' --model "$bad_model"
head -c 100 "$files/good/config.json" >"$bad_model/config.json"
train 1 "$bad_model/config.json: " --model "$bad_model"
: >"$bad_model/config.json"
train 1 "$bad_model/config.json: " --model "$bad_model"

# ---- model.safetensors ----

weights() { train "$1" "$bad_model/model.safetensors: $2" --model "$bad_model" --dp-shard 2 --tp 2; }
norm='"model.norm.weight":{"dtype":"F32","shape":\[128\]'
last=$(sed 's/.*,\("[^"]*"\):{[^}]*}} *$/\1/' "$files/header" | tr -d '"')
last_begin=$(sed 's/.*"data_offsets":\[\([0-9]*\),[0-9]*\]}} *$/\1/' "$files/header")
edited_header 's/"model.norm.weight"/"model.norm.heavy"/'
weights 1 'tensor model.norm.weight is missing'
sed 's/,"[^"]*":{[^}]*}} *$/}/' "$files/header" >"$files/edited"
head -c "$last_begin" "$files/data" >"$files/shorter"
safetensors "$files/edited" "$files/shorter"
weights 1 "tensor $last is missing"
sed "s/}} *$/},\"model.extra.weight\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[$data_bytes,$((data_bytes + 4))]}}/" "$files/header" >"$files/edited"
{ cat "$files/data"; printf '\0\0\0\0'; } >"$files/longer"
safetensors "$files/edited" "$files/longer"
weights 1 'tensor model.extra.weight is not part of this model (39 parameters, 40 tensors)'
edited_header "s/$norm/\"model.norm.weight\":{\"dtype\":\"F32\",\"shape\":[64,2]/"
weights 1 'tensor model.norm.weight has shape ?64, 2?, expected ?128?'
edited_header "s/$norm/\"model.norm.weight\":{\"dtype\":\"F32\",\"shape\":[]/"
weights 1 'tensor "model.norm.weight": dtype and shape need 4 bytes, data_offsets'
edited_header "s/$norm/\"model.norm.weight\":{\"dtype\":\"I32\",\"shape\":[128]/"
weights 1 'tensor model.norm.weight has dtype i32, expected a floating type'
edited_header "s/$norm/\"model.norm.weight\":{\"dtype\":\"F33\",\"shape\":[128]/"
weights 1 'tensor "model.norm.weight": unknown dtype "F33", expected F32'
edited_header "s/$norm/\"model.norm.weight\":{\"dtype\":\"F32\",\"shape\":[-128]/"
weights 1 'tensor "model.norm.weight": shape?0? = -128, expected a non-negative integer'
edited_header "s/$norm/\"model.norm.weight\":{\"dtype\":\"F32\",\"shape\":[128.5]/"
weights 1 'tensor "model.norm.weight": shape?0? = 128.5, expected a non-negative integer'
edited_header "s/$norm/\"model.norm.weight\":{\"dtype\":\"F32\",\"shape\":[4611686018427387904,4611686018427387904]/"
weights 1 'tensor "model.norm.weight": the product of the shape overflows'
edited_header 's/"data_offsets":\[0,/"data_offsets":[4,/'
weights 1 'tensor "model.embed_tokens.weight": dtype and shape need 131072 bytes, data_offsets ?4, 131072? give 131068'
edited_header 's/"model.norm.weight"/"lm_head.weight"/'
weights 1 'header: byte * expected every member name once, got "lm_head.weight" again'
edited_header 's/^{/[/'
weights 1 "the header does not begin with '{' (file byte 8)"
edited_header 's/"shape":/"shape"=/'
weights 1 "header: byte 82: expected ':', got '='"
safetensors "$files/header" "$files/longer"
weights 1 '4 bytes follow the last tensor'
safetensors "$files/header" "$files/shorter"
weights 1 'tensor "lm_head.weight": data_offsets * reach past the end of the file'
safetensors "$files/header" "$files/data"
head -c $((8 + header_bytes / 2)) "$good" >"$bad_model/model.safetensors"
weights 1 'the header length is * bytes follow it: the file is truncated (file byte 0)'
head -c 5 "$good" >"$bad_model/model.safetensors"
weights 1 'the file has 5 bytes, expected at least 8 for the header length'
: >"$bad_model/model.safetensors"
weights 1 'the file has 0 bytes, expected at least 8 for the header length'
{ u64 100000001; cat "$files/header" "$files/data"; } >"$bad_model/model.safetensors"
weights 1 'the header length is 100000001, expected at most 100000000 (file byte 0)'
{ printf '\377\377\377\377\377\377\377\377'; cat "$files/header" "$files/data"; } >"$bad_model/model.safetensors"
weights 1 'the header length is 18446744073709551615, expected at most 100000000'
{ u64 99999999; cat "$files/header" "$files/data"; } >"$bad_model/model.safetensors"
weights 1 'the header length is 99999999, but only * bytes follow it: the file is truncated'

# ---- shards and their index ----

"$programs/train_llama" --model "$files/good" --data "$files/text" --seq-len 16 --batch 4 --steps 1 --lr 1e-12 --save "$files/shards" --save-shard 1M --save-dtype bf16 >"$work/stdout" 2>&1 || { cat "$work/stdout"; failed=$((failed + 1)); }
shards=$(find "$files/shards" -name 'model-0000?-of-0000[2-9].safetensors' | wc -l)
[ "$shards" -ge 2 ] || { echo "FAILED --save-shard 1M: $shards shards"; failed=$((failed + 1)); }
first=model-00001-of-0000$shards.safetensors second=model-00002-of-0000$shards.safetensors
# edited_index SED: the shards with another index
edited_index()
{
    rm -rf "$bad_model"
    cp -r "$files/shards" "$bad_model"
    sed "$1" "$files/shards/model.safetensors.index.json" >"$bad_model/model.safetensors.index.json"
    cmp -s "$files/shards/model.safetensors.index.json" "$bad_model/model.safetensors.index.json" && { echo "bad_input: \"$1\" changes nothing in the index"; failed=$((failed + 1)); }
}
index() { train 1 "$bad_model/model.safetensors.index.json: $2" --model "$bad_model" --dp-shard 2 --tp 2; }
edited_index "s/\(embed_tokens.weight\": \"\)[^\"]*/\1$second/"
index 1 "tensor model.embed_tokens.weight is said to be in $second, which does not have it"
edited_index '/embed_tokens/d'
index 1 "tensor model.embed_tokens.weight is in $first and not in the index"
edited_index 's/"model.embed_tokens.weight"/"lm_head.weight"/'
index 1 'byte * expected every member name once, got "lm_head.weight" again'
edited_index "s/\(embed_tokens.weight\": \"\)[^\"]*/\1..\\/shards\\/$first/"
index 1 'tensor "model.embed_tokens.weight" in file "../shards/model-00001-of-*": expected the name of a file in this directory'
edited_index 's/"total_size": [0-9]*/"total_size": 12/'
index 1 'metadata.total_size is 12, but the tensors have * bytes'
edited_index 's/"weight_map"/"weights"/'
index 1 'unknown field "weights", expected metadata and weight_map'
edited_index 's/embed_tokens/&/;s/"metadata"/ &/'
rm "$bad_model/$second"
train 1 "$bad_model/$second: cannot open: No such file" --model "$bad_model" --tp 2
cp "$bad_model/$first" "$bad_model/$second"
index 1 "tensor * is said to be in $second, which does not have it"
edited_config 's/"num_hidden_layers": 4/"num_hidden_layers": 5/'
weights 1 'tensor model.layers.4.input_layernorm.weight is missing'
edited_config 's/"num_hidden_layers": 4/"num_hidden_layers": 3/'
weights 1 'tensor model.layers.3.input_layernorm.weight is not part of this model (30 parameters, 39 tensors)'
edited_config 's/"intermediate_size": 384/"intermediate_size": 256/'
weights 1 'tensor model.layers.0.mlp.gate_proj.weight has shape ?384, 128?, expected ?256, 128?'

# ---- convert ----

convert() { convert_code=$1 convert_pattern=$2; shift 2; row "$convert_code" "$convert_pattern" "$programs/convert" --out save "$@"; }
convert 2 '--in is missing'
row 2 '--out is missing' "$programs/convert" --in "$files/good"
convert 2 '--dtype "int8": expected one of f32, f64, bf16, f16' --in "$files/good" --dtype int8
convert 2 '--shard "0": expected bytes 1 ..' --in "$files/good" --shard 0
convert 2 'unexpected argument "more"' --in "$files/good" more
convert 1 "$files/no: cannot open: No such file" --in "$files/no"
convert 1 "$files/text: dim = *: no llama2.c model" --in "$files/text"
convert 1 "$files/short: the file has 5 bytes, expected a header of 28" --in "$files/short"
{ u64 1; u64 1; u64 1; u64 1; } >"$files/model.bin"
convert 1 "$files/model.bin: hidden_dim = 0, expected 1 or more (byte 4)" --in "$files/model.bin"
printf '\2\0\0\0\1\0\0\0\1\0\0\0\1\0\0\0\1\0\0\0\1\0\0\0\1\0\0\0' >"$files/model.bin"
convert 1 "$files/model.bin: the file has 28 bytes, its header makes it " --in "$files/model.bin"
edited_index '/embed_tokens/d'
convert 1 "tensor model.embed_tokens.weight is in $first and not in the index" --in "$bad_model"
safetensors "$files/header" "$files/longer"
convert 1 '4 bytes follow the last tensor' --in "$bad_model"
rm "$files/shards/config.json"
convert 1 "$files/shards/config.json: cannot open: No such file" --in "$files/shards"
row 1 "$files/text: expected a directory, got a file" "$programs/convert" --in "$files/good" --out "$files/text"
# There and back: in pieces and as one, in two bytes and in four.
"$programs/convert" --in "$files/good" --out "$files/half" --dtype bf16 --shard 300K >"$work/stdout" 2>&1 && "$programs/convert" --in "$files/half" --out "$files/wide" --dtype f32 >>"$work/stdout" 2>&1 &&
    "$programs/convert" --in "$files/wide" --out "$files/wide" --dtype bf16 --shard 300K >>"$work/stdout" 2>&1 && cmp "$files/half/model-00003-of-00006.safetensors" "$files/wide/model-00003-of-00006.safetensors" >>"$work/stdout" 2>&1 &&
    "$programs/convert" --in "$files/good" --out "$files/split" --shard 1M >>"$work/stdout" 2>&1 && "$programs/convert" --in "$files/split" --out "$files/split" >>"$work/stdout" 2>&1 && [ "$(echo "$files"/split/*)" = "$files/split/config.json $files/split/model.safetensors" ] &&
    "$programs/train_llama" --model "$files/split" --data "$files/text" --seq-len 16 --batch 4 --steps 1 --lr 1e-12 --save "$files/split" >>"$work/stdout" 2>&1 &&
    "$programs/train_llama" --model "$files/good" --data "$files/text" --seq-len 16 --batch 4 --steps 1 --lr 1e-12 --save "$files/unsplit" >>"$work/stdout" 2>&1 && cmp "$files/split/model.safetensors" "$files/unsplit/model.safetensors" >>"$work/stdout" 2>&1 &&
    passed=$((passed + 1)) || { failed=$((failed + 1)); echo "FAILED convert there and back"; cat "$work/stdout"; ls "$files/half"; }

# ---- output that cannot be written ----

train 1 "--save: $files/text/model: cannot create the directory: Not a directory" --save "$files/text/model"
train 1 "--save: $files/text: expected a directory, got a file" --save "$files/text" --dp-shard 2
train 1 "--save: $files/no/where: cannot create the directory: No such file or directory" --save "$files/no/where" --tp 2
train 1 "$files/text/log: cannot open for writing: Not a directory" --log "$files/text/log" --dp-shard 2
train 1 "$files/no/log: cannot open for writing: No such file or directory" --log "$files/no/log"
train 1 "$files/text/gradients.tmp: cannot create: Not a directory" --save-gradients "$files/text/gradients" --steps 1 --dp-shard 2
train 1 "$files/text/trace: cannot open for writing: Not a directory" --trace "$files/text/trace" --dp-shard 2
train 1 "$files/no/trace: cannot open for writing: No such file or directory" --trace "$files/no/trace"
train 1 "$files: cannot write: expected a regular file or none" --trace "$files" --tp 2
mkfifo "$files/pipe"
train 1 "$files/pipe: cannot write: expected a regular file or none" --trace "$files/pipe"
train 1 "$files/pipe: cannot write: it is a pipe" --save-gradients "$files/pipe" --steps 1
[ -p "$files/pipe" ] || { echo "FAILED: a pipe was replaced by a file"; failed=$((failed + 1)); }
train 1 "offload: $files/text/llmpar-offload-*: Not a directory, expected a directory that files can be made in" --offload optimizer=file --offload-dir "$files/text"
train 1 "offload: $files/no/llmpar-offload-*: No such file or directory, expected a directory that files can be made in" --offload activations=file --offload-dir "$files/no" --dp-shard 2
if [ -d /proc/self ]; then train 1 'offload: /proc/llmpar-offload-*: No such file or directory, expected a directory' --offload grads=file --offload-dir /proc --tp 2 --overlap on; fi
: >"$files/log"
train 1 "--save: $files/text: expected a directory, got a file" --log "$files/log" --save "$files/text"
if [ -d /proc/self ]; then train 1 '--save: /proc/llmpar: cannot create the directory' --save /proc/llmpar; fi
for option in data log trace; do train 1 "trainer: $option = \"\", expected a path or none" --$option '' --dp-shard 2; done
train 1 '--save: llmpar_directory_ensure: path = "", expected a path' --save ''
train 2 '--save-gradients "": expected a file' --save-gradients ''
generate 1 'config.json: no directory, expected one' --prompt-ids 1 --model ''

# After training: what was complete by then stays, nothing half-written does.
late='./gradients.safetensors ./log.jsonl '
mkdir -p "$files/taken/model.safetensors"
train 1 "$files/taken/model.safetensors: cannot write: it is a directory" --save "$files/taken" --dp-shard 2
full() { full_pattern=$1; shift; row 1 "$full_pattern: File too large" sh -c 'trap "" XFSZ; ulimit -f 2000; exec "$@"' sh "$programs/train_llama" --model tiny --data "$files/text" --seq-len 16 --batch 4 --steps 1 --log log.jsonl "$@"; }
late='./log.jsonl ./save '
full 'save/model.safetensors.tmp: cannot write' --save save --dp-shard 2
late=
full 'offload: ./llmpar-offload-*: * bytes' --offload optimizer=file --dp-shard 2
full 'offload: ./llmpar-offload-*: * bytes' --offload activations=file --seq-len 256 --batch 16 --overlap on
late='./log.jsonl '
full 'trace.json.tmp: cannot write' --trace trace.json --steps 100 --grad-accum 4 --wrap half --tp 2 --sp on
late=
full 'gradients.safetensors.tmp: cannot write' --save save --save-gradients gradients.safetensors --tp 2
if [ -w /dev/full ]; then late='./gradients.safetensors '; train 1 '/dev/full: cannot write step 1: No space left on device' --log /dev/full --steps 1; late=; fi
# what is said on a full disk is not said
if [ -w /dev/full ]; then
    row 1 'generate: cannot write to stdout' sh -c 'exec "$@" >/dev/full' sh "$programs/generate" --model "$files/good" --prompt-ids 1 --tokens 4
    row 1 'train_llama: cannot write to stdout' sh -c 'exec "$@" >/dev/full' sh "$programs/train_llama" --model tiny --data "$files/text" --seq-len 16 --steps 1
fi

# ---- numbers that are not finite ----

# not_finite TENSOR ELEMENT BYTES OPTIONS: the element becomes these four bytes
not_finite()
{
    rm -rf "$bad_model"
    cp -r "$files/good" "$bad_model"
    printf "$3" | dd of="$bad_model/model.safetensors" bs=1 seek=$(($(tensor_at "$1") + 4 * $2)) conv=notrunc 2>/dev/null
    name=$1
    shift 3
    train 1 "step 1: loss *first non-finite tensor: $name" --model "$bad_model" "$@"
}
nan='\000\000\300\177' infinity='\000\000\200\177'
not_finite model.norm.weight 127 "$nan"
not_finite model.layers.2.mlp.up_proj.weight 1000 "$nan" --dp-shard 2 --tp 2
not_finite model.layers.1.self_attn.q_proj.weight 16383 "$infinity" --dp-shard 2 --sp on --tp 2 --grad-accum 2
not_finite model.embed_tokens.weight $((128 * 49)) "$infinity" --tp 4
not_finite lm_head.weight 5 "$nan" --dp-shard 4 --zero 0
generate 1 'logits at position * are not finite' --model "$bad_model" --prompt-ids 1 --tp 2

not_finite lm_head.weight 5 "$nan" --dtype bf16 --recompute full --offload activations=file
set -- --model "$bad_model" --dtype f16 --loss-scale 6.103515625e-05 --dp-shard 2
not_finite model.norm.weight 3 "$infinity" # makes the model; in f16 the step would be tried again with half the scale, down to the least
train 1 'step 1: loss scale: the gradient is not finite at the least scale, 6.10352e-05, either' "$@"

# ---- two runs compared: every failure is exit code 2, since 1 says "outside" ----

u32() { for n in "$@"; do printf "\\$(printf %03o $((n % 256)))\\$(printf %03o $((n / 256 % 256)))\\0\\0"; done; }
u32 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 >"$files/ids"      # two sequences of 8
u32 1 2 3 4 5 6 7 8 >"$files/few"
u32 1 2 3 4 5 6 7 8 256 10 11 12 13 14 15 16 17 18 >"$files/outside"
{ cat "$files/ids"; printf x; } >"$files/odd"
: >"$files/empty"
parity() { row_pattern=$1; shift; row 2 "$row_pattern" env TMPDIR="$work/run" "$programs/verify_parity" --model "$files/good" --tokens "$files/ids" --seq-len 8 --a '' --json out.json --dump dump "$@"; }
parity 'model nowhere: no such directory' --model nowhere
parity 'b: model nowhere: no such directory' --b model=nowhere
parity 'config.json: ' --model "$work"
parity 'nowhere: ' --tokens nowhere
parity "$work: " --tokens "$work"
parity '73 bytes, expected a multiple of 4' --tokens "$files/odd"
parity '8 ids, expected at least seq-len + 1 = 9' --tokens "$files/few"
parity '0 ids, expected at least seq-len + 1 = 9' --tokens "$files/empty"
parity 'id 256 at position 8, expected at most 255' --tokens "$files/outside"
parity '--seq-len "0": expected a whole number 1 ..' --seq-len 0
parity '18 ids, expected at least seq-len + 1 = 16777217' --seq-len 16777216
parity '--b "tp=1,colour=red": "colour" is no option of a configuration' --b tp=1,colour=red
parity '--b "steps=3": "steps" is no option of a configuration' --b steps=3
parity '--a "lr-min=1": lr-min has no effect on what is compared' --a lr-min=1
parity '--b "tp": "tp": expected NAME=VALUE' --b tp
parity '--b "tp=1,": expected another option behind the comma' --b tp=1,
parity '--b ",tp=1": "": expected NAME=VALUE' --b ,tp=1
parity '--b tp "0": expected a whole number 1 .. 4096' --b tp=0
parity '--a dp-shard "two": expected a whole number' --a dp-shard=two
parity '--dtype "f8": expected one of f32, f64, bf16, f16' --b dtype=f8
parity '--prefetch "5": expected a whole number 0 .. 4' --b prefetch=1+5
parity '--b "dp-replicate=4096,dp-shard=4096,tp=4096": 68719476736 ranks, expected at most 4096' --b dp-replicate=4096,dp-shard=4096,tp=4096
parity 'b: num_attention_heads = * is not divisible by tp = 3' --b tp=3
parity 'b: trainer: batch = 2 is not divisible by 3 data ranks' --b dp-shard=3
parity 'a: trainer: batch = 2 is not divisible by 1 data ranks * x grad_accum 4' --a grad-accum=4
parity 'exact = require: ' --b dp-shard=2,reduce-dtype=bf16,exact=require
parity 'is not a dispatch level' --b cpu=abacus
parity 'trainer: recompute = AUTO needs memory_limit' --b recompute=auto
parity 'memory' --b memory-limit=1K
parity '--reference: nowhere: no such directory' --reference nowhere
parity '--reference-dtype "int8": expected one of f32, f64, bf16, f16' --reference "$files" --reference-dtype int8
parity '--reference-dtype without --reference' --reference-dtype bf16
parity 'none of logits.safetensors, grads.safetensors, activations.safetensors, loss.json is there' --reference "$files"
parity 'cannot' --dump nowhere/dump
parity '--json: nowhere/out.json.tmp: cannot create' --json nowhere/out.json
row 2 '--tokens is missing' "$programs/verify_parity" --model "$files/good" --seq-len 8 --a ''
row 2 '--model is missing' "$programs/verify_parity" --tokens "$files/ids" --seq-len 8 --a ''
row 2 '--seq-len is missing' "$programs/verify_parity" --model "$files/good" --tokens "$files/ids" --a ''
row 2 'expected at least one of --a, --reference and --dump' "$programs/verify_parity" --model "$files/good" --tokens "$files/ids" --seq-len 8
row 2 '--json without --a and --reference' "$programs/verify_parity" --model "$files/good" --tokens "$files/ids" --seq-len 8 --dump dump --json out.json
row 2 'unexpected argument "extra"' "$programs/verify_parity" --model "$files/good" --tokens "$files/ids" --seq-len 8 --a '' extra
row 2 'cannot create' env TMPDIR="$work/nowhere" "$programs/verify_parity" --model "$files/good" --tokens "$files/ids" --seq-len 8 --a ''
# references of another shape, another model, or broken: found before anything runs, but for names of gradients
"$programs/verify_parity" --model "$files/good" --tokens "$files/ids" --seq-len 8 --dump "$files/dump" >/dev/null || { echo "bad_input: no reference to break"; failed=$((failed + 1)); }
broken() { rm -rf "$files/reference"; cp -r "$files/dump" "$files/reference"; }
broken
parity 'tensor "logits" has shape [[]2,8,256], expected [[]4,3,256]' --seq-len 3 --reference "$files/reference"
rm "$files/reference/logits.safetensors"
parity 'tensor "embed" has shape' --seq-len 3 --reference "$files/reference"
rm "$files/reference/activations.safetensors"
parity '"tokens" is not the 12 predicted tokens of --tokens' --seq-len 3 --reference "$files/reference"
for text in '' '[]' '{}' '{"loss": "much"}' '{"loss": 1' '{"loss": 1, "loss": 2}'; do
    printf %s "$text" >"$files/reference/loss.json"
    parity 'loss.json: ' --reference "$files/reference"
done
broken
head -c 100 "$files/dump/logits.safetensors" >"$files/reference/logits.safetensors"
parity 'logits.safetensors: ' --reference "$files/reference"
cp "$files/dump/grads.safetensors" "$files/reference/logits.safetensors"
parity 'tensor "logits" is missing' --reference "$files/reference"
broken
cp "$files/dump/logits.safetensors" "$files/reference/activations.safetensors"
parity '1 tensors, of which 0 are embed, layers.N' --reference "$files/reference"
broken
cp "$files/dump/logits.safetensors" "$files/reference/grads.safetensors"
parity 'grads.safetensors: tensor "* is missing' --reference "$files/reference"
broken
sed 's/lm_head.weight/lm_heed.weight/' "$files/dump/grads.safetensors" >"$files/reference/grads.safetensors"
parity 'tensor "lm_head.weight" is missing' --reference "$files/reference"
parity 'is no parameter with a gradient in b' --reference "$files/dump" --b freeze=1

# ---- what is asked of a model over other tokens ----

if [ -n "$LLMPAR_TEST_DATA" ]; then
    stories=$LLMPAR_TEST_DATA/stories260K/hf
    generate 1 '--prompt needs a model over bytes (vocabulary 256)' --model "$stories" --prompt 'Once upon a time'
    generate 1 '--stop needs a model over bytes (vocabulary 256)' --model "$stories" --prompt-ids 1 --stop 'the end'
    generate 1 'token id 512 at position 0, expected 0 .. 511' --model "$stories" --prompt-ids 512 --tp 2
    generate 1 'num_attention_heads = 8 is not divisible by tp = 3' --model "$stories" --prompt-ids 1 --tp 3
fi

echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
