#!/bin/sh
# Does every module keep its layer? make check-layers has compiled each alone (build/layers); this looks at the text and the objects:
#   includes        only the own layer or a lower one, never inside a conditional; public headers take stddef and stdint alone
#   macros          LLMPAR_ names; those of .c and .inc files are undefined in the end
#   globals         no module has a mutable one
#   outside world   stdio and the environment only in run/, exit and abort nowhere, nothing of libm
#   spine           every module is on the list of one
failures=0
modules=0

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

for file in $(find src -mindepth 2 -name '*.h' -o -mindepth 2 -name '*.c' -o -mindepth 2 -name '*.cu' -o -mindepth 2 -name '*.inc' | sort); do
    modules=$((modules + 1))
    room=${file#src/}
    module=$room
    room=${room%%/*}
    allowed=$(below "$room") || { fail "$file: src/$room is not a room of docs/architecture.md"; continue; }

    for include in $(sed -n 's/^[ \t]*#[ \t]*include[ \t]*"\([^"]*\)".*/\1/p' "$file"); do
        case " $allowed $room " in
        *" ${include%%/*} "*) ;;
        *) fail "$file: includes \"$include\", which is not below src/$room (allowed: $room $allowed)" ;;
        esac
        [ -f "src/$include" ] || [ "$include" = llmpar.h ] || fail "$file: includes \"$include\", which does not exist"
    done

    guard=0
    case $file in *.h) guard=1 ;; esac
    awk -v guard=$guard -v file="$file" '
        /^[ \t]*#[ \t]*if/ { depth++ }
        /^[ \t]*#[ \t]*endif/ { depth-- }
        /^[ \t]*#[ \t]*include[ \t]*"/ && depth > guard && file !~ /\.inc$/ {
            # A .inc may be inlined inside a conditional: it is a piece of the body.
            if ($0 !~ /\.inc"/) { print file ":" NR ": own include inside a conditional"; bad = 1 }
        }
        END { exit bad }' "$file" || failures=$((failures + 1))

    case $file in
    *.h)
        grep -q "^#include \"$module\"" src/*.spine.h || continue # shared between modules, not public
        for include in $(sed -n 's/^[ \t]*#[ \t]*include[ \t]*<\([^>]*\)>.*/\1/p' "$file"); do
            case $include in
            stddef.h | stdint.h) ;;
            *) fail "$file: public declarations need only stddef.h and stdint.h, not <$include>" ;;
            esac
        done
        ;;
    esac

    case $file in
    src/base/platform.h) ;; # defines the feature-test macros of separate builds
    *)
        names=$(sed -n 's/^[ \t]*#[ \t]*define[ \t][ \t]*\([A-Za-z0-9_]*\).*/\1/p' "$file" | grep -v '^LLMPAR_\|^llmpar__')
        [ -z "$names" ] || fail "$file: macros that do not begin with LLMPAR_: $(echo $names)"
        ;;
    esac

    case $file in
    *.c | *.cu)
        grep -q "^#include \"$module\"" src/*.spine.h || fail "$file: no spine lists it"
        object=build/layers/${module%.c*}.o
        [ -f "$object" ] || { fail "$file: does not compile alone"; continue; }
        globals=$(objdump -t "$object" | awk '($3 == "O" || $2 == "O") && $0 ~ /[ \t](\.data|\.bss|\.tdata|\.tbss|\*COM\*)/ && $0 !~ /\.data\.rel\.ro/ { print $NF }' | grep -v 'emulated_cublaslt')
        [ -z "$globals" ] || fail "$file: mutable globals: $(echo $globals)"
        for symbol in $(nm -u "$object" | awk '{ print $2 }'); do
            case $symbol in
            exit | _exit | abort | __assert_fail | quick_exit | atexit) fail "$file: calls $symbol: the library returns a status" ;;
            printf | fprintf | vprintf | vfprintf | puts | putchar | putc | fputs | fputc | fopen* | fdopen | fclose | fread | fwrite | fflush | fgets | fscanf | stdout | stderr | stdin | perror | getenv | setenv)
                [ "$room" = run ] || fail "$file: uses $symbol: only src/run touches stdio and the environment"
                ;;
            esac
        done
        ;;
    esac
done

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
