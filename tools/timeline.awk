# Draws schedules as timelines, in SVG: one panel a file, the output of `train_llama --print-schedule`.
#
#     awk -f tools/timeline.awk -v title='no prefetch|prefetch 1' schedule0.txt schedule1.txt > docs/fsdp.svg
#
# An instruction begins when its stream is free and what it waits for ("after 26,24") is done. Times are nominal: GATHER and REDUCE 2, FORWARD 3, BACKWARD 6, embed and head half of that,
# OPTIM and NORM 0.5, SCALAR_REDUCE 1, FREE 0. Below the streams: how many units are gathered (whole) on a rank.
function escape(s) { gsub(/&/, "\\&amp;", s); gsub(/</, "\\&lt;", s); return s }
function rect(x, y, w, h, style) { printf "<rect x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\" %s/>\n", x, y, w, h, style }
function text(x, y, style, s) { printf "<text x=\"%.1f\" y=\"%.1f\" %s>%s</text>\n", x, y, style, escape(s) }
FNR == 1 { panel++; free["compute"] = free["gather"] = free["reduce"] = 0; delete end }
/^ *[0-9]+  [a-z]/ {
    index_ = $1; stream = $2; op = $3; unit = $4
    edge = unit == "embed" || unit == "head"
    time = op == "FREE" ? 0 : op == "FORWARD" ? 3 : op == "BACKWARD" ? 6 : op == "NORM" || op == "OPTIM" ? 0.5 : op == "SCALAR_REDUCE" ? 1 : 2
    if (edge && time > 1) time /= 2
    start = free[stream]
    if (match($0, /after [0-9,]+/)) {
        n = split(substr($0, RSTART + 6, RLENGTH - 6), wait, ",")
        for (i = 1; i <= n; i++) if (end[wait[i]] > start) start = end[wait[i]]
    }
    free[stream] = end[index_] = start + time
    if (end[index_] > longest) longest = end[index_]
    if (op == "GATHER" || op == "FREE" && stream == "compute") { # in time order already: one thread issues everything
        change[panel, ++changes[panel]] = (op == "GATHER" ? 1 : -1)
        when[panel, changes[panel]] = op == "GATHER" ? start : end[index_]
    }
    if (op == "FREE") next
    if (end[index_] > length_of[panel]) length_of[panel] = end[index_]
    label = unit
    sub(/^layers\./, "", label)
    if (op == "SCALAR_REDUCE") label = ""
    if (label == "embed") label = "e"
    if (label == "head") label = "h"
    box[panel, ++boxes[panel]] = stream " " op " " start " " time " " (label == "" ? "-" : label)
}
END {
    left = 96; width = 1000; top = 80; row = 30; gap = 8; height = 232
    scale = (width - left - 24) / longest
    colour["GATHER"] = "#3b78b5"; colour["FORWARD"] = "#3f8f5b"; colour["BACKWARD"] = "#c8772d"; colour["REDUCE"] = "#8a5aa8"; colour["NORM"] = "#7d8590"; colour["SCALAR_REDUCE"] = "#7d8590"; colour["OPTIM"] = "#4a5058"
    order["compute"] = 1; order["gather"] = 0; order["reduce"] = 2
    names = split(title, name, "|")
    printf "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %d\" font-family=\"DejaVu Sans, Helvetica, Arial, sans-serif\" font-size=\"13\" fill=\"#1f2328\">\n", width, top + panel * height
    rect(0, 0, width, top + panel * height, "fill=\"#ffffff\"")
    x = left
    k = split("GATHER FORWARD BACKWARD REDUCE OPTIM NORM", shown, " ")
    for (i = 1; i <= k; i++) {
        rect(x, 20, 16, 16, "rx=\"2\" fill=\"" colour[shown[i]] "\"")
        text(x + 22, 33, "", shown[i] == "NORM" ? "NORM, SCALAR_REDUCE" : shown[i])
        x += 40 + 9 * length(shown[i])
    }
    text(left, 58, "fill=\"#57606a\"", "e: embed, 0 to 3: layers, h: head; width: nominal time")
    for (p = 1; p <= panel; p++) {
        y = top + (p - 1) * height
        text(left, y + 14, "font-weight=\"bold\" font-size=\"15\"", name[p])
        text(width - 24, y + 14, "text-anchor=\"end\" fill=\"#57606a\"", sprintf("length %g", length_of[p]))
        y += 26
        for (s in order) {
            text(left - 12, y + order[s] * (row + gap) + 20, "text-anchor=\"end\"", s)
            rect(left, y + order[s] * (row + gap), longest * scale, row, "fill=\"#f3f4f6\"")
        }
        for (i = 1; i <= boxes[p]; i++) {
            split(box[p, i], part, " ")
            x = left + part[3] * scale; w = part[4] * scale; yy = y + order[part[1]] * (row + gap)
            rect(x + 0.5, yy, w - 1, row, "rx=\"2\" fill=\"" colour[part[2]] "\"")
            if (part[5] != "-" && w >= 11) text(x + w / 2, yy + 20, "text-anchor=\"middle\" fill=\"#ffffff\"", part[5])
        }
        # the staircase of gathered units: changes sorted by time, a stable insertion
        for (i = 2; i <= changes[p]; i++) for (j = i; j > 1 && when[p, j] < when[p, j - 1]; j--) {
            t = when[p, j]; when[p, j] = when[p, j - 1]; when[p, j - 1] = t
            t = change[p, j]; change[p, j] = change[p, j - 1]; change[p, j - 1] = t
        }
        base = y + 3 * (row + gap) + 52; unit_height = 16; live = 0; most = 0
        path = sprintf("M%.1f %.1f", left, base)
        for (i = 1; i <= changes[p]; i++) {
            x = left + when[p, i] * scale
            path = path sprintf(" L%.1f %.1f", x, base - live * unit_height)
            live += change[p, i]
            if (live > most) most = live
            path = path sprintf(" L%.1f %.1f", x, base - live * unit_height)
        }
        printf "<path d=\"%s Z\" fill=\"#b6d0ea\" stroke=\"#3b78b5\"/>\n", path
        printf "<path d=\"M%.1f %.1f H%.1f\" stroke=\"#57606a\"/>\n", left, base, left + longest * scale
        text(left - 12, base - 18, "text-anchor=\"end\"", "gathered")
        text(left - 12, base - 2, "text-anchor=\"end\" fill=\"#57606a\"", "at most " most)
    }
    print "</svg>"
}
