# Concatenates a spine and the modules that it includes into one header, on stdout.
#
#   awk -v src=src [-v lines=1] -f tools/amalgamate.awk src/llmpar.spine.h > llmpar.h
#
# #include "room/module.h" and .c are replaced by the file's text the first time and dropped afterwards; .inc templates are
# inlined at every include. Own includes are written from src/ and so contain a slash: <system.h> and "llmpar.h" pass
# through. lines=1 adds #line directives, so that compilers, gdb and coverage name the file under src/.

BEGIN {
    if (ARGC != 2 || src == "") die("usage: awk -v src=src -f tools/amalgamate.awk SPINE")
    print "/* GENERATED from " src "/: edit there, then run make gen */"
    inline_file(ARGV[1], 0)
    exit failed
}

function inline_file(path, depth,    line, number, name, status) {
    if (depth > 20) die(path ": includes itself")
    if (depth > 0) print "/* ==== " path " ==== */"
    mark(path, 1)
    number = 0
    while ((status = (getline line < path)) > 0) {
        number++
        if (line !~ /^[ \t]*#[ \t]*include[ \t]+"[^"]*\//) {
            print line
            continue
        }
        name = line
        sub(/^[^"]*"/, "", name)
        sub(/".*/, "", name)
        if (name !~ /\.(h|c|inc)$/) die(path ":" number ": own includes end in .h, .c or .inc: " name)
        if (name ~ /\.inc$/ || !(name in seen)) {
            seen[name] = 1
            where = path ":" number
            inline_file(src "/" name, depth + 1)
            if (depth > 0) print "/* ---- " path " goes on ---- */"
        }
        mark(path, number + 1)
    }
    if (status < 0) die((where == "" ? "" : where ": ") "cannot read " path)
    close(path)
}

# Only ever printed on a line of its own; a dropped include costs nothing in the committed header.
function mark(path, number) {
    if (lines) print "#line " number " \"" path "\""
}

function die(text) {
    print "amalgamate: " text > "/dev/stderr"
    failed = 1
    exit 1
}
