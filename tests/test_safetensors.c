/* File primitives, and the safetensors reader and writer: every kind of bad file by its own message, round trips, a real model. */
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE 1
#endif
#include "test.h"
#include <errno.h>
#include <sys/stat.h>
#include <unistd.h>

static llmpar_heap heap;
static llmpar_error err;

/* Any test may run alone, so each use goes through here. */
static llmpar_heap *ready(void)
{
    if (!heap.allocator.alloc) llmpar_heap_init(&heap, NULL);
    llmpar_error_clear(&err);
    return &heap;
}

/* dir/name in one of four rotating buffers; the directory is made on first use and removed by the last test. */
static char directory[256];
static const char *in_dir(const char *name)
{
    static char buffer[4][512];
    static int next;
    if (!directory[0]) {
        const char *root = getenv("TMPDIR");
        snprintf(directory, sizeof directory, "%.200s/llmpar-test-XXXXXX", root && root[0] ? root : "/tmp");
        if (!mkdtemp(directory)) { fprintf(stderr, "cannot make %s\n", directory); exit(1); }
    }
    next = (next + 1) % 4;
    snprintf(buffer[next], sizeof buffer[next], "%s/%s", directory, name);
    return buffer[next];
}

static void put_file(const char *path, const void *data, size_t bytes)
{
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(data, 1, bytes, f) != bytes) TEST_FAIL("cannot write %s", path);
    if (f) fclose(f);
}

/* Header length (-1: as it is; others as an unsigned number), header text, then `data` zero bytes. Returns the size. */
static size_t build(unsigned char *out, long long length, const char *header, size_t data)
{
    size_t n = strlen(header), i;
    unsigned long long stated = length == -1 ? n : (unsigned long long)length;
    for (i = 0; i < 8; i++) out[i] = (unsigned char)(stated >> (8 * i));
    memcpy(out + 8, header, n);
    memset(out + 8 + n, 0, data);
    return 8 + n + data;
}

#define T_F32(shape, begin, end) "{\"dtype\":\"F32\",\"shape\":" shape ",\"data_offsets\":[" #begin "," #end "]}"

