#include "model/config.h"
#include "base/json.h"
#include "base/math.h"
#include "base/size.h"
#include "base/text_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if !defined(LLMPAR_NO_LLAMA)

/* ---- presets ---- */

/* vocab, hidden, intermediate, layers, heads, kv_heads, head_dim, max_positions, eps, theta, {kind, original, factor, low, high, attention, fast, slow, truncate}, tied, bos, eos_count, {eos}, init_std, family, window */
static const struct { const char *name; llmpar_llama_config config; } llmpar__config_presets[] = {
    { "tiny", { 256, 128, 384, 4, 8, 4, 16, 1024, 1e-5, 10000.0, { LLMPAR_ROPE_NONE, 0, 0, 0, 0, 0, 0, 0, 0 }, 0, -1, 0, { 0 }, 0.02, LLMPAR_FAMILY_LLAMA, 0 } },
    { "15m", { 32000, 288, 768, 6, 6, 6, 48, 256, 1e-5, 10000.0, { LLMPAR_ROPE_NONE, 0, 0, 0, 0, 0, 0, 0, 0 }, 1, 1, 1, { 2 }, 0.02, LLMPAR_FAMILY_LLAMA, 0 } },
    { "110m", { 32000, 768, 2048, 12, 12, 12, 64, 1024, 1e-5, 10000.0, { LLMPAR_ROPE_NONE, 0, 0, 0, 0, 0, 0, 0, 0 }, 1, 1, 1, { 2 }, 0.02, LLMPAR_FAMILY_LLAMA, 0 } },
    { "300m", { 32000, 1024, 3072, 20, 16, 16, 64, 1024, 1e-5, 10000.0, { LLMPAR_ROPE_NONE, 0, 0, 0, 0, 0, 0, 0, 0 }, 1, 1, 1, { 2 }, 0.02, LLMPAR_FAMILY_LLAMA, 0 } },
    { "1b", { 128256, 2048, 8192, 16, 32, 8, 64, 131072, 1e-5, 500000.0, { LLMPAR_ROPE_LLAMA3, 8192, 32.0, 1.0, 4.0, 0, 0, 0, 0 }, 1, 128000, 1, { 128001 }, 0.02, LLMPAR_FAMILY_LLAMA, 0 } }
};
#define LLMPAR__CONFIG_PRESETS (sizeof llmpar__config_presets / sizeof llmpar__config_presets[0])

LLMPAR_DEF llmpar_status llmpar_llama_preset(const char *name, llmpar_llama_config *out, llmpar_error *error)
{
    char list[200];
    size_t i, used = 0;
    memset(out, 0, sizeof *out);
    for (i = 0; i < LLMPAR__CONFIG_PRESETS; i++) {
        if (name && !strcmp(name, llmpar__config_presets[i].name)) {
            *out = llmpar__config_presets[i].config;
            return LLMPAR_OK;
        }
        used += (size_t)snprintf(list + used, sizeof list - used, "%s%s", i == 0 ? "" : i + 1 == LLMPAR__CONFIG_PRESETS ? " or " : ", ", llmpar__config_presets[i].name);
    }
    return llmpar_error_set(error, LLMPAR_ERR_CONFIG, "llama preset: \"%.100s\" is unknown, expected %s", name ? name : "", list);
}

/* ---- families: what transformers' configuration classes differ in ---- */

typedef struct llmpar__config_family { const char *type, *architecture; int32_t kv_heads, head_dim, max_positions, ids, window; } llmpar__config_family; /* defaults: 0: derived; ids 1: bos 1 and eos 2, 0: none */
static const llmpar__config_family llmpar__config_families[] = {
    { "llama", "LlamaForCausalLM", 0, 0, 2048, 1, 0 },
    { "mistral", "MistralForCausalLM", 8, 0, 131072, 1, 4096 },
    { "qwen2", "Qwen2ForCausalLM", 32, 0, 32768, 0, 0 },
    { "qwen3", "Qwen3ForCausalLM", 32, 128, 32768, 0, 0 }
};
enum { LLMPAR__CONFIG_FAMILIES = 4 };
static const char *const llmpar__config_rope_types[] = { "default", "linear", "llama3", "dynamic", "yarn" };
enum { LLMPAR__CONFIG_ROPE_TYPES = 5 };

/* ---- checking: one pass finds the fault, callers say where it stands ---- */

/* What is wrong: the field by its name in config.json, and the rest of the sentence. */
typedef struct llmpar__config_fault { const char *field; char text[320]; } llmpar__config_fault;

static int llmpar__config_say_range(llmpar__config_fault *f, const char *field, int64_t value, int64_t low, int64_t high)
{
    if (value >= low && value <= high) return 0;
    f->field = field;
    snprintf(f->text, sizeof f->text, "%s = %lld, expected an integer from %lld to %lld", field, (long long)value, (long long)low, (long long)high);
    return 1;
}

static int llmpar__config_say_real(llmpar__config_fault *f, const char *field, double value, int good, const char *expected)
{
    if (good && llmpar_isfinite_f64(value)) return 0;
    f->field = field;
    snprintf(f->text, sizeof f->text, "%s = %g, expected %s", field, value, expected);
    return 1;
}

/* Limits are far above any model; they make sure that products of two or three of them fit in 64 bits. */
static const int64_t llmpar__config_max_head_dim = 1 << 14, llmpar__config_max_positions = 1 << 29, llmpar__config_max_params = (int64_t)1 << 53;

