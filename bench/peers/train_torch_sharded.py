"""A training step of the presets in PyTorch on several processes over gloo: train_torch_sharded.py fsdp|tp 15m|110m|300m SEQ BATCH f32|bf16 RANKS

fsdp: FSDP2 (fully_shard), a block a unit. tp: DTensor, columns and rows, vocabulary sharded, cross-entropy on the shards (loss_parallel). One thread each."""
import os
import socket
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from llama_torch import Llama, adamw, asked, serve, tokens


def shard_fsdp(model, mesh, dtype):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if dtype == "bf16" else MixedPrecisionPolicy()
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def shard_tp(model, mesh):
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
    for layer in model.layers:
        parallelize_module(layer, mesh, {
            "attention.q": ColwiseParallel(), "attention.k": ColwiseParallel(), "attention.v": ColwiseParallel(), "attention.o": RowwiseParallel(),
            "mlp.gate": ColwiseParallel(), "mlp.up": ColwiseParallel(), "mlp.down": RowwiseParallel()})
    parallelize_module(model, mesh, {"embed": RowwiseParallel(input_layouts=Replicate()), "head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)})
    model.head.weight = model.embed.weight


def clip(model):
    """To norm 1. Parameters may be a mix of sharded and plain ones, which clip_grad_norm_ does not take together."""
    from torch.distributed.tensor import DTensor
    norms = [torch.linalg.vector_norm(p.grad) for p in model.parameters() if p.grad is not None]
    norms = [n.full_tensor() if isinstance(n, DTensor) else n for n in norms]
    factor = torch.clamp(1.0 / (torch.linalg.vector_norm(torch.stack(norms)) + 1e-6), max=1.0).item()
    if factor < 1:
        for p in model.parameters():
            if p.grad is not None:
                p.grad.mul_(factor)


def optimizer_of(model):
    from torch.distributed.tensor import DTensor
    groups = [[p for p in model.parameters() if isinstance(p, DTensor) is sharded] for sharded in (True, False)]

    class Both(torch.nn.Module):
        def __init__(self, parameters):
            super().__init__()
            self.all = torch.nn.ParameterList(parameters)
    return [adamw(Both(g)) for g in groups if g]


def rank(r, ranks, port, mode, preset, seq, batch, dtype, pipe):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(r), WORLD_SIZE=str(ranks))
    torch.set_num_threads(1)
    if r == 0:
        sys.stdin = os.fdopen(pipe)
    dist.init_process_group("gloo", rank=r, world_size=ranks)
    mesh = dist.init_device_mesh("cpu", (ranks,))
    torch.manual_seed(0)
    model = Llama(preset, seq)
    vocab, local = model.vocab, batch // ranks if mode == "fsdp" else batch
    if mode == "fsdp":
        shard_fsdp(model, mesh, dtype)
    else:
        if dtype == "bf16":
            model = model.to(torch.bfloat16)
        shard_tp(model, mesh)
    optimizers = optimizer_of(model)

    def step(i):
        ids, targets = tokens(vocab, i * batch + (r * local if mode == "fsdp" else 0), local, seq)
        if mode == "tp":
            from torch.distributed.tensor.parallel import loss_parallel
            with loss_parallel():
                loss = F.cross_entropy(model(ids).flatten(0, 1).float(), targets.view(-1))
                loss.backward()
            loss = loss.full_tensor() if hasattr(loss, "full_tensor") else loss
        else:
            loss = F.cross_entropy(model(ids).view(-1, vocab).float(), targets.view(-1))
            loss.backward()
        clip(model)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        dist.barrier()
        return loss.item()

    def go():
        word = torch.tensor([1 if r == 0 and asked() else 0])
        dist.broadcast(word, 0)
        return word.item() == 1

    serve(step, r == 0, go)
    dist.destroy_process_group()


if __name__ == "__main__":
    mode, preset, seq, batch, dtype, ranks = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5], int(sys.argv[6])
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    pipe = os.dup(0)
    os.set_inheritable(pipe, True)
    context = mp.get_context("fork")
    processes = [context.Process(target=rank, args=(r, ranks, port, mode, preset, seq, batch, dtype, pipe)) for r in range(ranks)]
    for p in processes:
        p.start()
    os.close(pipe)
    for p in processes:
        p.join()
    sys.exit(max(abs(p.exitcode) for p in processes))
