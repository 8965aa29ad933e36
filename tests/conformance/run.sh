#!/bin/sh
# make test-grade: what the graders say about files that are known. Untouched tables and the reference solutions pass; each wrong file, and the stubs, fail with what their `expect:` lines say:
#   /* expect: all_gather */        the slot that fails, which is the one that is tried (`expect: *`: all are, and any number may fail)
#   /* expect: text */              a piece of the output
here=tests/conformance out=build/grade/test
unset COMM OP ASSIGNMENT FILE BYTES SLOT LLMPAR_CPU
mkdir -p "$out"
passed=0 failed=0

fine() { passed=$((passed + 1)); }
wrong()
{
    failed=$((failed + 1))
    echo "FAILED $1: $2"
    sed 's/^/    /' "$3"
}

# must_pass NAME VARIABLE=FILE...
must_pass()
{
    what=$1
    shift
    if env "$@" $here/grade.sh >"$out/log" 2>&1; then fine; else wrong "$what" "expected to pass" "$out/log"; fi
}

# must_fail FILE VARIABLE=FILE...
must_fail()
{
    wanted=$1
    shift
    sed -n 's:^.*/\* expect\: \(.*\) \*/.*$:\1:p' "$wanted" >"$out/expect"
    slot=$(head -n 1 "$out/expect")
    [ "$slot" = '*' ] || set -- "$@" "SLOT=$slot"
    env "$@" $here/grade.sh >"$out/log" 2>&1
    code=$?
    if [ "$code" -ne 1 ]; then
        wrong "$wanted" "expected exit code 1, got $code" "$out/log"
        return
    fi
    if [ ! -s "$out/expect" ]; then
        wrong "$wanted" "has no expect line" "$out/log"
        return
    fi
    if [ "$slot" != '*' ]; then
        others=$(sed -n 's/^\([a-z_, ]*[a-z]\) *\((\*)\)* *FAILED.*/\1/p' "$out/log" | tr '\n' ';')
        if [ "$others" != "$slot;" ]; then
            wrong "$wanted" "expected \"$slot\" alone to fail, got \"$others\"" "$out/log"
            return
        fi
    fi
    missing=$(tail -n +2 "$out/expect" | while IFS= read -r text; do grep -qF -- "$text" "$out/log" || echo "$text"; done)
    if [ -n "$missing" ]; then wrong "$wanted" "the output lacks \"$missing\"" "$out/log"; else fine; fi
}

printf 'void grade_patch(llmpar_comm *table) { (void)table; }\n' >"$out/none_comm.c"
printf 'void grade_patch(llmpar_device *table) { (void)table; }\n' >"$out/none_device.c"
must_pass "the communicator as it is" COMM="$out/none_comm.c"
must_pass "the device as it is" OP="$out/none_device.c"
if command -v "${CXX:-c++}" >/dev/null; then
    cat >"$out/vector.cc" <<'END'
#include <vector>
static llmpar_status (*original)(llmpar_comm *, llmpar_stream *, const llmpar_collective *);
static llmpar_status pass_on(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call)
{
    std::vector<int> three(3);
    return three.size() == 3 ? original(comm, stream, call) : LLMPAR_ERR_INTERNAL;
}
void grade_patch(llmpar_comm *table)
{
    __atomic_store_n(&original, table->all_to_all, __ATOMIC_SEQ_CST);
    table->all_to_all = pass_on;
}
END
    must_pass "a file in C++" COMM="$out/vector.cc" SLOT=all_to_all
fi
for folder in examples/teaching/*/; do
    name=$(basename "$folder")
    must_pass "$name, the reference" ASSIGNMENT="$name" FILE="${folder}reference.c"
    must_fail "$here/wrong/stub_$name.txt" ASSIGNMENT="$name" FILE="${folder}stub.c"
done
for file in $here/wrong/comm_*; do must_fail "$file" COMM="$file"; done
for file in $here/wrong/op_*; do must_fail "$file" OP="$file"; done
for file in $here/wrong/fsdp_*; do must_fail "$file" ASSIGNMENT=2_fsdp FILE="$file"; done

# What is no failed slot: bytes that are only reported; files that cannot be tried (exit code 2).
must_pass "more bytes than the formula, reported" COMM="$here/wrong/comm_sends_too_much.c" SLOT=all_reduce BYTES=report
# refused TEXT VARIABLE=VALUE...
refused()
{
    text=$1
    shift
    env "$@" $here/grade.sh >"$out/log" 2>&1
    code=$?
    if [ "$code" -eq 2 ] && grep -qF -- "$text" "$out/log"; then fine; else wrong "$*" "expected exit code 2 and \"$text\", got $code" "$out/log"; fi
}
printf 'void grade_patch(llmpar_comm *table) { table->no_such_slot = 0; }\n' >"$out/broken.c"
printf 'static void unused(void) {}\nstatic void (*keep)(void) = unused;\nint other(void) { return keep == 0; }\n' >"$out/nothing.c"
refused 'missing.c: no such file' COMM="$out/missing.c"
refused 'broken.c does not compile' COMM="$out/broken.c"
refused 'broken.c does not compile' OP="$out/broken.c"
refused 'does the file define every function of the task' COMM="$out/nothing.c"
refused 'conflicting types' OP="$out/none_comm.c"
refused 'no assignment "3_none" (there are: 1_collectives 2_fsdp )' ASSIGNMENT=3_none
refused 'say what: make grade COMM=file.c'
rm -rf "$out"
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
