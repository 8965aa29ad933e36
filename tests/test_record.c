/* The record: fingerprints and texts of calls, the ring of the last 256, and the dump. */
#include "test.h"

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

static llmpar_call sample(void)
{
    llmpar_call c;
    memset(&c, 0, sizeof c);
    c.op = LLMPAR_CALL_ALL_GATHER;
    c.count = 1024;
    c.blocks = 1;
    c.number = 17;
    c.tag_bits = 99;
    c.dtype = LLMPAR_F32;
    c.member = 1;
    c.members = 2;
    c.rank = 5;
    strcpy(c.axis, "tp");
    strcpy(c.where, "dp_shard=2 tp=1");
    strcpy(c.tag, "layers.3.wo/gather");
    return c;
}

#define DIFFERS(change) do { llmpar_call b = a; b.change; if (llmpar_call_fingerprint(&a) == llmpar_call_fingerprint(&b)) TEST_FAIL("the fingerprint does not see " #change); } while (0)
#define SAME(change) do { llmpar_call b = a; b.change; if (llmpar_call_fingerprint(&a) != llmpar_call_fingerprint(&b)) TEST_FAIL("the fingerprint differs with " #change); } while (0)

TEST(fingerprint)
{
    llmpar_call a = sample();
    DIFFERS(op = LLMPAR_CALL_ALL_TO_ALL);
    DIFFERS(dtype = LLMPAR_I32);
    DIFFERS(count = 1023);
    DIFFERS(count = 1024ull << 32);
    DIFFERS(blocks = 2);
    DIFFERS(number = 18);
    DIFFERS(root = 1);
    DIFFERS(reduce = LLMPAR_MAX);
    DIFFERS(tag_bits = 98);
    DIFFERS(axis[1] = 'q');
    DIFFERS(axis[17] = 'x');
    SAME(member = 0);
    SAME(rank = 4);
    SAME(peer = 3);
    SAME(where[0] = 'x');
    /* Neighbouring values of two fields do not cancel out. */
    for (int i = 0; i < 64; i++)
        for (int j = 0; j < 64; j++) {
            llmpar_call b = a;
            b.count ^= 1ull << i;
            b.number ^= 1ull << j;
            if (llmpar_call_fingerprint(&a) == llmpar_call_fingerprint(&b)) TEST_FAIL("count bit %d and number bit %d cancel out", i, j);
        }
    /* The two ends of a message belong together, and only they. */
    a.op = LLMPAR_CALL_SEND;
    a.peer = 0;
    llmpar_call b = a;
    b.op = LLMPAR_CALL_RECV;
    b.member = 0;
    b.peer = 1;
    b.number = 3;
    CHECK(llmpar_call_fingerprint(&a) == llmpar_call_fingerprint(&b));
    b.peer = 2;
    CHECK(llmpar_call_fingerprint(&a) != llmpar_call_fingerprint(&b));
    b.peer = 1;
    b.op = LLMPAR_CALL_SEND;
    CHECK(llmpar_call_fingerprint(&a) != llmpar_call_fingerprint(&b));
}

static void printed(const llmpar_call *c, const char *want)
{
    char text[300], cut[24];
    size_t bytes = llmpar_call_print(c, text, sizeof text);
    if (strcmp(text, want) || bytes != strlen(want)) TEST_FAIL("got \"%s\" (%zu bytes), want \"%s\"", text, bytes, want);
    memset(cut, 0x55, sizeof cut);
    CHECK_INT(llmpar_call_print(c, cut, 20), bytes);
    CHECK(!strncmp(cut, want, 19) && !cut[19] && cut[20] == 0x55);
    CHECK_INT(llmpar_call_print(c, NULL, 0), bytes);
}