static int llmpar__config_find_rope_fault(const llmpar_llama_config *c, llmpar__config_fault *f)
{
    const llmpar_rope_scaling *s = &c->rope_scaling;
    if (s->kind == LLMPAR_ROPE_NONE) return 0;
    if ((int)s->kind < 0 || (int)s->kind >= LLMPAR__CONFIG_ROPE_TYPES) {
        f->field = "rope_type";
        snprintf(f->text, sizeof f->text, "rope_scaling kind = %d, expected none, linear, llama3, dynamic or yarn", (int)s->kind);
        return 1;
    }
    if (llmpar__config_say_real(f, "factor", s->factor, s->factor >= 1 && s->factor <= 1e6, "a number from 1 to 1e6")) return 1;
    if (s->kind == LLMPAR_ROPE_LINEAR) return 0;
    if (s->kind == LLMPAR_ROPE_DYNAMIC) return llmpar__config_say_range(f, "head_dim", c->head_dim, 4, llmpar__config_max_head_dim); /* its exponent is E / (E - 2) */
    if (s->kind == LLMPAR_ROPE_YARN) {
        if (llmpar__config_say_real(f, "attention_factor", s->attention_factor, s->attention_factor > 0 && s->attention_factor <= 1e6, "a number above 0, at most 1e6")
            || llmpar__config_say_real(f, "beta_slow", s->beta_slow, s->beta_slow > 0 && s->beta_slow <= 1e6, "a number above 0, at most 1e6")
            || llmpar__config_say_real(f, "beta_fast", s->beta_fast, s->beta_fast >= s->beta_slow && s->beta_fast <= 1e6, "a number from beta_slow to 1e6")
            || llmpar__config_say_real(f, "rope_theta", c->rope_theta, c->rope_theta > 1, "a number above 1 under yarn")
            || llmpar__config_say_range(f, "truncate", s->truncate, 0, 1)) return 1;
    } else if (llmpar__config_say_real(f, "low_freq_factor", s->low_freq_factor, s->low_freq_factor > 0, "a positive number")
               || llmpar__config_say_real(f, "high_freq_factor", s->high_freq_factor, s->high_freq_factor > s->low_freq_factor, "a number above low_freq_factor")) return 1;
    return llmpar__config_say_range(f, "original_max_position_embeddings", s->original_max_positions, 1, llmpar__config_max_positions);
}

static int64_t llmpar__config_layer_params(const llmpar_llama_config *c)
{
    int64_t d = c->hidden, q = (int64_t)c->heads * c->head_dim, kv = (int64_t)c->kv_heads * c->head_dim;
    return 2 * d * q + 2 * d * kv + 3 * d * c->intermediate + 2 * d + (c->family == LLMPAR_FAMILY_QWEN2 ? q + 2 * kv : 0) + (c->family == LLMPAR_FAMILY_QWEN3 ? 2 * (int64_t)c->head_dim : 0);
}

static int llmpar__config_find_fault(const llmpar_llama_config *c, llmpar__config_fault *f)
{
    if (llmpar__config_say_range(f, "family", (int64_t)c->family, 0, LLMPAR__CONFIG_FAMILIES - 1)
        || llmpar__config_say_range(f, "sliding_window", c->sliding_window, 0, c->family == LLMPAR_FAMILY_MISTRAL ? INT32_MAX : 0)
        || llmpar__config_say_range(f, "vocab_size", c->vocab, 1, 1 << 24)
        || llmpar__config_say_range(f, "hidden_size", c->hidden, 1, 1 << 20)
        || llmpar__config_say_range(f, "intermediate_size", c->intermediate, 1, 1 << 22)
        || llmpar__config_say_range(f, "num_hidden_layers", c->layers, 1, 1 << 16)
        || llmpar__config_say_range(f, "num_attention_heads", c->heads, 1, 1 << 16)
        || llmpar__config_say_range(f, "num_key_value_heads", c->kv_heads, 1, c->heads)) return 1;
    if (c->heads % c->kv_heads) {
        f->field = "num_attention_heads";
        snprintf(f->text, sizeof f->text, "num_attention_heads = %d is not divisible by num_key_value_heads = %d", (int)c->heads, (int)c->kv_heads);
        return 1;
    }
    if (llmpar__config_say_range(f, "head_dim", c->head_dim, 2, llmpar__config_max_head_dim)) return 1;
    if (c->head_dim % 2) {
        f->field = "head_dim";
        snprintf(f->text, sizeof f->text, "head_dim = %d, expected an even number (rotary position embedding turns pairs)", (int)c->head_dim);
        return 1;
    }
    if (llmpar__config_say_range(f, "max_position_embeddings", c->max_positions, 1, llmpar__config_max_positions)
        || llmpar__config_say_real(f, "rms_norm_eps", c->rms_eps, c->rms_eps > 0 && c->rms_eps <= 1, "a number above 0, at most 1")
        || llmpar__config_say_real(f, "rope_theta", c->rope_theta, c->rope_theta >= 1 && c->rope_theta <= 1e15, "a number from 1 to 1e15")
        || llmpar__config_find_rope_fault(c, f)
        || llmpar__config_say_range(f, "tie_word_embeddings", c->tied, 0, 1)
        || llmpar__config_say_range(f, "bos_token_id", c->bos_id, -1, c->vocab - 1)
        || llmpar__config_say_range(f, "eos_token_id count", c->eos_count, 0, LLMPAR_MAX_EOS)) return 1;
    for (int32_t i = 0; i < c->eos_count; i++)
        if (llmpar__config_say_range(f, "eos_token_id", c->eos_id[i], 0, c->vocab - 1)) return 1;
    if (llmpar__config_say_real(f, "initializer_range", c->init_std, c->init_std >= 0 && c->init_std <= 1, "a number from 0 to 1")) return 1;
    /* One layer alone fits in 64 bits at these limits, all layers may not. */
    int64_t params = llmpar__config_layer_params(c);
    if (params > llmpar__config_max_params / c->layers || llmpar_llama_param_count(c) > llmpar__config_max_params) {
        f->field = "num_hidden_layers";
        snprintf(f->text, sizeof f->text, "num_hidden_layers = %d, layers of %lld parameters, expected at most %lld in all", (int)c->layers, (long long)params, (long long)llmpar__config_max_params);
        return 1;
    }
    return 0;
}

