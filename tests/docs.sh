#!/bin/bash
# tests/docs.sh [FOLDER]: what README.md and docs/ say is so. FOLDER holds the example programs (default build). The last line is "N passed, N failed".
#
# Commands: in ```sh blocks, a line that begins with "$ " is a command, the lines below it are what it has to print (both streams). A line "..." stands for any lines, "..." inside a line for any
# text. A command has to succeed, or, where it ends in "# fails", to fail. Each page runs in a folder of its own that looks like the project's. Blocks without "$ " are not run.
# Links: files and headings that they lead to exist; every page has a picture and is named in README.md.
programs=$(cd "${1:-build}" 2>/dev/null && pwd)
[ -x "$programs/train_llama" ] || { echo "docs: ${1:-build}/train_llama is not there: run make first"; echo "0 passed, 1 failed"; exit 1; }
top=$(pwd)
work=$(mktemp -d "${TMPDIR:-/tmp}/docs.XXXXXX") || exit 1
trap 'rm -rf "$work"' EXIT
trap 'exit 1' INT TERM HUP
export LC_ALL=C
unset LLMPAR_CPU LLMPAR_TEST_DATA MAKEFLAGS MAKELEVEL
passed=0 failed=0
pass() { passed=$((passed + 1)); }
fail() { failed=$((failed + 1)); echo "FAILED $*"; }

# Does the output have the expected lines? Segments between "..." lines are looked for one after the other.
cat >"$work/match.awk" <<'EOF'
function pattern(line) { gsub(/[][\\.^$*+?(){}|]/, "[&]", line); gsub(/\[\\\]/, "\\\\", line); gsub(/\[\^\]/, "\\^", line); gsub(/\[[.]\]\[[.]\]\[[.]\]/, ".*", line); return "^" line "$" }
{ sub(/[ \t]+$/, "") }
FNR == NR { want[++wants] = $0; next }
{ got[++gots] = $0 }
END {
    at = 1; floating = 0; i = 1
    while (i <= wants) {
        if (want[i] == "...") { floating = 1; i++; continue }
        for (n = 0; i + n <= wants && want[i + n] != "..."; n++) ;
        anchored_end = i + n > wants
        best = 0; missing = want[i]
        for (found = 0; at + n - 1 <= gots; at++) {
            for (k = 0; k < n && got[at + k] ~ pattern(want[i + k]); k++) ;
            if (k == n && (!anchored_end || at + n - 1 == gots)) { found = 1; break }
            if (k > best) { best = k; missing = want[i + k] }
            if (!floating) break
        }
        if (!found) { print "expected: " missing; exit 1 }
        at += n; i += n; floating = 0
    }
    if (wants && !floating && at <= gots) { print "not expected: " got[at]; exit 1 }
}
EOF

# command PAGE LINE COMMAND: in the page's folder; $work/want has the expected lines
command_of()
{
    local page=$1 line=$2 command=$3 code expect=0
    case $command in *'# fails') expect=1 ;; esac
    (cd "$work/$page" && timeout 600 bash -o pipefail -c "$command") >"$work/got" 2>&1 </dev/null
    code=$?
    if { [ $expect -eq 0 ] && [ $code -ne 0 ]; } || { [ $expect -eq 1 ] && { [ $code -eq 0 ] || [ $code -ge 124 ]; }; }; then
        fail "$page.md:$line: exit code $code: $command"
        tail -n 8 "$work/got" | sed 's/^/    /'
    elif ! awk -f "$work/match.awk" "$work/want" "$work/got" >"$work/why"; then
        fail "$page.md:$line: $command"
        sed 's/^/    /' "$work/why"
        echo "    got:"
        head -n 12 "$work/got" | sed 's/^/    /'
    else pass; fi
}

for file in README.md docs/*.md; do
    page=$(basename "$file" .md)
    grep -q '^```sh$' "$file" && awk '/^```sh$/ { on = 1; next } /^```/ { on = 0 } on && /^\$ / { found = 1 } END { exit !found }' "$file" || continue
    start=$(date +%s) before=$passed
    mkdir "$work/$page"
    for item in README.md LICENSE llmpar.h llmpar_cuda.h llmpar_nccl.h docs examples tools src; do [ -e "$item" ] && ln -s "$top/$item" "$work/$page/$item"; done
    ln -s "$programs" "$work/$page/build"
    # One record a command: its line number, the command, its expected lines
    line=0 on= command=
    while IFS= read -r text || [ -n "$text" ]; do
        line=$((line + 1))
        case $on$text in
        '```sh') on=1 ;;
        1'```')
            [ -n "$command" ] && command_of "$page" "$at" "$command"
            on= command=
            ;;
        1'$ '*)
            [ -n "$command" ] && command_of "$page" "$at" "$command"
            command=${text#??} at=$line
            : >"$work/want"
            ;;
        1*) [ -n "$command" ] && printf '%s\n' "$text" >>"$work/want" ;;
        esac
    done <"$file"
    echo "$file: $((passed - before)) commands ok, $(($(date +%s) - start)) s"
done

# ---- links and pictures ----
slugs() { sed -n 's/^##* *//p' "$1" | tr 'A-Z' 'a-z' | sed 's/[^a-z0-9 _-]//g; s/ /-/g'; }
before=$passed
for file in README.md CHANGELOG.md docs/*.md bench/*.md; do
    folder=$(dirname "$file")
    for link in $(awk '/^```/ { on = !on } !on' "$file" | grep -o '](\([^) ]*\))' | sed 's/^](//; s/)$//'); do
        case $link in http://* | https://*) continue ;; esac
        path=${link%%#*} anchor=
        case $link in *'#'*) anchor=${link#*#} ;; esac
        target=$folder/$path
        [ -n "$path" ] || target=$file
        if [ ! -e "$target" ]; then fail "$file: link to $link: no such file"
        elif [ -n "$anchor" ] && ! slugs "$target" | grep -qx -- "$anchor"; then fail "$file: link to $link: no such heading"
        else pass; fi
    done
done
for file in docs/*.md; do
    if grep -qF "]($file)" README.md; then pass; else fail "README.md does not name $file"; fi
    [ "$file" = docs/architecture.md ] && continue # its pictures are of text
    if grep -q '^!\[.*](.*\.svg)$' "$file"; then pass; else fail "$file has no picture"; fi
done
for file in docs/*.svg bench/*.svg; do
    # well-formed: as many elements opened as closed, and one svg around all
    if head -c 4 "$file" | grep -q '<svg' && [ "$(tail -n 1 "$file")" = '</svg>' ] && awk '{ text = text $0 "\n" } END { open = gsub(/<[a-zA-Z]/, "&", text); close_ = gsub(/<\//, "&", text); self = gsub(/\/>/, "&", text); exit open != close_ + self }' "$file"; then pass; else fail "$file is not well-formed"; fi
    if grep -qF "$(basename "$file")" docs/*.md bench/*.md README.md; then pass; else fail "$file is in no page"; fi
done
echo "links and pictures: $((passed - before)) ok"

echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
