/* gemm_x86: the chains of a register tile, as instructions. gemm_kernel.c makes the functions of each vector width of it. The whole loop over k is one asm statement, because
   what compilers make of 24 accumulators differs (gcc 12 -O2 kept them in memory, gcc -O3 copied them about, clang spilled them), and speed must not.
   A tile has 3 vectors of columns: of all shapes that fit the registers this one takes the fewest instructions and the fewest loads a product.
     LLMPAR__GEMM_FUNCTION(name, isa, low, high, place, vectors, beside)   low(X, i), high(X, i): X(i, row, at, s0, s1, s2) for each row, where an element of A lies and its three accumulators;
                                              of more than four rows the fifth and those behind it are `high`: in every eight k they come after the others. A processor has room for few stores
                                              at a time (a Zen 4 for 32 of 32 bytes) and stands still when there are more: so a step's end stores the first half, does eight k of the second, and stores that;
                                              place: PANEL: A is packed; ROWS: its rows are read where they lie, span by span; vectors: of columns that are multiplied, the others stay as they begin; beside: COPY: every eight k a row of llmpar__gemm_ahead is copied, ASK: two lines asked for, or NOTHING
   Macros that gemm_kernel.c sets to the text for a vector width before it makes a function:
     LLMPAR__GEMM_CLOBBERS
     LLMPAR__GEMM_Z                      "ymm" or "zmm"
     LLMPAR__GEMM_VECTOR_BYTES           of one vector; a k of the panel of B is three
     LLMPAR__GEMM_ZERO(s)                vector s becomes +0
     LLMPAR__GEMM_READ_B(i, v)           the v-th vector of B's columns at the i-th k from %rdi, to vector v, if the product wants it there
     LLMPAR__GEMM_PRODUCT(i, v, s)       vector s gets vector 3, a row's spread element of A, times the v-th vector of B */
#ifndef LLMPAR_GEMM_X86_INTERNAL_H
#define LLMPAR_GEMM_X86_INTERNAL_H

#if defined(__x86_64__) && !defined(LLMPAR_NO_SIMD)

#define LLMPAR__GEMM_A_BYTES LLMPAR__GEMM_VECTOR_BYTES "/2" /* of one k of the panel of A */
#define LLMPAR__GEMM_READ_ROW(i, r, at, s0, s1, s2) \
    "vmovups (%%rax), %%" LLMPAR__GEMM_Z #s0 "\n\t" "vmovups " LLMPAR__GEMM_VECTOR_BYTES "(%%rax), %%" LLMPAR__GEMM_Z #s1 "\n\t" \
    "vmovups 2*" LLMPAR__GEMM_VECTOR_BYTES "(%%rax), %%" LLMPAR__GEMM_Z #s2 "\n\t" "add %%rcx, %%rax\n\t"
#define LLMPAR__GEMM_WRITE_ROW(i, r, at, s0, s1, s2) \
    "vmovups %%" LLMPAR__GEMM_Z #s0 ", (%%r8)\n\t" "vmovups %%" LLMPAR__GEMM_Z #s1 ", " LLMPAR__GEMM_VECTOR_BYTES "(%%r8)\n\t" \
    "vmovups %%" LLMPAR__GEMM_Z #s2 ", 2*" LLMPAR__GEMM_VECTOR_BYTES "(%%r8)\n\t" "add %%r9, %%r8\n\t"
