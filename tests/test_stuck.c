/* A rank that returns an error, or stays away for ever, at 27 places: every survivor says soon where it is and where every other rank is, and the job ends. And ranks that are merely late are no alarm.
   LLMPAR_TEST_SOAK=300: seconds of the soak, with delays up to 2 s; default 3 with delays up to 20 ms. */
#include "faults.h"
#include "timed.h"

#include <pthread.h>
#include <unistd.h>

enum { PLACES = 3 * X_COUNT };

static fault_case place(int i, fault_kind kind) { return fault_of((fault_x)(i / 3), (fault_axis)(i % 3), kind, i % 2, (i + i / 4) % 4); }

/* The rank that waits for the culprit in X. */
static int partner(const fault_case *c) { return c->axis == FAULT_DP ? c->culprit ^ 2 : c->culprit ^ 1; }

/* What the survivors of `c` have said, and that all have said it within 2 s of the failure: of the culprit's error, or of the first one whose deadline has passed. */
static void survivors(const fault_case *c)
{
    double failure = c->failed_at;
    if (c->kind == FAULT_AWAY) {
        failure = 1e30;
        for (int r = 0; r < FAULTS_RANKS; r++)
            if (r != c->culprit && c->returned_at[r] < failure) failure = c->returned_at[r];
        if (failure - c->failed_at < 0.25 * c->deadline) TEST_FAIL("%s: reported after %.1f s, expected %g s", fault_name(c), failure - c->failed_at, c->deadline);
    }
    char culprit[64], place[160], mine[160];
    for (int r = 0; r < FAULTS_RANKS; r++) {
        if (r == c->culprit) continue;
        if (c->status[r] != LLMPAR_ERR_PEER && c->status[r] != LLMPAR_ERR_TIMEOUT) TEST_FAIL("%s: rank %d returned %s", fault_name(c), r, llmpar_status_string(c->status[r]));
        if (!(c->returned_at[r] - failure < 2 * test_slow)) TEST_FAIL("%s: rank %d returned %.1f s after the failure", fault_name(c), r, c->returned_at[r] - failure);
        /* The culprit: rank, coordinate, and where it was last. */
        snprintf(culprit, sizeof culprit, " %d (dp_shard=%d tp=%d)", c->culprit, c->culprit / 2, c->culprit % 2); /* "rank 2 (..)", or "ranks 1 (..) 2 (..)" of equal state */
        snprintf(place, sizeof place, ": outside, last completed barrier \"before\" (call %d on %s)", c->axis == FAULT_WORLD ? 8 : 1, fault_axis_name[c->axis]);
        if (!strstr(c->text[r], culprit) || !strstr(c->text[r], place)) TEST_FAIL("%s: rank %d says: %s; expected: %s%s", fault_name(c), r, c->text[r], culprit, place);
        CHECK_INT(c->live[r], 0);
    }
    /* Who waits for it: op, dtype, count, tag, number and axis. */
    int r = partner(c), number = c->axis == FAULT_WORLD ? 9 : 2;
    if (c->x == X_BARRIER) snprintf(mine, sizeof mine, "barrier \"layers.3.wo/x\" (call %d on %s): ", number, fault_axis_name[c->axis]);
    else if (c->x == X_SPLIT) snprintf(mine, sizeof mine, "split \"layers.3.wo/x\" (call %d on %s): ", number, fault_axis_name[c->axis]);
    else if (c->x == X_MESSAGE) snprintf(mine, sizeof mine, " f32[%d] ", c->large ? FAULTS_FLOATS / 2 : 40);
    else snprintf(mine, sizeof mine, "%s f32[%d]%s \"layers.3.wo/x\" (call %d on %s): ", fault_x_name[c->x], c->large ? FAULTS_FLOATS / 2 : 40, c->x == X_BROADCAST ? " from root 1" : "", number, fault_axis_name[c->axis]);
    if (!strstr(c->text[r], mine)) TEST_FAIL("%s: rank %d says: %s; expected: %s", fault_name(c), r, c->text[r], mine);
}

TIMED(a_rank_returns_an_error)
{
    for (int i = 0; i < PLACES; i++) {
        fault_case c = place(i, FAULT_ERROR);
        fault_run(&c);
        CHECK_STATUS(c.job, LLMPAR_ERR_IO);
        CHECK_INT(c.error.rank, c.culprit);
        CHECK_TEXT(c.error.text, "the disk is full");
        for (int r = 0; r < FAULTS_RANKS; r++)
            if (r != c.culprit) CHECK_TEXT(c.text[r], "failed: input/output error: the disk is full; ");
        survivors(&c);
    }
}

