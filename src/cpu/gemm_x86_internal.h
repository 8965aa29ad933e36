/* gemm_x86: the chains of a register tile, as instructions. gemm_kernel.c makes the functions of each vector width of it. The whole loop over k is one asm statement, because
   what compilers make of 24 accumulators differs (gcc 12 -O2 kept them in memory, gcc -O3 copied them about, clang spilled them), and speed must not.
   A tile has 3 vectors of columns: of all shapes that fit the registers this one takes the fewest instructions and the fewest loads a product.
     LLMPAR__GEMM_FUNCTION(name, isa, rows, place, vectors)   rows(X, i) is X(i, row, at, s0, s1, s2) for each row: where an element of A lies, its three accumulators;
                                              place: PANEL: A is packed; ROWS: its rows are read where they lie, span by span; vectors: of columns that are multiplied, the others stay as they begin
   Macros that gemm_kernel.c sets to the text for a vector width before it makes a function:
     LLMPAR__GEMM_CLOBBERS
     LLMPAR__GEMM_Z                      "ymm" or "zmm"
     LLMPAR__GEMM_VECTOR_BYTES           of one vector; a k of the panel of B is three
     LLMPAR__GEMM_ZERO(s)                vector s becomes +0
     LLMPAR__GEMM_READ_B(i)              columns of B at the i-th k from %rdi, to vectors 0 to 2, if the product wants them there
     LLMPAR__GEMM_PRODUCT(i, v, s)       vector s gets vector 3, a row's spread element of A, times the v-th vector of B */
#ifndef LLMPAR_GEMM_X86_INTERNAL_H
#define LLMPAR_GEMM_X86_INTERNAL_H

#if defined(__x86_64__) && !defined(LLMPAR_NO_SIMD)

#define LLMPAR__GEMM_A_BYTES LLMPAR__GEMM_VECTOR_BYTES "/2" /* of one k of the panel of A */
#define LLMPAR__GEMM_READ_ROW(i, r, at, s0, s1, s2) \
    "vmovups (%%rax), %%" LLMPAR__GEMM_Z #s0 "\n\t" "vmovups " LLMPAR__GEMM_VECTOR_BYTES "(%%rax), %%" LLMPAR__GEMM_Z #s1 "\n\t" \
    "vmovups 2*" LLMPAR__GEMM_VECTOR_BYTES "(%%rax), %%" LLMPAR__GEMM_Z #s2 "\n\t" "add %%rcx, %%rax\n\t"
#define LLMPAR__GEMM_WRITE_ROW(i, r, at, s0, s1, s2) \
    "vmovups %%" LLMPAR__GEMM_Z #s0 ", (%%rax)\n\t" "vmovups %%" LLMPAR__GEMM_Z #s1 ", " LLMPAR__GEMM_VECTOR_BYTES "(%%rax)\n\t" \
    "vmovups %%" LLMPAR__GEMM_Z #s2 ", 2*" LLMPAR__GEMM_VECTOR_BYTES "(%%rax)\n\t" "add %%rcx, %%rax\n\t"
#define LLMPAR__GEMM_ZERO_ROW(i, r, at, s0, s1, s2) LLMPAR__GEMM_ZERO(s0) LLMPAR__GEMM_ZERO(s1) LLMPAR__GEMM_ZERO(s2)
#define LLMPAR__GEMM_MERGE_ONE(r, v, s) "vaddps (3*" #r "+" #v ")*" LLMPAR__GEMM_VECTOR_BYTES "(%%rax), %%" LLMPAR__GEMM_Z #s ", %%" LLMPAR__GEMM_Z #s "\n\t"
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
#define LLMPAR__GEMM_PREFETCH_B(i) \
    ".if " LLMPAR__GEMM_VECTOR_BYTES " > 32\n\t" \
    "prefetcht0 (" #i "+8)*3*" LLMPAR__GEMM_VECTOR_BYTES "(%%rdi)\n\t" "prefetcht0 (" #i "+8)*3*" LLMPAR__GEMM_VECTOR_BYTES "+64(%%rdi)\n\t" "prefetcht0 (" #i "+8)*3*" LLMPAR__GEMM_VECTOR_BYTES "+128(%%rdi)\n\t" \
    ".elseif " #i " & 1\n\t" "prefetcht0 (" #i "+8)*3*" LLMPAR__GEMM_VECTOR_BYTES "+32(%%rdi)\n\t" \
    ".else\n\t" "prefetcht0 (" #i "+8)*3*" LLMPAR__GEMM_VECTOR_BYTES "(%%rdi)\n\t" "prefetcht0 (" #i "+8)*3*" LLMPAR__GEMM_VECTOR_BYTES "+64(%%rdi)\n\t" ".endif\n\t"