TEST(texts)
{
    char text[600];
    llmpar_call a = sample(), b = sample();
    printed(&a, "all_gather f32[1024] \"layers.3.wo/gather\" (call 17 on tp)");
    a.op = LLMPAR_CALL_REDUCE_SCATTER;
    a.reduce = LLMPAR_MAX;
    a.blocks = 3;
    printed(&a, "reduce_scatter max f32[3 x 1024] \"layers.3.wo/gather\" (call 17 on tp)");
    b.rank = 4;
    strcpy(b.where, "dp_shard=2 tp=0");
    llmpar_call_mismatch(&b, &a, text, sizeof text);
    CHECK(!strcmp(text, "the ranks of tp disagree in op, blocks, reduce op: rank 4 (dp_shard=2 tp=0): all_gather f32[1024] \"layers.3.wo/gather\" (call 17 on tp); "
                        "rank 5 (dp_shard=2 tp=1): reduce_scatter max f32[3 x 1024] \"layers.3.wo/gather\" (call 17 on tp)"));
    a = sample();
    a.op = LLMPAR_CALL_BROADCAST;
    a.root = 1;
    printed(&a, "broadcast f32[1024] from root 1 \"layers.3.wo/gather\" (call 17 on tp)");
    a.op = LLMPAR_CALL_SEND;
    a.peer = 3;
    printed(&a, "send f32[1024] to 3 \"layers.3.wo/gather\" (message 17 on tp)");
    a.op = LLMPAR_CALL_BARRIER;
    a.blocks = a.count = a.number = 0;
    printed(&a, "barrier \"layers.3.wo/gather\" (on tp)");
}

/* 4096 ranks: one is away, the others wait in two different places. */
static void many(void *user, int32_t rank, llmpar_position *out)
{
    (void)user;
    memset(out, 0, sizeof *out);
    out->rank = rank;
    snprintf(out->where, sizeof out->where, "dp_shard=%d tp=%d", (int)rank / 2, (int)rank % 2);
    out->last = sample();
    out->last.rank = rank;
    out->last.number = 16;
    if (rank == 3001) return;
    out->state = LLMPAR_POSITION_INSIDE;
    out->now = sample();
    out->now.rank = rank;
    out->now.number = rank % 2 ? 17 : 18;
}

TEST(who_is_where)
{
    char text[2000], cut[100];
    size_t bytes = llmpar_position_print(many, NULL, 4096, text, sizeof text);
    CHECK_INT(bytes, strlen(text));
    CHECK(!strncmp(text, "rank 3001 (dp_shard=1500 tp=1): outside, last completed all_gather f32[1024] \"layers.3.wo/gather\" (call 16 on tp); ranks 0 (dp_shard=0 tp=0) 2 4 ", 140));
    CHECK_TEXT(text, " and 2036 more: in all_gather f32[1024] \"layers.3.wo/gather\" (call 18 on tp), last completed ");
    CHECK_TEXT(text, " and 2035 more: in all_gather f32[1024] \"layers.3.wo/gather\" (call 17 on tp), last completed ");
    memset(cut, 0x55, sizeof cut);
    CHECK_INT(llmpar_position_print(many, NULL, 4096, cut, 90), bytes);
    CHECK(!cut[89] && cut[90] == 0x55);
}

/* Both ends of a message have one fingerprint, but are not in the same place. */
static void both_ends(void *user, int32_t rank, llmpar_position *out)
{
    (void)user;
    memset(out, 0, sizeof *out);
    out->rank = rank;
    out->state = LLMPAR_POSITION_INSIDE;
    out->now = sample();
    out->now.op = rank ? LLMPAR_CALL_RECV : LLMPAR_CALL_SEND;
    out->now.member = rank;
    out->now.peer = 1 - rank;
}
TEST(who_is_in_a_message)
{
    char text[1000];
    llmpar_position_print(both_ends, NULL, 2, text, sizeof text);
    CHECK_TEXT(text, "rank 0: in send f32[1024] to 1 ");
    CHECK_TEXT(text, "; rank 1: in recv f32[1024] from 0 ");
}

/* ---- through the communicators ---- */

static llmpar_status all_reduce(llmpar_comm *comm, const char *tag, size_t count)
{
    static __thread float x[64];
    llmpar_collective call = { .send = x, .recv = x, .count = count, .dtype = LLMPAR_F32, .tag = tag };
    return llmpar_all_reduce(comm, NULL, &call);
}

