/* redistribute: random tensors on random meshes of up to 3 axes and 12 ranks, or 4 axes and 16, go from random placements to random others, and every rank's result is compared with the definition: what the whole tensor is,
   cut again element by element. Planned bytes are compared with what the communicators counted, and both with the least that could be sent, counted here element by element too. */
#include "test.h"

enum { MESHES = 84, CASES = 240, RANKS = 16, MOST = 1200 }; /* 20,160 cases */

static uint64_t state = 20260731;
static int64_t below(int64_t n) /* random, main thread only */
{
    state ^= state << 13; state ^= state >> 7; state ^= state << 17;
    return (int64_t)((state >> 11) % (uint64_t)n);
}

static void no_leak(const llmpar_ctx *ctx, void *user)
{
    (void)user;
    CHECK_INT(ctx->heap.live, 0);
}
static llmpar_status launch(int ranks, llmpar_rank_fn fn, void *user, llmpar_error *error)
{
    llmpar_launch_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.ranks = ranks;
    desc.check = no_leak;
    return llmpar_launch(&desc, fn, user, error);
}

/* ---- the definition ---- */

static void coordinate_of(const int32_t degree[LLMPAR_MESH_AXES], int32_t rank, int32_t coordinate[LLMPAR_MESH_AXES])
{
    for (int a = LLMPAR_MESH_AXES - 1; a >= 0; a--) {
        coordinate[a] = rank % degree[a];
        rank /= degree[a];
    }
}

static int64_t elements_of(const llmpar_dtensor *t)
{
    int64_t n = 1;
    for (int d = 0; d < t->dims; d++) n *= t->shape[d];
    return n;
}

/* The global indices of what a coordinate holds, in order; *shard_begin: where they begin in its flat shard. */
static int64_t cut_really(const llmpar_dtensor *t, const int32_t degree[LLMPAR_MESH_AXES], const int32_t coordinate[LLMPAR_MESH_AXES], int32_t *list, int64_t *shard_begin)
{
    int64_t n = elements_of(t), shape[LLMPAR_MAX_DIMS] = { 0 };
    *shard_begin = 0;
    for (int64_t e = 0; e < n; e++) list[e] = (int32_t)e;
    for (int d = 0; d < t->dims; d++) shape[d] = t->shape[d];
    for (int32_t i = 0; i < t->placements; i++) {
        const llmpar_placement *p = &t->placement[i];
        int64_t kept = 0;
        if (p->kind == LLMPAR_SHARD) {
            int64_t grain = p->grain ? p->grain : 1, replicas = p->replicas ? p->replicas : 1, parts = degree[p->axis] / replicas, part = coordinate[p->axis] / replicas, inner = 1, extent = shape[p->dim];
            for (int d = p->dim + 1; d < t->dims; d++) inner *= shape[d];
            int64_t begin = part * (extent / grain) / parts * grain, end = (part + 1) * (extent / grain) / parts * grain;
            for (int64_t e = 0; e < n; e++) {
                int64_t at = e / inner % extent;
                if (at >= begin && at < end) list[kept++] = list[e];
            }
            shape[p->dim] = end - begin;
        } else if (p->kind == LLMPAR_FLAT) {
            int64_t size = p->unit_elements / degree[p->axis];
            for (int64_t e = 0; e < n; e++)
                if ((p->offset + e) / (size ? size : 1) == coordinate[p->axis]) {
                    if (!kept) *shard_begin = (p->offset + e) % size;
                    list[kept++] = list[e];
                }
        } else {
            continue;
        }
        n = kept;
    }
    return n;
}