LLMPAR_DEF llmpar_status llmpar_llama_config_check(const llmpar_llama_config *config, llmpar_error *error)
{
    LLMPAR__NEED(config, error);
    llmpar__config_fault fault;
    if (!llmpar__config_find_fault(config, &fault)) return LLMPAR_OK;
    return llmpar_error_set(error, LLMPAR_ERR_CONFIG, "llama config: %s", fault.text);
}

/* ---- reading config.json ---- */

typedef struct llmpar__config_reader {
    const char *name;        /* for messages */
    const char *text;
    size_t length;
    const llmpar_json *root;
    llmpar_error *error;
} llmpar__config_reader;

/* The value as it stands in the text, cut to `capacity`. */
static const char *llmpar__config_excerpt(const llmpar__config_reader *r, const llmpar_json *value, char *out, size_t capacity)
{
    size_t i = 0, at = value->position;
    char open = at < r->length ? r->text[at] : 0;
    if (value->type == LLMPAR_JSON_ARRAY || value->type == LLMPAR_JSON_OBJECT) {
        snprintf(out, capacity, "%s", open == '[' ? "an array" : "an object");
        return out;
    }
    while (at + i < r->length && i + 1 < capacity) {
        char c = r->text[at + i];
        if (open == '"' ? i > 0 && c == '"' && r->text[at + i - 1] != '\\' : strchr(" \t\r\n,]}", c) != NULL) {
            if (open == '"') out[i++] = c;
            break;
        }
        out[i++] = c;
    }
    out[i] = 0;
    return out;
}

/* Its arguments end with the position. */
#define LLMPAR__CONFIG_BAD(code, format, ...) llmpar_error_set(r->error, LLMPAR_ERR_##code, "%s: " format " (byte %zu)", r->name, __VA_ARGS__)

static llmpar_status llmpar__config_wrong(const llmpar__config_reader *r, llmpar_status status, const llmpar_json *value, const char *expected)
{
    char excerpt[80];
    return llmpar_error_set(r->error, status, "%s: %.80s = %s, expected %s (byte %zu)", r->name, value->key, llmpar__config_excerpt(r, value, excerpt, sizeof excerpt), expected, value->position);
}

/* An integer field. NULL value: `missing` if that is allowed, else an error. */
static llmpar_status llmpar__config_int(const llmpar__config_reader *r, const llmpar_json *object, const char *key, int null_is_missing, int required, int32_t missing, int32_t *out)
{
    const llmpar_json *value = llmpar_json_get(object, key);
    *out = missing;
    if (!value || (null_is_missing && value->type == LLMPAR_JSON_NULL)) {
        if (!required) return LLMPAR_OK;
        return LLMPAR__CONFIG_BAD(CONFIG, "%s is missing", key, object->position);
    }
    if (value->type != LLMPAR_JSON_NUMBER || !value->is_integer || value->integer < INT32_MIN || value->integer > INT32_MAX)
        return llmpar__config_wrong(r, LLMPAR_ERR_CONFIG, value, "an integer from 1 to 2147483647");
    *out = (int32_t)value->integer;
    return LLMPAR_OK;
}

static llmpar_status llmpar__config_real(const llmpar__config_reader *r, const llmpar_json *object, const char *key, int required, double missing, double *out)
{
    const llmpar_json *value = llmpar_json_get(object, key);
    *out = missing;
    if (!value) {
        if (!required) return LLMPAR_OK;
        return LLMPAR__CONFIG_BAD(CONFIG, "%s is missing from %s", key, object->key ? object->key : "the object", object->position);
    }
    if (value->type != LLMPAR_JSON_NUMBER) return llmpar__config_wrong(r, LLMPAR_ERR_CONFIG, value, "a number");
    *out = value->number;
    return LLMPAR_OK;
}

static int llmpar__config_is_text(const llmpar_json *value, const char *text)
{
    return value && value->type == LLMPAR_JSON_STRING && value->length == strlen(text) && !memcmp(value->string, text, value->length);
}

/* Fields of transformers' Llama and of its relatives that change what is computed: the one value that is built. An absent field and null always mean that behaviour. */
static const struct { const char *field, *only; } llmpar__config_fixed[] = {
    { "mlp_bias", "false" }, { "attention_dropout", "0" }, { "use_sliding_window", "false" }, { "quantization_config", "null" }, { "partial_rotary_factor", "1" }, { "is_causal", "true" },
    { "use_bidirectional_attention", "false" }, { "add_cross_attention", "false" }, { "is_encoder_decoder", "false" }, { "auto_map", "null" }, { "no_rope_layers", "null" }, { "num_experts", "null" },
    { "num_local_experts", "null" }, { "use_qk_norm", "false" }, { "qk_layernorm", "false" }, { "attn_logit_softcapping", "null" }, { "final_logit_softcapping", "null" },
    { "embedding_multiplier", "1" }, { "residual_multiplier", "1" }, { "attention_multiplier", "null" }, { "logits_scaling", "1" }, { "logit_scale", "1" }
};