#define LLMPAR__GEMM_ZERO_ROW(i, r, at, s0, s1, s2) LLMPAR__GEMM_ZERO(s0) LLMPAR__GEMM_ZERO(s1) LLMPAR__GEMM_ZERO(s2)
#define LLMPAR__GEMM_MERGE_ONE(r, v, s) "vaddps (3*" #r "+" #v ")*" LLMPAR__GEMM_VECTOR_BYTES "(%%r8), %%" LLMPAR__GEMM_Z #s ", %%" LLMPAR__GEMM_Z #s "\n\t"
#define LLMPAR__GEMM_MERGE_ROW(i, r, at, s0, s1, s2) LLMPAR__GEMM_MERGE_ONE(r, 0, s0) LLMPAR__GEMM_MERGE_ONE(r, 1, s1) LLMPAR__GEMM_MERGE_ONE(r, 2, s2)
/* And what is asked for, once in 8 k: of row r as it lies, four to eleven lines further on; of a panel, 1024 bytes. */
#define LLMPAR__GEMM_SPREAD_ROWS(i, r, at) "vbroadcastss 4*" #i at ", %%" LLMPAR__GEMM_Z "3\n\t" ".if " #i " == " #r "\n\t" "prefetcht0 256+64*" #r at "\n\t" ".endif\n\t"
#define LLMPAR__GEMM_SPREAD_PANEL(i, r) \
    "vbroadcastss " #i "*" LLMPAR__GEMM_A_BYTES "+4*" #r "(%%rsi), %%" LLMPAR__GEMM_Z "3\n\t" \
    ".if " #r " == 0 && (" #i " & 1) == 0 && " LLMPAR__GEMM_A_BYTES " > 4*" #i "\n\t" "prefetcht0 1024+32*" #i "(%%rsi)\n\t" ".endif\n\t"
#define LLMPAR__GEMM_LINK_ROW_ROWS_1(i, r, at, s0, s1, s2) LLMPAR__GEMM_SPREAD_ROWS(i, r, at) LLMPAR__GEMM_PRODUCT(i, 0, s0)
#define LLMPAR__GEMM_LINK_ROW_ROWS_2(i, r, at, s0, s1, s2) LLMPAR__GEMM_LINK_ROW_ROWS_1(i, r, at, s0, s1, s2) LLMPAR__GEMM_PRODUCT(i, 1, s1)
#define LLMPAR__GEMM_LINK_ROW_ROWS_3(i, r, at, s0, s1, s2) LLMPAR__GEMM_LINK_ROW_ROWS_2(i, r, at, s0, s1, s2) LLMPAR__GEMM_PRODUCT(i, 2, s2)
#define LLMPAR__GEMM_LINK_ROW_PANEL_3(i, r, at, s0, s1, s2) LLMPAR__GEMM_SPREAD_PANEL(i, r) LLMPAR__GEMM_PRODUCT(i, 0, s0) LLMPAR__GEMM_PRODUCT(i, 1, s1) LLMPAR__GEMM_PRODUCT(i, 2, s2)
#define LLMPAR__GEMM_K_BYTES_ROWS "4"
#define LLMPAR__GEMM_K_BYTES_PANEL LLMPAR__GEMM_A_BYTES
/* One k. The panel of B comes from L2: what will be wanted 8 k later is asked for; of 32-byte vectors every other k has one line and a half. */
#define LLMPAR__GEMM_PREFETCH_B(i, vectors) \
    ".if " LLMPAR__GEMM_VECTOR_BYTES " > 32\n\t" "prefetcht0 (" #i "+8)*3*" LLMPAR__GEMM_VECTOR_BYTES "(%%rdi)\n\t" \
    ".if " #vectors " > 1\n\t" "prefetcht0 (" #i "+8)*3*" LLMPAR__GEMM_VECTOR_BYTES "+64(%%rdi)\n\t" ".endif\n\t" \
    ".if " #vectors " > 2\n\t" "prefetcht0 (" #i "+8)*3*" LLMPAR__GEMM_VECTOR_BYTES "+128(%%rdi)\n\t" ".endif\n\t" \
    ".elseif " #i " & 1\n\t" "prefetcht0 (" #i "+8)*3*" LLMPAR__GEMM_VECTOR_BYTES "+32(%%rdi)\n\t" \
    ".else\n\t" "prefetcht0 (" #i "+8)*3*" LLMPAR__GEMM_VECTOR_BYTES "(%%rdi)\n\t" "prefetcht0 (" #i "+8)*3*" LLMPAR__GEMM_VECTOR_BYTES "+64(%%rdi)\n\t" ".endif\n\t"
