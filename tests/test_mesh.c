/* mesh, dtensor, redistribute: the arithmetic is compared with tensors that are really cut, on random meshes and placements. */
#include "test.h"

static llmpar_status launch(int ranks, llmpar_rank_fn fn, void *user, llmpar_error *error)
{
    llmpar_launch_desc desc = { .ranks = ranks, .check = test_no_leak };
    return llmpar_launch(&desc, fn, user, error);
}

static uint64_t state = 1;
static int64_t below(int64_t n) /* random, main thread only */
{
    state ^= state << 13; state ^= state >> 7; state ^= state << 17;
    return (int64_t)((state >> 11) % (uint64_t)n);
}

/* ---- mesh ---- */

static llmpar_status look_at_mesh(llmpar_ctx *ctx, void *user)
{
    llmpar_mesh *mesh = NULL;
    const llmpar_mesh_desc *desc = (const llmpar_mesh_desc *)user;
    CHECK_OK(llmpar_mesh_create(ctx, desc, &mesh));
    if (!mesh) return ctx->error.status;
    int tp = desc->tp ? desc->tp : 1, shard = desc->dp_shard ? desc->dp_shard : 1, replicate = desc->dp_replicate ? desc->dp_replicate : 1, r = ctx->rank;
    CHECK_INT(mesh->coordinate[LLMPAR_AXIS_TP], r % tp);
    CHECK_INT(mesh->coordinate[LLMPAR_AXIS_DP_SHARD], r / tp % shard);
    CHECK_INT(mesh->coordinate[LLMPAR_AXIS_DP_REPLICATE], r / tp / shard);
    CHECK_INT(mesh->coordinate[LLMPAR_AXIS_CP] + mesh->coordinate[LLMPAR_AXIS_PP], 0);
    CHECK_INT(mesh->dp_rank, r / tp);
    CHECK_INT(mesh->dp_ranks, shard * replicate);
    CHECK_INT(llmpar_mesh_rank_at(mesh, mesh->coordinate), r);
    CHECK(mesh->world == ctx->comm);
    /* who is on each communicator: the sum of the bits of its world ranks */
    for (int a = 0; a <= LLMPAR_MESH_AXES; a++) {
        llmpar_comm *comm = a < LLMPAR_MESH_AXES ? mesh->comm[a] : mesh->dp;
        int64_t bit = (int64_t)1 << r, members = 0, want = 0;
        int32_t rank[8] = { 0 };
        llmpar_collective sum = { .send = &bit, .recv = &members, .count = 1, .dtype = LLMPAR_I64, .tag = "members" }, gather = { .send = &ctx->rank, .recv = rank, .count = 1, .dtype = LLMPAR_I32, .tag = "ranks" };
        CHECK_OK(llmpar_all_reduce(comm, NULL, &sum));
        CHECK_OK(llmpar_all_gather(comm, NULL, &gather));
        for (int i = 0; i < ctx->world; i++) {
            int same_tp = i % tp == r % tp, same_shard = i / tp % shard == r / tp % shard, same_replicate = i / tp / shard == r / tp / shard;
            int in = a == LLMPAR_AXIS_TP ? same_shard && same_replicate : a == LLMPAR_AXIS_DP_SHARD ? same_tp && same_replicate : a == LLMPAR_AXIS_DP_REPLICATE ? same_tp && same_shard : a == LLMPAR_MESH_AXES ? same_tp : i == r;
            if (in) want |= (int64_t)1 << i;
        }
        CHECK_INT(members, want);
        for (int i = 1; i < comm->ranks; i++) CHECK(rank[i] > rank[i - 1]);
        CHECK_TEXT(comm->axis, a < LLMPAR_MESH_AXES ? llmpar_axis_name((llmpar_axis)a) : "dp");
    }
    llmpar_fail(ctx, LLMPAR_ERR_IO, "x");
    CHECK(!strcmp(ctx->error.where, mesh->where)); /* an error knows its place */
    llmpar_mesh_destroy(mesh);
    return LLMPAR_OK;
}

TEST(axes)
{
    static const llmpar_mesh_desc descs[] = { { 0, 0, 0, 0, 0 }, { 0, 0, 0, 0, 2 }, { 0, 3, 0, 0, 0 }, { 0, 2, 0, 0, 2 }, { 2, 1, 1, 1, 3 }, { 2, 2, 0, 0, 2 }, { 1, 4, 1, 1, 2 } };
    for (size_t i = 0; i < sizeof descs / sizeof descs[0]; i++) {
        llmpar_mesh_desc d = descs[i];
        int world = (d.dp_replicate ? d.dp_replicate : 1) * (d.dp_shard ? d.dp_shard : 1) * (d.tp ? d.tp : 1);
        CHECK_OK(launch(world, look_at_mesh, &d, NULL));
    }
}

