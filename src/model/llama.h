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
    double top_p;             /* 0 or 1: off; else nucleus sampling (Holtzman et al. 2020) */
    uint64_t seed;            /* of sampling */
    int32_t stop_at_eos;      /* 1: ends after one of the config's eos ids */
    llmpar_status (*on_token)(void *user, int32_t id); /* each generated id, on every rank; may be NULL */
    void *user;
} llmpar_generate_desc;

/* One text: writes the generated ids (without the prompt) to ids[tokens], their number to *count. KV cache in the arena of fsdp. prompt + tokens beyond the positions given to apply: LLMPAR_ERR_ARGUMENT. Meanwhile the parameters are
   lent to it (llmpar_fsdp_lend): in on_token they can be neither read nor saved, and logits, another text or a step of this model are refused. For 32 tokens and more the rows of the weights are interleaved in place, on devices that
   multiply few rows faster so (llmpar_interleave_args); they lie as before when it returns, whatever it returns. Collective over the mesh of fsdp. */
LLMPAR_API llmpar_status llmpar_llama_generate(llmpar_llama *model, llmpar_fsdp *fsdp, const llmpar_generate_desc *desc, int32_t *ids, int32_t *count);

/* Many texts, a conversation, a server: buffers, the KV cache of at most `positions` ids (prompt and reply of the longest text; 0: the positions given to apply) and interleaved weights stay from text to text, and so do the keys and
   values of the latest one: as far as the next prompt begins with the same ids, they are not computed again. The ids are those that llmpar_llama_generate gives, bit for bit. Give each turn of a conversation the whole text so far.
   The parameters are lent to it until it is destroyed, before model and fsdp are. A run that fails (not: that on_token ends) forgets the text; the generator may be used again. Of one thread at a time.
   create, run, destroy: collective over the mesh of fsdp, with the same desc on every rank. destroy returns the first failure to lay the weights as they lay; NULL: nothing happens. */
typedef struct llmpar_generator llmpar_generator;
LLMPAR_API llmpar_status llmpar_generator_create(llmpar_llama *model, llmpar_fsdp *fsdp, int64_t positions, llmpar_generator **out);
LLMPAR_API llmpar_status llmpar_generator_run(llmpar_generator *generator, const llmpar_generate_desc *desc, int32_t *ids, int32_t *count);
LLMPAR_API llmpar_status llmpar_generator_destroy(llmpar_generator *generator);

#endif
