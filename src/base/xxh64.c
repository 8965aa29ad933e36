#include "base/xxh64.h"

#include <string.h>

#define LLMPAR__XXH64_P1 0x9E3779B185EBCA87u
#define LLMPAR__XXH64_P2 0xC2B2AE3D27D4EB4Fu
#define LLMPAR__XXH64_P3 0x165667B19E3779F9u
#define LLMPAR__XXH64_P4 0x85EBCA77C2B2AE63u
#define LLMPAR__XXH64_P5 0x27D4EB2F165667C5u

static uint64_t llmpar__xxh64_rotate(uint64_t x, int bits) { return x << bits | x >> (64 - bits); }
static uint64_t llmpar__xxh64_round(uint64_t lane, uint64_t word) { return llmpar__xxh64_rotate(lane + word * LLMPAR__XXH64_P2, 31) * LLMPAR__XXH64_P1; }

static uint64_t llmpar__xxh64_word(const unsigned char *data) /* little-endian, as all our machines are */
{
    uint64_t word;
    memcpy(&word, data, sizeof word);
    return word;
}

static void llmpar__xxh64_stripes(llmpar_xxh64 *state, const unsigned char *data, size_t stripes)
{
    uint64_t a = state->lane[0], b = state->lane[1], c = state->lane[2], d = state->lane[3];
    for (; stripes; stripes--, data += 32) {
        a = llmpar__xxh64_round(a, llmpar__xxh64_word(data));
        b = llmpar__xxh64_round(b, llmpar__xxh64_word(data + 8));
        c = llmpar__xxh64_round(c, llmpar__xxh64_word(data + 16));
        d = llmpar__xxh64_round(d, llmpar__xxh64_word(data + 24));
    }
    state->lane[0] = a;
    state->lane[1] = b;
    state->lane[2] = c;
    state->lane[3] = d;
}

LLMPAR_DEF void llmpar_xxh64_begin(llmpar_xxh64 *state)
{
    memset(state, 0, sizeof *state);
    state->lane[0] = LLMPAR__XXH64_P1 + LLMPAR__XXH64_P2;
    state->lane[1] = LLMPAR__XXH64_P2;
    state->lane[3] = 0 - LLMPAR__XXH64_P1;
}

LLMPAR_DEF void llmpar_xxh64_add(llmpar_xxh64 *state, const void *data, size_t bytes)
{
    const unsigned char *at = (const unsigned char *)data;
    size_t used = (size_t)(state->bytes % 32), room = 32 - used;
    if (bytes == 0) return;
    state->bytes += bytes;
    if (bytes < room) {
        memcpy(state->rest + used, at, bytes);
        return;
    }
    if (used) {
        memcpy(state->rest + used, at, room);
        llmpar__xxh64_stripes(state, state->rest, 1);
        at += room;
        bytes -= room;
    }
    llmpar__xxh64_stripes(state, at, bytes / 32);
    memcpy(state->rest, at + bytes / 32 * 32, bytes % 32);
}

LLMPAR_DEF uint64_t llmpar_xxh64_end(const llmpar_xxh64 *state)
{
    const unsigned char *at = state->rest, *end = at + state->bytes % 32;
    uint64_t hash = LLMPAR__XXH64_P5;
    if (state->bytes >= 32) {
        static const int bits[4] = {1, 7, 12, 18};
        hash = 0;
        for (int i = 0; i < 4; i++) hash += llmpar__xxh64_rotate(state->lane[i], bits[i]);
        for (int i = 0; i < 4; i++) hash = (hash ^ llmpar__xxh64_round(0, state->lane[i])) * LLMPAR__XXH64_P1 + LLMPAR__XXH64_P4;
    }
    hash += state->bytes;
    for (; end - at >= 8; at += 8) hash = llmpar__xxh64_rotate(hash ^ llmpar__xxh64_round(0, llmpar__xxh64_word(at)), 27) * LLMPAR__XXH64_P1 + LLMPAR__XXH64_P4;
    if (end - at >= 4) {
        uint32_t word;
        memcpy(&word, at, sizeof word);
        hash = llmpar__xxh64_rotate(hash ^ word * LLMPAR__XXH64_P1, 23) * LLMPAR__XXH64_P2 + LLMPAR__XXH64_P3;
        at += 4;
    }
    for (; at < end; at++) hash = llmpar__xxh64_rotate(hash ^ *at * LLMPAR__XXH64_P5, 11) * LLMPAR__XXH64_P1;
    hash = (hash ^ hash >> 33) * LLMPAR__XXH64_P2;
    hash = (hash ^ hash >> 29) * LLMPAR__XXH64_P3;
    return hash ^ hash >> 32;
}

#undef LLMPAR__XXH64_P1
#undef LLMPAR__XXH64_P2
#undef LLMPAR__XXH64_P3
#undef LLMPAR__XXH64_P4
#undef LLMPAR__XXH64_P5
