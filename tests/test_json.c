#include "test.h"
#include "bits.h"
#include <dirent.h>
#include <float.h>
#include <math.h>
#include <time.h>

static llmpar_status parse_bytes(llmpar_heap *heap, const char *text, size_t length, const llmpar_json_desc *desc, llmpar_json **out, llmpar_error *error)
{
    char *exact = (char *)malloc(length ? length : 1); /* no byte behind the text: sanitizers see a read past it */
    memcpy(exact, text, length);
    llmpar_error_clear(error);
    llmpar_status status = llmpar_json_parse(heap, exact, length, desc, out, error);
    free(exact);
    CHECK((status == LLMPAR_OK) == (*out != NULL));
    CHECK_STATUS(error->status, status);
    return status;
}

static llmpar_json *parse(llmpar_heap *heap, const char *text)
{
    llmpar_json *root;
    llmpar_error error;
    if (parse_bytes(heap, text, strlen(text), NULL, &root, &error)) TEST_FAIL("%s: %s", text, error.text);
    return root;
}

static double number(const char *text)
{
    llmpar_heap heap;
    llmpar_heap_init(&heap, NULL);
    llmpar_json *root = parse(&heap, text);
    double value = root && root->type == LLMPAR_JSON_NUMBER ? root->number : (double)NAN;
    llmpar_json_destroy(&heap, root);
    CHECK_INT(heap.live, 0);
    return value;
}

/* ---- the corpus ---- */

TEST(json_corpus)
{
    TEST_DATA(path, "json/parsing");
    DIR *folder = opendir(path);
    int accepted = 0, refused = 0;
    if (!folder) { TEST_FAIL("cannot open %s", path); return; }
    for (struct dirent *entry; (entry = readdir(folder));) {
        char name[1400];
        static char text[1 << 20];
        llmpar_heap heap;
        llmpar_json *root;
        llmpar_error error;
        if (strlen(entry->d_name) < 5 || strcmp(entry->d_name + strlen(entry->d_name) - 5, ".json")) continue;
        snprintf(name, sizeof name, "%s/%s", path, entry->d_name);
        FILE *file = fopen(name, "rb");
        if (!file) { TEST_FAIL("cannot open %s", name); continue; }
        size_t length = fread(text, 1, sizeof text, file);
        fclose(file);
        llmpar_heap_init(&heap, NULL);
        llmpar_status status = parse_bytes(&heap, text, length, NULL, &root, &error);
        if (entry->d_name[0] == 'y') {
            accepted++;
            if (status) TEST_FAIL("%s: %s", entry->d_name, error.text);
        } else if (entry->d_name[0] == 'n') {
            refused++;
            if (status != LLMPAR_ERR_FORMAT) TEST_FAIL("%s was accepted", entry->d_name);
            CHECK_TEXT(error.text, "json: byte ");
        }
        CHECK(heap.peak <= (status ? 90 : 60) * (uint64_t)length + 128);
        llmpar_json_destroy(&heap, root);
        CHECK_INT(heap.live, 0);
    }
    closedir(folder);
    CHECK(accepted >= 90 && refused >= 180);
}

/* ---- what a document holds ---- */

TEST(json_tree)
{
    const char *text = " {\"a\" : [1,\t-2.5, true, null, \"x\"], \"\" : {}, \"b\\u0000c\": [] ,\r\"d\":{\"e\":{\"f\":false}} } ";
    llmpar_heap heap;
    llmpar_heap_init(&heap, NULL);
    llmpar_json *root = parse(&heap, text);
    if (!root) return;
    const llmpar_json *a = llmpar_json_get(root, "a"), *node;
    CHECK_INT(root->type, LLMPAR_JSON_OBJECT);
    CHECK_INT(root->length, 4);
    CHECK_INT(root->position, 1);
    CHECK(root->key == NULL && root->next == NULL);
    CHECK(a && a->type == LLMPAR_JSON_ARRAY && a->length == 5 && a->position == 8);
    node = a->child;
    CHECK(node->is_integer && node->integer == 1 && node->number == 1.0 && node->position == 9 && !node->key);
    node = node->next;
    CHECK(!node->is_integer && node->number == -2.5 && node->position == 12);
    node = node->next;
    CHECK(node->type == LLMPAR_JSON_BOOL && node->boolean == 1);
    node = node->next;
    CHECK(node->type == LLMPAR_JSON_NULL);
    node = node->next;
    CHECK(node->type == LLMPAR_JSON_STRING && node->length == 1 && !strcmp(node->string, "x") && node->next == NULL);
    node = llmpar_json_get(root, "");
    CHECK(node && node->type == LLMPAR_JSON_OBJECT && node->length == 0 && node->child == NULL && node->key_length == 0);
    CHECK(llmpar_json_get(root, "b") == NULL); /* "b\0c" is another name */
    CHECK(node->next->key_length == 3 && !memcmp(node->next->key, "b\0c", 4) && node->next->type == LLMPAR_JSON_ARRAY);
    node = llmpar_json_get(llmpar_json_get(llmpar_json_get(root, "d"), "e"), "f");
    CHECK(node && node->type == LLMPAR_JSON_BOOL && !node->boolean);
    CHECK(llmpar_json_get(root, "d")->next == NULL && llmpar_json_get(llmpar_json_get(root, "d"), "e")->next == NULL); /* last children that have children */
    CHECK(!llmpar_json_get(NULL, "a") && !llmpar_json_get(a, "a") && !llmpar_json_get(root, "z"));
    llmpar_json_destroy(&heap, root);
    llmpar_json_destroy(&heap, NULL);
    CHECK_INT(heap.live, 0);
}

