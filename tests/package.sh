#!/bin/bash
# tests/package.sh: llmpar as projects take it in, one row a check; the last line is "N passed, N failed[, N skipped]". Works on a copy of what users get, with the headers of build/gen,
# in a folder whose name has a space. A tiny C and a tiny C++ program (tests/package/) are built each way and run: plain -I, pkg-config, find_package, add_subdirectory, FetchContent
# (from a folder and from a git repository; nothing is downloaded). Without cmake or pkg-config those rows are skipped; with LLMPAR_NO_SKIP=1 that is a failure.
top=$(pwd)
[ -f build/gen/llmpar.h ] || { echo "package: build/gen/llmpar.h is not there: run make test-package"; echo "0 passed, 1 failed"; exit 1; }
work=$(mktemp -d "${TMPDIR:-/tmp}/llmpar package.XXXXXX") || exit 1
trap 'rm -rf "$work"' EXIT
trap 'exit 1' INT TERM HUP
export LC_ALL=C
unset DESTDIR PREFIX INCLUDEDIR MAKEFLAGS MAKELEVEL CMAKE_PREFIX_PATH PKG_CONFIG_PATH CFLAGS CXXFLAGS LDFLAGS
CC=${CC:-cc} CXX=${CXX:-c++}
passed=0 failed=0 skipped=0
log=$work/log

