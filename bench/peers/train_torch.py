"""A training step of the presets in PyTorch, one process: train_torch.py eager|compile 15m|110m|300m SEQ BATCH f32|bf16|autocast THREADS

bf16: parameters, gradients and moments in BF16. autocast: f32 parameters, products in BF16 (what llmpar's bf16 is closest to)."""
import sys

import torch
import torch.nn.functional as F

from llama_torch import Llama, adamw, asked, serve, tokens

mode, preset, seq, batch, dtype, threads = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5], int(sys.argv[6])
torch.set_num_threads(threads)
torch.manual_seed(0)
model = Llama(preset, seq)
if dtype == "bf16":
    model = model.to(torch.bfloat16)
optimizer = adamw(model)


def loss_of(ids, targets):
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "autocast"):
        return F.cross_entropy(model(ids).view(-1, model.vocab), targets.view(-1))


if mode == "compile":
    loss_of = torch.compile(loss_of)


def step(i):
    ids, targets = tokens(model.vocab, i * batch, batch, seq)
    loss = loss_of(ids, targets)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


serve(step, True, asked)
