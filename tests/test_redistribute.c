/* redistribute: random tensors on random meshes of up to 3 axes and 12 ranks, or 4 axes and 16, go from random placements to random others, and every rank's result is compared with the definition: what the whole tensor is,
   cut again element by element (under mpirun, on meshes of that many processes). Planned bytes are compared with what the communicators counted, and both with the least that could be sent, counted here element by element too. */
#include "debug_device.h"
#include "test.h"

enum { MESHES = 84, CASES = 240, RANKS = 16, MOST = 1200 }; /* 20,160 cases */

static uint64_t state = 20260731;
static int64_t below(int64_t n) /* random, main thread only */
{
    state ^= state << 13; state ^= state >> 7; state ^= state << 17;
    return (int64_t)((state >> 11) % (uint64_t)n);
}

static llmpar_status launch(int ranks, llmpar_rank_fn fn, void *user, llmpar_error *error)
{
    llmpar_launch_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.ranks = ranks;
    desc.check = test_no_leak;
    if (test_world == 1) desc.transport = LLMPAR_TRANSPORT_THREADS;
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

/* Under mpirun: of that many ranks. */
static void make_mesh(int32_t degree[LLMPAR_MESH_AXES], int number)
{
    static const int32_t few[] = { 2, 3, 4, 5, 6, 8, 12 };
    int axes = number % 8 == 0 ? 1 : number % 8 < 4 ? 2 : number % 8 < 7 || number % 3 ? 3 : 4, left = axes == 4 ? 16 : 12, ranks = 1;
    for (int a = 0; a < LLMPAR_MESH_AXES; a++) degree[a] = 1;
    for (int k = 0; k < axes; k++) {
        int a;
        int32_t d;
        do { a = (int)below(LLMPAR_MESH_AXES); } while (degree[a] > 1);
        do { d = few[below(axes == 1 ? 7 : 3)]; } while (d << (axes - 1 - k) > left);
        degree[a] = d;
        left /= d;
        ranks *= d;
    }
    if (test_world > 1 && ranks != test_world) make_mesh(degree, (int)below(8));
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
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    int meshes = MESHES / 4;
#else
    int meshes = getenv("LLMPAR_TEST_QUICK") || test_world > 1 ? MESHES / 8 : MESHES;
#endif
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
            CHECK_INT(test_sum((int)counted), items[i].planned); /* under MPI each process has counted its own */
        }
        cases += CASES;
    }
    printf("  %lld cases on %d meshes (%lld %lld %lld %lld of 1 2 3 4 axes), %lld with reductions, %lld of several steps; %lld send more than the bound, at most %.3f of it\n", (long long)cases, meshes, (long long)axes[1], (long long)axes[2],
           (long long)axes[3], (long long)axes[4], (long long)reductions, (long long)several, (long long)over, worst);
    printf("  steps: local %lld all_gather %lld broadcast %lld reduce_scatter %lld all_reduce %lld all_to_all %lld exchange %lld\n", (long long)ops[0], (long long)ops[1], (long long)ops[2], (long long)ops[3], (long long)ops[4],
           (long long)ops[5], (long long)ops[6]);
    for (int o = 0; o < 7; o++) CHECK(ops[o] * 400 > cases || meshes < MESHES || test_world > 1);
    CHECK(meshes < MESHES || cases >= 20000 || test_world > 1);
}

/* On a device that delays everything to the wait: scratch is used again only behind what used it before. */
static llmpar_status run_late(llmpar_ctx *ctx, void *user)
{
    const batch *b = (const batch *)user;
    llmpar_mesh mesh;
    llmpar_stream *stream = NULL;
    llmpar_device *inner = ctx->device;
    debug_device *late = (debug_device *)malloc(sizeof *late);
    debug_device_init(late, inner, DEBUG_FIFO);
    ctx->device = ctx->comm->device = &late->table;
    llmpar_status st = mesh_of(ctx, b->degree, &mesh);
    if (!st) st = ctx->device->stream_create(ctx->device, "late", &stream);
    for (int i = 0; i < b->count && !st; i++) st = run_case(&mesh, stream, &b->items[i]);
    CHECK(late->most_pending > 3);
    CHECK_INT(late->pending, 0);
    if (stream) ctx->device->stream_destroy(ctx->device, stream);
    for (int a = 0; a < LLMPAR_MESH_AXES; a++) llmpar_comm_destroy(mesh.comm[a]);
    ctx->device = ctx->comm->device = inner;
    free(late);
    return st;
}
TEST(late_device)
{
    if (test_world > 1) return;
    static item items[60];
    state = 4711;
    for (int m = 0; m < 8 && !test_failures; m++) {
        batch b;
        int32_t ranks = 1;
        make_mesh(b.degree, m);
        for (int a = 0; a < LLMPAR_MESH_AXES; a++) ranks *= b.degree[a];
        b.items = items;
        b.count = 60;
        for (int i = 0; i < b.count; i++) make_case(&items[i], b.degree);
        CHECK_OK(launch(ranks, run_late, &b, NULL));
    }
}