TEST(json_strings)
{
    static const struct { const char *text, *value; size_t length; } good[] = {
        { "\"\"", "", 0 }, { "\"\\\"\\\\\\/\\b\\f\\n\\r\\t\"", "\"\\/\b\f\n\r\t", 8 }, { "\"\\u0041\\u00e9\\u20AC\"", "A\xC3\xA9\xE2\x82\xAC", 6 },
        { "\"\\uD83D\\ude00\"", "\xF0\x9F\x98\x80", 4 }, { "\"\\udbff\\udfff\"", "\xF4\x8F\xBF\xBF", 4 }, { "\"\\u0000\"", "\0", 1 },
        { "\"\xED\x9F\xBF\xEE\x80\x80\"", "\xED\x9F\xBF\xEE\x80\x80", 6 }, { "\"\x7F\"", "\x7F", 1 }, { "\"\\uFFFF\"", "\xEF\xBF\xBF", 3 },
    };
    static const struct { const char *text, *message; } bad[] = {
        { "\"\\ud800\"", "byte 7: expected the second half of a surrogate pair, got '\"'" }, { "\"\\udc00\"", "byte 1: expected no second half" },
        { "\"\\ud800\\u0041\"", "byte 7: expected the second half" }, { "\"\\ud800\\ue000\"", "byte 7: expected the second half" }, { "\"\\ud800\\n\"", "byte 7: expected the second half" }, { "\"\\ud800\\udcx0\"", "byte 11: expected four hexadecimal digits after \\u, got 'x'" }, { "\"\\ud800x\"", "byte 7: expected the second half of a surrogate pair, got 'x'" },
        { "\"\xC0\x80\"", "byte 1: expected UTF-8, got byte 0xC0" }, { "\"\xED\xA0\x80\"", "byte 1: expected UTF-8" }, { "\"\xF4\x90\x80\x80\"", "byte 1: expected UTF-8" },
        { "\"\xE0\x80\x80\"", "byte 1: expected UTF-8" }, { "\"\xE2\x82\"\"", "byte 1: expected UTF-8" }, { "\"\xF0\x80\x80\x80\"", "byte 1: expected UTF-8" }, { "\"a\xE2\x82", "byte 2: expected UTF-8" }, { "\"\x80\"", "byte 1: expected UTF-8" },
        { "\"\\x\"", "byte 2: expected one of" }, { "\"\\u12g4\"", "byte 5: expected four hexadecimal digits after \\u, got 'g'" }, { "\"a\nb\"", "byte 2: expected a character of a string or its closing '\"', got byte 0x0A" },
        { "\"abc", "byte 4: expected a character of a string or its closing '\"', got the end of the text" }, { "\"\\", "byte 2: expected one of" }, { "\"\\u", "byte 3: expected four" },
    };
    llmpar_heap heap;
    llmpar_error error;
    llmpar_json *root;
    llmpar_heap_init(&heap, NULL);
    for (size_t i = 0; i < sizeof good / sizeof good[0]; i++) {
        root = parse(&heap, good[i].text);
        if (!root) continue;
        CHECK_INT(root->length, good[i].length);
        CHECK_BYTES(root->string, good[i].value, good[i].length + 1);
        llmpar_json_destroy(&heap, root);
    }
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        CHECK_STATUS(parse_bytes(&heap, bad[i].text, strlen(bad[i].text), NULL, &root, &error), LLMPAR_ERR_FORMAT);
        CHECK_TEXT(error.text, bad[i].message);
    }
    CHECK_INT(heap.live, 0);
}

