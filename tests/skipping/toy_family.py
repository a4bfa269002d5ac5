"""A library of models, and the family that one writes for it: this file, and a row (test_seams.py).

A ring of tokens, each attending to all by what they hold and by how far apart they stand. No CLS.
"""

import torch
from torch import nn

from skipvit_kernels.skipping.families.base import Attended, Family, ViTShape, num_weights


class RingBlock(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm, self.q, self.kv = nn.LayerNorm(dim), nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU())

    def attention(self, x, distance):
        y = self.norm(x)
        q, (k, v) = self.q(y), self.kv(y).chunk(2, 2)
        return (q @ k.transpose(1, 2) / 8 - distance[:, 0]).softmax(-1) @ v, q, k

    def forward(self, x, distance):
        x = x + self.attention(x, distance)[0]
        return x + self.mlp(x)


class Ring(nn.Module):
    def __init__(self, dim=32, depth=5, size=24):
        super().__init__()
        self.embed, self.dim, self.size = nn.Linear(3, dim), dim, size
        self.blocks = nn.ModuleList(RingBlock(dim) for _ in range(depth))

    def forward(self, points):
        at = torch.arange(self.size, dtype=points.dtype)
        distance = (at[:, None] - at).abs()
        distance = torch.minimum(distance, self.size - distance)[None, None]
        x = self.embed(points.flatten(2).transpose(1, 2))
        for block in self.blocks:
            x = block(x, distance=distance)
        return x.mean(1)


class RingFamily(Family):
    pairs = ("distance",)

    @staticmethod
    def has_cls(model):
        return False

    @staticmethod
    def num_prefix_tokens(model):
        return 0

    @classmethod
    def supports(cls, model, config):
        return "a ring does not fuse" if config.method == "fuse" else None

    @staticmethod
    def shape(model):
        dim = model.dim
        return ViTShape(len(model.blocks), model.size, dim, 0, mlp_weights=dim * dim)

    @staticmethod
    def image_shape(model):
        return 3, 1, model.size

    @staticmethod
    def check_block(block, what):
        assert num_weights(block)

    @staticmethod
    def passed_by(block):
        return [block]

    @staticmethod
    def attend(block, x, context):
        distance = context.arguments["distance"]
        branch, q, k = block.attention(x, distance)
        return Attended(x + branch, q[:, None], k[:, None], 1 / 8, bias=-distance)

    @staticmethod
    def feed(block, x):
        return x + block.mlp(x)
