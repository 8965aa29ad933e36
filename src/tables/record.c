/* record: descriptions, fingerprints and the ring.

   ring: entry of call `id` (1, 2, ..) stands at id % 256:   | 257 | 258 | 3 | 4 | .. | 255 | 256 |      next id 259: the oldest is 3
   A mark for an id that has been overwritten does nothing. */
#include "tables/record.h"

#include <sched.h>
#include <stdio.h>
#include <string.h>

#include "base/clock_internal.h"
#include "base/json.h"
#include "base/text_internal.h"

typedef struct llmpar__record_entry {
    llmpar_call call;
    uint64_t id, created_ns, started_ns, completed_ns; /* 0: not yet */
    int32_t group;
} llmpar__record_entry;

typedef struct llmpar__record_group {
    char axis[24];
    int32_t ranks, same_name; /* same_name: groups before it with this axis but other members */
    int32_t *world_rank;      /* [ranks] */
    uint64_t collectives, messages, enqueued, started, completed; /* numbers given; the last collective's in each state */
} llmpar__record_group;

struct llmpar_record {
    llmpar_heap *heap;
    int32_t rank;
    uint32_t lock;           /* atomic; of everything below */
    uint64_t timeout_ms, last_id, changed_ns;
    char where[48];
    llmpar_call last;        /* completed */
    llmpar__record_group *groups;
    int32_t group_count, group_capacity;
    llmpar__record_entry entry[LLMPAR_RECORD_ENTRIES];
};

/* ---- texts ---- */

LLMPAR_DEF const char *llmpar_call_op_name(llmpar_call_op op)
{
    static const char *const names[] = { "no collective", "barrier", "all_gather", "reduce_scatter", "all_reduce", "broadcast", "all_to_all", "send", "recv", "split" };
    return (unsigned)op < sizeof names / sizeof names[0] ? names[op] : "?";
}

static int llmpar__record_message(const llmpar_call *call) { return call->op == LLMPAR_CALL_SEND || call->op == LLMPAR_CALL_RECV; }

static void llmpar__record_put_call(llmpar__text *out, const llmpar_call *call)
{
    llmpar__text_put(out, "%s", llmpar_call_op_name((llmpar_call_op)call->op));
    if (call->op == LLMPAR_CALL_NONE) return;
    if (call->op == LLMPAR_CALL_REDUCE_SCATTER || call->op == LLMPAR_CALL_ALL_REDUCE) llmpar__text_put(out, call->reduce == LLMPAR_MAX ? " max" : " sum");
    if (call->blocks > 1) llmpar__text_put(out, " %s[%llu x %llu]", llmpar_dtype_name((llmpar_dtype)call->dtype), (unsigned long long)call->blocks, (unsigned long long)call->count);
    else if (call->blocks) llmpar__text_put(out, " %s[%llu]", llmpar_dtype_name((llmpar_dtype)call->dtype), (unsigned long long)call->count);
    if (call->op == LLMPAR_CALL_BROADCAST) llmpar__text_put(out, " from root %d", (int)call->root);
    if (call->op == LLMPAR_CALL_SEND) llmpar__text_put(out, " to %d", (int)call->peer);
    if (call->op == LLMPAR_CALL_RECV) llmpar__text_put(out, " from %d", (int)call->peer);
    llmpar__text_put(out, " \"%s\"", call->tag);
    if (call->number) llmpar__text_put(out, " (%s %llu on %s)", llmpar__record_message(call) ? "message" : "call", (unsigned long long)call->number, call->axis);
    else llmpar__text_put(out, " (on %s)", call->axis);
}

LLMPAR_DEF size_t llmpar_call_print(const llmpar_call *call, char *text, size_t capacity)
{
    llmpar__text out = llmpar__text_begin(text, capacity);
    llmpar__record_put_call(&out, call);
    return out.used;
}

static uint64_t llmpar__record_mix(uint64_t hash, uint64_t word)
{
    hash = (hash ^ word) * 0x9e3779b97f4a7c15u;
    return hash ^ (hash >> 29);
}

