/* Llama configurations: presets, config.json in and out, counts, RoPE tables. */
#include "test.h"
#include <math.h>

static llmpar_heap heap;
static llmpar_error err;

/* Any test may run alone, so each use goes through here. */
static llmpar_heap *ready(void)
{
    if (!heap.allocator.alloc) llmpar_heap_init(&heap, NULL);
    return &heap;
}

/* A good config.json; a case replaces, removes (value NULL) or adds one field. */
typedef struct field { const char *key, *value; } field;
static const field good[] = {
    { "architectures", "[\"LlamaForCausalLM\"]" }, { "model_type", "\"llama\"" }, { "vocab_size", "512" }, { "hidden_size", "64" }, { "intermediate_size", "172" },
    { "num_hidden_layers", "5" }, { "num_attention_heads", "8" }, { "num_key_value_heads", "4" }, { "max_position_embeddings", "512" }, { "rms_norm_eps", "1e-05" },
    { "rope_theta", "10000.0" }, { "hidden_act", "\"silu\"" }, { "tie_word_embeddings", "true" }, { "bos_token_id", "1" }, { "eos_token_id", "2" }, { "torch_dtype", "\"float32\"" }
};

static size_t build(char *text, size_t capacity, const field *changes, int count)
{
    size_t used = (size_t)snprintf(text, capacity, "{"), i;
    int c, first = 1;
    for (i = 0; i < sizeof good / sizeof good[0]; i++) {
        const char *value = good[i].value;
        for (c = 0; c < count; c++) if (!strcmp(changes[c].key, good[i].key)) value = changes[c].value;
        if (!value) continue;
        used += (size_t)snprintf(text + used, capacity - used, "%s\n \"%s\": %s", first ? "" : ",", good[i].key, value);
        first = 0;
    }
    for (c = 0; c < count; c++) {
        for (i = 0; i < sizeof good / sizeof good[0] && strcmp(changes[c].key, good[i].key); i++) {}
        if (i == sizeof good / sizeof good[0] && changes[c].value) used += (size_t)snprintf(text + used, capacity - used, ",\n \"%s\": %s", changes[c].key, changes[c].value);
    }
    used += (size_t)snprintf(text + used, capacity - used, "\n}");
    return used;
}

static llmpar_status parse(const field *changes, int count, llmpar_llama_config *out)
{
    char text[4096];
    size_t length = build(text, sizeof text, changes, count);
    llmpar_error_clear(&err);
    return llmpar_llama_config_parse(ready(), text, length, NULL, out, &err);
}

TEST(presets)
{
    static const struct { const char *name; long long params; } table[] = { { "tiny", 853120 }, { "15m", 15191712 }, { "110m", 109529856 }, { "300m", 305439744 }, { "1b", 1235814400 } };
    llmpar_llama_config c;
    size_t i;
    for (i = 0; i < sizeof table / sizeof table[0]; i++) {
        llmpar_error_clear(&err);
        CHECK_OK(llmpar_llama_preset(table[i].name, &c, &err));
        CHECK_OK(llmpar_llama_config_check(&c, &err));
        CHECK_INT(llmpar_llama_param_count(&c), table[i].params);
    }
    llmpar_error_clear(&err);
    CHECK_STATUS(llmpar_llama_preset("7b", &c, &err), LLMPAR_ERR_CONFIG);
    CHECK_TEXT(err.text, "\"7b\" is unknown, expected tiny, 15m, 110m, 300m or 1b");
    llmpar_error_clear(&err);
    CHECK_STATUS(llmpar_llama_preset(NULL, &c, &err), LLMPAR_ERR_CONFIG);
}

TEST(counts)
{
    llmpar_llama_config c;
    double n;
    CHECK_OK(llmpar_llama_preset("tiny", &c, NULL));
    /* untied: the look-up table does not multiply */
    n = (double)llmpar_llama_param_count(&c) - 256 * 128;
    CHECK_NEAR(llmpar_llama_flops_per_token(&c, 256), 6 * n + 12.0 * 4 * 8 * 16 * 256, 0);
    c.tied = 1;
    CHECK_NEAR(llmpar_llama_flops_per_token(&c, 256), 6 * n + 12.0 * 4 * 8 * 16 * 256, 0);
    CHECK_INT(llmpar_llama_param_count(&c), 853120 - 256 * 128);
}

TEST(reads_fields_and_defaults)
{
    static const field defaults[] = { { "num_key_value_heads", NULL }, { "max_position_embeddings", NULL }, { "rms_norm_eps", NULL }, { "rope_theta", NULL },
                                      { "tie_word_embeddings", NULL }, { "hidden_act", NULL }, { "bos_token_id", NULL }, { "eos_token_id", NULL }, { "architectures", NULL } };
    static const field more[] = { { "head_dim", "32" }, { "eos_token_id", "[2, 5, 7]" }, { "bos_token_id", "null" }, { "initializer_range", "0.5" }, { "use_cache", "true" },
                                  { "transformers_version", "\"4.45.0\"" }, { "dtype", "\"bfloat16\"" }, { "attention_bias", "false" }, { "mlp_bias", "false" }, { "rope_scaling", "null" },
                                  { "attention_dropout", "0.0" }, { "pretraining_tp", "1" }, { "num_key_value_heads", "null" }, { "pad_token_id", "-1" }, { "some_new_field", "{\"a\": [1]}" } };
    llmpar_llama_config c;
    CHECK_OK(parse(NULL, 0, &c));
    CHECK_INT(c.vocab, 512); CHECK_INT(c.hidden, 64); CHECK_INT(c.intermediate, 172); CHECK_INT(c.layers, 5); CHECK_INT(c.heads, 8); CHECK_INT(c.kv_heads, 4);
    CHECK_INT(c.head_dim, 8); CHECK_INT(c.max_positions, 512); CHECK_INT(c.tied, 1); CHECK_INT(c.bos_id, 1); CHECK_INT(c.eos_count, 1); CHECK_INT(c.eos_id[0], 2);
    CHECK_NEAR(c.rms_eps, 1e-5, 0); CHECK_NEAR(c.rope_theta, 10000, 0); CHECK_NEAR(c.init_std, 0.02, 0); CHECK_INT(c.rope_scaling.kind, LLMPAR_ROPE_NONE);
    CHECK_OK(parse(defaults, sizeof defaults / sizeof defaults[0], &c));
    CHECK_INT(c.kv_heads, 8); CHECK_INT(c.max_positions, 2048); CHECK_NEAR(c.rms_eps, 1e-6, 0); CHECK_NEAR(c.rope_theta, 10000, 0); CHECK_INT(c.tied, 0);
    CHECK_INT(c.bos_id, 1); CHECK_INT(c.eos_count, 1); CHECK_INT(c.eos_id[0], 2);
    CHECK_OK(parse(more, sizeof more / sizeof more[0], &c));
    CHECK_INT(c.head_dim, 32); CHECK_INT(c.kv_heads, 8); CHECK_INT(c.bos_id, -1); CHECK_INT(c.eos_count, 3); CHECK_INT(c.eos_id[2], 7); CHECK_NEAR(c.init_std, 0.5, 0);
    CHECK_INT(heap.live, 0);
}