TEST(bad_degrees)
{
    llmpar_error error;
    llmpar_error_clear(&error);
    llmpar_mesh_desc desc = { 0, 2, 0, 0, 3 };
    CHECK_STATUS(llmpar_mesh_desc_resolve(&desc, 4, &error), LLMPAR_ERR_MESH);
    CHECK_TEXT(error.text, "dp_shard 2");
    CHECK_TEXT(error.text, "tp 3");
    CHECK_TEXT(error.text, "= 6 ranks");
    CHECK_TEXT(error.text, "the world has 4");
    llmpar_error_clear(&error);
    llmpar_mesh_desc negative = { 0, -2, 0, 0, -2 };
    CHECK_STATUS(llmpar_mesh_desc_resolve(&negative, 4, &error), LLMPAR_ERR_MESH);
    CHECK_TEXT(error.text, "dp_shard = -2");
    llmpar_error_clear(&error);
    llmpar_mesh_desc huge = { 65536, 65536, 0, 0, 65536 };
    CHECK_STATUS(llmpar_mesh_desc_resolve(&huge, 1, &error), LLMPAR_ERR_MESH);
    llmpar_error_clear(&error);
    llmpar_mesh_desc cp = { 0, 0, 2, 0, 0 }, pp = { 0, 0, 0, 4, 0 };
    CHECK_STATUS(llmpar_mesh_desc_resolve(&cp, 2, &error), LLMPAR_ERR_UNSUPPORTED);
    CHECK_TEXT(error.text, "cp = 2");
    llmpar_error_clear(&error);
    CHECK_STATUS(llmpar_mesh_desc_resolve(&pp, 4, &error), LLMPAR_ERR_UNSUPPORTED);
    CHECK_TEXT(error.text, "pp = 4");
    llmpar_error_clear(&error);
    llmpar_mesh_desc fine = { 0, 2, 0, 0, 0 };
    CHECK_OK(llmpar_mesh_desc_resolve(&fine, 2, &error));
    CHECK_INT(fine.tp, 1);
}

static llmpar_status wrong_mesh(llmpar_ctx *ctx, void *user)
{
    llmpar_mesh_desc desc = { .tp = 3 };
    llmpar_mesh *mesh = (llmpar_mesh *)user;
    llmpar_status st = llmpar_mesh_create(ctx, &desc, &mesh);
    CHECK(mesh == NULL);
    return st;
}
TEST(mesh_that_is_not_the_world)
{
    llmpar_error error;
    CHECK_STATUS(launch(2, wrong_mesh, &error, &error), LLMPAR_ERR_MESH);
    CHECK_TEXT(error.text, "tp 3 = 3 ranks, but the world has 2");
}

/* ---- dtensor ---- */

typedef struct problem { llmpar_dtensor tensor; llmpar_mesh_desc mesh; int32_t degree[LLMPAR_MESH_AXES]; int32_t ranks; int redistributable; } problem;

/* A random mesh of at most 8 ranks and a random, valid tensor on it. */
static void make_problem(problem *p)
{
    static const int64_t extents[] = { 0, 1, 2, 3, 4, 5, 7, 8, 12, 24 };
    memset(p, 0, sizeof *p);
    do {
        p->degree[0] = 1 + (int32_t)below(3);
        p->degree[1] = 1 + (int32_t)below(4);
        p->degree[2] = p->degree[3] = 1;
        p->degree[4] = 1 + (int32_t)below(4);
        p->ranks = p->degree[0] * p->degree[1] * p->degree[4];
    } while (p->ranks > 8);
    p->mesh.dp_replicate = p->degree[0];
    p->mesh.dp_shard = p->degree[1];
    p->mesh.tp = p->degree[4];
    llmpar_dtensor *t = &p->tensor;
    static const llmpar_dtype dtypes[] = { LLMPAR_I32, LLMPAR_F64, LLMPAR_BF16 };
    t->name = "w";
    t->dtype = dtypes[below(3)];
    t->dims = (int32_t)below(5);
    for (int d = 0; d < t->dims; d++) t->shape[d] = extents[below(10)];
    p->redistributable = 1;
    int64_t grain[LLMPAR_MAX_DIMS] = { 0, 0, 0, 0 };
    static const llmpar_axis orders[2][3] = { { LLMPAR_AXIS_TP, LLMPAR_AXIS_DP_SHARD, LLMPAR_AXIS_DP_REPLICATE }, { LLMPAR_AXIS_DP_SHARD, LLMPAR_AXIS_DP_REPLICATE, LLMPAR_AXIS_TP } };
    const llmpar_axis *order = orders[below(4) == 0];
    for (int i = 0; i < 3; i++) {
        llmpar_placement *q = &t->placement[t->placements];
        int32_t degree = p->degree[order[i]];
        memset(q, 0, sizeof *q);
        q->axis = order[i];
        int64_t kind = below(4);
        if (kind == 0) continue; /* not named */
        if (kind == 1) { q->kind = LLMPAR_REPLICATE; t->placements++; continue; }
        if (order[i] == LLMPAR_AXIS_DP_REPLICATE && below(4)) continue;
        if (t->dims && (kind == 2 || i < 2)) {
            q->kind = LLMPAR_SHARD;
            q->dim = (int32_t)below(t->dims);
            if (below(2)) q->grain = 1 + below(4);
            int64_t outer = grain[q->dim] ? grain[q->dim] : t->shape[q->dim], g = q->grain ? q->grain : 1;
            if (t->shape[q->dim] % g || outer % g) q->grain = 0;
            grain[q->dim] = q->grain ? q->grain : 1;
            if (degree % 2 == 0 && below(3) == 0) q->replicas = 2;
            if (order[i] == LLMPAR_AXIS_DP_REPLICATE && degree > 1) p->redistributable = 0;
            t->placements++;
            continue;
        }
        /* FLAT, the last cut */
        int64_t most = 1;
        for (int d = 0; d < t->dims; d++) most *= t->shape[d];
        q->kind = LLMPAR_FLAT;
        q->offset = below(20);
        q->unit_elements = (q->offset + most + below(30) + degree - 1) / degree * degree;
        if (order[i] == LLMPAR_AXIS_DP_REPLICATE && degree > 1) p->redistributable = 0;
        t->placements++;
        break;
    }
}

