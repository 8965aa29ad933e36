# Draws what a step holds, in SVG: one bar a file, the output of `train_llama --print-memory`; the peak of each tag, of the rank that has most.
#
#     awk -f tools/memory.awk -v title='--zero 0|--zero 3' zero0.txt zero3.txt > memory.svg
#
# Left out are the products' workspace, whose size depends on the machine's kernels, and communication, two kilobytes.
function escape(s) { gsub(/&/, "\\&amp;", s); gsub(/</, "\\&lt;", s); return s }
function rect(x, y, w, h, style) { printf "<rect x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\" %s/>\n", x, y, w, h, style }
function text(x, y, style, s) { printf "<text x=\"%.1f\" y=\"%.1f\" %s>%s</text>\n", x, y, style, escape(s) }
FNR == 1 { bars++ }
/^(parameters|gathered|gradients|optimizer|activations) / {
    n = split(substr($0, 67), cell, " ") # the last column: a number, or the smallest .. the largest rank
    peak[bars, $1] = cell[n]
    sum[bars] += cell[n]
    if (sum[bars] > largest) largest = sum[bars]
}
END {
    tags = split("parameters gathered gradients optimizer activations", tag, " ")
    colour["parameters"] = "#3b78b5"; colour["gathered"] = "#7fa9d6"; colour["gradients"] = "#c8772d"; colour["optimizer"] = "#8a5aa8"; colour["activations"] = "#3f8f5b"
    left = 24; width = 1000; top = 66; row = 62
    scale = (width - left - 110) / largest
    names = split(title, name, "|")
    printf "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %d\" font-family=\"DejaVu Sans, Helvetica, Arial, sans-serif\" font-size=\"13\" fill=\"#1f2328\">\n", width, top + bars * row + 8
    rect(0, 0, width, top + bars * row + 8, "fill=\"#ffffff\"")
    x = left
    for (i = 1; i <= tags; i++) {
        rect(x, 20, 16, 16, "rx=\"2\" fill=\"" colour[tag[i]] "\"")
        text(x + 22, 33, "", tag[i])
        x += 50 + 8 * length(tag[i])
    }
    text(width - 24, 33, "text-anchor=\"end\" fill=\"#57606a\"", "peak of each tag, KiB")
    for (b = 1; b <= bars; b++) {
        y = top + (b - 1) * row
        text(left, y + 14, "font-weight=\"bold\"", name[b])
        x = left
        for (i = 1; i <= tags; i++) {
            w = peak[b, tag[i]] * scale
            if (!w) continue
            rect(x, y + 22, w, 28, "fill=\"" colour[tag[i]] "\" stroke=\"#ffffff\"")
            if (w >= 40) text(x + w / 2, y + 41, "text-anchor=\"middle\" fill=\"#ffffff\"", sprintf("%d", peak[b, tag[i]] / 1024))
            x += w
        }
        text(x + 8, y + 41, "fill=\"#57606a\"", sprintf("%d", sum[b] / 1024))
    }
    print "</svg>"
}
