"""The same Llama as the presets of llmpar, in plain PyTorch, and how a step of it is served.

A peer of bench/peers/run.py answers lines on stdin: "step" makes one training step (forward, backward, clipping to norm 1, AdamW) and prints its
seconds; the end of stdin ends it. What it printed first, "ready", came after a step that is not counted."""
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

# vocabulary, hidden, intermediate, layers, heads, kv heads, head dim; embedding and head share their weight (src/model/config.c)
PRESETS = {"tiny": (256, 128, 384, 4, 8, 4, 16), "15m": (32000, 288, 768, 6, 6, 6, 48), "110m": (32000, 768, 2048, 12, 12, 12, 64), "300m": (32000, 1024, 3072, 20, 16, 16, 64), "1b": (128256, 2048, 8192, 16, 32, 8, 64)}


class Attention(nn.Module):
    def __init__(self, hidden, heads, kv_heads, head_dim):
        super().__init__()
        self.head_dim = head_dim
        self.groups = heads != kv_heads
        self.q = nn.Linear(hidden, heads * head_dim, bias=False)
        self.k = nn.Linear(hidden, kv_heads * head_dim, bias=False)
        self.v = nn.Linear(hidden, kv_heads * head_dim, bias=False)
        self.o = nn.Linear(heads * head_dim, hidden, bias=False)

    def forward(self, x, cosine, sine):
        b, t, _ = x.shape
        # -1: under tensor parallelism a rank has a part of the heads
        q = self.q(x).view(b, t, -1, self.head_dim).transpose(1, 2)
        k = self.k(x).view(b, t, -1, self.head_dim).transpose(1, 2)
        v = self.v(x).view(b, t, -1, self.head_dim).transpose(1, 2)
        half = self.head_dim // 2

        def rotate(y):
            return y * cosine + torch.cat((-y[..., half:], y[..., :half]), -1) * sine

        grouped = {"enable_gqa": True} if self.groups else {}
        y = F.scaled_dot_product_attention(rotate(q).to(v.dtype), rotate(k).to(v.dtype), v, is_causal=True, **grouped)
        return self.o(y.transpose(1, 2).reshape(b, t, -1))


class MLP(nn.Module):
    def __init__(self, hidden, intermediate):
        super().__init__()
        self.gate = nn.Linear(hidden, intermediate, bias=False)
        self.up = nn.Linear(hidden, intermediate, bias=False)
        self.down = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, hidden, intermediate, heads, kv_heads, head_dim):
        super().__init__()
        self.norm1 = nn.RMSNorm(hidden, eps=1e-5)
        self.attention = Attention(hidden, heads, kv_heads, head_dim)
        self.norm2 = nn.RMSNorm(hidden, eps=1e-5)
        self.mlp = MLP(hidden, intermediate)

    def forward(self, x, cosine, sine):
        x = x + self.attention(self.norm1(x), cosine, sine)
        return x + self.mlp(self.norm2(x))


class Llama(nn.Module):
    def __init__(self, preset, seq):
        super().__init__()
        vocab, hidden, intermediate, layers, heads, kv_heads, head_dim = PRESETS[preset]
        self.vocab = vocab
        self.embed = nn.Embedding(vocab, hidden)
        self.layers = nn.ModuleList(Block(hidden, intermediate, heads, kv_heads, head_dim) for _ in range(layers))
        self.norm = nn.RMSNorm(hidden, eps=1e-5)
        self.head = nn.Linear(hidden, vocab, bias=False)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)
        self.head.weight = self.embed.weight
        base = 500000.0 if preset == "1b" else 10000.0
        angle = torch.arange(seq)[:, None] / base ** (torch.arange(0, head_dim, 2) / head_dim)
        self.register_buffer("cosine", angle.cos().repeat(1, 2), persistent=False)
        self.register_buffer("sine", angle.sin().repeat(1, 2), persistent=False)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, self.cosine, self.sine)
        return self.head(self.norm(x))


def tokens(vocab, first, batch, seq):
    """The sequences that bench/train_step.c trains on: ids and targets [batch, seq]."""
    rows = []
    for index in range(first, first + batch):
        state, row = (index * 2654435761 + 12345) & 0xFFFFFFFF, []
        for _ in range(seq + 1):
            state = (state * 1664525 + 1013904223) & 0xFFFFFFFF
            row.append((state >> 8) % vocab)
        rows.append(row)
    rows = torch.tensor(rows)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def adamw(model):
    """The fastest AdamW that takes these parameters."""
    try:
        return torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True)
    except (RuntimeError, NotImplementedError):
        return torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, foreach=True)


def serve(step, first, go, memory=None):
    """step(i) makes step i and returns its loss; first: does this process talk? go(): has another step been asked for (all processes agree)? memory(): bytes of the device, at most so far."""
    more = (lambda: f" memory {memory()}") if memory else (lambda: "")
    start = time.monotonic()
    loss = step(0)
    if first:
        print(f"ready {time.monotonic() - start:.6f} loss {loss:.4f}{more()}", flush=True)
    i = 1
    while go():
        start = time.monotonic()
        loss = step(i)
        if first:
            print(f"{time.monotonic() - start:.6f} loss {loss:.4f}{more()}", flush=True)
        i += 1


def asked():
    return sys.stdin.readline().startswith("step")
