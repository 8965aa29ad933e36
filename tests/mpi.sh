#!/bin/bash
# tests/mpi.sh quick|full: the test programs of build/mpi (Open MPI) and, full, build/mpich under mpirun; then the faults. One line a run, the sum as the last line.
# A rank that dies takes the others with it at once where mpirun sees to that; these runs ask it to leave the job alone, so that the others can report.
# What looks at the clock, and fails while the machine stood still, is run again with more time (as tests/timed.h does).
full=$1
out=build/mpi/runs
rm -rf $out
mkdir -p $out
passed=0 failed=0
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1 LC_ALL=C
openmpi=$(command -v mpirun.openmpi || command -v mpirun)

# Notes in $out/stood by how many microseconds a nap of a tenth of a second was too long, if by half a second or more.
watch()
{
    local before
    while [ -n "$EPOCHREALTIME" ] && kill -0 $$ 2>/dev/null; do
        before=${EPOCHREALTIME/./}
        sleep 0.1
        before=$((${EPOCHREALTIME/./} - before - 100000))
        [ $before -lt 500000 ] || echo $before >>$out/stood
    done
}
watch &
watching=$!
trap 'kill $watching 2>/dev/null' EXIT
trap 'exit 1' INT TERM HUP

# stood NAME: has the machine stood still since the last time? Then NAME, which has failed, is worth another try.
stood()
{
    [ -s $out/stood ] || return 1
    echo "$1: the machine stood still for up to $(sort -n $out/stood | tail -n 1) us: again, with $2 times the time"
    : >$out/stood
}

# launch MPI RANKS PROGRAM ARGS...
launch()
{
    local mpi=$1 ranks=$2
    shift 2
    if [ "$mpi" = mpich ]; then timeout -k 5 ${limit:-600} mpirun.mpich $patient -n "$ranks" "$@"
    else timeout -k 5 ${limit:-600} "$openmpi" $patient -n "$ranks" "$@"; fi
}

verdict() # NAME COUNT CODE LOG: COUNT tests of NAME have passed if CODE is 0
{
    if [ "$3" -eq 0 ]; then passed=$((passed + $2)); printf '%-44s ok, %d s\n' "$1" $((SECONDS - start))
    else failed=$((failed + 1)); printf '%-44s FAILED\n' "$1"; sed 's/^/    /' "$4" | grep -v '^ *---*$' | tail -n 25; fi
}

# program MPI RANKS NAME ARGS...: counts its own "N passed, N failed"
program()
{
    local mpi=$1 ranks=$2 name=$3 folder=build/mpi log code count
    [ "$mpi" = mpich ] && folder=build/mpich
    shift 3
    log=$out/$mpi.$ranks.$name.$*.log
    start=$SECONDS
    launch "$mpi" "$ranks" $folder/$name "$@" >"$log" 2>&1
    code=$?
    count=$(sed -n -E 's/^([0-9]+) passed, 0 failed.*/\1/p' "$log" | tail -n 1)
    [ -n "$count" ] || code=1
    verdict "$mpi, $ranks: $name $*" "${count:-0}" $code "$log"
}

# fault MPI HOW PLACE: four ranks, one of them is the victim; every other one has to say who failed and where all were, within 10 s (times $slow). Its own words go to $dir/log, the seconds to $dir/seconds.
fault()
{
    local mpi=$1 how=$2 place=$3 slow=${4:-1} folder=build/mpi victim=$(($3 % 4)) dir code bad=0 r text patient begin=$SECONDS
    patient="--mca orte_abort_on_non_zero_status 0"
    [ "$mpi" = mpich ] && folder=build/mpich patient=-disable-auto-cleanup
    [ "$how" = error ] && patient= # with that option, mpirun does not pass on exit codes
    dir=$out/$mpi.$how.$place
    rm -rf $dir
    mkdir -p $dir
    limit=$((60 * slow)) LLMPAR_TEST_SLOW=$slow launch $mpi 4 $folder/test_mpi_fault $how $place $victim $dir >$dir/log 2>&1
    code=$?
    if [ $code -eq 0 ]; then echo "the job ended with exit code 0" >>$dir/log; bad=1; fi
    if [ $((SECONDS - begin)) -gt $((55 * slow)) ]; then echo "the job did not end" >>$dir/log; bad=1; fi
    for r in 0 1 2 3; do
        [ $r -ne $victim ] || continue
        text=$(head -n 1 $dir/rank_$r 2>/dev/null)
        if ! echo "$text" | awk -v most=$((10 * slow)) '{ exit !($1 >= 0 && $1 <= most) }'; then echo "rank $r reported after more than $((10 * slow)) s, or not: $text" >>$dir/log; bad=1; fi
        case $how in
        error) want="this rank gives up" ;;
        *) want="no sign of life from rank $victim\|waited $((5 * slow)) s" ;;
        esac
        for part in "$want" " $victim (dp_shard=$((victim / 2)) tp=$((victim % 2)))" "layers.3/" "last completed" "(call\|(message" "before"; do
            echo "$text" | grep -q "$part" || { echo "rank $r does not say \"$part\": $text" >>$dir/log; bad=1; }
        done
    done
    echo "$bad $((SECONDS - begin))" >$dir/result
}

