/* llama: a Llama 3, or a near relative (llmpar_family), as a list of units. The model knows its mathematics and its tp axis; neither FSDP nor any transport.

   One block, Ns = rows of the residual stream on this rank (B*T, or B*T/tp with sequence parallel), N = B*T:
     x[Ns,D] -> rmsnorm -> (gather) -> q,k,v (+ bias, norm over heads) -> rope -> attention -> wo -> (reduce) -> + x -> rmsnorm -> (gather) -> gate, up -> swiglu -> down -> (reduce) -> +
   Touvron et al. 2023; Shoeybi et al. 2019, fig. 3; Korthikanti et al. 2022, fig. 5. */
#ifndef LLMPAR_LLAMA_H
#define LLMPAR_LLAMA_H

#include "fsdp/fsdp.h"
#include "model/config.h"
#include "tp/tp.h"

typedef struct llmpar_llama llmpar_llama;

#define LLMPAR_WRAP_HALF (-1)

/* Exactly one of preset and config. */
typedef struct llmpar_llama_desc {
    const char *preset;                 /* "tiny", "15m", "110m", "300m", "1b" */
    const llmpar_llama_config *config;  /* copied */
    uint64_t seed;                      /* initialisation; default 0 */
    int32_t wrap;                       /* what FSDP gathers at once: 1 .. 8 blocks a unit (default 1), or LLMPAR_WRAP_HALF: attention and MLP are units of their own. Same bits */
    int64_t logits_bytes;               /* logits of one micro-batch that a rank holds at once; default 256 MiB. More are computed in parts, in backward; of several leaves, or where fewer than 64 rows fit, twice: same bits */
} llmpar_llama_desc;

/* The units exist from here on: embed, layers.0 .. (wrap: layers.0.attention, layers.0.mlp .., layers.0-3 ..), head. Collective only in that all ranks give the same desc. */
LLMPAR_API llmpar_status llmpar_llama_create(llmpar_ctx *ctx, const llmpar_llama_desc *desc, llmpar_llama **out);
/* A model of the same desc in another ctx, before any llmpar_llama_apply. Local. */
LLMPAR_API llmpar_status llmpar_llama_clone(llmpar_ctx *ctx, const llmpar_llama *model, llmpar_llama **out);
LLMPAR_API void llmpar_llama_destroy(llmpar_llama *model); /* after the fsdp object made from its units; local */
LLMPAR_API const llmpar_llama_config *llmpar_llama_get_config(const llmpar_llama *model); /* local */
LLMPAR_API uint64_t llmpar_llama_seed(const llmpar_llama *model);                         /* local */
/* The units, owned by the model. Their `recompute`: SELECTIVE keeps all but the norms' outputs of the blocks (the two ends keep what they keep, and attention the normalised q and k), FULL is for any unit but the last; set it before the units are handed to FSDP. To replace a unit's callbacks: llmpar_llama_apply, which sets them; change them here; then llmpar_parallelize. Local. */
LLMPAR_API llmpar_unit *llmpar_llama_units(llmpar_llama *model, int32_t *count);

/* How the model meets a mesh. */
typedef struct llmpar_llama_apply_desc {
    int32_t canon;               /* pieces of every sum that tp may split; default 8 */
    int32_t sequence_parallel;   /* 1: the residual stream is sharded over T between the linear layers */
    llmpar_dtype dtype;          /* default F32 */
    int64_t positions;           /* longest T; RoPE tables are made for it */
} llmpar_llama_apply_desc;

/* Sets placements, instruction lists and RoPE tables for the tp communicator (one rank: no parallelism). LLMPAR_ERR_MESH names what tp does not divide, LLMPAR_ERR_UNSUPPORTED a sliding window shorter than the positions. Collective over tp. Again with the same communicator and values (and no more
   positions): nothing happens, so a user may call it before llmpar_parallelize does; with others: LLMPAR_ERR_ARGUMENT. */
LLMPAR_API llmpar_status llmpar_llama_apply(llmpar_llama *model, llmpar_comm *tp, const llmpar_llama_apply_desc *desc);
LLMPAR_API const llmpar_tp *llmpar_llama_tp(const llmpar_llama *model); /* local */

/* logits[count, V] (f32, host) of one sequence ids[count]: every rank gets all. Collective over the mesh of fsdp. */
LLMPAR_API llmpar_status llmpar_llama_logits(llmpar_llama *model, llmpar_fsdp *fsdp, const int32_t *ids, int32_t count, float *logits);