TEST(reads_rope)
{
#define LLAMA3 "\"factor\": 8.0, \"low_freq_factor\": 1.0, \"high_freq_factor\": 4.0, \"original_max_position_embeddings\": 8192"
    static const struct { field f[2]; llmpar_rope_kind kind; double theta, factor; } table[] = {
        { { { "rope_scaling", "{\"rope_type\": \"llama3\", " LLAMA3 "}" }, { "rope_theta", "500000.0" } }, LLMPAR_ROPE_LLAMA3, 500000, 8 },
        { { { "rope_scaling", "{\"type\": \"llama3\", " LLAMA3 "}" }, { "rope_theta", "500000" } }, LLMPAR_ROPE_LLAMA3, 500000, 8 },
        { { { "rope_scaling", "{\"type\": \"linear\", \"factor\": 2}" }, { "rope_theta", NULL } }, LLMPAR_ROPE_LINEAR, 10000, 2 },
        { { { "rope_scaling", "{\"type\": \"linear\", \"rope_type\": \"linear\", \"factor\": 2.5}" }, { "rope_theta", NULL } }, LLMPAR_ROPE_LINEAR, 10000, 2.5 },
        { { { "rope_scaling", "{\"rope_type\": \"default\"}" }, { "rope_theta", "5000" } }, LLMPAR_ROPE_NONE, 5000, 0 },
        { { { "rope_parameters", "{\"rope_type\": \"default\", \"rope_theta\": 20000.0}" }, { "rope_theta", NULL } }, LLMPAR_ROPE_NONE, 20000, 0 },
        { { { "rope_parameters", "{\"rope_theta\": 20000.0}" }, { "rope_theta", NULL } }, LLMPAR_ROPE_NONE, 20000, 0 },
        { { { "rope_parameters", "{\"rope_type\": \"llama3\", \"rope_theta\": 500000.0, " LLAMA3 "}" }, { "rope_theta", NULL } }, LLMPAR_ROPE_LLAMA3, 500000, 8 }
    };
    llmpar_llama_config c;
    size_t i;
    for (i = 0; i < sizeof table / sizeof table[0]; i++) {
        if (parse(table[i].f, 2, &c)) TEST_FAIL("case %zu: %s", i, err.text);
        CHECK_INT(c.rope_scaling.kind, table[i].kind);
        CHECK_NEAR(c.rope_theta, table[i].theta, 0);
        CHECK_NEAR(c.rope_scaling.factor, table[i].factor, 0);
        if (table[i].kind == LLMPAR_ROPE_LLAMA3) {
            CHECK_NEAR(c.rope_scaling.low_freq_factor, 1, 0); CHECK_NEAR(c.rope_scaling.high_freq_factor, 4, 0); CHECK_INT(c.rope_scaling.original_max_positions, 8192);
        }
    }
}

#define MISTRAL { "model_type", "\"mistral\"" }, { "architectures", "[\"MistralForCausalLM\"]" }
#define QWEN(n) { "model_type", "\"qwen" #n "\"" }, { "architectures", "[\"Qwen" #n "ForCausalLM\"]" }

/* What the relatives' configurations say, and what they leave to transformers' defaults. */
TEST(reads_families)
{
    static const struct { const char *type, *architecture; int32_t kv, head_dim, positions, bos, eos, window; int64_t extra; } table[] = {
        { "llama", "LlamaForCausalLM", 64, 2, 2048, 1, 2, 0, 0 }, { "mistral", "MistralForCausalLM", 8, 2, 131072, 1, 2, 4096, 0 },
        { "qwen2", "Qwen2ForCausalLM", 32, 2, 32768, -1, -1, 0, 128 + 2 * 64 }, { "qwen3", "Qwen3ForCausalLM", 32, 128, 32768, -1, -1, 0, 2 * 128 } };
    char type[40], architecture[40];
    llmpar_llama_config c;
    size_t i;
    for (i = 0; i < 4; i++)
        for (int said = 0; said < 3; said++) {
            field f[] = { { "model_type", NULL }, { "architectures", NULL }, { "num_attention_heads", "64" }, { "num_key_value_heads", NULL }, { "max_position_embeddings", NULL }, { "bos_token_id", NULL }, { "eos_token_id", NULL },
                          { "tie_word_embeddings", NULL }, { "hidden_size", "128" } };
            snprintf(type, sizeof type, "\"%s\"", table[i].type);
            snprintf(architecture, sizeof architecture, "[\"%s\"]", table[i].architecture);
            if (said != 1) f[0].value = type;
            if (said != 2) f[1].value = architecture;
            if (parse(f, 9, &c)) TEST_FAIL("%s: %s", table[i].type, err.text);
            CHECK_INT(c.family, i); CHECK_INT(c.kv_heads, table[i].kv); CHECK_INT(c.max_positions, table[i].positions); CHECK_INT(c.bos_id, table[i].bos); CHECK_INT(c.eos_count, table[i].eos >= 0);
            CHECK_INT(c.sliding_window, table[i].window); CHECK_INT(c.head_dim, table[i].head_dim); CHECK_INT(c.tied, 0);
            int64_t q = 64 * c.head_dim, kv = c.kv_heads * c.head_dim;
            CHECK_INT(llmpar_llama_param_count(&c), 5 * (2 * 128 * q + 2 * 128 * kv + 3 * 128 * 172 + 2 * 128 + table[i].extra) + 128 + 2 * 512 * 128);
        }
    static const field mistral[] = { MISTRAL, { "sliding_window", "null" } }, window[] = { MISTRAL, { "sliding_window", "77" } }, heads[] = { QWEN(3), { "num_key_value_heads", "null" }, { "head_dim", "24" } };
    static const field qwen[] = { QWEN(2), { "sliding_window", "131072" }, { "max_window_layers", "21" }, { "use_sliding_window", "false" }, { "attention_dropout", "0.0" }, { "layer_types", "[\"full_attention\", \"full_attention\", \"full_attention\", \"full_attention\", \"full_attention\"]" } };
    CHECK_OK(parse(mistral, 3, &c)); CHECK_INT(c.sliding_window, 0);
    CHECK_OK(parse(window, 3, &c)); CHECK_INT(c.sliding_window, 77);
    CHECK_OK(parse(heads, 4, &c)); CHECK_INT(c.kv_heads, 8); CHECK_INT(c.head_dim, 24);
    CHECK_OK(parse(qwen, 7, &c)); CHECK_INT(c.family, LLMPAR_FAMILY_QWEN2); CHECK_INT(c.sliding_window, 0);
}