# faults MPI "HOW PLACE" ...: all at once, since they mostly wait; then one line each
faults()
{
    local mpi=$1 one how place bad seconds slow running=()
    shift
    : >$out/stood
    for one in "$@"; do fault $mpi $one & running+=($!); done
    wait "${running[@]}"
    for one in "$@"; do
        read -r how place <<<"$one"
        read -r bad seconds <$out/$mpi.$how.$place/result
        for slow in 2 4 8; do
            { [ "${bad:-1}" -ne 0 ] && stood "$mpi: $how, place $place" $slow; } || break
            fault $mpi $how $place $slow
            read -r bad seconds <$out/$mpi.$how.$place/result
        done
        start=$((SECONDS - ${seconds:-0}))
        verdict "$mpi: $how, place $place, rank $((place % 4))" 1 "${bad:-1}" $out/$mpi.$how.$place/log
    done
}

# Training with processes as ranks gives the bytes of thread ranks.
train()
{
    local options="--model tiny --data README.md --dp-shard 2 --tp 2 --steps 3 --seq-len 64 --batch 8" bad=0
    start=$SECONDS
    build/mpi/train_llama $options --save $out/threads >$out/train.log 2>&1 || bad=1
    launch openmpi 4 build/mpi/train_llama $options --save $out/processes >$out/train.mpi.log 2>&1 || bad=1
    cmp $out/threads/model.safetensors $out/processes/model.safetensors >>$out/train.mpi.log 2>&1 || bad=1
    [ "$(grep -c '^step:' $out/train.mpi.log)" = "$(grep -c '^step:' $out/train.log)" ] || { echo "not only rank 0 prints" >>$out/train.mpi.log; bad=1; }
    verdict "train_llama on 4 processes and on 4 threads" 1 $bad $out/train.mpi.log
    start=$SECONDS bad=0
    launch openmpi 2 build/mpi/train_llama $options >$out/wrong.log 2>&1 && bad=1
    grep -q 'ranks = 4, but there are 2 MPI processes' $out/wrong.log || bad=1
    verdict "train_llama --dp-shard 2 --tp 2 on 2 processes" 1 $bad $out/wrong.log
}

soak()
{
    local slow code
    start=$SECONDS
    : >$out/stood
    for slow in 1 2 4 8; do
        LLMPAR_TEST_SLOW=$slow launch $1 4 $3/test_mpi_fault soak $2 >$out/soak.$1.log 2>&1
        code=$?
        { [ $code -ne 0 ] && stood "$1: random delays" $((2 * slow)); } || break
    done
    verdict "$1: $2 s of random delays" 1 $code $out/soak.$1.log
}

for case in own single abroad; do program openmpi 2 test_mpi_life $case; done
train
if [ "$full" != full ]; then
    for n in 1 2 4; do program openmpi $n test_mpi; program openmpi $n test_mpi_errors; done
    program openmpi 3 test_nccl_processes
    for n in 1 2 4; do LLMPAR_TEST_QUICK=1 program openmpi $n test_exact matrix; done
    faults openmpi "error 5" "exit 8" "kill 22" "stop 17" "loop 13" "loop 24"
    soak openmpi 8 build/mpi
else
    export LLMPAR_TEST_FULL=1
    for n in 1 2 3 4 5 6 7 8; do program openmpi $n test_mpi; program openmpi $n test_mpi_errors; done
    for n in 2 3 4; do program openmpi $n test_nccl_processes; done
    for n in 1 2 4; do LLMPAR_TEST_FULL= program openmpi $n test_exact; done
    LLMPAR_TEST_FULL= LLMPAR_TEST_QUICK=1 program openmpi 8 test_exact
    for case in own single abroad; do program mpich 2 test_mpi_life $case; done
    for n in 1 2; do program mpich $n test_mpi; program mpich $n test_mpi_errors; LLMPAR_TEST_FULL= program mpich $n test_exact; done
    for place in $(seq 0 $(($(build/mpi/test_mpi_fault places) - 1))); do faults openmpi "error $place" "exit $place" "kill $place" "stop $place" "loop $place"; done
    for place in 3 8 17; do faults mpich "error $place" "exit $place" "stop $place" "loop $place"; done
    soak openmpi 300 build/mpi
    soak mpich 60 build/mpich
fi
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
