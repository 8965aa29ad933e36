#!/bin/sh
# tests/need.sh TOOL PACKAGE -- COMMAND...   runs the command, or says which Debian package the suite lacks.
# TOOL is a program, or a -fsanitize= flag that $CC must be able to link.
tool=$1 package=$2
shift 3
case $tool in
-fsanitize=*)
    mkdir -p build
    file=build/need.$$
    echo 'int main(void) { return 0; }' >$file.c
    if [ "$tool" = -fsanitize=fuzzer ]; then echo 'int LLVMFuzzerTestOneInput(const unsigned char *d, unsigned long n) { return d != d && n; }' >$file.c; fi
    ${CC:-cc} "$tool" $file.c -o $file 2>/dev/null
    found=$?
    rm -f $file $file.c
    ;;
*)
    command -v "$tool" >/dev/null 2>&1
    found=$?
    ;;
esac
if [ "$found" -eq 0 ]; then exec "$@"; fi
echo "skipped: needs $tool (Debian package: $package; tools/setup installs it)"
echo "0 passed, 0 failed, 1 skipped"
[ -z "$LLMPAR_NO_SKIP" ]