/* transformers' defaults of YaRN: attention_factor from factor, or from the two mscales. */
TEST(reads_yarn)
{
    static const struct { const char *text; double attention, fast, slow; int truncate, original; } table[] = {
        { "{\"type\": \"yarn\", \"factor\": 4.0, \"original_max_position_embeddings\": 128}", 1.1386294361119891, 32, 1, 1, 128 },
        { "{\"rope_type\": \"yarn\", \"factor\": 1}", 1, 32, 1, 1, 512 },
        { "{\"rope_type\": \"yarn\", \"factor\": 40, \"mscale\": 0.707, \"mscale_all_dim\": 1.0, \"beta_fast\": 16, \"beta_slow\": 2.5, \"truncate\": false, \"original_max_position_embeddings\": 32}", 0.92104210, 16, 2.5, 0, 32 },
        { "{\"rope_type\": \"yarn\", \"factor\": 40, \"mscale\": 0.707, \"mscale_all_dim\": 0, \"beta_fast\": null, \"beta_slow\": 0, \"attention_factor\": null}", 1.3688879454113936, 32, 1, 1, 512 },
        { "{\"rope_type\": \"yarn\", \"factor\": 40, \"mscale\": 0.707, \"mscale_all_dim\": 2, \"attention_factor\": 0.75}", 0.75, 32, 1, 1, 512 },
    };
    llmpar_llama_config c;
    for (size_t i = 0; i < sizeof table / sizeof table[0]; i++) {
        const field f[] = { { "rope_scaling", table[i].text } };
        if (parse(f, 1, &c)) TEST_FAIL("case %zu: %s", i, err.text);
        CHECK_INT(c.rope_scaling.kind, LLMPAR_ROPE_YARN); CHECK_NEAR(c.rope_scaling.attention_factor, table[i].attention, i == 2 ? 1e-3 : 1e-15);
        CHECK_NEAR(c.rope_scaling.beta_fast, table[i].fast, 0); CHECK_NEAR(c.rope_scaling.beta_slow, table[i].slow, 0); CHECK_INT(c.rope_scaling.truncate, table[i].truncate);
        CHECK_INT(c.rope_scaling.original_max_positions, table[i].original);
    }
    const field dynamic[] = { { "rope_scaling", "{\"rope_type\": \"dynamic\", \"factor\": 2.5}" } };
    CHECK_OK(parse(dynamic, 1, &c)); CHECK_INT(c.rope_scaling.kind, LLMPAR_ROPE_DYNAMIC); CHECK_NEAR(c.rope_scaling.factor, 2.5, 0);
}

/* The position in an error that shows "field = value" is that of the value. */
static void check_position(const field *changes, int count, const char *where)
{
    char text[4096];
    const char *equals = strstr(err.text, " = "), *byte = strstr(err.text, "(byte "), *shown, *end;
    size_t length = build(text, sizeof text, changes, count), position;
    if (!equals || !byte || strstr(err.text, "= an ") || strstr(err.text, "architectures")) return;
    shown = equals + 3;
    end = shown + strcspn(shown, ", ");
    position = (size_t)strtoul(byte + 6, NULL, 10);
    /* reals are shown as numbers, not as they are written */
    if (strtod(shown, NULL) != 0 ? strtod(text + (position < length ? position : 0), NULL) != strtod(shown, NULL) : position >= length || strncmp(text + position, shown, (size_t)(end - shown)))
        TEST_FAIL("byte %zu is not where \"%s\" stands", position, where);
}

