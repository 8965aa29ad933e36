#!/bin/sh
# tests/peers.sh [FOLDER]: what stands beside others is asked for replies one by one: bench_generate --serve and bench/peers/generate.py. FOLDER holds bench_generate (default build/bench).
# The peers themselves need not be there: where the script wants an interpreter, a script of a few lines is, as a peer that answers, dies, talks nonsense or fills its stderr. The last line is "N passed, N failed".
program=$(cd "${1:-build/bench}" 2>/dev/null && pwd)/bench_generate
[ -x "$program" ] || { echo "peers: ${1:-build/bench}/bench_generate is not there: run make build/bench/bench_generate first"; echo "0 passed, 1 failed"; exit 1; }
. tests/commands.sh
# run CODE PATTERN COMMAND..: ends in time, with this code, and with a word on stderr that has the pattern (none: with no word)
run()
{
    code=$1 pattern=$2
    shift 2
    timeout 300 "$@" >stdout 2>stderr
    got=$?
    [ "$got" -eq "$code" ] || echo "exit code $got, expected $code" >>stderr
    case $(cat stderr) in
    *"exit code $got, expected $code"*) false ;;
    *$pattern*) [ -n "$pattern" ] || [ ! -s stderr ] ;;
    *) echo "expected: $pattern" >>stderr; false ;;
    esac
}
silent() { run "$@" && [ ! -s stdout ] && [ "$(grep -c . stderr)" -eq 1 ]; }

# ---- bench_generate --serve: a conversation ----

serve() { "$program" tokens --model tiny --layout 1x1 --serve "$@"; }
# conversation FIRST OPTIONS: three replies in one process are what three processes say, each asked for one; in ids.1 .. ids.3
conversation()
{
    first=$1
    shift
    printf 'step\nstep' >requests
    serve --ids "$first" "$@" <requests >all 2>stderr || return
    cp all stdout
    [ "$(wc -l <all)" -eq 3 ] && [ "$(grep -c '^ready ' all)" -eq 1 ] || return
    for reply in 1 2 3; do
        serve --ids $(((first + reply - 1) % 256)) "$@" </dev/null >one 2>>stderr || return
        sed 's/^ready //' one | cut -d' ' -f4- >want
        sed -n "${reply}p" all | sed 's/^ready //' | cut -d' ' -f4- >ids.$reply
        [ "$(wc -l <one)" -eq 1 ] && cmp want ids.$reply >>stderr || return
    done
    ! cmp -s ids.1 ids.2 && ! cmp -s ids.2 ids.3 && [ ! -s stderr ] # or the comparison says nothing
}
# as many ids as asked for; three times, none of them 0 and the reply's the longest
counted() { awk -v ids="$1" '{ sub(/^ready /, "") } NF != 3 + ids || !($1 > 0 && $2 > 0 && $3 >= $1) { exit 1 }' all; }
check 'three replies, the ids of the vocabulary once round' conversation 254 --dtype f32 --prompt 8 --tokens 8
check 'three replies: their words' counted 8
check 'three replies with interleaved weights' conversation 7 --dtype bf16 --prompt 40 --tokens 64
check 'three replies with interleaved weights: their words' counted 64
check 'three replies behind one id' conversation 100 --dtype f16 --prompt 1 --tokens 3
printf 'step\nstep\nstep\n' >requests
serve --dtype f32 --prompt 8 --tokens 8 <requests >all 2>stderr
cp all stdout
check 'without --ids: seconds alone' counted 0
check 'without --ids: four of them' [ "$(wc -l <all)" -eq 4 ]

# told LINE SHOWN: behind a good one, a line that is no request
told()
{
    printf 'step\n%s\nstep\n' "$1" >requests
    run 2 "--serve: line \"$2" "$program" tokens --model tiny --dtype f32 --layout 1x1 --prompt 8 --tokens 3 --serve <requests && [ "$(wc -l <stdout)" -eq 2 ] && grep -q 'expected "step"' stderr
}
for line in stop STEP 'step 2' stepstep ' step' ''; do check "line \"$line\"" told "$line" "$line\""; done
check 'a line of 400 bytes' told "$(printf '%0400d' 0)" 000000
head -c 100 /dev/zero >requests
check 'bytes that are no text' run 2 '--serve: line "": expected "step"' "$program" tokens --model tiny --dtype f32 --layout 1x1 --prompt 8 --tokens 3 --serve <requests