LLMPAR_DEF uint64_t llmpar_call_fingerprint(const llmpar_call *call)
{
    uint64_t axis[3], hash = 0x243f6a8885a308d3u;
    int message = llmpar__record_message(call), sends = call->op == LLMPAR_CALL_SEND;
    memcpy(axis, call->axis, sizeof axis);
    hash = llmpar__record_mix(hash, (uint64_t)(uint32_t)(message ? (int32_t)LLMPAR_CALL_SEND : call->op) << 32 | (uint32_t)call->dtype);
    hash = llmpar__record_mix(hash, (uint64_t)(uint32_t)call->reduce << 32 | (uint32_t)call->root);
    if (message) hash = llmpar__record_mix(hash, (uint64_t)(uint32_t)(sends ? call->member : call->peer) << 32 | (uint32_t)(sends ? call->peer : call->member));
    else hash = llmpar__record_mix(hash, call->number);
    hash = llmpar__record_mix(hash, call->count);
    hash = llmpar__record_mix(hash, call->blocks);
    hash = llmpar__record_mix(hash, call->tag_bits);
    for (int i = 0; i < 3; i++) hash = llmpar__record_mix(hash, axis[i]);
    return hash;
}

LLMPAR_DEF size_t llmpar_call_mismatch(const llmpar_call *a, const llmpar_call *b, char *text, size_t capacity)
{
    const llmpar_call *side[2] = { a, b };
    llmpar__text out = llmpar__text_begin(text, capacity);
    int fields = 0, messages = llmpar__record_message(a) && llmpar__record_message(b), differ[9];
    static const char *const name[9] = { "axis", "op", "order", "dtype", "count", "blocks", "root", "reduce op", "tag" };
    differ[0] = memcmp(a->axis, b->axis, sizeof a->axis) != 0;
    differ[1] = !messages && a->op != b->op;
    differ[2] = messages ? (a->op == b->op || a->member != b->peer || a->peer != b->member) : !llmpar__record_message(a) && !llmpar__record_message(b) && a->number != b->number;
    differ[3] = a->dtype != b->dtype;
    differ[4] = a->count != b->count;
    differ[5] = a->blocks != b->blocks;
    differ[6] = a->root != b->root;
    differ[7] = a->reduce != b->reduce;
    differ[8] = a->tag_bits != b->tag_bits;
    llmpar__text_put(&out, "the ranks of %s disagree in", a->axis);
    for (int i = 0; i < 9; i++)
        if (differ[i]) llmpar__text_put(&out, "%s%s", fields++ ? ", " : " ", name[i]);
    for (int i = 0; i < 2; i++) {
        llmpar__text_put(&out, "%srank %d%s%s%s: ", i ? "; " : ": ", (int)side[i]->rank, side[i]->where[0] ? " (" : "", side[i]->where, side[i]->where[0] ? ")" : "");
        llmpar__record_put_call(&out, side[i]);
    }
    return out.used;
}

/* What is alike for ranks that are reported together: the two ends of a message, which have one fingerprint, are not. */
static uint64_t llmpar__record_situation(const llmpar_position *p)
{
    uint64_t ends = llmpar__record_mix((uint64_t)(uint32_t)p->now.op << 32 | (uint32_t)p->last.op, (uint64_t)(uint32_t)p->state);
    return llmpar__record_mix(llmpar__record_mix(ends, llmpar_call_fingerprint(&p->now)), llmpar_call_fingerprint(&p->last));
}

LLMPAR_DEF size_t llmpar_position_print(llmpar_position_fn get, void *user, int32_t ranks, char *text, size_t capacity)
{
    enum { SITUATIONS = 24, NAMED = 12 };
    static const char *const states[] = { "outside", "in ", "has returned", "unknown" };
    uint64_t seen[SITUATIONS];
    int count = 0;
    llmpar__text out = llmpar__text_begin(text, capacity);
    llmpar_position p, q;
    for (int inside = 0; inside < 2; inside++)
        for (int32_t i = 0; i < ranks; i++) {
            get(user, i, &p);
            if ((p.state == LLMPAR_POSITION_INSIDE) != inside) continue;
            uint64_t key = llmpar__record_situation(&p);
            int k = 0;
            while (k < count && seen[k] != key) k++;
            if (k < count) continue;
            if (count == SITUATIONS) {
                llmpar__text_put(&out, "; ...");
                return out.used;
            }
            seen[count++] = key;
            int32_t alike = 1, named = 1;
            for (int32_t j = i + 1; j < ranks; j++) {
                get(user, j, &q);
                alike += llmpar__record_situation(&q) == key;
            }
            llmpar__text_put(&out, "%s%s %d%s%s%s", count > 1 ? "; " : "", alike > 1 ? "ranks" : "rank", (int)p.rank, p.where[0] ? " (" : "", p.where, p.where[0] ? ")" : "");
            for (int32_t j = i + 1; j < ranks && named < alike && named < NAMED; j++) {
                get(user, j, &q);
                if (llmpar__record_situation(&q) != key) continue;
                llmpar__text_put(&out, " %d%s%s%s", (int)q.rank, q.where[0] && alike <= 4 ? " (" : "", alike <= 4 ? q.where : "", q.where[0] && alike <= 4 ? ")" : "");
                named++;
            }
            if (named < alike) llmpar__text_put(&out, " and %d more", (int)(alike - named));
            llmpar__text_put(&out, ": %s", states[p.state]);
            if (p.state == LLMPAR_POSITION_INSIDE) llmpar__record_put_call(&out, &p.now);
            llmpar__text_put(&out, p.last.op == LLMPAR_CALL_NONE ? ", completed none" : ", last completed ");
            if (p.last.op != LLMPAR_CALL_NONE) llmpar__record_put_call(&out, &p.last);
        }
    return out.used;
}