static void coordinate_of(const problem *p, int32_t rank, int32_t coordinate[LLMPAR_MESH_AXES])
{
    for (int a = LLMPAR_MESH_AXES - 1; a >= 0; a--) {
        coordinate[a] = rank % p->degree[a];
        rank /= p->degree[a];
    }
}

/* Cuts the whole tensor (elements are their own global index) as the placements say, step by step. Returns the elements left, in order; *shard_begin as in llmpar_local. */
static int64_t cut_really(const problem *p, const int32_t coordinate[LLMPAR_MESH_AXES], int64_t *out, int64_t *shard_begin)
{
    const llmpar_dtensor *t = &p->tensor;
    int64_t shape[LLMPAR_MAX_DIMS], n = 1;
    static int64_t next[24 * 24 * 24 * 24];
    for (int d = 0; d < t->dims; d++) n *= shape[d] = t->shape[d];
    for (int64_t i = 0; i < n; i++) out[i] = i;
    *shard_begin = 0;
    for (int i = 0; i < t->placements; i++) {
        const llmpar_placement *q = &t->placement[i];
        int64_t kept = 0;
        if (q->kind == LLMPAR_SHARD) {
            int64_t inner = 1, grain = q->grain ? q->grain : 1, replicas = q->replicas ? q->replicas : 1, parts = p->degree[q->axis] / replicas, part = coordinate[q->axis] / replicas;
            for (int d = q->dim + 1; d < t->dims; d++) inner *= shape[d];
            int64_t length = 0, extent = shape[q->dim];
            for (int64_t e = 0; e < n; e++) {
                int64_t at = e / inner % extent / grain, owner = 0, grains = extent / grain;
                while ((owner + 1) * grains / parts <= at) owner++; /* the part whose range [floor(i*G/n), floor((i+1)*G/n)) holds the grain */
                if (owner == part) next[kept++] = out[e];
            }
            for (int64_t g = 0; g < extent / grain; g++)
                if (g >= part * (extent / grain) / parts && g < (part + 1) * (extent / grain) / parts) length += grain;
            shape[q->dim] = length;
        } else if (q->kind == LLMPAR_FLAT) {
            int64_t size = q->unit_elements / p->degree[q->axis];
            for (int64_t e = 0; e < n; e++)
                if ((q->offset + e) / (size ? size : 1) == coordinate[q->axis]) {
                    if (!kept) *shard_begin = (q->offset + e) % size;
                    next[kept++] = out[e];
                }
        } else {
            continue;
        }
        n = kept;
        memcpy(out, next, (size_t)n * sizeof *out);
    }
    return n;
}

/* Global index of element e of a local rectangle. */
static int64_t global_index(const llmpar_dtensor *t, const llmpar_local *local, int64_t e)
{
    int64_t index = 0, stride = 1;
    for (int d = t->dims - 1; d >= 0; d--) {
        index += (local->offset[d] + e % local->shape[d]) * stride;
        e /= local->shape[d];
        stride *= t->shape[d];
    }
    return index;
}