static llmpar_status llmpar__config_check_only(const llmpar__config_reader *r, const llmpar_json *value, const char *only)
{
    char expected[48];
    if (!value || value->type == LLMPAR_JSON_NULL) return LLMPAR_OK;
    if (value->type == LLMPAR_JSON_BOOL && !strcmp(only, value->boolean ? "true" : "false")) return LLMPAR_OK;
    if (value->type == LLMPAR_JSON_NUMBER && !only[1] && value->number == only[0] - '0') return LLMPAR_OK; /* a digit */
    snprintf(expected, sizeof expected, "%s%s: nothing else is supported", only, strcmp(only, "null") ? " or null" : "");
    return llmpar__config_wrong(r, LLMPAR_ERR_UNSUPPORTED, value, expected);
}

/* Model type and architecture say the family, and the same one. */
static llmpar_status llmpar__config_read_family(const llmpar__config_reader *r, llmpar_llama_config *c)
{
    const llmpar_json *type = llmpar_json_get(r->root, "model_type"), *architectures = llmpar_json_get(r->root, "architectures"), *only;
    int32_t f;
    if (architectures && architectures->type == LLMPAR_JSON_NULL) architectures = NULL;
    only = architectures && architectures->type == LLMPAR_JSON_ARRAY && architectures->length == 1 ? architectures->child : NULL;
    if (!type && !architectures) return LLMPAR__CONFIG_BAD(CONFIG, "model_type is missing, expected \"llama\", \"mistral\", \"qwen2\" or \"qwen3\"", r->root->position);
    for (f = 0; f < LLMPAR__CONFIG_FAMILIES; f++)
        if (type ? llmpar__config_is_text(type, llmpar__config_families[f].type) : llmpar__config_is_text(only, llmpar__config_families[f].architecture)) break;
    if (type && f == LLMPAR__CONFIG_FAMILIES) return llmpar__config_wrong(r, LLMPAR_ERR_UNSUPPORTED, type, "\"llama\", \"mistral\", \"qwen2\" or \"qwen3\"");
    if (architectures && (f == LLMPAR__CONFIG_FAMILIES || !llmpar__config_is_text(only, llmpar__config_families[f].architecture))) {
        char excerpt[80];
        llmpar__config_excerpt(r, only ? only : architectures, excerpt, sizeof excerpt);
        return LLMPAR__CONFIG_BAD(UNSUPPORTED, "architectures = %s%s%s, expected [\"%s\"]%s", only ? "[" : "", excerpt, only ? "]" : "", llmpar__config_families[type ? f : 0].architecture,
                                type ? "" : ", or Mistral, Qwen2 or Qwen3 in its place", architectures->position);
    }
    c->family = (llmpar_family)f;
    return LLMPAR_OK;
}

static llmpar_status llmpar__config_read_identity(const llmpar__config_reader *r, llmpar_llama_config *c)
{
    const llmpar_json *activation = llmpar_json_get(r->root, "hidden_act"), *window = llmpar_json_get(r->root, "sliding_window"), *layers = llmpar_json_get(r->root, "layer_types"), *layer;
    llmpar_status status = llmpar__config_read_family(r, c);
    /* transformers knows silu by the name of swish too. */
    if (!status && activation && !llmpar__config_is_text(activation, "silu") && !llmpar__config_is_text(activation, "swish"))
        status = llmpar__config_wrong(r, LLMPAR_ERR_UNSUPPORTED, activation, "\"silu\"");
    for (size_t i = 0; !status && i < sizeof llmpar__config_fixed / sizeof llmpar__config_fixed[0]; i++)
        status = llmpar__config_check_only(r, llmpar_json_get(r->root, llmpar__config_fixed[i].field), llmpar__config_fixed[i].only);
    /* Qwen2 has its biases whatever this says; elsewhere it would put one on the output projection too. */
    if (!status && c->family != LLMPAR_FAMILY_QWEN2) status = llmpar__config_check_only(r, llmpar_json_get(r->root, "attention_bias"), "false");
    /* Without use_sliding_window a Qwen has none. */
    if (!status && c->family == LLMPAR_FAMILY_LLAMA) status = llmpar__config_check_only(r, window, "null");
    if (!status && c->family == LLMPAR_FAMILY_MISTRAL && !(window && window->type == LLMPAR_JSON_NULL)) {
        status = llmpar__config_int(r, r->root, "sliding_window", 0, 0, llmpar__config_families[c->family].window, &c->sliding_window);
        if (!status && c->sliding_window < 1) status = llmpar__config_wrong(r, LLMPAR_ERR_CONFIG, window, "an integer from 1 to 2147483647, or null");
    }
    if (status || !layers || layers->type == LLMPAR_JSON_NULL) return status;
    if (layers->type != LLMPAR_JSON_ARRAY) return llmpar__config_wrong(r, LLMPAR_ERR_UNSUPPORTED, layers, "an array of \"full_attention\", or null");
    for (layer = layers->child; layer; layer = layer->next)
        if (!llmpar__config_is_text(layer, "full_attention")) {
            char excerpt[80];
            return LLMPAR__CONFIG_BAD(UNSUPPORTED, "layer_types has %s, expected \"full_attention\" alone", llmpar__config_excerpt(r, layer, excerpt, sizeof excerpt), layer->position);
        }
    return LLMPAR_OK;
}