TEST(refuses)
{
    static const struct { field f[4]; llmpar_status status; const char *text; } table[] = {
        { { { "num_attention_heads", "30" }, { "head_dim", "8" } }, LLMPAR_ERR_CONFIG, "config.json: num_attention_heads = 30 is not divisible by num_key_value_heads = 4 (byte 182)" },
        { { { "num_attention_heads", "30" } }, LLMPAR_ERR_CONFIG, "num_attention_heads = 30 does not divide hidden_size = 64, and head_dim is missing (byte 182)" },
        { { { "vocab_size", NULL } }, LLMPAR_ERR_CONFIG, "vocab_size is missing (byte 0)" },
        { { { "hidden_size", NULL } }, LLMPAR_ERR_CONFIG, "hidden_size is missing" },
        { { { "intermediate_size", NULL } }, LLMPAR_ERR_CONFIG, "intermediate_size is missing" },
        { { { "num_hidden_layers", NULL } }, LLMPAR_ERR_CONFIG, "num_hidden_layers is missing" },
        { { { "num_attention_heads", NULL } }, LLMPAR_ERR_CONFIG, "num_attention_heads is missing" },
        { { { "vocab_size", "0" } }, LLMPAR_ERR_CONFIG, "vocab_size = 0, expected an integer from 1 to 16777216 (byte 81)" },
        { { { "vocab_size", "-5" } }, LLMPAR_ERR_CONFIG, "vocab_size = -5, expected an integer from 1" },
        { { { "hidden_size", "64.5" } }, LLMPAR_ERR_CONFIG, "hidden_size = 64.5, expected an integer" },
        { { { "hidden_size", "64.0" } }, LLMPAR_ERR_CONFIG, "hidden_size = 64.0, expected an integer" },
        { { { "hidden_size", "6e1" } }, LLMPAR_ERR_CONFIG, "hidden_size = 6e1, expected an integer" },
        { { { "hidden_size", "99999999999" } }, LLMPAR_ERR_CONFIG, "hidden_size = 99999999999, expected an integer from 1 to 2147483647" },
        { { { "hidden_size", "99999999999999999999999" } }, LLMPAR_ERR_CONFIG, "hidden_size = 99999999999999999999999, expected an integer" },
        { { { "hidden_size", "2000000000" } }, LLMPAR_ERR_CONFIG, "hidden_size = 2000000000, expected an integer from 1 to 1048576" },
        { { { "intermediate_size", "2147483647" } }, LLMPAR_ERR_CONFIG, "intermediate_size = 2147483647" },
        { { { "num_hidden_layers", "\"5\"" } }, LLMPAR_ERR_CONFIG, "num_hidden_layers = \"5\", expected an integer" },
        { { { "num_hidden_layers", "null" } }, LLMPAR_ERR_CONFIG, "num_hidden_layers = null, expected an integer" },
        { { { "num_hidden_layers", "[5]" } }, LLMPAR_ERR_CONFIG, "num_hidden_layers = an array, expected an integer" },
        { { { "num_hidden_layers", "true" } }, LLMPAR_ERR_CONFIG, "num_hidden_layers = true, expected an integer" },
        { { { "num_attention_heads", "0" } }, LLMPAR_ERR_CONFIG, "num_attention_heads = 0, expected a positive integer" },
        { { { "num_key_value_heads", "3" } }, LLMPAR_ERR_CONFIG, "num_attention_heads = 8 is not divisible by num_key_value_heads = 3" },
        { { { "num_key_value_heads", "16" } }, LLMPAR_ERR_CONFIG, "num_key_value_heads = 16, expected an integer from 1 to 8" },
        { { { "num_key_value_heads", "0" } }, LLMPAR_ERR_CONFIG, "num_key_value_heads = 0" },
        { { { "head_dim", "7" } }, LLMPAR_ERR_CONFIG, "head_dim = 7, expected an even number" },
        { { { "head_dim", "0" } }, LLMPAR_ERR_CONFIG, "head_dim = 0" },
        { { { "hidden_size", "72" } }, LLMPAR_ERR_CONFIG, "head_dim = 9, expected an even number (rotary position embedding turns pairs) (a default" },
        { { { "max_position_embeddings", "0" } }, LLMPAR_ERR_CONFIG, "max_position_embeddings = 0" },
        { { { "rms_norm_eps", "0" } }, LLMPAR_ERR_CONFIG, "rms_norm_eps = 0, expected a number above 0" },
        { { { "rms_norm_eps", "-1e-5" } }, LLMPAR_ERR_CONFIG, "rms_norm_eps = -1e-05" },
        { { { "rms_norm_eps", "\"1e-5\"" } }, LLMPAR_ERR_CONFIG, "rms_norm_eps = \"1e-5\", expected a number" },
        { { { "rope_theta", "0" } }, LLMPAR_ERR_CONFIG, "rope_theta = 0" },
        { { { "rope_theta", "null" } }, LLMPAR_ERR_CONFIG, "rope_theta = null, expected a number" },
        { { { "tie_word_embeddings", "1" } }, LLMPAR_ERR_CONFIG, "tie_word_embeddings = 1, expected true or false" },
        { { { "bos_token_id", "512" } }, LLMPAR_ERR_CONFIG, "bos_token_id = 512, expected a token id below vocab_size = 512" },
        { { { "eos_token_id", "1.5" } }, LLMPAR_ERR_CONFIG, "eos_token_id = 1.5" },
        { { { "eos_token_id", "[1, 600]" } }, LLMPAR_ERR_CONFIG, "eos_token_id = 600" },
        { { { "eos_token_id", "[1,2,3,4,5,6,7,8,9]" } }, LLMPAR_ERR_UNSUPPORTED, "eos_token_id has 9 ids, at most 8" },
        { { { "initializer_range", "-0.1" } }, LLMPAR_ERR_CONFIG, "initializer_range = -0.1" },
        { { { "intermediate_size", "4194304" }, { "hidden_size", "1048576" }, { "num_hidden_layers", "65536" }, { "head_dim", "8" } }, LLMPAR_ERR_CONFIG, "parameters, expected at most 9007199254740992" },
        /* what changes the mathematics */
        { { { "model_type", "\"gpt2\"" } }, LLMPAR_ERR_UNSUPPORTED, "model_type = \"gpt2\", expected \"llama\", \"mistral\", \"qwen2\" or \"qwen3\"" },
        { { { "model_type", "null" } }, LLMPAR_ERR_UNSUPPORTED, "model_type = null" },
        { { { "model_type", NULL }, { "architectures", NULL } }, LLMPAR_ERR_CONFIG, "model_type is missing" },
        { { { "architectures", "[\"Qwen2ForCausalLM\"]" } }, LLMPAR_ERR_UNSUPPORTED, "architectures = [\"Qwen2ForCausalLM\"], expected [\"LlamaForCausalLM\"] (byte 20)" },
        { { { "architectures", "[]" } }, LLMPAR_ERR_UNSUPPORTED, "architectures = an array" },
        { { { "hidden_act", "\"gelu\"" } }, LLMPAR_ERR_UNSUPPORTED, "hidden_act = \"gelu\", expected \"silu\"" },
        { { { "attention_bias", "true" } }, LLMPAR_ERR_UNSUPPORTED, "attention_bias = true, expected false" },
        { { { "mlp_bias", "true" } }, LLMPAR_ERR_UNSUPPORTED, "mlp_bias = true" },
        { { { "mlp_bias", "\"no\"" } }, LLMPAR_ERR_UNSUPPORTED, "mlp_bias = \"no\"" },
        { { { "attention_dropout", "0.1" } }, LLMPAR_ERR_UNSUPPORTED, "attention_dropout = 0.1" },
        { { { "sliding_window", "4096" } }, LLMPAR_ERR_UNSUPPORTED, "sliding_window = 4096, expected null" },
        { { { "quantization_config", "{\"bits\": 4}" } }, LLMPAR_ERR_UNSUPPORTED, "quantization_config = an object" },
        { { { "partial_rotary_factor", "0.5" } }, LLMPAR_ERR_UNSUPPORTED, "partial_rotary_factor = 0.5" },
        { { { "architectures", "[\"MistralForCausalLM\"]" }, { "model_type", "\"qwen2\"" } }, LLMPAR_ERR_UNSUPPORTED, "architectures = [\"MistralForCausalLM\"], expected [\"Qwen2ForCausalLM\"]" },
        { { { "architectures", "[\"OPTForCausalLM\"]" }, { "model_type", NULL } }, LLMPAR_ERR_UNSUPPORTED, "architectures = [\"OPTForCausalLM\"], expected [\"LlamaForCausalLM\"], or Mistral, Qwen2 or Qwen3" },
        { { { "architectures", "[\"LlamaForSequenceClassification\"]" } }, LLMPAR_ERR_UNSUPPORTED, "architectures = [\"LlamaForSequenceClassification\"]" },
        { { MISTRAL, { "attention_bias", "true" } }, LLMPAR_ERR_UNSUPPORTED, "attention_bias = true, expected false" },
        { { MISTRAL, { "sliding_window", "0" } }, LLMPAR_ERR_CONFIG, "sliding_window = 0, expected an integer from 1" },
        { { MISTRAL, { "sliding_window", "-1" } }, LLMPAR_ERR_CONFIG, "sliding_window = -1, expected an integer from 1" },
        { { MISTRAL, { "sliding_window", "\"all\"" } }, LLMPAR_ERR_CONFIG, "sliding_window = \"all\", expected an integer" },
        { { QWEN(2), { "use_sliding_window", "true" } }, LLMPAR_ERR_UNSUPPORTED, "use_sliding_window = true, expected false" },
        { { QWEN(3), { "use_sliding_window", "true" } }, LLMPAR_ERR_UNSUPPORTED, "use_sliding_window = true, expected false" },
        { { QWEN(3), { "attention_bias", "true" } }, LLMPAR_ERR_UNSUPPORTED, "attention_bias = true, expected false" },
        { { QWEN(2), { "mlp_bias", "true" } }, LLMPAR_ERR_UNSUPPORTED, "mlp_bias = true" },
        { { QWEN(3), { "head_dim", "null" } }, LLMPAR_ERR_CONFIG, "head_dim = null, expected an integer" },
        { { QWEN(2), { "layer_types", "[\"full_attention\", \"full_attention\", \"full_attention\", \"sliding_attention\", \"full_attention\"]" } }, LLMPAR_ERR_UNSUPPORTED, "layer_types has \"sliding_attention\", expected \"full_attention\" alone" },
        { { QWEN(2), { "layer_types", "[\"full_attention\"]" } }, LLMPAR_ERR_CONFIG, "layer_types has 1 entries, expected one for each of the 5 layers" },
        { { QWEN(2), { "layer_types", "\"full_attention\"" } }, LLMPAR_ERR_UNSUPPORTED, "layer_types = \"full_attention\", expected an array" },
        { { { "rope_scaling", "{\"rope_type\": \"longrope\", \"factor\": 4.0}" } }, LLMPAR_ERR_UNSUPPORTED, "rope_type = \"longrope\", expected \"default\", \"linear\", \"llama3\", \"dynamic\" or \"yarn\"" },
        { { { "rope_scaling", "{\"rope_type\": \"dynamic\"}" } }, LLMPAR_ERR_CONFIG, "factor is missing from rope_scaling" },
        { { { "rope_scaling", "{\"rope_type\": \"dynamic\", \"factor\": 0.5}" } }, LLMPAR_ERR_CONFIG, "factor = 0.5, expected a number from 1" },
        { { { "rope_scaling", "{\"rope_type\": \"dynamic\", \"factor\": 2}" }, { "head_dim", "2" } }, LLMPAR_ERR_CONFIG, "head_dim = 2, expected an integer from 4" },
        { { { "rope_scaling", "{\"rope_type\": \"dynamic\", \"factor\": 2, \"beta_fast\": 3}" } }, LLMPAR_ERR_UNSUPPORTED, "rope_scaling has an unknown field beta_fast" },
        { { { "rope_scaling", "{\"rope_type\": \"yarn\"}" } }, LLMPAR_ERR_CONFIG, "factor is missing from rope_scaling" },
        { { { "rope_scaling", "{\"rope_type\": \"yarn\", \"factor\": null}" } }, LLMPAR_ERR_CONFIG, "factor = null, expected a number" },
        { { { "rope_scaling", "{\"rope_type\": \"yarn\", \"factor\": 2, \"beta\": 3}" } }, LLMPAR_ERR_UNSUPPORTED, "rope_scaling has an unknown field beta" },
        { { { "rope_scaling", "{\"rope_type\": \"yarn\", \"factor\": 2, \"attention_factor\": 0}" } }, LLMPAR_ERR_CONFIG, "attention_factor = 0, expected a number above 0" },
        { { { "rope_scaling", "{\"rope_type\": \"yarn\", \"factor\": 2, \"attention_factor\": \"1\"}" } }, LLMPAR_ERR_CONFIG, "attention_factor = \"1\", expected a number" },
        { { { "rope_scaling", "{\"rope_type\": \"yarn\", \"factor\": 2, \"mscale\": -100, \"mscale_all_dim\": 1}" } }, LLMPAR_ERR_CONFIG, "attention_factor = -5." },
        { { { "rope_scaling", "{\"rope_type\": \"yarn\", \"factor\": 2, \"beta_fast\": 0.5}" } }, LLMPAR_ERR_CONFIG, "beta_fast = 0.5, expected a number from beta_slow" },
        { { { "rope_scaling", "{\"rope_type\": \"yarn\", \"factor\": 2, \"beta_slow\": -1}" } }, LLMPAR_ERR_CONFIG, "beta_slow = -1, expected a number above 0" },
        { { { "rope_scaling", "{\"rope_type\": \"yarn\", \"factor\": 2, \"truncate\": null}" } }, LLMPAR_ERR_CONFIG, "truncate = null, expected true or false" },
        { { { "rope_scaling", "{\"rope_type\": \"yarn\", \"factor\": 2}" }, { "rope_theta", "1" } }, LLMPAR_ERR_CONFIG, "rope_theta = 1, expected a number above 1 under yarn" },
        { { { "rope_scaling", "{\"rope_type\": \"yarn\", \"factor\": 2, \"original_max_position_embeddings\": 0}" } }, LLMPAR_ERR_CONFIG, "original_max_position_embeddings = 0" },
        { { { "rope_scaling", "{\"rope_type\": \"yarn\", \"factor\": 2, \"original_max_position_embeddings\": 64}" }, { "original_max_position_embeddings", "128" } }, LLMPAR_ERR_CONFIG, "original_max_position_embeddings = 128, expected the value inside" },
        { { { "rope_scaling", "{\"rope_type\": \"linear\", \"type\": \"dynamic\", \"factor\": 4.0}" } }, LLMPAR_ERR_CONFIG, "type = \"dynamic\", expected the same as rope_type" },
        { { { "rope_scaling", "{\"factor\": 4.0}" } }, LLMPAR_ERR_CONFIG, "rope_type is missing from rope_scaling" },
        { { { "rope_scaling", "{\"rope_type\": \"linear\"}" } }, LLMPAR_ERR_CONFIG, "factor is missing from rope_scaling" },
        { { { "rope_scaling", "{\"rope_type\": \"linear\", \"factor\": 0.5}" } }, LLMPAR_ERR_CONFIG, "factor = 0.5, expected a number from 1" },
        { { { "rope_scaling", "{\"rope_type\": \"linear\", \"factor\": 2, \"mscale\": 2}" } }, LLMPAR_ERR_UNSUPPORTED, "rope_scaling has an unknown field mscale" },
        { { { "rope_scaling", "{\"rope_type\": \"linear\", \"factor\": 2, \"attention_factor\": 2}" } }, LLMPAR_ERR_UNSUPPORTED, "attention_factor = 2" },
        { { { "rope_scaling", "{\"rope_type\": \"llama3\", \"factor\": 8.0, \"low_freq_factor\": 1.0, \"high_freq_factor\": 4.0}" } }, LLMPAR_ERR_CONFIG, "original_max_position_embeddings is missing" },
        { { { "rope_scaling", "{\"rope_type\": \"llama3\", \"factor\": 8.0, \"low_freq_factor\": 4.0, \"high_freq_factor\": 4.0, \"original_max_position_embeddings\": 8192}" } }, LLMPAR_ERR_CONFIG, "high_freq_factor = 4, expected a number above low_freq_factor" },
        { { { "rope_scaling", "{\"rope_type\": \"llama3\", " LLAMA3 "}" }, { "original_max_position_embeddings", "4096" } }, LLMPAR_ERR_CONFIG, "original_max_position_embeddings = 4096" },
        { { { "rope_scaling", "\"linear\"" } }, LLMPAR_ERR_CONFIG, "rope_scaling = \"linear\", expected an object" },
        { { { "rope_scaling", "{\"rope_type\": \"default\"}" }, { "rope_parameters", "{\"rope_type\": \"default\"}" } }, LLMPAR_ERR_CONFIG, "both rope_scaling and rope_parameters" },
        { { { "rope_parameters", "{\"rope_type\": \"default\", \"rope_theta\": 5}" } }, LLMPAR_ERR_CONFIG, "rope_theta = 10000 contradicts 5 in rope_parameters" },
        { { { "vocab_size", "12, \"vocab_size\": 13" } }, LLMPAR_ERR_FORMAT, "config.json" },
        { { { "vocab_size", "}" } }, LLMPAR_ERR_FORMAT, "config.json: byte" }
    };
    llmpar_llama_config c, zero;
    size_t i;
    memset(&zero, 0, sizeof zero);
    for (i = 0; i < sizeof table / sizeof table[0]; i++) {
        int count = 0;
        llmpar_status status;
        while (count < 4 && table[i].f[count].key) count++;
        status = parse(table[i].f, count, &c);
        if (status != table[i].status || !strstr(err.text, table[i].text))
            TEST_FAIL("case %zu (%s): got %s \"%s\", want %s \"%s\"", i, table[i].f[0].key, llmpar_status_string(status), err.text, llmpar_status_string(table[i].status), table[i].text);
        if (err.status != status) TEST_FAIL("case %zu: error.status differs", i);
        check_position(table[i].f, count, table[i].text);
        CHECK_BYTES(&c, &zero, sizeof c);
        if (status != LLMPAR_ERR_FORMAT && !strstr(err.text, "(byte ") && !strstr(err.text, "byte")) TEST_FAIL("case %zu: no byte position in \"%s\"", i, err.text);
    }
    CHECK_INT(heap.live, 0);
}

