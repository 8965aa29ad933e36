#include "base/json.h"
#include "base/math_internal.h"
#include "base/size.h"

#include <stdio.h>
#include <string.h>

/* A document is one allocation, sized by a count over the text before anything is parsed:

     | node 0 = root | node 1 | ... one for each possible value | length of the text + 1 bytes of decoded strings |

   A string is decoded to the same offset in the last part at which it stands in the text (escapes only shrink it, the closing quote's place
   takes the NUL), so a key's own byte position needs no field. Nothing recurses: an open container keeps its parent in
   `next`, which it needs only once it is closed. Memory: at most 60 bytes a byte of a valid text (empty arrays in an array), 90 of a
   malformed one (commas), about 10 of a usual one. */

typedef struct llmpar__json_parser {
    llmpar_heap *heap;
    const char *text;
    size_t length, at;
    const char *name;
    uint32_t max_depth;
    int unique_keys;
    llmpar_json *nodes; /* owned; becomes the document */
    size_t used;        /* nodes so far */
    char *strings;      /* behind the nodes */
    llmpar_error *error;
} llmpar__json_parser;

/* ---- errors: each returns 0, so that a reader can `return` it ---- */

static int llmpar__json_expected(llmpar__json_parser *p, size_t position, const char *expected)
{
    char got[24] = "the end of the text";
    unsigned byte = position < p->length ? (unsigned char)p->text[position] : 0;
    if (byte > 0x20 && byte < 0x7F) snprintf(got, sizeof got, "'%c'", (int)byte);
    else if (position < p->length) snprintf(got, sizeof got, "byte 0x%02X", byte);
    llmpar_error_set(p->error, LLMPAR_ERR_FORMAT, "%s: byte %zu: expected %s, got %s", p->name, position, expected, got);
    return 0;
}

static void llmpar__json_skip_space(llmpar__json_parser *p)
{
    while (p->at < p->length) {
        char c = p->text[p->at];
        if (c != ' ' && c != '\t' && c != '\n' && c != '\r') return;
        p->at++;
    }
}

/* The character at the cursor, or -1 at the end. */
static int llmpar__json_peek(const llmpar__json_parser *p)
{
    return p->at < p->length ? (unsigned char)p->text[p->at] : -1;
}

/* ---- strings ---- */

/* Bytes of the UTF-8 character at text[length > 0], 0 if it is none: overlong forms, surrogates and values above U+10FFFF are
   refused (Unicode 15, table 3-7). */
static size_t llmpar__json_utf8(const char *text, size_t length)
{
    unsigned first, second, low = 0x80, high = 0xBF;
    first = (unsigned char)text[0];
    if (first < 0x80) return 1;
    if (first < 0xC2 || first > 0xF4) return 0;
    size_t bytes = first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
    if (length < bytes) return 0;
    if (first == 0xE0) low = 0xA0;
    if (first == 0xED) high = 0x9F;
    if (first == 0xF0) low = 0x90;
    if (first == 0xF4) high = 0x8F;
    second = (unsigned char)text[1];
    if (second < low || second > high) return 0;
    for (size_t i = 2; i < bytes; i++)
        if (((unsigned char)text[i] & 0xC0) != 0x80) return 0;
    return bytes;
}

static char *llmpar__json_put_utf8(char *out, uint32_t code)
{
    static const unsigned char lead[] = { 0, 0xC0, 0xE0, 0xF0 }; /* of a character with so many bytes behind the first, six bits each */
    int behind = code < 0x80 ? 0 : code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    *out++ = (char)(lead[behind] | code >> 6 * behind);
    while (behind-- > 0) *out++ = (char)(0x80 | (code >> 6 * behind & 0x3F));
    return out;
}

/* Four hexadecimal digits at the cursor. */
static int llmpar__json_hex4(llmpar__json_parser *p, uint32_t *code)
{
    *code = 0;
    for (int i = 0; i < 4; i++, p->at++) {
        int c = llmpar__json_peek(p);
        int digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
        if (digit < 0) return llmpar__json_expected(p, p->at, "four hexadecimal digits after \\u");
        *code = *code * 16 + (uint32_t)digit;
    }
    return 1;
}