# ---- bench_generate: command lines ----

refused() { refused_pattern=$1; shift; check "$*" silent 2 "$refused_pattern" "$program" "$@"; }
refused 'argument "toking": expected products, rows or tokens' toking
refused 'arguments "1": expected none or ROWS N K DTYPE THREADS' products 1 2 3
refused 'ROWS "0": expected a whole number 1 .. ' products 0 64 64 f32 1
refused 'K "64k": expected a whole number' rows 1 64 64k f32 1
refused 'DTYPE "f64": expected f32, bf16 or f16' products 1 64 64 f64 1
refused 'THREADS "100000": expected a whole number 1 .. ' products 1 64 64 f32 100000
refused '--serve: expected one --model, --dtype and --layout 1x1 or 1x1tN with it' tokens --serve
refused '--serve: expected one --model' tokens --model tiny --dtype f32 --layout tp1 --serve
serving() { serving_pattern=$1; shift; refused "$serving_pattern" tokens --model tiny --dtype f32 --layout 1x1 --serve "$@"; }
serving 'argument "--colour": expected' --colour red
serving 'argument "extra": expected' extra
serving '--prompt "": expected a whole number' --prompt
serving '--prompt "0": expected a whole number 1 .. ' --prompt 0
serving '--prompt "-8": expected a whole number' --prompt -8
serving '--prompt "8x": expected a whole number' --prompt 8x
serving '--prompt "": expected a whole number' --prompt ''
serving '--prompt "99999999999999999999": expected a whole number' --prompt 99999999999999999999
serving '--tokens "2": expected a whole number 3 .. 64' --tokens 2
serving '--tokens "65": expected a whole number 3 .. 64' --tokens 65
serving '--texts "17": expected a whole number 1 .. 16' --texts 17
serving '--texts 2 with --serve: expected 1' --texts 2
serving '--ids "-1": expected a whole number 0 .. ' --ids -1
serving '--ids 256: expected less than the vocabulary of tiny, 256' --ids 256
serving '--dtype "f8": expected f32, bf16 or f16' --dtype f8
serving '--level "abacus": expected one of portable' --level abacus
serving '--layout "1x1x": expected 1x1, 1x1tN or tpN' --layout 1x1x
serving '--layout "1x1t2x": expected 1x1, 1x1tN or tpN' --layout 1x1t2x
serving '--layout "1x1t0": expected 1 to 8 ranks, 1 to 64 threads' --layout 1x1t0
[ "$(nproc)" -ge 64 ] || serving '--layout 1x1t64: expected at most the * processors' --layout 1x1t64
serving '--model: * "gigantic"' --model gigantic
refused '--ids: expected --serve with it' tokens --model tiny --dtype f32 --layout 1x1 --ids 1

# ---- generate.py: without peers, and with peers of every kind ----

if ! command -v python3 >/dev/null; then
    echo "skipped: bench/peers/generate.py: needs python3"
    echo "$passed passed, $failed failed, 1 skipped"
    [ "$failed" -eq 0 ] && [ -z "$LLMPAR_NO_SKIP" ]
    exit
fi
[ "$program" = "$top/build/bench/bench_generate" ] || echo "peers: generate.py runs $top/build/bench/bench_generate"
printf '#!/bin/sh\nexec python3 -S "$@"\n' >bare # no packages but its own
cat >fake <<'END'
#!/bin/sh
# KIND of both peers; their replies take 1 s to the first token, 0.5 s a token, 4 s in all
case $1 in
-c) exit 1 ;;
*generate.py) : >"$3"; exit ;;
*transformers.py) [ "$KIND" != one ] || { echo 'no such peer' >&2; exit 1; } ;;
esac
case $KIND in
silent) exit ;;
noisy) head -c 300000 /dev/zero | tr '\0' 'x' >&2 ;;
babbles) echo 'Once upon a time'; exec cat >/dev/null ;;
endless) echo 'ready inf 1 1' ;;
esac
echo 'ready 1.000000 0.500000 4.000000 fake 1'
replies=0
while read -r line && [ "$line" = step ]; do
    replies=$((replies + 1))
    [ "$KIND" = noisy ] && head -c 300000 /dev/zero | tr '\0' 'x' >&2
    [ "$KIND" = dies ] && [ $replies -eq 2 ] && { echo 'out of memory' >&2; exit 3; }
    [ "$KIND" = nonsense ] && [ $replies -eq 2 ] && echo '1.0 nonsense 4.0' && continue
    echo '1.000000 0.500000 4.000000'
