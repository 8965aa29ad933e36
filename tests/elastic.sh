#!/bin/bash
# tests/elastic.sh [FOLDER]: tools/llmpar-run. Training is killed with SIGKILL, once or more, and started again on fewer ranks: the model at the end is that of a run that nobody disturbed, by cmp. FOLDER (default build) holds train_llama
# and, where ranks as processes are to be killed too, mpi/train_llama or train_llama_mpi. The last line is "N passed, N failed[, N skipped]".
programs=$(cd "${1:-build}" 2>/dev/null && pwd)
[ -x "$programs/train_llama" ] || { echo "elastic: ${1:-build}/train_llama is not there: run make first"; echo "0 passed, 1 failed"; exit 1; }
run=$(pwd)/tools/llmpar-run
work=$(mktemp -d "${TMPDIR:-/tmp}/elastic.XXXXXX") || exit 1
job= # of llmpar-run, while it runs
cleanup()
{
    [ -z "$job" ] || { kill -TERM "$job" && wait "$job"; } 2>/dev/null
    rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 1' INT TERM HUP
cd "$work" || exit 1
export LC_ALL=C OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1
unset LLMPAR_CPU
passed=0 failed=0 skipped=0
pass() { passed=$((passed + 1)); }
fail()
{
    failed=$((failed + 1))
    echo "FAILED $1"
    tail -n 12 "$2" | sed 's/^/    /'
}
seq 1 4000 >text
training=(--model tiny --data text --seq-len 48 --batch 8 --steps 40 --lr 3e-3 --log-every 1000)

# What is started tells its process id: as one process, or one a rank.
cat >tell <<'END'
#!/bin/sh
name=pid.${OMPI_COMM_WORLD_RANK-0}
echo $$ >"$name.new" && mv "$name.new" "$name"
exec "$@"
END
chmod +x tell

# killed NAME "STEP:RANK .." EXPECTED OPTIONS -- PROGRAM..: llmpar-run, and a SIGKILL whenever checkpoint step-STEP of run/ is there; EXPECTED: the ranks of all starts. A program that was faster than the killer, or had ended when it came, is tried again.
killed()
{
    local name=$1 kills=$2 expected=$3 attempt kill missed pid t code starts
    shift 3
    for attempt in {1..20}; do
        rm -rf run out pid.*
        missed=
        "$run" "$@" >log 2>&1 &
        job=$!
        for kill in $kills; do
            for ((t = 0; t < 6000; t++)); do
                if [ -d "run/step-${kill%%:*}" ] || ! kill -0 $job 2>/dev/null; then break; fi
                sleep 0.01
            done
            pid=$(cat "pid.${kill#*:}" 2>/dev/null)
            rm -f pid.* # before the kill: then the next start writes its own
            { [ -n "$pid" ] && kill -KILL "$pid"; } 2>/dev/null || missed=1
        done
        wait $job
        code=$?
        job=
        starts=$(grep -o '[0-9]* ranks (' log | sed 's/ .*//' | tr '\n' ' ')
        if [ $code -eq 0 ] && [ ${#starts} -le ${#expected} ]; then missed=1; fi # it had ended, and nobody had asked how yet
        [ -n "$missed" ] || break
    done
    if [ -n "$missed" ]; then fail "$name: nothing was killed in $attempt runs" log
    elif [ "$starts" != "$expected " ]; then fail "$name: starts with $expected ranks were expected, exit code $code" log
    elif [ $code -ne 0 ]; then fail "$name: exit code $code" log
    elif ! cmp out/model.safetensors undisturbed/model.safetensors >>log 2>&1; then fail "$name: other bytes than undisturbed" log
    else pass; fi
}

"$programs/train_llama" "${training[@]}" --save undisturbed >log 2>&1 || fail 'the undisturbed run' log
saved=("${training[@]}" --checkpoint run --checkpoint-every 5 --save out)
killed 'one of four dies' 10:0 '4 2' --ranks 1:4 --max-restarts 3 -- ./tell "$programs/train_llama" "${saved[@]}"
killed 'twice, tensor parallel, written in the background' '10:0 20:0' '4 2 2' --ranks 1:4 --max-restarts 2 -- ./tell "$programs/train_llama" "${saved[@]}" --tp 2 --checkpoint-background on --keep 2
killed 'three times, down to one' '5:0 10:0 20:0' '8 4 2 1' --ranks 1:8 --max-restarts 3 -- ./tell "$programs/train_llama" "${saved[@]}" --exact=require --zero 2
echo 2 >machines
killed 'a machine comes back' 10:0 '2 4' --ranks 1:4 --max-restarts 1 --available 'cat machines; echo 4 >machines' -- ./tell "$programs/train_llama" "${saved[@]}" --dp-shard '{dp-shard}'

# says NAME CODE PATTERN ARGS..: exit code and a line of llmpar-run
says()
{
    local name=$1 code=$2 pattern=$3 got
    shift 3
    timeout 300 "$run" "$@" >log 2>&1 </dev/null
    got=$?
    if [ $got -eq "$code" ] && grep -Eq -- "$pattern" log; then pass; else fail "$name: exit code $got, expected $code and a line $pattern" log; fi
}
# Programs that die or fail at once, and say with what they were called.
printf '#!/bin/sh\necho "$@" >>calls\nkill -KILL $$\n' >dies
printf '#!/bin/sh\necho "$@" >>calls\nexit 7\n' >fails
printf '#!/bin/sh\necho "$1"; exit 2\n' >refuses
printf '#!/bin/sh\necho $$ >pid.0\nexec sleep 1000\n' >hangs
chmod +x dies fails refuses hangs
says 'restarts are bounded' 137 '^llmpar-run: ./dies died of signal 9; 2 of 2 restarts are used up' --ranks 1:8 --max-restarts 2 -- ./dies --batch 24 --checkpoint "a b" --name 'x  y' --tp 2
printf '%s\n' '--batch 24 --checkpoint a b --name x  y --tp 2 --dp-shard 4' '--batch 24 --checkpoint a b --name x  y --tp 2 --dp-shard 3 --resume auto' '--batch 24 --checkpoint a b --name x  y --tp 2 --dp-shard 2 --resume auto' >expected
if cmp -s calls expected; then pass; else fail 'arguments of the starts' calls; fi
rm calls
says 'a failure takes no rank away' 7 'failed with exit code 7; 1 of 1 restarts are used up' --ranks 1:4 --max-restarts 1 -- ./fails {ranks}x{dp-shard}x{ranks} --batch=8 --checkpoint c
printf '%s\n' '4x4x4 --batch=8 --checkpoint c' '4x4x4 --batch=8 --checkpoint c --resume auto' >expected
if cmp -s calls expected; then pass; else fail 'placeholders' calls; fi
says 'nobody is lost' 137 'restart 1 of 1, 4 ranks' --ranks 1:4 --max-restarts 1 --lost 0 -- ./dies --batch 8 --checkpoint c
printf '#!/bin/sh\nexit 9\n' >mpirun
chmod +x mpirun
says 'how MPICH says that a rank was killed' 9 'mpirun died of signal 9; restart 1 of 1, 2 ranks' --ranks 1:4 --max-restarts 1 -- ./mpirun -n {ranks} program --batch 8 --checkpoint c
says 'no signal' 7 'fails failed with exit code 7; restart 1 of 1, 4 ranks' --ranks 1:4 --max-restarts 1 -- ./fails --batch 8 --checkpoint c
says 'none divides the batch' 2 'no mesh: none of 5 .. 7 ranks is a multiple of tp 1 x dp-replicate 1 whose data ranks x grad-accum 1 divide batch 8' --ranks 5:7 --max-restarts 1 -- ./dies --batch 8 --checkpoint c
says 'none is a multiple of tp' 2 'no mesh: none of 1 .. 3 ranks is a multiple of tp 4' --ranks 1:3 --max-restarts 1 -- ./dies --batch 8 --checkpoint c --tp=4
echo 4 >machines
says 'none is left' 1 'no mesh: none of 3 .. 3 ranks .* divide batch 8' --ranks 3:4 --max-restarts 5 --available 'cat machines; echo 3 >machines' -- ./dies --batch 8 --checkpoint c
says 'the smallest allowed mesh stays' 137 'restart 2 of 2, 4 ranks' --ranks 3:5 --max-restarts 2 -- ./dies --batch 8 --checkpoint c
says 'none keeps the bits' 2 'no mesh: .*\(--exact require\)' --ranks 3:3 --max-restarts 1 -- ./dies --batch 9 --checkpoint c --exact require
says 'too few machines' 2 'no mesh: 1 ranks are there, --ranks 2:4 needs 2' --ranks 2:4 --max-restarts 1 --available 'echo 1' -- ./dies --batch 8 --checkpoint c
says 'no number of machines' 1 'the command printed "many"' --ranks 2:4 --max-restarts 1 --available 'echo many' -- ./dies --batch 8 --checkpoint c
says 'the program refuses its command line' 2 'a wrong command line; not started again' --ranks 1:2 --max-restarts 5 -- ./refuses --batch 8 --checkpoint c
says 'no such program' 127 'cannot be run' --ranks 1:2 --max-restarts 5 -- ./nowhere --batch 8 --checkpoint c
says '--ranks' 2 '"4": expected MIN:MAX' --ranks 4 --max-restarts 1 -- ./dies --checkpoint c
says '--ranks' 2 'MIN is above MAX' --ranks 4:2 --max-restarts 1 -- ./dies --checkpoint c
says '--ranks' 2 '"0": expected a whole number 1 .. 4096' --ranks 0:2 --max-restarts 1 -- ./dies --checkpoint c
says '--ranks' 2 '"1:2": expected a whole number' --ranks 1:1:2 --max-restarts 1 -- ./dies --checkpoint c
says '--ranks is missing' 2 '--ranks is missing' --max-restarts 1 -- ./dies --checkpoint c
says '--max-restarts' 2 '"-1": expected a whole number 0' --ranks 1:2 --max-restarts -1 -- ./dies --checkpoint c
says '--max-restarts is missing' 2 '--max-restarts is missing' --ranks 1:2 -- ./dies --checkpoint c
says '--lost' 2 '"all": expected a whole number' --ranks 1:2 --max-restarts 1 --lost all -- ./dies --checkpoint c
says '--lost and --available' 2 'exclude each other' --ranks 1:2 --max-restarts 1 --lost 1 --available 'echo 1' -- ./dies --checkpoint c
says 'no checkpoints' 2 '--checkpoint DIR is missing' --ranks 1:2 --max-restarts 1 -- ./dies --batch 8
says 'no batch' 2 '--batch is missing' --ranks 1:2 --max-restarts 1 -- ./dies --checkpoint c
says 'own dp-shard' 2 '--dp-shard 2: expected not' --ranks 1:2 --max-restarts 1 -- ./dies --checkpoint c --batch 8 --dp-shard 2
says 'mpirun without ranks' 2 'expected -n .ranks.' --ranks 1:2 --max-restarts 1 -- mpirun ./dies --checkpoint c --batch 8
says 'no program' 2 'no program behind --' --ranks 1:2 --max-restarts 1 --
says 'no --' 2 'unexpected "./dies"' --ranks 1:2 --max-restarts 1 ./dies
says 'help' 0 '^usage: llmpar-run' --help

# A signal to llmpar-run ends the program, and no restart follows.
rm -f pid.0
"$run" --ranks 1:1 --max-restarts 9 -- ./hangs --checkpoint c >log 2>&1 &
job=$!
for ((t = 0; t < 3000 && ! ${#pid}; t++)); do pid=$(cat pid.0 2>/dev/null); [ -n "$pid" ] && break; sleep 0.01; done
kill -TERM $job
wait $job
code=$?
job=
if [ $code -eq 143 ] && grep -q 'stopped by SIGTERM' log && ! kill -0 "$pid" 2>/dev/null; then pass; else fail "SIGTERM: exit code $code" log; kill -KILL "$pid" 2>/dev/null; fi

# ---- ranks as processes ----

mpi=$programs/mpi/train_llama
[ -x "$mpi" ] || mpi=$programs/train_llama_mpi
mpirun=$(command -v mpirun.openmpi || command -v mpirun)
if [ -x "$mpi" ] && [ -n "$mpirun" ]; then
    killed 'one of four processes dies' 10:2 '4 2' --ranks 1:4 --max-restarts 2 -- "$mpirun" -n '{ranks}' ./tell "$mpi" "${saved[@]}"
    killed 'rank 0 of two processes dies, tensor parallel' 10:0 '2 2' --ranks 2:2 --max-restarts 2 -- "$mpirun" -n '{ranks}' ./tell "$mpi" "${saved[@]}" --tp 2
else
    echo "skipped: no mpirun, or ${1:-build}/mpi/train_llama is not built"
    skipped=2
fi
if [ $skipped -gt 0 ]; then echo "$passed passed, $failed failed, $skipped skipped"; else echo "$passed passed, $failed failed"; fi
[ "$failed" -eq 0 ]
