"""A reply of transformers' LlamaForCausalLM: generate_transformers.py MODEL f32|bf16 PROMPT TOKENS THREADS

Its forward with a growing cache and one row of logits, without the bookkeeping of its generate(). Answers as generate.py says."""
import sys

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from generate import SHAPES, serve

model, dtype, prompt, tokens, threads = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
torch.set_num_threads(threads)
torch.set_default_dtype(torch.bfloat16 if dtype == "bf16" else torch.float32)
vocab, hidden, intermediate, layers, heads, kv_heads, head_dim, tied = SHAPES[model]
llama = LlamaForCausalLM(LlamaConfig(vocab_size=vocab, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim,
                                     max_position_embeddings=4096, rms_norm_eps=1e-5, tie_word_embeddings=bool(tied), attn_implementation="sdpa")).eval()
cache = None


def begin():
    global cache
    cache = DynamicCache()


@torch.inference_mode()
def follow(ids):
    return int(llama(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1].argmax())


serve(begin, follow, prompt, tokens, vocab, f"{torch.__version__}")