TEST(local_parts)
{
    static int64_t really[24 * 24 * 24 * 24];
    static unsigned char covered[24 * 24 * 24 * 24], owned[24 * 24 * 24 * 24];
    state = 12345;
    int flats = 0, empty = 0, replicated = 0;
    for (int round = 0; round < 4000; round++) {
        problem p;
        llmpar_error error;
        make_problem(&p);
        int64_t n = 1;
        for (int d = 0; d < p.tensor.dims; d++) n *= p.tensor.shape[d];
        if (n > 4000) continue;
        llmpar_error_clear(&error);
        CHECK_OK(llmpar_dtensor_check(&p.tensor, p.degree, &error));
        memset(covered, 0, (size_t)n);
        memset(owned, 0, (size_t)n);
        int copies = p.ranks;
        for (int i = 0; i < p.tensor.placements; i++) {
            const llmpar_placement *q = &p.tensor.placement[i];
            if (q->kind == LLMPAR_SHARD || q->kind == LLMPAR_FLAT) copies /= p.degree[q->axis] / (q->replicas ? q->replicas : 1);
            flats += q->kind == LLMPAR_FLAT;
            replicated += q->replicas > 1;
        }
        for (int32_t r = 0; r < p.ranks; r++) {
            int32_t coordinate[LLMPAR_MESH_AXES];
            llmpar_local local;
            int64_t shard_begin;
            coordinate_of(&p, r, coordinate);
            llmpar_dtensor_local(&p.tensor, p.degree, coordinate, &local);
            int64_t count = cut_really(&p, coordinate, really, &shard_begin);
            CHECK_INT(local.flat_count, count);
            if (local.flat_count != count) return;
            CHECK_INT(local.shard_begin, shard_begin);
            empty += !count;
            for (int64_t e = 0; e < count; e++) {
                int64_t index = global_index(&p.tensor, &local, local.flat_begin + e);
                if (index != really[e]) { TEST_FAIL("round %d rank %d: element %lld is %lld, want %lld", round, (int)r, (long long)e, (long long)index, (long long)really[e]); return; }
                int64_t run, last = local.flat_begin + e;
                CHECK_INT(llmpar_dtensor_run(&p.tensor, &local, last, &run), index);
                last += run - 1; /* together up to there, and no further */
                if (run < 1 || last >= local.elements || global_index(&p.tensor, &local, last) != index + run - 1 || (last + 1 < local.elements && global_index(&p.tensor, &local, last + 1) == index + run)) TEST_FAIL("round %d: a run of %d from %d", round, (int)run, (int)index);
                covered[index]++;
                owned[index] += local.is_owner != 0;
            }
        }
        for (int64_t e = 0; e < n; e++)
            if (covered[e] != copies || owned[e] != 1) { TEST_FAIL("round %d: element %lld is held %d times, want %d, and owned %d times", round, (long long)e, covered[e], copies, owned[e]); return; }
    }
    CHECK(flats > 300 && empty > 300 && replicated > 300); /* the interesting cases did occur */
}

TEST(known_parts)
{
    const int32_t degree[LLMPAR_MESH_AXES] = { 1, 2, 1, 1, 2 };
    int32_t at[LLMPAR_MESH_AXES] = { 0, 1, 0, 0, 1 };
    llmpar_dtensor vocab = { .name = "embed", .dtype = LLMPAR_F32, .dims = 2, .shape = { 509, 16 }, .placements = 2 };
    llmpar_local local;
    vocab.placement[0].kind = LLMPAR_SHARD;
    vocab.placement[0].axis = LLMPAR_AXIS_TP;
    vocab.placement[1].kind = LLMPAR_FLAT;
    vocab.placement[1].axis = LLMPAR_AXIS_DP_SHARD;
    vocab.placement[1].offset = 128;
    vocab.placement[1].unit_elements = 8192;
    llmpar_dtensor_local(&vocab, degree, at, &local);
    CHECK_INT(local.offset[0], 254);
    CHECK_INT(local.shape[0], 255);
    CHECK_INT(local.flat_begin, 4096 - 128);
    CHECK_INT(local.flat_count, 255 * 16 - (4096 - 128));
    CHECK_INT(local.shard_begin, 0);
    at[LLMPAR_AXIS_DP_SHARD] = 0;
    llmpar_dtensor_local(&vocab, degree, at, &local);
    CHECK_INT(local.flat_begin, 0);
    CHECK_INT(local.flat_count, 4096 - 128);
    CHECK_INT(local.shard_begin, 128);
    /* two kv heads of 4 elements on tp 4: ranks 0 and 1 hold head 0, rank 0 owns it */
    const int32_t four[LLMPAR_MESH_AXES] = { 1, 1, 1, 1, 4 };
    llmpar_dtensor kv = { .name = "wk", .dtype = LLMPAR_F32, .dims = 2, .shape = { 8, 3 }, .placements = 1 };
    kv.placement[0].kind = LLMPAR_SHARD;
    kv.placement[0].axis = LLMPAR_AXIS_TP;
    kv.placement[0].grain = 4;
    kv.placement[0].replicas = 2;
    for (int r = 0; r < 4; r++) {
        int32_t place[LLMPAR_MESH_AXES] = { 0, 0, 0, 0, 0 };
        place[LLMPAR_AXIS_TP] = r;
        llmpar_dtensor_local(&kv, four, place, &local);
        CHECK_INT(local.offset[0], r / 2 * 4);
        CHECK_INT(local.shape[0], 4);
        CHECK_INT(local.is_owner, r % 2 == 0);
    }
    char text[200];
    CHECK_INT(llmpar_dtensor_placements(&vocab, text, sizeof text), strlen(text));
    CHECK(!strcmp(text, "[Shard(0) on tp, Flat(128) on dp_shard]"));
    CHECK_INT(llmpar_dtensor_placements(&kv, text, 10), strlen("[Shard(0) x 2 replicas on tp]"));
    CHECK(!strcmp(text, "[Shard(0)"));
}