#define LLMPAR__GEMM_LINK(i, rows, place, vectors) LLMPAR__GEMM_READ_B(i) LLMPAR__GEMM_PREFETCH_B(i) rows(LLMPAR__GEMM_LINK_ROW_##place##_##vectors, i)
/* A span of ROWS begins, and the next one. */
#define LLMPAR__GEMM_SPAN_PANEL "mov %c[a](%[chains]), %%rsi\n\t" "mov %c[k](%[chains]), %%rdx\n\t"
#define LLMPAR__GEMM_NEXT_PANEL
#define LLMPAR__GEMM_SPAN_ROWS \
    "mov %c[spans](%[chains]), %%r13\n\t" "mov %c[span_count](%[chains]), %%r14\n\t" "test %%r14, %%r14\n\t" "jz 6f\n" \
    "11:\n\t" "mov 8(%%r13), %%rcx\n\t" "mov %c[row](%[chains]), %%rsi\n\t" "imul %%rcx, %%rsi\n\t" "add (%%r13), %%rsi\n\t" \
    "lea (%%rsi,%%rcx,4), %%rax\n\t" "lea (%%rcx,%%rcx,2), %%r11\n\t" "mov 16(%%r13), %%rdx\n\t"
#define LLMPAR__GEMM_NEXT_ROWS "add $24, %%r13\n\t" "dec %%r14\n\t" "jnz 11b\n\t"

/* rsi: A, or its first row, rax: its fifth, rcx, r11: one and three rows further, r13, r14: the span, and how many are left; rdi: the panel of B; rdx: k, r12: eights of it;
   r8: what is asked for, two lines every 8 k, which is a row of a tile of 32-byte vectors and half of one of 64 (r9: to the next place, r10: to the next row).
   The loop has few jumps, and none that depends on where c lies: processors predict the end of a step from the jumps before it. */
