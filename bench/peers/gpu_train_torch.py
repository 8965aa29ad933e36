"""A training step of Llama-3.2-1B's shape on a GPU in PyTorch: gpu_train_torch.py 1b SEQ TOKENS eager|compile

f32 parameters, gradients and moments, everything else in BF16 by autocast (what llmpar's bf16 is); flash attention, fused AdamW, clipping to norm 1; torch.compile of model and loss together."""
import os
import sys

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from llama_torch import Llama, asked, serve, tokens

preset, seq, count, mode = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
device = os.environ.get("GPU_TRAIN_DEVICE") or "cuda"  # cpu: to try the script out
batch = count // seq
torch.manual_seed(0)
torch.backends.cuda.matmul.allow_tf32 = True
with torch.device(device):
    model = Llama(preset, seq)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True)


def loss_of(ids, targets):
    with torch.autocast(device, dtype=torch.bfloat16):
        return F.cross_entropy(model(ids).view(-1, model.vocab).float(), targets.view(-1))


if mode == "compile":
    loss_of = torch.compile(loss_of)


def step(i):
    ids, targets = (x.to(device, non_blocking=True) for x in batches[i % len(batches)])
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION] if device == "cuda" else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        loss = loss_of(ids, targets)
        loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


# made beforehand: Python is slow at it
batches = [tokens(model.vocab, i * batch, batch, seq) for i in range(4)]
step(0)
step(1)
serve(step, True, asked, memory=lambda: torch.cuda.max_memory_allocated() if device == "cuda" else 0)