static llmpar_status llmpar__config_read_sizes(const llmpar__config_reader *r, llmpar_llama_config *c)
{
    const llmpar__config_family *family = &llmpar__config_families[c->family];
    const llmpar_json *root = r->root, *heads = llmpar_json_get(root, "num_attention_heads"), *kv_heads = llmpar_json_get(root, "num_key_value_heads"), *layers = llmpar_json_get(root, "layer_types");
    llmpar_status status = llmpar__config_int(r, root, "vocab_size", 0, 1, 0, &c->vocab);
    if (!status) status = llmpar__config_int(r, root, "hidden_size", 0, 1, 0, &c->hidden);
    if (!status) status = llmpar__config_int(r, root, "intermediate_size", 0, 1, 0, &c->intermediate);
    if (!status) status = llmpar__config_int(r, root, "num_hidden_layers", 0, 1, 0, &c->layers);
    if (!status) status = llmpar__config_int(r, root, "num_attention_heads", 0, 1, 0, &c->heads);
    if (status) return status;
    if (c->heads <= 0) return llmpar__config_wrong(r, LLMPAR_ERR_CONFIG, heads, "a positive integer");
    if (layers && layers->type == LLMPAR_JSON_ARRAY && (int64_t)layers->length != c->layers)
        return LLMPAR__CONFIG_BAD(CONFIG, "layer_types has %zu entries, expected one for each of the %d layers", layers->length, (int)c->layers, layers->position);
    status = llmpar__config_int(r, root, "num_key_value_heads", 1, 0, kv_heads || !family->kv_heads ? c->heads : family->kv_heads, &c->kv_heads);
    if (!status) status = llmpar__config_int(r, root, "head_dim", !family->head_dim, 0, family->head_dim, &c->head_dim);
    if (!status) status = llmpar__config_int(r, root, "max_position_embeddings", 0, 0, family->max_positions, &c->max_positions);
    if (status) return status;
    if (!family->head_dim && (!llmpar_json_get(root, "head_dim") || llmpar_json_get(root, "head_dim")->type == LLMPAR_JSON_NULL)) {
        if (c->hidden > 0 && c->hidden % c->heads)
            return LLMPAR__CONFIG_BAD(CONFIG, "num_attention_heads = %d does not divide hidden_size = %d, and head_dim is missing", (int)c->heads, (int)c->hidden, heads->position);
        c->head_dim = c->hidden / c->heads;
    }
    return LLMPAR_OK;
}

/* A field of config.json's top level as a token id: null (or the -1 that some writers use) means none. */
static llmpar_status llmpar__config_read_id(const llmpar__config_reader *r, const llmpar_llama_config *c, const char *key, const llmpar_json *value, int32_t *out)
{
    char excerpt[80];
    if (value->type == LLMPAR_JSON_NULL) {
        *out = -1;
        return LLMPAR_OK;
    }
    if (value->type != LLMPAR_JSON_NUMBER || !value->is_integer || value->integer < -1 || value->integer >= c->vocab)
        return LLMPAR__CONFIG_BAD(CONFIG, "%s = %s, expected a token id below vocab_size = %d, or null", key, llmpar__config_excerpt(r, value, excerpt, sizeof excerpt), (int)c->vocab, value->position);
    *out = (int32_t)value->integer;
    return LLMPAR_OK;
}

static llmpar_status llmpar__config_read_ids(const llmpar__config_reader *r, llmpar_llama_config *c)
{
    const llmpar_json *bos = llmpar_json_get(r->root, "bos_token_id"), *eos = llmpar_json_get(r->root, "eos_token_id"), *item;
    llmpar_status status = LLMPAR_OK;
    int32_t id = -1;
    int ids = llmpar__config_families[c->family].ids; /* transformers' defaults: 1 and 2, or none */
    c->bos_id = ids && c->vocab > 1 ? 1 : -1;
    if (bos) status = llmpar__config_read_id(r, c, "bos_token_id", bos, &c->bos_id);
    if (status) return status;
    c->eos_count = 0;
    if (!eos) {
        if (ids && c->vocab > 2) c->eos_id[c->eos_count++] = 2;
        return LLMPAR_OK;
    }
    if (eos->type == LLMPAR_JSON_ARRAY && eos->length > LLMPAR_MAX_EOS)
        return LLMPAR__CONFIG_BAD(UNSUPPORTED, "eos_token_id has %zu ids, at most %d are supported", eos->length, LLMPAR_MAX_EOS, eos->position);
    for (item = eos->type == LLMPAR_JSON_ARRAY ? eos->child : eos; item && !status; item = eos->type == LLMPAR_JSON_ARRAY ? item->next : NULL) {
        status = llmpar__config_read_id(r, c, "eos_token_id", item, &id);
        if (!status && id >= 0) c->eos_id[c->eos_count++] = id;
    }
    return status;
}