/* What follows \u, two escapes for a code above U+FFFF. */
static int llmpar__json_unicode(llmpar__json_parser *p, uint32_t *code)
{
    size_t start = p->at - 2;
    uint32_t second;
    if (!llmpar__json_hex4(p, code)) return 0;
    if (*code < 0xD800 || *code > 0xDFFF) return 1;
    if (*code > 0xDBFF) return llmpar__json_expected(p, start, "no second half of a surrogate pair without a first");
    if (p->length - p->at < 2 || p->text[p->at] != '\\' || p->text[p->at + 1] != 'u')
        return llmpar__json_expected(p, p->at, "the second half of a surrogate pair");
    start = p->at;
    p->at += 2;
    if (!llmpar__json_hex4(p, &second)) return 0;
    if (second < 0xDC00 || second > 0xDFFF) return llmpar__json_expected(p, start, "the second half of a surrogate pair");
    *code = 0x10000 + ((*code - 0xD800) << 10) + (second - 0xDC00);
    return 1;
}

/* The string whose opening quote is at the cursor. */
static int llmpar__json_read_string(llmpar__json_parser *p, const char **string, size_t *length)
{
    char *begin = p->strings + p->at + 1, *out = begin;
    p->at++;
    for (;;) {
        int c = llmpar__json_peek(p);
        if (c == '"') break;
        if (c < 0x20) return llmpar__json_expected(p, p->at, "a character of a string or its closing '\"'");
        if (c != '\\') {
            size_t bytes = llmpar__json_utf8(p->text + p->at, p->length - p->at);
            if (!bytes) return llmpar__json_expected(p, p->at, "UTF-8");
            for (; bytes; bytes--) *out++ = p->text[p->at++];
            continue;
        }
        p->at++;
        c = llmpar__json_peek(p);
        if (c == 'u') {
            uint32_t code;
            p->at++;
            if (!llmpar__json_unicode(p, &code)) return 0;
            out = llmpar__json_put_utf8(out, code);
            continue;
        }
        switch (c) {
        case '"': case '\\': case '/': *out++ = (char)c; break;
        case 'b': *out++ = '\b'; break;
        case 'f': *out++ = '\f'; break;
        case 'n': *out++ = '\n'; break;
        case 'r': *out++ = '\r'; break;
        case 't': *out++ = '\t'; break;
        default: return llmpar__json_expected(p, p->at, "one of \"\\/bfnrtu after \\");
        }
        p->at++;
    }
    p->at++;
    *out = 0;
    *string = begin;
    *length = (size_t)(out - begin);
    return 1;
}

/* ---- numbers ---- */

/* A natural number above 0 and below 2^2816, for decimals that double arithmetic cannot round exactly. */
#define LLMPAR__JSON_BIG_LIMBS 88
typedef struct llmpar__json_big {
    uint32_t limb[LLMPAR__JSON_BIG_LIMBS]; /* lowest first */
    int used;                              /* limbs; the highest is not zero */
} llmpar__json_big;

/* big = big * factor + term */
static void llmpar__json_big_multiply(llmpar__json_big *big, uint32_t factor, uint32_t term)
{
    uint64_t carry = term;
    for (int i = 0; i < big->used; i++) {
        carry += (uint64_t)big->limb[i] * factor;
        big->limb[i] = (uint32_t)carry;
        carry >>= 32;
    }
    if (carry) big->limb[big->used++] = (uint32_t)carry;
}

static int llmpar__json_big_bits(const llmpar__json_big *big)
{
    return 32 * big->used - __builtin_clz(big->limb[big->used - 1]);
}

static void llmpar__json_big_shift(llmpar__json_big *big, int bits)
{
    int limbs = bits / 32, i;
    if (limbs) {
        for (i = big->used - 1; i >= 0; i--) big->limb[i + limbs] = big->limb[i];
        for (i = 0; i < limbs; i++) big->limb[i] = 0;
        big->used += limbs;
    }
    if (bits % 32) llmpar__json_big_multiply(big, (uint32_t)1 << bits % 32, 0);
}

static int llmpar__json_big_less(const llmpar__json_big *a, const llmpar__json_big *b)
{
    if (a->used != b->used) return a->used < b->used;
    for (int i = a->used - 1; i >= 0; i--)
        if (a->limb[i] != b->limb[i]) return a->limb[i] < b->limb[i];
    return 0;
}

