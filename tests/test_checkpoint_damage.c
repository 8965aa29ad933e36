/* Checkpoints that are damaged: every statement of a manifest made false, with its checksum put right; files that are not what the manifest says. Each is refused by name on every rank. */
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE 1
#endif
#include "test.h"
#include "checkpoints.h"

static char step[900];          /* the checkpoint's directory */
static char *manifest;          /* as it was written, without its checksum */
static size_t manifest_bytes;

static const char *in_step(const char *name)
{
    static char path[4][1000];
    static int next;
    next = (next + 1) % 4;
    snprintf(path[next], sizeof path[next], "%s/%s", step, name);
    return path[next];
}

/* text, and the checksum of what stands before it. */
static void put_manifest(const char *text, size_t bytes)
{
    llmpar_xxh64 sum;
    char *whole = (char *)malloc(bytes + 40);
    llmpar_xxh64_begin(&sum);
    llmpar_xxh64_add(&sum, text, bytes);
    memcpy(whole, text, bytes);
    bytes += (size_t)sprintf(whole + bytes, ",\n\"xxh64\":\"%016llx\"}\n", (unsigned long long)llmpar_xxh64_end(&sum));
    cp_write(in_step("manifest.json"), whole, bytes);
    free(whole);
}

static int saved(void)
{
    if (manifest) return 1;
    cp_run run = cp_make(1, 2, 1, 3);
    run.steps = 2;
    run.save = 1;
    run.policy.dtype = LLMPAR_F16;
    run.policy.checkpoint = cp_path("damage");
    CP_GOES(&run);
    snprintf(step, sizeof step, "%s/step-2", run.policy.checkpoint);
    manifest = cp_read(in_step("manifest.json"), &manifest_bytes);
    if (!manifest) return 0;
    manifest_bytes -= 30;
    return !run.status;
}

static cp_run resumed(int ranks)
{
    cp_run run = cp_make(1, ranks, 1, 3);
    run.steps = 2;
    run.policy.dtype = LLMPAR_F16;
    run.policy.resume = step;
    cp_go(&run);
    return run;
}

static void refused(const char *what, llmpar_status status, const char *text)
{
    cp_run run = resumed(1);
    if (run.status != status || !strstr(run.error.text, text)) TEST_FAIL("%s: got %s \"%s\", want %s \"%s\"", what, llmpar_status_string(run.status), run.error.text, llmpar_status_string(status), text);
}

