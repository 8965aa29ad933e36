/* picture: who holds what of a tensor, as text and as SVG. All cuts of all ranks' boxes, along rows and along columns, make a grid whose cells are each held by one set of ranks. */
#include "mesh/mesh_internal.h"

#include <stdio.h>
#include <string.h>

#define LLMPAR__PICTURE_BANDS 128  /* rows or columns of a grid; more are not drawn */
#define LLMPAR__PICTURE_LEGEND 64  /* ranks in an SVG's legend */

/* A 1-D tensor is one row. rows, columns 0: no grid (other dims, no elements, too many cuts). */
typedef struct llmpar__picture {
    const llmpar_dtensor *tensor;
    const int32_t *degree;
    int32_t ranks, bands[2];
    int64_t at[2][LLMPAR__PICTURE_BANDS + 1]; /* band i of the rows or columns: [at[i], at[i + 1]) */
} llmpar__picture;

/* The boxes of a rank with dims 0 and 1 as rows and columns. */
static int32_t llmpar__picture_boxes(const llmpar__picture *picture, int32_t rank, int32_t coordinate[LLMPAR_MESH_AXES], llmpar_local *local, llmpar__box box[LLMPAR__BOXES])
{
    llmpar__mesh_coordinate(picture->degree, rank, coordinate);
    llmpar_dtensor_local(picture->tensor, picture->degree, coordinate, local);
    int32_t boxes = llmpar__mesh_boxes(local, picture->tensor->dims, box);
    for (int32_t b = 0; b < boxes && picture->tensor->dims == 1; b++) {
        box[b].begin[1] = box[b].begin[0];
        box[b].end[1] = box[b].end[0];
        box[b].begin[0] = 0;
        box[b].end[0] = 1;
    }
    return boxes;
}

static int llmpar__picture_cut(llmpar__picture *picture, int dim, int64_t value)
{
    int64_t *at = picture->at[dim];
    int32_t n = picture->bands[dim], i = 0; /* at[0..n]: n + 1 cuts */
    while (i <= n && at[i] < value) i++;
    if (i <= n && at[i] == value) return 1;
    if (n == LLMPAR__PICTURE_BANDS) return 0;
    memmove(&at[i + 1], &at[i], (size_t)(n + 1 - i) * sizeof *at);
    at[i] = value;
    picture->bands[dim]++;
    return 1;
}

static void llmpar__picture_make(const llmpar_dtensor *tensor, const llmpar_mesh *mesh, llmpar__picture *picture)
{
    memset(picture, 0, sizeof *picture);
    picture->tensor = tensor;
    picture->degree = mesh->degree;
    picture->ranks = 1;
    for (int a = 0; a < LLMPAR_MESH_AXES; a++) picture->ranks *= mesh->degree[a];
    if (tensor->dims < 1 || tensor->dims > 2 || !tensor->shape[0] || !tensor->shape[tensor->dims - 1]) return;
    picture->bands[0] = picture->bands[1] = 1;
    picture->at[0][1] = tensor->dims == 2 ? tensor->shape[0] : 1;
    picture->at[1][1] = tensor->shape[tensor->dims - 1];
    int fits = 1;
    for (int32_t r = 0; r < picture->ranks; r++) {
        int32_t coordinate[LLMPAR_MESH_AXES];
        llmpar_local local;
        llmpar__box box[LLMPAR__BOXES];
        int32_t boxes = llmpar__picture_boxes(picture, r, coordinate, &local, box);
        for (int32_t b = 0; b < boxes; b++)
            for (int d = 0; d < 2; d++) fits = fits && llmpar__picture_cut(picture, d, box[b].begin[d]) && llmpar__picture_cut(picture, d, box[b].end[d]);
    }
    if (!fits) picture->bands[0] = picture->bands[1] = 0;
}