#define LLMPAR__GEMM_READ_B_1(i) LLMPAR__GEMM_READ_B(i, 0)
#define LLMPAR__GEMM_READ_B_2(i) LLMPAR__GEMM_READ_B_1(i) LLMPAR__GEMM_READ_B(i, 1)
#define LLMPAR__GEMM_READ_B_3(i) LLMPAR__GEMM_READ_B_2(i) LLMPAR__GEMM_READ_B(i, 2)
#define LLMPAR__GEMM_LINK(i, rows, place, vectors) LLMPAR__GEMM_READ_B_##vectors(i) rows(LLMPAR__GEMM_LINK_ROW_##place##_##vectors, i)
#define LLMPAR__GEMM_LINK_FIRST(i, rows, place, vectors) LLMPAR__GEMM_PREFETCH_B(i, vectors) LLMPAR__GEMM_LINK(i, rows, place, vectors)
/* Further by `count` k. */
#define LLMPAR__GEMM_ADVANCE(count, place) "add $" count "*" LLMPAR__GEMM_K_BYTES_##place ", %%rsi\n\t" "add $" count "*" LLMPAR__GEMM_K_BYTES_##place ", %%rax\n\t" "add $" count "*3*" LLMPAR__GEMM_VECTOR_BYTES ", %%rdi\n\t"
/* A span of ROWS begins, and the next one; `last` is what the last one does. A step without spans has one of no k. */
#define LLMPAR__GEMM_SPAN_PANEL "mov %c[k](%%r15), %%rdx\n\t"
#define LLMPAR__GEMM_NEXT_PANEL
#define LLMPAR__GEMM_LAST_PANEL(last) last
#define LLMPAR__GEMM_SPAN_ROWS \
    "mov %c[first_span](%%r15), %%r13\n\t" "add %c[spans](%[chains]), %%r13\n\t" "mov %c[span_count](%%r15), %%r14\n\t" "xor %%edx, %%edx\n\t" "test %%r14, %%r14\n\t" "jnz 11f\n\t" "inc %%r14\n\t" "jmp 12f\n" \
    "11:\n\t" "mov 8(%%r13), %%rcx\n\t" "mov %c[row](%[chains]), %%rsi\n\t" "imul %%rcx, %%rsi\n\t" "add (%%r13), %%rsi\n\t" \
    "lea (%%rsi,%%rcx,4), %%rax\n\t" "lea (%%rcx,%%rcx,2), %%r11\n\t" "mov 16(%%r13), %%rdx\n" "12:\n\t"
#define LLMPAR__GEMM_NEXT_ROWS "add $24, %%r13\n\t" "dec %%r14\n\t" "jnz 11b\n\t"
#define LLMPAR__GEMM_LAST_ROWS(last) "cmp $1, %%r14\n\t" "jne 6f\n\t" last "6:\n\t"
#define LLMPAR__GEMM_AHEAD(member) "8*" #member "+%c[ahead](%[chains])" /* counted, for an asm statement takes 30 operands */
/* The row four further on is asked for into L1, where more of them, multiples of 4 KB apart, would not stay; the ninth into L2. */
#define LLMPAR__GEMM_ASK_ROW(to) "prefetch" to " (%%r8)\n\t" "prefetch" to " 64(%%r8)\n\t" "prefetch" to " 128(%%r8)\n\t" "prefetch" to " 188(%%r8)\n\t"
#define LLMPAR__GEMM_BESIDE_NOTHING
#define LLMPAR__GEMM_BESIDE_COPY \
    "cmpq $0, " LLMPAR__GEMM_AHEAD(3) "\n\t" "je 18f\n\t" "decq " LLMPAR__GEMM_AHEAD(4) "\n\t" "js 18f\n\t" "decq " LLMPAR__GEMM_AHEAD(3) "\n\t" "mov %%r8, " LLMPAR__GEMM_AHEAD(5) "\n\t" "mov " LLMPAR__GEMM_AHEAD(0) ", %%r8\n\t" \
    "vmovups (%%r8), %%zmm4\n\t" "vmovups 64(%%r8), %%zmm5\n\t" "vmovups 128(%%r8), %%zmm6\n\t" "mov " LLMPAR__GEMM_AHEAD(2) ", %%r8\n\t" "add %%r8, " LLMPAR__GEMM_AHEAD(0) "\n\t" "lea (%%r8,%%r8,2), %%r8\n\t" "add " LLMPAR__GEMM_AHEAD(0) ", %%r8\n\t" \
    LLMPAR__GEMM_ASK_ROW("t0") \
    "mov " LLMPAR__GEMM_AHEAD(2) ", %%r8\n\t" "shl $3, %%r8\n\t" "add " LLMPAR__GEMM_AHEAD(0) ", %%r8\n\t" LLMPAR__GEMM_ASK_ROW("t1") "mov " LLMPAR__GEMM_AHEAD(1) ", %%r8\n\t" "addq $192, " LLMPAR__GEMM_AHEAD(1) "\n\t" \
    "vmovups %%zmm4, (%%r8)\n\t" "vmovups %%zmm5, 64(%%r8)\n\t" "vmovups %%zmm6, 128(%%r8)\n\t" "mov " LLMPAR__GEMM_AHEAD(5) ", %%r8\n" "18:\n\t"