TEST(json_errors_name_the_byte)
{
    static const struct { const char *text, *message; } bad[] = {
        { "", "config: byte 0: expected a value, got the end of the text" }, { "  ", "config: byte 2: expected a value, got the end" }, { "{\"a\":1x}", "config: byte 6: expected ',' or '}', got 'x'" },
        { "[1,]", "byte 3: expected a value, got ']'" }, { "[1 2]", "byte 3: expected ',' or ']', got '2'" }, { "{,}", "byte 1: expected '\"' of a member's name, got ','" }, { "{\"a\" 1}", "byte 5: expected ':', got '1'" },
        { "{\"a\":1,}", "byte 7: expected '\"' of a member's name, got '}'" }, { "1 1", "byte 2: expected the end of the text, got '1'" }, { "[", "byte 1: expected a value, got the end" }, { "[1", "byte 2: expected ',' or ']', got the end" },
        { "tru", "byte 0: expected a value, got 't'" }, { "nulx", "byte 0: expected a value, got 'n'" }, { "01", "byte 1: expected the end of the text, got '1'" }, { "-", "byte 1: expected a digit, got the end" }, { "1.", "byte 2: expected a digit" }, { "1e", "byte 2: expected a digit" },
        { "1e+", "byte 3: expected a digit" }, { ".5", "byte 0: expected a value, got '.'" }, { "+1", "byte 0: expected a value, got '+'" }, { "NaN", "byte 0: expected a value" }, { "-Infinity", "byte 1: expected a digit, got 'I'" },
        { "\xEF\xBB\xBF{}", "byte 0: expected a value, got byte 0xEF" }, { "[1]]", "byte 3: expected the end of the text, got ']'" }, { "[1}", "byte 2: expected ',' or ']', got '}'" }, { " [1e999]", "byte 2: expected a number up to 1.8e308" },
        { "/**/1", "byte 0: expected a value, got '/'" }, { "1\f", "byte 1: expected the end of the text, got byte 0x0C" },
    };
    llmpar_json_desc desc = { 0, 0, "config" };
    llmpar_heap heap;
    llmpar_error error;
    llmpar_json *root;
    llmpar_heap_init(&heap, NULL);
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        CHECK_STATUS(parse_bytes(&heap, bad[i].text, strlen(bad[i].text), &desc, &root, &error), LLMPAR_ERR_FORMAT);
        CHECK_TEXT(error.text, bad[i].message);
        CHECK_STATUS(llmpar_json_parse(&heap, bad[i].text, strlen(bad[i].text), &desc, &root, NULL), LLMPAR_ERR_FORMAT);
    }
    CHECK_STATUS(parse_bytes(&heap, "1\0", 2, &desc, &root, &error), LLMPAR_ERR_FORMAT); /* a NUL is a byte like others */
    CHECK_TEXT(error.text, "byte 1: expected the end of the text, got byte 0x00");
    CHECK_INT(heap.live, 0);
}

TEST(json_depth)
{
    enum { N = 1000000 };
    char *text = (char *)malloc(2 * N);
    llmpar_heap heap;
    llmpar_error error;
    llmpar_json *root;
    llmpar_json_desc desc = { 0, 0, NULL };
    llmpar_heap_init(&heap, NULL);
    memset(text, '[', N);
    memset(text + N, ']', N);
    CHECK_OK(parse_bytes(&heap, text + N - 128, 256, NULL, &root, &error));
    llmpar_json_destroy(&heap, root);
    CHECK_STATUS(parse_bytes(&heap, text + N - 129, 258, NULL, &root, &error), LLMPAR_ERR_FORMAT);
    CHECK_TEXT(error.text, "json: byte 128: expected at most 128 nested arrays and objects");
    desc.max_depth = N; /* nothing recurses: any depth that memory holds */
    CHECK_OK(parse_bytes(&heap, text, 2 * N, &desc, &root, &error));
    int depth = 0;
    for (const llmpar_json *node = root; node; node = node->child) depth++;
    CHECK_INT(depth, N);
    llmpar_json_destroy(&heap, root);
    desc.max_depth = 1;
    CHECK_OK(parse_bytes(&heap, "{\"a\":1}", 7, &desc, &root, &error));
    llmpar_json_destroy(&heap, root);
    CHECK_STATUS(parse_bytes(&heap, "{\"a\":{}}", 8, &desc, &root, &error), LLMPAR_ERR_FORMAT);
    CHECK_INT(heap.live, 0);
    free(text);
}