/* a -= b, a >= b */
static void llmpar__json_big_subtract(llmpar__json_big *a, const llmpar__json_big *b)
{
    int64_t borrow = 0;
    for (int i = 0; i < a->used; i++) {
        borrow += (int64_t)a->limb[i] - (i < b->used ? (int64_t)b->limb[i] : 0);
        a->limb[i] = (uint32_t)borrow;
        borrow >>= 32;
    }
    while (a->used && a->limb[a->used - 1] == 0) a->used--;
}

/* digits (most significant first) * 10^scale, rounded once: both sides of the fraction are brought to the same length, then 64
   quotient bits come out by subtraction, and a rest that is not zero is the sticky bit. */
static double llmpar__json_exact(const unsigned char *digits, int count, int scale)
{
    llmpar__json_big above, below;
    uint64_t quotient = 0;
    int i, shift;
    above.used = 0;
    for (i = 0; i < count; i++) llmpar__json_big_multiply(&above, 10, digits[i]);
    below.limb[0] = 1;
    below.used = 1;
    for (i = 0; i < scale; i++) llmpar__json_big_multiply(&above, 5, 0);
    for (i = 0; i > scale; i--) llmpar__json_big_multiply(&below, 5, 0);
    shift = llmpar__json_big_bits(&above) - llmpar__json_big_bits(&below);
    if (shift < 0) llmpar__json_big_shift(&above, -shift);
    else llmpar__json_big_shift(&below, shift);
    for (i = 0; i < 64; i++) { /* above < 2 below */
        quotient <<= 1;
        if (!llmpar__json_big_less(&above, &below)) {
            llmpar__json_big_subtract(&above, &below);
            quotient |= 1;
        }
        llmpar__json_big_multiply(&above, 2, 0);
    }
    return llmpar__math_round_scaled(quotient, above.used != 0, (int64_t)shift + scale - 63);
}

/* The correctly rounded value of an unsigned number that fits the grammar; infinity where it is too large. 800 digits decide
   (768 are enough for any double or midpoint); non-zero ones beyond count as one more digit 1. */
static double llmpar__json_decimal(const char *text, size_t length)
{
    static const double power[23] = { 1e0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9, 1e10, 1e11,
                                      1e12, 1e13, 1e14, 1e15, 1e16, 1e17, 1e18, 1e19, 1e20, 1e21, 1e22 };
    const int64_t limit = (int64_t)1 << 59; /* beyond any text's length: zeros cannot bring a clamped exponent back */
    unsigned char digits[801];
    int count = 0, fraction = 0, beyond = 0, i;
    int64_t scale = 0, exponent = 0;
    size_t at;
    for (at = 0; at < length && (text[at] | 0x20) != 'e'; at++) {
        if (text[at] == '.') {
            fraction = 1;
        } else if (count == 800) {
            beyond |= text[at] != '0';
            scale += !fraction;
        } else {
            if (count || text[at] != '0') digits[count++] = (unsigned char)(text[at] - '0');
            scale -= fraction;
        }
    }
    if (at < length) {
        int negative = text[at + 1] == '-';
        for (at += text[at + 1] == '-' || text[at + 1] == '+' ? 2 : 1; at < length; at++)
            if (exponent < limit) exponent = exponent * 10 + (text[at] - '0');
        if (exponent > limit) exponent = limit;
        scale += negative ? -exponent : exponent;
    }
    if (beyond) {
        digits[count++] = 1;
        scale--;
    }
    for (; count && digits[count - 1] == 0; count--) scale++;
    if (count == 0) return 0.0;
    if (count + scale > 310) return llmpar__math_round_scaled(1, 0, 2000);
    if (count + scale < -330) return 0.0;
    if (count <= 15 && scale >= -22 && scale <= 22) { /* both operands exact: one rounding (Clinger 1990) */
        uint64_t value = 0;
        for (i = 0; i < count; i++) value = value * 10 + digits[i];
        return scale < 0 ? (double)value / power[-scale] : (double)value * power[scale];
    }
    return llmpar__json_exact(digits, count, (int)scale);
}

static int llmpar__json_is_digit(int c) { return c >= '0' && c <= '9'; }

