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

#define LLMPAR__DTENSOR_NO(format, ...) llmpar_error_set(error, LLMPAR_ERR_SHAPE, "%s: " format, name, __VA_ARGS__)
LLMPAR_DEF llmpar_status llmpar_dtensor_check(const llmpar_dtensor *tensor, const int32_t degree[LLMPAR_MESH_AXES], llmpar_error *error)
{
    const char *name = tensor->name ? tensor->name : "tensor";
    int64_t elements, grain[LLMPAR_MAX_DIMS];
    int64_t smallest[LLMPAR_MAX_DIMS]; /* over the ranks */
    int seen[LLMPAR_MESH_AXES] = { 0, 0, 0, 0, 0 }, flat = 0;
    if (!llmpar_dtype_size(tensor->dtype)) return LLMPAR__DTENSOR_NO("dtype %d is not a stored type", (int)tensor->dtype);
    if (tensor->dims < 0 || tensor->dims > LLMPAR_MAX_DIMS) return LLMPAR__DTENSOR_NO("%d dims, expected 0 to %d", (int)tensor->dims, LLMPAR_MAX_DIMS);
    if (tensor->placements < 0 || tensor->placements > LLMPAR_MESH_AXES) return LLMPAR__DTENSOR_NO("%d placements, expected 0 to %d", (int)tensor->placements, LLMPAR_MESH_AXES);
    for (int32_t d = 0; d < tensor->dims; d++)
        if (tensor->shape[d] < 0) return LLMPAR__DTENSOR_NO("dim %d has extent %lld, expected 0 or more", (int)d, (long long)tensor->shape[d]);
    if (!llmpar_extent_product(tensor->shape, tensor->dims, &elements) || elements > INT64_MAX / (int64_t)llmpar_dtype_size(tensor->dtype))
        return llmpar_error_set(error, LLMPAR_ERR_OVERFLOW, "%s: the product of its extents overflows", name);
    for (int32_t d = 0; d < tensor->dims; d++) {
        smallest[d] = tensor->shape[d];
        grain[d] = 0;
    }
    for (int32_t i = 0; i < tensor->placements; i++) {
        const llmpar_placement *p = &tensor->placement[i];
        if ((unsigned)p->axis >= LLMPAR_MESH_AXES) return LLMPAR__DTENSOR_NO("placement %d names axis %d, expected 0 to %d", (int)i, (int)p->axis, LLMPAR_MESH_AXES - 1);
        const char *axis = llmpar_axis_name(p->axis);
        if (seen[p->axis]++) return LLMPAR__DTENSOR_NO("axis %s is named twice", axis);
        if (p->kind == LLMPAR_REPLICATE || p->kind == LLMPAR_PARTIAL_SUM || p->kind == LLMPAR_PARTIAL_MAX) continue;
        if (flat) return LLMPAR__DTENSOR_NO("a cut on %s after Flat: expected Flat to be the last cut", axis);
        if (p->kind == LLMPAR_SHARD) {
            if (p->dim < 0 || p->dim >= tensor->dims) return LLMPAR__DTENSOR_NO("Shard(%d) on %s, expected a dim below %d", (int)p->dim, axis, (int)tensor->dims);
            int64_t g = llmpar__dtensor_grain(p);
            int32_t replicas = llmpar__dtensor_replicas(p);
            if (g < 1 || tensor->shape[p->dim] % g || (grain[p->dim] && grain[p->dim] % g))
                return LLMPAR__DTENSOR_NO("Shard(%d) on %s: grain %lld does not divide %s %lld", (int)p->dim, axis, (long long)g, grain[p->dim] && g > 0 && tensor->shape[p->dim] % g == 0 ? "the grain of the earlier cut," : "the extent",
                                        (long long)(grain[p->dim] && g > 0 && tensor->shape[p->dim] % g == 0 ? grain[p->dim] : tensor->shape[p->dim]));
            if (replicas < 1 || degree[p->axis] % replicas)
                return LLMPAR__DTENSOR_NO("Shard(%d) on %s: %d replicas do not divide the degree %d", (int)p->dim, axis, (int)replicas, (int)degree[p->axis]);
            grain[p->dim] = g;
            smallest[p->dim] = smallest[p->dim] / g / (degree[p->axis] / replicas) * g; /* floor(G/n) grains is the least that any part has */
        } else if (p->kind == LLMPAR_FLAT) {
            int64_t least = 0;
            flat = 1;
            if (p->unit_elements < 0 || p->unit_elements % degree[p->axis])
                return LLMPAR__DTENSOR_NO("Flat on %s: a unit of %lld elements cannot be cut evenly over %d ranks", axis, (long long)p->unit_elements, (int)degree[p->axis]);
            /* Ranks with uneven earlier cuts lay out their units by their own extents, so the largest part need not fit here. */
            llmpar_extent_product(smallest, tensor->dims, &least);
            if (p->offset < 0 || p->offset > p->unit_elements || least > p->unit_elements - p->offset)
                return LLMPAR__DTENSOR_NO("Flat on %s: %lld elements at offset %lld do not fit a unit of %lld", axis, (long long)least, (long long)p->offset, (long long)p->unit_elements);
        } else {
            return LLMPAR__DTENSOR_NO("placement %d has kind %d, expected 0 to %d", (int)i, (int)p->kind, (int)LLMPAR_FLAT);
        }
    }
    return LLMPAR_OK;
}
#undef LLMPAR__DTENSOR_NO

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

