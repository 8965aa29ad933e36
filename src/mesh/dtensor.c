/* dtensor: the arithmetic of cutting. Placements are applied in their order: each SHARD shrinks the rectangle along one dim, a FLAT at the end takes a range of its row-major elements. */
#include "mesh/dtensor.h"

#include <string.h>

#include "base/size.h"
#include "mesh/mesh_internal.h"

static int64_t llmpar__dtensor_grain(const llmpar_placement *p) { return p->grain ? p->grain : 1; }
static int32_t llmpar__dtensor_replicas(const llmpar_placement *p) { return p->replicas ? p->replicas : 1; }

/* Part `part` of `extent` elements cut into `parts` at whole grains. */
static void llmpar__dtensor_part(int64_t extent, int64_t grain, int32_t parts, int32_t part, int64_t *offset, int64_t *length)
{
    int64_t begin = llmpar_piece_begin(part, extent / grain, parts) * grain;
    *offset = begin;
    *length = llmpar_piece_begin(part + 1, extent / grain, parts) * grain - begin;
}

LLMPAR_DEF llmpar_status llmpar_dtensor_check(const llmpar_dtensor *tensor, const int32_t degree[LLMPAR_MESH_AXES], llmpar_error *error)
{
    const char *name = tensor->name ? tensor->name : "tensor";
    int64_t elements, grain[LLMPAR_MAX_DIMS];
    int64_t smallest[LLMPAR_MAX_DIMS]; /* over the ranks */
    int seen[LLMPAR_MESH_AXES] = { 0, 0, 0, 0, 0 }, flat = 0;
    if (!llmpar_dtype_size(tensor->dtype)) return llmpar_error_set(error, LLMPAR_ERR_SHAPE, "%s: dtype %d is not a stored type", name, (int)tensor->dtype);
    if (tensor->dims < 0 || tensor->dims > LLMPAR_MAX_DIMS) return llmpar_error_set(error, LLMPAR_ERR_SHAPE, "%s: %d dims, expected 0 to %d", name, (int)tensor->dims, LLMPAR_MAX_DIMS);
    if (tensor->placements < 0 || tensor->placements > LLMPAR_MESH_AXES) return llmpar_error_set(error, LLMPAR_ERR_SHAPE, "%s: %d placements, expected 0 to %d", name, (int)tensor->placements, LLMPAR_MESH_AXES);
    for (int32_t d = 0; d < tensor->dims; d++)
        if (tensor->shape[d] < 0) return llmpar_error_set(error, LLMPAR_ERR_SHAPE, "%s: dim %d has extent %lld, expected 0 or more", name, (int)d, (long long)tensor->shape[d]);
    if (!llmpar_extent_product(tensor->shape, tensor->dims, &elements) || elements > INT64_MAX / (int64_t)llmpar_dtype_size(tensor->dtype))
        return llmpar_error_set(error, LLMPAR_ERR_OVERFLOW, "%s: the product of its extents overflows", name);
    for (int32_t d = 0; d < tensor->dims; d++) {
        smallest[d] = tensor->shape[d];
        grain[d] = 0;
    }
    for (int32_t i = 0; i < tensor->placements; i++) {
        const llmpar_placement *p = &tensor->placement[i];
        if ((unsigned)p->axis >= LLMPAR_MESH_AXES) return llmpar_error_set(error, LLMPAR_ERR_SHAPE, "%s: placement %d names axis %d, expected 0 to %d", name, (int)i, (int)p->axis, LLMPAR_MESH_AXES - 1);
        const char *axis = llmpar_axis_name(p->axis);
        if (seen[p->axis]++) return llmpar_error_set(error, LLMPAR_ERR_SHAPE, "%s: axis %s is named twice", name, axis);
        if (p->kind == LLMPAR_REPLICATE || p->kind == LLMPAR_PARTIAL_SUM || p->kind == LLMPAR_PARTIAL_MAX) continue;
        if (flat) return llmpar_error_set(error, LLMPAR_ERR_SHAPE, "%s: a cut on %s after Flat: expected Flat to be the last cut", name, axis);
        if (p->kind == LLMPAR_SHARD) {
            if (p->dim < 0 || p->dim >= tensor->dims) return llmpar_error_set(error, LLMPAR_ERR_SHAPE, "%s: Shard(%d) on %s, expected a dim below %d", name, (int)p->dim, axis, (int)tensor->dims);
            int64_t g = llmpar__dtensor_grain(p);
            int32_t replicas = llmpar__dtensor_replicas(p);
            if (g < 1 || tensor->shape[p->dim] % g || (grain[p->dim] && grain[p->dim] % g))
                return llmpar_error_set(error, LLMPAR_ERR_SHAPE, "%s: Shard(%d) on %s: grain %lld does not divide %s %lld", name, (int)p->dim, axis, (long long)g, grain[p->dim] && g > 0 && tensor->shape[p->dim] % g == 0 ? "the grain of the earlier cut," : "the extent",
                                        (long long)(grain[p->dim] && g > 0 && tensor->shape[p->dim] % g == 0 ? grain[p->dim] : tensor->shape[p->dim]));
            if (replicas < 1 || degree[p->axis] % replicas)
                return llmpar_error_set(error, LLMPAR_ERR_SHAPE, "%s: Shard(%d) on %s: %d replicas do not divide the degree %d", name, (int)p->dim, axis, (int)replicas, (int)degree[p->axis]);
            grain[p->dim] = g;
            smallest[p->dim] = smallest[p->dim] / g / (degree[p->axis] / replicas) * g; /* floor(G/n) grains is the least that any part has */
        } else if (p->kind == LLMPAR_FLAT) {
            int64_t least = 0;
            flat = 1;
            if (p->unit_elements < 0 || p->unit_elements % degree[p->axis])
                return llmpar_error_set(error, LLMPAR_ERR_SHAPE, "%s: Flat on %s: a unit of %lld elements cannot be cut evenly over %d ranks", name, axis, (long long)p->unit_elements, (int)degree[p->axis]);
            /* Ranks with uneven earlier cuts lay out their units by their own extents, so the largest part need not fit here. */
            llmpar_extent_product(smallest, tensor->dims, &least);
            if (p->offset < 0 || p->offset > p->unit_elements || least > p->unit_elements - p->offset)
                return llmpar_error_set(error, LLMPAR_ERR_SHAPE, "%s: Flat on %s: %lld elements at offset %lld do not fit a unit of %lld", name, axis, (long long)least, (long long)p->offset, (long long)p->unit_elements);
        } else {
            return llmpar_error_set(error, LLMPAR_ERR_SHAPE, "%s: placement %d has kind %d, expected 0 to %d", name, (int)i, (int)p->kind, (int)LLMPAR_FLAT);
        }
    }
    return LLMPAR_OK;
}

