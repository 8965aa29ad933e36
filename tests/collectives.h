/* collectives: every collective of a communicator against a plain definition, bit for bit: collectives_check(comm, most) on every rank, counts up to `most`;
   collectives_here, collectives_below and collectives_splits are rank functions. Buffers are memory of the communicator's device, which the host need not reach. */
#ifndef COLLECTIVES_H
#define COLLECTIVES_H

#include "test.h"

static inline uint64_t mix(uint64_t x)
{
    x ^= x >> 30; x *= 0xbf58476d1ce4e5b9u; x ^= x >> 27; x *= 0x94d049bb133111ebu; x ^= x >> 31;
    return x;
}

/* Element i of rank r's send buffer. Magnitudes differ widely: another order of a sum gives other bits. */
static inline void element(void *out, llmpar_dtype dtype, int rank, size_t i)
{
    uint64_t h = mix((uint64_t)rank * 1000003u + i + 1);
    double value = ((double)(h >> 40) / 16777216.0 - 0.5) * (double)(1u << (h & 15));
    float f = (float)value;
    int64_t s = (int64_t)h >> 8;
    if (dtype == LLMPAR_F32) memcpy(out, &f, 4);
    else if (dtype == LLMPAR_F64) memcpy(out, &value, 8);
    else if (dtype == LLMPAR_I64) memcpy(out, &s, 8);
    else memcpy(out, &h, llmpar_dtype_size(dtype));
}

static inline void fill(void *buffer, llmpar_dtype dtype, int rank, size_t count)
{
    for (size_t i = 0; i < count; i++) element((char *)buffer + i * llmpar_dtype_size(dtype), dtype, rank, i);
}

/* Element i of the reduction over ranks [a, b). */
static inline void reduced(void *out, llmpar_dtype dtype, llmpar_reduce_op op, int a, int b, size_t i)
{
    if (b - a == 1) { element(out, dtype, a, i); return; }
    union { float f; double d; int64_t i; uint64_t u; } x, y;
    int split = 1;
    while (split * 2 < b - a) split *= 2;
    reduced(&x, dtype, op, a, a + split, i);
    reduced(&y, dtype, op, a + split, b, i);
    switch ((int)dtype) {
    case LLMPAR_F32: x.f = op == LLMPAR_MAX ? (y.f > x.f ? y.f : x.f) : x.f + y.f; memcpy(out, &x.f, 4); break;
    case LLMPAR_F64: x.d = op == LLMPAR_MAX ? (y.d > x.d ? y.d : x.d) : x.d + y.d; memcpy(out, &x.d, 8); break;
    case LLMPAR_I64: if (op == LLMPAR_MAX) x.i = y.i > x.i ? y.i : x.i; else x.u += y.u; memcpy(out, &x.i, 8); break;
    default: x.u += y.u; memcpy(out, &x.u, 8); break;
    }
}

/* A buffer of the device, and what the host knows of it: the same memory where the host can reach it. */
typedef struct mirror { char *host, *device; size_t bytes, off; void *memory; } mirror;

static inline mirror mirror_create(llmpar_comm *comm, size_t bytes, size_t off)
{
    mirror m = { (char *)malloc(bytes + 1), NULL, bytes, off, NULL };
    if (!llmpar_device_apart(comm->device)) m.device = m.host;
    else {
        CHECK_OK(comm->device->alloc(comm->device, bytes + off, &m.memory));
        m.device = (char *)m.memory + off;
    }
    return m;
}
static inline void mirror_destroy(llmpar_comm *comm, mirror *m)
{
    if (m->memory) comm->device->free(comm->device, m->memory, m->bytes + m->off);
    free(m->host);
}
/* To and from the device, in the stream's order. */
static inline void mirror_put(llmpar_comm *comm, llmpar_stream *stream, mirror *m, size_t bytes) { if (m->memory) CHECK_OK(comm->device->copy(comm->device, stream, m->device, m->host, bytes)); }
static inline void mirror_get(llmpar_comm *comm, llmpar_stream *stream, mirror *m, size_t bytes)
{
    if (m->memory) CHECK_OK(comm->device->copy(comm->device, stream, m->host, m->device, bytes));
    if (stream) CHECK_OK(comm->device->synchronize(comm->device, stream));
}