/* At least one digit at the cursor. */
static int llmpar__json_digits(llmpar__json_parser *p)
{
    if (!llmpar__json_is_digit(llmpar__json_peek(p))) return llmpar__json_expected(p, p->at, "a digit");
    while (llmpar__json_is_digit(llmpar__json_peek(p))) p->at++;
    return 1;
}

static int llmpar__json_read_number(llmpar__json_parser *p, llmpar_json *node)
{
    uint64_t magnitude = 0;
    int negative = llmpar__json_peek(p) == '-', whole = 1;
    p->at += (size_t)negative;
    size_t begin = p->at;
    if (llmpar__json_peek(p) == '0') p->at++;
    else if (!llmpar__json_digits(p)) return 0;
    for (size_t i = begin; i < p->at && whole; i++)
        whole = !__builtin_mul_overflow(magnitude, (uint64_t)10, &magnitude) && !__builtin_add_overflow(magnitude, (uint64_t)(p->text[i] - '0'), &magnitude);
    if (llmpar__json_peek(p) == '.') {
        whole = 0;
        p->at++;
        if (!llmpar__json_digits(p)) return 0;
    }
    if (llmpar__json_peek(p) == 'e' || llmpar__json_peek(p) == 'E') {
        whole = 0;
        p->at++;
        if (llmpar__json_peek(p) == '+' || llmpar__json_peek(p) == '-') p->at++;
        if (!llmpar__json_digits(p)) return 0;
    }
    node->type = LLMPAR_JSON_NUMBER;
    node->number = llmpar__json_decimal(p->text + begin, p->at - begin);
    if (node->number > 1.7976931348623157e308) {
        llmpar_error_set(p->error, LLMPAR_ERR_FORMAT, "%s: byte %zu: expected a number up to 1.8e308, got a larger one", p->name, node->position);
        return 0;
    }
    if (negative) node->number = -node->number;
    if (whole && magnitude <= (uint64_t)INT64_MAX + (uint64_t)negative) {
        node->is_integer = 1;
        node->integer = negative ? (magnitude ? -(int64_t)(magnitude - 1) - 1 : 0) : (int64_t)magnitude;
    }
    return 1;
}

/* ---- member names ---- */

/* Any total order in which equal names are neighbours; equal ones in text order. */
static int llmpar__json_key_before(const llmpar_json *a, const llmpar_json *b)
{
    if (a->key_length != b->key_length) return a->key_length < b->key_length;
    int order = memcmp(a->key, b->key, a->key_length);
    return order ? order < 0 : a->key < b->key;
}

static void llmpar__json_sift(const llmpar_json **member, size_t root, size_t count)
{
    const llmpar_json *moving = member[root];
    size_t child;
    for (; (child = 2 * root + 1) < count; root = child) {
        if (child + 1 < count && llmpar__json_key_before(member[child], member[child + 1])) child++;
        if (!llmpar__json_key_before(moving, member[child])) break;
        member[root] = member[child];
    }
    member[root] = moving;
}

/* Refuses an object with two members of the same name. A heap sort: no input makes it quadratic or deep. */
static int llmpar__json_check_unique(llmpar__json_parser *p, const llmpar_json *object)
{
    const llmpar_json **member, *duplicate = NULL, *node, *swap;
    size_t count = 0, i;
    if (object->length < 2) return 1;
    member = LLMPAR__ALLOC(const llmpar_json *, p->heap, object->length);
    if (!member) {
        llmpar_error_set(p->error, LLMPAR_ERR_MEMORY, "%s: no memory to check %zu member names", p->name, object->length);
        return 0;
    }
    for (node = object->child; node; node = node->next) member[count++] = node;
    for (i = count / 2; i-- > 0;) llmpar__json_sift(member, i, count);
    for (i = count - 1; i > 0; i--) {
        swap = member[0];
        member[0] = member[i];
        member[i] = swap;
        llmpar__json_sift(member, 0, i);
    }
    for (i = 1; i < count; i++)
        if (member[i]->key_length == member[i - 1]->key_length && memcmp(member[i]->key, member[i - 1]->key, member[i]->key_length) == 0)
            if (!duplicate || member[i]->key < duplicate->key) duplicate = member[i];
    llmpar_heap_free(p->heap, (void *)member);
    if (!duplicate) return 1;
    int shown = duplicate->key_length < 80 ? (int)duplicate->key_length : 80;
    while (shown > 0 && ((unsigned char)duplicate->key[shown] & 0xC0) == 0x80) shown--; /* whole characters */
    llmpar_error_set(p->error, LLMPAR_ERR_FORMAT, "%s: byte %zu: expected every member name once, got \"%.*s\" again", p->name,
                     (size_t)(duplicate->key - p->strings) - 1, shown, duplicate->key);
    return 0;
}