/* What becomes of each Partial axis: 'k' stays, 'r' is reduced; and 'f': a new sum, whose value stands at coordinate 0. 0: none of it. */
static void roles_of(const llmpar_dtensor *from, const llmpar_dtensor *to, const int32_t degree[LLMPAR_MESH_AXES], char role[LLMPAR_MESH_AXES])
{
    int order[LLMPAR_MESH_AXES] = { 0 };
    memset(role, 0, LLMPAR_MESH_AXES);
    for (int i = 0; i < to->placements; i++) order[to->placement[i].axis] = i;
    for (int i = 0; i < from->placements; i++) {
        const llmpar_placement *p = &from->placement[i];
        if ((p->kind != LLMPAR_PARTIAL_SUM && p->kind != LLMPAR_PARTIAL_MAX) || degree[p->axis] == 1) continue;
        role[p->axis] = 'r';
        for (int j = 0; j < to->placements; j++)
            if (to->placement[j].axis == p->axis && to->placement[j].kind == p->kind) role[p->axis] = 'k';
        for (int j = 0; j < i; j++) {
            const llmpar_placement *o = &from->placement[j];
            int other = o->kind == (p->kind == LLMPAR_PARTIAL_SUM ? LLMPAR_PARTIAL_MAX : LLMPAR_PARTIAL_SUM) && degree[o->axis] > 1;
            if (other && (role[o->axis] == 'r' || order[o->axis] > order[p->axis])) role[p->axis] = 'r';
        }
    }
    for (int j = 0; j < to->placements; j++) {
        const llmpar_placement *p = &to->placement[j];
        if (p->kind == LLMPAR_PARTIAL_SUM && degree[p->axis] > 1 && role[p->axis] != 'k') role[p->axis] = role[p->axis] == 'r' ? 'F' : 'f'; /* F: reduced, and then a new sum */
    }
}
static int is_reduced(char role) { return role == 'r' || role == 'F'; }
static int is_fresh(char role) { return role == 'f' || role == 'F'; }

