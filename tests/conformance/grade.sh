#!/bin/sh
# make grade COMM=file.c | OP=file.c | ASSIGNMENT=1_collectives [FILE=file.c]: compiles the file, links it with the suite and the library, runs it.
# Exit code 0: everything passed. Needs build/grade/*.o and the implementation (EXAMPLE_LIB), which the Makefile makes.
here=tests/conformance lib=${EXAMPLE_LIB:-build/examples/llmpar.o}
stop() { echo "grade: $*" >&2; exit 2; }

# compile FILE HEADER OBJECT: C, or C++ by the name's end
compile()
{
    [ -f "$1" ] || stop "$1: no such file"
    case $1 in *.cc | *.cpp | *.cxx) compiler="${CXX:-c++}" ;; *) compiler=${CC:-cc} ;; esac
    linker=$compiler
    $compiler -O1 -g -Wall -Wextra -I. -I"$(dirname "$1")" $4 -include "$2" -c "$1" -o "$3" || stop "$1 does not compile"
}

# link PROGRAM OBJECT...: names the function that is missing
link()
{
    program=$1
    shift
    $linker "$@" "$lib" -o "$program" -lpthread -lm 2>"$program.log" && return
    cat "$program.log" >&2
    stop "it does not link: does the file define every function of the task, and none of them static?"
}

out=build/grade/$$
mkdir -p "$out"
trap 'rm -rf "$out"' EXIT INT TERM
status=0
if [ -n "$COMM" ]; then
    compile "$COMM" $here/grade_comm.h "$out/file.o"
    link "$out/grade" build/grade/comm.o "$out/file.o"
    "$out/grade" "$COMM" $BYTES || status=1
elif [ -n "$OP" ]; then
    compile "$OP" $here/grade_device.h "$out/file.o"
    link "$out/grade" build/grade/device.o "$out/file.o"
    "$out/grade" "$OP" || status=1
elif [ -n "$ASSIGNMENT" ]; then
    folder=examples/teaching/$ASSIGNMENT
    [ -f "$folder/check.c" ] || stop "no assignment \"$ASSIGNMENT\" (there are: $(ls examples/teaching | tr '\n' ' '))"
    file=${FILE:-$folder/stub.c}
    compile "$file" "$folder/assignment.h" "$out/file.o" -I"$folder"
    ${CC:-cc} -O1 -g -Wall -Wextra -I. -I$here -I"$folder" -c "$folder/check.c" -o "$out/check.o" || exit 2
    link "$out/check" "$out/check.o" "$out/file.o"
    "$out/check" "$file" || status=1
    if [ "$status" -eq 0 ] && grep -q grade_patch "$folder/assignment.h"; then
        link "$out/grade" build/grade/comm.o "$out/file.o"
        "$out/grade" "$file" $BYTES || status=1
    fi
else
    stop "say what: make grade COMM=file.c, make grade OP=file.c, or make grade ASSIGNMENT=1_collectives FILE=file.c (docs/teaching.md)"
fi
exit $status