/* ---- the ring ---- */

static void llmpar__record_lock(llmpar_record *record)
{
    while (__atomic_exchange_n(&record->lock, 1u, __ATOMIC_ACQUIRE)) sched_yield();
}
static void llmpar__record_unlock(llmpar_record *record) { __atomic_store_n(&record->lock, 0u, __ATOMIC_RELEASE); }

static uint64_t llmpar__record_now(void) { return llmpar__clock_ns(CLOCK_REALTIME); } /* the dumps of several machines are read together */

LLMPAR_DEF llmpar_status llmpar_record_create(llmpar_heap *heap, int32_t rank, uint64_t timeout_ms, llmpar_record **out)
{
    llmpar_record *record = *out = LLMPAR__ZALLOC(llmpar_record, heap, 1);
    if (!record) return LLMPAR_ERR_MEMORY;
    record->heap = heap;
    record->rank = rank;
    record->timeout_ms = timeout_ms;
    record->changed_ns = llmpar__record_now();
    return LLMPAR_OK;
}

LLMPAR_DEF void llmpar_record_destroy(llmpar_record *record)
{
    if (!record) return;
    for (int32_t i = 0; i < record->group_count; i++) llmpar_heap_free(record->heap, record->groups[i].world_rank);
    llmpar_heap_free(record->heap, record->groups);
    llmpar_heap_free(record->heap, record);
}

LLMPAR_DEF llmpar_status llmpar_record_attach(llmpar_record *record, llmpar_comm *comm, const int32_t *world_rank)
{
    size_t n = (size_t)comm->ranks, length = strlen(comm->axis);
    char axis[sizeof record->groups->axis];
    int32_t same_name = 0;
    memset(axis, 0, sizeof axis);
    memcpy(axis, comm->axis, length < sizeof axis ? length : sizeof axis - 1);
    for (int32_t i = 0; i < record->group_count; i++) {
        llmpar__record_group *g = &record->groups[i];
        if (memcmp(g->axis, axis, sizeof axis)) continue;
        if (g->ranks == comm->ranks && !memcmp(g->world_rank, world_rank, n * sizeof *world_rank)) {
            comm->record = record;
            comm->group = i;
            return LLMPAR_OK;
        }
        same_name++;
    }
    int32_t *members = LLMPAR__ALLOC(int32_t, record->heap, n);
    llmpar__record_group *grown = NULL, *old = record->groups;
    int32_t capacity = record->group_capacity;
    if (members && record->group_count == capacity) {
        capacity = capacity ? 2 * capacity : 8;
        grown = LLMPAR__ZALLOC(llmpar__record_group, record->heap, (size_t)capacity);
    }
    if (!members || (record->group_count == record->group_capacity && !grown)) {
        llmpar_heap_free(record->heap, members);
        return LLMPAR_ERR_MEMORY;
    }
    memcpy(members, world_rank, n * sizeof *members);
    llmpar__record_lock(record);
    if (grown) {
        if (old) memcpy(grown, old, (size_t)record->group_count * sizeof *grown);
        record->groups = grown;
        record->group_capacity = capacity;
    }
    llmpar__record_group *g = &record->groups[record->group_count];
    memset(g, 0, sizeof *g);
    memcpy(g->axis, axis, sizeof axis);
    g->ranks = comm->ranks;
    g->same_name = same_name;
    g->world_rank = members;
    comm->record = record;
    comm->group = record->group_count++;
    llmpar__record_unlock(record);
    if (grown) llmpar_heap_free(record->heap, old);
    return LLMPAR_OK;
}