typedef struct sample { size_t count, blocks; llmpar_dtype dtype; llmpar_reduce_op op; int in_place; llmpar_stream *stream; size_t off; /* of the device's buffers, bytes */ } sample;

static inline llmpar_status one_sample(llmpar_comm *comm, const sample *s)
{
    size_t item = llmpar_dtype_size(s->dtype), n = (size_t)comm->ranks, r = (size_t)comm->rank, blocks = s->blocks ? s->blocks : 1, part = s->count * blocks;
    mirror send = mirror_create(comm, part * n * item, s->off), recv = mirror_create(comm, part * n * item, s->off);
    char *want = (char *)malloc(part * n * item + 1);
    llmpar_collective call = { .send = send.device, .recv = recv.device, .count = s->count, .blocks = s->blocks, .dtype = s->dtype, .op = s->op, .tag = "sample" };
    llmpar_status st = LLMPAR_OK;
    int reducible = s->dtype == LLMPAR_F32 || s->dtype == LLMPAR_F64 || s->dtype == LLMPAR_I64 || (s->dtype == LLMPAR_U64 && s->op == LLMPAR_SUM);

    /* all_gather */
    if (!s->in_place || blocks == 1) {
        memset(recv.host, 0x55, part * n * item);
        fill(send.host, s->dtype, (int)r, part);
        if (s->in_place) { memcpy(recv.host + r * part * item, send.host, part * item); call.send = recv.device + r * part * item; }
        mirror_put(comm, s->stream, &send, part * item);
        mirror_put(comm, s->stream, &recv, part * n * item);
        st = llmpar_all_gather(comm, s->stream, &call);
        mirror_get(comm, s->stream, &recv, part * n * item);
        for (size_t b = 0; b < blocks; b++)
            for (size_t i = 0; i < n; i++)
                for (size_t e = 0; e < s->count; e++) element(want + ((b * n + i) * s->count + e) * item, s->dtype, (int)i, b * s->count + e);
        CHECK_BYTES(recv.host, want, part * n * item);
    }
    /* reduce_scatter */
    if (!st && reducible && (!s->in_place || blocks == 1)) {
        mirror *out = s->in_place ? &send : &recv;
        size_t at = s->in_place ? r * part * item : 0;
        fill(send.host, s->dtype, (int)r, part * n);
        mirror_put(comm, s->stream, &send, part * n * item);
        call.send = send.device;
        call.recv = out->device + at;
        st = llmpar_reduce_scatter(comm, s->stream, &call);
        mirror_get(comm, s->stream, out, s->in_place ? part * n * item : part * item);
        for (size_t b = 0; b < blocks; b++)
            for (size_t e = 0; e < s->count; e++) reduced(want + (b * s->count + e) * item, s->dtype, s->op, 0, (int)n, (b * n + r) * s->count + e);
        CHECK_BYTES(out->host + at, want, part * item);
    }
    /* all_reduce */
    if (!st && reducible) {
        mirror *out = s->in_place ? &send : &recv;
        memset(recv.host, 0x55, part * item);
        fill(send.host, s->dtype, (int)r, part);
        mirror_put(comm, s->stream, &recv, part * item);
        mirror_put(comm, s->stream, &send, part * item);
        call.send = send.device;
        call.recv = out->device;
        st = llmpar_all_reduce(comm, s->stream, &call);
        mirror_get(comm, s->stream, out, part * item);
        for (size_t e = 0; e < part; e++) reduced(want + e * item, s->dtype, s->op, 0, (int)n, e);
        CHECK_BYTES(out->host, want, part * item);
        if (!s->in_place) {
            mirror_get(comm, s->stream, &send, part * item);
            fill(want, s->dtype, (int)r, part);
            CHECK_BYTES(send.host, want, part * item); /* the input is left alone */
        }
    }
    /* broadcast from every root */
    for (int root = 0; !st && root < (int)n; root++) {
        mirror *out = (int)r == root ? &send : &recv;
        fill(send.host, s->dtype, (int)r, part);
        memset(recv.host, 0x55, part * item);
        mirror_put(comm, s->stream, &send, part * item);
        mirror_put(comm, s->stream, &recv, part * item);
        call.recv = (int)r == root ? (s->in_place ? send.device : NULL) : recv.device;
        call.send = (int)r == root ? send.device : s->in_place ? recv.device : NULL;
        call.root = root;
        st = llmpar_broadcast(comm, s->stream, &call);
        mirror_get(comm, s->stream, out, part * item);
        fill(want, s->dtype, root, part);
        CHECK_BYTES(out->host, want, part * item);
    }
    call.root = 0;
    /* all_to_all */
    if (!st && !s->in_place) {
        fill(send.host, s->dtype, (int)r, part * n);
        mirror_put(comm, s->stream, &send, part * n * item);
        call.send = send.device;
        call.recv = recv.device;
        st = llmpar_all_to_all(comm, s->stream, &call);
        mirror_get(comm, s->stream, &recv, part * n * item);
        for (size_t b = 0; b < blocks; b++)
            for (size_t i = 0; i < n; i++)
                for (size_t e = 0; e < s->count; e++) element(want + ((b * n + i) * s->count + e) * item, s->dtype, (int)i, (b * n + r) * s->count + e);
        CHECK_BYTES(recv.host, want, part * n * item);
    }
    /* a ring of messages: the even ranks send first */
    if (!st && n > 1) {
        int next = (int)((r + 1) % n), previous = (int)((r + n - 1) % n);
        fill(send.host, s->dtype, (int)r, part);
        memset(recv.host, 0x55, part * item);
        mirror_put(comm, s->stream, &send, part * item);
        mirror_put(comm, s->stream, &recv, part * item);
        call.send = send.device;
        call.recv = recv.device;
        for (int phase = 0; phase < 2 && !st; phase++) {
            int sends = (r == n - 1 && n % 2) ? phase == 1 : (int)(r % 2) == phase; /* of an odd ring the last rank receives first */
            call.peer = sends ? next : previous;
            st = sends ? llmpar_send(comm, s->stream, &call) : llmpar_recv(comm, s->stream, &call);
        }
        mirror_get(comm, s->stream, &recv, part * item);
        fill(want, s->dtype, previous, part);
        CHECK_BYTES(recv.host, want, part * item);
    }
    mirror_destroy(comm, &send);
    mirror_destroy(comm, &recv);
    free(want);
    return st;
}