TEST(refused_tensors)
{
    const int32_t degree[LLMPAR_MESH_AXES] = { 1, 2, 1, 1, 4 };
    struct { const char *text; int what; } cases[] = {
        { "dtype 0", 0 }, { "9 dims", 1 }, { "dim 1 has extent -1", 2 }, { "overflow", 3 }, { "axis tp is named twice", 4 }, { "Shard(2) on tp, expected a dim below 2", 5 }, { "grain 3 does not divide the extent 8", 6 },
        { "3 replicas do not divide the degree 4", 7 }, { "cannot be cut evenly over 2 ranks", 8 }, { "do not fit a unit of 16", 9 }, { "expected Flat to be the last cut", 10 }, { "names axis 7", 11 }, { "kind 9", 12 },
        { "7 placements", 13 }, { "grain 4 does not divide the grain of the earlier cut, 2", 14 },
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        llmpar_dtensor t = { .name = "layers.0.wq", .dtype = LLMPAR_F32, .dims = 2, .shape = { 8, 6 }, .placements = 2 };
        llmpar_error error;
        llmpar_error_clear(&error);
        t.placement[0].kind = LLMPAR_SHARD;
        t.placement[0].axis = LLMPAR_AXIS_TP;
        t.placement[1].kind = LLMPAR_FLAT;
        t.placement[1].axis = LLMPAR_AXIS_DP_SHARD;
        t.placement[1].unit_elements = 64;
        CHECK_OK(llmpar_dtensor_check(&t, degree, &error));
        switch (cases[i].what) {
        case 0: t.dtype = LLMPAR_DTYPE_DEFAULT; break;
        case 1: t.dims = 9; break;
        case 2: t.shape[1] = -1; break;
        case 3: t.shape[0] = t.shape[1] = (int64_t)1 << 40; break;
        case 4: t.placement[1] = t.placement[0]; break;
        case 5: t.placement[0].dim = 2; break;
        case 6: t.placement[0].grain = 3; break;
        case 7: t.placement[0].replicas = 3; break;
        case 8: t.placement[1].unit_elements = 63; break;
        case 9: t.placement[1].unit_elements = 16; t.placement[1].offset = 8; break;
        case 10: t.placement[2] = t.placement[0]; t.placement[0] = t.placement[1]; t.placement[1] = t.placement[2]; break;
        case 11: t.placement[0].axis = (llmpar_axis)7; break;
        case 12: t.placement[0].kind = (llmpar_placement_kind)9; break;
        case 13: t.placements = 7; break;
        case 14: t.placement[0].grain = 2; t.placement[1] = t.placement[0]; t.placement[1].axis = LLMPAR_AXIS_DP_SHARD; t.placement[1].grain = 4; break;
        default: break;
        }
        CHECK(llmpar_dtensor_check(&t, degree, &error) != LLMPAR_OK);
        CHECK_TEXT(error.text, "layers.0.wq: ");
        if (cases[i].what != 3) CHECK_INT(error.status, LLMPAR_ERR_SHAPE);
        CHECK_TEXT(error.text, cases[i].text);
    }
}

/* ---- redistribute ---- */

static void put(void *buffer, llmpar_dtype dtype, int64_t i, int64_t value)
{
    if (dtype == LLMPAR_I32) ((int32_t *)buffer)[i] = (int32_t)value;
    else if (dtype == LLMPAR_F64) ((double *)buffer)[i] = (double)value;
    else ((uint16_t *)buffer)[i] = (uint16_t)value;
}

