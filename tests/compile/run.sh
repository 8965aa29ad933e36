#!/bin/bash
# Every compiler, standard and order of includes: `make check-compile`. Headers are those of build/gen (just made from src/).
# Prints one line a group, the compiler's words for a case that fails, and the sum as the last line.
headers=build/gen
out=build/compile
here=tests/compile
mkdir -p $out
passed=0 failed=0 skipped=0

# check NAME COMMAND...: the command has to succeed and to say nothing.
check()
{
    local name=$1
    shift
    if "$@" >$out/log 2>&1 && [ ! -s $out/log ]; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "FAILED $name: $*"
        head -n 12 $out/log | sed 's/^/    /'
    fi
}

# refused NAME TEXT COMMAND...: the command has to fail with TEXT among its words.
refused()
{
    local name=$1 text=$2
    shift 2
    if "$@" >$out/log 2>&1; then
        failed=$((failed + 1))
        echo "FAILED $name: compiled, expected \"$text\""
    elif grep -qF "$text" $out/log; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "FAILED $name: expected \"$text\", got"
        head -n 12 $out/log | sed 's/^/    /'
    fi
}

# have TOOL PACKAGE
have()
{
    command -v "$1" >/dev/null 2>&1 && return 0
    skipped=$((skipped + 1))
    echo "skipped: needs $1 (Debian package: $2; tools/setup installs it)"
    return 1
}

group() { echo "$1: $((passed - group_passed)) ok"; group_passed=$passed; }
group_passed=0

# ---- one source a header and order of includes ----
for h in llmpar llmpar_cuda llmpar_nccl; do
    echo "#include \"$h.h\"" >$out/$h.alone.c
    printf '#include "%s.h"\n#include "%s.h"\n' $h $h >$out/$h.twice.c
    { echo "#include \"$h.h\""; cat $here/system.h; } >$out/$h.first.c
    { cat $here/system.h; echo "#include \"$h.h\""; } >$out/$h.last.c
    for order in alone twice first last; do
        echo 'llmpar_status use(void); llmpar_status use(void) { return LLMPAR_OK; }' >>$out/$h.$order.c
        cp $out/$h.$order.c $out/$h.$order.cu
    done
done
# gcc looks up every line of a file for -Wmisleading-indentation, four seconds of seven for the implementation: once as C, once as C++ (check-layers has it for every module).
indentation=-Wno-misleading-indentation
cc_flags="-pedantic-errors -Wall -Wextra -Wconversion -Wshadow -Wundef -Wstrict-prototypes -Wmissing-prototypes $indentation -Werror -I$headers"
cxx_flags="-pedantic-errors -Wall -Wextra -Wconversion -Wshadow -Wundef $indentation -Werror -I$headers"

# ---- declarations ----
for compiler in gcc clang; do
    have $compiler $compiler || continue
    for h in llmpar llmpar_cuda llmpar_nccl; do
        for order in alone twice first last; do
            check "$compiler c99 $h $order" $compiler -std=c99 $cc_flags -Wc++-compat -fsyntax-only $out/$h.$order.c
        done
    done
done
for compiler in g++ clang++; do
    have $compiler ${compiler/clang++/clang} || continue
    for standard in 11 17 20; do
        for h in llmpar llmpar_cuda llmpar_nccl; do
            for order in alone twice first last; do
                check "$compiler c++$standard $h $order" $compiler -std=c++$standard $cxx_flags -x c++ -fsyntax-only $out/$h.$order.c
            done
        done
    done
done
group "declarations as C99 and C++11/17/20"

nvcc=$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)
if have "$nvcc" nvidia-cuda-toolkit; then
    for h in llmpar llmpar_cuda llmpar_nccl; do
        for order in alone twice first last; do
            [ $h = llmpar ] || [ $order = alone ] || continue
            check "nvcc $h $order" "$nvcc" -std=c++17 -Werror all-warnings -I$headers -c $out/$h.$order.cu -o $out/nvcc.o
        done
    done
    refused "nvcc implementation" "define LLMPAR_IMPLEMENTATION in a .c or .cc file" "$nvcc" -DLLMPAR_IMPLEMENTATION -I$headers -c $out/llmpar.alone.cu -o $out/nvcc.o
    group "declarations in .cu files"
fi

