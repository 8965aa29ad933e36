/* gemm_kernel: the inner parts of the matrix product for each vector width: panels are packed, and a tile of c takes its steps through them. */
#include "cpu/gemm_internal.h"
#include "cpu/gemm_thin_internal.h"
#include "cpu/gemm_x86_internal.h"

#include <stddef.h>
#include <string.h>
#if defined(__x86_64__) && !defined(LLMPAR_NO_SIMD)
#include <immintrin.h>
#elif defined(__aarch64__) && !defined(LLMPAR_NO_SIMD)
#include <arm_neon.h>
#endif

#if !defined(LLMPAR_NO_SIMD)

/* ---- BF16 units ---- */

LLMPAR__PRIVATE_DEF int llmpar__gemm_has_bf16(void)
{
#if LLMPAR__BF16_UNITS && defined(LLMPAR_BF16_EMULATED)
    return 1;
#elif LLMPAR__BF16_UNITS
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512bf16") != 0;
#else
    return 0;
#endif
}

/* ---- packing ---- */

#if defined(__x86_64__)

#define LLMPAR__GEMM_AVX __attribute__((target("avx")))
#define LLMPAR__GEMM_ROW(r) _mm_loadu_ps((const float *)(const void *)(in + (r) * ld))
#define LLMPAR__GEMM_TWO(r) _mm256_insertf128_ps(_mm256_castps128_ps256(LLMPAR__GEMM_ROW(r)), LLMPAR__GEMM_ROW((r) + 4), 1)

/* out[k * width + r] = word k of row r, rows ld bytes apart, r < 8, k < 4: in each half of a vector four rows of four become four columns. */
static inline __attribute__((always_inline)) LLMPAR__GEMM_AVX void llmpar__gemm_transpose_8(const char *in, int64_t ld, float *out, const int64_t width)
{
    __m256 x0 = LLMPAR__GEMM_TWO(0), x1 = LLMPAR__GEMM_TWO(1), x2 = LLMPAR__GEMM_TWO(2), x3 = LLMPAR__GEMM_TWO(3);
    __m256 y0 = _mm256_unpacklo_ps(x0, x1), y1 = _mm256_unpacklo_ps(x2, x3), y2 = _mm256_unpackhi_ps(x0, x1), y3 = _mm256_unpackhi_ps(x2, x3);
    _mm256_storeu_ps(out, _mm256_shuffle_ps(y0, y1, 0x44));
    _mm256_storeu_ps(out + width, _mm256_shuffle_ps(y0, y1, 0xee));
    _mm256_storeu_ps(out + 2 * width, _mm256_shuffle_ps(y2, y3, 0x44));
    _mm256_storeu_ps(out + 3 * width, _mm256_shuffle_ps(y2, y3, 0xee));
}

/* The same of 4 rows. */
static inline __attribute__((always_inline)) LLMPAR__GEMM_AVX void llmpar__gemm_transpose_4(const char *in, int64_t ld, float *out, const int64_t width)
{
    __m128 x0 = LLMPAR__GEMM_ROW(0), x1 = LLMPAR__GEMM_ROW(1), x2 = LLMPAR__GEMM_ROW(2), x3 = LLMPAR__GEMM_ROW(3);
    __m128 y0 = _mm_unpacklo_ps(x0, x1), y1 = _mm_unpacklo_ps(x2, x3), y2 = _mm_unpackhi_ps(x0, x1), y3 = _mm_unpackhi_ps(x2, x3);
    _mm_storeu_ps(out, _mm_shuffle_ps(y0, y1, 0x44));
    _mm_storeu_ps(out + width, _mm_shuffle_ps(y0, y1, 0xee));
    _mm_storeu_ps(out + 2 * width, _mm_shuffle_ps(y2, y3, 0x44));
    _mm_storeu_ps(out + 3 * width, _mm_shuffle_ps(y2, y3, 0xee));
}

/* One k of a panel: `width` floats. */
static inline __attribute__((always_inline)) LLMPAR__GEMM_AVX void llmpar__gemm_copy(const float *in, float *out, const int width)
{
    int j;
    for (j = 0; j + 24 <= width; j += 24) {
        __m256 x0 = _mm256_loadu_ps(in + j), x1 = _mm256_loadu_ps(in + j + 8), x2 = _mm256_loadu_ps(in + j + 16);
        _mm256_storeu_ps(out + j, x0);
        _mm256_storeu_ps(out + j + 8, x1);
        _mm256_storeu_ps(out + j + 16, x2);
    }
    for (; j + 8 <= width; j += 8) _mm256_storeu_ps(out + j, _mm256_loadu_ps(in + j));
    for (; j + 4 <= width; j += 4) _mm_storeu_ps(out + j, _mm_loadu_ps(in + j));
}

