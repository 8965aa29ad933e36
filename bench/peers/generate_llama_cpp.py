"""A reply of llama.cpp through its Python binding's C functions: generate_llama_cpp.py FILE.gguf KV PROMPT TOKENS THREADS     KV: f16 (its default), f32 or bf16

Both settings of flash attention are tried on three replies each; the one whose tokens take less serves. Answers as generate.py says; one row of logits a call, its maximum found by numpy."""
import os
import statistics
import sys

import llama_cpp as l
import numpy as np

from generate import serve

path, kv, prompt, tokens, threads = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
BATCH = 512  # ids in a call at most
TYPES = {"f32": 0, "f16": 1, "bf16": 30}  # enum ggml_type
quiet = l.llama_log_callback(lambda level, text, user: None)
if "VERBOSE" not in os.environ:
    l.llama_log_set(quiet, None)
l.llama_backend_init()
model = l.llama_model_load_from_file(path.encode(), l.llama_model_default_params())
if not model:
    sys.exit("the model was not loaded: VERBOSE=1 says why")
vocab = l.llama_vocab_n_tokens(l.llama_model_get_vocab(model))


def context(flash):
    params = l.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = prompt + tokens, BATCH, BATCH
    params.n_threads = params.n_threads_batch = threads
    params.flash_attn_type = l.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else l.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.type_k = params.type_v = TYPES[kv]
    return l.llama_init_from_model(model, params)


def follower(c):
    """The calls of one reply in this context: begin() empties the cache, then next(ids) is the id that follows."""
    def begin():
        l.llama_memory_clear(l.llama_get_memory(c), True)

    def follow(ids):
        for first in range(0, len(ids), BATCH):
            part = ids[first:first + BATCH]
            array = (l.llama_token * len(part))(*part)  # the batch has its address alone
            if l.llama_decode(c, l.llama_batch_get_one(array, len(part))):
                sys.exit("llama_decode failed")
        return int(np.ctypeslib.as_array(l.llama_get_logits_ith(c, -1), (vocab,)).argmax())

    return begin, follow


def token_seconds(c):
    from generate import reply
    return statistics.median(reply(*follower(c), prompt, tokens, vocab)[1] for _ in range(3))


settings = [(token_seconds(c), flash, c) for flash, c in ((flash, context(flash)) for flash in (0, 1)) if c]
if not settings:
    sys.exit(f"a cache of {kv} is not supported")
_, flash, best = min(settings)
serve(*follower(best), prompt, tokens, vocab, f"flash attention {'on' if flash else 'off'}")