# ---- implementation ----
impl="-DLLMPAR_IMPLEMENTATION"
for compiler in gcc clang; do
    have $compiler $compiler || continue
    check "$compiler c99 implementation" $compiler -std=c99 $cc_flags -Wmisleading-indentation $impl -fsyntax-only $out/llmpar.first.c
    check "$compiler gnu11 implementation twice" $compiler -std=gnu11 $cc_flags $impl -Wno-pedantic -fsyntax-only $out/llmpar.twice.c
    check "$compiler gnu17 implementation last" $compiler -std=gnu17 $cc_flags $impl -Wno-pedantic -fsyntax-only $out/llmpar.last.c
    check "$compiler static" $compiler -std=c99 $cc_flags $impl -DLLMPAR_STATIC -fsyntax-only $out/llmpar.alone.c
    check "$compiler own LLMPAR_API" $compiler -std=c99 $cc_flags $impl "-DLLMPAR_API=__attribute__((visibility(\"default\"))) extern" -fsyntax-only $out/llmpar.alone.c
    refused "$compiler strict mode, system headers first" "llmpar: in strict mode (-std=c99) llmpar.h must come before" $compiler -std=c99 -I$headers $impl -fsyntax-only $out/llmpar.last.c
    refused "$compiler -Ofast" "without -ffast-math" $compiler -Ofast -I$headers $impl -fsyntax-only $out/llmpar.alone.c
    refused "$compiler -ffast-math" "without -ffast-math" $compiler -ffast-math -I$headers $impl -fsyntax-only $out/llmpar.alone.c
    check "$compiler checked libc calls" $compiler -O1 -U_FORTIFY_SOURCE -D_FORTIFY_SOURCE=2 -w -I$headers $impl -DLLMPAR_NO_LLAMA -DLLMPAR_NO_TEXT -DLLMPAR_NO_SIMD -c $out/llmpar.alone.c -o $out/checked.o
    refused "$compiler CUDA implementation" "belongs in a .cu file" $compiler -DLLMPAR_CUDA_IMPLEMENTATION -I$headers -fsyntax-only $out/llmpar_cuda.alone.c
    check "$compiler NCCL implementation" $compiler -std=c99 $cc_flags -Itests/fake_nccl -DLLMPAR_NCCL_IMPLEMENTATION -fsyntax-only $out/llmpar_nccl.alone.c
done
if [ "$(uname -m)" = x86_64 ]; then refused "gcc -mfpmath=387" "mfpmath=387 (-O3 is fine)" gcc -mfpmath=387 -I$headers $impl -fsyntax-only $out/llmpar.alone.c; fi
for compiler in g++ clang++; do
    have $compiler ${compiler/clang++/clang} || continue
    for standard in 11 17 20; do
        check "$compiler c++$standard implementation" $compiler -std=c++$standard $cxx_flags $([ $standard != 11 ] || echo -Wmisleading-indentation) $impl -x c++ -fsyntax-only $out/llmpar.first.c
    done
    check "$compiler NCCL implementation" $compiler -std=c++11 $cxx_flags -Itests/fake_nccl -DLLMPAR_NCCL_IMPLEMENTATION -x c++ -fsyntax-only $out/llmpar_nccl.alone.c
    check "$compiler static" $compiler -std=c++11 $cxx_flags $impl -DLLMPAR_STATIC -x c++ -fsyntax-only $out/llmpar.last.c