/* ---- plans ---- */

static llmpar_dtensor matrix(int64_t rows, int64_t columns)
{
    llmpar_dtensor t;
    memset(&t, 0, sizeof t);
    t.name = "wq";
    t.dtype = LLMPAR_F32;
    t.dims = 2;
    t.shape[0] = rows;
    t.shape[1] = columns;
    return t;
}
static llmpar_placement *place(llmpar_dtensor *t, llmpar_placement_kind kind, llmpar_axis axis, int32_t dim)
{
    llmpar_placement *p = &t->placement[t->placements++];
    memset(p, 0, sizeof *p);
    p->kind = kind;
    p->axis = axis;
    p->dim = dim;
    return p;
}

/* What people ask for becomes the collectives that they expect. */
TEST(known_plans)
{
    static const int32_t tp4[LLMPAR_MESH_AXES] = { 1, 1, 1, 1, 4 }, two[LLMPAR_MESH_AXES] = { 1, 2, 1, 1, 2 };
    llmpar_redistribute_plan plan;
    llmpar_error error;
    char text[2000];
    llmpar_dtensor whole_one = matrix(8, 12), rows = whole_one, columns = whole_one, uneven = matrix(10, 12), uneven_whole = uneven, sum = whole_one, unit = whole_one, both = whole_one, flipped = whole_one;
    place(&rows, LLMPAR_SHARD, LLMPAR_AXIS_TP, 0);
    place(&columns, LLMPAR_SHARD, LLMPAR_AXIS_TP, 1);
    place(&uneven, LLMPAR_SHARD, LLMPAR_AXIS_TP, 0);
    place(&sum, LLMPAR_PARTIAL_SUM, LLMPAR_AXIS_TP, 0);
    place(&unit, LLMPAR_SHARD, LLMPAR_AXIS_TP, 0);
    place(&unit, LLMPAR_FLAT, LLMPAR_AXIS_DP_SHARD, 0)->unit_elements = 48;
    place(&both, LLMPAR_PARTIAL_SUM, LLMPAR_AXIS_DP_SHARD, 0);
    place(&both, LLMPAR_PARTIAL_SUM, LLMPAR_AXIS_TP, 0);
    place(&flipped, LLMPAR_PARTIAL_SUM, LLMPAR_AXIS_TP, 0);
    place(&flipped, LLMPAR_PARTIAL_SUM, LLMPAR_AXIS_DP_SHARD, 0);
    const struct { const llmpar_dtensor *from, *to; const int32_t *degree; const char *ops; int64_t bytes; } cases[] = {
        { &rows, &rows, tp4, "local", 0 },
        { &whole_one, &columns, tp4, "local", 0 },
        { &rows, &whole_one, tp4, "all_gather on tp", 4 * 3 * 96 },
        { &columns, &whole_one, tp4, "all_gather on tp", 4 * 3 * 96 },
        { &uneven, &uneven_whole, tp4, "broadcast on tp", 4 * 3 * 120 },
        { &rows, &columns, tp4, "all_to_all on tp", 4 * 72 },
        { &sum, &columns, tp4, "reduce_scatter on tp", 4 * 3 * 96 },
        { &sum, &whole_one, tp4, "all_reduce on tp", 4 * 6 * 96 },
        { &unit, &whole_one, two, "all_gather on dp_shard, all_gather on tp", 4 * 3 * 96 },
        { &both, &whole_one, two, "all_reduce on tp, all_reduce on dp_shard", 4 * 2 * 96 * 4 },
        { &both, &unit, two, "reduce_scatter on tp, reduce_scatter on dp_shard", 4 * 3 * 96 },
        { &flipped, &unit, two, "exchange", 4 * 3 * 96 }, /* dp_shard is reduced first, but cut last */
        { &whole_one, &sum, tp4, "local", 0 },
        { &rows, &sum, tp4, "exchange", 4 * 72 },
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        static const char *const names[] = { "local", "all_gather", "broadcast", "reduce_scatter", "all_reduce", "all_to_all", "exchange" };
        char ops[200] = "";
        llmpar_error_clear(&error);
        CHECK_OK(llmpar_redistribute_plan_make(cases[i].from, cases[i].to, cases[i].degree, &plan, &error));
        for (int s = 0; s < plan.steps; s++) {
            int axis = plan.step[s].op != LLMPAR_REDISTRIBUTE_LOCAL && plan.step[s].op != LLMPAR_REDISTRIBUTE_EXCHANGE;
            size_t used = strlen(ops);
            snprintf(ops + used, sizeof ops - used, "%s%s%s%s", s ? ", " : "", names[plan.step[s].op], axis ? " on " : "", axis ? llmpar_axis_name(plan.step[s].axis) : "");
        }
        if (strcmp(ops, cases[i].ops)) TEST_FAIL("plan %d: got \"%s\", want \"%s\"", (int)i, ops, cases[i].ops);
        CHECK_INT(plan.bytes, cases[i].bytes);
    }
    CHECK_OK(llmpar_redistribute_plan_make(&unit, &whole_one, two, &plan, &error));
    size_t need = llmpar_redistribute_plan_print(&plan, text, sizeof text);
    CHECK_INT(need, strlen(text));
    CHECK_INT(llmpar_redistribute_plan_print(&plan, NULL, 0), need);
    CHECK_TEXT(text, "wq f32[8,12]: [Shard(0) on tp, Flat(0) on dp_shard] -> [Replicate]\n"
                     "  1  all_gather     on dp_shard            384 bytes  -> [Shard(0) on tp]\n"
                     "  2  all_gather     on tp                  768 bytes  -> [Replicate]\n"
                     "1152 bytes are sent by 4 ranks together; no plan can send less than 1152\n");
}