#define LLMPAR__GEMM_BESIDE_ASK \
    "cmpq $0, " LLMPAR__GEMM_AHEAD(3) "\n\t" "je 18f\n\t" "mov %%r8, " LLMPAR__GEMM_AHEAD(5) "\n\t" "mov " LLMPAR__GEMM_AHEAD(0) ", %%r8\n\t" "prefetcht1 (%%r8)\n\t" "prefetcht1 64(%%r8)\n\t" "subq $-128, " LLMPAR__GEMM_AHEAD(0) "\n\t" \
    "decq " LLMPAR__GEMM_AHEAD(4) "\n\t" "jnz 19f\n\t" "mov " LLMPAR__GEMM_AHEAD(2) ", %%r8\n\t" "add %%r8, " LLMPAR__GEMM_AHEAD(0) "\n\t" "mov " LLMPAR__GEMM_AHEAD(6) ", %%r8\n\t" "mov %%r8, " LLMPAR__GEMM_AHEAD(4) "\n\t" "decq " LLMPAR__GEMM_AHEAD(3) "\n" \
    "19:\n\t" "mov " LLMPAR__GEMM_AHEAD(5) ", %%r8\n" "18:\n\t"
/* Rows are done with a step: partial tiles are added, and the sums go where they belong. */
#define LLMPAR__GEMM_MERGE(rows, base, slot, merges) \
    "mov %c[" #merges "](%%r15), %%r9\n\t" "mov %c[" #slot "](%%r15), %%r8\n\t" "add 8*" #base "+%c[base](%[chains]), %%r8\n\t" "test %%r9, %%r9\n\t" "jz 8f\n" \
    "7:\n\t" rows(LLMPAR__GEMM_MERGE_ROW, 0) "sub %c[slot_bytes](%[chains]), %%r8\n\t" "dec %%r9\n\t" "jnz 7b\n" "8:\n\t"
#define LLMPAR__GEMM_END(rows, skip) \
    LLMPAR__GEMM_MERGE(rows, 0, slot, merges) LLMPAR__GEMM_MERGE(rows, 1, slot_saved, merges_saved) \
    "mov %c[to_base](%%r15), %%r9\n\t" "mov %c[base](%[chains],%%r9,8), %%r8\n\t" "add %c[to](%%r15), %%r8\n\t" "mov %c[row_bytes](%[chains],%%r9,8), %%r9\n\t" skip rows(LLMPAR__GEMM_WRITE_ROW, 0)
#define LLMPAR__GEMM_COUNT(i, r, at, s0, s1, s2) "1+"
#define LLMPAR__GEMM_IF(rows, text) ".if " rows(LLMPAR__GEMM_COUNT, 0) "0\n\t" text ".endif\n\t"
#define LLMPAR__GEMM_OF_STEP(member) [member] "i"(offsetof(llmpar__gemm_step, member))
#define LLMPAR__GEMM_OF_CHAINS(member) [member] "i"(offsetof(llmpar__gemm_chains, member))