TEST(json_unique_keys)
{
    llmpar_json_desc desc = { 0, 1, "index" };
    llmpar_heap heap;
    llmpar_error error;
    llmpar_json *root;
    llmpar_heap_init(&heap, NULL);
    const char *twice = "{\"a\":1, \"b\":{\"a\":2}, \"\\u0061\" : 3, \"b\":4}", *fine = "[{\"a\":1,\"aa\":1,\"a\\u0000\":1,\"\":1},{\"a\":2}]";
    CHECK_STATUS(parse_bytes(&heap, twice, strlen(twice), &desc, &root, &error), LLMPAR_ERR_FORMAT);
    CHECK_TEXT(error.text, "index: byte 21: expected every member name once, got \"a\" again");
    CHECK_OK(parse_bytes(&heap, fine, strlen(fine), &desc, &root, &error));
    llmpar_json_destroy(&heap, root);
    /* of several the first in the text; names are cut at whole characters; an empty one */
    static const struct { const char *text, *message; } several[] = {
        { "{\"bb\":1,\"bb\":2,\"a\":3,\"a\":4}", "byte 8: expected every member name once, got \"bb\" again" }, { "{\"a\":1,\"a\":2,\"bb\":3,\"bb\":4}", "byte 7: expected every member name once, got \"a\" again" },
        { "{\"\":1,\"\":2}", "byte 6: expected every member name once, got \"\" again" },
    };
    for (size_t i = 0; i < sizeof several / sizeof several[0]; i++) {
        CHECK_STATUS(parse_bytes(&heap, several[i].text, strlen(several[i].text), &desc, &root, &error), LLMPAR_ERR_FORMAT);
        CHECK_TEXT(error.text, several[i].message);
    }
    for (int before = 76; before < 82; before++) {
        char name[100] = "", both[300], want[200];
        memset(name, 'n', (size_t)before);
        snprintf(both, sizeof both, "{\"%s\xE2\x82\xACn\":1,\"%s\xE2\x82\xACn\":2}", name, name);
        snprintf(want, sizeof want, "got \"%.*s%s\" again", before < 80 ? before : 80, name, before <= 76 ? "\xE2\x82\xACn" : before == 77 ? "\xE2\x82\xAC" : "");
        CHECK_STATUS(parse_bytes(&heap, both, strlen(both), &desc, &root, &error), LLMPAR_ERR_FORMAT);
        CHECK_TEXT(error.text, want);
    }
    root = parse(&heap, twice); /* allowed unless asked for */
    CHECK(root && llmpar_json_get(root, "a")->integer == 1);
    llmpar_json_destroy(&heap, root);
    /* many members with a common beginning: no quadratic time; one name twice is found wherever it stands */
    enum { N = 100000 };
    char *text = (char *)malloc(N * 40);
    for (int same = -1; same < N; same += same < 0 ? 12347 : 33331) {
        size_t length = 0;
        for (int i = 0; i < N; i++) length += (size_t)sprintf(text + length, "%c\"model.layers.%d.weight\":%d", i ? ',' : '{', i == N - 1 && same >= 0 ? same : i, i);
        text[length++] = '}';
        llmpar_status status = llmpar_json_parse(&heap, text, length, &desc, &root, NULL);
        CHECK_STATUS(status, same >= 0 && same != N - 1 ? LLMPAR_ERR_FORMAT : LLMPAR_OK);
        if (root) CHECK(heap.peak <= 60 * (uint64_t)length);
        llmpar_json_destroy(&heap, root);
    }
    free(text);
    CHECK_INT(heap.live, 0);
}

/* ---- numbers ---- */

