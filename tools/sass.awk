# What the main loop of each kernel on the matrix units issues, from machine code: cuobjdump -sass OBJECT | awk -f tools/sass.awk [-v allowed=tools/sass_allowed.txt] [-v name=REGEX]
# The main loop is the shortest one with the most matrix instructions (HMMA): from where a branch back lands to that branch. Both sides of a choice inside it count. Instructions of a kind for each HMMA:
#   all    every one: a scheduler issues one a cycle     ldsm  matrices read from shared memory     lds, sts  other reads and writes of it     ldg, stg  of global memory (ldgsts: from there to shared memory)
#   mufu   2^x and the like                              fp    additions, products, maxima          int       numbers and addresses            bar, local
# With `allowed` (a line: REGEX, the most of `all`, the most of `ldsm`) a kernel that has more fails, one with local memory in the loop too, and so does a line that no kernel matches.
function close_kernel(  i, from, to, begin, most, best, n, op, kind, count, line)
{
    if (!kernel) return
    for (i = 1; i <= branches; i++) {
        from = place[target[i]]; to = source[i]
        if (!from || from > to) continue
        n = hmma[to] - hmma[from - 1]
        if (n > most || (n == most && n && to - from < best - begin)) { most = n; begin = from; best = to }
    }
    if (most) {
        for (i = begin; i <= best; i++) {
            op = code[i]
            sub(/\..*/, "", op)
            kind = op ~ /^(LDL|STL)$/ ? "local" : op == "HMMA" ? "hmma" : op == "LDSM" ? "ldsm" : op == "LDS" ? "lds" : op == "STS" ? "sts" : op == "LDG" ? "ldg" : op == "STG" ? "stg" : op == "LDGSTS" ? "ldgsts" : op == "MUFU" ? "mufu" : \
                   op ~ /^(FADD|FMUL|FFMA|FMNMX|FSEL|FSETP|F2FP|F2F|FSET|FCHK)$/ ? "fp" : op ~ /^(BAR|WARPSYNC|LDGDEPBAR|DEPBAR)$/ ? "bar" : op ~ /^(IMAD|IADD3|ISETP|LOP3|SHF|LEA|SEL|MOV|PRMT|VIADD|IABS|IMNMX|VIMNMX|UIADD3|UIMAD|ULEA|UMOV|USEL|UISETP|ULOP3|USHF|R2UR|S2R|S2UR|CS2R|ULDC|LDC|PLOP3|P2R|R2P|SGXT|UPRMT|I2F|I2FP|F2I)$/ ? "int" : "other"
            count[kind]++
        }
        n = best - begin + 1
        line = sprintf("%-52s hmma %4d all %5.2f ldsm %.2f lds %.2f sts %.2f ldg %.2f stg %.2f ldgsts %.2f mufu %.2f fp %.2f int %.2f bar %.2f other %.2f local %d", substr(kernel, 1, 52), most, n / most, count["ldsm"] / most, count["lds"] / most, \
            count["sts"] / most, count["ldg"] / most, count["stg"] / most, count["ldgsts"] / most, count["mufu"] / most, count["fp"] / most, count["int"] / most, count["bar"] / most, count["other"] / most, count["local"])
        if (!allowed) print line
        for (i = 1; i <= rules; i++)
            if (kernel ~ rule[i]) {
                used[i]++
                if (n / most > limit[i] + 0.005 || count["ldsm"] / most > matrices[i] + 0.005 || count["local"]) { printf "FAILED %s on %s: allowed are all %s, ldsm %s, local 0\n  %s\n", kernel, arch, limit[i], matrices[i], line; failed++ }
                break
            }
    }
    delete place; delete code; delete hmma; delete target; delete source
    kernel = ""
}
BEGIN {
    if (allowed)
        while ((getline line < allowed) > 0)
            if (line !~ /^#/ && split(line, word, " ") >= 3) { rule[++rules] = word[1]; limit[rules] = word[2]; matrices[rules] = word[3] }
}
/^[ \t]*code for / { close_kernel(); arch = $3; next }
/^[ \t]*Function : / { close_kernel(); if (!name || $3 ~ name) kernel = $3; lines = branches = 0; hmma[0] = 0; next }
!kernel || !match($0, /\/\*[0-9a-f]+\*\/ +[@A-Z]/) { next }
{
    address = substr($0, RSTART + 2); sub(/\*.*/, "", address); sub(/^0+/, "", address)
    text = substr($0, RSTART + RLENGTH - 1); sub(/ *;.*/, "", text); sub(/^@!?U?P[0-9T]+ +/, "", text)
    split(text, word, " ")
    code[++lines] = word[1]; place[address] = lines
    hmma[lines] = hmma[lines - 1] + (word[1] ~ /^HMMA/)
    if (word[1] ~ /^BRA/ && match(text, /0x[0-9a-f]+/)) { to = substr(text, RSTART + 2, RLENGTH - 2); sub(/^0+/, "", to); target[++branches] = to; source[branches] = lines }
}
END {
    close_kernel()
    for (i = 1; i <= rules; i++) if (!used[i]) { printf "FAILED %s of %s: no kernel with such a name has a loop on the matrix units\n", rule[i], allowed; failed++ }
    exit failed > 0
}
