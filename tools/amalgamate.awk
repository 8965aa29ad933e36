# Concatenates a spine and the modules that it includes into one header, on stdout.
#
#   awk -v src=src [-v lines=1] -f tools/amalgamate.awk src/llmpar.spine.h > llmpar.h
#
# #include "room/module.h" and .c are replaced by the file's text the first time and dropped afterwards. .inc templates,
# which are included several times, stand once at the end of the header: it includes itself for each use. Templates included
# line after line go together, and one alone of at most 100 lines is copied to each use, the first time with the lines that are
# comments alone, because compilers read the whole header at every inclusion (60 ms each). Own includes are written from src/ and so contain a slash: "llmpar.h" passes through.
# <system.h> stays the first time that no condition stands around it, and always inside of one; the guards of headers go, and an
# empty line that has nothing left above or below it. lines=1 adds #line directives, so that compilers, gdb and coverage name the file under src/.

BEGIN {
    if (ARGC != 2 || src == "") die("usage: awk -v src=src -f tools/amalgamate.awk SPINE")
    print "/* GENERATED from " src "/: edit there, then run make gen */"
    print "#ifndef LLMPAR__TEMPLATE"
    inline_file(ARGV[1], 0)
    for (g = 1; g <= groups; g++) {
        print "#elif LLMPAR__TEMPLATE == " g
        print "#undef LLMPAR__TEMPLATE"
        count = split(group[g], names, " ")
        for (n = 1; n <= count; n++) inline_file(src "/" names[n], 1)
    }
    print "#endif /* LLMPAR__TEMPLATE */"
    exit failed
}

function inline_file(path, depth, again,    line, number, name, status, pending, conditions, guard, comment) {
    if (depth > 20) die(path ": includes itself")
    if (depth > 0) fence("/* ==== " path (again ? " again" : "") " ==== */")
    mark(path, 1)
    number = 0
    conditions = path ~ /\.h$/ && depth > 0 ? -1 : 0 # of a header that stands there once the guard is none
    while ((status = (getline line < path)) > 0) {
        number++
        guard = 0
        if (line ~ /^[ \t]*#[ \t]*if/ && ++conditions == 0) {
            guard = 1
            getline line < path # its #define
            number++
        }
        if (line ~ /^[ \t]*#[ \t]*endif/ && --conditions < 0) guard = 1
        if (again && line ~ /^[ \t]*\/\*/ && (line !~ /\*\// || line ~ /\*\/$/)) comment = 1
        if (comment) {
            if (line ~ /\*\//) comment = 0
            continue
        }
        if (guard || line ~ /^#include </ && depth > 0 && conditions <= 0 && seen[line]++) {
            mark(path, number + 1)
            continue
        }
        name = own_include(line, path ":" number)
        if (name ~ /\.inc$/) {
            pending = pending " " name
            continue
        }
        if (pending != "") {
            use_templates(pending)
            pending = ""
            mark(path, number)
        }
        if (name == "") {
            if (line == "" && !lines) blank = !empty
            else put(line)
            empty = line == ""
            continue
        }
        if (!(name in seen)) {
            seen[name] = 1
            where = path ":" number
            inline_file(src "/" name, depth + 1)
            if (depth > 0) fence("/* ---- " path " goes on ---- */")
        }
        mark(path, number + 1)
    }
    if (pending != "") use_templates(pending)
    if (status < 0) die((where == "" ? "" : where ": ") "cannot read " path)
    close(path)
}

# The name in a line that includes one of our files, else "".
function own_include(line, place,    name) {
    if (line !~ /^[ \t]*#[ \t]*include[ \t]+"[^"]*\//) return ""
    name = line
    sub(/^[^"]*"/, "", name)
    sub(/".*/, "", name)
    if (name !~ /\.(h|c|cu|inc)$/) die(place ": own includes end in .h, .c, .cu or .inc: " name)
    return name
}

# Defines which group of templates this file shows when it is included again.
function use_templates(names,    name) {
    name = substr(names, 2)
    if (name !~ / / && line_count(src "/" name) <= 100) {
        inline_file(src "/" name, 1, copied[name]++ && !lines) # #line counts every line
        return
    }
    if (!(names in seen)) {
        seen[names] = ++groups
        group[groups] = names
        put("#define LLMPAR__TEMPLATE " groups " /*" names " */")
    } else put("#define LLMPAR__TEMPLATE " seen[names])
    print "#include LLMPAR_HEADER"
    empty = 0
}

# A line, below an empty one if there was one before it.
function put(line) {
    if (blank) print ""
    print line
    blank = 0
}

function fence(name) {
    print name
    blank = 0
    empty = 1
}

function line_count(path,    line, count) {
    if (!(path in counted)) {
        while ((getline line < path) > 0) count++
        close(path)
        counted[path] = count
    }
    return counted[path]
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