TEST(json_integers)
{
    static const struct { const char *text; int is_integer; int64_t integer; } cases[] = {
        { "0", 1, 0 }, { "-0", 1, 0 }, { "9223372036854775807", 1, INT64_MAX }, { "-9223372036854775808", 1, INT64_MIN }, { "-9223372036854775807", 1, -INT64_MAX },
        { "9223372036854775808", 0, 0 }, { "-9223372036854775809", 0, 0 }, { "18446744073709551616", 0, 0 }, { "1.0", 0, 0 }, { "1e3", 0, 0 }, { "1E3", 0, 0 }, { "9007199254740993", 1, 9007199254740993 },
        { "100000000000000000000000000000000000000", 0, 0 },
    };
    llmpar_heap heap;
    llmpar_heap_init(&heap, NULL);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        llmpar_json *root = parse(&heap, cases[i].text);
        if (!root) continue;
        if (root->is_integer != cases[i].is_integer || root->integer != cases[i].integer) TEST_FAIL("%s: %d %lld", cases[i].text, root->is_integer, (long long)root->integer);
        CHECK(root->number == strtod(cases[i].text, NULL));
        llmpar_json_destroy(&heap, root);
    }
    CHECK(signbit(number("-0")) && signbit(number("-0.0")) && !signbit(number("0")));
}

static void check_number(const char *text)
{
    double got = number(text), want = strtod(text, NULL); /* the tests run in the C locale; glibc and musl round correctly */
    if (memcmp(&got, &want, sizeof got)) TEST_FAIL("%s: got %a, want %a", text, got, want);
}

TEST(json_numbers_round_correctly)
{
    static const char *const hard[] = {
        "2.2250738585072011e-308", "2.2250738585072012e-308", "2.2250738585072014e-308", "4.9406564584124654e-324", "2.4703282292062327e-324", "2.4703282292062328e-324", "2.47032822920623272e-324", "1e-323",
        "1.7976931348623157e308", "1.7976931348623158e308", "1.79769313486231580793e308", "9007199254740993", "9007199254740992.99999999999999999999999999999999999999", "9007199254740993.00000000000000000000000000000001", "0.1", "1e22", "1e23", "8.41e21",
        "7.3879e20", "5e-324", "6929495644600919.5", "3.2378839133029012895883524125015321748630094790e-319", "0.000000000000000000000000000000000000000000000000000000000000000000001e70", "1e-400", "0e999999999999999999999999", "0.0e-99999999999999999999",
        "123456789012345678901234567890e-25", "1e-99999999999999999999999999", "100000000000000000000000000000000000000e-38",
    };
    char text[2600];
    for (size_t i = 0; i < sizeof hard / sizeof hard[0]; i++) check_number(hard[i]);
    for (int i = 0; i < 60000; i++) {
        uint64_t bits = random_bits() & 0x7FFFFFFFFFFFFFFFu;
        double value;
        if (i % 8 == 0) bits >>= 11 + random_bits() % 52; /* subnormal */
        memcpy(&value, &bits, 8);
        if (!isfinite(value)) continue;
        snprintf(text, sizeof text, "%.*e", i % 4 == 0 ? 16 : (int)(random_bits() % 25), value);
        if (strtod(text, NULL) <= DBL_MAX) check_number(text);
    }
    for (int i = 0; i < 300; i++) { /* the exact midpoint of two doubles, then a hair above and below it */
        uint64_t bits = i % 3 ? random_bits() % 0x7FE0000000000000u : random_bits() >> 13;
        long double middle;
        double a, b;
        memcpy(&a, &bits, 8);
        b = nextafter(a, INFINITY);
        middle = ((long double)a + (long double)b) / 2;
        if (a < 1e-280 && LDBL_MANT_DIG < 64) continue;
        int length = snprintf(text, 1200, "%.1100Le", middle);
        char *exponent = strchr(text, 'e');
        CHECK(length > 0 && exponent);
        check_number(text);
        exponent[-1] = '1';
        check_number(text);
        if (i % 2) { /* far behind the 800 digits that are kept */
            char tail[32];
            strcpy(tail, exponent);
            exponent[-1] = '0';
            memset(exponent, '0', 1000);
            exponent[1000] = '7';
            strcpy(exponent + 1001, tail);
            check_number(text);
        }
    }
    /* zeros in front and behind against the exponent */
    memset(text, '0', sizeof text);
    memcpy(text, "0.", 2);
    strcpy(text + 2002, "15e2001");
    CHECK(number(text) == 1.5);
    memset(text, '0', sizeof text);
    text[0] = '2';
    strcpy(text + 2000, "e-2000");
    CHECK(number(text) == 0.2);
}

/* ---- memory ---- */