static inline llmpar_status collectives_check(llmpar_comm *comm, size_t most)
{
    static const size_t counts[] = { 0, 1, 7, 64, 513, 20011 };
    static const llmpar_dtype dtypes[] = { LLMPAR_F32, LLMPAR_F64, LLMPAR_I64, LLMPAR_U64, LLMPAR_BF16, LLMPAR_U8, LLMPAR_I32 };
    llmpar_status st = LLMPAR_OK;
    llmpar_stream *stream = NULL; /* of memory apart: a stream in every other case */
    if (llmpar_device_apart(comm->device)) CHECK_OK(comm->device->stream_create(comm->device, "samples", &stream));
    for (size_t c = 0; c < sizeof counts / sizeof counts[0] && counts[c] <= most; c++)
        for (size_t d = 0; d < sizeof dtypes / sizeof dtypes[0]; d++)
            for (int v = 0; v < 6 && !st; v++) {
                sample s = { counts[c], v < 2 ? 0 : v < 4 ? 1 : 3, dtypes[d], v & 1 ? LLMPAR_MAX : LLMPAR_SUM, v == 2 || v == 3, (c + d + (size_t)v) % 2 ? stream : NULL, (c + (size_t)v) % 3 ? 0 : llmpar_dtype_size(dtypes[d]) };
                if (s.count > 1000 && (d || v > 2 || comm->ranks > 3)) continue; /* the others only need to cross the size of a slot */
                if (s.count > 500 && d > 2 && comm->ranks > 4) continue;
                st = one_sample(comm, &s);
            }
    if (stream) comm->device->stream_destroy(comm->device, stream);
    return st;
}

