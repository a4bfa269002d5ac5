"""One of two processes that train together: `python -m skipping.ways.two_processes RANK FOLDER`."""

import copy
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from skipping.ways import matrix
from torch import nn
from torch.distributed.fsdp import fully_shard


def ddp(model):
    return nn.parallel.DistributedDataParallel(model)


def fsdp2(model):
    mesh = dist.init_device_mesh("cpu", (2,))
    for block in model.blocks[:]:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def difference(wrap, family, method, rank):
    """Of the gradients from those of one process on all images, relative to the largest."""
    model, images = matrix.build(family, method).double().eval(), matrix.images().double()
    alone = copy.deepcopy(model)
    alone(images).square().mean().backward()
    wrapped = wrap(model)
    wrapped(images.chunk(2)[rank]).square().mean().backward()
    largest = 0.0
    for got, want in zip(wrapped.parameters(), alone.parameters(), strict=True):
        grad = got.grad.full_tensor() if isinstance(got.grad, dist.tensor.DTensor) else got.grad
        apart = (grad - want.grad).abs().max() / want.grad.abs().max().clamp_min(1e-6)
        largest = max(largest, apart.item())
    return largest


def main(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    found = {}
    for way, wrap in (("DDP", ddp), ("FSDP2", fsdp2)):
        for family in matrix.FAMILIES:
            for method in matrix.METHODS:
                if not matrix.refusal(way, family, method):
                    found[f"{way}/{family}/{method}"] = difference(wrap, family, method, rank)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