/* ---- values ---- */

static int llmpar__json_read_key(llmpar__json_parser *p, llmpar_json *node)
{
    if (llmpar__json_peek(p) != '"') return llmpar__json_expected(p, p->at, "'\"' of a member's name");
    if (!llmpar__json_read_string(p, &node->key, &node->key_length)) return 0;
    llmpar__json_skip_space(p);
    if (llmpar__json_peek(p) != ':') return llmpar__json_expected(p, p->at, "':'");
    p->at++;
    llmpar__json_skip_space(p);
    return 1;
}

static int llmpar__json_read_word(llmpar__json_parser *p, const char *word)
{
    size_t length = strlen(word);
    if (p->length - p->at < length || memcmp(p->text + p->at, word, length) != 0) return llmpar__json_expected(p, p->at, "a value");
    p->at += length;
    return 1;
}

static int llmpar__json_read_scalar(llmpar__json_parser *p, llmpar_json *node)
{
    int c = llmpar__json_peek(p);
    if (c == '"') {
        node->type = LLMPAR_JSON_STRING;
        return llmpar__json_read_string(p, &node->string, &node->length);
    }
    if (c == '-' || llmpar__json_is_digit(c)) return llmpar__json_read_number(p, node);
    if (c == 'n') return llmpar__json_read_word(p, "null"); /* NULL is type 0 */
    if (c != 't' && c != 'f') return llmpar__json_expected(p, p->at, "a value");
    node->type = LLMPAR_JSON_BOOL;
    node->boolean = c == 't';
    return llmpar__json_read_word(p, c == 't' ? "true" : "false");
}

static int llmpar__json_read_document(llmpar__json_parser *p)
{
    llmpar_json *parent = NULL, *last = NULL, *node; /* last: the newest complete child of parent */
    uint32_t depth = 0;
    for (;;) {
        int c, closer;
        llmpar__json_skip_space(p);
        node = &p->nodes[p->used++];
        memset(node, 0, sizeof *node);
        if (parent && parent->type == LLMPAR_JSON_OBJECT && !llmpar__json_read_key(p, node)) return 0;
        node->position = p->at;
        if (last) last->next = node;
        else if (parent) parent->child = node;
        if (parent) parent->length++;
        c = llmpar__json_peek(p);
        if (c == '[' || c == '{') {
            node->type = c == '[' ? LLMPAR_JSON_ARRAY : LLMPAR_JSON_OBJECT;
            if (depth == p->max_depth) {
                llmpar_error_set(p->error, LLMPAR_ERR_FORMAT, "%s: byte %zu: expected at most %u nested arrays and objects, got more", p->name, p->at, (unsigned)p->max_depth);
                return 0;
            }
            p->at++;
            llmpar__json_skip_space(p);
            if (llmpar__json_peek(p) != (c == '[' ? ']' : '}')) {
                node->next = parent;
                parent = node;
                last = NULL;
                depth++;
                continue;
            }
            p->at++;
        } else if (!llmpar__json_read_scalar(p, node)) {
            return 0;
        }
        for (last = node;; last = node) { /* close what ends here */
            llmpar__json_skip_space(p);
            c = llmpar__json_peek(p);
            if (!parent) return c < 0 ? 1 : llmpar__json_expected(p, p->at, "the end of the text");
            closer = parent->type == LLMPAR_JSON_ARRAY ? ']' : '}';
            if (c == ',') break;
            if (c != closer) return llmpar__json_expected(p, p->at, closer == ']' ? "',' or ']'" : "',' or '}'");
            p->at++;
            node = parent;
            parent = node->next;
            node->next = NULL;
            depth--;
            if (p->unique_keys && node->type == LLMPAR_JSON_OBJECT && !llmpar__json_check_unique(p, node)) return 0;
        }
        p->at++;
    }
}