typedef struct llmpar_generate_desc {
    const int32_t *prompt;    /* at least one id */
    int32_t prompt_count;
    int32_t tokens;           /* ids to generate at most; default 128 */
    double temperature;       /* 0: greedy (the first of equal maxima) */
    int32_t top_k;            /* 0: off; else one of the k likeliest ids (Fan et al. 2018) */
    double top_p;             /* 0 or 1: off; else nucleus sampling (Holtzman et al. 2020), of those k */
    uint64_t seed;            /* of sampling */
    int32_t stop_at_eos;      /* 1: ends after one of the config's eos ids */
    /* Any of these may be NULL. On every rank, which all do and return the same; LLMPAR_END ends this text, without a failure, anything else but LLMPAR_OK all texts. */
    llmpar_status (*on_logits)(void *user, float *logits, int32_t vocab); /* before an id is chosen; may change them (a grammar, penalties), to -inf too: never that id */
    llmpar_status (*on_token)(void *user, int32_t id); /* each generated id, which is already counted, in ids */
    void (*on_end)(void *user); /* behind the last one, where nothing failed */
    void *user;
} llmpar_generate_desc;

/* One text: writes the generated ids (without the prompt) to ids[tokens], their number to *count. KV cache in the arena of fsdp. prompt + tokens - 1 beyond the positions given to apply: LLMPAR_ERR_ARGUMENT. Meanwhile the parameters are
   lent to it (llmpar_fsdp_lend): in on_token they can be neither read nor saved, and logits, another text or a step of this model are refused. For 32 tokens and more the rows of the weights are interleaved in place, on devices that
   multiply few rows faster so (llmpar_interleave_args); they lie as before when it returns, whatever it returns. Collective over the mesh of fsdp. */
LLMPAR_API llmpar_status llmpar_llama_generate(llmpar_llama *model, llmpar_fsdp *fsdp, const llmpar_generate_desc *desc, int32_t *ids, int32_t *count);

/* Many texts, at once or one behind the other, a conversation, a server: buffers, the KV cache and interleaved weights stay, and so do the keys and values of the latest texts: as far as a prompt begins with the ids of a text that is known
   or being generated, they are not computed again. Give each turn of a conversation the whole text so far. Zero is a default everywhere. */
typedef struct llmpar_generator_desc {
    int64_t positions;        /* ids of a text at most, prompt and reply (its last id needs none); default: the positions given to apply */
    int32_t texts;            /* how many are generated at once, and known afterwards; default 1. Each has its cache; each step then reads the weights once for all of them */
} llmpar_generator_desc;
typedef struct llmpar_generator llmpar_generator;
/* The parameters are lent to it (llmpar_fsdp_lend) until it is destroyed, which must be before model and fsdp are. Of one thread at a time; the generator may not be used in on_token or on_end. Collective over the mesh of fsdp, as run and destroy,
   with the same descs on every rank. */
LLMPAR_API llmpar_status llmpar_generator_create(llmpar_llama *model, llmpar_fsdp *fsdp, const llmpar_generator_desc *desc, llmpar_generator **out);
/* Generates texts[count], begun in their order, each as soon as another one's end has made room: ids[i] has room for texts[i].tokens ids, counts[i] is how many there are. They are those that llmpar_llama_generate gives for each, bit for
   bit, whatever else is or was generated (on a GPU in its exact mode: a library's products depend on how many rows there are). What on_token or on_logits returns, if neither LLMPAR_OK nor LLMPAR_END, ends all texts where they are, and is returned. A run that fails otherwise forgets all texts; the generator may be used again. */
LLMPAR_API llmpar_status llmpar_generator_run(llmpar_generator *generator, const llmpar_generate_desc *texts, int32_t count, int32_t *const *ids, int32_t *counts);
/* The same by hand, for texts that come while others run: begin computes a prompt, which is not needed afterwards, and its first id; a step adds an id to each running text, whose ids, count and user are used until it ends. *running: how many
   texts then go on; as many as the generator generates at once: no other may begin, LLMPAR_ERR_ARGUMENT. Failures and callbacks end texts as in run; run ends when those have ended that were begun by hand, too. */
LLMPAR_API llmpar_status llmpar_generator_begin(llmpar_generator *generator, const llmpar_generate_desc *text, int32_t *ids, int32_t *count, int32_t *running);
LLMPAR_API llmpar_status llmpar_generator_step(llmpar_generator *generator, int32_t *running);
/* Returns the first failure to lay the weights as they lay. NULL: nothing happens. */
LLMPAR_API llmpar_status llmpar_generator_destroy(llmpar_generator *generator);

#endif
