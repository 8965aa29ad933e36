#!/bin/sh
# Does every module keep its layer? make check-layers has compiled each alone (build/layers); this looks at the text and the objects:
#   includes        only the own layer or a lower one, never inside a conditional; public headers take stddef and stdint alone
#   macros          LLMPAR_ names; those of .c and .inc files are undefined in the end
#   globals         no module has a mutable one
#   outside world   stdio and the environment only in run/, exit and abort nowhere, nothing of libm
#   spine           every module is on the list of one
failures=0

fail()
{
    echo "$1"
    failures=$((failures + 1))
}

# The layers that a room may include, itself aside.
below()
{
    case $1 in
    base) echo "" ;;
    tables | text) echo "base" ;;
    cpu | comm | sim | io | mesh) echo "base tables" ;;
    cuda | nccl) echo "llmpar.h" ;; # headers of their own, on llmpar.h's public ones
    tp | fsdp) echo "base tables mesh" ;;
    optim) echo "base tables mesh fsdp" ;;
    model) echo "base tables mesh tp fsdp optim" ;;
    model_io) echo "base tables mesh tp fsdp optim model io" ;;
    run) echo "base tables mesh tp fsdp optim model io model_io text cpu comm sim" ;;
    *) return 1 ;;
    esac
}

[ ! -f build/layers/failed ] || fail "a module does not compile alone, or not silently (above)"

files=$(find src -mindepth 2 -name '*.h' -o -mindepth 2 -name '*.c' -o -mindepth 2 -name '*.cu' -o -mindepth 2 -name '*.inc' | sort)
modules=$(echo "$files" | wc -l)
for room in $(echo "$files" | cut -d / -f 2 | sort -u); do
    allowed=$(below "$room") || fail "src/$room is not a room of docs/architecture.md" >&2
    echo "room $room $allowed"
