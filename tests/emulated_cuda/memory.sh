#!/bin/bash
# How the CUDA device's kernels use memory: tests/emulated_cuda/memory.sh COUNTS PROGRAM [--places], where PROGRAM is the one that wrote COUNTS (memory.cc); `make check-cuda-memory` builds memory_kernels, which ends here. For each kernel
#   global   sectors of 32 bytes that its warps touched / the fewest that those bytes fill; and bytes of a lane's access
#   shared   turns that the banks took / the fewest
# A kernel fails that has more than memory_allowed.txt says (1 where it says nothing), and one that did not run. The places in the code that lose something are printed of kernels that fail; --places: of all.
counts=$1 program=$2
{
    sed 's/^/allowed /; /^allowed *\(#\|$\)/d' tests/emulated_cuda/memory_allowed.txt
    grep -h '__global__' src/cuda/*.cu src/cuda/*.h | grep -o 'llmpar__cuda_[a-z0-9_]*(' | sort -u | sed 's/^llmpar__cuda_/kernel /; s/($//'
    cut -d' ' -f1,2 "$counts" | tr ' ' '\n' | sort -u | addr2line -a -f -C -i -e "$program"
    sed 's/^/count /' "$counts"
} | awk -v all="$3" '
    function place(where) { sub(/ \(discriminator.*/, "", where); sub(/.*\//, "", where); return where }
    function figure(kernel, space) { return fewest[kernel, space] ? sprintf("%.2f", spent[kernel, space] / fewest[kernel, space]) : "-" }
    function most(base, space) { return (base, space) in allowed ? allowed[base, space] : 1 }
    function too_many(kernel, base, space) { return spent[kernel, space] > most(base, space) * fewest[kernel, space] + 0.005 * fewest[kernel, space] }
    $1 == "allowed" { excepted[$2] = $3 == "none"; if ($3 != "none") { allowed[$2, "global"] = $3; allowed[$2, "shared"] = $4 } next }
    $1 == "kernel" { source[$2] = 1; next }
    $1 == "count" {
        spent[$2, $4] += $9; fewest[$2, $4] += $10; lanes[$2, $4] += $7; bytes[$2, $4] += $8; seen[$2] = 1
        if ($9 > $10) lost[$2] = lost[$2] sprintf("    %-6s %-8s %5.2f, %6d lost, %4.1f bytes a lane: %s%s\n", $4, $5, $9 / $10, $9 - $10, $8 / $7, outer[$3], inner[$3] == outer[$3] ? "" : " (" inner[$3] ")")
        next
    }
    /^0x/ { address = $1; sub(/^0x0*/, "0x", address); inner[address] = ""; next }
    { # a function, and where in it: the inmost first, then what that is a part of
        if (inner[address] == "") { name[address] = $0; sub(/^void /, "", name[address]); sub(/\(.*/, "", name[address]); gsub(/llmpar__cuda_/, "", name[address]) }
        getline
        outer[address] = place($0)
        if (inner[address] == "") inner[address] = outer[address]
    }
    END {
        printf "%-32s %7s %14s %7s\n", "kernel", "global", "bytes a lane", "shared"
        for (kernel in seen) {
            base = name[kernel]
            sub(/<.*/, "", base)
            ran[base] = 1
            bad = too_many(kernel, base, "global") || too_many(kernel, base, "shared")
            text = sprintf("%-32s %7s %14s %7s", name[kernel], figure(kernel, "global"), lanes[kernel, "global"] ? sprintf("%.1f", bytes[kernel, "global"] / lanes[kernel, "global"]) : "-", figure(kernel, "shared"))
            if (bad) { failed++; text = text sprintf("  FAILED: more than %s and %s", most(base, "global"), most(base, "shared")) } else passed++
            if (lost[kernel] && (bad || all == "--places")) places = places name[kernel] ":\n" lost[kernel]
            print text | "sort"
        }
        close("sort")
        for (base in source) if (!(base in ran) && !excepted[base]) { failed++; print "FAILED: no kernel " base " ran: memory_kernels.c has every one that memory_allowed.txt does not except" }
        for (base in excepted) if (!(base in source)) { failed++; print "FAILED: memory_allowed.txt has a kernel " base ", which src/cuda has not" }
        printf "%s%d passed, %d failed\n", places, passed, failed
        exit failed > 0
    }'