/* A plan needs no ranks: 8,192 of them here. */
TEST(plan_for_many_ranks)
{
    static const int32_t degree[LLMPAR_MESH_AXES] = { 2, 512, 1, 1, 8 };
    llmpar_redistribute_plan plan;
    llmpar_error error;
    llmpar_dtensor from = matrix(4096, 14336), to = from;
    place(&from, LLMPAR_SHARD, LLMPAR_AXIS_TP, 0);
    place(&from, LLMPAR_FLAT, LLMPAR_AXIS_DP_SHARD, 0)->unit_elements = 4096 * 14336 / 8;
    place(&to, LLMPAR_SHARD, LLMPAR_AXIS_TP, 0);
    llmpar_error_clear(&error);
    CHECK_OK(llmpar_redistribute_plan_make(&from, &to, degree, &plan, &error));
    CHECK_INT(plan.steps, 1);
    CHECK_INT(plan.step[0].op, LLMPAR_REDISTRIBUTE_ALL_GATHER);
    CHECK_INT(plan.bytes, (int64_t)4 * 4096 * 14336 * 2 * 511); /* each rank of each group passes its part to 511 others */
    CHECK_INT(plan.bytes, plan.bound);
}

/* ---- bad requests ---- */

TEST(refused_requests)
{
    static const struct { const char *text; llmpar_status status; int what; } cases[] = {
        { "expected one dtype and shape", LLMPAR_ERR_SHAPE, 0 },
        { "from wq f32[8,12] to wq f64[8,12]", LLMPAR_ERR_SHAPE, 1 },
        { "Flat on dp_shard: the 72 elements of rank 1 at offset 0 do not fit a unit of 48", LLMPAR_ERR_SHAPE, 2 },
        { "Partial(sum) of bf16 on tp cannot be reduced", LLMPAR_ERR_UNSUPPORTED, 3 },
        { "Partial(max) of u64 on tp cannot be reduced", LLMPAR_ERR_UNSUPPORTED, 4 },
        { "tp = 0, expected degrees of at least 1", LLMPAR_ERR_MESH, 5 },
        { "Shard(2) on tp, expected a dim below 2", LLMPAR_ERR_SHAPE, 6 },
        { "overflow", LLMPAR_ERR_OVERFLOW, 7 },
        { "Partial(sum) of i32 on tp cannot be reduced", LLMPAR_ERR_UNSUPPORTED, 8 },
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        int32_t degree[LLMPAR_MESH_AXES] = { 1, 2, 1, 1, 2 };
        llmpar_dtensor from = matrix(8, 12), to;
        llmpar_redistribute_plan plan;
        llmpar_error error;
        llmpar_error_clear(&error);
        to = from;
        switch (cases[i].what) {
        case 0: to.shape[1] = 11; break;
        case 1: to.dtype = LLMPAR_F64; break;
        case 2: from = to = matrix(9, 12); place(&from, LLMPAR_SHARD, LLMPAR_AXIS_TP, 0)->grain = 3; place(&from, LLMPAR_FLAT, LLMPAR_AXIS_DP_SHARD, 0)->unit_elements = 48; break;
        case 3: from.dtype = to.dtype = LLMPAR_BF16; place(&from, LLMPAR_PARTIAL_SUM, LLMPAR_AXIS_TP, 0); break;
        case 4: from.dtype = to.dtype = LLMPAR_U64; place(&from, LLMPAR_PARTIAL_MAX, LLMPAR_AXIS_TP, 0); break;
        case 5: degree[LLMPAR_AXIS_TP] = 0; break;
        case 6: place(&to, LLMPAR_SHARD, LLMPAR_AXIS_TP, 2); break;
        case 7: from.shape[0] = to.shape[0] = (int64_t)1 << 31; from.shape[1] = to.shape[1] = (int64_t)1 << 29; break;
        default: from.dtype = to.dtype = LLMPAR_I32; place(&to, LLMPAR_PARTIAL_SUM, LLMPAR_AXIS_TP, 0); break;
        }
        CHECK_STATUS(llmpar_redistribute_plan_make(&from, &to, degree, &plan, &error), cases[i].status);
        CHECK_TEXT(error.text, cases[i].text);
    }
}