done >build/layers/rooms
{
    sed -n 's/^#include "\(.*\)".*/spine \1/p' src/*.spine.h
    cat build/layers/rooms
    for file in $files; do # symbols of the modules' objects
        object=build/layers/${file#src/}
        case $file in *.c | *.cu) [ ! -f "${object%.c*}.o" ] || echo "object $file" ;; esac
    done
} >build/layers/known
objects=$(sed -n 's|^object src/\(.*\)\.cu*$|build/layers/\1.o|p' build/layers/known)
objdump -t $objects >build/layers/symbols
nm -A -u $objects >build/layers/wanted

# One line for each violation.
awk '
function say(text) { print file ": " text }
function is_guarded() { return file ~ /\.h$/ }
FILENAME == "build/layers/known" {
    if ($1 == "spine") spine[$2] = 1
    if ($1 == "object") object[$2] = source["build/layers/" substr($2, 5, length($2) - 4 - ($2 ~ /u$/ ? 3 : 2)) ".o"] = $2
    if ($1 == "room") { allowed[$2] = $0 " "; sub(/^room /, " ", allowed[$2]) }
    next
}
FILENAME == "build/layers/symbols" {
    if ($2 == "file" && $3 == "format") { file = source[substr($1, 1, length($1) - 1)]; next }
    if (($3 == "O" || $2 == "O") && /[ \t](\.data|\.bss|\.tdata|\.tbss|\*COM\*)/ && !/\.data\.rel\.ro/ && !/emulated_cublaslt/) say("mutable global: " $NF)
    next
}
FILENAME == "build/layers/wanted" {
    split($1, part, ":")
    file = source[part[1]]
    split(file, place, "/")
    if ($NF ~ /^(exit|_exit|abort|__assert_fail|quick_exit|atexit)$/) say("calls " $NF ": the library returns a status")
    if ($NF ~ /^(printf|fprintf|vprintf|vfprintf|puts|putchar|putc|fputs|fputc|fopen.*|fdopen|fclose|fread|fwrite|fflush|fgets|fscanf|stdout|stderr|stdin|perror|getenv|setenv)$/ && place[2] != "run")
        say("uses " $NF ": only src/run touches stdio and the environment")
    next
}
FNR == 1 {
    file = FILENAME
    module = substr(file, 5)
    room = module
    sub(/\/.*/, "", room)
    depth = 0
    seen = 0
    if (file ~ /\.cu?$/) {
        if (!(module in spine)) say("no spine lists it")
        if (!(file in object)) say("does not compile alone")
    }
}
/^[ \t]*#[ \t]*if/ { depth++ }
/^[ \t]*#[ \t]*endif/ { depth-- }
/^[ \t]*#[ \t]*include[ \t]*"/ {
    include = $0
    sub(/^[^"]*"/, "", include)
    sub(/".*/, "", include)
    of = include
    sub(/\/.*/, "", of)
    if (index(allowed[room], " " of " ") == 0) say("includes \"" include "\", which is not below src/" room " (allowed:" allowed[room] ")")
    if (include != "llmpar.h") {
        if ((getline line <("src/" include)) < 0) say("includes \"" include "\", which does not exist")
        close("src/" include)
    }
    # A .inc may be inlined inside a conditional: it is a piece of the body.
    if (depth > is_guarded() && file !~ /\.inc$/ && include !~ /\.inc$/) say(FNR ": own include inside a conditional")
    if (file ~ /\.cu$/ && !seen++ && of != "cuda") say("does not begin with what the room shares: checked with that parsed before")
}
/^[ \t]*#[ \t]*include[ \t]*</ && file ~ /\.h$/ && module in spine { # public; others are shared between modules
    include = $0
    sub(/^[^<]*</, "", include)
    sub(/>.*/, "", include)
    if (include != "stddef.h" && include != "stdint.h") say("public declarations need only stddef.h and stdint.h, not <" include ">")
}
/^[ \t]*#[ \t]*define[ \t]/ && file != "src/base/platform.h" { # which defines the feature-test macros of separate builds
    name = $0
    sub(/^[ \t]*#[ \t]*define[ \t]*/, "", name)
    sub(/[^A-Za-z0-9_].*/, "", name)
    if (name !~ /^(LLMPAR_|llmpar__)/) say("a macro that does not begin with LLMPAR_: " name)
}' build/layers/known build/layers/symbols build/layers/wanted $files >build/layers/violations
cat build/layers/violations
failures=$((failures + $(wc -l <build/layers/violations)))

if words=$(grep -nE 'TODO|FIXME' -r src tests examples bench tools docs --include='*.[ch]' --include='*.inc' --include='*.md' 2>/dev/null); then
    fail "left over: $words"
fi

# Macros that are still defined behind the implementation: only those of headers may be.
macros() { ${CC:-cc} "$@" -dM -E -x c build/gen/llmpar.h | awk '{ sub(/\(.*/, "", $2); print $2 }' | grep '^LLMPAR' | sort -u; }
{ macros; sed -n 's/^[ \t]*#[ \t]*define[ \t][ \t]*\([A-Za-z0-9_]*\).*/\1/p' $(find src -name '*.h') | sort -u; } | sort -u >build/layers/header_macros
macros -DLLMPAR_IMPLEMENTATION >build/layers/all_macros
names=$(comm -13 build/layers/header_macros build/layers/all_macros | grep -v '^LLMPAR_IMPLEMENTATION$')
[ -z "$names" ] || fail "macros left defined at the end of the implementation: $(echo $names)"

# Everything together without libm: what is missing then is libm's, or a private function that nobody defines.
echo 'int main(void) { return 0; }' >build/layers/nothing.c
${CC:-cc} build/layers/nothing.c $(find build/layers -mindepth 2 -name '*.o' ! -path '*/cuda/*' ! -path '*/nccl/*') -lpthread -o build/layers/nothing 2>build/layers/nothing.log ||
    fail "the modules do not link without libm: $(grep -o "undefined reference to .*" build/layers/nothing.log | sort | uniq -c)"

if [ "$failures" -gt 0 ]; then
    echo "$failures layer violations in $modules files"
    exit 1
fi
echo "$modules files in $(ls -d src/*/ | wc -l) rooms keep their layers"