#undef LLMPAR__GEMM_ROW
#undef LLMPAR__GEMM_TWO

#else

#define LLMPAR__GEMM_AVX
static inline void llmpar__gemm_copy(const float *in, float *out, const int width) { memcpy(out, in, sizeof(float) * (size_t)width); }

#endif

/* Sixteen rows at a time, a line of out, or eight, to their end: processors follow that many streams by themselves, not 48 short ones. */
LLMPAR__PRIVATE_DEF LLMPAR__GEMM_AVX void llmpar__gemm_turn(const void *in, int64_t ld, int64_t rows, int64_t columns, float *out, int64_t ld_out)
{
    int64_t i = 0, j = 0, r, step;
    for (; i < rows; i += step, j = 0) {
        const char *at = (const char *)in + i * ld;
        float *to = out + i;
        step = rows - i < 4 ? 1 : rows - i < 8 ? 4 : rows - i < 16 || ld % 4096 == 0 ? 8 : 16; /* of lines 4 KB apart L1 holds eight */
#if defined(__x86_64__)
        if (step >= 8)
            for (; j + 4 <= columns; j += 4, at += 16, to += 4 * ld_out) {
                llmpar__gemm_transpose_8(at, ld, to, ld_out);
                if (step > 8) llmpar__gemm_transpose_8(at + 8 * ld, ld, to + 8, ld_out);
            }
        else if (step == 4)
            for (; j + 4 <= columns; j += 4, at += 16, to += 4 * ld_out) llmpar__gemm_transpose_4(at, ld, to, ld_out);
#endif
        for (; j < columns; j++, at += 4, to += ld_out)
            for (r = 0; r < step; r++) memcpy(to + r, at + r * ld, sizeof *to);
    }
}

static inline __attribute__((always_inline)) LLMPAR__GEMM_AVX void llmpar__gemm_pack_panels(const llmpar__gemm_packing *packing, const int width)
{
    const float *in = (const float *)packing->in;
    int64_t ld = packing->ld, k = packing->k, distance = packing->distance, full = packing->valid / width, panel, i, row;
    int r;
    if (full > packing->panels) full = packing->panels;
    if (packing->transposed) {
        for (panel = 0; panel < full; panel++) llmpar__gemm_turn(in + panel * width * ld, 4 * ld, width, k, packing->out + panel * distance, width);
    } else {
        const int rows = width < 16 ? 4 : 1; /* whole rows at a time, which memory likes, and whole lines: of panels that are multiples of 4 KB apart L1 holds few */
        for (i = 0; i < k; i += rows)
            for (panel = 0; panel < full; panel++)
                for (row = i; row < k && row < i + rows; row++) {
                    const float *from = in + row * ld + panel * width;
                    for (r = 0; r < width; r += 16) __builtin_prefetch(from + 8 * ld + r);
                    llmpar__gemm_copy(from, packing->out + panel * distance + row * width, width);
                }
    }
    if (full < packing->panels) {
        int64_t valid = packing->valid - full * width;
        float *out = packing->out + full * distance;
        in += full * width * (packing->transposed ? ld : 1);
        memset(out, 0, sizeof(float) * (size_t)(k * width));
        if (packing->transposed) llmpar__gemm_turn(in, 4 * ld, valid, k, out, width);
        else
            for (i = 0; i < k; i++) memcpy(out + i * width, in + i * ld, sizeof(float) * (size_t)valid);
    }
}

LLMPAR__GEMM_AVX static void llmpar__gemm_pack_8(const llmpar__gemm_packing *packing) { llmpar__gemm_pack_panels(packing, 8); }
#if defined(__x86_64__)
LLMPAR__GEMM_AVX static void llmpar__gemm_pack_4(const llmpar__gemm_packing *packing) { llmpar__gemm_pack_panels(packing, 4); }
LLMPAR__GEMM_AVX static void llmpar__gemm_pack_24(const llmpar__gemm_packing *packing) { llmpar__gemm_pack_panels(packing, 24); }
LLMPAR__GEMM_AVX static void llmpar__gemm_pack_48(const llmpar__gemm_packing *packing) { llmpar__gemm_pack_panels(packing, 48); }
#else
static void llmpar__gemm_pack_12(const llmpar__gemm_packing *packing) { llmpar__gemm_pack_panels(packing, 12); }
#endif
#undef LLMPAR__GEMM_AVX