TEST(refuses_wrong_documents)
{
    static const struct { const char *text; llmpar_status status; } table[] = {
        { "", LLMPAR_ERR_FORMAT }, { "[]", LLMPAR_ERR_FORMAT }, { "null", LLMPAR_ERR_FORMAT }, { "{", LLMPAR_ERR_FORMAT }, { "{}", LLMPAR_ERR_CONFIG }, { "{} x", LLMPAR_ERR_FORMAT } };
    llmpar_llama_config c;
    size_t i;
    for (i = 0; i < sizeof table / sizeof table[0]; i++) {
        llmpar_error_clear(&err);
        CHECK_STATUS(llmpar_llama_config_parse(ready(), table[i].text, strlen(table[i].text), "dir/config.json", &c, &err), table[i].status);
        CHECK_TEXT(err.text, "dir/config.json");
    }
    CHECK_INT(heap.live, 0);
}

TEST(out_of_memory)
{
    char text[4096];
    size_t length = build(text, sizeof text, NULL, 0);
    llmpar_llama_config c;
    uint64_t n;
    for (n = 1; n < 1000; n++) {
        llmpar_heap h;
        llmpar_status status;
        llmpar_heap_init(&h, NULL);
        h.fail_at = n;
        llmpar_error_clear(&err);
        status = llmpar_llama_config_parse(&h, text, length, NULL, &c, &err);
        CHECK_INT(h.live, 0);
        if (!status) break;
        CHECK_STATUS(status, LLMPAR_ERR_MEMORY);
    }
    CHECK(n > 1 && n < 1000);
}