/* The dump, parsed; the size it asks for is the size it takes. */
static llmpar_json *dump(llmpar_heap *heap, llmpar_record *record)
{
    llmpar_error error;
    llmpar_json *json = NULL;
    llmpar_json_desc strict = { .unique_keys = 1 };
    size_t bytes = llmpar_record_json(record, NULL, 0);
    char *text = (char *)malloc(bytes + 2);
    memset(text, 0x55, bytes + 2);
    CHECK_INT(llmpar_record_json(record, text, bytes / 2), bytes);
    CHECK(!text[bytes / 2 - 1] && text[bytes / 2] == 0x55);
    CHECK_INT(llmpar_record_json(record, text, bytes + 1), bytes);
    CHECK_INT(strlen(text), bytes);
    CHECK(text[bytes + 1] == 0x55);
    llmpar_error_clear(&error);
    if (llmpar_json_parse(heap, text, bytes, &strict, &json, &error)) TEST_FAIL("%s in %s", error.text, text);
    free(text);
    return json;
}

static int64_t number(const llmpar_json *object, const char *key)
{
    const llmpar_json *v = llmpar_json_get(object, key);
    if (!v || v->type != LLMPAR_JSON_NUMBER) { TEST_FAIL("no number \"%s\"", key); return -1; }
    return v->integer;
}
static const char *string(const llmpar_json *object, const char *key)
{
    const llmpar_json *v = llmpar_json_get(object, key);
    if (!v || v->type != LLMPAR_JSON_STRING) { TEST_FAIL("no string \"%s\"", key); return ""; }
    return v->string;
}
static const llmpar_json *at(const llmpar_json *array, int i)
{
    const llmpar_json *v = array ? array->child : NULL;
    while (v && i-- > 0) v = v->next;
    if (!v) TEST_FAIL("no such entry");
    return v;
}

enum { CALLS = 300 };

static llmpar_status three_hundred(llmpar_ctx *ctx, void *user)
{
    (void)user;
    char tag[32];
    llmpar_status st = LLMPAR_OK;
    for (int i = 0; i < CALLS && !st; i++) {
        snprintf(tag, sizeof tag, "call/%d", i);
        st = all_reduce(ctx->comm, tag, 7);
    }
    llmpar_json *json = dump(&ctx->heap, ctx->comm->record);
    const llmpar_json *entries = llmpar_json_get(json, "entries");
    CHECK_INT(entries->length, LLMPAR_RECORD_ENTRIES);
    /* The self-test of launch was call 1, id 0: the ring holds calls 46 to 301, tags call/44 to call/299. */
    for (int i = 0; i < LLMPAR_RECORD_ENTRIES; i++) {
        const llmpar_json *e = at(entries, i);
        snprintf(tag, sizeof tag, "call/%d", CALLS - LLMPAR_RECORD_ENTRIES + i);
        CHECK_INT(number(e, "record_id"), CALLS + 1 - LLMPAR_RECORD_ENTRIES + i);
        CHECK_INT(number(e, "collective_seq_id"), CALLS + 2 - LLMPAR_RECORD_ENTRIES + i);
        CHECK(!strcmp(string(at(llmpar_json_get(e, "frames"), 0), "name"), tag));
        CHECK(!strcmp(string(e, "state"), "completed"));
        CHECK(number(e, "time_created_ns") <= number(e, "time_discovered_started_ns"));
        CHECK(number(e, "time_discovered_started_ns") <= number(e, "time_discovered_completed_ns"));
    }
    llmpar_json_destroy(&ctx->heap, json);
    llmpar_position p;
    llmpar_record_position(ctx->comm->record, &p);
    CHECK_INT(p.state, LLMPAR_POSITION_OUTSIDE);
    CHECK_INT(p.last.number, CALLS + 1);
    CHECK(!strcmp(p.last.tag, "call/299"));
    return st;
}

static void quiet(void *user, int rank, llmpar_log_level level, const char *line) { (void)user; (void)rank; (void)level; (void)line; }

TEST(ring)
{
    llmpar_launch_desc desc = { .ranks = 2, .check = test_no_leak };
    CHECK_OK(llmpar_launch(&desc, three_hundred, NULL, NULL));
}