#if LLMPAR__BF16_UNITS

static inline float llmpar__gemm_pair(const uint16_t *low, const uint16_t *high)
{
    uint32_t bits = (uint32_t)*low | (high ? (uint32_t)*high << 16 : 0);
    float pair;
    memcpy(&pair, &bits, sizeof pair);
    return pair;
}

/* BF16 as it is stored becomes pairs: the even k low, the odd one high; an odd k at the end has a zero beside it. */
static inline __attribute__((always_inline)) __attribute__((target("avx2"))) void llmpar__gemm_pack_pairs(const llmpar__gemm_packing *packing, const int width)
{
    const uint16_t *in = (const uint16_t *)packing->in;
    int64_t ld = packing->ld, pairs = packing->k / 2, links = (packing->k + 1) / 2, panel, i;
    int64_t row_step = packing->transposed ? ld : 1, k_step = packing->transposed ? 1 : ld;
    int64_t full = packing->valid / width < packing->panels ? packing->valid / width : packing->panels, pair;
    int r, lines = width < 16 ? 2 : 1; /* as above, in whole lines */
    for (i = 0; i < pairs && !packing->transposed; i += lines)
        for (panel = 0; panel < full; panel++)
            for (pair = i; pair < pairs && pair < i + lines; pair++)
                for (r = 0; r < width; r += 8) {
                    const uint16_t *at = in + 2 * pair * ld + panel * width + r;
                    __m256i low = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)at)), high = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)(at + ld)));
                    if ((panel * width + r) % 32 == 0) {
                        __builtin_prefetch(at + 16 * ld);
                        __builtin_prefetch(at + 17 * ld);
                    }
                    _mm256_storeu_si256((__m256i *)(void *)(packing->out + panel * packing->distance + pair * width + r), _mm256_or_si256(low, _mm256_slli_epi32(high, 16)));
                }
    for (panel = 0; panel < packing->panels; panel++) {
        const uint16_t *rows = in + panel * width * row_step;
        float *out = packing->out + panel * packing->distance;
        int64_t valid = packing->valid - panel * width;
        i = 0;
        if (valid >= width && packing->transposed && width % 16 == 0) /* lines further on go to L2, which holds more */
            for (r = 0; r < width; r += 16)
                for (i = 0; i + 16 <= pairs; i += 16) {
                    const uint16_t *at = rows + r * ld + 2 * i;
                    int j;
                    for (j = 0; j < 16; j++) __builtin_prefetch(at + j * ld + 128, 0, 2);
                    llmpar__gemm_thin_avx512_transpose((const char *)at, ld * (int64_t)sizeof *at, out + i * width + r, width);
                }
        else if (valid >= width) {
            if (packing->transposed) llmpar__gemm_turn(rows, ld * (int64_t)sizeof *rows, width, pairs, out, width);
            i = pairs;
        }
        for (; i < links; i++)
            for (r = 0; r < width; r++) {
                const uint16_t *at = rows + r * row_step + 2 * i * k_step;
                out[i * width + r] = r < valid ? llmpar__gemm_pair(at, i < pairs ? at + k_step : NULL) : 0.0f;
            }
    }
}

__attribute__((target("avx2"))) static void llmpar__gemm_pack_pairs_8(const llmpar__gemm_packing *packing) { llmpar__gemm_pack_pairs(packing, 8); }
__attribute__((target("avx2"))) static void llmpar__gemm_pack_pairs_48(const llmpar__gemm_packing *packing) { llmpar__gemm_pack_pairs(packing, 48); }

#endif

/* ---- chains ---- */

#define LLMPAR__GEMM_EACH_ROW_1(X, i) X(i, 0, "(%%rsi)", 8, 9, 10)
#define LLMPAR__GEMM_EACH_ROW_2(X, i) LLMPAR__GEMM_EACH_ROW_1(X, i) X(i, 1, "(%%rsi,%%rcx)", 11, 12, 13)
#define LLMPAR__GEMM_EACH_ROW_4(X, i) LLMPAR__GEMM_EACH_ROW_2(X, i) X(i, 2, "(%%rsi,%%rcx,2)", 14, 15, 16) X(i, 3, "(%%rsi,%%r11)", 17, 18, 19)
#define LLMPAR__GEMM_EACH_ROW_5_TO_8(X, i) X(i, 4, "(%%rax)", 20, 21, 22) X(i, 5, "(%%rax,%%rcx)", 23, 24, 25) X(i, 6, "(%%rax,%%rcx,2)", 26, 27, 28) X(i, 7, "(%%rax,%%r11)", 29, 30, 31)
#define LLMPAR__GEMM_NO_ROW(X, i)