#define EMBED "{\"name\":\"model.embed_tokens.weight\",\"arrays\":[\"param\",\"state0\",\"state1\"],\"shape\":[67,24],\"parts\":[\n {\"file\":0,\"offset\":[0,0],\"shape\":[67,24],\"begin\":0,\"count\":896},\n {\"file\":1,\"offset\":[0,0],\"shape\":[67,24],\"begin\":896,\"count\":712}]}"
#define NORM "{\"name\":\"model.layers.0.input_layernorm.weight\",\"arrays\":[\"param\",\"state0\",\"state1\"],\"shape\":[24],\"parts\":[\n {\"file\":0,\"offset\":[0],\"shape\":[24],\"begin\":0,\"count\":24}]}"
/* The first place of `find` becomes `replace`; status 0: LLMPAR_ERR_FORMAT. */
static const struct { const char *find, *replace, *text; llmpar_status status; } lies[] = {
    /* what it is */
    { "{\"format\"", "[\"format\"", "manifest.json: byte 9: expected ',' or ']'", LLMPAR_OK },
    { "\"format\":\"llmpar checkpoint\",", "", "expected \"format\":\"llmpar checkpoint\"", LLMPAR_OK },
    { "\"llmpar checkpoint\"", "\"checkpoint\"", "expected \"format\":\"llmpar checkpoint\"", LLMPAR_OK },
    { "\"llmpar checkpoint\"", "7", "expected \"format\":\"llmpar checkpoint\"", LLMPAR_OK },
    { "\"version\":1", "\"version\":2", "version 2, contract 1, expected 1 and 1", LLMPAR_ERR_UNSUPPORTED },
    { "\"contract\":1", "\"contract\":3", "version 1, contract 3, expected 1 and 1", LLMPAR_ERR_UNSUPPORTED },
    { "\"version\":1", "\"version\":1.0", "version: expected a whole number 1 ..", LLMPAR_OK },
    { "\"version\":1,", "", "version: expected a whole number", LLMPAR_OK },
    { "\"step\":2,", "\"step\":2,\"stone\":2,", "manifest: unknown member stone", LLMPAR_OK },
    { "\"step\":2,", "\"step\":2,\"\":2,", "manifest: unknown member", LLMPAR_OK },
    { "\"step\":2,", "\"step\":2,\"step\\u0000\":2,", "manifest: unknown member step", LLMPAR_OK },
    { "\"step\":2,", "\"step\":2,\"st\":2,", "manifest: unknown member st", LLMPAR_OK },
    { "\"step\":2,", "\"step\":2,\"ep\":2,", "manifest: unknown member ep", LLMPAR_OK },
    { "\"step\":2,", "", "manifest: step is missing", LLMPAR_OK },
    /* its numbers */
    { "\"step\":2,", "\"step\":-2,", "step: expected a whole number 0 ..", LLMPAR_OK },
    { "\"step\":2,", "\"step\":3,", "it is of step 3, not of the step in its directory's name", LLMPAR_OK },
    { "\"updates\":2", "\"updates\":3", "updates: expected a whole number 0 .. 2", LLMPAR_OK },
    { "\"updates\":2", "\"updates\":\"2\"", "updates: expected a whole number", LLMPAR_OK },
    { "\"batch\":8", "\"batch\":9223372036854775808", "batch: expected a whole number", LLMPAR_OK },
    { "\"batch\":8", "\"batch\":16", "batch", LLMPAR_ERR_CONFIG },
    { "\"seq_len\":6", "\"seq_len\":7", "seq_len", LLMPAR_ERR_CONFIG },
    { "\"seed\":\"11\"", "\"seed\":\"12\"", "seed", LLMPAR_ERR_CONFIG },
    { "\"seed\":\"11\"", "\"seed\":11", "seed: expected a text of 1 .. 20 bytes", LLMPAR_OK },
    { "\"seed\":\"11\"", "\"seed\":\"\"", "seed: expected a text", LLMPAR_OK },
    { "\"seed\":\"11\"", "\"seed\":\"1a\"", "seed: expected the digits of a number below 2^64", LLMPAR_OK },
    { "\"seed\":\"11\"", "\"seed\":\"18446744073709551616\"", "seed: expected the digits of a number below 2^64", LLMPAR_OK },
    { "\"seed\":\"11\"", "\"seed\":\"1\\u00001\"", "seed: expected a text", LLMPAR_OK },
    { "\"seed\":\"11\"", "\"seed\":\"000000000000000000011\"", "seed: expected a text of 1 .. 20 bytes", LLMPAR_OK },
    { "\"canon\":8", "\"canon\":65", "canon: expected a whole number 0 .. 64", LLMPAR_OK },
    { "\"zero\":3", "\"zero\":4", "zero: expected a whole number 0 .. 3", LLMPAR_OK },
    { "\"scale\":65536", "\"scale\":0", "scale: expected a positive number", LLMPAR_OK },
    { "\"scale\":65536", "\"scale\":null", "scale: expected a positive number", LLMPAR_OK },
    { "\"scale\":65536", "\"scale\":65537", "loss scale: scale = 65537", LLMPAR_OK },
    { "\"scale\":65536,", "", "loss_scale: scale is missing", LLMPAR_OK },
    { "\"interval\":2000", "\"interval\":0", "interval: expected a whole number 1 ..", LLMPAR_OK },
    { "\"finite_steps\":2}", "\"finite_steps\":2,\"a\":1}", "loss_scale: unknown member a", LLMPAR_OK },
    { "\"loss_scale\":{", "\"loss_scale\":[],\"more\":{", "manifest: unknown member more", LLMPAR_OK },
    { "{\"scale\":65536,\"least\":6.103515625e-05,\"most\":16777216,\"interval\":2000,\"finite_steps\":2}", "[]", "loss_scale: expected an object", LLMPAR_OK },
    { "\"dtype\":\"f16\"", "\"dtype\":\"f17\"", "dtype: expected f32, f64, bf16 or f16", LLMPAR_OK },
    { "\"dtype\":\"f16\"", "\"dtype\":\"f64\"", "stored: f32, expected f64", LLMPAR_OK },
    { "\"dtype\":\"f16\",\"stored\":\"f32\"", "\"dtype\":\"f64\",\"stored\":\"f64\"", "numbers of type f64, this run has f32", LLMPAR_ERR_CONFIG },
    { "\"adamw\"", "\"sgd\"", "optimizer sgd, this run has adamw", LLMPAR_ERR_CONFIG },
    { "\"adamw\"", "\"an optimizer of that name\"", "optimizer: expected a text of 1 .. 15 bytes", LLMPAR_OK },
    { "\"mesh\":{", "\"mesh\":{\"qp\":1,", "mesh: unknown member qp", LLMPAR_OK },
    { "\"tp\":1", "\"tp\":0", "tp: expected a whole number 1 ..", LLMPAR_OK },
    { "\"mesh\":{\"dp_replicate\":1,\"dp_shard\":2,\"cp\":1,\"pp\":1,\"tp\":1}", "\"mesh\":7", "mesh: expected an object", LLMPAR_OK },
    /* its files */
    { "\"files\":[", "\"files\":{\"a\":[", "expected", LLMPAR_OK },
    { "{\"name\":\"rank-00000", "7,{\"name\":\"rank-00000", "file: expected an object", LLMPAR_OK },
    { "\"rank-00000.safetensors\"", "\"../step-2/rank-00000.safetensors\"", "file name ../step-2/rank-00000.safetensors", LLMPAR_OK },
    { "\"rank-00000.safetensors\"", "\".safetensors\"", "file name .safetensors", LLMPAR_OK },
    { "\"rank-00000.safetensors\"", "\"manifest.json\"", "file name manifest.json", LLMPAR_OK },
    { "\"rank-00000.safetensors\"", "\"rank-00001.safetensors\"", "file rank-00001.safetensors stands twice", LLMPAR_OK },
    { "\"rank-00000.safetensors\"", "\"rank-00007.safetensors\"", "rank-0000", LLMPAR_OK }, /* a file that is not there, or one that is not named: whichever is seen first */
    { "\"config.json\"", "\"other.json\"", "config.json: a file that the manifest does not name", LLMPAR_OK },
    { "\"bytes\":", "\"bytes\":0,\"b\":", "file: unknown member b", LLMPAR_OK },
    { "\"bytes\":", "\"bytes\":1", " bytes, the manifest says 1", LLMPAR_OK },
    { "\"xxh64\":\"", "\"xxh64\":\"g", "xxh64: expected", LLMPAR_OK },
    { "\"xxh64\":\"", "\"xxh64\":\"0123456789abcdef\"},\n{\"name\":\"x.safetensors\",\"bytes\":1,\"xxh64\":\"", "damaged: checksum", LLMPAR_OK },
    { ",\"xxh64\":\"", ",\"xxh64\":\"ABCDEFABCDEFABCD\"},\n{\"name\":\"x.safetensors\",\"bytes\":1,\"xxh64\":\"", "xxh64: expected 16 digits", LLMPAR_OK },
    { ",\"xxh64\":\"", ",\"xxh64\":\"zzzzzzzzzzzzzzzz\"},\n{\"name\":\"x.safetensors\",\"bytes\":1,\"xxh64\":\"", "xxh64: expected 16 digits", LLMPAR_OK },
    { ",\"xxh64\":\"", ",\"xxh64\":\"................\"},\n{\"name\":\"x.safetensors\",\"bytes\":1,\"xxh64\":\"", "xxh64: expected 16 digits", LLMPAR_OK },
    { ",\"xxh64\":\"", ",\"xxh64\":\"0\"},\n{\"name\":\"x.safetensors\",\"bytes\":1,\"xxh64\":\"", "xxh64: expected 16 digits", LLMPAR_OK },
    { "\"rank-00001.safetensors\"", "\"rank-00001.safetensorz\"", "a part in rank-00001.safetensorz, expected a .safetensors file", LLMPAR_OK },
    { "\"files\":[", "\"files\":7,\"f\":[", "manifest: unknown member f", LLMPAR_OK },
    /* its tensors */
    { "\"tensors\":[", "\"tensors\":7,\"t\":[", "manifest: unknown member t", LLMPAR_OK },
    { EMBED, "7", "tensor: expected an object", LLMPAR_OK },
    { EMBED, NORM, "model.embed_tokens.weight is missing", LLMPAR_ERR_SHAPE },
    { EMBED, EMBED ",\n" EMBED, "param/model.embed_tokens.weight is not part of this run, or stands twice", LLMPAR_ERR_SHAPE },
    { "\"name\":\"model.embed_tokens.weight\"", "\"name\":\"\"", "name: expected a text of 1 ..", LLMPAR_OK },
    { "\"name\":\"model.embed_tokens.weight\"", "\"title\":\"model.embed_tokens.weight\"", "tensor: name is missing", LLMPAR_OK },
    { "\"state1\"]", "\"state2\"]", "unknown array state2", LLMPAR_OK },
    { "\"state1\"]", "\"state0\"]", "array state0 stands twice", LLMPAR_OK },
    { "\"state0\",", "\"state2\",", "unknown array state2", LLMPAR_OK },
    { "\"state1\"]", "7]", "array: expected a text", LLMPAR_OK },
    { ",\"state1\"]", "]", "state1/model.embed_tokens.weight is missing", LLMPAR_ERR_SHAPE },
    { "[\"param\",\"state0\",\"state1\"]", "7", "arrays: expected an array", LLMPAR_OK },
    { "\"shape\":[67,24],\"parts\"", "\"shape\":7,\"parts\"", "shape: expected an array", LLMPAR_OK },
    { "\"shape\":[67,24],\"parts\"", "\"shape\":[67,24,1,1,1,1,1,1,1],\"parts\"", "9 dims, expected at most", LLMPAR_OK },
    { "\"shape\":[67,24],\"parts\"", "\"shape\":[67,-24],\"parts\"", "shape: expected a whole number 0 ..", LLMPAR_OK },
    { "\"shape\":[67,24],\"parts\"", "\"shape\":[1125899906842624,2],\"parts\"", "more than 2^50 elements", LLMPAR_OK },
    { "\"shape\":[67,24],\"parts\"", "\"shape\":[1125899906842624,1125899906842624],\"parts\"", "more than 2^50 elements", LLMPAR_OK },
    { "\"shape\":[67,24],\"parts\"", "\"shape\":[68,24],\"parts\"", "its parts have 1608 elements, expected 1632", LLMPAR_OK },
    { "\"shape\":[67,24],\"parts\"", "\"shape\":[66,24],\"parts\"", "the part is larger than the tensor in dim 0", LLMPAR_OK },
    { "\"parts\":[", "\"parts\":7,\"p\":[", "tensor: unknown member p", LLMPAR_OK },
    { "\"parts\":[\n {\"file\":0", "\"parts\":[\n 7,{\"file\":0", "model.embed_tokens.weight: expected an object", LLMPAR_OK },
    { "\"file\":0,", "\"file\":0,\"file\\u0000\":0,", "model.embed_tokens.weight: unknown member file", LLMPAR_OK },
    { "\"file\":0,", "\"file\":3,", "file: expected a whole number 0 .. 2", LLMPAR_OK },
    { "\"file\":1,", "\"file\":2,", "a part in config.json, expected a .safetensors file", LLMPAR_OK },
    { "\"file\":1,", "\"file\":0,", "parts in files 0 and 0, expected one a file, in their order", LLMPAR_OK },
    { "\"offset\":[0,0]", "\"offset\":[0]", "offset: 1 extents, expected 2", LLMPAR_OK },
    { "\"offset\":[0,0]", "\"offset\":7", "offset: expected an array", LLMPAR_OK },
    { "\"offset\":[0,0]", "\"offset\":[1,0]", "the part is larger than the tensor in dim 0", LLMPAR_OK },
    { "\"begin\":0,", "\"begin\":1609,", "begin: expected a whole number 0 .. 1608", LLMPAR_OK },
    { "\"count\":896", "\"count\":1609", "count: expected a whole number 1 .. 1608", LLMPAR_OK },
    { "\"count\":896", "\"count\":0", "count: expected a whole number 1 ..", LLMPAR_OK },
    { "\"count\":896", "\"count\":895", "its parts have 1607 elements, expected 1608", LLMPAR_OK },
    { "\"count\":896", "\"count\":897", "the parts in rank-00000.safetensors and rank-00001.safetensors overlap", LLMPAR_OK },
    { "\"count\":896},\n {\"file\":1,\"offset\":[0,0],\"shape\":[67,24],\"begin\":896,\"count\":712", "\"count\":896},\n {\"file\":1,\"offset\":[30,0],\"shape\":[37,24],\"begin\":175,\"count\":712", "the parts in rank-00000.safetensors and rank-00001.safetensors overlap", LLMPAR_OK },
    { "\"count\":896},\n {\"file\":1,\"offset\":[0,0],\"shape\":[67,24],\"begin\":896,\"count\":712", "\"count\":895},\n {\"file\":1,\"offset\":[0,0],\"shape\":[67,24],\"begin\":895,\"count\":713", "expected it as f32[895]", LLMPAR_OK },
    { "\"begin\":0,\"count\":896},\n {\"file\":1,\"offset\":[0,0],\"shape\":[67,24],\"begin\":896,\"count\":712", "\"begin\":708,\"count\":900},\n {\"file\":1,\"offset\":[0,0],\"shape\":[67,24],\"begin\":0,\"count\":708", "expected it as f32[900]", LLMPAR_OK },
    { "\"count\":896},\n {\"file\":1,\"offset\":[0,0],\"shape\":[67,24],\"begin\":896,\"count\":712", "\"count\":896},\n {\"file\":1,\"offset\":[0,0],\"shape\":[60,24],\"begin\":896,\"count\":544", "its parts have 1440 elements, expected 1608", LLMPAR_OK },
    { NORM ",\n", "", "model.layers.0.input_layernorm.weight is missing", LLMPAR_ERR_SHAPE },
    { "input_layernorm", "another_layernorm", "model.layers.0.input_layernorm.weight is missing", LLMPAR_ERR_SHAPE },
    { "\"shape\":[24],\"parts\":[\n {\"file\":0,\"offset\":[0],\"shape\":[24]", "\"shape\":[24,1],\"parts\":[\n {\"file\":0,\"offset\":[0,0],\"shape\":[24,1]", "param/model.layers.0.input_layernorm.weight: 24 in dim 0 of 2, expected 24 in dim 0 of 1", LLMPAR_ERR_SHAPE },
    { "\"shape\":[32,24],\"parts\":[\n {\"file\":0,\"offset\":[0,0],\"shape\":[32,24]", "\"shape\":[24,32],\"parts\":[\n {\"file\":0,\"offset\":[0,0],\"shape\":[24,32]", ": 24 in dim 0 of 2, expected 32 in dim 0 of 2", LLMPAR_ERR_SHAPE },
};