/* Every name that PyTorch's analyzer reads, with the values of known calls. */
static llmpar_status fields(llmpar_ctx *ctx, void *user)
{
    static const char *const names[] = {"record_id", "pg_id", "process_group", "collective_seq_id", "p2p_seq_id", "op_id", "profiling_name", "time_created_ns", "input_sizes", "input_dtypes", "output_sizes",
                                        "output_dtypes", "state", "time_discovered_started_ns", "time_discovered_completed_ns", "retired", "timeout_ms", "is_p2p", "frames"};
    (void)user;
    llmpar_mesh *mesh = NULL;
    llmpar_mesh_desc desc = { .dp_shard = 2, .tp = 2 };
    float x[64] = { 0 }, y[64];
    llmpar_status st = llmpar_mesh_create(ctx, &desc, &mesh);
    if (st) return st;
    llmpar_comm *tp = mesh->comm[LLMPAR_AXIS_TP];
    llmpar_collective call = { .send = x, .recv = y, .count = 5, .blocks = 2, .dtype = LLMPAR_F32, .op = LLMPAR_MAX, .tag = "odd \"name\"\\ \xff" };
    if (!st) st = llmpar_all_gather(tp, NULL, &call);
    if (!st) st = llmpar_reduce_scatter(tp, NULL, &call);
    call.peer = 1 - tp->rank;
    call.dtype = LLMPAR_BF16;
    if (!st) st = tp->rank ? llmpar_recv(tp, NULL, &call) : llmpar_send(tp, NULL, &call);
    llmpar_json *json = dump(&ctx->heap, ctx->comm->record);
    const llmpar_json *entries = llmpar_json_get(json, "entries"), *config = llmpar_json_get(json, "pg_config"), *status = llmpar_json_get(json, "pg_status");
    int count = (int)entries->length;
    CHECK_INT(number(json, "rank"), ctx->rank);
    CHECK(!strcmp(string(json, "where"), mesh->where));
    CHECK(strlen(string(json, "version")) > 2);
    for (int i = 0; i < count; i++)
        for (size_t k = 0; k < sizeof names / sizeof names[0]; k++)
            if (!llmpar_json_get(at(entries, i), names[k])) TEST_FAIL("entry %d has no \"%s\"", i, names[k]);
    const llmpar_json *gather = at(entries, count - 3), *scatter = at(entries, count - 2), *message = at(entries, count - 1);
    CHECK(!strcmp(string(gather, "profiling_name"), "llmpar:all_gather"));
    CHECK_INT(at(at(llmpar_json_get(gather, "input_sizes"), 0), 0)->integer, 10);
    CHECK_INT(at(at(llmpar_json_get(gather, "output_sizes"), 0), 0)->integer, 20);
    CHECK(!strcmp(at(llmpar_json_get(gather, "input_dtypes"), 0)->string, "Float"));
    CHECK_INT(number(gather, "collective_seq_id"), 1);
    CHECK_INT(number(gather, "timeout_ms"), 7000);
    CHECK(!strcmp(string(at(llmpar_json_get(gather, "frames"), 0), "name"), "odd \"name\"\\ \xef\xbf\xbd"));
    CHECK(!strcmp(at(llmpar_json_get(gather, "process_group"), 0)->string, "tp"));
    CHECK_INT(at(at(llmpar_json_get(scatter, "input_sizes"), 0), 0)->integer, 20);
    CHECK(!strcmp(string(scatter, "reduce_op"), "max"));
    CHECK_INT(number(scatter, "collective_seq_id"), 2);
    CHECK(!strcmp(string(message, "profiling_name"), tp->rank ? "llmpar:recv 1<-0" : "llmpar:send 0->1"));
    CHECK_INT(number(message, "p2p_seq_id"), 1);
    CHECK_INT(number(message, "collective_seq_id"), 0);
    CHECK_INT(llmpar_json_get(message, "is_p2p")->boolean, 1);
    CHECK(!strcmp(at(llmpar_json_get(message, "output_dtypes"), 0)->string, "BFloat16"));
    CHECK(!strcmp(string(llmpar_json_get(config, "world"), "ranks"), "[0, 1, 2, 3]"));
    CHECK(!strcmp(string(llmpar_json_get(config, "tp"), "ranks"), ctx->rank < 2 ? "[0, 1]" : "[2, 3]"));
    CHECK(!strcmp(string(llmpar_json_get(config, "dp_shard"), "ranks"), ctx->rank % 2 ? "[1, 3]" : "[0, 2]"));
    CHECK_INT(number(llmpar_json_get(status, "0"), "last_completed_collective"), 7); /* self-test and six splits */
    llmpar_json_destroy(&ctx->heap, json);
    /* An equal mesh again: the same groups, the same counts of calls. */
    llmpar_mesh *again = NULL;
    if (!st) st = llmpar_mesh_create(ctx, &desc, &again);
    if (!st) st = llmpar_comm_barrier(again->comm[LLMPAR_AXIS_TP], NULL, "again");
    json = dump(&ctx->heap, ctx->comm->record);
    CHECK_INT(llmpar_json_get(json, "pg_config")->length, config ? 4 : 0); /* world, dp_shard, tp, dp */
    entries = llmpar_json_get(json, "entries");
    CHECK_INT(number(at(entries, (int)entries->length - 1), "collective_seq_id"), 3);
    llmpar_json_destroy(&ctx->heap, json);
    llmpar_mesh_destroy(again);
    llmpar_mesh_destroy(mesh);
    return st;
}
TEST(dump_fields)
{
    llmpar_launch_desc desc = { .ranks = 4, .deadline = 7, .check = test_no_leak };
    CHECK_OK(llmpar_launch(&desc, fields, NULL, NULL));
}