done
END
chmod +x bare fake
export KIND=
# has PATTERN..: stdout has a line for each; no traceback
has() { for pattern in "$@"; do grep -q "$pattern" stdout || { echo "expected: $pattern" >>stderr; return 1; }; done; ! grep -q Traceback stderr; }
turns() { KIND=$1 PYTHON=$work/$2 timeout 300 python3 "$top/bench/peers/generate.py" --models tiny --dtypes f32 --threads 1 --prompt 16 --tokens 8 --rounds 2 >stdout 2>stderr; code=$?; }
alone='tiny f32 16 + 8, 1 thread: prompt tokens  *[0-9.]* /s$'

turns '' bare
check 'no peers: exit code 1' [ $code -eq 1 ]
check 'no peers: skipped by name, ours alone' has 'llama.cpp: skipped: no GGUF file: ModuleNotFoundError' 'transformers: skipped: ModuleNotFoundError' "$alone" ': tokens  *[0-9.]* /s$' ': reply  *[0-9.]* /s$'
KIND= PYTHON=$work/bare BENCH_JSON=$work/alone.json timeout 300 python3 "$top/bench/peers/generate.py" --models tiny --dtypes f32,bf16 --threads 1 --prompt 16 --tokens 8 --rounds 1 --peers transformers >stdout 2>stderr
check 'no peers: three lines of each precision in the file' python3 -c 'import json
rows = json.load(open("alone.json"))["rows"]
assert len(rows) == 6 and all(row["value"] > 0 and "bound" not in row for row in rows), rows'
turns steady fake
check 'peers that answer: exit code 0' [ $code -eq 0 ]
check 'peers that answer: their rates' has 'prompt tokens, beside llama.cpp, cache f16 (fake 1) .* of  *16.0 /s' ': tokens, beside llama.cpp, cache f32 (fake 1) .* of  *2.0 /s' ': reply, beside transformers (fake 1) .* of  *2.0 /s'
check 'peers that answer: ours not alone' [ "$(grep -c ' /s$' stdout)" -eq 0 ]
turns one fake
check 'one that is not there: the others are read' has 'transformers: skipped: no such peer' 'reply, beside llama.cpp, cache f32'
check 'one that is not there: exit code 0' [ $code -eq 0 ]
turns noisy fake
check 'a full stderr' has 'reply, beside transformers'
turns silent fake
check 'no word' has 'transformers: skipped: ended without a word' "$alone"
turns babbles fake
check 'words that are no seconds' has 'transformers: skipped: answered "Once upon a time"' "$alone"
turns endless fake
check 'seconds without end' has 'transformers: skipped: answered "ready inf 1 1"' "$alone"
turns dies fake
check 'death in a reply' has 'transformers (fake 1): failed in a reply: out of memory' 'llama.cpp, cache f16 (fake 1): failed in a reply: out of memory'
check 'death in a reply: exit code 1' [ $code -eq 1 ]
turns nonsense fake
check 'nonsense in a reply' has 'transformers (fake 1): failed in a reply: answered "1.0 nonsense 4.0"'

wrong() { wrong_pattern=$1; shift; check "generate.py $*" run 2 "$wrong_pattern" python3 "$top/bench/peers/generate.py" "$@"; }
wrong 'unrecognized arguments: --colour' --colour red
wrong '--models: "9b", expected tiny, 110m, 1.1b' --models tiny,9b
wrong '--dtypes: "", expected f32, bf16' --dtypes f32,
wrong '--peers: "vllm", expected llama.cpp, transformers' --peers vllm
wrong '--threads: "0", expected a whole number 1 .. ' --threads 1,0
wrong '--threads: "two", expected a whole number 1 .. ' --threads two
wrong '--prompt: "4033", expected a whole number 1 .. 4032' --prompt 4033
wrong '--tokens: "2", expected a whole number 3 .. 64' --tokens 2
wrong '--rounds: "0", expected a whole number 1 .. 1000' --rounds 0
wrong '--directory: "nowhere", expected a directory' --directory nowhere
wrong '--json: "nowhere/out.json", expected a file in a directory that is there' --json nowhere/out.json
export PYTHON=nowhere
wrong 'PYTHON: "nowhere", expected an interpreter' --models tiny

ends