static llmpar_status round_trip(llmpar_ctx *ctx, void *user)
{
    problem p = *(const problem *)user;
    llmpar_dtensor *t = &p.tensor;
    llmpar_mesh *mesh = NULL;
    llmpar_local local;
    size_t item = llmpar_dtype_size(t->dtype);
    int64_t n = 1, held;
    llmpar_status st = llmpar_mesh_create(ctx, &p.mesh, &mesh);
    if (st) return st;
    for (int d = 0; d < t->dims; d++) n *= t->shape[d];
    llmpar_placement *flat = t->placements && t->placement[t->placements - 1].kind == LLMPAR_FLAT ? &t->placement[t->placements - 1] : NULL;
    /* Ranks of different tp coordinates may lay out their units differently. */
    if (flat && flat->axis == LLMPAR_AXIS_DP_SHARD) flat->offset += 3 * mesh->coordinate[LLMPAR_AXIS_TP], flat->unit_elements += 12 * mesh->degree[flat->axis] * (1 + mesh->coordinate[LLMPAR_AXIS_TP]);
    llmpar_dtensor_local(t, mesh->degree, mesh->coordinate, &local);
    held = flat ? flat->unit_elements / mesh->degree[flat->axis] : local.elements;
    int64_t scratch_elements = llmpar_dtensor_full_scratch(t, mesh);
    char *whole = (char *)malloc((size_t)n * item + 1), *full = (char *)malloc((size_t)n * item + 1), *part = (char *)malloc((size_t)held * item + 1), *want = (char *)malloc((size_t)held * item + 1);
    char *scratch = (char *)malloc((size_t)scratch_elements * item + 1); /* exact: AddressSanitizer sees one element too many */
    for (int64_t i = 0; i < n; i++) put(whole, t->dtype, i, i + 1);
    memset(part, 0x7f, (size_t)held * item);
    memset(want, 0x7f, (size_t)held * item);
    llmpar_dtensor_cut(t, mesh, whole, part);
    for (int64_t e = 0; e < local.flat_count; e++) put(want, t->dtype, local.shard_begin + e, global_index(t, &local, local.flat_begin + e) + 1);
    CHECK_BYTES(part, want, (size_t)held * item); /* and the rest of the shard is untouched */
    for (int again = 0; again < 2; again++) {
        memset(full, 0, (size_t)n * item);
        st = llmpar_dtensor_full(t, mesh, NULL, part, scratch, full);
        if (p.redistributable) {
            CHECK_OK(st);
            CHECK_BYTES(full, whole, (size_t)n * item);
        } else {
            CHECK_STATUS(st, LLMPAR_ERR_UNSUPPORTED);
            CHECK_TEXT(ctx->error.text, "cannot be made whole");
            llmpar_error_clear(&ctx->error);
            st = LLMPAR_OK;
        }
    }
    free(whole);
    free(full);
    free(part);
    free(want);
    free(scratch);
    llmpar_mesh_destroy(mesh);
    return st;
}

TEST(full_and_cut)
{
    state = 777;
    int done = 0, refused = 0, staged = 0;
    while (done < 160) {
        problem p;
        make_problem(&p);
        int64_t n = 1, cuts = 0;
        for (int d = 0; d < p.tensor.dims; d++) n *= p.tensor.shape[d];
        for (int i = 0; i < p.tensor.placements; i++) cuts += p.tensor.placement[i].kind != LLMPAR_REPLICATE && p.degree[p.tensor.placement[i].axis] > 1;
        if (n > 4000 || (cuts < 2 && done % 4)) continue;
        CHECK_OK(launch(p.ranks, round_trip, &p, NULL));
        done++;
        refused += !p.redistributable;
        staged += cuts > 1;
    }
    CHECK(refused > 1 && staged > 80);
}

static llmpar_status refused_full(llmpar_ctx *ctx, void *user)
{
    llmpar_mesh *mesh = NULL;
    llmpar_mesh_desc desc = { .tp = 2 };
    float x[8] = { 0 }, y[8];
    (void)user;
    llmpar_status st = llmpar_mesh_create(ctx, &desc, &mesh);
    if (st) return st;
    llmpar_dtensor t = { .name = "partial", .dtype = LLMPAR_F32, .dims = 1, .shape = { 8 }, .placements = 1 };
    t.placement[0].kind = LLMPAR_PARTIAL_SUM;
    t.placement[0].axis = LLMPAR_AXIS_TP;
    CHECK_STATUS(llmpar_dtensor_full(&t, mesh, NULL, x, NULL, y), LLMPAR_ERR_UNSUPPORTED);
    CHECK_TEXT(ctx->error.text, "[Partial(sum) on tp]");
    llmpar_error_clear(&ctx->error);
    t.placement[0].kind = LLMPAR_SHARD;
    t.placement[0].dim = 3;
    CHECK_STATUS(llmpar_dtensor_full(&t, mesh, NULL, x, NULL, y), LLMPAR_ERR_SHAPE);
    llmpar_error_clear(&ctx->error);
    llmpar_mesh_destroy(mesh);
    return LLMPAR_OK;
}
TEST(what_full_refuses) { CHECK_OK(launch(2, refused_full, NULL, NULL)); }