TEST(a_manifest_that_lies)
{
    if (!saved()) return;
    for (size_t i = 0; i < sizeof lies / sizeof lies[0]; i++) {
        const char *at = strstr(manifest, lies[i].find);
        if (!at) { TEST_FAIL("%s is not in the manifest", lies[i].find); continue; }
        size_t before = (size_t)(at - manifest), replaced = strlen(lies[i].replace), rest = manifest_bytes - before - strlen(lies[i].find);
        char *text = (char *)malloc(before + replaced + rest + 1);
        memcpy(text, manifest, before);
        memcpy(text + before, lies[i].replace, replaced);
        memcpy(text + before + replaced, at + strlen(lies[i].find), rest);
        put_manifest(text, before + replaced + rest);
        refused(lies[i].replace[0] ? lies[i].replace : lies[i].find, lies[i].status ? lies[i].status : LLMPAR_ERR_FORMAT, lies[i].text);
        free(text);
    }
    put_manifest(manifest, manifest_bytes);
    for (int ranks = 1; ranks <= 4; ranks += 3) {
        cp_run run = resumed(ranks);
        if (run.status) TEST_FAIL("whole, on %d ranks: %s", ranks, run.error.text);
        CHECK_INT(run.resumed, 2);
    }
}

TEST(a_manifest_with_other_bytes)
{
    size_t bytes;
    if (!saved()) return;
    put_manifest(manifest, manifest_bytes);
    char *whole = cp_read(in_step("manifest.json"), &bytes);
    for (size_t cut = 0; cut < bytes; cut += cut < 40 || cut + 40 > bytes ? 13 : 977) {
        cp_write(in_step("manifest.json"), whole, cut);
        refused("cut", LLMPAR_ERR_FORMAT, cut < 30 ? "bytes are no manifest" : "damaged: it does not end in its checksum");
    }
    for (size_t at = 0; at < bytes; at += 1 + bytes / 12) {
        whole[at] ^= 1;
        cp_write(in_step("manifest.json"), whole, bytes);
        refused("a bit", LLMPAR_ERR_FORMAT, "damaged: it does not end in its checksum");
        whole[at] ^= 1;
    }
    unlink(in_step("manifest.json"));
    refused("none", LLMPAR_ERR_IO, "manifest.json");
    cp_write(in_step("manifest.json"), whole, bytes);
    free(whole);
}