LLMPAR_DEF int64_t llmpar_dtensor_run(const llmpar_dtensor *tensor, const llmpar_local *local, int64_t element, int64_t *run)
{
    int64_t index = 0, stride = 1, rest = element, together = 1; /* elements of the rectangle that lie together: rows that are whole, and one dim that need not be */
    int whole = 1;
    for (int32_t d = tensor->dims - 1; d >= 0; d--) {
        index += (rest % local->shape[d] + local->offset[d]) * stride;
        rest /= local->shape[d];
        stride *= tensor->shape[d];
        if (whole) together *= local->shape[d];
        whole &= local->shape[d] == tensor->shape[d];
    }
    *run = together - element % together;
    return index;
}

LLMPAR_DEF size_t llmpar_dtensor_placements(const llmpar_dtensor *tensor, char *text, size_t capacity)
{
    llmpar__text out = llmpar__text_begin(text, capacity);
    llmpar__text_put(&out, tensor->placements ? "[" : "[Replicate");
    for (int32_t i = 0; i < tensor->placements; i++) {
        const llmpar_placement *p = &tensor->placement[i];
        if (i) llmpar__text_put(&out, ", ");
        if (p->kind == LLMPAR_SHARD && p->replicas > 1) llmpar__text_put(&out, "Shard(%d) x %d replicas", (int)p->dim, (int)p->replicas);
        else if (p->kind == LLMPAR_SHARD) llmpar__text_put(&out, "Shard(%d)", (int)p->dim);
        else if (p->kind == LLMPAR_FLAT) llmpar__text_put(&out, "Flat(%lld)", (long long)p->offset);
        else llmpar__text_put(&out, "%s", p->kind == LLMPAR_PARTIAL_SUM ? "Partial(sum)" : p->kind == LLMPAR_PARTIAL_MAX ? "Partial(max)" : "Replicate");
        llmpar__text_put(&out, " on %s", llmpar_axis_name(p->axis));
    }
    llmpar__text_put(&out, "]");
    return out.used;
}

LLMPAR__PRIVATE_DEF void llmpar__mesh_put_tensor(llmpar__text *out, const llmpar_dtensor *tensor)
{
    llmpar__text_put(out, "%s %s[", tensor->name ? tensor->name : "tensor", llmpar_dtype_name(tensor->dtype));
    for (int32_t d = 0; d < tensor->dims; d++) llmpar__text_put(out, "%s%lld", d ? "," : "", (long long)tensor->shape[d]);
    llmpar__text_put(out, "]");
}

/* The range [begin, end) of a rectangle's row-major elements, seen from dim d on (the dims before have been fixed in `at`). */
static void llmpar__dtensor_range(const llmpar_local *part, int32_t dims, int32_t d, int64_t begin, int64_t end, const llmpar__box *at, llmpar__box *box, int32_t *count)
{
    int64_t inner = 1;
    if (begin >= end) return;
    for (int32_t i = d + 1; i < dims; i++) inner *= part->shape[i];
    llmpar__box now = *at;
    int64_t first = begin / inner, last = end / inner;
    if (d >= dims || (begin % inner == 0 && end % inner == 0)) { /* whole rows */
        for (int32_t i = d; i < dims; i++) {
            now.begin[i] = part->offset[i] + (i == d ? first : 0);
            now.end[i] = part->offset[i] + (i == d ? last : part->shape[i]);
        }
        box[(*count)++] = now;
        return;
    }
    now.begin[d] = part->offset[d] + first;
    now.end[d] = now.begin[d] + 1;
    if (first == last) {
        llmpar__dtensor_range(part, dims, d + 1, begin % inner, end % inner, &now, box, count);
        return;
    }
    if (begin % inner) llmpar__dtensor_range(part, dims, d + 1, begin % inner, inner, &now, box, count);
    llmpar__dtensor_range(part, dims, d, (begin + inner - 1) / inner * inner, last * inner, at, box, count);
    now.begin[d] = part->offset[d] + last;
    now.end[d] = now.begin[d] + 1;
    llmpar__dtensor_range(part, dims, d + 1, 0, end % inner, &now, box, count);
}

LLMPAR__PRIVATE_DEF int32_t llmpar__mesh_boxes(const llmpar_local *part, int32_t dims, llmpar__box box[LLMPAR__BOXES])
{
    LLMPAR__ZEROED(llmpar__box, none);
    int32_t count = 0;
    llmpar__dtensor_range(part, dims, 0, part->flat_begin, part->flat_begin + part->flat_count, &none, box, &count);
    return count;
}

LLMPAR__PRIVATE_DEF int32_t llmpar__mesh_common(const llmpar_local *a, const llmpar_local *b, int32_t dims, llmpar__box box[LLMPAR__BOXES * LLMPAR__BOXES], int64_t *volume)
{
    llmpar__box of_a[LLMPAR__BOXES], of_b[LLMPAR__BOXES];
    int32_t boxes_a = llmpar__mesh_boxes(a, dims, of_a), boxes_b = llmpar__mesh_boxes(b, dims, of_b), count = 0;
    *volume = 0;
    for (int32_t i = 0; i < boxes_a; i++)
        for (int32_t j = 0; j < boxes_b; j++) {
            llmpar__box *common = &box[count];
            int64_t elements = 1;
            memset(common, 0, sizeof *common);
            for (int32_t d = 0; d < dims; d++) {
                common->begin[d] = of_a[i].begin[d] > of_b[j].begin[d] ? of_a[i].begin[d] : of_b[j].begin[d];
                common->end[d] = of_a[i].end[d] < of_b[j].end[d] ? of_a[i].end[d] : of_b[j].end[d];
                elements *= common->end[d] > common->begin[d] ? common->end[d] - common->begin[d] : 0;
            }
            if (!elements) continue;
            *volume += elements;
            count++;
        }
    return count;
}