TEST(checks_structs)
{
    llmpar_llama_config c;
    CHECK_OK(llmpar_llama_preset("tiny", &c, NULL));
    c.heads = 6;
    llmpar_error_clear(&err);
    CHECK_STATUS(llmpar_llama_config_check(&c, &err), LLMPAR_ERR_CONFIG);
    CHECK_TEXT(err.text, "llama config: num_attention_heads = 6 is not divisible by num_key_value_heads = 4");
    CHECK_OK(llmpar_llama_preset("tiny", &c, NULL));
    c.rope_theta = NAN;
    CHECK_STATUS(llmpar_llama_config_check(&c, NULL), LLMPAR_ERR_CONFIG);
    c.rope_theta = INFINITY;
    CHECK_STATUS(llmpar_llama_config_check(&c, NULL), LLMPAR_ERR_CONFIG);
    CHECK_OK(llmpar_llama_preset("tiny", &c, NULL));
    c.eos_count = 9;
    CHECK_STATUS(llmpar_llama_config_check(&c, NULL), LLMPAR_ERR_CONFIG);
    c.eos_count = 0;
    c.rope_scaling.kind = (llmpar_rope_kind)7;
    CHECK_STATUS(llmpar_llama_config_check(&c, NULL), LLMPAR_ERR_CONFIG);
    CHECK_OK(llmpar_llama_preset("tiny", &c, NULL));
    c.family = (llmpar_family)4;
    CHECK_STATUS(llmpar_llama_config_check(&c, NULL), LLMPAR_ERR_CONFIG);
    c.family = LLMPAR_FAMILY_QWEN2;
    c.sliding_window = 5;
    llmpar_error_clear(&err);
    CHECK_STATUS(llmpar_llama_config_check(&c, &err), LLMPAR_ERR_CONFIG);
    CHECK_TEXT(err.text, "sliding_window = 5");
    /* every field within its own limits, 2^68 parameters and more together */
    CHECK_OK(llmpar_llama_preset("tiny", &c, NULL));
    c.hidden = 1 << 20; c.intermediate = 1 << 22; c.layers = 1 << 16; c.heads = c.kv_heads = 1 << 16; c.head_dim = 1 << 14;
    llmpar_error_clear(&err);
    CHECK_STATUS(llmpar_llama_config_check(&c, &err), LLMPAR_ERR_CONFIG);
    CHECK_TEXT(err.text, "num_hidden_layers = 65536, layers of 4516793769000960 parameters");
    memset(&c, 0, sizeof c);
    CHECK_STATUS(llmpar_llama_config_check(&c, NULL), LLMPAR_ERR_CONFIG);
}

TEST(writes_what_it_reads)
{
    static const char *const names[] = { "tiny", "15m", "110m", "1b" };
    char text[4096], small[64];
    llmpar_llama_config c, back;
    size_t i, needed;
    for (i = 0; i < 12; i++) {
        CHECK_OK(llmpar_llama_preset(names[i % 4], &c, NULL));
        if (i >= 4) {
            c.rms_eps = 1.0 / 3 * 1e-5; c.rope_theta = 123456.789; c.init_std = 0.1 + 0.2; c.eos_count = 3; c.eos_id[0] = 3; c.eos_id[1] = 4; c.eos_id[2] = 5;
            c.rope_scaling.kind = LLMPAR_ROPE_LINEAR; c.rope_scaling.factor = 1e5 / 3; c.head_dim += 2;
        }
        if (i == 6) {
            c.rope_scaling.kind = LLMPAR_ROPE_LLAMA3; c.rope_scaling.low_freq_factor = 1.1; c.rope_scaling.high_freq_factor = 1e300; c.rope_scaling.original_max_positions = 77;
        }
        if (i >= 7) {
            c.family = (llmpar_family)(i % 4);
            c.sliding_window = i == 9 ? 4097 : 0;
            c.rope_scaling.original_max_positions = 0; c.rope_scaling.low_freq_factor = c.rope_scaling.high_freq_factor = 0;
            c.rope_scaling.kind = i == 7 ? LLMPAR_ROPE_DYNAMIC : LLMPAR_ROPE_YARN;
            if (i > 7) c.rope_scaling.original_max_positions = 78, c.rope_scaling.attention_factor = 1.1 / 3, c.rope_scaling.beta_fast = 97.0 / 3, c.rope_scaling.beta_slow = 1.0 / 3, c.rope_scaling.truncate = i & 1;
        }
        needed = llmpar_llama_config_write(&c, NULL, 0);
        CHECK(needed < sizeof text);
        memset(text, '#', sizeof text);
        CHECK_INT(llmpar_llama_config_write(&c, text, needed + 1), needed);
        CHECK_INT(strlen(text), needed);
        CHECK_INT(text[needed + 1], '#');
        llmpar_error_clear(&err);
        if (llmpar_llama_config_parse(ready(), text, needed, NULL, &back, &err)) TEST_FAIL("%s\n%s", err.text, text);
        CHECK_BYTES(&back, &c, sizeof c);
        memset(small, '#', sizeof small);
        CHECK_INT(llmpar_llama_config_write(&c, small, 10), needed);
        CHECK_INT(strlen(small), 9);
        CHECK_INT(small[10], '#');
        CHECK(!memcmp(small, text, 9));
    }
    CHECK_INT(heap.live, 0);
}