/* ---- pictures ---- */

static llmpar_status pictures(llmpar_ctx *ctx, void *user)
{
    llmpar_mesh *mesh = NULL;
    llmpar_mesh_desc desc = { .dp_shard = 2, .tp = 2 };
    char text[4000], small[50];
    (void)user;
    llmpar_status st = llmpar_mesh_create(ctx, &desc, &mesh);
    if (st) return st;
    size_t need = llmpar_mesh_print(mesh, text, sizeof text);
    CHECK_INT(need, strlen(text));
    CHECK_TEXT(text, "dp_shard 2 x tp 2 = 4 ranks");
    snprintf(small, sizeof small, "[%d]", (int)ctx->rank);
    CHECK_TEXT(text, small);
    CHECK_INT(llmpar_mesh_print(mesh, small, sizeof small), need);
    CHECK_INT(strlen(small), sizeof small - 1);
    CHECK_INT(llmpar_mesh_print(mesh, NULL, 0), need);
    llmpar_dtensor t = { .name = "wq", .dtype = LLMPAR_F32, .dims = 2, .shape = { 4, 6 }, .placements = 2 };
    t.placement[0].kind = LLMPAR_SHARD;
    t.placement[0].axis = LLMPAR_AXIS_TP;
    t.placement[1].kind = LLMPAR_FLAT;
    t.placement[1].axis = LLMPAR_AXIS_DP_SHARD;
    t.placement[1].unit_elements = 12;
    need = llmpar_dtensor_print(&t, mesh, text, sizeof text);
    CHECK_INT(need, strlen(text));
    CHECK_TEXT(text, "wq f32[4,6] [Shard(0) on tp, Flat(0) on dp_shard]\n");
    CHECK_TEXT(text, "  rank 3 dp_shard=1 tp=1  [2:4, 0:6]  elements 6:12 at 0 of the shard  24 bytes\n");
    CHECK_TEXT(text, "                           0:6 \n    0:1  dp_shard=0 tp=0 | 0  |\n    1:2  dp_shard=1 tp=0 | 2  |\n    2:3  dp_shard=0 tp=1 | 1  |\n    3:4  dp_shard=1 tp=1 | 3  |\n");
    CHECK_INT(llmpar_dtensor_print(&t, mesh, NULL, 0), need);
    llmpar_mesh_destroy(mesh);
    return LLMPAR_OK;
}
TEST(prints) { CHECK_OK(launch(4, pictures, NULL, NULL)); }

/* A strict reader of the XML that the library writes: every element closed in order, attributes quoted, text and values without bare markup, ids used once. Returns the number of elements, or -1 with a line on stderr. */
static int read_xml(const char *text)
{
    static char ids[400][40];
    const char *stack[16], *p = text;
    size_t length[16];
    int depth = 0, elements = 0, count = 0;
    if (strncmp(p, "<svg xmlns=\"http://www.w3.org/2000/svg\" ", 40)) { TEST_FAIL("no svg: %.60s", p); return -1; }
    while (*p) {
        if (*p == '&' && strncmp(p, "&amp;", 5) && strncmp(p, "&lt;", 4) && strncmp(p, "&gt;", 4) && strncmp(p, "&quot;", 6)) { TEST_FAIL("bare &: %.60s", p); return -1; }
        if (*p == '>' || (unsigned char)*p >= 0x7f || ((unsigned char)*p < 0x20 && *p != '\n')) { TEST_FAIL("bare character: %.60s", p); return -1; }
        if (*p != '<') { p++; continue; }
        const char *name = ++p;
        int closes = *p == '/';
        if (closes) name = ++p;
        while (*p >= 'a' && *p <= 'z') p++;
        size_t n = (size_t)(p - name);
        if (!n) { TEST_FAIL("no name: %.60s", name); return -1; }
        if (closes) {
            if (!depth || length[depth - 1] != n || memcmp(stack[depth - 1], name, n) || *p != '>') { TEST_FAIL("closes what is not open: %.60s", name); return -1; }
            depth--;
            p++;
            continue;
        }
        elements++;
        while (*p == ' ') {
            const char *attribute = ++p;
            while ((*p >= 'a' && *p <= 'z') || (*p >= 'A' && *p <= 'Z') || *p == '-' || *p == ':') p++;
            if (p == attribute || p[0] != '=' || p[1] != '"') { TEST_FAIL("attribute: %.60s", attribute); return -1; }
            const char *value = p += 2;
            while (*p && *p != '"' && *p != '<' && *p != '\n') p++;
            if (*p != '"') { TEST_FAIL("value: %.60s", value); return -1; }
            if (!strncmp(attribute, "id=", 3)) {
                CHECK(p - value < 40 && count < 400);
                snprintf(ids[count], sizeof ids[count], "%.*s", (int)(p - value), value);
                for (int i = 0; i < count; i++) if (!strcmp(ids[i], ids[count])) TEST_FAIL("id %s twice", ids[i]);
                count++;
            }
            p++;
        }
        if (p[0] == '/' && p[1] == '>') { p += 2; continue; }
        if (*p != '>' || depth == 16) { TEST_FAIL("tag: %.60s", name); return -1; }
        stack[depth] = name;
        length[depth++] = n;
        p++;
    }
    if (depth) { TEST_FAIL("%d elements are open at the end", depth); return -1; }
    return elements;
}