/* The ranks of a cell, "0-3 8", cut with ".."; the first of them, -1 without any. */
static int32_t llmpar__picture_holders(const llmpar__picture *picture, int32_t row, int32_t column, char *text, size_t capacity)
{
    int32_t first = -1, begin = -1;
    llmpar__text out = llmpar__text_begin(text, capacity);
    for (int32_t r = 0; r <= picture->ranks; r++) {
        int holds = 0;
        if (r < picture->ranks) {
            int32_t coordinate[LLMPAR_MESH_AXES];
            llmpar_local local;
            llmpar__box box[LLMPAR__BOXES];
            int32_t boxes = llmpar__picture_boxes(picture, r, coordinate, &local, box);
            int64_t y = picture->at[0][row], x = picture->at[1][column];
            for (int32_t b = 0; b < boxes; b++) holds = holds || (box[b].begin[0] <= y && y < box[b].end[0] && box[b].begin[1] <= x && x < box[b].end[1]);
        }
        if (holds && first < 0) first = r;
        if (holds && begin < 0) begin = r;
        if (holds || begin < 0) continue;
        llmpar__text_put(&out, r - begin > 2 ? "%s%d-%d" : r - begin == 2 ? "%s%d %d" : "%s%d", out.used ? " " : "", (int)begin, (int)r - 1);
        begin = -1;
    }
    if (out.used >= capacity) memcpy(text + capacity - 3, "..", 3);
    return first;
}

/* The first rank that holds the same as this one. */
static int32_t llmpar__picture_first(const llmpar__picture *picture, int32_t rank)
{
    int32_t coordinate[LLMPAR_MESH_AXES];
    llmpar_local local, other;
    llmpar__mesh_coordinate(picture->degree, rank, coordinate);
    llmpar_dtensor_local(picture->tensor, picture->degree, coordinate, &local);
    for (int32_t r = 0; r < rank; r++) {
        llmpar__mesh_coordinate(picture->degree, r, coordinate);
        llmpar_dtensor_local(picture->tensor, picture->degree, coordinate, &other);
        other.is_owner = local.is_owner;
        if (!memcmp(&local, &other, sizeof local)) return r;
    }
    return rank;
}

/* "0:6 tp=0": the elements of a band, and the coordinates that all its holders share. */
static void llmpar__picture_label(const llmpar__picture *picture, int dim, int32_t band, char *elements, char *coordinates, size_t capacity)
{
    int32_t shared[LLMPAR_MESH_AXES];
    llmpar__text out = llmpar__text_begin(coordinates, capacity);
    for (int a = 0; a < LLMPAR_MESH_AXES; a++) shared[a] = -1; /* -2: several */
    for (int32_t r = 0; r < picture->ranks; r++) {
        int32_t coordinate[LLMPAR_MESH_AXES];
        llmpar_local local;
        llmpar__box box[LLMPAR__BOXES];
        int32_t boxes = llmpar__picture_boxes(picture, r, coordinate, &local, box);
        for (int32_t b = 0; b < boxes; b++)
            for (int a = 0; a < LLMPAR_MESH_AXES && box[b].begin[dim] < picture->at[dim][band + 1] && box[b].end[dim] > picture->at[dim][band]; a++)
                shared[a] = shared[a] == -1 || shared[a] == coordinate[a] ? coordinate[a] : -2;
    }
    snprintf(elements, capacity, "%lld:%lld", (long long)picture->at[dim][band], (long long)picture->at[dim][band + 1]);
    for (int a = 0; a < LLMPAR_MESH_AXES; a++)
        if (picture->degree[a] > 1 && shared[a] >= 0) llmpar__text_put(&out, "%s%s=%d", out.used ? " " : "", llmpar_axis_name((llmpar_axis)a), (int)shared[a]);
}