/* The manifest's statement about a file follows what the file has become, so that it is the file itself that is looked at. */
static void restate(const char *name, const void *data, size_t bytes, const char *what, const char *text)
{
    char line[200], *copy = (char *)calloc(1, manifest_bytes + 300);
    llmpar_xxh64 sum;
    const char *at = strstr(manifest, name), *end;
    CHECK(at != NULL);
    if (!at) return;
    at -= strlen("{\"name\":\"");
    end = strchr(at, '}') + 1;
    llmpar_xxh64_begin(&sum);
    llmpar_xxh64_add(&sum, data, bytes);
    snprintf(line, sizeof line, "{\"name\":\"%s\",\"bytes\":%llu,\"xxh64\":\"%016llx\"}", name, (unsigned long long)bytes, (unsigned long long)llmpar_xxh64_end(&sum));
    size_t before = (size_t)(at - manifest), rest = manifest_bytes - (size_t)(end - manifest);
    memcpy(copy, manifest, before);
    memcpy(copy + before, line, strlen(line));
    memcpy(copy + before + strlen(line), end, rest);
    put_manifest(copy, before + strlen(line) + rest);
    cp_write(in_step(name), data, bytes);
    refused(what, LLMPAR_ERR_FORMAT, text);
    put_manifest(manifest, manifest_bytes);
    free(copy);
}