/* Rank functions; user: size_t, the largest count. On the world, and on communicators of every size with the ranks turned round. */
static inline llmpar_status collectives_here(llmpar_ctx *ctx, void *user) { return collectives_check(ctx->comm, *(size_t *)user); }
static inline llmpar_status collectives_below(llmpar_ctx *ctx, void *user)
{
    llmpar_status st = LLMPAR_OK;
    for (int size = 1; size < ctx->world && !st; size++) {
        llmpar_comm *comm = NULL;
        st = llmpar_comm_split(ctx->comm, ctx->rank < size ? 0 : 1, -ctx->rank, "part", &comm);
        if (!st) CHECK_INT(comm->ranks, ctx->rank < size ? size : ctx->world - size);
        if (!st) st = collectives_check(comm, *(size_t *)user);
        llmpar_comm_destroy(comm);
    }
    return st;
}

/* A rank function: splits by rows, by columns, without the first rank and of a split, used in turn. */
static inline llmpar_status collectives_splits(llmpar_ctx *ctx, void *user)
{
    (void)user;
    int r = ctx->rank, n = ctx->world;
    llmpar_comm *rows = NULL, *columns = NULL, *half = NULL;
    CHECK_OK(llmpar_comm_split(ctx->comm, r / 2, -r, "rows", &rows)); /* keys downwards: the order is turned round */
    CHECK_OK(llmpar_comm_split(ctx->comm, r % 2, 0, "columns", &columns));
    CHECK_OK(llmpar_comm_split(ctx->comm, r == 0 ? -1 : 7, 0, "all but the first", &half));
    CHECK(rows && columns);
    CHECK((half == NULL) == (r == 0));
    if (!rows || !columns) return LLMPAR_ERR_INTERNAL;
    int members = r / 2 * 2 + 1 < n ? 2 : 1;
    CHECK_INT(rows->ranks, members);
    CHECK_INT(rows->rank, members == 1 ? 0 : 1 - r % 2);
    CHECK_INT(columns->rank, r / 2);
    CHECK_TEXT(columns->axis, "columns");
    double x = (double)(1 << r), want = 0;
    mirror send = mirror_create(ctx->comm, 8, 0), recv = mirror_create(ctx->comm, 8, 0);
    memcpy(send.host, &x, 8);
    mirror_put(ctx->comm, NULL, &send, 8);
    llmpar_collective call = { .send = send.device, .recv = recv.device, .count = 1, .dtype = LLMPAR_F64, .tag = "sum" };
    for (int round = 0; round < 3; round++) {
        CHECK_OK(llmpar_all_reduce(columns, NULL, &call));
        want = 0;
        for (int i = r % 2; i < n; i += 2) want += (double)(1 << i);
        mirror_get(ctx->comm, NULL, &recv, 8);
        CHECK_BYTES(recv.host, &want, 8);
        if (half) {
            double rest = (double)((1 << n) - 2);
            CHECK_OK(llmpar_all_reduce(half, NULL, &call));
            mirror_get(ctx->comm, NULL, &recv, 8);
            CHECK_BYTES(recv.host, &rest, 8);
        }
        double pair = (double)(1 << r) + (members == 2 ? (double)(1 << (r ^ 1)) : 0);
        CHECK_OK(llmpar_all_reduce(rows, NULL, &call));
        mirror_get(ctx->comm, NULL, &recv, 8);
        CHECK_BYTES(recv.host, &pair, 8);
    }
    llmpar_comm *again = NULL;
    CHECK_OK(llmpar_comm_split(columns, 0, 0, "again", &again));
    llmpar_comm_destroy(columns);
    CHECK_OK(llmpar_all_reduce(again, NULL, &call));
    mirror_get(ctx->comm, NULL, &recv, 8);
    CHECK_BYTES(recv.host, &want, 8);
    mirror_destroy(ctx->comm, &send);
    mirror_destroy(ctx->comm, &recv);
    llmpar_comm_destroy(again);
    llmpar_comm_destroy(rows);
    llmpar_comm_destroy(half);
    return LLMPAR_OK;
}

#endif