static const struct { const char *what; long long length; const char *header; size_t data; llmpar_status status; const char *text; } bad[] = {
    { "length beyond the file", 1000, "{}", 0, LLMPAR_ERR_FORMAT, "header length is 1000, but only 2 bytes follow it" },
    { "length over the limit", 100000001, "{}", 0, LLMPAR_ERR_FORMAT, "header length is 100000001, expected at most 100000000" },
    { "length 2^64 - 8", -8, "{}", 0, LLMPAR_ERR_FORMAT, "header length is 18446744073709551608, expected at most 100000000" },
    { "length 2^63 - 1", 0x7fffffffffffffffLL, "{}", 0, LLMPAR_ERR_FORMAT, "expected at most 100000000" },
    { "length 0", 0, "{}", 0, LLMPAR_ERR_FORMAT, "does not begin with '{'" },
    { "leading space", -1, " {}", 0, LLMPAR_ERR_FORMAT, "does not begin with '{'" },
    { "not an object", -1, "[]", 0, LLMPAR_ERR_FORMAT, "does not begin with '{'" },
    { "unclosed", -1, "{", 0, LLMPAR_ERR_FORMAT, "header: byte 1" },
    { "text after it", -1, "{}x", 0, LLMPAR_ERR_FORMAT, "header: byte 2" },
    { "bad UTF-8", -1, "{\"\xff\":1}", 0, LLMPAR_ERR_FORMAT, "header: byte" },
    { "trailing comma", -1, "{\"a\":" T_F32("[1]", 0, 4) ",}", 4, LLMPAR_ERR_FORMAT, "header: byte" },
    { "entry is a number", -1, "{\"a\":1}", 0, LLMPAR_ERR_FORMAT, "tensor \"a\" is a number, expected an object" },
    { "entry is an array", -1, "{\"a\":[\"F32\",[1],[0,4]]}", 4, LLMPAR_ERR_FORMAT, "tensor \"a\" is an array, expected an object" },
    { "entry is null", -1, "{\"a\":null}", 0, LLMPAR_ERR_FORMAT, "tensor \"a\" is null" },
    { "entry is false", -1, "{\"a\":false}", 0, LLMPAR_ERR_FORMAT, "tensor \"a\" is a boolean" },
    { "no dtype", -1, "{\"a\":{\"shape\":[1],\"data_offsets\":[0,4]}}", 4, LLMPAR_ERR_FORMAT, "tensor \"a\": dtype is missing" },
    { "no shape", -1, "{\"a\":{\"dtype\":\"F32\",\"data_offsets\":[0,4]}}", 4, LLMPAR_ERR_FORMAT, "tensor \"a\": shape is missing" },
    { "no offsets", -1, "{\"a\":{\"dtype\":\"F32\",\"shape\":[1]}}", 4, LLMPAR_ERR_FORMAT, "tensor \"a\": data_offsets is missing" },
    { "another field", -1, "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4],\"strides\":[1]}}", 4, LLMPAR_ERR_FORMAT, "unknown field \"strides\"" },
    { "dtype is a number", -1, "{\"a\":{\"dtype\":32,\"shape\":[1],\"data_offsets\":[0,4]}}", 4, LLMPAR_ERR_FORMAT, "dtype is a number" },
    { "unknown dtype", -1, "{\"a\":{\"dtype\":\"FP32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4, LLMPAR_ERR_FORMAT, "tensor \"a\": unknown dtype \"FP32\", expected F32" },
    { "lower-case dtype", -1, "{\"a\":{\"dtype\":\"f32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4, LLMPAR_ERR_FORMAT, "unknown dtype \"f32\"" },
    { "dtype with a NUL", -1, "{\"a\":{\"dtype\":\"F32\\u0000\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4, LLMPAR_ERR_FORMAT, "unknown dtype" },
    { "dtype of others", -1, "{\"a\":{\"dtype\":\"F8_E4M3\",\"shape\":[4],\"data_offsets\":[0,4]}}", 4, LLMPAR_ERR_UNSUPPORTED, "dtype F8_E4M3 is not supported, expected F32, F64, BF16" },
    { "bool", -1, "{\"a\":{\"dtype\":\"BOOL\",\"shape\":[4],\"data_offsets\":[0,4]}}", 4, LLMPAR_ERR_UNSUPPORTED, "dtype BOOL is not supported" },
    { "shape is a number", -1, "{\"a\":" T_F32("1", 0, 4) "}", 4, LLMPAR_ERR_FORMAT, "shape is a number, expected an array" },
    { "shape is null", -1, "{\"a\":" T_F32("null", 0, 4) "}", 4, LLMPAR_ERR_FORMAT, "shape is null" },
    { "fractional extent", -1, "{\"a\":" T_F32("[1.5]", 0, 4) "}", 4, LLMPAR_ERR_FORMAT, "shape[0] = 1.5, expected a non-negative integer below 2^63 (header byte 29)" },
    { "extent 1.0", -1, "{\"a\":" T_F32("[1.0]", 0, 4) "}", 4, LLMPAR_ERR_FORMAT, "shape[0] = 1.0" },
    { "extent 1e0", -1, "{\"a\":" T_F32("[1e0]", 0, 4) "}", 4, LLMPAR_ERR_FORMAT, "shape[0] = 1e0" },
    { "negative extent", -1, "{\"a\":" T_F32("[2,-1]", 0, 4) "}", 4, LLMPAR_ERR_FORMAT, "shape[1] = -1" },
    { "extent -0", -1, "{\"a\":" T_F32("[-0]", 0, 0) "}", 0, LLMPAR_ERR_FORMAT, "shape[0] = -0" },
    { "extent as text", -1, "{\"a\":" T_F32("[\"1\"]", 0, 4) "}", 4, LLMPAR_ERR_FORMAT, "shape[0] is a string" },
    { "extent 2^64", -1, "{\"a\":" T_F32("[18446744073709551616]", 0, 4) "}", 4, LLMPAR_ERR_FORMAT, "shape[0] = 18446744073709551616" },
    { "nested shape", -1, "{\"a\":" T_F32("[[1]]", 0, 4) "}", 4, LLMPAR_ERR_FORMAT, "shape[0] is an array" },
    { "nine dims", -1, "{\"a\":" T_F32("[1,1,1,1,1,1,1,1,1]", 0, 4) "}", 4, LLMPAR_ERR_UNSUPPORTED, "shape has 9 dims, at most 8" },
    { "product overflows", -1, "{\"a\":" T_F32("[4294967296,4294967296]", 0, 4) "}", 4, LLMPAR_ERR_OVERFLOW, "the product of the shape overflows at shape[1] = 4294967296" },
    { "bytes overflow", -1, "{\"a\":" T_F32("[4611686018427387905]", 0, 4) "}", 4, LLMPAR_ERR_OVERFLOW, "overflows at shape[0]" },
    { "overflow before a zero", -1, "{\"a\":" T_F32("[4294967296,4294967296,0]", 0, 0) "}", 0, LLMPAR_ERR_OVERFLOW, "overflows at shape[1]" },
    { "wraps to the right size", -1, "{\"a\":" T_F32("[9223372036854775807,2]", 0, 4) "}", 4, LLMPAR_ERR_OVERFLOW, "overflows" },
    { "offsets are an object", -1, "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":{\"a\":0,\"b\":4}}}", 4, LLMPAR_ERR_FORMAT, "data_offsets is an object of length 2, expected an array of 2" },
    { "offsets are a number", -1, "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":4}}", 4, LLMPAR_ERR_FORMAT, "data_offsets is a number of length 0, expected an array of 2" },
    { "an extent of many digits", -1, "{\"a\":" T_F32("[1.0000000000000000000000000000000000000000000000001]", 0, 4) "}", 4, LLMPAR_ERR_FORMAT, "shape[0] = 1.00000000000000000000000000000000000000, expected a non-negative integer" },
    { "three offsets", -1, "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4,8]}}", 4, LLMPAR_ERR_FORMAT, "data_offsets is an array of length 3" },
    { "one offset", -1, "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0]}}", 4, LLMPAR_ERR_FORMAT, "data_offsets is an array of length 1" },
    { "fractional offset", -1, "{\"a\":" T_F32("[1]", 0, 4.0) "}", 4, LLMPAR_ERR_FORMAT, "data_offsets[1] = 4.0" },
    { "negative offset", -1, "{\"a\":" T_F32("[1]", -4, 0) "}", 4, LLMPAR_ERR_FORMAT, "data_offsets[0] = -4" },
    { "end before begin", -1, "{\"a\":" T_F32("[1]", 4, 0) "}", 4, LLMPAR_ERR_FORMAT, "data_offsets [4, 0] end before they begin" },
    { "past the end", -1, "{\"a\":" T_F32("[2]", 0, 8) "}", 4, LLMPAR_ERR_FORMAT, "data_offsets [0, 8] reach past the end of the file, which has 4 bytes of data" },
    { "far past the end", -1, "{\"a\":" T_F32("[2]", 9223372036854775799, 9223372036854775807) "}", 4, LLMPAR_ERR_FORMAT, "reach past the end" },
    { "range too long", -1, "{\"a\":" T_F32("[1]", 0, 8) "}", 8, LLMPAR_ERR_FORMAT, "dtype and shape need 4 bytes, data_offsets [0, 8] give 8" },
    { "range too short", -1, "{\"a\":" T_F32("[4]", 0, 8) "}", 8, LLMPAR_ERR_FORMAT, "need 16 bytes, data_offsets [0, 8] give 8" },
    { "gap at the front", -1, "{\"a\":" T_F32("[1]", 4, 8) "}", 8, LLMPAR_ERR_FORMAT, "tensor \"a\" begins at data byte 4, expected 0: a gap of 4 bytes" },
    { "gap in the middle", -1, "{\"a\":" T_F32("[1]", 0, 4) ",\"b\":" T_F32("[1]", 8, 12) "}", 12, LLMPAR_ERR_FORMAT, "tensor \"b\" begins at data byte 8, expected 4: a gap of 4" },
    { "overlap", -1, "{\"a\":" T_F32("[2]", 0, 8) ",\"b\":" T_F32("[2]", 4, 12) "}", 12, LLMPAR_ERR_FORMAT, "tensor \"b\" begins at data byte 4, expected 8: it overlaps tensor \"a\"" },
    { "same bytes twice", -1, "{\"a\":" T_F32("[1]", 0, 4) ",\"b\":" T_F32("[1]", 0, 4) "}", 4, LLMPAR_ERR_FORMAT, "it overlaps tensor" },
    { "an empty tensor inside another", -1, "{\"a\":" T_F32("[2]", 0, 8) ",\"b\":" T_F32("[0]", 4, 4) "}", 8, LLMPAR_ERR_FORMAT, "tensor \"b\" begins at data byte 4, expected 8" },
    { "bytes at the end", -1, "{\"a\":" T_F32("[1]", 0, 4) "}", 7, LLMPAR_ERR_FORMAT, "3 bytes follow the last tensor" },
    { "bytes and no tensor", -1, "{}", 1, LLMPAR_ERR_FORMAT, "1 bytes follow the last tensor" },
    { "duplicate tensor", -1, "{\"a\":" T_F32("[1]", 0, 4) ",\"a\":" T_F32("[1]", 4, 8) "}", 8, LLMPAR_ERR_FORMAT, "header: byte" },
    { "duplicate by escape", -1, "{\"a\":" T_F32("[1]", 0, 4) ",\"\\u0061\":" T_F32("[1]", 4, 8) "}", 8, LLMPAR_ERR_FORMAT, "header: byte" },
    { "duplicate field", -1, "{\"a\":{\"dtype\":\"F32\",\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4, LLMPAR_ERR_FORMAT, "header: byte" },
    { "name with a NUL", -1, "{\"a\\u0000b\":" T_F32("[1]", 0, 4) "}", 4, LLMPAR_ERR_FORMAT, "the name holds a NUL byte" },
    { "a tensor whose name begins like the metadata's", -1, "{\"__metadata__\\u0000\":{}}", 0, LLMPAR_ERR_FORMAT, "tensor \"__metadata__\": the name holds a NUL byte" },
    { "metadata is null before a tensor", -1, "{\"__metadata__\":null,\"a\":" T_F32("[1]", 0, 4) "}", 4, LLMPAR_ERR_FORMAT, "__metadata__ is null, expected an object" },
    { "metadata is a text", -1, "{\"__metadata__\":\"pt\"}", 0, LLMPAR_ERR_FORMAT, "__metadata__ is a string, expected an object" },
    { "metadata holds a number", -1, "{\"__metadata__\":{\"n\":1}}", 0, LLMPAR_ERR_FORMAT, "__metadata__ \"n\" is a number, expected a string" },
    { "metadata holds an object", -1, "{\"__metadata__\":{\"n\":{}}}", 0, LLMPAR_ERR_FORMAT, "__metadata__ \"n\" is an object" },
    { "metadata twice", -1, "{\"__metadata__\":{},\"__metadata__\":{}}", 0, LLMPAR_ERR_FORMAT, "header: byte" }
};

TEST(bad_files)
{
    static unsigned char bytes[4096];
    size_t i;
    const char *path = in_dir("bad.safetensors");
    for (i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        llmpar_safetensors *file = (llmpar_safetensors *)&heap, *again = file;
        size_t n = build(bytes, bad[i].length, bad[i].header, bad[i].data);
        llmpar_status status = llmpar_safetensors_open_memory(ready(), bytes, n, "dir/x.safetensors", &file, &err);
        if (status != bad[i].status || file || !strstr(err.text, bad[i].text) || !strstr(err.text, "dir/x.safetensors: "))
            TEST_FAIL("%s: got %s \"%s\", want %s \"%s\"", bad[i].what, llmpar_status_string(status), err.text, llmpar_status_string(bad[i].status), bad[i].text);
        put_file(path, bytes, n);
        status = llmpar_safetensors_open(ready(), NULL, path, &again, &err);
        if (status != bad[i].status || again || !strstr(err.text, bad[i].text) || !strstr(err.text, path)) TEST_FAIL("%s, from a file: got %s \"%s\"", bad[i].what, llmpar_status_string(status), err.text);
    }
    CHECK_INT(heap.live, 0);
    unlink(path);
}

TEST(too_short_files)
{
    llmpar_safetensors *file;
    const char *path = in_dir("short.safetensors");
    size_t n;
    for (n = 0; n < 8; n++) {
        put_file(path, "\2\0\0\0\0\0\0\0", n);
        CHECK_STATUS(llmpar_safetensors_open(ready(), NULL, path, &file, &err), LLMPAR_ERR_FORMAT);
        CHECK_TEXT(err.text, "expected at least 8 for the header length");
    }
    unlink(path);
    CHECK_STATUS(llmpar_safetensors_open(ready(), NULL, path, &file, &err), LLMPAR_ERR_IO);
    CHECK_TEXT(err.text, path);
    CHECK_TEXT(err.text, "cannot open");
    CHECK_STATUS(llmpar_safetensors_open(ready(), NULL, directory, &file, &err), LLMPAR_ERR_IO);
    CHECK_TEXT(err.text, "expected a regular file, got a directory");
    CHECK(!file);
    CHECK_INT(heap.live, 0);
}

/* Every prefix of a good file, and every single-byte change of its header, is either refused or read within its bounds. */
TEST(damaged_files)
{
    static const char header[] = "{\"__metadata__\":{\"format\":\"pt\"},\"b\":" T_F32("[2,1]", 4, 12) ",\"a\":" T_F32("[]", 0, 4) ",\"e\":" T_F32("[0,3]", 4, 4) "}   ";
    static unsigned char bytes[1024];
    size_t n = build(bytes, -1, header, 12), i, cut;
    llmpar_safetensors *file;
    int accepted = 0;
    CHECK_OK(llmpar_safetensors_open_memory(ready(), bytes, n, "x", &file, &err));
    CHECK_INT(file->count, 3);
    llmpar_safetensors_close(file);
    for (cut = 0; cut < n; cut++) {
        unsigned char *copy = (unsigned char *)malloc(cut ? cut : 1); /* exact size: the address sanitizer sees a read beyond it */
        memcpy(copy, bytes, cut);
        CHECK(llmpar_safetensors_open_memory(ready(), copy, cut, "x", &file, &err) != LLMPAR_OK);
        free(copy);
    }
    for (i = 0; i < n - 12; i++) {
        static const unsigned char change[] = { 0, ' ', '"', '0', '1', '9', '-', '.', ',', ':', '{', '}', '[', ']', '\\', 0x80, 0xff };
        size_t k;
        for (k = 0; k < sizeof change; k++) {
            unsigned char old = bytes[i];
            int32_t j;
            bytes[i] = change[k];
            if (!llmpar_safetensors_open_memory(ready(), bytes, n, "x", &file, &err)) {
                accepted++;
                for (j = 0; j < file->count; j++) CHECK(file->tensor[j].begin >= n - 12 && file->tensor[j].bytes <= n - file->tensor[j].begin);
                llmpar_safetensors_close(file);
            }
            bytes[i] = old;
        }
    }
    CHECK(accepted > 0); /* a changed letter in a name is still a good file */
    CHECK_INT(heap.live, 0);
}

TEST(good_oddities)
{
    static const struct { const char *header; size_t data; int count; } good[] = {
        { "{}", 0, 0 }, { "{}      ", 0, 0 }, { "{}\n", 0, 0 }, { "{\"__metadata__\":{}}", 0, 0 }, { "{\"__metadata__\":{\"a\":\"\",\"b\":\"\\u00e9\"}}", 0, 0 },
        { "{\"\":" T_F32("[]", 0, 4) "}", 4, 1 },                                             /* a scalar, an empty name */
        { "{\"z\":" T_F32("[0]", 0, 0) ",\"y\":" T_F32("[0,18014398509481984]", 0, 0) "}", 0, 2 }, /* nothing at all */
        { "{\"b\":" T_F32("[1]", 4, 8) ",\"a\":" T_F32("[1]", 0, 4) "}", 8, 2 },              /* any order in the header */
        { "{ \"a\" : {\"data_offsets\":[0, 4], \"shape\" : [1,1,1,1,1,1,1,1], \"dtype\":\"F32\"} }", 4, 1 },
        { "{\"a\":{\"dtype\":\"U8\",\"shape\":[3],\"data_offsets\":[0,3]},\"b\":" T_F32("[1]", 3, 7) "}", 7, 2 } /* unaligned, as the reference allows */
    };
    static unsigned char bytes[1024];
    llmpar_safetensors *file;
    size_t i;
    for (i = 0; i < sizeof good / sizeof good[0]; i++) {
        size_t n = build(bytes, -1, good[i].header, good[i].data);
        if (llmpar_safetensors_open_memory(ready(), bytes, n, "x", &file, &err)) { TEST_FAIL("%s: %s", good[i].header, err.text); continue; }
        CHECK_INT(file->count, good[i].count);
        llmpar_safetensors_close(file);
    }
    CHECK_INT(heap.live, 0);
}

static llmpar_safetensor declare(const char *name, llmpar_dtype dtype, int32_t dims, int64_t a, int64_t b)
{
    llmpar_safetensor t;
    memset(&t, 0, sizeof t);
    t.name = name; t.dtype = dtype; t.dims = dims; t.shape[0] = a; t.shape[1] = b;
    return t;
}

TEST(round_trip)
{
    static const llmpar_dtype types[8] = { LLMPAR_F32, LLMPAR_F64, LLMPAR_BF16, LLMPAR_F16, LLMPAR_I32, LLMPAR_I64, LLMPAR_U64, LLMPAR_U8 };
    static const char *const names[8] = { "model.layers.10.w", "model.layers.2.w", "quote\" backslash\\ tab\t", "\xc3\xa9\xe2\x82\xac", "", "a", "Z", "lm_head.weight" };
    static unsigned char data[200000], got[200000];
    llmpar_safetensor tensors[10];
    llmpar_safetensors_writer *writer;
    llmpar_safetensors *file;
    const char *path = in_dir("round.safetensors");
    size_t total = 0, at = 0, portion = 1;
    int i;
    for (i = 0; i < 8; i++) tensors[i] = declare(names[i], types[i], i % 3, 100 + i, 37);
    tensors[2].shape[0] = 40; tensors[5].shape[1] = 90;
    tensors[8] = declare("empty", LLMPAR_F32, 2, 0, 5);
    tensors[9] = declare("last", LLMPAR_U8, 1, 3, 0);
    for (i = 0; i < 10; i++) {
        int64_t elements;
        CHECK(llmpar_extent_product(tensors[i].shape, tensors[i].dims, &elements));
        total += (size_t)elements * llmpar_dtype_size(tensors[i].dtype);
    }
    CHECK(total < sizeof data);
    for (at = 0; at < total; at++) data[at] = (unsigned char)(at * 131 + at / 251);
    CHECK_OK(llmpar_safetensors_writer_open(ready(), NULL, path, tensors, 10, &writer, &err));
    for (at = 0; at < total; at += portion) {
        portion = (portion * 7 + 13) % 5000; /* portions ignore the tensors' borders, and some are empty */
        if (portion > total - at) portion = total - at;
        CHECK_OK(llmpar_safetensors_writer_write(writer, data + at, portion, &err));
    }
    CHECK(!llmpar_is_file(path));
    CHECK_OK(llmpar_safetensors_writer_commit(writer, &err));
    CHECK_INT(heap.live, 0);
    CHECK(llmpar_is_file(path));
    if (llmpar_safetensors_open(ready(), NULL, path, &file, &err)) { TEST_FAIL("%s", err.text); return; }
    CHECK_INT(file->count, 10);
    CHECK(!strcmp(file->path, path));
    for (i = 1; i < file->count; i++) CHECK(strcmp(file->tensor[i - 1].name, file->tensor[i].name) < 0);
    at = 0;
    for (i = 0; i < 10; i++) {
        const llmpar_safetensor *t = llmpar_safetensors_find(file, tensors[i].name);
        int d;
        if (!t) { TEST_FAIL("%s is not there", tensors[i].name); continue; }
        CHECK_INT(t->dtype, tensors[i].dtype); CHECK_INT(t->dims, tensors[i].dims);
        for (d = 0; d < t->dims; d++) CHECK_INT(t->shape[d], tensors[i].shape[d]);
        CHECK_OK(llmpar_safetensors_read(file, t, 0, t->bytes, got, &err));
        CHECK_BYTES(got, data + at, t->bytes);
        if (i == 0) CHECK_INT(t->begin % 8, 0);
        at += t->bytes;
    }
    CHECK_INT(at, total);
    CHECK(!llmpar_safetensors_find(file, "absent"));
    CHECK(!llmpar_safetensors_find(file, "model.layers.10"));
    llmpar_safetensors_close(file);
    llmpar_safetensors_close(NULL);
    CHECK_INT(heap.live, 0);
    unlink(path);
}

/* Slices: exactly what is asked for is read, of a file and of memory; what lies outside is refused. */
TEST(reads_slices)
{
    static unsigned char bytes[4096], to[64];
    size_t n = build(bytes, -1, "{\"a\":" T_F32("[4]", 0, 16) ",\"b\":" T_F32("[2]", 16, 24) "}", 24), i, from, count;
    const char *path = in_dir("slices.safetensors");
    int memory;
    for (i = n - 24; i < n; i++) bytes[i] = (unsigned char)(i * 37);
    put_file(path, bytes, n);
    for (memory = 0; memory < 2; memory++) {
        llmpar_safetensors *file = NULL;
        const llmpar_safetensor *a, *b;
        if (memory) CHECK_OK(llmpar_safetensors_open_memory(ready(), bytes, n, "x", &file, &err));
        else CHECK_OK(llmpar_safetensors_open(ready(), NULL, path, &file, &err));
        if (!file) return;
        CHECK(memory ? file->data == bytes && !file->source : !file->data && file->source != NULL);
        if (!memory) CHECK_INT(file->source->bytes_read, n - 24); /* the header alone */
        a = llmpar_safetensors_find(file, "a");
        b = llmpar_safetensors_find(file, "b");
        for (from = 0; from <= 16; from++)
            for (count = 0; count <= 16 - from; count++) {
                uint64_t before = memory ? 0 : file->source->bytes_read;
                memset(to, 0xEE, sizeof to);
                CHECK_OK(llmpar_safetensors_read(file, a, from, count, to + 8, &err));
                CHECK_BYTES(to + 8, bytes + n - 24 + from, count);
                CHECK(to[7] == 0xEE && to[8 + count] == 0xEE);
                if (!memory) CHECK_INT(file->source->bytes_read - before, count);
            }
        CHECK_OK(llmpar_safetensors_read(file, b, 7, 1, to, &err));
        CHECK_INT(to[0], bytes[n - 1]);
        ready();
        CHECK_STATUS(llmpar_safetensors_read(file, a, 9, 8, to, &err), LLMPAR_ERR_ARGUMENT); /* b's bytes are there, but not a's */
        CHECK_TEXT(err.text, "tensor \"a\": 8 bytes from byte 9, but it has 16");
        CHECK_STATUS(llmpar_safetensors_read(file, a, 17, 0, to, &err), LLMPAR_ERR_ARGUMENT);
        CHECK_STATUS(llmpar_safetensors_read(file, a, 1, (size_t)-1, to, &err), LLMPAR_ERR_ARGUMENT);
        CHECK_STATUS(llmpar_safetensors_read(file, a, (size_t)-1, 2, to, &err), LLMPAR_ERR_ARGUMENT);
        llmpar_safetensors_close(file);
    }
    CHECK_INT(heap.live, 0);
    unlink(path);
}

/* A file that becomes shorter while it is open, at every length, fails a read and nothing else; what is still there can be read. */
TEST(shrinking_file)
{
    static unsigned char bytes[4096], to[64];
    size_t n = build(bytes, -1, "{\"a\":" T_F32("[2]", 0, 8) "}", 8), left;
    const char *path = in_dir("shrinks.safetensors");
    for (left = 0; left <= n; left++) {
        llmpar_safetensors *file = NULL;
        put_file(path, bytes, n);
        CHECK_OK(llmpar_safetensors_open(ready(), NULL, path, &file, &err));
        if (!file) return;
        CHECK(truncate(path, (off_t)left) == 0);
        CHECK_STATUS(llmpar_safetensors_read(file, file->tensor, 0, 8, to, &err), left == n ? LLMPAR_OK : LLMPAR_ERR_IO);
        if (left < n) CHECK_TEXT(err.text, "shrinks.safetensors: ends at byte");
        if (left + 4 == n) CHECK_OK(llmpar_safetensors_read(file, file->tensor, 0, 4, to, &err));
        llmpar_safetensors_close(file);
    }
    CHECK_INT(heap.live, 0);
    unlink(path);
}

/* A table that gives the first header byte as asked and shrinks, fails or interrupts from the given call on. */
typedef struct flaky { const llmpar_io *io; int at, calls, number; } flaky;
static int flaky_read(void *user, int handle, void *data, size_t bytes, uint64_t offset, size_t *got)
{
    flaky *f = (flaky *)user;
    if (++f->calls == f->at) {
        *got = 0;
        return f->number; /* 0: the end */
    }
    return f->io->read(f->io->user, handle, data, bytes > 3 ? 3 : bytes, offset, got); /* always short */
}
static int flaky_open(void *user, const char *path, llmpar_io_mode mode, int *handle) { const llmpar_io *io = ((flaky *)user)->io; return io->open(io->user, path, mode, handle); }
static int flaky_close(void *user, int handle) { const llmpar_io *io = ((flaky *)user)->io; return io->close(io->user, handle); }
static int flaky_look(void *user, const char *path, llmpar_io_kind *kind, uint64_t *bytes) { const llmpar_io *io = ((flaky *)user)->io; return io->look(io->user, path, kind, bytes); }

TEST(reads_that_fail)
{
    static const int numbers[] = { EIO, 0, EINTR };
    static unsigned char bytes[4096], to[8];
    size_t n = build(bytes, -1, "{\"a\":" T_F32("[2]", 0, 8) "}", 8);
    const char *path = in_dir("flaky.safetensors");
    size_t k;
    put_file(path, bytes, n);
    for (k = 0; k < 3; k++) {
        flaky f = { llmpar_io_system(), 0, 0, 0 };
        llmpar_io io = *f.io;
        int at, done = 0;
        io.user = &f;
        io.open = flaky_open, io.close = flaky_close, io.look = flaky_look, io.read = flaky_read;
        f.number = numbers[k];
        for (at = 1; !done; at++) {
            llmpar_safetensors *file = NULL;
            llmpar_status status;
            f.at = at;
            f.calls = 0;
            ready();
            status = llmpar_safetensors_open(&heap, &io, path, &file, &err);
            if (!status) status = llmpar_safetensors_read(file, file->tensor, 0, 8, to, &err);
            done = f.calls < at;
            CHECK_STATUS(status, done || f.number == EINTR ? LLMPAR_OK : LLMPAR_ERR_IO);
            if (status) CHECK_TEXT(err.text, f.number ? "cannot read" : "ends at byte");
            llmpar_safetensors_close(file);
            CHECK_INT(heap.live, 0);
        }
        CHECK(at > 20);
    }
    unlink(path);
}

/* Every write fails once: of the header's length, of the header, of the data. */
static int flaky_write(void *user, int handle, const void *data, size_t bytes, size_t *written)
{
    flaky *f = (flaky *)user;
    if (++f->calls >= f->at) return ENOSPC;
    return f->io->write(f->io->user, handle, data, bytes, written);
}
static int flaky_sync(void *user, int handle) { const llmpar_io *io = ((flaky *)user)->io; return io->sync(io->user, handle); }
static int flaky_rename(void *user, const char *from, const char *to) { const llmpar_io *io = ((flaky *)user)->io; return io->rename(io->user, from, to); }
static int flaky_remove(void *user, const char *path) { const llmpar_io *io = ((flaky *)user)->io; return io->remove(io->user, path); }

TEST(writes_that_fail)
{
    static char data[1 << 22];
    static char name[1 << 21]; /* each is more than a writer's buffer */
    llmpar_safetensor tensor = declare(name, LLMPAR_U8, 1, (int64_t)sizeof data, 0);
    const char *path = in_dir("unwritten.safetensors"), *temporary = in_dir("unwritten.safetensors.tmp");
    int done = 0, failed = 0;
    memset(name, 'n', sizeof name - 1);
    for (int at = 1; !done; at++) {
        flaky f = { llmpar_io_system(), at, 0, 0 };
        llmpar_io io = *f.io;
        llmpar_safetensors_writer *writer = NULL;
        io.user = &f;
        io.open = flaky_open, io.close = flaky_close, io.look = flaky_look, io.write = flaky_write, io.sync = flaky_sync, io.rename = flaky_rename, io.remove = flaky_remove;
        llmpar_status status = llmpar_safetensors_writer_open(ready(), &io, path, &tensor, 1, &writer, &err);
        CHECK((status == LLMPAR_OK) == (writer != NULL));
        if (!status) {
            status = llmpar_safetensors_writer_write(writer, data, sizeof data, &err);
            if (status) llmpar_safetensors_writer_abandon(writer);
            else status = llmpar_safetensors_writer_commit(writer, &err);
        }
        done = f.calls < at;
        failed += !done;
        CHECK_STATUS(status, done ? LLMPAR_OK : LLMPAR_ERR_IO);
        if (status) CHECK_TEXT(err.text, "No space left");
        CHECK(llmpar_is_file(path) == done && !llmpar_is_file(temporary));
        CHECK_INT(heap.live, 0);
    }
    CHECK(failed >= 2);
    unlink(path);
}

/* Nothing is taken for a header that the file cannot hold, and little more than the header for one that it does, however large the data is. */
TEST(bounded_memory)
{
    static unsigned char bytes[4096];
    const char *path = in_dir("large.safetensors");
    llmpar_safetensors *file;
    size_t n = build(bytes, 99999999, "{}", 0);
    put_file(path, bytes, n);
    ready();
    heap.peak = heap.live;
    CHECK_STATUS(llmpar_safetensors_open(&heap, NULL, path, &file, &err), LLMPAR_ERR_FORMAT);
    CHECK(heap.peak < 1000);
    n = build(bytes, -1, "{\"a\":{\"dtype\":\"U8\",\"shape\":[100000000],\"data_offsets\":[0,100000000]}}", 0);
    put_file(path, bytes, n);
    CHECK(truncate(path, (off_t)n + 100000000) == 0); /* a hole */
    CHECK_OK(llmpar_safetensors_open(&heap, NULL, path, &file, &err));
    CHECK(heap.peak < 20000);
    llmpar_safetensors_close(file);
    CHECK_INT(heap.live, 0);
    unlink(path);
}

/* What a good header looks like, byte for byte. */
TEST(header_text)
{
    static const char want[] = "\x58\0\0\0\0\0\0\0{\"__metadata__\":{\"format\":\"pt\"},\"a\":{\"dtype\":\"BF16\",\"shape\":[2],\"data_offsets\":[0,4]}}  abcd";
    llmpar_safetensor tensor = declare("a", LLMPAR_BF16, 1, 2, 0);
    llmpar_safetensors_writer *writer;
    llmpar_mapped mapped;
    const char *path = in_dir("header.safetensors");
    size_t length;
    CHECK_OK(llmpar_safetensors_writer_open(ready(), NULL, path, &tensor, 1, &writer, &err));
    CHECK_OK(llmpar_safetensors_writer_write(writer, "abcd", 4, &err));
    CHECK_OK(llmpar_safetensors_writer_commit(writer, &err));
    CHECK_OK(llmpar_file_map(path, &mapped, &err));
    length = mapped.data[0];
    CHECK_INT((8 + length) % 8, 0);
    CHECK_INT(mapped.bytes, 8 + length + 4);
    CHECK_INT(mapped.bytes, sizeof want - 1);
    if (mapped.bytes == sizeof want - 1) CHECK_BYTES(mapped.data, want, mapped.bytes);
    llmpar_file_unmap(&mapped);
    llmpar_file_unmap(&mapped);
    unlink(path);
    CHECK_INT(heap.live, 0);
}

TEST(writer_refuses)
{
    llmpar_safetensor t[2];
    llmpar_safetensors_writer *writer;
    const char *path = in_dir("refused.safetensors"), *temporary = in_dir("refused.safetensors.tmp");
    static const struct { const char *name; llmpar_dtype dtype; int32_t dims; int64_t a, b; llmpar_status status; const char *text; } table[] = {
        { "x", LLMPAR_F32, 1, 1, 0, LLMPAR_ERR_ARGUMENT, "tensor \"x\" is declared twice" },
        { "__metadata__", LLMPAR_F32, 1, 1, 0, LLMPAR_ERR_ARGUMENT, "__metadata__ is reserved" },
        { NULL, LLMPAR_F32, 1, 1, 0, LLMPAR_ERR_ARGUMENT, "name is NULL" },
        { "y", LLMPAR_DTYPE_DEFAULT, 1, 1, 0, LLMPAR_ERR_ARGUMENT, "dtype 0 is no stored type" },
        { "y", (llmpar_dtype)77, 1, 1, 0, LLMPAR_ERR_ARGUMENT, "dtype 77 is no stored type" },
        { "y", LLMPAR_F32, 9, 1, 0, LLMPAR_ERR_SHAPE, "9 dims, expected 0 to 8" },
        { "y", LLMPAR_F32, -1, 1, 0, LLMPAR_ERR_SHAPE, "-1 dims, expected 0 to 8" },
        { "y", LLMPAR_F32, 2, 3, -1, LLMPAR_ERR_SHAPE, "shape[1] = -1, expected at least 0" },
        { "y", LLMPAR_F32, 2, (int64_t)1 << 40, (int64_t)1 << 40, LLMPAR_ERR_OVERFLOW, "overflows" },
        { "y", LLMPAR_F64, 1, (int64_t)1 << 61, 0, LLMPAR_ERR_OVERFLOW, "overflows" } };
    size_t i;
    t[0] = declare("x", LLMPAR_F32, 1, 1, 0);
    for (i = 0; i < sizeof table / sizeof table[0]; i++) {
        t[1] = declare(table[i].name, table[i].dtype, table[i].dims, table[i].a, table[i].b);
        CHECK_STATUS(llmpar_safetensors_writer_open(ready(), NULL, path, t, 2, &writer, &err), table[i].status);
        CHECK_TEXT(err.text, table[i].text);
        CHECK(!writer);
        CHECK(!llmpar_is_file(temporary)); /* refused before anything was made */
        CHECK_STATUS(llmpar_safetensors_check(ready(), path, t, 2, &err), table[i].status);
    }
    CHECK_STATUS(llmpar_safetensors_check(ready(), path, t, -1, &err), LLMPAR_ERR_ARGUMENT);
    CHECK_TEXT(err.text, "tensor count = -1");
    /* what is declared twice before the last one; a name that makes the header larger than the format allows */
    llmpar_safetensor three[3] = { declare("x", LLMPAR_F32, 1, 1, 0), declare("x", LLMPAR_F32, 1, 1, 0), declare("z", LLMPAR_F32, 1, 1, 0) };
    CHECK_STATUS(llmpar_safetensors_check(ready(), path, three, 3, &err), LLMPAR_ERR_ARGUMENT);
    char *name = (char *)malloc(16700001);
    memset(name, 1, 16700000); /* \u0001 */
    name[16700000] = 0;
    t[1] = declare(name, LLMPAR_F32, 1, 1, 0);
    CHECK_STATUS(llmpar_safetensors_writer_open(ready(), NULL, path, t, 2, &writer, &err), LLMPAR_ERR_OVERFLOW);
    CHECK_TEXT(err.text, "the format allows 100000000");
    free(name);
    /* no tensor at all */
    CHECK_OK(llmpar_safetensors_writer_open(ready(), NULL, path, t, 0, &writer, &err));
    CHECK_OK(llmpar_safetensors_writer_commit(writer, &err));
    unlink(path);
    /* too many bytes, too few bytes, abandoned */
    CHECK_OK(llmpar_safetensors_writer_open(ready(), NULL, path, t, 1, &writer, &err));
    CHECK_STATUS(llmpar_safetensors_writer_write(writer, "12345", 5, &err), LLMPAR_ERR_ARGUMENT);
    CHECK_TEXT(err.text, "5 bytes after 0 of 4 declared: too many");
    CHECK_OK(llmpar_safetensors_writer_write(writer, "123", 3, ready() ? &err : NULL));
    CHECK(llmpar_is_file(temporary));
    CHECK_STATUS(llmpar_safetensors_writer_settle(writer, &err), LLMPAR_ERR_ARGUMENT);
    CHECK_TEXT(err.text, "3 bytes of data were written, expected 4");
    CHECK(!llmpar_is_file(path));
    ready();
    CHECK_STATUS(llmpar_safetensors_writer_commit(writer, &err), LLMPAR_ERR_ARGUMENT);
    CHECK_TEXT(err.text, "3 bytes of data were written, expected 4");
    CHECK(!llmpar_is_file(temporary) && !llmpar_is_file(path));
    CHECK_OK(llmpar_safetensors_writer_open(ready(), NULL, path, t, 1, &writer, &err));
    llmpar_safetensors_writer_abandon(writer);
    llmpar_safetensors_writer_abandon(NULL);
    CHECK(!llmpar_is_file(temporary) && !llmpar_is_file(path));
    CHECK_STATUS(llmpar_safetensors_writer_open(ready(), NULL, in_dir("no/such/dir.safetensors"), t, 1, &writer, &err), LLMPAR_ERR_IO);
    CHECK_TEXT(err.text, "cannot create");
    CHECK_INT(heap.live, 0);
}

TEST(out_of_memory)
{
    static unsigned char bytes[1024];
    size_t n = build(bytes, -1, "{\"a\":" T_F32("[1]", 0, 4) ",\"b\":" T_F32("[1]", 4, 8) "}", 8);
    const char *path = in_dir("memory.safetensors"), *temporary = in_dir("memory.safetensors.tmp");
    llmpar_safetensor t = declare("x", LLMPAR_F32, 1, 1, 0);
    uint64_t fail;
    int mode;
    for (mode = 0; mode < 2; mode++)
        for (fail = 1; fail < 100; fail++) {
            llmpar_heap h;
            llmpar_safetensors *file = NULL;
            llmpar_safetensors_writer *writer = NULL;
            llmpar_status status;
            llmpar_heap_init(&h, NULL);
            h.fail_at = fail;
            ready();
            if (mode == 0) {
                status = llmpar_safetensors_open_memory(&h, bytes, n, "x", &file, &err);
                llmpar_safetensors_close(file);
            } else {
                status = llmpar_safetensors_writer_open(&h, NULL, path, &t, 1, &writer, &err);
                if (!status) status = llmpar_safetensors_writer_write(writer, "1234", 4, &err);
                if (writer) {
                    llmpar_status end = llmpar_safetensors_writer_commit(writer, &err);
                    if (!status) status = end;
                }
            }
            CHECK_INT(h.live, 0);
            if (!status) break;
            CHECK_STATUS(status, LLMPAR_ERR_MEMORY);
            CHECK_STATUS(err.status, LLMPAR_ERR_MEMORY);
            CHECK(!llmpar_is_file(temporary));
        }
    CHECK(fail > 3 && fail < 100);
    unlink(path);
}

/* ---- io/file.h ---- */

TEST(maps_files)
{
    llmpar_mapped mapped;
    const char *path = in_dir("mapped");
    put_file(path, "hello", 5);
    CHECK_OK(llmpar_file_map(path, &mapped, &err));
    CHECK(mapped.bytes == 5 && !memcmp(mapped.data, "hello", 5));
    llmpar_file_unmap(&mapped);
    CHECK(!mapped.data && !mapped.bytes);
    put_file(path, "", 0);
    CHECK_OK(llmpar_file_map(path, &mapped, &err));
    CHECK(mapped.data && mapped.bytes == 0);
    llmpar_file_unmap(&mapped);
    unlink(path);
    CHECK(mkfifo(path, 0600) == 0);
    ready();
    CHECK_STATUS(llmpar_file_map(path, &mapped, &err), LLMPAR_ERR_IO); /* and does not wait for a writer */
    CHECK_TEXT(err.text, "expected a regular file, got a pipe");
    unlink(path);
    llmpar_file_unmap(NULL);
}

static void check_content(const char *path, const unsigned char *want, size_t bytes)
{
    llmpar_mapped mapped;
    CHECK_OK(llmpar_file_map(path, &mapped, NULL));
    CHECK_INT(mapped.bytes, bytes);
    if (mapped.bytes == bytes) CHECK(!memcmp(mapped.data, want, bytes));
    llmpar_file_unmap(&mapped);
}

TEST(writes_atomically)
{
    enum { BYTES = 1 << 20 };
    const char *path = in_dir("atomic"), *temporary = in_dir("atomic.tmp");
    unsigned char *data = (unsigned char *)malloc(BYTES);
    llmpar_writer *writer;
    size_t i, portion;
    for (i = 0; i < BYTES; i++) data[i] = (unsigned char)(i * 7 + i / 256);
    put_file(path, "old", 3);
    put_file(temporary, "left over by a crash, and longer", 32);
    for (portion = 1000; portion <= BYTES; portion = portion * 17 + 3) { /* below, at and above the buffer */
        CHECK_OK(llmpar_writer_open(ready(), NULL, path, &writer, &err));
        for (i = 0; i < BYTES; i += portion) CHECK_OK(llmpar_writer_write(writer, data + i, portion < BYTES - i ? portion : BYTES - i, &err));
        if (portion == 1000) check_content(path, (const unsigned char *)"old", 3); /* until commit the old file stands */
        CHECK_OK(llmpar_writer_commit(writer, &err));
        CHECK(!llmpar_is_file(temporary));
        check_content(path, data, BYTES);
    }
    CHECK_OK(llmpar_writer_open(ready(), NULL, path, &writer, &err));
    CHECK_OK(llmpar_writer_write(writer, "x", 1, &err));
    llmpar_writer_abandon(writer);
    llmpar_writer_abandon(NULL);
    check_content(path, data, BYTES);
    CHECK(!llmpar_is_file(temporary));
    /* a directory under the final name is refused before anything is written */
    CHECK_STATUS(llmpar_writer_open(ready(), NULL, directory, &writer, &err), LLMPAR_ERR_IO);
    CHECK_TEXT(err.text, "it is a directory");
    CHECK(!writer);
    free(data);
    unlink(path);
    CHECK_INT(heap.live, 0);
}

TEST(full_disk)
{
    llmpar_writer *writer;
    static unsigned char zeros[600000];
    const char *path = in_dir("full"), *temporary = in_dir("full.tmp");
    if (symlink("/dev/full", temporary) != 0 || access("/dev/full", W_OK) != 0) { unlink(temporary); TEST_SKIP("no /dev/full"); }
    CHECK_OK(llmpar_writer_open(ready(), NULL, path, &writer, &err));
    CHECK_STATUS(llmpar_writer_write(writer, zeros, sizeof zeros, &err), LLMPAR_ERR_IO);
    CHECK_TEXT(err.text, "full.tmp: cannot write: No space left");
    ready();
    CHECK_STATUS(llmpar_writer_write(writer, "x", 1, &err), LLMPAR_ERR_IO);
    CHECK_TEXT(err.text, "an earlier write failed");
    CHECK_STATUS(llmpar_writer_commit(writer, &err), LLMPAR_ERR_IO);
    CHECK(!llmpar_is_file(path) && access(temporary, F_OK) != 0);
    CHECK_INT(heap.live, 0);
}

TEST(directories)
{
    const char *path = in_dir("made"), *file = in_dir("plain"), *deep = in_dir("no/such");
    CHECK_OK(llmpar_directory_ensure(NULL, path, &err));
    CHECK_OK(llmpar_directory_ensure(NULL, path, &err));
    CHECK(llmpar_is_directory(path) && !llmpar_is_file(path));
    CHECK_INT(rmdir(path), 0); /* and left nothing behind in it */
    put_file(file, "x", 1);
    ready();
    CHECK_STATUS(llmpar_directory_ensure(NULL, file, &err), LLMPAR_ERR_IO);
    CHECK_TEXT(err.text, "expected a directory, got a file");
    CHECK(llmpar_is_file(file) && !llmpar_is_directory(file));
    ready();
    CHECK_STATUS(llmpar_directory_ensure(NULL, deep, &err), LLMPAR_ERR_IO);
    CHECK_TEXT(err.text, "cannot create the directory");
    if (llmpar_is_directory("/proc/self")) { /* exists, and nobody can make a file there, root included */
        ready();
        CHECK_STATUS(llmpar_directory_ensure(NULL, "/proc/self", &err), LLMPAR_ERR_IO);
        CHECK_TEXT(err.text, "/proc/self: cannot write in the directory");
    }
    unlink(file);
}

TEST(reads_a_real_model)
{
    TEST_DATA(path, "stories260K/hf/model.safetensors");
    llmpar_safetensors *file;
    const llmpar_safetensor *t;
    size_t total = 0;
    int32_t i, finite = 1;
    if (llmpar_safetensors_open(ready(), NULL, path, &file, &err)) { TEST_FAIL("%s", err.text); return; }
    CHECK_INT(file->count, 5 * 9 + 2);
    t = llmpar_safetensors_find(file, "model.embed_tokens.weight");
    CHECK(t && t->dtype == LLMPAR_F32 && t->dims == 2 && t->shape[0] == 512 && t->shape[1] == 64);
    t = llmpar_safetensors_find(file, "model.layers.4.self_attn.k_proj.weight");
    CHECK(t && t->dims == 2 && t->shape[0] == 32 && t->shape[1] == 64 && t->bytes == 32 * 64 * 4);
    for (i = 0; i < file->count; i++) {
        size_t k;
        for (k = 0; k < file->tensor[i].bytes; k += 4) {
            float value;
            CHECK_OK(llmpar_safetensors_read(file, &file->tensor[i], k, 4, &value, &err));
            if (!llmpar_isfinite_f32(value) || value > 100 || value < -100) finite = 0;
        }
        total += file->tensor[i].bytes;
    }
    CHECK(finite);
    CHECK_INT(total, 260032 * 4);
    llmpar_safetensors_close(file);
    CHECK_INT(heap.live, 0);
}

/* Last: everything was removed by the test that made it. */
TEST(leaves_nothing)
{
    (void)in_dir("");
    CHECK_INT(rmdir(directory), 0);
}

TEST_LIST(T_(bad_files), T_(too_short_files), T_(damaged_files), T_(good_oddities), T_(round_trip), T_(reads_slices), T_(shrinking_file), T_(reads_that_fail), T_(writes_that_fail), T_(bounded_memory), T_(header_text), T_(writer_refuses), T_(out_of_memory), T_(maps_files),
          T_(writes_atomically), T_(full_disk), T_(directories), T_(reads_a_real_model), T_(leaves_nothing))