static void *run(void *c)
{
    fault_run((fault_case *)c);
    return NULL;
}

/* All places at once: they sleep most of the time. */
TIMED(a_rank_stays_away)
{
    static fault_case c[PLACES];
    char waited[80];
    pthread_t thread[PLACES];
    for (int i = 0; i < PLACES; i++) {
        c[i] = place(i, FAULT_AWAY);
        c[i].deadline = 2 * test_slow;
        if (pthread_create(&thread[i], NULL, run, &c[i])) { TEST_FAIL("no thread"); return; }
    }
    for (int i = 0; i < PLACES; i++) pthread_join(thread[i], NULL);
    snprintf(waited, sizeof waited, "waited %g s for the other ranks (rank ", 2 * test_slow);
    for (int i = 0; i < PLACES; i++) {
        CHECK_STATUS(c[i].job, LLMPAR_ERR_TIMEOUT);
        CHECK_TEXT(c[i].error.text, waited);
        CHECK(!strstr(c[i].error.text, "stuck"));
        CHECK_STATUS(c[i].status[c[i].culprit], LLMPAR_ERR_PEER); /* it came after all, too late */
        survivors(&c[i]);
    }
}

/* ---- launch does not wait for ever ---- */

static int64_t blocks; /* atomic: allocated and not yet freed, by any rank and by launch */
static void *counting_alloc(void *user, size_t bytes) { (void)user; __atomic_add_fetch(&blocks, 1, __ATOMIC_SEQ_CST); return malloc(bytes); }
static void counting_free(void *user, void *memory, size_t bytes) { (void)user; (void)bytes; if (memory) __atomic_sub_fetch(&blocks, 1, __ATOMIC_SEQ_CST); free(memory); }

typedef struct stuck_log { int lines[FAULTS_RANKS]; char text[FAULTS_RANKS][1700]; } stuck_log;
static void stuck_line(void *user, int rank, llmpar_log_level level, const char *line)
{
    stuck_log *log = (stuck_log *)user;
    if (level != LLMPAR_LOG_ERROR) return;
    log->lines[rank]++;
    snprintf(log->text[rank], sizeof log->text[0], "%s", line);
}

TIMED(a_rank_that_never_returns)
{
    static fault_case c; /* the rank goes on using it when launch has returned */
    static stuck_log log;
    llmpar_allocator counting = { counting_alloc, counting_free, NULL };
    const char *root = getenv("TMPDIR");
    char directory[300], path[340], *text;
    snprintf(directory, sizeof directory, "%.200s/llmpar-stuck-XXXXXX", root && root[0] ? root : "/tmp");
    if (!mkdtemp(directory)) { TEST_FAIL("cannot make %s", directory); return; }
    memset(&log, 0, sizeof log);
    c = fault_of(X_ALL_REDUCE, FAULT_TP, FAULT_AWAY, 1, 2);
    c.keep_away = 1;
    llmpar_launch_desc desc = { .ranks = FAULTS_RANKS, .deadline = 0.5 * test_slow, .record = directory, .log = stuck_line, .log_user = &log, .check = fault_check, .allocator = &counting };
    double start = test_clock();
    llmpar_status st = llmpar_launch(&desc, fault_rank, &c, &c.error);
    CHECK_STATUS(st, LLMPAR_ERR_TIMEOUT);
    CHECK(test_clock() - start > 5 && test_clock() - start < 30 * test_slow);
    CHECK_TEXT(c.error.text, "rank 2 (dp_shard=1 tp=0): outside");
    CHECK_TEXT(c.error.text, "; stuck and left running, with their memory: rank 2");
    CHECK_INT(c.status[2], LLMPAR_STATUS_COUNT);
    CHECK(__atomic_load_n(&blocks, __ATOMIC_SEQ_CST) > 10);
    /* Every survivor has said its part, the root only through the error. */
    int lines = 0;
    for (int r = 0; r < FAULTS_RANKS; r++) {
        lines += log.lines[r];
        if (log.lines[r]) CHECK_TEXT(log.text[r], "rank 2 (dp_shard=1 tp=0): outside");
    }
    CHECK_INT(lines, 2);
    CHECK_INT(log.lines[c.error.rank], 0);
    /* All four records, the stuck rank's too. */
    for (int r = 0; r < FAULTS_RANKS; r++) {
        snprintf(path, sizeof path, "%s/llmpar_rank_%d.json", directory, r);
        FILE *file = fopen(path, "r");
        if (!file) { TEST_FAIL("no %s", path); continue; }
        text = (char *)calloc(1, 1 << 20);
        size_t bytes = fread(text, 1, (1 << 20) - 1, file);
        fclose(file);
        unlink(path);
        llmpar_heap heap;
        llmpar_error error;
        llmpar_json *json = NULL;
        llmpar_heap_init(&heap, NULL);
        llmpar_error_clear(&error);
        CHECK_OK(llmpar_json_parse(&heap, text, bytes, NULL, &json, &error));
        const llmpar_json *entry = llmpar_json_get(json, "entries")->child;
        while (entry && entry->next) entry = entry->next;
        CHECK_TEXT(llmpar_json_get(entry, "state")->string, r == 2 ? "completed" : "started");
        llmpar_json_destroy(&heap, json);
        free(text);
    }
    rmdir(directory);
    /* When the rank comes back, it frees what all shared. */
    __atomic_store_n(&c.release, 1, __ATOMIC_SEQ_CST);
    for (int i = 0; i < 12000 && __atomic_load_n(&blocks, __ATOMIC_SEQ_CST); i++) test_sleep(0.01);
    CHECK_INT(__atomic_load_n(&blocks, __ATOMIC_SEQ_CST), 0);
    CHECK_STATUS(c.status[2], LLMPAR_ERR_PEER);
}