#if defined(__x86_64__)

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Woverlength-strings" /* the text of an asm statement */

/* y: which list of rows. */
#define LLMPAR__GEMM_CHAINS_124(level, isa, y) \
    LLMPAR__GEMM_FUNCTION(level##_chains_1, isa, LLMPAR__GEMM_EACH_ROW_1##y, LLMPAR__GEMM_NO_ROW, PANEL, 3, NOTHING) \
    LLMPAR__GEMM_FUNCTION(level##_chains_2, isa, LLMPAR__GEMM_EACH_ROW_2##y, LLMPAR__GEMM_NO_ROW, PANEL, 3, NOTHING) \
    LLMPAR__GEMM_FUNCTION(level##_chains_4, isa, LLMPAR__GEMM_EACH_ROW_4##y, LLMPAR__GEMM_NO_ROW, PANEL, 3, NOTHING)
/* Vectors of 32 bytes in 16 registers. */
#define LLMPAR__GEMM_16_REGISTERS "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15"
#define LLMPAR__GEMM_EACH_ROW_1Y(X, i) X(i, 0, "(%%rsi)", 4, 5, 6)
#define LLMPAR__GEMM_EACH_ROW_2Y(X, i) LLMPAR__GEMM_EACH_ROW_1Y(X, i) X(i, 1, "(%%rsi,%%rcx)", 7, 8, 9)
#define LLMPAR__GEMM_EACH_ROW_4Y(X, i) LLMPAR__GEMM_EACH_ROW_2Y(X, i) X(i, 2, "(%%rsi,%%rcx,2)", 10, 11, 12) X(i, 3, "(%%rsi,%%r11)", 13, 14, 15)
#define LLMPAR__GEMM_CLOBBERS LLMPAR__GEMM_16_REGISTERS
#define LLMPAR__GEMM_Z "ymm"
#define LLMPAR__GEMM_VECTOR_BYTES "32"
#define LLMPAR__GEMM_ZERO(s) "vxorps %%ymm" #s ", %%ymm" #s ", %%ymm" #s "\n\t"
/* First the portable level, with the bits of gemm_portable.inc, whose rows serve processors without AVX. */
#define LLMPAR__GEMM_READ_B(i, v)
#define LLMPAR__GEMM_PRODUCT(i, v, s) "vmulps 96*" #i "+32*" #v "(%%rdi), %%ymm3, %%ymm" #v "\n\t" "vaddps %%ymm" #s ", %%ymm" #v ", %%ymm" #s "\n\t"
LLMPAR__GEMM_CHAINS_124(avx, "avx", Y)
#undef LLMPAR__GEMM_READ_B
#undef LLMPAR__GEMM_PRODUCT
#define LLMPAR__GEMM_READ_B(i, v) "vmovups 96*" #i "+32*" #v "(%%rdi), %%ymm" #v "\n\t"
#define LLMPAR__GEMM_PRODUCT(i, v, s) "vfmadd231ps %%ymm" #v ", %%ymm3, %%ymm" #s "\n\t"
LLMPAR__GEMM_CHAINS_124(avx2, "avx2,fma", Y)
#undef LLMPAR__GEMM_EACH_ROW_1Y
#undef LLMPAR__GEMM_EACH_ROW_2Y
#undef LLMPAR__GEMM_EACH_ROW_4Y
#undef LLMPAR__GEMM_CLOBBERS
#undef LLMPAR__GEMM_Z
#undef LLMPAR__GEMM_VECTOR_BYTES
#undef LLMPAR__GEMM_ZERO
#undef LLMPAR__GEMM_READ_B
#undef LLMPAR__GEMM_PRODUCT

/* Vectors of 64 bytes in 32. */
#define LLMPAR__GEMM_LEVEL_512(level) LLMPAR__GEMM_CHAINS_124(level, "avx512f", ) \
    LLMPAR__GEMM_FUNCTION(level##_chains_8, "avx512f", LLMPAR__GEMM_EACH_ROW_4, LLMPAR__GEMM_EACH_ROW_5_TO_8, PANEL, 3, NOTHING) \
    LLMPAR__GEMM_FUNCTION(level##_lying_8, "avx512f", LLMPAR__GEMM_EACH_ROW_4, LLMPAR__GEMM_EACH_ROW_5_TO_8, ROWS, 3, NOTHING) \
    LLMPAR__GEMM_FUNCTION(level##_lying_third, "avx512f", LLMPAR__GEMM_EACH_ROW_4, LLMPAR__GEMM_EACH_ROW_5_TO_8, ROWS, 1, NOTHING) \
    LLMPAR__GEMM_FUNCTION(level##_lying_two_thirds, "avx512f", LLMPAR__GEMM_EACH_ROW_4, LLMPAR__GEMM_EACH_ROW_5_TO_8, ROWS, 2, NOTHING)
#define LLMPAR__GEMM_CLOBBERS LLMPAR__GEMM_16_REGISTERS, "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm24", "xmm25", "xmm26", "xmm27", "xmm28", "xmm29", "xmm30", "xmm31"
#define LLMPAR__GEMM_Z "zmm"
#define LLMPAR__GEMM_VECTOR_BYTES "64"
#define LLMPAR__GEMM_ZERO(s) "vpxord %%zmm" #s ", %%zmm" #s ", %%zmm" #s "\n\t"
#define LLMPAR__GEMM_READ_B(i, v) "vmovups 192*" #i "+64*" #v "(%%rdi), %%zmm" #v "\n\t"
#define LLMPAR__GEMM_PRODUCT(i, v, s) "vfmadd231ps %%zmm" #v ", %%zmm3, %%zmm" #s "\n\t"
LLMPAR__GEMM_LEVEL_512(avx512)
LLMPAR__GEMM_FUNCTION(avx512_chains_copying, "avx512f", LLMPAR__GEMM_EACH_ROW_4, LLMPAR__GEMM_EACH_ROW_5_TO_8, PANEL, 3, COPY)
LLMPAR__GEMM_FUNCTION(avx512_lying_copying, "avx512f", LLMPAR__GEMM_EACH_ROW_4, LLMPAR__GEMM_EACH_ROW_5_TO_8, ROWS, 3, COPY)
LLMPAR__GEMM_FUNCTION(avx512_chains_asking, "avx512f", LLMPAR__GEMM_EACH_ROW_4, LLMPAR__GEMM_EACH_ROW_5_TO_8, PANEL, 3, ASK)
LLMPAR__GEMM_FUNCTION(avx512_lying_asking, "avx512f", LLMPAR__GEMM_EACH_ROW_4, LLMPAR__GEMM_EACH_ROW_5_TO_8, ROWS, 3, ASK)
#undef LLMPAR__GEMM_PRODUCT
#if LLMPAR__BF16_UNITS
#if defined(LLMPAR_BF16_EMULATED) /* first the odd k, then the even one, each with one rounding */
#define LLMPAR__GEMM_PRODUCT(i, v, s) \
    "vpsrld $16, %%zmm" #v ", %%zmm4\n\t" "vpslld $16, %%zmm4, %%zmm4\n\t" "vpsrld $16, %%zmm3, %%zmm5\n\t" "vpslld $16, %%zmm5, %%zmm5\n\t" \
    "vfmadd231ps %%zmm4, %%zmm5, %%zmm" #s "\n\t" \
    "vpslld $16, %%zmm" #v ", %%zmm4\n\t" "vpslld $16, %%zmm3, %%zmm5\n\t" \
    "vfmadd231ps %%zmm4, %%zmm5, %%zmm" #s "\n\t"
#else
#define LLMPAR__GEMM_PRODUCT(i, v, s) "vdpbf16ps %%zmm" #v ", %%zmm3, %%zmm" #s "\n\t"
#endif
LLMPAR__GEMM_LEVEL_512(bf16)
#undef LLMPAR__GEMM_PRODUCT
#endif
#undef LLMPAR__GEMM_16_REGISTERS
#undef LLMPAR__GEMM_CLOBBERS
#undef LLMPAR__GEMM_Z
#undef LLMPAR__GEMM_VECTOR_BYTES
#undef LLMPAR__GEMM_ZERO
#undef LLMPAR__GEMM_READ_B
#undef LLMPAR__GEMM_READ_ROW
#undef LLMPAR__GEMM_WRITE_ROW
#undef LLMPAR__GEMM_ZERO_ROW
#undef LLMPAR__GEMM_MERGE_ROW
#undef LLMPAR__GEMM_MERGE
#undef LLMPAR__GEMM_FUNCTION
#undef LLMPAR__GEMM_CHAINS_124
#undef LLMPAR__GEMM_LEVEL_512

#pragma GCC diagnostic pop

LLMPAR__PRIVATE_DEF llmpar__gemm_kernel llmpar__gemm_kernel_of(llmpar_cpu_level level, llmpar_dtype dtype)
{
    llmpar__gemm_kernel avx = { 4, 24, 0, llmpar__gemm_pack_4, llmpar__gemm_pack_24, { llmpar__gemm_avx_chains_1, llmpar__gemm_avx_chains_2, llmpar__gemm_avx_chains_4, NULL }, { NULL }, { NULL }, { NULL } };
    llmpar__gemm_kernel avx2 = { 4, 24, 0, llmpar__gemm_pack_4, llmpar__gemm_pack_24, { llmpar__gemm_avx2_chains_1, llmpar__gemm_avx2_chains_2, llmpar__gemm_avx2_chains_4, NULL }, { NULL }, { NULL }, { NULL } };
    llmpar__gemm_kernel avx512 = { 8, 48, 0, llmpar__gemm_pack_8, llmpar__gemm_pack_48, { llmpar__gemm_avx512_chains_1, llmpar__gemm_avx512_chains_2, llmpar__gemm_avx512_chains_4, llmpar__gemm_avx512_chains_8 }, { llmpar__gemm_avx512_lying_third, llmpar__gemm_avx512_lying_two_thirds, llmpar__gemm_avx512_lying_8 }, { llmpar__gemm_avx512_chains_copying, llmpar__gemm_avx512_lying_copying }, { llmpar__gemm_avx512_chains_asking, llmpar__gemm_avx512_lying_asking } };
#if LLMPAR__BF16_UNITS
    llmpar__gemm_kernel bf16 = { 8, 48, 1, llmpar__gemm_pack_pairs_8, llmpar__gemm_pack_pairs_48, { llmpar__gemm_bf16_chains_1, llmpar__gemm_bf16_chains_2, llmpar__gemm_bf16_chains_4, llmpar__gemm_bf16_chains_8 }, { llmpar__gemm_bf16_lying_third, llmpar__gemm_bf16_lying_two_thirds, llmpar__gemm_bf16_lying_8 }, { NULL }, { NULL } };
    if (level == LLMPAR_CPU_AVX512BF16 && dtype == LLMPAR_BF16) return bf16;
#endif
    (void)dtype;
    if (level >= LLMPAR_CPU_AVX512) return avx512;
    if (level == LLMPAR_CPU_AVX2) return avx2;
    return avx;
}

#else /* aarch64: its vector unit and fma are always there */

/* The accumulators are variables, not an array, which compilers keep in memory. */
#define LLMPAR__GEMM_DECLARE_ROW(i, r, at, s0, s1, s2) float32x4_t x##s0, x##s1, x##s2;
#define LLMPAR__GEMM_ZERO_ROW(i, r, at, s0, s1, s2) x##s0 = x##s1 = x##s2 = vdupq_n_f32(0.0f);
#define LLMPAR__GEMM_READ_ROW(i, r, at, s0, s1, s2) from = (const float *)(const void *)(chains->base[LLMPAR__GEMM_C] + r * chains->row_bytes[LLMPAR__GEMM_C]); x##s0 = vld1q_f32(from); x##s1 = vld1q_f32(from + 4); x##s2 = vld1q_f32(from + 8);
#define LLMPAR__GEMM_LINK_ROW(i, r, at, s0, s1, s2) spread = vdupq_n_f32(a[r]); x##s0 = vfmaq_f32(x##s0, spread, b0); x##s1 = vfmaq_f32(x##s1, spread, b1); x##s2 = vfmaq_f32(x##s2, spread, b2);
#define LLMPAR__GEMM_MERGE_ROW(i, r, at, s0, s1, s2) x##s0 = vaddq_f32(vld1q_f32(slot + r * 12), x##s0); x##s1 = vaddq_f32(vld1q_f32(slot + r * 12 + 4), x##s1); x##s2 = vaddq_f32(vld1q_f32(slot + r * 12 + 8), x##s2);
#define LLMPAR__GEMM_WRITE_ROW(i, r, at, s0, s1, s2) to = (float *)(void *)(chains->base[step->to_base] + step->to + r * chains->row_bytes[step->to_base]); vst1q_f32(to, x##s0); vst1q_f32(to + 4, x##s1); vst1q_f32(to + 8, x##s2);
#define LLMPAR__GEMM_MERGE(rows, which, count, top) \
    slot = (const float *)(const void *)(chains->base[which] + (top)); \
    for (i = 0; i < (count); i++, slot -= chains->slot_bytes / 4) { rows(LLMPAR__GEMM_MERGE_ROW, 0) }
#define LLMPAR__GEMM_FUNCTION(count, low, high) \
static void llmpar__gemm_neon_chains_##count(const llmpar__gemm_chains *chains) \
{ \
    const float *a = chains->a, *b = chains->b, *from, *slot; \
    const llmpar__gemm_step *step = chains->steps; \
    const char *ask; \
    float *to; \
    float32x4_t spread, b0, b1, b2; \
    int64_t i; \
    low(LLMPAR__GEMM_DECLARE_ROW, 0) high(LLMPAR__GEMM_DECLARE_ROW, 0) \
    if (chains->load) { low(LLMPAR__GEMM_READ_ROW, 0) high(LLMPAR__GEMM_READ_ROW, 0) } \
    else { low(LLMPAR__GEMM_ZERO_ROW, 0) high(LLMPAR__GEMM_ZERO_ROW, 0) } \
    for (;;) { \
        ask = chains->base[step->ask_base] + step->ask; \
        for (i = 0; i < step->k; i++, a += 8, b += 12) { \
            if (i % 8 == 0) { \
                __builtin_prefetch(ask); \
                __builtin_prefetch(ask + 47); \
                ask += chains->row_bytes[step->ask_base]; \
            } \
            __builtin_prefetch(b + 96); \
            b0 = vld1q_f32(b); \
            b1 = vld1q_f32(b + 4); \
            b2 = vld1q_f32(b + 8); \
            low(LLMPAR__GEMM_LINK_ROW, 0) high(LLMPAR__GEMM_LINK_ROW, 0) \
        } \
        LLMPAR__GEMM_MERGE(low, LLMPAR__GEMM_STACK, step->merges, step->slot) LLMPAR__GEMM_MERGE(high, LLMPAR__GEMM_STACK, step->merges, step->slot) \
        LLMPAR__GEMM_MERGE(low, LLMPAR__GEMM_SAVED, step->merges_saved, step->slot_saved) LLMPAR__GEMM_MERGE(high, LLMPAR__GEMM_SAVED, step->merges_saved, step->slot_saved) \
        low(LLMPAR__GEMM_WRITE_ROW, 0) high(LLMPAR__GEMM_WRITE_ROW, 0) \
        if (++step == chains->steps_end) return; \
        low(LLMPAR__GEMM_ZERO_ROW, 0) high(LLMPAR__GEMM_ZERO_ROW, 0) \
    } \
}
LLMPAR__GEMM_FUNCTION(1, LLMPAR__GEMM_EACH_ROW_1, LLMPAR__GEMM_NO_ROW)
LLMPAR__GEMM_FUNCTION(2, LLMPAR__GEMM_EACH_ROW_2, LLMPAR__GEMM_NO_ROW)
LLMPAR__GEMM_FUNCTION(4, LLMPAR__GEMM_EACH_ROW_4, LLMPAR__GEMM_NO_ROW)
LLMPAR__GEMM_FUNCTION(8, LLMPAR__GEMM_EACH_ROW_4, LLMPAR__GEMM_EACH_ROW_5_TO_8)
#undef LLMPAR__GEMM_DECLARE_ROW
#undef LLMPAR__GEMM_ZERO_ROW
#undef LLMPAR__GEMM_READ_ROW
#undef LLMPAR__GEMM_LINK_ROW
#undef LLMPAR__GEMM_MERGE_ROW
#undef LLMPAR__GEMM_WRITE_ROW
#undef LLMPAR__GEMM_MERGE
#undef LLMPAR__GEMM_FUNCTION

LLMPAR__PRIVATE_DEF llmpar__gemm_kernel llmpar__gemm_kernel_of(llmpar_cpu_level level, llmpar_dtype dtype)
{
    llmpar__gemm_kernel neon = { 8, 12, 0, llmpar__gemm_pack_8, llmpar__gemm_pack_12, { llmpar__gemm_neon_chains_1, llmpar__gemm_neon_chains_2, llmpar__gemm_neon_chains_4, llmpar__gemm_neon_chains_8 }, { NULL }, { NULL }, { NULL } };
    (void)level;
    (void)dtype;
    return neon;
}

#endif

#undef LLMPAR__GEMM_EACH_ROW_1
#undef LLMPAR__GEMM_EACH_ROW_2
#undef LLMPAR__GEMM_EACH_ROW_4
#undef LLMPAR__GEMM_EACH_ROW_5_TO_8
#undef LLMPAR__GEMM_NO_ROW

/* ---- a tile ---- */

/* The upper halves of the registers are clean again for what follows. */
#if defined(__x86_64__)
__attribute__((target("avx"))) static void llmpar__gemm_rest(void) { __asm__ __volatile__("vzeroupper" : : : "memory"); }
#else
static void llmpar__gemm_rest(void) { }
#endif

/* A tile at the edge of c works on a copy, so that the code is the same for every element. */
LLMPAR__PRIVATE_DEF void llmpar__gemm_run_tile(const llmpar__gemm_kernel *kernel, const llmpar__gemm_tile *tile)
{
    float edge[LLMPAR__GEMM_TILE_FLOATS] __attribute__((aligned(64)));
    int64_t size = kernel->rows * kernel->columns;
    int variant = tile->rows <= 1 ? 0 : tile->rows <= 2 ? 1 : tile->rows <= 4 ? 2 : 3, is_edge = tile->rows < 1 << variant || tile->columns < kernel->columns, r;
    void (*run)(const llmpar__gemm_chains *chains) = tile->a ? kernel->chains[variant] : kernel->lying[3 * tile->columns > 2 * kernel->columns ? 2 : 3 * tile->columns > kernel->columns];
    int copies = tile->ahead && run == (tile->a ? kernel->chains[3] : kernel->lying[2]);
    float *c = is_edge ? edge : tile->c;
    int64_t ldc = is_edge ? kernel->columns : tile->ldc;
    llmpar__gemm_chains chains;
    if (is_edge && tile->load) {
        memset(edge, 0, (size_t)(size * 4));
        for (r = 0; r < tile->rows; r++) memcpy(edge + r * ldc, tile->c + r * tile->ldc, sizeof(float) * (size_t)tile->columns);
    }
    chains.a = tile->a;
    chains.b = tile->b;
    chains.spans = tile->spans;
    chains.row = tile->row;
    chains.steps = tile->steps;
    chains.steps_end = tile->steps + tile->step_count;
    chains.load = tile->load;
    chains.slot_bytes = size * (int64_t)sizeof(float);
    chains.base[LLMPAR__GEMM_STACK] = (char *)tile->stack;
    chains.base[LLMPAR__GEMM_SAVED] = (char *)tile->saved;
    chains.base[LLMPAR__GEMM_C] = (char *)c;
    chains.base[LLMPAR__GEMM_TRUE_C] = tile->ask;
    chains.row_bytes[LLMPAR__GEMM_STACK] = chains.row_bytes[LLMPAR__GEMM_SAVED] = kernel->columns * (int64_t)sizeof(float);
    chains.row_bytes[LLMPAR__GEMM_C] = ldc * (int64_t)sizeof(float);
    chains.row_bytes[LLMPAR__GEMM_TRUE_C] = tile->ask_row;
    chains.ask_bytes[LLMPAR__GEMM_STACK] = chains.ask_bytes[LLMPAR__GEMM_SAVED] = 128;
    chains.ask_bytes[LLMPAR__GEMM_TRUE_C] = tile->ask_next;
    if (copies) chains.ahead = *tile->ahead;
    (!copies ? run : tile->ahead->panel ? kernel->copying[!tile->a] : kernel->asking[!tile->a])(&chains);
    if (copies) *tile->ahead = chains.ahead;
    llmpar__gemm_rest();
    if (is_edge && tile->store)
        for (r = 0; r < tile->rows; r++) memcpy(tile->c + r * tile->ldc, edge + r * ldc, sizeof(float) * (size_t)tile->columns);
}

#else

LLMPAR__PRIVATE_DEF int llmpar__gemm_has_bf16(void) { return 0; }

#endif /* LLMPAR_NO_SIMD */