LLMPAR_DEF void llmpar_dtensor_local(const llmpar_dtensor *tensor, const int32_t degree[LLMPAR_MESH_AXES], const int32_t coordinate[LLMPAR_MESH_AXES], llmpar_local *out)
{
    int cut[LLMPAR_MESH_AXES] = { 0, 0, 0, 0, 0 };
    const llmpar_placement *flat = NULL;
    memset(out, 0, sizeof *out);
    out->is_owner = 1;
    for (int32_t d = 0; d < tensor->dims; d++) out->shape[d] = tensor->shape[d];
    for (int32_t i = 0; i < tensor->placements; i++) {
        const llmpar_placement *p = &tensor->placement[i];
        if (p->kind == LLMPAR_SHARD) {
            int32_t replicas = llmpar__dtensor_replicas(p);
            int64_t begin, length;
            llmpar__dtensor_part(out->shape[p->dim], llmpar__dtensor_grain(p), degree[p->axis] / replicas, coordinate[p->axis] / replicas, &begin, &length);
            out->offset[p->dim] += begin;
            out->shape[p->dim] = length;
            if (coordinate[p->axis] % replicas) out->is_owner = 0;
            cut[p->axis] = 1;
        } else if (p->kind == LLMPAR_FLAT) {
            flat = p;
            cut[p->axis] = 1;
        }
    }
    for (int a = 0; a < LLMPAR_MESH_AXES; a++)
        if (!cut[a] && coordinate[a]) out->is_owner = 0;
    out->elements = 1;
    for (int32_t d = 0; d < tensor->dims; d++) out->elements *= out->shape[d];
    out->flat_count = out->elements;
    if (flat) {
        /* unit   |....|== this tensor ==========|......|
           shard         |=== this rank ===|              */
        int64_t size = flat->unit_elements / degree[flat->axis], begin = size * coordinate[flat->axis], end = begin + size;
        int64_t from = flat->offset > begin ? flat->offset : begin, to = flat->offset + out->elements < end ? flat->offset + out->elements : end;
        out->flat_count = to > from ? to - from : 0;
        out->flat_begin = out->flat_count ? from - flat->offset : 0;
        out->shard_begin = out->flat_count ? from - begin : 0;
    }
}