/* No text has more values than one and its '[', '{' and ',' outside strings: one of them stands before every value but the root. */
static size_t llmpar__json_count(const char *text, size_t length)
{
    size_t count = 1, i;
    int inside = 0;
    for (i = 0; i < length; i++) {
        char c = text[i];
        if (c == '"') inside = !inside;
        else if (inside && c == '\\') i++;
        else if (!inside && (c == ',' || c == '[' || c == '{')) count++;
    }
    return count;
}

LLMPAR_DEF llmpar_status llmpar_json_parse(llmpar_heap *heap, const char *text, size_t length, const llmpar_json_desc *desc, llmpar_json **out, llmpar_error *error)
{
    LLMPAR__NO_ERROR(own); /* the status must be known where the caller wants no text */
    size_t bytes = 0;
    *out = NULL;
    LLMPAR__ZEROED(llmpar__json_parser, p);
    p.heap = heap;
    p.text = text;
    p.length = length;
    p.name = desc && desc->name ? desc->name : "json";
    p.max_depth = desc && desc->max_depth ? desc->max_depth : 128;
    p.unique_keys = desc ? desc->unique_keys : 0;
    p.error = &own;
    if (llmpar_size_mul(llmpar__json_count(text, length), sizeof *p.nodes, &bytes) && llmpar_size_add(bytes, length, &bytes) && llmpar_size_add(bytes, 1, &bytes))
        p.nodes = (llmpar_json *)llmpar_heap_alloc(heap, bytes, 1);
    if (!p.nodes) return llmpar_error_set(error, LLMPAR_ERR_MEMORY, "%s: no memory for the values of %zu bytes of text", p.name, length);
    p.strings = (char *)p.nodes + (bytes - length - 1);
    if (!llmpar__json_read_document(&p)) {
        llmpar_heap_free(heap, p.nodes);
        return llmpar_error_set(error, own.status, "%s", own.text);
    }
    *out = p.nodes;
    return LLMPAR_OK;
}

LLMPAR_DEF void llmpar_json_destroy(llmpar_heap *heap, llmpar_json *root)
{
    llmpar_heap_free(heap, root);
}

LLMPAR_DEF const llmpar_json *llmpar_json_get(const llmpar_json *object, const char *key)
{
    size_t length = strlen(key);
    if (!object || object->type != LLMPAR_JSON_OBJECT) return NULL;
    for (const llmpar_json *member = object->child; member; member = member->next)
        if (member->key_length == length && memcmp(member->key, key, length) == 0) return member;
    return NULL;
}

/* ---- writing ---- */

LLMPAR_DEF size_t llmpar_json_escape(const char *text, size_t length, char *out, size_t capacity)
{
    static const char hex[] = "0123456789abcdef";
    static const char plain[] = "\b\f\n\r\t\"\\", letter[] = "bfnrt\"\\";
    size_t needed = 0, at = 0, i, bytes;
    char piece[8];
    int ended = 0;
    for (i = 0; !ended; i++) { /* the opening quote, at most `length` characters, the closing quote */
        size_t piece_length = 1;
        piece[0] = '"';
        if (i > 0 && at < length) {
            unsigned char c = (unsigned char)text[at];
            const char *found = c ? strchr(plain, c) : NULL;
            bytes = llmpar__json_utf8(text + at, length - at);
            if (found) {
                piece[0] = '\\';
                piece[1] = letter[found - plain];
                piece_length = 2;
            } else if (c < 0x20) {
                memcpy(piece, "\\u00", 4);
                piece[4] = hex[c >> 4];
                piece[5] = hex[c & 15];
                piece_length = 6;
            } else if (bytes) {
                memcpy(piece, text + at, bytes);
                piece_length = bytes;
            } else {
                memcpy(piece, "\xEF\xBF\xBD", 3);
                piece_length = 3;
                bytes = 1;
            }
            at += bytes;
        } else if (i > 0) {
            ended = 1;
        }
        for (bytes = 0; bytes < piece_length; bytes++, needed++)
            if (needed + 1 < capacity) out[needed] = piece[bytes];
    }
    if (capacity) out[needed < capacity ? needed : capacity - 1] = 0;
    return needed;
}

#undef LLMPAR__JSON_BIG_LIMBS