LLMPAR_DEF uint64_t llmpar_record_begin(llmpar_record *record, int32_t group, llmpar_call *call)
{
    uint64_t now = llmpar__record_now();
    llmpar__record_lock(record);
    llmpar__record_group *g = &record->groups[group];
    uint64_t id = ++record->last_id;
    llmpar__record_entry *e = &record->entry[id % LLMPAR_RECORD_ENTRIES];
    call->rank = record->rank;
    call->number = llmpar__record_message(call) ? ++g->messages : ++g->collectives;
    if (!llmpar__record_message(call)) g->enqueued = call->number;
    if (call->where[0]) memcpy(record->where, call->where, sizeof record->where);
    e->call = *call;
    e->id = id;
    e->created_ns = record->changed_ns = now;
    e->started_ns = e->completed_ns = 0;
    e->group = group;
    llmpar__record_unlock(record);
    return id;
}

static void llmpar__record_mark(llmpar_record *record, uint64_t id, int completed)
{
    uint64_t now = llmpar__record_now();
    llmpar__record_lock(record);
    llmpar__record_entry *e = &record->entry[id % LLMPAR_RECORD_ENTRIES];
    record->changed_ns = now;
    if (e->id == id) {
        llmpar__record_group *g = &record->groups[e->group];
        if (completed) {
            e->completed_ns = now;
            record->last = e->call;
        } else {
            e->started_ns = now;
        }
        if (!llmpar__record_message(&e->call)) *(completed ? &g->completed : &g->started) = e->call.number;
    }
    llmpar__record_unlock(record);
}

LLMPAR_DEF void llmpar_record_started(llmpar_record *record, uint64_t id) { llmpar__record_mark(record, id, 0); }
LLMPAR_DEF void llmpar_record_completed(llmpar_record *record, uint64_t id) { llmpar__record_mark(record, id, 1); }

static uint64_t llmpar__record_oldest(const llmpar_record *record)
{
    return record->last_id < LLMPAR_RECORD_ENTRIES ? 1 : record->last_id - LLMPAR_RECORD_ENTRIES + 1;
}

LLMPAR_DEF void llmpar_record_position(llmpar_record *record, llmpar_position *out)
{
    memset(out, 0, sizeof *out);
    llmpar__record_lock(record);
    out->rank = record->rank;
    out->time_ns = record->changed_ns;
    memcpy(out->where, record->where, sizeof out->where);
    out->last = record->last;
    for (uint64_t id = record->last_id; id >= llmpar__record_oldest(record) && id; id--) {
        const llmpar__record_entry *e = &record->entry[id % LLMPAR_RECORD_ENTRIES];
        if (!e->started_ns || e->completed_ns) continue;
        out->state = LLMPAR_POSITION_INSIDE;
        out->now = e->call;
        break;
    }
    llmpar__record_unlock(record);
}

/* ---- the dump ---- */

static const char *llmpar__record_torch_dtype(int32_t dtype)
{
    switch (dtype) {
    case LLMPAR_F32: return "Float";
    case LLMPAR_F64: return "Double";
    case LLMPAR_BF16: return "BFloat16";
    case LLMPAR_F16: return "Half";
    case LLMPAR_I32: return "Int";
    case LLMPAR_I64: return "Long";
    case LLMPAR_U64: return "UInt64";
    default: return "Byte";
    }
}

/* "tp", of which the axis is "tp"; the second communicator of that name with other members is "tp.1". As JSON. */
static void llmpar__record_group_name(const llmpar__record_group *g, char name[320], char axis[160])
{
    char group[48];
    if (g->same_name) snprintf(group, sizeof group, "%s.%d", g->axis, (int)g->same_name);
    else snprintf(group, sizeof group, "%s", g->axis);
    llmpar_json_escape(group, strlen(group), name, 320);
    llmpar_json_escape(g->axis, strlen(g->axis), axis, 160);
}

