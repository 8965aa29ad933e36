/* checkpoint: the whole state of a training run in a directory, written so that whatever happens, the newest complete one is whole; read into any mesh, ZeRO stage and wrapping (docs/checkpoints.md).

     DIR/latest              the newest one's name
     DIR/step-8/             complete; or step-8.tmp/: being written, or left by a crash
        manifest.json        where every element of every tensor is, sizes and checksums of the files, and the numbers of llmpar_checkpoint_info
        config.json          the model's
        rank-00003.safetensors   what world rank 3 owns: master parameters and optimizer state, "param/NAME", "state0/NAME" .., flat

   What several ranks hold alike is written by one of them. Numbers are keyed by tensor name and global index, so nothing of the mesh that wrote them is needed to read them. */
#ifndef LLMPAR_CHECKPOINT_H
#define LLMPAR_CHECKPOINT_H

#include "io/safetensors.h"
#include "optim/lr.h"
#include "optim/optim.h"

/* The numbers of a run beside its tensors. */
typedef struct llmpar_checkpoint_info {
    int64_t step;              /* steps made: the position in the data and in the schedule */
    int64_t batch, seq_len;    /* the data's order is a function of these .. */
    uint64_t seed;             /* .. of this */
    int64_t data_tokens;       /* .. and of how much text is trained on; 0: own data */
    int32_t canon;             /* pieces of sums (docs/exact.md) */
    llmpar_loss_scale scale;   /* of the coming step; scale 0: none */
    int64_t updates;           /* of the optimizer: steps without the skipped ones. Filled in by save, as are those below */
    llmpar_dtype dtype;        /* of compute; tensors are stored in its sum type */
    int32_t degree[LLMPAR_MESH_AXES], zero; /* mesh and LLMPAR_ZERO_* of the writer: told, of no importance */
    char optimizer[16];        /* llmpar_optim_name, or "none" */
} llmpar_checkpoint_info;

typedef struct llmpar_checkpoint_desc {
    const char *directory;     /* its parent must exist; copied */
    const char *config;        /* text of config.json; NULL: none; copied */
    int32_t keep;              /* the newest so many are kept, older ones removed after a save; 0: all */
    int32_t background;        /* 1: save copies this rank's part to host memory and returns; a thread writes it, and poll ends the save */
} llmpar_checkpoint_desc;

/* Saves into one directory. Borrows fsdp and optim (NULL: none). */
typedef struct llmpar_checkpoint llmpar_checkpoint;
LLMPAR_API llmpar_status llmpar_checkpoint_create(llmpar_fsdp *fsdp, llmpar_optim *optim, const llmpar_checkpoint_desc *desc, llmpar_checkpoint **out); /* local */
/* Writes DIR/step-N; one that is there already is an error: nothing is ever overwritten. First ends a save under way. An error is the same on all ranks, names rank and file, and leaves no step-N (unless its
   text says that step-N is complete); what was there stays, and everything can go on. Collective. */
LLMPAR_API llmpar_status llmpar_checkpoint_save(llmpar_checkpoint *checkpoint, const llmpar_checkpoint_info *info);
/* A save in the background: has every rank written its part? Then it is committed here, or its error returned. wait: until it is so. Nothing under way: LLMPAR_OK. Collective. */
LLMPAR_API llmpar_status llmpar_checkpoint_poll(llmpar_checkpoint *checkpoint, int wait);
/* Waits for this rank's own thread; a save that no poll has ended stays a step-N.tmp. Local. */
LLMPAR_API void llmpar_checkpoint_destroy(llmpar_checkpoint *checkpoint);

/* The largest complete step below `below` in a directory, -1: none (or no directory). Collective. */
LLMPAR_API llmpar_status llmpar_checkpoint_newest(llmpar_ctx *ctx, const char *directory, int64_t below, int64_t *step);
/* Reads the checkpoint in `path` (a step-N directory) into fsdp and optim, and its numbers into info. First everything is verified, the ranks sharing the files: manifest, sizes, checksums, headers; every element of every
   tensor exactly once, and nothing else. Then accept (may be NULL) is asked on every rank, whether it is of this run; it leaves its text in the rank's error. LLMPAR_ERR_FORMAT, LLMPAR_ERR_IO: it is damaged; LLMPAR_ERR_CONFIG,
   LLMPAR_ERR_SHAPE: it is whole, and of another run: other tensors, another optimizer. All ranks return the same error, which names rank and file; nothing has changed then, unless reading failed after the verification. fsdp
   without optimizer states and optim NULL: parameters alone are taken. Collective. */
typedef llmpar_status (*llmpar_checkpoint_accept)(void *user, const char *path, const llmpar_checkpoint_info *info);
LLMPAR_API llmpar_status llmpar_checkpoint_load(llmpar_fsdp *fsdp, llmpar_optim *optim, const char *path, llmpar_checkpoint_accept accept, void *user, llmpar_checkpoint_info *info);

#endif
