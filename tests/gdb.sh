#!/bin/sh
# make test-gdb: a debugger walks through one training step. The launch is in lockstep, so while one rank is stopped no other runs, and each thread says which rank it is.
#   break before the step, list the threads by name; break in a collective of that step, see the wrapper's arguments, step over a line and out of it; let it go to the end.
program=$1
log=$program.log
passed=0 failed=0
timeout 900 gdb -q -nx -batch \
    -ex 'set pagination off' -ex 'set confirm off' -ex 'set debuginfod enabled off' -ex 'set breakpoint pending on' \
    -ex 'break before_the_step' -ex 'run' \
    -ex 'echo == threads\n' -ex 'info threads' \
    -ex 'echo == rank\n' -ex 'print rank' \
    -ex 'delete' -ex 'break llmpar_all_gather if comm->ranks == 2' -ex 'continue' \
    -ex 'echo == collective\n' -ex 'backtrace 3' -ex 'print comm->axis' -ex 'print call->tag' -ex 'print call->count' \
    -ex 'delete' -ex 'echo == next\n' -ex 'next' -ex 'echo == finish\n' -ex 'finish' \
    -ex 'echo == end\n' -ex 'delete' -ex 'continue' \
    "$program" >"$log" 2>&1
code=$?

# expect WHAT SECTION PATTERN: a line of that section of the log
expect()
{
    if sed -n "/^== $2/,/^== /p" "$log" | grep -qE -- "$3"; then passed=$((passed + 1)); return; fi
    failed=$((failed + 1))
    echo "FAILED $1: no \"$3\" behind \"$2\""
}
for name in 'r0 tp0' 'r1 tp1' 'r2 tp0' 'r3 tp1'; do expect "the name of thread $name" threads "\"$name\""; done
expect "one rank stopped before the step" threads 'before_the_step'
expect "the rank is readable" rank '= [0-3]$'
expect "a collective of the step" collective '#0 +.*llmpar_all_gather .*comm=0x'
expect "its axis" collective '= .*"(tp|dp_shard|dp|world)"'
expect "its tag" collective '= .*".+"'
expect "a line stepped over" next '^[0-9]+[[:space:]]'
expect "out of the collective" finish 'Value returned is .*LLMPAR_OK'
expect "the step goes on to its end" end 'loss [0-9]'
expect "and the program with it" end 'exited normally'
if [ "$code" -ne 0 ]; then failed=$((failed + 1)); echo "FAILED gdb: exit code $code"; fi
if [ "$failed" -gt 0 ]; then sed 's/^/    /' "$log" | tail -n 80; fi
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