/* transformers' formula (modeling_rope_utils), in long double. */
static long double reference_inv_freq(const llmpar_llama_config *c, int64_t positions, int i)
{
    const llmpar_rope_scaling *s = &c->rope_scaling;
    long double base = c->rope_theta, e = c->head_dim;
    if (s->kind == LLMPAR_ROPE_DYNAMIC) {
        long double length = positions > c->max_positions ? positions : c->max_positions;
        base *= powl(s->factor * length / c->max_positions - (s->factor - 1), e / (e - 2));
    }
    long double f = 1 / powl(base, 2.0L * i / c->head_dim), wavelength = 2 * acosl(-1) / f, smooth;
    if (s->kind == LLMPAR_ROPE_DYNAMIC) return f;
    if (s->kind == LLMPAR_ROPE_YARN) {
        long double low = e * logl(s->original_max_positions / (s->beta_fast * 2 * acosl(-1))) / (2 * logl(base)), high = e * logl(s->original_max_positions / (s->beta_slow * 2 * acosl(-1))) / (2 * logl(base));
        low = fmaxl(s->truncate ? floorl(low) : low, 0);
        high = fminl(s->truncate ? ceill(high) : high, e - 1);
        if (low == high) high += 0.001L;
        smooth = fminl(fmaxl((i - low) / (high - low), 0), 1);
        return f / s->factor * smooth + f * (1 - smooth);
    }
    if (s->kind == LLMPAR_ROPE_LINEAR) return f / (long double)s->factor;
    if (s->kind == LLMPAR_ROPE_NONE || wavelength < s->original_max_positions / (long double)s->high_freq_factor) return f;
    if (wavelength > s->original_max_positions / (long double)s->low_freq_factor) return f / (long double)s->factor;
    smooth = (s->original_max_positions / wavelength - (long double)s->low_freq_factor) / (long double)(s->high_freq_factor - s->low_freq_factor);
    return (1 - smooth) * f / (long double)s->factor + smooth * f;
}

TEST(rope_frequencies)
{
    llmpar_llama_config c;
    double out[64], plain[64];
    for (int kind = 0; kind < 5; kind++)
        for (int variant = 0; variant < 6; variant++) {
            static const int64_t positions[] = { 1, 2048, 2049, 5000, 100000, 2048 };
            CHECK_OK(llmpar_llama_preset("1b", &c, NULL));
            c.max_positions = 2048;
            c.rope_theta = variant & 1 ? 10000 : 500000;
            c.rope_scaling.kind = (llmpar_rope_kind)kind;
            c.rope_scaling.truncate = variant > 2;
            c.rope_scaling.beta_fast = variant == 4 ? 2 : 32;
            c.rope_scaling.beta_slow = variant == 4 ? 2 : 1;
            c.rope_scaling.attention_factor = 1;
            if (kind == LLMPAR_ROPE_YARN) c.rope_scaling.original_max_positions = variant == 2 ? 4 : variant == 5 ? 1 << 28 : 8192; /* both bounds beyond the dims, either way */
            CHECK_OK(llmpar_llama_config_check(&c, NULL));
            llmpar_rope_inv_freq(&c, positions[variant], out);
            c.rope_scaling.kind = LLMPAR_ROPE_NONE;
            llmpar_rope_inv_freq(&c, positions[variant], plain);
            c.rope_scaling.kind = (llmpar_rope_kind)kind;
            for (int i = 0; i < c.head_dim / 2; i++) {
                long double want = reference_inv_freq(&c, positions[variant], i);
                CHECK_NEAR(out[i], (double)want, 4e-14 * (double)want);
                if (kind == LLMPAR_ROPE_DYNAMIC && positions[variant] <= 2048) CHECK(out[i] == plain[i]);
                if (kind == LLMPAR_ROPE_DYNAMIC && positions[variant] > 2048 && i) CHECK(out[i] < plain[i]);
            }
        }
}

TEST(rope_tables_are_exact)
{
    enum { POSITIONS = 300 };
    llmpar_llama_config c;
    double *cosine, *sine, inv_freq[64];
    float *cosine32, *sine32;
    int i, p;
    CHECK_OK(llmpar_llama_preset("1b", &c, NULL));
    cosine = (double *)malloc(sizeof(double) * POSITIONS * 32); sine = (double *)malloc(sizeof(double) * POSITIONS * 32);
    cosine32 = (float *)malloc(sizeof(float) * POSITIONS * 32); sine32 = (float *)malloc(sizeof(float) * POSITIONS * 32);
    llmpar_rope_inv_freq(&c, 1, inv_freq);
    CHECK_OK(llmpar_rope_tables(ready(), &c, POSITIONS, LLMPAR_F64, cosine, sine, NULL));
    CHECK_OK(llmpar_rope_tables(ready(), &c, POSITIONS, LLMPAR_F32, cosine32, sine32, NULL));
    for (p = 0; p < POSITIONS; p++)
        for (i = 0; i < 32; i++) {
            CHECK_NEAR(cosine[p * 32 + i], cos(p * inv_freq[i]), 4e-16);
            CHECK_NEAR(sine[p * 32 + i], sin(p * inv_freq[i]), 4e-16);
            CHECK(cosine32[p * 32 + i] == (float)cosine[p * 32 + i] && sine32[p * 32 + i] == (float)sine[p * 32 + i]);
        }
    for (i = 0; i < 32; i++) CHECK(cosine[i] == 1 && sine[i] == 0);
    c.rope_scaling.kind = LLMPAR_ROPE_YARN; c.rope_scaling.attention_factor = 1.25; c.rope_scaling.beta_fast = 32; c.rope_scaling.beta_slow = 1;
    llmpar_rope_inv_freq(&c, POSITIONS, inv_freq);
    CHECK_OK(llmpar_rope_tables(ready(), &c, POSITIONS, LLMPAR_F64, cosine, sine, NULL));
    for (p = 0; p < POSITIONS; p++)
        for (i = 0; i < 32; i++) {
            CHECK_NEAR(cosine[p * 32 + i], 1.25 * cos(p * inv_freq[i]), 1e-15);
            CHECK_NEAR(sine[p * 32 + i], 1.25 * sin(p * inv_freq[i]), 1e-15);
        }
    llmpar_error_clear(&err);
    CHECK_STATUS(llmpar_rope_tables(ready(), &c, 1, LLMPAR_BF16, cosine, sine, &err), LLMPAR_ERR_ARGUMENT);
    CHECK_TEXT(err.text, "dtype = bf16, expected f32 or f64");
    CHECK_STATUS(llmpar_rope_tables(ready(), &c, -1, LLMPAR_F32, cosine, sine, NULL), LLMPAR_ERR_ARGUMENT);
    CHECK_OK(llmpar_rope_tables(ready(), &c, 0, LLMPAR_F32, NULL, NULL, NULL));
    free(cosine); free(sine); free(cosine32); free(sine32);
    CHECK_INT(heap.live, 0);
}