LLMPAR_DEF size_t llmpar_dtensor_placements(const llmpar_dtensor *tensor, char *text, size_t capacity)
{
    size_t used = 0;
    if (capacity) text[0] = 0;
    llmpar__mesh_append(text, capacity, &used, "[");
    for (int32_t i = 0; i < tensor->placements; i++) {
        const llmpar_placement *p = &tensor->placement[i];
        if (i) llmpar__mesh_append(text, capacity, &used, ", ");
        if (p->kind == LLMPAR_SHARD && p->replicas > 1) llmpar__mesh_append(text, capacity, &used, "Shard(%d) x %d replicas", (int)p->dim, (int)p->replicas);
        else if (p->kind == LLMPAR_SHARD) llmpar__mesh_append(text, capacity, &used, "Shard(%d)", (int)p->dim);
        else if (p->kind == LLMPAR_FLAT) llmpar__mesh_append(text, capacity, &used, "Flat(%lld)", (long long)p->offset);
        else llmpar__mesh_append(text, capacity, &used, "%s", p->kind == LLMPAR_PARTIAL_SUM ? "Partial(sum)" : p->kind == LLMPAR_PARTIAL_MAX ? "Partial(max)" : "Replicate");
        llmpar__mesh_append(text, capacity, &used, " on %s", llmpar_axis_name(p->axis));
    }
    llmpar__mesh_append(text, capacity, &used, "]");
    return used;
}

/* The coordinate of a world rank. */
static void llmpar__dtensor_coordinate(const llmpar_mesh *mesh, int32_t rank, int32_t coordinate[LLMPAR_MESH_AXES])
{
    for (int a = LLMPAR_MESH_AXES - 1; a >= 0; a--) {
        coordinate[a] = rank % mesh->degree[a];
        rank /= mesh->degree[a];
    }
}

/* Character of the rank that owns element (row, column) of the 1-D or 2-D tensor. */
static char llmpar__dtensor_owner(const llmpar_dtensor *tensor, const llmpar_mesh *mesh, int32_t ranks, int64_t row, int64_t column)
{
    static const char digits[] = "0123456789abcdefghijklmnopqrstuvwxyz";
    for (int32_t r = 0; r < ranks; r++) {
        int32_t coordinate[LLMPAR_MESH_AXES];
        llmpar_local local;
        llmpar__dtensor_coordinate(mesh, r, coordinate);
        llmpar_dtensor_local(tensor, mesh->degree, coordinate, &local);
        int64_t width = local.shape[tensor->dims - 1], column_at = column - local.offset[tensor->dims - 1], row_at = tensor->dims == 2 ? row - local.offset[0] : 0;
        if (!local.is_owner || column_at < 0 || column_at >= width || row_at < 0 || (tensor->dims == 2 && row_at >= local.shape[0])) continue;
        int64_t element = row_at * width + column_at;
        if (element >= local.flat_begin && element < local.flat_begin + local.flat_count) return r < 36 ? digits[r] : '#';
    }
    return '.';
}