/* A patched slot that is made of other collectives: it stands in the record as begun and done, around its parts. */
static llmpar_status gather_of_messages(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call)
{
    llmpar_position p;
    llmpar_collective part = *call;
    size_t bytes = call->count * llmpar_dtype_size(call->dtype);
    llmpar_status st = LLMPAR_OK;
    part.peer = 1 - comm->rank;
    memcpy((char *)call->recv + (size_t)comm->rank * bytes, call->send, bytes);
    CHECK_INT(comm->call->op, LLMPAR_CALL_ALL_GATHER);
    for (int k = 0; k < 2 && !st; k++) {
        part.recv = (char *)call->recv + (size_t)part.peer * bytes;
        st = k == comm->rank ? llmpar_send(comm, stream, &part) : llmpar_recv(comm, stream, &part);
        CHECK_INT(comm->call->op, LLMPAR_CALL_ALL_GATHER); /* the message's own description has gone again */
    }
    llmpar_record_position(comm->record, &p);
    CHECK_INT(p.state, LLMPAR_POSITION_INSIDE);
    CHECK_INT(p.now.op, LLMPAR_CALL_ALL_GATHER);
    CHECK(p.last.op == LLMPAR_CALL_SEND || p.last.op == LLMPAR_CALL_RECV);
    return st;
}
static llmpar_status patched(llmpar_ctx *ctx, void *user)
{
    (void)user;
    float mine = (float)ctx->rank + 1, all[2] = { 0, 0 };
    llmpar_collective call = { .send = &mine, .recv = all, .count = 1, .dtype = LLMPAR_F32, .tag = "patched" };
    ctx->comm->all_gather = gather_of_messages;
    llmpar_status st = llmpar_all_gather(ctx->comm, NULL, &call);
    CHECK_NEAR(all[0], 1, 0);
    CHECK_NEAR(all[1], 2, 0);
    llmpar_position p;
    llmpar_record_position(ctx->comm->record, &p);
    CHECK_INT(p.state, LLMPAR_POSITION_OUTSIDE);
    CHECK_INT(p.last.op, LLMPAR_CALL_ALL_GATHER);
    return st;
}
TEST(patched_slot)
{
    llmpar_launch_desc desc = { .ranks = 2, .check = test_no_leak };
    CHECK_OK(llmpar_launch(&desc, patched, NULL, NULL));
}

/* Another thread looks and dumps while the rank goes on: no torn entry, no race (ThreadSanitizer looks). */
static llmpar_record *watched;
static int watching;
static void *watch(void *unused)
{
    static char text[400000];
    (void)unused;
    while (__atomic_load_n(&watching, __ATOMIC_SEQ_CST)) {
        llmpar_position p;
        llmpar_record_position(watched, &p);
        CHECK(p.state == LLMPAR_POSITION_OUTSIDE || !strncmp(p.now.tag, "call/", 5));
        CHECK(llmpar_record_json(watched, text, sizeof text) < sizeof text);
        CHECK(strstr(text, "\"entries\"") != NULL);
        sched_yield();
    }
    return NULL;
}
static llmpar_status busy(llmpar_ctx *ctx, void *user)
{
    (void)user;
    pthread_t thread;
    char tag[32];
    llmpar_status st = LLMPAR_OK;
    if (ctx->rank == 0) {
        watched = ctx->comm->record;
        __atomic_store_n(&watching, 1, __ATOMIC_SEQ_CST);
        if (pthread_create(&thread, NULL, watch, NULL)) return llmpar_fail(ctx, LLMPAR_ERR_INTERNAL, "no thread");
    }
    for (int i = 0; i < 120 && !st; i++) {
        snprintf(tag, sizeof tag, "call/%d", i);
        st = all_reduce(ctx->comm, tag, (size_t)i % 60);
    }
    if (ctx->rank == 0) {
        __atomic_store_n(&watching, 0, __ATOMIC_SEQ_CST);
        pthread_join(thread, NULL);
    }
    return st;
}
TEST(looked_at_from_outside)
{
    llmpar_launch_desc desc = { .ranks = 2, .check = test_no_leak };
    CHECK_OK(llmpar_launch(&desc, busy, NULL, NULL));
}