static char *read_file(const char *path, size_t *length)
{
    FILE *f = fopen(path, "rb");
    char *text = (char *)malloc(1 << 20);
    if (!f) { TEST_FAIL("cannot open %s", path); *length = 0; return text; }
    *length = fread(text, 1, 1 << 20, f);
    fclose(f);
    return text;
}

TEST(rope_as_transformers_prints_it)
{
    TEST_DATA(path, "numerics/llama3_inv_freq.json");
    size_t length;
    char *text = read_file(path, &length);
    llmpar_json *root = NULL;
    const llmpar_json *value;
    llmpar_llama_config c;
    double out[64];
    int i = 0;
    CHECK_OK(llmpar_json_parse(ready(), text, length, NULL, &root, NULL));
    CHECK_OK(llmpar_llama_preset("1b", &c, NULL));
    c.head_dim = (int32_t)llmpar_json_get(root, "head_dim")->integer;
    c.rope_theta = llmpar_json_get(root, "rope_theta")->number;
    value = llmpar_json_get(root, "rope_scaling");
    c.rope_scaling.factor = llmpar_json_get(value, "factor")->number;
    c.rope_scaling.low_freq_factor = llmpar_json_get(value, "low_freq_factor")->number;
    c.rope_scaling.high_freq_factor = llmpar_json_get(value, "high_freq_factor")->number;
    c.rope_scaling.original_max_positions = (int32_t)llmpar_json_get(value, "original_max_position_embeddings")->integer;
    CHECK_INT(c.head_dim, 128);
    llmpar_rope_inv_freq(&c, 1, out);
    /* five digits are printed */
    for (value = llmpar_json_get(root, "inv_freq")->child; value; value = value->next, i++) CHECK_NEAR(out[i], value->number, 5.1e-5 * value->number);
    CHECK_INT(i, 64);
    llmpar_json_destroy(ready(), root);
    free(text);
    CHECK_INT(heap.live, 0);
}

TEST(reads_a_real_config)
{
    TEST_DATA(path, "stories260K/hf/config.json");
    size_t length;
    char *text = read_file(path, &length);
    llmpar_llama_config c;
    llmpar_error_clear(&err);
    if (llmpar_llama_config_parse(ready(), text, length, path, &c, &err)) TEST_FAIL("%s", err.text);
    CHECK_INT(c.vocab, 512); CHECK_INT(c.hidden, 64); CHECK_INT(c.heads, 8); CHECK_INT(c.kv_heads, 4); CHECK_INT(c.head_dim, 8); CHECK_INT(c.tied, 1);
    CHECK_INT(llmpar_llama_param_count(&c) * 4 + 0, 260032 * 4);
    free(text);
    CHECK_INT(heap.live, 0);
}

/* config.json as transformers 5 writes it (rope_parameters), its frequencies in float64, and its number of weights: tests/golden/README.md. */
TEST(reads_what_transformers_writes)
{
    static const struct { const char *name; llmpar_family family; llmpar_rope_kind rope; int tied, head_dim, window; } want[] = {
        { "llama3_untied", LLMPAR_FAMILY_LLAMA, LLMPAR_ROPE_LLAMA3, 0, 8, 0 }, { "linear_tied", LLMPAR_FAMILY_LLAMA, LLMPAR_ROPE_LINEAR, 1, 6, 0 }, { "qwen2_yarn", LLMPAR_FAMILY_QWEN2, LLMPAR_ROPE_YARN, 0, 8, 0 },
        { "qwen3_dynamic", LLMPAR_FAMILY_QWEN3, LLMPAR_ROPE_DYNAMIC, 1, 8, 0 }, { "mistral_window", LLMPAR_FAMILY_MISTRAL, LLMPAR_ROPE_NONE, 0, 6, 24 } };
    int k;
    for (k = 0; k < 5; k++) {
        char path[256], *text;
        size_t length;
        llmpar_llama_config c;
        llmpar_json *root = NULL;
        const llmpar_json *value;
        llmpar_safetensors *file = NULL;
        double out[64];
        int64_t elements, total = 0;
        int i = 0;
        snprintf(path, sizeof path, "tests/golden/%s/config.json", want[k].name);
        text = read_file(path, &length);
        llmpar_error_clear(&err);
        if (llmpar_llama_config_parse(ready(), text, length, path, &c, &err)) TEST_FAIL("%s", err.text);
        free(text);
        CHECK_INT(c.family, want[k].family); CHECK_INT(c.rope_scaling.kind, want[k].rope); CHECK_INT(c.tied, want[k].tied); CHECK_INT(c.head_dim, want[k].head_dim); CHECK_INT(c.sliding_window, want[k].window);
        snprintf(path, sizeof path, "tests/golden/%s/expected.json", want[k].name);
        text = read_file(path, &length);
        CHECK_OK(llmpar_json_parse(ready(), text, length, NULL, &root, NULL));
        llmpar_rope_inv_freq(&c, 24, out);
        for (value = llmpar_json_get(root, "inv_freq")->child; value; value = value->next, i++) CHECK_NEAR(out[i], value->number, 1e-14 * value->number);
        CHECK_INT(i, c.head_dim / 2);
        value = llmpar_json_get(root, "attention_factor");
        CHECK_NEAR(c.rope_scaling.kind == LLMPAR_ROPE_YARN ? c.rope_scaling.attention_factor : 1, value ? value->number : 0, 1e-15);
        llmpar_json_destroy(&heap, root);
        free(text);
        snprintf(path, sizeof path, "tests/golden/%s/model.safetensors", want[k].name);
        CHECK_OK(llmpar_safetensors_open(ready(), NULL, path, &file, NULL));
        for (i = 0; file && i < file->count; i++) {
            CHECK(llmpar_extent_product(file->tensor[i].shape, file->tensor[i].dims, &elements));
            total += elements;
        }
        llmpar_safetensors_close(file);
        CHECK_INT(llmpar_llama_param_count(&c), total);
    }
    CHECK_INT(heap.live, 0);
}

TEST_LIST(T_(presets), T_(counts), T_(reads_fields_and_defaults), T_(reads_rope), T_(reads_families), T_(reads_yarn), T_(refuses), T_(refuses_wrong_documents), T_(out_of_memory), T_(checks_structs),
          T_(writes_what_it_reads), T_(rope_frequencies), T_(rope_tables_are_exact), T_(rope_as_transformers_prints_it), T_(reads_a_real_config), T_(reads_what_transformers_writes))