/* wq f32[8,6] [Shard(0) on tp, Flat(0) on dp_shard]
     rank 0 dp_shard=0 tp=0   [0:4, 0:6]  flat [0:12) at 0 of the shard  48 bytes, owner
     ..
     map (digit = owning rank, one character = 1 x 1 elements)
       000000
       ..                                                                                              */
LLMPAR_DEF size_t llmpar_dtensor_print(const llmpar_dtensor *tensor, const llmpar_mesh *mesh, char *text, size_t capacity)
{
    enum { MAP_ROWS = 16, MAP_COLUMNS = 64 };
    size_t used = 0, item = llmpar_dtype_size(tensor->dtype);
    int32_t ranks = 1;
    int flat = 0;
    for (int a = 0; a < LLMPAR_MESH_AXES; a++) ranks *= mesh->degree[a];
    for (int32_t i = 0; i < tensor->placements; i++) flat |= tensor->placement[i].kind == LLMPAR_FLAT;
    char placements[256];
    llmpar_dtensor_placements(tensor, placements, sizeof placements);
    if (capacity) text[0] = 0;
    llmpar__mesh_append(text, capacity, &used, "%s %s[", tensor->name ? tensor->name : "tensor", llmpar_dtype_name(tensor->dtype));
    for (int32_t d = 0; d < tensor->dims; d++) llmpar__mesh_append(text, capacity, &used, "%s%lld", d ? "," : "", (long long)tensor->shape[d]);
    llmpar__mesh_append(text, capacity, &used, "] %s\n", placements);
    for (int32_t r = 0; r < ranks; r++) {
        int32_t coordinate[LLMPAR_MESH_AXES];
        llmpar_local local;
        llmpar__dtensor_coordinate(mesh, r, coordinate);
        llmpar_dtensor_local(tensor, mesh->degree, coordinate, &local);
        llmpar__mesh_append(text, capacity, &used, "  rank %d", (int)r);
        for (int a = 0; a < LLMPAR_MESH_AXES; a++)
            if (mesh->degree[a] > 1) llmpar__mesh_append(text, capacity, &used, " %s=%d", llmpar_axis_name((llmpar_axis)a), (int)coordinate[a]);
        llmpar__mesh_append(text, capacity, &used, "  [");
        for (int32_t d = 0; d < tensor->dims; d++)
            llmpar__mesh_append(text, capacity, &used, "%s%lld:%lld", d ? ", " : "", (long long)local.offset[d], (long long)(local.offset[d] + local.shape[d]));
        llmpar__mesh_append(text, capacity, &used, "]");
        if (flat)
            llmpar__mesh_append(text, capacity, &used, "  elements %lld:%lld at %lld of the shard", (long long)local.flat_begin, (long long)(local.flat_begin + local.flat_count), (long long)local.shard_begin);
        llmpar__mesh_append(text, capacity, &used, "  %lld bytes%s\n", (long long)(local.flat_count * (int64_t)item), local.is_owner ? "" : " (copy)");
    }
    if (tensor->dims != 1 && tensor->dims != 2) return used;
    int64_t rows = tensor->dims == 2 ? tensor->shape[0] : 1, columns = tensor->shape[tensor->dims - 1];
    if (rows < 1 || columns < 1) return used;
    int64_t down = (rows + MAP_ROWS - 1) / MAP_ROWS, across = (columns + MAP_COLUMNS - 1) / MAP_COLUMNS;
    llmpar__mesh_append(text, capacity, &used, "  map (digit: owning rank; one character: %lld x %lld elements)\n", (long long)down, (long long)across);
    for (int64_t row = 0; row < rows; row += down) {
        char line[MAP_COLUMNS + 1];
        int n = 0;
        for (int64_t column = 0; column < columns; column += across) line[n++] = llmpar__dtensor_owner(tensor, mesh, ranks, row, column);
        line[n] = 0;
        llmpar__mesh_append(text, capacity, &used, "    %s\n", line);
    }
    return used;
}
