# Draws how much faster llmpar is than what it was compared with, in SVG: a bar a row of the results of bench/peers, f32 above bf16.
#
#     awk -f bench/speed.awk bench/results/DATE-MACHINE-peers*.json > bench/speed.svg
#
# A row is "MODEL DTYPE ..: step of PEER, of OURS" (or "tokens of", "prompt of"), its ratio the peer's time over ours.
function escape(s) { gsub(/&/, "\\&amp;", s); gsub(/</, "\\&lt;", s); return s }
function rect(x, y, w, h, style) { printf "<rect x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\" %s/>\n", x, y, w, h, style }
function text(x, y, style, s) { printf "<text x=\"%.1f\" y=\"%.1f\" %s>%s</text>\n", x, y, style, escape(s) }
/"processor": / { split($0, part, "\""); processor = part[4] }
/"name": "[^"]*: (step|tokens|prompt) of [^"]*, of / && !/memory of/ {
    split($0, part, "\"")
    split(part[4], name, / |: /)
    what = part[4]
    sub(/^.*: /, "", what)
    peer = what
    sub(/^[a-z]+ of /, "", peer)
    sub(/, of .*$/, "", peer)
    ours = what
    sub(/^.*, of /, "", ours)
    kind = what
    sub(/ of .*$/, "", kind)
    key = kind " " peer " " ours
    if (!(key in place)) { place[key] = ++rows; label[rows] = (kind == "step" ? "a step of training" : kind == "prompt" ? "reading a prompt" : "generating") ": " peer; beside[rows] = ours }
    match($0, /"ratio": [0-9.]+/)
    value = substr($0, RSTART + 9, RLENGTH - 9) + 0
    ratio[place[key], name[2]] = value
    if (value > largest) largest = value
    model = name[1]
}
END {
    dtypes = split("f32 bf16", dtype, " ")
    colour["f32"] = "#3b78b5"; colour["bf16"] = "#c8772d"
    left = 24; width = 1000; top = 62; row = 66; height = top + rows * row + 10
    if (largest < 1.2) largest = 1.2
    scale = (width - left - 90) / largest
    printf "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %d\" font-family=\"DejaVu Sans, Helvetica, Arial, sans-serif\" font-size=\"13\" fill=\"#1f2328\">\n", width, height
    rect(0, 0, width, height, "fill=\"#ffffff\"")
    for (d = 1; d <= dtypes; d++) {
        rect(left + (d - 1) * 80, 16, 16, 16, "rx=\"2\" fill=\"" colour[dtype[d]] "\"")
        text(left + (d - 1) * 80 + 22, 29, "", dtype[d])
    }
    text(width - 24, 29, "text-anchor=\"end\" fill=\"#57606a\"", "times as fast, " model ", two cores of a " processor "; the line: as fast")
    for (r = 1; r <= rows; r++) {
        y = top + (r - 1) * row
        text(left, y + 12, "font-weight=\"bold\"", label[r])
        text(width - 24, y + 12, "text-anchor=\"end\" fill=\"#57606a\"", beside[r])
        for (d = 1; d <= dtypes; d++) {
            if (!((r, dtype[d]) in ratio)) continue
            value = ratio[r, dtype[d]]
            rect(left, y + 20 + (d - 1) * 18, value * scale, 16, "fill=\"" colour[dtype[d]] "\"")
            text(left + value * scale + 8, y + 33 + (d - 1) * 18, "", sprintf("%.2f", value))
        }
    }
    printf "<line x1=\"%.1f\" y1=\"%d\" x2=\"%.1f\" y2=\"%d\" stroke=\"#1f2328\" stroke-dasharray=\"4 3\"/>\n", left + scale, top - 14, left + scale, height - 8
    print "</svg>"
}