# check NAME COMMAND...: has to succeed
check()
{
    local name=$1
    shift
    if "$@" >"$log" 2>&1; then passed=$((passed + 1)); return 0; fi
    failed=$((failed + 1))
    echo "FAILED $name: $*"
    tail -n 15 "$log" | sed 's/^/    /'
    return 1
}
# says NAME TEXT COMMAND...: has to succeed, with TEXT in what it says (a line end counts as a space)
# refused NAME TEXT COMMAND...: has to fail, with TEXT
said() { tr -s '\n ' '  ' <"$log" | grep -qF -- "$1"; }
says()
{
    local name=$1 text=$2
    shift 2
    check "$name" "$@" || return 1
    if said "$text"; then return 0; fi
    passed=$((passed - 1)) failed=$((failed + 1))
    echo "FAILED $name: expected \"$text\", got"
    tail -n 15 "$log" | sed 's/^/    /'
    return 1
}
refused()
{
    local name=$1 text=$2
    shift 2
    if "$@" >"$log" 2>&1; then
        failed=$((failed + 1))
        echo "FAILED $name: succeeded, expected \"$text\""
    elif said "$text"; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "FAILED $name: expected \"$text\", got"
        tail -n 15 "$log" | sed 's/^/    /'
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
group_passed=0
group() { echo "$1: $((passed - group_passed)) ok"; group_passed=$passed; }

# ---- what users get ----
source="$work/source tree"
mkdir -p "$source"
for item in *; do [ "$item" = build ] || cp -r "$item" "$source/"; done
cp build/gen/*.h "$source/"
cp -r tests/package "$work/consumer"
cp tests/package/consumer.c "$work/consumer.c"
cp tests/package/consumer.c "$work/consumer.cc"
part() { awk -v name="LLMPAR_VERSION_$1" '$1 == "#define" && $2 == name { print $3 }' "$source/llmpar.h"; }
major=$(part MAJOR) minor=$(part MINOR) patch=$(part PATCH)
version=$major.$minor.$patch
expected="llmpar $version, ranks at tp=0 and tp=1"
next=$major.$((minor + 1))
few="-O0 -DLLMPAR_NO_LLAMA -DLLMPAR_NO_TEXT -DLLMPAR_NO_IO -DLLMPAR_NO_SIMD" # quick to compile

# ---- make install: as often as one likes, anywhere; the same as cmake --install ----
install_to() { make -s -C "$source" install DESTDIR="$1" PREFIX="$2"; }
files_of() { (cd "$1" && find . -type f | sort); }
staged="$work/stage" prefix="$work/pre fix"
says "make install with DESTDIR" "llmpar $version: installed below" install_to "$staged" /usr/local
check "make install, PREFIX with a space" install_to "" "$prefix"
files_of "$prefix" >"$work/files"
check "make install twice" install_to "" "$prefix"
check "twice is the same" diff "$work/files" <(files_of "$prefix")
check "DESTDIR is no part of the files" diff "$work/files" <(files_of "$staged/usr/local")
check "what is installed" diff <(files_of "$prefix" | grep -v '/doc/') <(printf './%s\n' include/llmpar.h include/llmpar_cuda.h include/llmpar_nccl.h \
    share/cmake/llmpar/llmparConfig.cmake share/cmake/llmpar/llmparConfigVersion.cmake share/cmake/llmpar/llmparTargets.cmake share/pkgconfig/llmpar.pc)
check "licence and documents" test -f "$prefix/share/doc/llmpar/LICENSE" -a -f "$prefix/share/doc/llmpar/README.md" -a -f "$prefix/share/doc/llmpar/docs/exact.md"
check "no value is missing" bash -c '! grep -rn "@[A-Z_]*@" "$1/share/pkgconfig" "$1/share/cmake"' - "$prefix"
check "the build folder is not in the files" bash -c '! grep -rnF "$2" "$1/usr/local"' - "$staged" "$work"
for header in llmpar llmpar_cuda llmpar_nccl; do check "$header.h" cmp "$source/$header.h" "$prefix/include/$header.h"; done
check "readable by all" test -z "$(find "$staged" -type f ! -perm -444)"
check "version in the pkg-config file" grep -qx "Version: $version" "$prefix/share/pkgconfig/llmpar.pc"
check "version in the CMake file" grep -qF "PACKAGE_VERSION \"$version\"" "$prefix/share/cmake/llmpar/llmparConfigVersion.cmake"
check "version in the changelog" grep -qF "$version" "$source/CHANGELOG.md"
check "version stated once" test "$(grep -rlF "$version" "$source/cmake" "$source/Makefile" "$source/CMakeLists.txt" "$source/tools" | wc -l)" -eq 0
refused "relative PREFIX" "PREFIX = usr, expected an absolute path" install_to "$work/nowhere" usr
check "INCLUDEDIR of its own" make -s -C "$source" install DESTDIR="$work/own" PREFIX=/usr INCLUDEDIR=/opt/c/include
check "headers are there" test -f "$work/own/opt/c/include/llmpar.h" -a ! -e "$work/own/usr/include"
check "the CMake file knows" grep -qF '"/opt/c/include" ABSOLUTE' "$work/own/usr/share/cmake/llmpar/llmparConfig.cmake"
check "the pkg-config file knows" grep -qx 'includedir=/opt/c/include' "$work/own/usr/share/pkgconfig/llmpar.pc"
group "make install"
if [ "$failed" -gt 0 ]; then echo "$passed passed, $failed failed"; exit 1; fi # nothing below can work

# ---- plain: one file of C, one of C++ ----
plain="-I$prefix/include"
printf '#define LLMPAR_IMPLEMENTATION\n#include "llmpar.h"\n' >"$work/implementation.c"
check "C implementation" $CC $few "$plain" -c "$work/implementation.c" -o "$work/implementation.o" &
compiling=$!
check "C++ program with its own implementation" $CXX $few -DOWN_IMPLEMENTATION "$plain" "$work/consumer.cc" -o "$work/plain_cxx" -lpthread -lm
says "plain C++" "$expected" "$work/plain_cxx"
wait $compiling && passed=$((passed + 1)) || failed=$((failed + 1))
check "plain C" $CC "$plain" "$work/consumer.c" "$work/implementation.o" -o "$work/plain_c" -lpthread -lm
says "plain C" "$expected" "$work/plain_c"
group "plain -I"

# ---- pkg-config ----
if have pkg-config pkg-config; then
    export PKG_CONFIG_PATH="$prefix/share/pkgconfig"
    says "pkg-config version" "$version" pkg-config --modversion llmpar
    check "pkg-config: this series" pkg-config --exists "llmpar >= $version" "llmpar < $next"
    refused "pkg-config: too new" "llmpar" pkg-config --print-errors --exists "llmpar >= $next"
    says "pkg-config flags" "-pthread -lm" pkg-config --libs llmpar
    # eval: the folder's name has a space, which pkg-config quotes
    check "pkg-config C" eval "$CC $(pkg-config --cflags llmpar) '$work/consumer.c' '$work/implementation.o' -o '$work/pc_c' $(pkg-config --libs llmpar)"
    check "pkg-config C++" eval "$CXX $(pkg-config --cflags llmpar) '$work/consumer.cc' '$work/implementation.o' -o '$work/pc_cxx' $(pkg-config --libs llmpar)"
    says "pkg-config C" "$expected" "$work/pc_c"
    says "pkg-config C++" "$expected" "$work/pc_cxx"
    check "pkg-config after the tree was moved" bash -c 'PKG_CONFIG_PATH=$1/usr/local/share/pkgconfig PKG_CONFIG_SYSROOT_DIR= pkg-config --define-prefix --cflags llmpar | grep -F stage/usr/local/include' - "$staged"
    unset PKG_CONFIG_PATH
    group "pkg-config"
fi

# ---- CMake ----
# project NAME OPTION...: configures tests/package into a folder of its own
project() { local name=$1; shift; cmake -S "$work/consumer" -B "$work/cmake $name" -DCMAKE_C_COMPILER="$CC" -DCMAKE_CXX_COMPILER="$CXX" -DCMAKE_FIND_USE_SYSTEM_ENVIRONMENT_PATH=ON "$@"; }
# built NAME OPTION...: configured, built, and both programs run
built()
{
    local name=$1
    check "$name: configure" project "$@" || return 1
    check "$name: build" cmake --build "$work/cmake $name" || return 1
    if [ -f "$work/cmake $name/consumer_c" ]; then says "$name: C" "$expected" "$work/cmake $name/consumer_c"; fi
    says "$name: C++" "$expected" "$work/cmake $name/consumer_cxx"
}
ready="-DIMPLEMENTATION=$work/implementation.o"
if have cmake cmake; then
    check "cmake --install: configure" cmake -S "$source" -B "$work/alone" -DCMAKE_INSTALL_PREFIX="$work/other"
    check "cmake --install" cmake --install "$work/alone"
    check "the same files as make install" diff "$work/files" <(files_of "$work/other")
    check "the same text as make install" diff -r -x llmpar.pc "$prefix" "$work/other"
    check "the same pkg-config file" diff <(sed "s|^prefix=.*|prefix=|" "$prefix/share/pkgconfig/llmpar.pc") <(sed "s|^prefix=.*|prefix=|" "$work/other/share/pkgconfig/llmpar.pc")
    group "cmake --install"

    find=(-DWAY=find "-DCMAKE_PREFIX_PATH=$prefix")
    built find "${find[@]}" -DASK="$version" -DCMAKE_BUILD_TYPE=Debug
    built find_cxx -DWAY=find "-DCMAKE_PREFIX_PATH=$staged/usr/local" -DLANGUAGE=CXX "$ready" # a tree that was moved
    built subdirectory -DWAY=subdirectory "-DSOURCE=$source" "$ready"
    built fetch_directory -DWAY=fetch_directory "-DSOURCE=$source" "$ready"
    if have git git; then
        git -C "$source" -c init.defaultBranch=main init -q && git -C "$source" add . &&
            git -C "$source" -c user.name=test -c user.email=test@localhost -c commit.gpgsign=false commit -q -m test && git -C "$source" tag v1
        built fetch_git -DWAY=fetch_git "-DREPOSITORY=$source" "$ready"
    fi
    group "find_package, add_subdirectory, FetchContent"

    # Versions: found are this one, its series and ranges around it; refused are newer ones and other series.
    asks() { project "version" "${find[@]}" -DLANGUAGE=NONE -DASK="$1"; }
    # (LANGUAGE=NONE ends at llmpar's own complaint, after the version was accepted)
    accepted() { refused "version $1" "enable one" asks "$1"; }
    for ask in "$version" "$version;EXACT" "$major.$minor" "$major" "$version...$((major + 1))" "$major...<$next" ""; do accepted "$ask"; done
    other=$major.$((patch + minor + 1)).0
    for ask in "$next" "$((major + 1)).0" "$major.$minor.$((patch + 1))" "$next...$((major + 1))" "$version;EXACT;REQUIRED;x" "$major.0...<$version" "$other"; do
        case $ask in *x) continue ;; esac
        refused "version $ask" "version: $version" asks "$ask"
    done
    if [ "$major" = 0 ] && [ "$minor" -gt 0 ]; then refused "version $major.0 (an older series)" "version: $version" asks "$major.0"; fi
    group "versions"

    # Components that are not there are named, each with what mends it.
    absent=(-DCMAKE_DISABLE_FIND_PACKAGE_MPI=ON -DCMAKE_DISABLE_FIND_PACKAGE_CUDAToolkit=ON -DLLMPAR_NCCL_LIBRARY=OFF -DCMAKE_C_COMPILER_FORCED=ON -DCMAKE_CXX_COMPILER_FORCED=ON)
    refused "mpi is not there" "llmpar, component mpi: no MPI for C was found: install Open MPI or MPICH" project absent "${find[@]}" "${absent[@]}" -DASK="COMPONENTS;mpi;cuda;nccl;gpu"
    cp "$log" "$work/absent"
    for text in "component cuda: no CUDA toolkit was found" "component nccl: no NCCL was found" "component gpu: there is no such component, expected mpi, cuda or nccl"; do
        says "... and $text" "$text" cat "$work/absent"
    done
    says "they may be optional" "found llmpar $version" project optional "${find[@]}" "${absent[@]}" -DASK="OPTIONAL_COMPONENTS;mpi;cuda;nccl"
    if have mpicc libopenmpi-dev; then
        # one implementation with MPI in it, as two processes and, without mpirun, as threads
        export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1
        built mpi "${find[@]}" -DMPI=ON
        says "mpirun -n 2" "$expected" timeout 600 mpirun -n 2 "$work/cmake mpi/consumer_c"
        built mpi_subdirectory -DWAY=subdirectory "-DSOURCE=$source" -DMPI=ON "-DIMPLEMENTATION=$work/cmake mpi/libfunctions.a"
    fi
    # NCCL is stood in for by a folder of that shape; the toolkit is the one of the machine.
    mkdir -p "$work/nccl/include" "$work/nccl/lib"
    : >"$work/nccl/include/nccl.h"
    : >"$work/nccl/lib/libnccl.so"
    export PATH=$PATH:/usr/local/cuda/bin
    if ! command -v nvcc >/dev/null; then echo "not checked: llmpar::cuda and llmpar::nccl with a CUDA toolkit (no nvcc)"; else
        check "cuda and nccl: configure" project backends "${find[@]}" -DASK="COMPONENTS;cuda;nccl" -DNCCL_ROOT="$work/nccl" -DBACKENDS=ON
        check "cuda and nccl: build" cmake --build "$work/cmake backends" --target backends
    fi
    group "components"
fi

# ---- make uninstall: nothing of llmpar stays, nothing of others goes ----
mkdir -p "$prefix/share/doc/other"
touch "$prefix/share/doc/other/file" "$prefix/include/other.h"
check "make uninstall" make -s -C "$source" uninstall PREFIX="$prefix"
check "nothing of llmpar stays" diff <(cd "$prefix" && find . -type f -o -name '*llmpar*' | sort) <(printf './include/other.h\n./share/doc/other/file\n')
check "make uninstall with DESTDIR" make -s -C "$source" uninstall DESTDIR="$staged" PREFIX=/usr/local
check "no file stays" test -z "$(find "$staged" -type f -o -name '*llmpar*')"
check "make uninstall where nothing is" make -s -C "$source" uninstall DESTDIR="$work/empty"
check "uninstall, INCLUDEDIR of its own" make -s -C "$source" uninstall DESTDIR="$work/own" PREFIX=/usr INCLUDEDIR=/opt/c/include
check "no file stays there" test -z "$(find "$work/own" -type f)"
group "make uninstall"

cd "$top" || exit 1
if [ "$skipped" -gt 0 ]; then echo "$passed passed, $failed failed, $skipped skipped"; else echo "$passed passed, $failed failed"; fi
[ "$failed" -eq 0 ] && { [ "$skipped" -eq 0 ] || [ -z "$LLMPAR_NO_SKIP" ]; }
