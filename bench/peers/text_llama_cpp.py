"""Texts from llama.cpp on request, for generate.py: text_llama_cpp.py MODEL f32|bf16 THREADS PROMPT TOKENS

Needs the packages llama-cpp-python and gguf. Speaks as bench/peers/text.c does. The presets' shapes with new weights go into a GGUF file that is gone when it has been read; matrices in the type asked for, norms in f32, as
llama.cpp wants them; the cache in the type asked for where that is faster than f16, llama.cpp's own, and flash attention where it is faster (all four are tried first)."""
import ctypes
import os
import sys
import tempfile
import time

import gguf
import llama_cpp
import numpy

# vocabulary, hidden, intermediate, layers, heads, kv heads, head dim; embedding and head share their weight (src/model/config.c)
PRESETS = {"15m": (32000, 288, 768, 6, 6, 6, 48), "110m": (32000, 768, 2048, 12, 12, 12, 64), "300m": (32000, 1024, 3072, 20, 16, 16, 64), "1b": (128256, 2048, 8192, 16, 32, 8, 64)}

preset, dtype, threads, prompt, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
vocab, hidden, intermediate, layers, heads, kv_heads, head_dim = PRESETS[preset]


def write(path):
    random = numpy.random.default_rng(1)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(prompt + tokens)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(intermediate)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("no_vocab")

    def matrix(name, rows, columns):
        x = random.standard_normal((rows, columns), dtype=numpy.float32) * numpy.float32(0.02)
        if dtype == "f32":
            writer.add_tensor(name, x)
        else:
            writer.add_tensor(name, (x.view(numpy.uint32) >> 16).astype(numpy.uint16), raw_dtype=gguf.GGMLQuantizationType.BF16)

    def norm(name):
        writer.add_tensor(name, numpy.ones(hidden, dtype=numpy.float32))

    matrix("token_embd.weight", vocab, hidden)
    norm("output_norm.weight")
    for i in range(layers):
        norm(f"blk.{i}.attn_norm.weight")
        matrix(f"blk.{i}.attn_q.weight", heads * head_dim, hidden)
        matrix(f"blk.{i}.attn_k.weight", kv_heads * head_dim, hidden)
        matrix(f"blk.{i}.attn_v.weight", kv_heads * head_dim, hidden)
        matrix(f"blk.{i}.attn_output.weight", hidden, heads * head_dim)
        norm(f"blk.{i}.ffn_norm.weight")
        matrix(f"blk.{i}.ffn_gate.weight", intermediate, hidden)
        matrix(f"blk.{i}.ffn_up.weight", intermediate, hidden)
        matrix(f"blk.{i}.ffn_down.weight", hidden, intermediate)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def context(model, cache, flash):
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = prompt + tokens
    params.n_batch = params.n_ubatch = 512
    params.n_threads = params.n_threads_batch = threads
    params.type_k = params.type_v = cache
    params.flash_attn_type = flash
    return llama_cpp.llama_init_from_model(model, params)


def text(ctx):
    """Greedy: the seconds of the prompt, and of the tokens behind the first."""
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(ctx), True)
    ids = (llama_cpp.llama_token * prompt)(*[i * 2654435761 % 2**32 % vocab for i in range(prompt)])
    begin = time.perf_counter()
    for at in range(0, prompt, 512):
        count = min(512, prompt - at)
        part = ctypes.cast(ctypes.byref(ids, at * ctypes.sizeof(llama_cpp.llama_token)), ctypes.POINTER(llama_cpp.llama_token))
        if llama_cpp.llama_decode(ctx, llama_cpp.llama_batch_get_one(part, count)):
            raise SystemExit("llama_decode failed")
    one = (llama_cpp.llama_token * 1)()
    first = last = 0.0
    for i in range(tokens):
        logits = numpy.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(ctx, -1), (vocab,))
        one[0] = int(logits.argmax())
        last = time.perf_counter()
        if i == 0:
            first = last
        if i + 1 < tokens and llama_cpp.llama_decode(ctx, llama_cpp.llama_batch_get_one(one, 1)):
            raise SystemExit("llama_decode failed")
    return first - begin, last - first


llama_cpp.llama_log_set(llama_cpp.llama_log_callback(lambda level, message, user: None), ctypes.c_void_p(0))
llama_cpp.llama_backend_init()
with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "model.gguf")
    write(path)
    params = llama_cpp.llama_model_default_params()
    params.use_mmap = False
    model = llama_cpp.llama_model_load_from_file(path.encode(), params)
if not model:
    raise SystemExit("llama.cpp could not load the model")

F16, OWN = gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.F32 if dtype == "f32" else gguf.GGMLQuantizationType.BF16
best = None
for cache in (F16, OWN):
    for flash in (0, 1):
        ctx = context(model, cache, flash)
        if not ctx:
            continue
        text(ctx)
        seconds = sum(text(ctx))
        if best is None or seconds < best[0]:
            best = (seconds, cache, flash)
        llama_cpp.llama_free(ctx)
ctx = context(model, best[1], best[2])
text(ctx)
print(f"ready cache {gguf.GGMLQuantizationType(best[1]).name.lower()}{', flash attention' if best[2] else ''}", flush=True)
for _ in sys.stdin:
    first, others = text(ctx)
    print(f"{first:.6f} {others:.6f} {first + others:.6f}", flush=True)
