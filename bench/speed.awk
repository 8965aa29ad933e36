# Draws how many times as fast llmpar is as what one would take instead, in SVG: f32 above bf16, from the results of bench/peers.
#
#     awk -f bench/speed.awk bench/results/DATE-MACHINE-peers*.json bench/results/DATE-MACHINE-replies.json > bench/speed.svg
#
# Rows are those of run.py, "MODEL DTYPE ..: step of PEER, of OURS", and whole replies and their tokens of generate.py, "MODEL DTYPE ..: MEASURE, beside PEER", on two threads; a ratio is the peer's time over ours.
function escape(s) { gsub(/&/, "\\&amp;", s); gsub(/</, "\\&lt;", s); return s }
function rect(x, y, w, h, style) { printf "<rect x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\" %s/>\n", x, y, w, h, style }
function text(x, y, style, s) { printf "<text x=\"%.1f\" y=\"%.1f\" %s>%s</text>\n", x, y, style, escape(s) }
function take(what, peer, ours,    key, value) {
    sub(/^PyTorch compile$/, "torch.compile", peer)
    sub(/^PyTorch fsdp$/, "PyTorch FSDP2", peer)
    sub(/^PyTorch tp$/, "PyTorch tensor parallel", peer)
    key = what " beside " peer
    if (!(key in place)) { place[key] = ++rows; label[rows] = key; beside[rows] = ours }
    match($0, /"ratio": [0-9.]+/)
    value = substr($0, RSTART + 9, RLENGTH - 9) + 0
    ratio[place[key], name[2]] = value
    if (value > largest) largest = value
    model = name[1]
}
/"processor": / { split($0, part, "\""); processor = part[4] }
/"name": / { split($0, part, "\""); split(part[4], name, " ") }
/"name": "[^"]*: step of / {
    ours = peer = part[4]
    sub(/^.*: step of /, "", peer)
    sub(/, of .*$/, "", peer)
    sub(/^.*, of llmpar /, "", ours)
    take("a step of training", peer, ours == "dp2" ? "FSDP, 2 ranks" : ours == "tp2" ? "tensor parallel, 2 ranks" : "2 threads")
}
/"name": "[^"]*2 threads: (tokens|reply), beside / {
    what = part[4] ~ /: reply,/ ? "a reply, prompt and all," : "tokens behind a prompt"
    peer = part[4]
    sub(/^.*, beside /, "", peer)
    sub(/ \(.*$/, "", peer)
    sub(/, cache bf16$|, cache f32$/, ", cache as the weights", peer)
    take(what, peer, "2 threads")
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
    text(width - 24, 29, "text-anchor=\"end\" fill=\"#57606a\"", "times as fast (the line: as fast), " model ", two cores, " processor)
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