TEST(json_allocation_failures)
{
    const char *text = "{\"a\":[1,2,{\"x\":\"y\",\"z\":2}],\"b\":\"c\"}";
    llmpar_json_desc desc = { 0, 1, NULL };
    int failures = 0;
    for (uint64_t n = 1;; n++) {
        llmpar_heap heap;
        llmpar_json *root;
        llmpar_error error;
        llmpar_heap_init(&heap, NULL);
        heap.fail_at = n;
        llmpar_status status = parse_bytes(&heap, text, strlen(text), &desc, &root, &error);
        llmpar_json_destroy(&heap, root);
        CHECK_INT(heap.live, 0);
        if (status == LLMPAR_OK) break;
        CHECK_STATUS(status, LLMPAR_ERR_MEMORY);
        CHECK_TEXT(error.text, "json: no memory");
        failures++;
    }
    CHECK(failures >= 2);
}

TEST(json_speed_and_memory)
{
    enum { N = 200000 };
    char *text = (char *)malloc(N * 30);
    size_t length = 0;
    for (int i = 0; i < N; i++) length += (size_t)sprintf(text + length, "%c%d.%d,\"s\\n%d\"", i ? ',' : '[', i, i % 97, i);
    text[length++] = ']';
    llmpar_heap heap;
    llmpar_json *root;
    llmpar_heap_init(&heap, NULL);
    clock_t start = clock();
    CHECK_OK(llmpar_json_parse(&heap, text, length, NULL, &root, NULL));
    double seconds = (double)(clock() - start) / CLOCKS_PER_SEC;
    if (getenv("TEST_JSON_PRINT")) printf("%.1f MB in %.3f s, %.1f bytes of memory a byte\n", (double)length / 1e6, seconds, (double)heap.peak / (double)length);
    CHECK(root && root->length == 2 * N);
    llmpar_json_destroy(&heap, root);
    CHECK_INT(heap.live, 0);
    free(text);
}

/* ---- writing ---- */

TEST(json_escape_texts)
{
    static const struct { const char *text; size_t length; const char *want; } cases[] = {
        { "", 0, "\"\"" }, { "abc", 3, "\"abc\"" }, { "\"\\/\b\f\n\r\t\x01\x1F\x7F", 11, "\"\\\"\\\\/\\b\\f\\n\\r\\t\\u0001\\u001f\x7F\"" }, { "a\0b", 3, "\"a\\u0000b\"" },
        { "\xC3\xA9\xF0\x9F\x98\x80", 6, "\"\xC3\xA9\xF0\x9F\x98\x80\"" }, { "\xFFx\xE2\x82", 4, "\"\xEF\xBF\xBDx\xEF\xBF\xBD\xEF\xBF\xBD\"" }, { "\xED\xA0\x80", 3, "\"\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD\"" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        size_t needed = strlen(cases[i].want);
        for (size_t capacity = 0; capacity < needed + 3; capacity++) {
            char out[128];
            memset(out, '#', sizeof out);
            CHECK_INT(llmpar_json_escape(cases[i].text, cases[i].length, out, capacity), needed);
            for (size_t k = capacity; k < sizeof out; k++) CHECK_INT(out[k], '#');
            if (capacity) {
                size_t kept = needed < capacity ? needed : capacity - 1;
                CHECK(!memcmp(out, cases[i].want, kept) && out[kept] == 0);
            }
        }
    }
}

TEST(json_escape_round_trip)
{
    llmpar_heap heap;
    llmpar_heap_init(&heap, NULL);
    for (int i = 0; i < 3000; i++) {
        char text[64], out[64 * 6 + 3];
        size_t length = (size_t)(random_bits() % 64), k;
        for (k = 0; k < length; k++) text[k] = (char)(random_bits() & 0x7F);
        size_t needed = llmpar_json_escape(text, length, out, sizeof out);
        CHECK(needed < sizeof out);
        llmpar_json *root = parse(&heap, out);
        if (!root) continue;
        CHECK(root->type == LLMPAR_JSON_STRING && root->length == length && !memcmp(root->string, text, length));
        llmpar_json_destroy(&heap, root);
    }
    CHECK_INT(heap.live, 0);
}

TEST_LIST(T_(json_corpus), T_(json_tree), T_(json_strings), T_(json_errors_name_the_byte), T_(json_depth), T_(json_unique_keys), T_(json_integers),
          T_(json_numbers_round_correctly), T_(json_allocation_failures), T_(json_speed_and_memory), T_(json_escape_texts), T_(json_escape_round_trip))