#define LLMPAR__GEMM_FUNCTION(name, isa, rows, place, vectors) \
__attribute__((target(isa))) static void llmpar__gemm_##name(llmpar__gemm_chains *chains) \
{ \
    __asm__ __volatile__( \
        "mov %c[from](%[chains]), %%rax\n\t" \
        "mov %c[from_step](%[chains]), %%rcx\n\t" \
        "test %%rax, %%rax\n\t" \
        "jz 1f\n\t" \
        rows(LLMPAR__GEMM_READ_ROW, 0) \
        "jmp 2f\n" \
    "1:\n\t" \
        rows(LLMPAR__GEMM_ZERO_ROW, 0) \
    "2:\n\t" \
        "mov %c[b](%[chains]), %%rdi\n\t" \
        "mov %c[at](%[chains]), %%r8\n\t" \
        "mov %c[jump](%[chains]), %%r10\n\t" \
        "mov $2*" LLMPAR__GEMM_VECTOR_BYTES ", %%r9d\n\t" \
        LLMPAR__GEMM_SPAN_##place \
        "mov %%rdx, %%r12\n\t" \
        "shr $3, %%r12\n\t" \
        "jz 4f\n\t" \
        ".p2align 5\n" \
    "3:\n\t" \
        LLMPAR__GEMM_LINK(0, rows, place, vectors) LLMPAR__GEMM_LINK(1, rows, place, vectors) LLMPAR__GEMM_LINK(2, rows, place, vectors) LLMPAR__GEMM_LINK(3, rows, place, vectors) "prefetcht0 (%%r8)\n\t" \
        LLMPAR__GEMM_LINK(4, rows, place, vectors) LLMPAR__GEMM_LINK(5, rows, place, vectors) LLMPAR__GEMM_LINK(6, rows, place, vectors) LLMPAR__GEMM_LINK(7, rows, place, vectors) \
        ".if " LLMPAR__GEMM_VECTOR_BYTES " > 32\n\t" "prefetcht0 64(%%r8)\n\t" \
        "add %%r9, %%r8\n\t" \
        "sub %%r10, %%r9\n\t" \
        "neg %%r9\n\t" \
        ".else\n\t" "prefetcht0 95(%%r8)\n\t" \
        "add %%r10, %%r8\n\t" \
        ".endif\n\t" \
        "add $8*" LLMPAR__GEMM_K_BYTES_##place ", %%rsi\n\t" \
        "add $8*" LLMPAR__GEMM_K_BYTES_##place ", %%rax\n\t" \
        "add $8*3*" LLMPAR__GEMM_VECTOR_BYTES ", %%rdi\n\t" \
        "dec %%r12\n\t" \
        "jnz 3b\n" \
    "4:\n\t" \
        "and $7, %%rdx\n\t" \
        "jz 12f\n" \
    "5:\n\t" \
        LLMPAR__GEMM_LINK(0, rows, place, vectors) \
        "add $" LLMPAR__GEMM_K_BYTES_##place ", %%rsi\n\t" \
        "add $" LLMPAR__GEMM_K_BYTES_##place ", %%rax\n\t" \
        "add $3*" LLMPAR__GEMM_VECTOR_BYTES ", %%rdi\n\t" \
        "dec %%rdx\n\t" \
        "jnz 5b\n" \
    "12:\n\t" \
        LLMPAR__GEMM_NEXT_##place \
        "mov %%r8, %c[at](%[chains])\n" \
    "6:\n\t" \
        "mov %c[merges](%[chains]), %%rcx\n\t" \
        "mov %c[slot](%[chains]), %%rax\n\t" \
        "test %%rcx, %%rcx\n\t" \
        "jz 8f\n" \
    "7:\n\t" \
        rows(LLMPAR__GEMM_MERGE_ROW, 0) \
        "sub %c[slot_bytes](%[chains]), %%rax\n\t" \
        "dec %%rcx\n\t" \
        "jnz 7b\n" \
    "8:\n\t" \
        "mov %c[merges_saved](%[chains]), %%rcx\n\t" \
        "mov %c[slot_saved](%[chains]), %%rax\n\t" \
        "test %%rcx, %%rcx\n\t" \
        "jz 10f\n" \
    "9:\n\t" \
        rows(LLMPAR__GEMM_MERGE_ROW, 0) \
        "sub %c[slot_bytes](%[chains]), %%rax\n\t" \
        "dec %%rcx\n\t" \
        "jnz 9b\n" \
    "10:\n\t" \
        "mov %c[to](%[chains]), %%rax\n\t" \
        "mov %c[to_step](%[chains]), %%rcx\n\t" \
        rows(LLMPAR__GEMM_WRITE_ROW, 0) \
        : \
        : [chains] "r"(chains), [a] "i"(offsetof(llmpar__gemm_chains, a)), [k] "i"(offsetof(llmpar__gemm_chains, k)), [spans] "i"(offsetof(llmpar__gemm_chains, spans)), [span_count] "i"(offsetof(llmpar__gemm_chains, span_count)), [row] "i"(offsetof(llmpar__gemm_chains, row)), [b] "i"(offsetof(llmpar__gemm_chains, b)), \
          [from] "i"(offsetof(llmpar__gemm_chains, from)), [from_step] "i"(offsetof(llmpar__gemm_chains, from_step)), \
          [to] "i"(offsetof(llmpar__gemm_chains, to)), [to_step] "i"(offsetof(llmpar__gemm_chains, to_step)), \
          [slot] "i"(offsetof(llmpar__gemm_chains, slot)), [merges] "i"(offsetof(llmpar__gemm_chains, merges)), \
          [slot_saved] "i"(offsetof(llmpar__gemm_chains, slot_saved)), [merges_saved] "i"(offsetof(llmpar__gemm_chains, merges_saved)), \
          [slot_bytes] "i"(offsetof(llmpar__gemm_chains, slot_bytes)), \
          [at] "i"(offsetof(llmpar__gemm_chains, at)), [jump] "i"(offsetof(llmpar__gemm_chains, jump)) \
        : "rax", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "cc", "memory", LLMPAR__GEMM_CLOBBERS); \
}

#endif

#endif
