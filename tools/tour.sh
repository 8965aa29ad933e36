#!/bin/sh
# The tour in docs/architecture.md names every file under src/ once, with its line count. `tour.sh` writes the counts;
# `tour.sh check` fails where a count is stale, a file is missing from the tour, or the tour names a file that is not there.
cd "$(dirname "$0")/.." || exit 1
doc=docs/architecture.md
mkdir -p build
awk '
    match($0, /^\| `src\/[^`]*` \| *[0-9]* \|/) {
        split($0, part, "`")
        file = part[2]; count = 0
        while ((getline line < file) > 0) count++
        close(file)
        seen[file] = 1
        sub(/` \| *[0-9]* \|/, "` | " count " |")
    }
    { print }' $doc > build/tour.md || exit 1
missing=$(find src -type f | sort | while read -r f; do grep -q "^| \`$f\` |" $doc || echo "$f"; done)
gone=$(sed -n 's/^| `\(src\/[^`]*\)` |.*/\1/p' $doc | while read -r f; do [ -f "$f" ] || echo "$f"; done)
if [ -n "$missing$gone" ]; then
    echo "$doc: not in the tour: ${missing:-none}; not in src/: ${gone:-none}"
    exit 1
fi
if [ "$1" = check ]; then
    cmp -s build/tour.md $doc || { echo "$doc: line counts are stale: run \`make gen\` and commit it"; exit 1; }
    echo "the tour names every file with its line count"
else
    cp build/tour.md $doc
fi