static uint64_t mix(uint64_t x)
{
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

typedef union scalar { float f32; double f64; int64_t i64; int32_t i32; uint16_t bits16; uint8_t bits8; } scalar;

/* The contribution of a coordinate to a global element: it depends on the axes on which `from` is Partial. */
static scalar contribution(const llmpar_dtensor *from, int64_t element, const int32_t coordinate[LLMPAR_MESH_AXES])
{
    uint64_t key = (uint64_t)element;
    int partial = 0;
    for (int i = 0; i < from->placements; i++) {
        const llmpar_placement *p = &from->placement[i];
        if (p->kind != LLMPAR_PARTIAL_SUM && p->kind != LLMPAR_PARTIAL_MAX) continue;
        key = mix(key * 64 + (uint64_t)coordinate[p->axis] * 8 + (uint64_t)p->axis);
        partial = 1;
    }
    uint64_t bits = mix(key);
    scalar s;
    memset(&s, 0, sizeof s);
    double x = ((double)(bits >> 40) - 8388608.0) * (double)(1 << (bits & 15)) / 1048576.0;
    switch (from->dtype) {
    case LLMPAR_F32: s.f32 = !partial && bits % 7 == 0 ? -0.0f : (float)x; break;
    case LLMPAR_F64: s.f64 = x * 1.0000001; break;
    case LLMPAR_I64: s.i64 = (int64_t)(bits >> 8) - ((int64_t)1 << 55); break;
    case LLMPAR_I32: s.i32 = (int32_t)bits; break;
    case LLMPAR_BF16: s.bits16 = (uint16_t)bits; break;
    default: s.bits8 = (uint8_t)bits; break;
    }
    return s;
}

static scalar combine(llmpar_dtype dtype, llmpar_placement_kind kind, scalar a, scalar b)
{
    scalar s = a;
    int sum = kind == LLMPAR_PARTIAL_SUM;
    if (dtype == LLMPAR_F32) s.f32 = sum ? a.f32 + b.f32 : a.f32 > b.f32 ? a.f32 : b.f32;
    else if (dtype == LLMPAR_F64) s.f64 = sum ? a.f64 + b.f64 : a.f64 > b.f64 ? a.f64 : b.f64;
    else s.i64 = sum ? (int64_t)((uint64_t)a.i64 + (uint64_t)b.i64) : a.i64 > b.i64 ? a.i64 : b.i64;
    return s;
}

typedef struct item { llmpar_dtensor from, to; int32_t degree[LLMPAR_MESH_AXES]; int64_t planned, counted[RANKS]; } item;

/* The element after reduction of placements i.. of `from`, coordinates [lo, hi) of placement i's axis. lo < 0: all that its role says. */
static scalar whole(const item *c, const char role[LLMPAR_MESH_AXES], int i, int32_t lo, int32_t hi, int64_t element, int32_t coordinate[LLMPAR_MESH_AXES])
{
    if (i == c->from.placements) return contribution(&c->from, element, coordinate);
    const llmpar_placement *p = &c->from.placement[i];
    if (!is_reduced(role[p->axis])) return whole(c, role, i + 1, -1, 0, element, coordinate);
    if (lo < 0) {
        int32_t own = coordinate[p->axis];
        scalar s = whole(c, role, i, 0, c->degree[p->axis], element, coordinate);
        coordinate[p->axis] = own;
        return s;
    }
    if (hi - lo == 1) {
        coordinate[p->axis] = lo;
        return whole(c, role, i + 1, -1, 0, element, coordinate);
    }
    int32_t left = 1;
    while (left * 2 < hi - lo) left *= 2;
    scalar a = whole(c, role, i, lo, lo + left, element, coordinate), b = whole(c, role, i, lo + left, hi, element, coordinate);
    return combine(c->from.dtype, p->kind, a, b);
}

/* The least bytes that all ranks together send. */
static int64_t least_bytes(const item *c)
{
    static int32_t list[MOST];
    static unsigned char held[RANKS][MOST], needed[RANKS][MOST];
    char role[LLMPAR_MESH_AXES];
    int64_t n = elements_of(&c->from), moved = 0, contributions = 1, begin;
    int32_t ranks = 1;
    roles_of(&c->from, &c->to, c->degree, role);
    for (int a = 0; a < LLMPAR_MESH_AXES; a++) {
        ranks *= c->degree[a];
        if (is_reduced(role[a])) contributions *= c->degree[a];
    }
    memset(held, 0, sizeof held);
    memset(needed, 0, sizeof needed);
    for (int32_t r = 0; r < ranks; r++) {
        int32_t coordinate[LLMPAR_MESH_AXES];
        int fresh = 0;
        coordinate_of(c->degree, r, coordinate);
        for (int64_t e = cut_really(&c->from, c->degree, coordinate, list, &begin) - 1; e >= 0; e--) held[r][list[e]] = 1;
        for (int a = 0; a < LLMPAR_MESH_AXES; a++) fresh |= is_fresh(role[a]) && coordinate[a];
        if (fresh) continue;
        for (int64_t e = cut_really(&c->to, c->degree, coordinate, list, &begin) - 1; e >= 0; e--) needed[r][list[e]] = 1;
    }
    for (int64_t e = 0; e < n; e++)
        for (int32_t first = 0; first < ranks; first++) { /* each kept contribution is an element of its own: `first` stands for it */
            int32_t at[LLMPAR_MESH_AXES], readers = 0;
            int leads = 1;
            coordinate_of(c->degree, first, at);
            for (int a = 0; a < LLMPAR_MESH_AXES; a++) leads = leads && (role[a] == 'k' || at[a] == 0);
            for (int32_t r = 0; r < ranks && leads; r++) {
                int32_t other[LLMPAR_MESH_AXES];
                int same = 1;
                coordinate_of(c->degree, r, other);
                for (int a = 0; a < LLMPAR_MESH_AXES; a++) same = same && (role[a] != 'k' || at[a] == other[a]);
                if (same) readers += needed[r][e] && !(contributions == 1 && held[r][e]);
            }
            if (leads) moved += contributions == 1 ? readers : contributions - 1 + readers - 1;
        }
    return moved * (int64_t)llmpar_dtype_size(c->from.dtype);
}

/* ---- random requests ---- */

static void make_mesh(int32_t degree[LLMPAR_MESH_AXES], int number)
{
    static const int32_t few[] = { 2, 3, 4, 5, 6, 8, 12 };
    int axes = number % 8 == 0 ? 1 : number % 8 < 4 ? 2 : number % 8 < 7 || number % 3 ? 3 : 4, left = axes == 4 ? 16 : 12;
    for (int a = 0; a < LLMPAR_MESH_AXES; a++) degree[a] = 1;
    for (int k = 0; k < axes; k++) {
        int a;
        int32_t d;
        do { a = (int)below(LLMPAR_MESH_AXES); } while (degree[a] > 1);
        do { d = few[below(axes == 1 ? 7 : 3)]; } while (d << (axes - 1 - k) > left);
        degree[a] = d;
        left /= d;
    }
}

static void make_placements(llmpar_dtensor *t, const int32_t degree[LLMPAR_MESH_AXES], int partial)
{
    int64_t grain[LLMPAR_MAX_DIMS] = { 0 }, n = elements_of(t);
    int order[LLMPAR_MESH_AXES] = { 0, 1, 2, 3, 4 }, flat = 0, plain = below(3) == 0;
    for (int i = LLMPAR_MESH_AXES - 1; i > 0; i--) {
        int j = (int)below(i + 1), swap = order[i];
        order[i] = order[j];
        order[j] = swap;
    }
    t->placements = 0;
    for (int i = 0; i < LLMPAR_MESH_AXES; i++) {
        llmpar_placement *p = &t->placement[t->placements];
        int32_t d = degree[order[i]];
        int64_t what = below(10);
        memset(p, 0, sizeof *p);
        p->axis = (llmpar_axis)order[i];
        if (d == 1 && below(4)) continue;
        if (what == 0) continue; /* not named */
        if (what <= 1 || (what >= 4 && (flat || t->dims == 0) && what < 8)) {
            p->kind = LLMPAR_REPLICATE;
        } else if (what <= 3 && partial) {
            p->kind = partial == 1 || (partial == 3 && below(2)) ? LLMPAR_PARTIAL_SUM : LLMPAR_PARTIAL_MAX;
        } else if (what < 8 && t->dims && !flat) {
            p->kind = LLMPAR_SHARD;
            p->dim = (int32_t)below(t->dims);
            p->grain = plain ? 0 : below(4);
            int64_t g = p->grain ? p->grain : 1;
            if (t->shape[p->dim] % g || (grain[p->dim] && grain[p->dim] % g)) p->grain = 0;
            grain[p->dim] = p->grain ? p->grain : 1;
            if (!plain && below(4) == 0) p->replicas = d % 2 == 0 ? 2 : d % 3 == 0 ? 3 : d;
        } else if (!flat) {
            flat = 1;
            p->kind = LLMPAR_FLAT;
            if (below(2)) { /* evenly, where the cuts before are even too */
                int64_t part = n;
                for (int k = 0; k < t->placements; k++)
                    if (t->placement[k].kind == LLMPAR_SHARD) part = degree[t->placement[k].axis] && part % degree[t->placement[k].axis] == 0 ? part / degree[t->placement[k].axis] : n;
                p->unit_elements = (part + d - 1) / d * d;
            }
            llmpar_error error;
            llmpar_redistribute_plan plan;
            t->placements++;
            llmpar_error_clear(&error);
            if (!p->unit_elements || llmpar_redistribute_plan_make(t, t, degree, &plan, &error) == LLMPAR_ERR_SHAPE) {
                p->offset = below(20);
                p->unit_elements = (p->offset + n + below(30) + d - 1) / d * d;
            }
            continue;
        } else {
            continue;
        }
        t->placements++;
    }
}

static void make_case(item *c, const int32_t degree[LLMPAR_MESH_AXES])
{
    static const int64_t extents[] = { 1, 2, 3, 4, 4, 5, 6, 7, 8, 8, 12, 12, 24, 24 };
    static const llmpar_dtype summed[] = { LLMPAR_F32, LLMPAR_F32, LLMPAR_F64, LLMPAR_I64 }, moved[] = { LLMPAR_F32, LLMPAR_I32, LLMPAR_BF16, LLMPAR_U8 };
    int partial = (int)below(5); /* 0, 4 none; 1 sums, 2 maxima, 3 both */
    if (partial > 3) partial = 0;
    memset(c, 0, sizeof *c);
    memcpy(c->degree, degree, sizeof c->degree);
    do {
        c->from.dims = below(20) ? 1 + (int32_t)below(4) : 0;
        for (int d = 0; d < c->from.dims; d++) c->from.shape[d] = below(60) ? extents[below(14)] : 0;
    } while (elements_of(&c->from) > MOST);
    c->from.name = "w";
    c->from.dtype = partial ? summed[below(4)] : moved[below(4)];
    c->to = c->from;
    make_placements(&c->from, degree, partial);
    if (below(3) == 0) { /* something near: a placement left out or replaced */
        int32_t i = c->from.placements ? (int32_t)below(c->from.placements) : 0;
        c->to = c->from;
        if (c->from.placements && below(2)) {
            if (below(2)) i = c->to.placements - 1;
            memmove(&c->to.placement[i], &c->to.placement[i + 1], (size_t)(--c->to.placements - i) * sizeof c->to.placement[0]);
        } else if (c->from.placements && c->to.dims && c->to.placement[i].kind != LLMPAR_FLAT) {
            llmpar_placement *p = &c->to.placement[i];
            memset(&p->dim, 0, sizeof *p - offsetof(llmpar_placement, dim));
            p->kind = LLMPAR_SHARD;
            p->dim = (int32_t)below(c->to.dims);
        }
        llmpar_redistribute_plan plan;
        llmpar_error error;
        llmpar_error_clear(&error);
        if (llmpar_redistribute_plan_make(&c->from, &c->to, degree, &plan, &error) != LLMPAR_OK) c->to = c->from; /* a Flat that no longer fits */
    } else {
        make_placements(&c->to, degree, partial);
    }
}

/* ---- the property ---- */

/* Any degrees on any axes, for tests only: llmpar_mesh_create refuses cp and pp. */
static llmpar_status mesh_of(llmpar_ctx *ctx, const int32_t degree[LLMPAR_MESH_AXES], llmpar_mesh *mesh)
{
    llmpar_status st = LLMPAR_OK;
    memset(mesh, 0, sizeof *mesh);
    mesh->ctx = ctx;
    mesh->world = ctx->comm;
    memcpy(mesh->degree, degree, sizeof mesh->degree);
    coordinate_of(degree, ctx->rank, mesh->coordinate);
    for (int a = 0; a < LLMPAR_MESH_AXES && !st; a++) {
        int32_t first[LLMPAR_MESH_AXES];
        memcpy(first, mesh->coordinate, sizeof first);
        first[a] = 0;
        st = llmpar_comm_split(ctx->comm, llmpar_mesh_rank_at(mesh, first), mesh->coordinate[a], llmpar_axis_name((llmpar_axis)a), &mesh->comm[a]);
    }
    return st;
}

static uint64_t sent(const llmpar_mesh *mesh)
{
    uint64_t bytes = mesh->world->bytes_sent;
    for (int a = 0; a < LLMPAR_MESH_AXES; a++) bytes += mesh->comm[a]->bytes_sent;
    return bytes;
}

static int64_t local_elements(const llmpar_dtensor *t, const int32_t degree[LLMPAR_MESH_AXES], int64_t held)
{
    for (int i = 0; i < t->placements; i++)
        if (t->placement[i].kind == LLMPAR_FLAT) return t->placement[i].unit_elements / degree[t->placement[i].axis];
    return held;
}

static int failed_cases; /* atomic */

static llmpar_status run_case(llmpar_mesh *mesh, llmpar_stream *stream, item *c)
{
    int32_t list[MOST], *const coordinate = mesh->coordinate;
    char role[LLMPAR_MESH_AXES], text[4000];
    size_t size = llmpar_dtype_size(c->from.dtype);
    int64_t begin, held, local;
    llmpar_redistribute_plan plan;
    llmpar_error error;
    llmpar_error_clear(&error);
    llmpar_status st = llmpar_redistribute_plan_make(&c->from, &c->to, mesh->degree, &plan, &error);
    if (st) return llmpar_fail(mesh->ctx, st, "%s", error.text);
    roles_of(&c->from, &c->to, c->degree, role);
    held = cut_really(&c->from, c->degree, coordinate, list, &begin);
    local = local_elements(&c->from, c->degree, held);
    char *in = (char *)malloc((size_t)local * size + 1), *scratch = (char *)malloc((size_t)llmpar_redistribute_scratch(&plan, coordinate) * size + 1);
    memset(in, 0x55, (size_t)local * size);
    for (int64_t e = 0; e < held; e++) {
        scalar s = contribution(&c->from, list[e], coordinate);
        memcpy(in + (size_t)(begin + e) * size, &s, size);
    }
    held = cut_really(&c->to, c->degree, coordinate, list, &begin);
    local = local_elements(&c->to, c->degree, held);
    char *out = (char *)malloc((size_t)local * size + 1), *want = (char *)malloc((size_t)local * size + 1);
    memset(out, 0x7f, (size_t)local * size);
    memset(want, 0x7f, (size_t)local * size); /* the rest of a flat shard stays as it is */
    int fresh = 0;
    for (int a = 0; a < LLMPAR_MESH_AXES; a++) fresh |= is_fresh(role[a]) && coordinate[a];
    for (int64_t e = 0; e < held; e++) {
        scalar s;
        memset(&s, 0, sizeof s);
        if (!fresh) s = whole(c, role, 0, -1, 0, list[e], coordinate);
        else if (c->from.dtype == LLMPAR_F32) s.f32 = -0.0f;
        else if (c->from.dtype == LLMPAR_F64) s.f64 = -0.0;
        memcpy(want + (size_t)(begin + e) * size, &s, size);
    }
    uint64_t before = sent(mesh);
    st = llmpar_redistribute(&plan, mesh, stream, in, scratch, out);
    if (stream && !st) st = mesh->ctx->device->synchronize(mesh->ctx->device, stream);
    c->counted[mesh->ctx->rank] = (int64_t)(sent(mesh) - before);
    if (!st && memcmp(out, want, (size_t)local * size) && __atomic_add_fetch(&failed_cases, 1, __ATOMIC_SEQ_CST) <= 5) {
        int64_t e = 0;
        while (!memcmp(out + (size_t)e * size, want + (size_t)e * size, size)) e++;
        llmpar_redistribute_plan_print(&plan, text, sizeof text);
        TEST_FAIL("rank %d (mesh %d %d %d %d %d): element %lld of %lld of its part is not what it should be:\n%s", (int)mesh->ctx->rank, c->degree[0], c->degree[1], c->degree[2], c->degree[3], c->degree[4], (long long)e, (long long)held, text);
    }
    free(in);
    free(out);
    free(want);
    free(scratch);
    return st;
}

typedef struct batch { int32_t degree[LLMPAR_MESH_AXES]; int count; item *items; } batch;

static llmpar_status run_batch(llmpar_ctx *ctx, void *user)
{
    const batch *b = (const batch *)user;
    llmpar_mesh mesh;
    llmpar_status st = mesh_of(ctx, b->degree, &mesh);
    for (int i = 0; i < b->count && !st; i++) st = run_case(&mesh, NULL, &b->items[i]);
    for (int a = 0; a < LLMPAR_MESH_AXES; a++) llmpar_comm_destroy(mesh.comm[a]);
    return st;
}

TEST(any_to_any)
{
    static item items[CASES];
    int64_t ops[7] = { 0 }, cases = 0, reductions = 0, over = 0, several = 0, axes[6] = { 0 };
    double worst = 0;
    int meshes = getenv("LLMPAR_TEST_QUICK") ? MESHES / 8 : MESHES;
    for (int m = 0; m < meshes && !test_failures; m++) {
        batch b;
        int32_t ranks = 1, used = 0;
        make_mesh(b.degree, m);
        for (int a = 0; a < LLMPAR_MESH_AXES; a++) ranks *= b.degree[a], used += b.degree[a] > 1;
        axes[used]++;
        b.items = items;
        b.count = CASES;
        for (int i = 0; i < CASES; i++) {
            llmpar_redistribute_plan plan;
            llmpar_error error;
            char role[LLMPAR_MESH_AXES];
            int reduces = 0;
            make_case(&items[i], b.degree);
            llmpar_error_clear(&error);
            CHECK_OK(llmpar_redistribute_plan_make(&items[i].from, &items[i].to, b.degree, &plan, &error));
            if (error.status) { TEST_FAIL("%s", error.text); return; }
            int64_t least = least_bytes(&items[i]), steps = 0;
            for (int s = 0; s < plan.steps; s++) steps += plan.step[s].bytes, ops[plan.step[s].op]++;
            roles_of(&items[i].from, &items[i].to, b.degree, role);
            for (int a = 0; a < LLMPAR_MESH_AXES; a++) reduces |= is_reduced(role[a]);
            CHECK_INT(plan.bound, least);
            CHECK_INT(llmpar_redistribute_bound(&items[i].from, &items[i].to, b.degree), least);
            CHECK_INT(plan.bytes, steps);
            CHECK(reduces ? plan.bytes <= 2 * least : plan.bytes == least);
            if (least && (double)plan.bytes / (double)least > worst) worst = (double)plan.bytes / (double)least;
            items[i].planned = plan.bytes;
            reductions += reduces;
            over += plan.bytes > least;
            several += plan.steps > 1;
        }
        CHECK_OK(launch(ranks, run_batch, &b, NULL));
        for (int i = 0; i < CASES && !test_failures; i++) {
            int64_t counted = 0;
            for (int r = 0; r < RANKS; r++) counted += items[i].counted[r];
            CHECK_INT(counted, items[i].planned);
        }
        cases += CASES;
    }
    printf("  %lld cases on %d meshes (%lld %lld %lld %lld of 1 2 3 4 axes), %lld with reductions, %lld of several steps; %lld send more than the bound, at most %.3f of it\n", (long long)cases, meshes, (long long)axes[1], (long long)axes[2],
           (long long)axes[3], (long long)axes[4], (long long)reductions, (long long)several, (long long)over, worst);
    printf("  steps: local %lld all_gather %lld broadcast %lld reduce_scatter %lld all_reduce %lld all_to_all %lld exchange %lld\n", (long long)ops[0], (long long)ops[1], (long long)ops[2], (long long)ops[3], (long long)ops[4],
           (long long)ops[5], (long long)ops[6]);
    for (int o = 0; o < 7; o++) CHECK(ops[o] * 400 > cases || meshes < MESHES);
    CHECK(meshes < MESHES || cases >= 20000);
}

TEST_LIST(T_(any_to_any))