/* The picture says who holds what: each cell's ranks are those whose part has the cell's first element. */
TEST(svg)
{
    state = 31;
    int drawn = 0, flats = 0;
    for (int round = 0; round < 1500; round++) {
        problem p;
        llmpar_mesh mesh;
        make_problem(&p);
        memset(&mesh, 0, sizeof mesh);
        memcpy(mesh.degree, p.degree, sizeof mesh.degree);
        if (round % 50 == 0) p.tensor.name = "a<b> & \"c\"\n\x01\xff";
        size_t need = llmpar_dtensor_svg(&p.tensor, &mesh, NULL, 0);
        char *text = (char *)malloc(need + 1), id[64];
        CHECK_INT(llmpar_dtensor_svg(&p.tensor, &mesh, text, need + 1), need);
        CHECK_INT(strlen(text), need);
        if (read_xml(text) < 0) { free(text); return; }
        for (int r = 0; r < p.ranks; r++) {
            snprintf(id, sizeof id, "<g id=\"rank-%d\">", r);
            CHECK_TEXT(text, id);
        }
        const char *cell = text;
        while ((cell = strstr(cell, "id=\"cell-")) != NULL) {
            int row, column, x, y;
            char ranks[80] = "", want[80] = "", label[80];
            CHECK_INT(sscanf(cell, "id=\"cell-%d-%d\" data-ranks=\"%79[^\"]\" x=\"%d\" y=\"%d\"", &row, &column, ranks, &x, &y), 5);
            int64_t at[2] = { 0, 0 }, index;
            for (int d = 0; d < 2; d++) { /* the first element, from the labels */
                snprintf(label, sizeof label, "<g id=\"%s-%d\" ", d ? "column" : "row", d ? column : row);
                const char *g = strstr(text, label), *colon = g;
                if (!g) { TEST_FAIL("no label %s", label); break; }
                const char *end = strstr(g, "</g>");
                if (!d && p.tensor.dims == 1) continue;
                do { colon = strchr(colon + 1, ':'); } while (colon && colon < end && (colon[-1] < '0' || colon[-1] > '9'));
                if (!colon || colon > end) { TEST_FAIL("no range in %.120s", g); break; }
                while (colon[-1] >= '0' && colon[-1] <= '9') colon--;
                at[d] = atoll(colon);
            }
            index = p.tensor.dims == 1 ? at[1] : at[0] * p.tensor.shape[1] + at[1];
            int run = 0;
            for (int r = 0; r <= p.ranks; r++) { /* "0-3 5" */
                static int64_t really[24 * 24 * 24 * 24];
                int32_t coordinate[LLMPAR_MESH_AXES];
                int64_t begin, holds = 0;
                if (r < p.ranks) {
                    coordinate_of(&p, r, coordinate);
                    for (int64_t e = cut_really(&p, coordinate, really, &begin) - 1; e >= 0; e--) holds |= really[e] == index;
                }
                if (holds) { run++; continue; }
                size_t used = strlen(want);
                if (run > 2) snprintf(want + used, sizeof want - used, "%s%d-%d", used ? " " : "", r - run, r - 1);
                else for (int k = run; k > 0; k--, used = strlen(want)) snprintf(want + used, sizeof want - used, "%s%d", used ? " " : "", r - k);
                run = 0;
            }
            if (strcmp(ranks, want)) { TEST_FAIL("cell %d %d: ranks \"%s\", want \"%s\"\n%s", row, column, ranks, want, text); free(text); return; }
            drawn++;
            for (int i = 0; i < p.tensor.placements; i++) flats += p.tensor.placement[i].kind == LLMPAR_FLAT;
            cell++;
        }
        free(text);
    }
    CHECK(drawn > 800 && flats > 120);
}

TEST_LIST(T_(axes), T_(bad_degrees), T_(mesh_that_is_not_the_world), T_(local_parts), T_(known_parts), T_(refused_tensors), T_(full_and_cut), T_(what_full_refuses), T_(prints), T_(svg))