/* The kind of scaling, from "rope_type" or the older "type". */
static llmpar_status llmpar__config_read_rope_kind(const llmpar__config_reader *r, const llmpar_json *rope, llmpar_rope_kind *out)
{
    const llmpar_json *type = llmpar_json_get(rope, "rope_type"), *older = llmpar_json_get(rope, "type");
    if (type && older && (type->type != LLMPAR_JSON_STRING || older->type != LLMPAR_JSON_STRING || strcmp(type->string, older->string)))
        return llmpar__config_wrong(r, LLMPAR_ERR_CONFIG, older, "the same as rope_type");
    if (!type) type = older;
    if (!type) {
        /* {"rope_theta": ...} alone is how newer files write unscaled RoPE; parameters of a scaling without its name are a fault. */
        if (llmpar_json_get(rope, "factor"))
            return LLMPAR__CONFIG_BAD(CONFIG, "rope_type is missing from %s", rope->key, rope->position);
        *out = LLMPAR_ROPE_NONE;
        return LLMPAR_OK;
    }
    for (int i = 0; i < LLMPAR__CONFIG_ROPE_TYPES; i++) {
        *out = (llmpar_rope_kind)i;
        if (llmpar__config_is_text(type, llmpar__config_rope_types[i])) return LLMPAR_OK;
    }
    return llmpar__config_wrong(r, LLMPAR_ERR_UNSUPPORTED, type, "\"default\", \"linear\", \"llama3\", \"dynamic\" or \"yarn\"");
}

/* A positive number, or transformers' default where it is absent, null or 0. */
static llmpar_status llmpar__config_real_or(const llmpar__config_reader *r, const llmpar_json *object, const char *key, double missing, double *out)
{
    const llmpar_json *value = llmpar_json_get(object, key);
    llmpar_status status = LLMPAR_OK;
    *out = missing;
    if (value && value->type != LLMPAR_JSON_NULL) status = llmpar__config_real(r, object, key, 1, missing, out);
    if (!status && *out == 0) *out = missing;
    return status;
}

static double llmpar__config_mscale(double factor, double mscale) { return factor <= 1 ? 1.0 : 0.1 * mscale * llmpar_log_f64(factor) + 1.0; }

static llmpar_status llmpar__config_read_yarn(const llmpar__config_reader *r, const llmpar_json *rope, llmpar_llama_config *c)
{
    const llmpar_json *attention = llmpar_json_get(rope, "attention_factor"), *truncate = llmpar_json_get(rope, "truncate");
    llmpar_rope_scaling *s = &c->rope_scaling;
    double mscale, all;
    llmpar_status status = llmpar__config_real_or(r, rope, "beta_fast", 32, &s->beta_fast);
    if (!status) status = llmpar__config_real_or(r, rope, "beta_slow", 1, &s->beta_slow);
    if (!status) status = llmpar__config_real_or(r, rope, "mscale", 0, &mscale);
    if (!status) status = llmpar__config_real_or(r, rope, "mscale_all_dim", 0, &all);
    if (!status && truncate && truncate->type != LLMPAR_JSON_BOOL) status = llmpar__config_wrong(r, LLMPAR_ERR_CONFIG, truncate, "true or false");
    if (status) return status;
    s->truncate = truncate ? truncate->boolean : 1;
    if (attention && attention->type != LLMPAR_JSON_NULL) return llmpar__config_real(r, rope, "attention_factor", 1, 0, &s->attention_factor);
    s->attention_factor = mscale != 0 && all != 0 ? llmpar__config_mscale(s->factor, mscale) / llmpar__config_mscale(s->factor, all) : llmpar__config_mscale(s->factor, 1);
    return LLMPAR_OK;
}

/* rope_scaling (with rope_theta beside it) or rope_parameters (with rope_theta inside). */
static llmpar_status llmpar__config_read_rope(const llmpar__config_reader *r, llmpar_llama_config *c)
{
    static const char *const known[] = { "rope_type", "type", "factor", "rope_theta", "partial_rotary_factor", "attention_factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
                                         "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate" };
    enum { OLDER = 9 }; /* the rest is yarn's */
    const llmpar_json *scaling = llmpar_json_get(r->root, "rope_scaling"), *parameters = llmpar_json_get(r->root, "rope_parameters"), *member, *outside = llmpar_json_get(r->root, "original_max_position_embeddings");
    llmpar_rope_scaling *s = &c->rope_scaling;
    llmpar_status status = llmpar__config_real(r, r->root, "rope_theta", 0, 10000.0, &c->rope_theta);
    double theta = c->rope_theta;
    size_t i;
    if (status) return status;
    if (scaling && scaling->type == LLMPAR_JSON_NULL) scaling = NULL;
    if (parameters && parameters->type == LLMPAR_JSON_NULL) parameters = NULL;
    if (scaling && parameters)
        return llmpar_error_set(r->error, LLMPAR_ERR_CONFIG, "%s: both rope_scaling and rope_parameters are given, expected one (bytes %zu and %zu)", r->name, scaling->position, parameters->position);
    const llmpar_json *rope = scaling ? scaling : parameters;
    if (!rope) return LLMPAR_OK;
    if (rope->type != LLMPAR_JSON_OBJECT) return llmpar__config_wrong(r, LLMPAR_ERR_CONFIG, rope, "an object or null");
    status = llmpar__config_read_rope_kind(r, rope, &s->kind);
    for (member = rope->child; member && !status; member = member->next) {
        size_t most = s->kind == LLMPAR_ROPE_YARN ? sizeof known / sizeof known[0] : (size_t)OLDER;
        for (i = 0; i < most && strcmp(member->key, known[i]); i++) {}
        if (i == most)
            status = LLMPAR__CONFIG_BAD(UNSUPPORTED, "%s has an unknown field %.80s", rope->key, member->key, member->position);
    }
    if (!status) status = llmpar__config_check_only(r, llmpar_json_get(rope, "partial_rotary_factor"), "1");
    if (!status && s->kind != LLMPAR_ROPE_YARN) status = llmpar__config_check_only(r, llmpar_json_get(rope, "attention_factor"), "1");
    if (!status) status = llmpar__config_real(r, rope, "rope_theta", 0, theta, &c->rope_theta);
    if (status) return status;
    if (c->rope_theta != theta && llmpar_json_get(r->root, "rope_theta"))
        return LLMPAR__CONFIG_BAD(CONFIG, "rope_theta = %g contradicts %g in %s", theta, c->rope_theta, rope->key, llmpar_json_get(r->root, "rope_theta")->position);
    if (s->kind == LLMPAR_ROPE_NONE) return LLMPAR_OK;
    status = llmpar__config_real(r, rope, "factor", 1, 0, &s->factor);
    if (status || s->kind == LLMPAR_ROPE_LINEAR || s->kind == LLMPAR_ROPE_DYNAMIC) return status;
    if (s->kind == LLMPAR_ROPE_YARN) status = llmpar__config_read_yarn(r, rope, c);
    else status = llmpar__config_real(r, rope, "low_freq_factor", 1, 0, &s->low_freq_factor);
    if (!status && s->kind == LLMPAR_ROPE_LLAMA3) status = llmpar__config_real(r, rope, "high_freq_factor", 1, 0, &s->high_freq_factor);
    if (!status) status = llmpar__config_int(r, rope, "original_max_position_embeddings", 0, s->kind == LLMPAR_ROPE_LLAMA3, c->max_positions, &s->original_max_positions);
    /* Newer transformers let a field of this name outside the object win. */
    if (!status && outside && (outside->type != LLMPAR_JSON_NUMBER || outside->number != (double)s->original_max_positions))
        status = llmpar__config_wrong(r, LLMPAR_ERR_CONFIG, outside, "the value inside the rope object");
    return status;
}