/* ---- no false alarm ---- */

typedef struct soak { double seconds, delay; uint64_t rounds; int failures; } soak;

static uint64_t soak_mix(uint64_t x)
{
    x ^= x >> 30; x *= 0xbf58476d1ce4e5b9u; x ^= x >> 27; x *= 0x94d049bb133111ebu; x ^= x >> 31;
    return x;
}

static llmpar_status soak_rank(llmpar_ctx *ctx, void *user)
{
    soak *s = (soak *)user;
    llmpar_mesh *mesh = NULL;
    llmpar_mesh_desc desc = { .dp_shard = 2, .tp = 2 };
    fault_buffers *b = (fault_buffers *)calloc(1, sizeof *b);
    double start = test_clock();
    llmpar_status st = llmpar_mesh_create(ctx, &desc, &mesh);
    for (uint64_t round = 0, go = 1; go && !st; round++) {
        llmpar_comm *const comms[] = { mesh->comm[LLMPAR_AXIS_TP], mesh->comm[LLMPAR_AXIS_DP_SHARD], mesh->world };
        uint64_t alike = soak_mix(round * 3 + 1), own = soak_mix(alike + (uint64_t)ctx->rank * 977);
        llmpar_collective call = { .count = alike % 100 + (alike >> 20 & 1) * 1000, .dtype = LLMPAR_F32, .root = 1, .tag = "soak" };
        test_sleep(s->delay * (double)(own >> 40) / 16777216.0);
        st = fault_call((fault_x)(alike >> 8) % X_COUNT, comms[(alike >> 32) % 3], b, call);
        if (!st && round % 4 == 3) { /* rank 0's clock ends it */
            go = test_clock() - start < s->seconds;
            llmpar_collective end = { .send = &go, .recv = &go, .count = 1, .dtype = LLMPAR_U64, .tag = "soak/go" };
            st = llmpar_broadcast(ctx->comm, NULL, &end);
        }
        if (ctx->rank == 0) s->rounds = round + 1;
    }
    llmpar_mesh_destroy(mesh);
    free(b);
    return st;
}

TIMED(late_ranks_are_no_alarm)
{
    const char *seconds = getenv("LLMPAR_TEST_SOAK");
    soak s = { seconds && seconds[0] ? atof(seconds) : 3, seconds && seconds[0] ? 2.0 : 0.02, 0, 0 };
    llmpar_launch_desc desc = { .ranks = FAULTS_RANKS, .deadline = 30 * test_slow, .log = fault_quiet };
    llmpar_error error;
    if (llmpar_launch(&desc, soak_rank, &s, &error)) TEST_FAIL("round %llu: %s", (unsigned long long)s.rounds, error.text);
    CHECK(s.rounds > 3);
    printf("  %llu rounds in %g s, delays up to %g s\n", (unsigned long long)s.rounds, s.seconds, s.delay);
}

TEST_LIST(T_(a_rank_returns_an_error), T_(a_rank_stays_away), T_(a_rank_that_never_returns), T_(late_ranks_are_no_alarm))