static void llmpar__record_json_entry(const llmpar_record *record, const llmpar__record_entry *e, llmpar__text *json)
{
    const llmpar_call *c = &e->call;
    const llmpar__record_group *g = &record->groups[e->group];
    char name[320], axis[160], tag[400], where[32] = "", started[24] = "null", completed[24] = "null", duration[48] = "";
    uint64_t part = c->count * c->blocks, all = part * (uint64_t)c->members, in = part, out = part;
    if (c->op == LLMPAR_CALL_ALL_GATHER) out = all;
    if (c->op == LLMPAR_CALL_REDUCE_SCATTER) in = all;
    if (c->op == LLMPAR_CALL_ALL_TO_ALL) in = out = all;
    llmpar__record_group_name(g, name, axis);
    llmpar_json_escape(c->tag, strlen(c->tag), tag, sizeof tag);
    if (c->op == LLMPAR_CALL_SEND) snprintf(where, sizeof where, " %d->%d", (int)c->member, (int)c->peer);
    if (c->op == LLMPAR_CALL_RECV) snprintf(where, sizeof where, " %d<-%d", (int)c->member, (int)c->peer);
    if (e->started_ns) snprintf(started, sizeof started, "%llu", (unsigned long long)e->started_ns);
    if (e->completed_ns) snprintf(completed, sizeof completed, "%llu", (unsigned long long)e->completed_ns);
    if (e->completed_ns && e->started_ns) snprintf(duration, sizeof duration, "\"duration_ms\": %.6f, ", 1e-6 * (double)(int64_t)(e->completed_ns - e->started_ns));
    llmpar__text_put(json, "  {\"record_id\": %llu, \"pg_id\": %d, \"process_group\": [%s, %s], \"collective_seq_id\": %llu, \"p2p_seq_id\": %llu, \"op_id\": %llu, \"profiling_name\": \"llmpar:%s%s\", ",
                          (unsigned long long)(e->id - 1), (int)e->group, name, axis, (unsigned long long)(llmpar__record_message(c) ? 0 : c->number),
                          (unsigned long long)(llmpar__record_message(c) ? c->number : 0), (unsigned long long)e->id, llmpar_call_op_name((llmpar_call_op)c->op), where);
    llmpar__text_put(json, "\"time_created_ns\": %llu, %s\"input_sizes\": [[%llu]], \"input_dtypes\": [\"%s\"], \"output_sizes\": [[%llu]], \"output_dtypes\": [\"%s\"], ",
                          (unsigned long long)e->created_ns, duration, (unsigned long long)in, llmpar__record_torch_dtype(c->dtype), (unsigned long long)out, llmpar__record_torch_dtype(c->dtype));
    llmpar__text_put(json, "\"state\": \"%s\", \"time_discovered_started_ns\": %s, \"time_discovered_completed_ns\": %s, \"retired\": %s, \"timeout_ms\": %llu, \"is_p2p\": %s, "
                          "\"root\": %d, \"reduce_op\": \"%s\", \"frames\": [{\"name\": %s, \"filename\": \"\", \"line\": 0}]}",
                          e->completed_ns ? "completed" : e->started_ns ? "started" : "scheduled", started, completed, e->completed_ns ? "true" : "false", (unsigned long long)record->timeout_ms,
                          llmpar__record_message(c) ? "true" : "false", (int)c->root, c->reduce == LLMPAR_MAX ? "max" : c->op == LLMPAR_CALL_ALL_REDUCE || c->op == LLMPAR_CALL_REDUCE_SCATTER ? "sum" : "", tag);
}

LLMPAR_DEF size_t llmpar_record_json(llmpar_record *record, char *text, size_t capacity)
{
    llmpar__text out = llmpar__text_begin(text, capacity);
    char name[320], axis[160], where[320];
    llmpar__record_lock(record);
    llmpar_json_escape(record->where, strlen(record->where), where, sizeof where);
    llmpar__text_put(&out, "{\n \"version\": \"2.10\",\n \"rank\": %d,\n \"where\": %s,\n \"pg_config\": {", (int)record->rank, where);
    for (int32_t i = 0; i < record->group_count; i++) {
        const llmpar__record_group *g = &record->groups[i];
        llmpar__record_group_name(g, name, axis);
        llmpar__text_put(&out, "%s\n  %s: {\"name\": %s, \"desc\": %s, \"ranks\": \"[", i ? "," : "", name, name, axis);
        for (int32_t k = 0; k < g->ranks; k++) llmpar__text_put(&out, "%s%d", k ? ", " : "", (int)g->world_rank[k]);
        llmpar__text_put(&out, "]\"}");
    }
    llmpar__text_put(&out, "\n },\n \"pg_status\": {");
    for (int32_t i = 0; i < record->group_count; i++) {
        const llmpar__record_group *g = &record->groups[i];
        llmpar__text_put(&out, "%s\n  \"%d\": {\"last_enqueued_collective\": %llu, \"last_started_collective\": %llu, \"last_completed_collective\": %llu}", i ? "," : "", (int)i,
                              (unsigned long long)g->enqueued, (unsigned long long)g->started, (unsigned long long)g->completed);
    }
    llmpar__text_put(&out, "\n },\n \"entries\": [");
    for (uint64_t id = llmpar__record_oldest(record); id <= record->last_id; id++) {
        llmpar__text_put(&out, id == llmpar__record_oldest(record) ? "\n" : ",\n");
        llmpar__record_json_entry(record, &record->entry[id % LLMPAR_RECORD_ENTRIES], &out);
    }
    llmpar__text_put(&out, "\n ]\n}\n");
    llmpar__record_unlock(record);
    return out.used;
}