static llmpar_status llmpar__config_read(const llmpar__config_reader *r, llmpar_llama_config *c)
{
    const llmpar_json *tie = llmpar_json_get(r->root, "tie_word_embeddings"), *place, *rope;
    llmpar__config_fault fault;
    if (r->root->type != LLMPAR_JSON_OBJECT) return LLMPAR__CONFIG_BAD(FORMAT, "expected an object", r->root->position);
    llmpar_status status = llmpar__config_read_identity(r, c);
    if (!status) status = llmpar__config_read_sizes(r, c);
    if (!status) status = llmpar__config_real(r, r->root, "rms_norm_eps", 0, 1e-6, &c->rms_eps);
    if (!status) status = llmpar__config_real(r, r->root, "initializer_range", 0, 0.02, &c->init_std);
    if (!status) status = llmpar__config_read_rope(r, c);
    if (!status && tie && tie->type != LLMPAR_JSON_BOOL) status = llmpar__config_wrong(r, LLMPAR_ERR_CONFIG, tie, "true or false");
    if (status) return status;
    c->tied = tie ? tie->boolean : 0;
    c->bos_id = -1;
    /* Sizes first: the range of a token id is only meaningful under a good vocabulary. */
    if (!llmpar__config_find_fault(c, &fault)) return llmpar__config_read_ids(r, c);
    rope = llmpar_json_get(r->root, "rope_scaling");
    if (!rope || rope->type == LLMPAR_JSON_NULL) rope = llmpar_json_get(r->root, "rope_parameters");
    place = llmpar_json_get(rope, fault.field);
    if (!place) place = llmpar_json_get(r->root, fault.field);
    if (!place) return llmpar_error_set(r->error, LLMPAR_ERR_CONFIG, "%s: %s (a default; byte %zu)", r->name, fault.text, r->root->position);
    return LLMPAR__CONFIG_BAD(CONFIG, "%s", fault.text, place->position);
}

LLMPAR_DEF llmpar_status llmpar_llama_config_parse(llmpar_heap *heap, const char *text, size_t length, const char *name, llmpar_llama_config *out, llmpar_error *error)
{
    llmpar_json *root = NULL;
    memset(out, 0, sizeof *out);
    LLMPAR__NEED(heap && text, error);
    LLMPAR__ZEROED(llmpar_json_desc, desc);
    desc.name = name ? name : "config.json";
    desc.unique_keys = 1;
    llmpar_status status = llmpar_json_parse(heap, text, length, &desc, &root, error);
    if (status) return status;
    const llmpar__config_reader reader = { desc.name, text, length, root, error };
    status = llmpar__config_read(&reader, out);
    if (status) memset(out, 0, sizeof *out);
    llmpar_json_destroy(heap, root);
    return status;
}

/* ---- writing config.json ---- */

/* The shortest text that reads back as the same double, with a '.' whatever the process's locale, and always a fraction or exponent, as Python writes it. */
static void llmpar__config_put_real(llmpar__text *t, const char *indent, const char *key, double value, const char *after)
{
    char number[48];
    size_t used = 0;
    int has_point = 0;
    for (int digits = 1; digits <= 17; digits++) {
        if (value >= 1 && value < 1e15 && value == (double)(int64_t)value) snprintf(number, sizeof number, "%.0f", value);
        else snprintf(number, sizeof number, "%.*g", digits, value);
        if (strtod(number, NULL) == value) break;
    }
    for (size_t i = 0; number[i]; i++) {
        if (strchr("0123456789+-eE", number[i])) {
            if (number[i] == 'e' || number[i] == 'E') has_point = 1;
            number[used++] = number[i];
        }
        else if (!has_point) {
            number[used++] = '.';
            has_point = 1;
        }
    }
    number[used] = 0;
    llmpar__text_put(t, "%s\"%s\": %s%s%s\n", indent, key, number, has_point ? "" : ".0", after);
}