/* "rank 3 dp_shard=1 tp=1  [2:4, 0:6]  elements 6:12 at 0 of the shard  24 bytes (copy)" */
static void llmpar__picture_rank(const llmpar__picture *picture, int32_t rank, llmpar__text *out)
{
    const llmpar_dtensor *tensor = picture->tensor;
    int32_t coordinate[LLMPAR_MESH_AXES];
    llmpar_local local;
    int flat = 0;
    llmpar__mesh_coordinate(picture->degree, rank, coordinate);
    llmpar_dtensor_local(tensor, picture->degree, coordinate, &local);
    for (int32_t i = 0; i < tensor->placements; i++) flat |= tensor->placement[i].kind == LLMPAR_FLAT;
    llmpar__text_put(out, "rank %d", (int)rank);
    llmpar__mesh_put_coordinate(out, picture->degree, coordinate);
    llmpar__text_put(out, "  [");
    for (int32_t d = 0; d < tensor->dims; d++) llmpar__text_put(out, "%s%lld:%lld", d ? ", " : "", (long long)local.offset[d], (long long)(local.offset[d] + local.shape[d]));
    llmpar__text_put(out, "]");
    if (flat) llmpar__text_put(out, "  elements %lld:%lld at %lld of the shard", (long long)local.flat_begin, (long long)(local.flat_begin + local.flat_count), (long long)local.shard_begin);
    llmpar__text_put(out, "  %lld bytes%s", (long long)(local.flat_count * (int64_t)llmpar_dtype_size(tensor->dtype)), local.is_owner ? "" : " (copy)");
}

/* wq f32[12,16] [Shard(0) on tp, Flat(0) on dp_shard]
     rank 0 dp_shard=0 tp=0  [0:6, 0:16]  elements 0:48 at 0 of the shard  192 bytes
     ..
     ranks of each part
                                 0:16
       0:3   dp_shard=0 tp=0   | 0
       ..                                                                                              */
LLMPAR_DEF size_t llmpar_dtensor_print(const llmpar_dtensor *tensor, const llmpar_mesh *mesh, char *text, size_t capacity)
{
    enum { WIDTH = 40, ROWS = 64, COLUMNS = 24 };
    llmpar__text out = llmpar__text_begin(text, capacity);
    llmpar__picture picture;
    char placements[256], elements[WIDTH], coordinates[WIDTH], cell[WIDTH];
    llmpar__picture_make(tensor, mesh, &picture);
    llmpar_dtensor_placements(tensor, placements, sizeof placements);
    llmpar__mesh_put_tensor(&out, tensor);
    llmpar__text_put(&out, " %s\n", placements);
    for (int32_t r = 0; r < picture.ranks; r++) {
        llmpar__text_put(&out, "  ");
        llmpar__picture_rank(&picture, r, &out);
        llmpar__text_put(&out, "\n");
    }
    int32_t rows = picture.bands[0], columns = picture.bands[1];
    if (!rows || rows > ROWS || columns > COLUMNS) return out.used;
    int width[COLUMNS], left = 0, left_elements = 0, named = 0;
    for (int32_t c = 0; c < columns; c++) {
        llmpar__picture_label(&picture, 1, c, elements, coordinates, WIDTH);
        width[c] = (int)(strlen(elements) > strlen(coordinates) ? strlen(elements) : strlen(coordinates));
        named |= coordinates[0] != 0;
        for (int32_t r = 0; r < rows; r++) {
            llmpar__picture_holders(&picture, r, c, cell, sizeof cell);
            if ((int)strlen(cell) > width[c]) width[c] = (int)strlen(cell);
        }
    }
    for (int32_t r = 0; r < rows; r++) {
        llmpar__picture_label(&picture, 0, r, elements, coordinates, WIDTH);
        if ((int)strlen(elements) > left_elements) left_elements = (int)strlen(elements);
        if ((int)strlen(coordinates) > left) left = (int)strlen(coordinates);
    }
    llmpar__text_put(&out, "  ranks that hold each part, by rows and columns\n");
    for (int line = 0; line < 1 + named; line++) {
        llmpar__text_put(&out, "    %*s  %*s  ", left_elements, "", left, "");
        for (int32_t c = 0; c < columns; c++) {
            llmpar__picture_label(&picture, 1, c, elements, coordinates, WIDTH);
            llmpar__text_put(&out, " %-*s ", width[c], line ? coordinates : elements);
        }
        llmpar__text_put(&out, "\n");
    }
    for (int32_t r = 0; r < rows; r++) {
        llmpar__picture_label(&picture, 0, r, elements, coordinates, WIDTH);
        llmpar__text_put(&out, "    %-*s  %-*s |", left_elements, tensor->dims == 2 ? elements : "", left, coordinates);
        for (int32_t c = 0; c < columns; c++) {
            llmpar__picture_holders(&picture, r, c, cell, sizeof cell);
            llmpar__text_put(&out, " %-*s|", width[c], cell);
        }
        llmpar__text_put(&out, "\n");
    }
    return out.used;
}