done
for mpicc in mpicc.openmpi mpicc.mpich; do
    have $mpicc ${mpicc#mpicc.} || continue
    flags="$($mpicc --showme:compile 2>/dev/null || $mpicc -compile_info | tr ' ' '\n' | grep '^-I')"
    check "$mpicc c99 implementation" gcc -std=c99 $cc_flags $impl -DLLMPAR_USE_MPI $flags -fsyntax-only $out/llmpar.first.c
    if have g++ g++; then check "$mpicc c++11 implementation" g++ -std=c++11 $cxx_flags $impl -DLLMPAR_USE_MPI -DOMPI_SKIP_MPICXX -DMPICH_SKIP_MPICXX $flags -x c++ -fsyntax-only $out/llmpar.first.c; fi
done
group "implementation as C99, gnu11, C++11/17/20, static, with MPI"

# ---- under another name: the header includes itself ----
mkdir -p $out/renamed
cp $headers/llmpar.h $out/renamed/other_name.h
echo '#include "renamed/other_name.h"' >$out/renamed.c
check "renamed header" gcc -std=c99 $impl '-DLLMPAR_HEADER="other_name.h"' -fsyntax-only $out/renamed.c
refused "renamed header without LLMPAR_HEADER" "llmpar.h: No such file" gcc -std=c99 $impl -fsyntax-only $out/renamed.c
group "under another name"

# ---- the manual's program ----
awk '/A whole program/ { on = 1 } /The ranks are threads/ { on = 0 } on && /^        / { print substr($0, 9) }' $headers/llmpar.h >$out/manual.c
for compiler in gcc clang; do
    have $compiler $compiler || continue
    check "$compiler manual" $compiler -std=c99 -Wall -Wextra $indentation -Werror -I$headers -fsyntax-only $out/manual.c
done
group "the program in the manual"

# ---- other C library, other processor ----
if have musl-gcc musl-tools; then
    for order in alone first; do
        check "musl c99 $order" musl-gcc -std=c99 $cc_flags $impl -fsyntax-only $out/llmpar.$order.c
        check "musl gnu11 $order" musl-gcc -std=gnu11 $cc_flags -Wno-pedantic $impl -fsyntax-only $out/llmpar.$order.c
    done
    check "musl implementation" musl-gcc -O0 -I$headers $impl -c $out/llmpar.alone.c -o $out/impl_musl.o
    check "musl user" musl-gcc -static -I$headers $here/user.c $out/impl_musl.o -o $out/user_musl
    check "musl run" $out/user_musl
fi
if [ "$(uname -m)" = aarch64 ] || [ -d /usr/aarch64-linux-gnu/include ]; then
    have clang clang && check "aarch64 c99" clang --target=aarch64-linux-gnu -isystem /usr/aarch64-linux-gnu/include -std=c99 $cc_flags $impl -O0 -c $out/llmpar.first.c -o $out/impl_aarch64.o
else
    have /usr/aarch64-linux-gnu/include libc6-dev-arm64-cross
fi
group "musl, aarch64"

# ---- what can be left out: declarations stay, the rest compiles, is silent and links ----
echo 'int main(void) { return 0; }' >$out/nothing.c
for option in LLAMA TEXT IO SIM SIMD; do
    check "LLMPAR_NO_$option" gcc -std=c99 $cc_flags $impl -DLLMPAR_NO_$option -O0 -c $out/llmpar.alone.c -o $out/no_$option.o
    check "LLMPAR_NO_$option links" gcc $out/nothing.c $out/no_$option.o -o $out/nothing -lpthread -lm
done
check "everything left out" gcc -std=c99 $cc_flags $impl -DLLMPAR_NO_LLAMA -DLLMPAR_NO_TEXT -DLLMPAR_NO_IO -DLLMPAR_NO_SIM -DLLMPAR_NO_SIMD -O0 -c $out/llmpar.alone.c -o $out/no.o
check "everything left out links" gcc $out/nothing.c $out/no.o -o $out/nothing -lpthread -lm
group "LLMPAR_NO_..."

# ---- C implementation and C++ user, and the reverse: linked and run ----
c_and_cxx()
{
    local c=$1 cxx=$2
    check "$c implementation" $c -std=c99 $cc_flags $impl -O0 -c $out/llmpar.alone.c -o $out/impl_c.o
    check "$cxx implementation" $cxx -std=c++11 $cxx_flags $impl -O0 -x c++ -c $out/llmpar.alone.c -o $out/impl_cxx.o
    check "$c user" $c -std=c99 $cc_flags -c $here/user.c -o $out/user_c.o
    check "$cxx user" $cxx -std=c++11 $cxx_flags -x c++ -c $here/user.c -o $out/user_cxx.o
    for pair in "impl_c user_cxx" "impl_cxx user_c" "impl_c user_c" "impl_cxx user_cxx"; do
        set -- $pair
        check "$c/$cxx $pair" $cxx $out/$1.o $out/$2.o -o $out/user -lpthread -lm
        check "$c/$cxx $pair run" $out/user
    done
}
c_and_cxx gcc g++
if have clang++ clang; then c_and_cxx clang clang++; fi
group "C and C++ linked and run"

# ---- a*b+c is two roundings inside the implementation, at the compilers' default modes and under a target with fma ----
if [ "$(uname -m)" = x86_64 ] && grep -qw fma /proc/cpuinfo; then
    # The modules of the implementation make room for the probe; the pragmas around them stay.
    awk '/^#pragma GCC diagnostic pop/ && --depth == 0 { skip = 0 } !skip { print } /^#pragma GCC diagnostic push/ && depth++ == 0 { print "#include \"contraction_inside.h\""; skip = 1 }' $headers/llmpar.h >$out/probe.h
    for compiler in gcc clang g++ clang++; do
        have $compiler ${compiler/clang++/clang} || continue
        language=c
        case $compiler in *++) language=c++ ;; esac
        for level in -O0 -O3; do
            check "$compiler $level contraction" $compiler -x $language $level -I$out -I$here -DLLMPAR_IMPLEMENTATION $here/contraction.c -o $out/contraction -lpthread -lm
            check "$compiler $level contraction run" $out/contraction
        done
    done
    group "no contraction"
else
    skipped=$((skipped + 1))
    echo "skipped: the contraction check needs a processor with fma"
fi

if [ "$skipped" -gt 0 ]; then echo "$passed passed, $failed failed, $skipped skipped"; else echo "$passed passed, $failed failed"; fi
[ "$failed" -eq 0 ]