static void llmpar__config_put_rope(llmpar__text *t, const llmpar_rope_scaling *s)
{
    if (s->kind == LLMPAR_ROPE_NONE) {
        llmpar__text_put(t, "  \"rope_scaling\": null,\n");
        return;
    }
    llmpar__text_put(t, "  \"rope_scaling\": {\n    \"rope_type\": \"%s\",\n", llmpar__config_rope_types[s->kind]);
    if (s->kind == LLMPAR_ROPE_LLAMA3 || s->kind == LLMPAR_ROPE_YARN) llmpar__text_put(t, "    \"original_max_position_embeddings\": %d,\n", (int)s->original_max_positions);
    if (s->kind == LLMPAR_ROPE_LLAMA3) {
        llmpar__config_put_real(t, "    ", "low_freq_factor", s->low_freq_factor, ",");
        llmpar__config_put_real(t, "    ", "high_freq_factor", s->high_freq_factor, ",");
    }
    if (s->kind == LLMPAR_ROPE_YARN) {
        llmpar__config_put_real(t, "    ", "attention_factor", s->attention_factor, ",");
        llmpar__config_put_real(t, "    ", "beta_fast", s->beta_fast, ",");
        llmpar__config_put_real(t, "    ", "beta_slow", s->beta_slow, ",");
        llmpar__text_put(t, "    \"truncate\": %s,\n", s->truncate ? "true" : "false");
    }
    llmpar__config_put_real(t, "    ", "factor", s->factor, "");
    llmpar__text_put(t, "  },\n");
}

LLMPAR_DEF size_t llmpar_llama_config_write(const llmpar_llama_config *config, char *text, size_t capacity)
{
    if (!config) return 0;
    const llmpar__config_family *family = &llmpar__config_families[config->family];
    llmpar__text t = llmpar__text_begin(text, capacity);
    llmpar__text_put(&t, "{\n  \"architectures\": [\n    \"%s\"\n  ],\n  \"model_type\": \"%s\",\n", family->architecture, family->type);
    llmpar__text_put(&t, "  \"vocab_size\": %d,\n  \"hidden_size\": %d,\n  \"intermediate_size\": %d,\n", (int)config->vocab, (int)config->hidden, (int)config->intermediate);
    llmpar__text_put(&t, "  \"num_hidden_layers\": %d,\n  \"num_attention_heads\": %d,\n  \"num_key_value_heads\": %d,\n", (int)config->layers, (int)config->heads, (int)config->kv_heads);
    llmpar__text_put(&t, "  \"head_dim\": %d,\n  \"max_position_embeddings\": %d,\n  \"hidden_act\": \"silu\",\n", (int)config->head_dim, (int)config->max_positions);
    if (config->family == LLMPAR_FAMILY_LLAMA) llmpar__text_put(&t, "  \"attention_bias\": false,\n  \"mlp_bias\": false,\n");
    else if (config->family == LLMPAR_FAMILY_QWEN3) llmpar__text_put(&t, "  \"attention_bias\": false,\n");
    if (config->family == LLMPAR_FAMILY_QWEN2 || config->family == LLMPAR_FAMILY_QWEN3) llmpar__text_put(&t, "  \"use_sliding_window\": false,\n");
    else if (config->sliding_window) llmpar__text_put(&t, "  \"sliding_window\": %d,\n", (int)config->sliding_window);
    else if (config->family == LLMPAR_FAMILY_MISTRAL) llmpar__text_put(&t, "  \"sliding_window\": null,\n");
    llmpar__config_put_real(&t, "  ", "rms_norm_eps", config->rms_eps, ",");
    llmpar__config_put_real(&t, "  ", "rope_theta", config->rope_theta, ",");
    llmpar__config_put_rope(&t, &config->rope_scaling);
    llmpar__config_put_real(&t, "  ", "initializer_range", config->init_std, ",");
    if (config->bos_id < 0) llmpar__text_put(&t, "  \"bos_token_id\": null,\n");
    else llmpar__text_put(&t, "  \"bos_token_id\": %d,\n", (int)config->bos_id);
    llmpar__text_put(&t, "  \"eos_token_id\": %s", config->eos_count == 0 ? "null" : config->eos_count > 1 ? "[" : "");
    for (int32_t i = 0; i < config->eos_count; i++) llmpar__text_put(&t, "%s%d", i ? ", " : "", (int)config->eos_id[i]);
    llmpar__text_put(&t, "%s,\n  \"tie_word_embeddings\": %s\n}\n", config->eos_count > 1 ? "]" : "", config->tied ? "true" : "false");
    return t.used;
}

/* ---- what follows from the shape ---- */

LLMPAR_DEF int64_t llmpar_llama_param_count(const llmpar_llama_config *config)
{
    if (!config) return 0;
    int64_t d = config->hidden;
    return config->layers * llmpar__config_layer_params(config) + d + (config->tied ? 1 : 2) * (int64_t)config->vocab * d;
}

LLMPAR_DEF double llmpar_llama_flops_per_token(const llmpar_llama_config *config, int64_t seq_len)
{
    if (!config) return 0;
    double multiplying = (double)(llmpar_llama_param_count(config) - (config->tied ? 0 : (int64_t)config->vocab * config->hidden));
    return 6 * multiplying + 12.0 * config->layers * config->heads * config->head_dim * (double)seq_len;
}

#undef LLMPAR__CONFIG_PRESETS
#undef LLMPAR__CONFIG_BAD

#endif /* LLMPAR_NO_LLAMA */