/* Rank 1 asks for something else, or brings no buffer: every rank gets an error, and no result has been written anywhere. */
typedef struct bad { int what; llmpar_status status[4]; int written[4]; char text[4][700]; } bad;
static llmpar_status run_bad(llmpar_ctx *ctx, void *user)
{
    bad *b = (bad *)user;
    llmpar_mesh *mesh = NULL;
    llmpar_mesh_desc desc;
    llmpar_redistribute_plan plan;
    llmpar_error error;
    float in[48], out[96], scratch[400];
    memset(&desc, 0, sizeof desc);
    desc.tp = 4;
    llmpar_status st = llmpar_mesh_create(ctx, &desc, &mesh);
    if (st) return st;
    llmpar_dtensor from = matrix(8, 12), to = from;
    int odd = ctx->rank == 1;
    place(&from, LLMPAR_SHARD, LLMPAR_AXIS_TP, 0);
    if (odd && b->what == 1) place(&to, LLMPAR_SHARD, LLMPAR_AXIS_TP, 1);
    for (int i = 0; i < 96; i++) out[i] = 7;
    for (int i = 0; i < 48; i++) in[i] = 1;
    llmpar_error_clear(&error);
    st = llmpar_redistribute_plan_make(&from, &to, mesh->degree, &plan, &error);
    CHECK_OK(st);
    if (odd && b->what == 3) plan.degree[LLMPAR_AXIS_TP] = 2;
    if (!st) st = llmpar_redistribute(&plan, mesh, NULL, odd && b->what == 0 ? NULL : in, scratch, odd && b->what == 2 ? NULL : odd && b->what == 4 ? in : out);
    b->status[ctx->rank] = st;
    snprintf(b->text[ctx->rank], sizeof b->text[0], "%s", llmpar_last_error(ctx));
    for (int i = 0; i < 96; i++) b->written[ctx->rank] |= out[i] != 7;
    llmpar_mesh_destroy(mesh);
    return st;
}
TEST(error_on_every_rank)
{
    static const char *const texts[] = { "wq: redistribute: in is NULL, expected room for 96 bytes", "rank 1 (tp=1): barrier \"redistribute ", "wq: redistribute: out is NULL, expected room for 384 bytes",
                                         "the plan is for a mesh with tp = 2, expected this mesh's 4", "in, scratch and out overlap" };
    for (int what = 0; what < 5 && test_world == 1; what++) {
        bad b;
        llmpar_error error;
        memset(&b, 0, sizeof b);
        b.what = what;
        CHECK(launch(4, run_bad, &b, &error) != LLMPAR_OK);
        CHECK_TEXT(error.text, texts[what]);
        for (int r = 0; r < 4; r++) {
            CHECK(b.status[r] != LLMPAR_OK);
            CHECK(!b.written[r]);
            CHECK_TEXT(b.text[r], texts[what]);
        }
    }
}

TEST_LIST(T_(any_to_any), T_(late_device), T_(known_plans), T_(plan_for_many_ranks), T_(refused_requests), T_(error_on_every_rank))