/* A failing rank's files, and a directory that cannot be made: a warning, and the error stays what it was. */
static int warnings;
static void count_warnings(void *user, int rank, llmpar_log_level level, const char *line)
{
    (void)user; (void)rank;
    if (level != LLMPAR_LOG_WARNING) return;
    CHECK_TEXT(line, "the record could not be written to /no/such/place/llmpar_rank_");
    __atomic_add_fetch(&warnings, 1, __ATOMIC_SEQ_CST);
}
static llmpar_status one_fails(llmpar_ctx *ctx, void *user)
{
    (void)user;
    if (ctx->rank == 1) return llmpar_fail(ctx, LLMPAR_ERR_IO, "no data");
    return all_reduce(ctx->comm, "step", 3);
}
static llmpar_status one_returns(llmpar_ctx *ctx, void *user) { (void)user; return ctx->rank == 1 ? LLMPAR_OK : all_reduce(ctx->comm, "step", 3); }
static int lines_with(const char *path, const char *part)
{
    char line[4000];
    int found = 0;
    FILE *file = fopen(path, "r");
    if (!file) return -1;
    while (fgets(line, sizeof line, file)) found += strstr(line, part) != NULL;
    fclose(file);
    unlink(path);
    return found;
}
TEST(files)
{
    const char *root = getenv("TMPDIR");
    char directory[300], first[340], second[340];
    snprintf(directory, sizeof directory, "%.200s/llmpar-record-XXXXXX", root && root[0] ? root : "/tmp");
    if (!mkdtemp(directory)) { TEST_FAIL("cannot make %s", directory); return; }
    rmdir(directory); /* made when it is needed */
    snprintf(first, sizeof first, "%s/llmpar_rank_0.json", directory);
    snprintf(second, sizeof second, "%s/llmpar_rank_1.json", directory);
    llmpar_launch_desc desc = { .ranks = 2, .log = quiet, .check = test_no_leak, .record = directory };
    CHECK_STATUS(llmpar_launch(&desc, one_fails, NULL, NULL), LLMPAR_ERR_IO);
    CHECK_INT(lines_with(first, "\"state\": \"started\""), 1);
    CHECK_INT(lines_with(second, "\"state\": \"completed\""), 1);
    rmdir(directory);
    CHECK_STATUS(llmpar_launch(&desc, one_returns, NULL, NULL), LLMPAR_ERR_MISMATCH);
    CHECK_INT(lines_with(first, "\"name\": \"step\""), 1);
    CHECK_INT(lines_with(second, "launch/self_test"), 1); /* of a rank that had returned long before */
    rmdir(directory);
    desc.record = NULL;
    setenv("LLMPAR_RECORD", directory, 1);
    CHECK_STATUS(llmpar_launch(&desc, one_fails, NULL, NULL), LLMPAR_ERR_IO);
    CHECK_INT(lines_with(first, "\"name\": \"step\""), 1);
    CHECK_INT(lines_with(second, "\"name\": \"step\""), 0);
    unsetenv("LLMPAR_RECORD");
    rmdir(directory);
    desc.record = "/no/such/place";
    desc.log = count_warnings;
    CHECK_STATUS(llmpar_launch(&desc, one_fails, NULL, NULL), LLMPAR_ERR_IO);
    CHECK_INT(warnings, 2);
}

TEST_LIST(T_(fingerprint), T_(texts), T_(who_is_where), T_(who_is_in_a_message), T_(ring), T_(dump_fields), T_(patched_slot), T_(looked_at_from_outside), T_(files))