/* ---- SVG ---- */

/* A light color for a rank: hues by the golden angle, so that neighbours differ. */
static unsigned llmpar__picture_color(int32_t rank)
{
    int32_t hue = (int32_t)(((int64_t)rank * 1375 + 2100) / 10 % 360), part = hue % 60;
    const int32_t low = 178, high = 246, up = low + (high - low) * part / 60, down = high - (high - low) * part / 60;
    const int32_t table[6][3] = { { high, up, low }, { down, high, low }, { low, high, up }, { low, down, high }, { up, low, high }, { high, low, down } };
    const int32_t *color = table[hue / 60];
    return (unsigned)color[0] << 16 | (unsigned)color[1] << 8 | (unsigned)color[2];
}

/* Text content: what XML forbids or reads as markup is written as entities or replaced. */
static void llmpar__picture_escape(llmpar__text *out, const char *content)
{
    for (; *content; content++) {
        unsigned char c = (unsigned char)*content;
        const char *entity = c == '&' ? "&amp;" : c == '<' ? "&lt;" : c == '>' ? "&gt;" : c == '"' ? "&quot;" : c < 0x20 || c >= 0x7f ? "?" : NULL;
        if (entity) llmpar__text_put(out, "%s", entity);
        else llmpar__text_put(out, "%c", (int)c);
    }
}

/* Does this cell carry its ranks' name? Of the cells beside, above and below that the same ranks hold, the largest does. */
static int llmpar__picture_named(const llmpar__picture *picture, const int32_t *x, const int32_t *y, int32_t row, int32_t column)
{
    static const int32_t step[4][2] = { { -1, 0 }, { 0, -1 }, { 1, 0 }, { 0, 1 } };
    char cell[96], next[96];
    int64_t area = (int64_t)(x[column + 1] - x[column]) * (y[row + 1] - y[row]);
    llmpar__picture_holders(picture, row, column, cell, sizeof cell);
    for (int i = 0; i < 4; i++)
        for (int32_t r = row + step[i][0], c = column + step[i][1]; r >= 0 && c >= 0 && r < picture->bands[0] && c < picture->bands[1]; r += step[i][0], c += step[i][1]) {
            llmpar__picture_holders(picture, r, c, next, sizeof next);
            if (strcmp(cell, next)) break;
            if ((int64_t)(x[c + 1] - x[c]) * (y[r + 1] - y[r]) >= area + (i > 1)) return 0;
        }
    return 1;
}

/* Pixels that the longest label of a dim takes; by elements and coordinates one above the other, or side by side. */
static int32_t llmpar__picture_room(const llmpar__picture *picture, int dim, int side)
{
    char elements[96], coordinates[96];
    int32_t room = 0;
    for (int32_t i = 0; i < picture->bands[dim]; i++) {
        llmpar__picture_label(picture, dim, i, elements, coordinates, sizeof elements);
        int32_t a = (int32_t)strlen(elements), b = (int32_t)strlen(coordinates), need = 9 * (side ? a + b + 1 : a > b ? a : b);
        if (need > room) room = need;
    }
    return room;
}

/* Where band i begins, in pixels: by its share of the elements, but with room for a word. */
static void llmpar__picture_pixels(const llmpar__picture *picture, int dim, int32_t whole, int32_t least, int32_t pixel[LLMPAR__PICTURE_BANDS + 1])
{
    double total = (double)picture->at[dim][picture->bands[dim]];
    for (int32_t i = 0; i < picture->bands[dim]; i++) {
        int32_t share = (int32_t)((double)whole * ((double)(picture->at[dim][i + 1] - picture->at[dim][i]) / total));
        pixel[i + 1] = pixel[i] + (share > least ? share : least);
    }
}