/* rsi: A, or its first row, rax: its fifth, rcx, r11: one and three rows further, r13, r14: the span, and how many are left; rdi: the panel of B; r15: the step; rdx: k, r12: eights of it,
   -1: there was none; r8: what is asked for, two lines every 8 k, which is a row of a tile of 32-byte vectors and half of one of 64 (r9: to the next place, r10: to the next row); in a step's end its places.
   The loop has few jumps, and none that depends on where c lies: processors predict the end of a step from the jumps before it. */
#define LLMPAR__GEMM_FUNCTION(name, isa, low, high, place, vectors, beside) \
__attribute__((target(isa))) static void llmpar__gemm_##name(const llmpar__gemm_chains *chains) \
{ \
    __asm__ __volatile__( \
        "mov %c[steps](%[chains]), %%r15\n\t" "mov %c[a](%[chains]), %%rsi\n\t" "mov %c[b](%[chains]), %%rdi\n\t" \
        "mov 8*2+%c[base](%[chains]), %%rax\n\t" "mov 8*2+%c[row_bytes](%[chains]), %%rcx\n\t" "cmpq $0, %c[load](%[chains])\n\t" "je 1f\n\t" \
        low(LLMPAR__GEMM_READ_ROW, 0) high(LLMPAR__GEMM_READ_ROW, 0) \
        "jmp 2f\n" \
    "1:\n\t" \
        low(LLMPAR__GEMM_ZERO_ROW, 0) high(LLMPAR__GEMM_ZERO_ROW, 0) \
    "2:\n\t" \
        LLMPAR__GEMM_SPAN_##place \
        "mov %c[ask_base](%%r15), %%r9\n\t" "mov %c[base](%[chains],%%r9,8), %%r8\n\t" "add %c[ask](%%r15), %%r8\n\t" "mov %c[row_bytes](%[chains],%%r9,8), %%r10\n\t" "mov %c[ask_bytes](%[chains],%%r9,8), %%r9\n\t" \
        "mov %%rdx, %%r12\n\t" "shr $3, %%r12\n\t" "jnz 3f\n\t" "dec %%r12\n\t" "jmp 9f\n\t" \
        ".p2align 5\n" \
    "3:\n\t" \
        LLMPAR__GEMM_LINK_FIRST(0, low, place, vectors) LLMPAR__GEMM_LINK_FIRST(1, low, place, vectors) LLMPAR__GEMM_LINK_FIRST(2, low, place, vectors) LLMPAR__GEMM_LINK_FIRST(3, low, place, vectors) "prefetcht0 (%%r8)\n\t" LLMPAR__GEMM_BESIDE_##beside \
        LLMPAR__GEMM_LINK_FIRST(4, low, place, vectors) LLMPAR__GEMM_LINK_FIRST(5, low, place, vectors) LLMPAR__GEMM_LINK_FIRST(6, low, place, vectors) LLMPAR__GEMM_LINK_FIRST(7, low, place, vectors) \
        ".if " LLMPAR__GEMM_VECTOR_BYTES " > 32\n\t" "prefetcht0 64(%%r8)\n\t" "add %%r9, %%r8\n\t" "sub %%r10, %%r9\n\t" "neg %%r9\n\t" \
        ".else\n\t" "prefetcht0 95(%%r8)\n\t" "add %%r10, %%r8\n\t" ".endif\n\t" \
        "dec %%r12\n\t" "jz 9f\n" \
    "4:\n\t" \
        LLMPAR__GEMM_IF(high, LLMPAR__GEMM_LINK(0, high, place, vectors) LLMPAR__GEMM_LINK(1, high, place, vectors) LLMPAR__GEMM_LINK(2, high, place, vectors) LLMPAR__GEMM_LINK(3, high, place, vectors) \
                              LLMPAR__GEMM_LINK(4, high, place, vectors) LLMPAR__GEMM_LINK(5, high, place, vectors) LLMPAR__GEMM_LINK(6, high, place, vectors) LLMPAR__GEMM_LINK(7, high, place, vectors)) \
        LLMPAR__GEMM_ADVANCE("8", place) \
        "test %%r12, %%r12\n\t" "jnz 3b\n" \
    "5:\n\t" \
        "and $7, %%edx\n\t" "jz 14f\n" \
    "13:\n\t" \
        LLMPAR__GEMM_IF(high, LLMPAR__GEMM_LINK(0, high, place, vectors)) \
        LLMPAR__GEMM_ADVANCE("1", place) \
        "dec %%edx\n\t" "jnz 13b\n" \
    "14:\n\t" \
        LLMPAR__GEMM_NEXT_##place \
        LLMPAR__GEMM_IF(high, LLMPAR__GEMM_END(high, "lea (%%r8,%%r9,4), %%r8\n\t")) \
        "add %[step_bytes], %%r15\n\t" "cmp %%r15, %c[steps_end](%[chains])\n\t" "jne 1b\n\t" "jmp 10f\n" \
    "9:\n\t" /* the first rows take what is left, and end */ \
        "mov %%rsi, %%r8\n\t" "mov %%rdi, %%r9\n\t" "mov %%edx, %%r10d\n\t" "test %%r12, %%r12\n\t" "js 15f\n\t" \
        "add $8*" LLMPAR__GEMM_K_BYTES_##place ", %%rsi\n\t" "add $8*3*" LLMPAR__GEMM_VECTOR_BYTES ", %%rdi\n" \
    "15:\n\t" \
        "and $7, %%r10d\n\t" "jz 17f\n" \
    "16:\n\t" \
        LLMPAR__GEMM_LINK_FIRST(0, low, place, vectors) \
        "add $" LLMPAR__GEMM_K_BYTES_##place ", %%rsi\n\t" "add $3*" LLMPAR__GEMM_VECTOR_BYTES ", %%rdi\n\t" "dec %%r10d\n\t" "jnz 16b\n" \
    "17:\n\t" \
        "mov %%r8, %%rsi\n\t" "mov %%r9, %%rdi\n\t" \
        LLMPAR__GEMM_LAST_##place(LLMPAR__GEMM_END(low, "")) \
        "test %%r12, %%r12\n\t" "jns 4b\n\t" "jmp 5b\n" \
    "10:\n\t" \
        : \
        : [chains] "r"(chains), LLMPAR__GEMM_OF_CHAINS(a), LLMPAR__GEMM_OF_CHAINS(b), LLMPAR__GEMM_OF_CHAINS(spans), LLMPAR__GEMM_OF_CHAINS(row), LLMPAR__GEMM_OF_CHAINS(steps), LLMPAR__GEMM_OF_CHAINS(steps_end), \
          LLMPAR__GEMM_OF_CHAINS(load), LLMPAR__GEMM_OF_CHAINS(slot_bytes), LLMPAR__GEMM_OF_CHAINS(base), LLMPAR__GEMM_OF_CHAINS(row_bytes), LLMPAR__GEMM_OF_CHAINS(ask_bytes), LLMPAR__GEMM_OF_CHAINS(ahead), \
          [step_bytes] "i"(sizeof(llmpar__gemm_step)), LLMPAR__GEMM_OF_STEP(k), LLMPAR__GEMM_OF_STEP(first_span), LLMPAR__GEMM_OF_STEP(span_count), LLMPAR__GEMM_OF_STEP(slot), LLMPAR__GEMM_OF_STEP(merges), \
          LLMPAR__GEMM_OF_STEP(slot_saved), LLMPAR__GEMM_OF_STEP(merges_saved), LLMPAR__GEMM_OF_STEP(to_base), LLMPAR__GEMM_OF_STEP(to), LLMPAR__GEMM_OF_STEP(ask_base), LLMPAR__GEMM_OF_STEP(ask) \
        : "rax", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "cc", "memory", LLMPAR__GEMM_CLOBBERS); \
}

#endif

#endif