/* A safetensors file with `to` instead of `from`, which stands once at least, in its header. */
static char *reworded(const char *data, size_t bytes, const char *from, const char *to, size_t *now)
{
    uint64_t length;
    size_t at = 8, old = strlen(from), fresh = strlen(to);
    char *out = (char *)calloc(1, bytes + fresh);
    memcpy(&length, data, 8);
    while (at < 8 + length && memcmp(data + at, from, old)) at++;
    CHECK(at < 8 + length);
    length += fresh - old;
    memcpy(out, &length, 8);
    memcpy(out + 8, data + 8, at - 8);
    memcpy(out + at, to, fresh);
    memcpy(out + at + fresh, data + at + old, bytes - at - old);
    *now = bytes + fresh - old;
    return out;
}

/* The first tensor's name gets another letter: with it, the header is in another order or not, and is right in itself. */
TEST(files_that_are_something_else)
{
    static const char name[] = "rank-00000.safetensors";
    size_t bytes;
    if (!saved()) return;
    put_manifest(manifest, manifest_bytes);
    char *data = cp_read(in_step(name), &bytes), *changed = (char *)malloc(bytes + 200);
    if (!data) return;
    memcpy(changed, data, bytes);
    changed[bytes / 2] ^= 4;
    cp_write(in_step(name), changed, bytes);
    refused("a bit of the data", LLMPAR_ERR_FORMAT, "rank-00000.safetensors: damaged: checksum");
    cp_write(in_step(name), data, bytes - 1);
    refused("a byte less", LLMPAR_ERR_FORMAT, "bytes, the manifest says");
    unlink(in_step(name));
    refused("no file", LLMPAR_ERR_IO, "rank-00000.safetensors");
    cp_write(in_step("one-more"), "x", 1);
    cp_write(in_step(name), data, bytes);
    refused("one more", LLMPAR_ERR_FORMAT, "one-more: a file that the manifest does not name");
    unlink(in_step("one-more"));
    /* stated as it is, but not what the tensors need */
    restate(name, "no safetensors", 14, "no safetensors", "rank-00000.safetensors: ");
    memcpy(changed, data, bytes);
    char *at = NULL;
    for (size_t i = 8; i + 30 < bytes && !at; i++)
        if (!memcmp(changed + i, "param/model.embed_tokens.weight", 31)) at = changed + i;
    if (at) at[6] = 'M';
    restate(name, changed, bytes, "another name", "param/model.embed_tokens.weight: expected it as f32[896]");
    /* a tensor more than the manifest says: an empty one */
    uint64_t length = 0;
    memcpy(&length, data, 8);
    static const char more[] = ",\"zzz\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0]}}";
    size_t close = 8 + (size_t)length;
    while (data[close - 1] != '}') close--;
    memcpy(changed, data, close - 1);
    memcpy(changed + close - 1, more, sizeof more - 1);
    uint64_t longer = (uint64_t)(close - 1 + sizeof more - 1 - 8);
    memcpy(changed, &longer, 8);
    memcpy(changed + 8 + longer, data + 8 + length, bytes - 8 - (size_t)length);
    restate(name, changed, 8 + (size_t)longer + bytes - 8 - (size_t)length, "a tensor more", "tensors, the manifest says");
    /* another shape of as many elements, another type of as many bytes */
    static const char *const words[2][2] = {{"\"shape\":[896]", "\"shape\":[1,896]"}, {"\"dtype\":\"F32\",\"shape\":[896]", "\"dtype\":\"I32\",\"shape\":[896]"}};
    for (int i = 0; i < 2; i++) {
        size_t now;
        char *other = reworded(data, bytes, words[i][0], words[i][1], &now);
        restate(name, other, now, words[i][1], "model.embed_tokens.weight: expected it as f32[896]");
        free(other);
    }
    cp_write(in_step(name), data, bytes);
    free(changed);
    free(data);
    cp_run run = resumed(1);
    if (run.status) TEST_FAIL("whole again: %s", run.error.text);
    char deep[4000];
    memset(deep, 'd', sizeof deep - 1);
    deep[sizeof deep - 1] = 0;
    run = cp_make(1, 1, 1, 3);
    run.policy.resume = deep;
    if (cp_go(&run) != LLMPAR_ERR_ARGUMENT || !strstr(run.error.text, "a path of more than")) TEST_FAIL("a path too long: %s", run.error.text);
    free(manifest);
    manifest = NULL;
}

TEST_LIST(T_(a_manifest_that_lies), T_(a_manifest_with_other_bytes), T_(files_that_are_something_else))