LLMPAR_DEF size_t llmpar_dtensor_svg(const llmpar_dtensor *tensor, const llmpar_mesh *mesh, char *text, size_t capacity)
{
    enum { TOP = 110, WHOLE = 640, LINE = 20, LABEL = 96 };
    llmpar__text out = llmpar__text_begin(text, capacity);
    llmpar__picture picture;
    char line[512], elements[LABEL], coordinates[LABEL], cell[LABEL], next[LABEL];
    int32_t x[LLMPAR__PICTURE_BANDS + 1], y[LLMPAR__PICTURE_BANDS + 1];
    llmpar__picture_make(tensor, mesh, &picture);
    int32_t rows = picture.bands[0], columns = picture.bands[1], legend = picture.ranks < LLMPAR__PICTURE_LEGEND ? picture.ranks : LLMPAR__PICTURE_LEGEND;
    double ratio = rows ? (double)picture.at[0][rows] / (double)picture.at[1][columns] : 0;
    int32_t narrow = 16 + llmpar__picture_room(&picture, 1, 0), beside = 0;
    y[0] = TOP;
    llmpar__picture_pixels(&picture, 0, tensor->dims == 1 ? 60 : ratio < 0.25 ? 160 : ratio > 1 ? WHOLE : (int32_t)((double)WHOLE * ratio), 30, y);
    for (int32_t r = 0; r < rows; r++) beside |= y[r + 1] - y[r] < 40;
    int32_t left = 34 + llmpar__picture_room(&picture, 0, beside);
    x[0] = left < 100 ? 100 : left;
    llmpar__picture_pixels(&picture, 1, ratio > 1.5 && tensor->dims == 2 ? (int32_t)((double)WHOLE / (ratio > 4 ? 2.5 : ratio / 1.5)) : WHOLE, narrow > 96 ? narrow : 96, x);
    int32_t width = x[columns] + 30 < 900 ? 900 : x[columns] + 30, under = y[rows] + (rows ? 40 : 0), height = under + LINE * (legend + (legend < picture.ranks)) + 24;
    llmpar__text_put(&out, "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=\"%d\" viewBox=\"0 0 %d %d\" font-family=\"DejaVu Sans, Helvetica, Arial, sans-serif\" font-size=\"13\" fill=\"#222222\">\n",
                        (int)width, (int)height, (int)width, (int)height);
    llmpar__text_put(&out, "<rect width=\"%d\" height=\"%d\" fill=\"#ffffff\"/>\n<text id=\"title\" x=\"24\" y=\"34\" font-size=\"18\" font-weight=\"bold\">", (int)width, (int)height);
    llmpar__text words = llmpar__text_begin(line, sizeof line);
    llmpar__mesh_put_tensor(&words, tensor);
    llmpar__picture_escape(&out, line);
    llmpar_dtensor_placements(tensor, line, sizeof line);
    llmpar__text_put(&out, "</text>\n<text id=\"placements\" x=\"24\" y=\"57\" fill=\"#555555\">%s</text>\n", line);
    for (int32_t c = 0; c < columns; c++) {
        llmpar__picture_label(&picture, 1, c, elements, coordinates, LABEL);
        llmpar__text_put(&out, "<g id=\"column-%d\" text-anchor=\"middle\"><text x=\"%d\" y=\"%d\" font-weight=\"bold\">%s</text><text x=\"%d\" y=\"%d\" font-size=\"12\" fill=\"#555555\">%s</text></g>\n", (int)c,
                            (int)(x[c] + x[c + 1]) / 2, TOP - 10, coordinates, (int)(x[c] + x[c + 1]) / 2, coordinates[0] ? TOP - 26 : TOP - 10, elements);
    }
    for (int32_t r = 0; r < rows; r++) {
        int32_t middle = (y[r] + y[r + 1]) / 2 + 5;
        llmpar__picture_label(&picture, 0, r, elements, coordinates, LABEL);
        if (tensor->dims == 1) elements[0] = 0;
        llmpar__text_put(&out, "<g id=\"row-%d\" text-anchor=\"end\">", (int)r);
        if (coordinates[0] && y[r + 1] - y[r] >= 40) /* one above the other, or side by side */
            llmpar__text_put(&out, "<text x=\"%d\" y=\"%d\" font-weight=\"bold\">%s</text><text x=\"%d\" y=\"%d\" font-size=\"12\" fill=\"#555555\">%s</text></g>\n", (int)x[0] - 10, (int)middle - 8, coordinates, (int)x[0] - 10, (int)middle + 9, elements);
        else
            llmpar__text_put(&out, "<text x=\"%d\" y=\"%d\" font-size=\"12\"><tspan font-weight=\"bold\">%s</tspan> <tspan fill=\"#555555\">%s</tspan></text></g>\n", (int)x[0] - 10, (int)middle, coordinates, elements);
    }
    for (int32_t r = 0; r < rows; r++)
        for (int32_t c = 0; c < columns; c++) {
            int32_t first = llmpar__picture_holders(&picture, r, c, cell, sizeof cell), w = x[c + 1] - x[c], h = y[r + 1] - y[r];
            llmpar__text_put(&out, "<rect id=\"cell-%d-%d\" data-ranks=\"%s\" x=\"%d\" y=\"%d\" width=\"%d\" height=\"%d\" fill=\"#%06x\"/>\n", (int)r, (int)c, cell, (int)x[c], (int)y[r], (int)w, (int)h, first < 0 ? 0xeeeeeeu : llmpar__picture_color(first));
            if (llmpar__picture_named(&picture, x, y, r, c))
                llmpar__text_put(&out, "<text x=\"%d\" y=\"%d\" text-anchor=\"middle\">%s %s</text>\n", (int)x[c] + w / 2, (int)y[r] + h / 2 + 5, strchr(cell, ' ') || strchr(cell, '-') ? "ranks" : "rank", cell);
        }
    llmpar__text_put(&out, "<g stroke=\"#444444\" stroke-width=\"1.5\" stroke-linecap=\"square\">\n");
    for (int32_t r = 0; r < rows; r++) /* a line where the ranks change */
        for (int32_t c = 0; c < columns; c++) {
            llmpar__picture_holders(&picture, r, c, cell, sizeof cell);
            next[0] = 0;
            if (c + 1 < columns) llmpar__picture_holders(&picture, r, c + 1, next, sizeof next);
            if (c + 1 < columns && strcmp(cell, next)) llmpar__text_put(&out, "<path d=\"M%d %dV%d\"/>\n", (int)x[c + 1], (int)y[r], (int)y[r + 1]);
            if (r + 1 < rows) llmpar__picture_holders(&picture, r + 1, c, next, sizeof next);
            if (r + 1 < rows && strcmp(cell, next)) llmpar__text_put(&out, "<path d=\"M%d %dH%d\"/>\n", (int)x[c], (int)y[r + 1], (int)x[c + 1]);
        }
    if (rows) llmpar__text_put(&out, "<rect x=\"%d\" y=\"%d\" width=\"%d\" height=\"%d\" fill=\"none\"/>\n", (int)x[0], (int)y[0], (int)(x[columns] - x[0]), (int)(y[rows] - y[0]));
    llmpar__text_put(&out, "</g>\n");
    for (int32_t r = 0; r < legend; r++) {
        words = llmpar__text_begin(line, sizeof line);
        llmpar__picture_rank(&picture, r, &words);
        llmpar__text_put(&out, "<g id=\"rank-%d\"><rect x=\"24\" y=\"%d\" width=\"13\" height=\"13\" fill=\"#%06x\" stroke=\"#444444\"/><text x=\"46\" y=\"%d\" font-size=\"12\" xml:space=\"preserve\">%s</text></g>\n", (int)r, (int)(under + LINE * r - 11),
                            llmpar__picture_color(llmpar__picture_first(&picture, r)), (int)(under + LINE * r), line);
    }
    if (legend < picture.ranks) llmpar__text_put(&out, "<text x=\"46\" y=\"%d\" font-size=\"12\">and %d more ranks</text>\n", (int)(under + LINE * legend), (int)(picture.ranks - legend));
    llmpar__text_put(&out, "</svg>\n");
    return out.used;
}

#undef LLMPAR__PICTURE_BANDS
#undef LLMPAR__PICTURE_LEGEND
