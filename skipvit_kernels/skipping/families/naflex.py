"""timm's NaFlexVit: images or packed patches with padding, on the blocks of ViT or of Eva."""

from __future__ import annotations

from typing import Any

from skipvit_kernels.skipping.families.base import Family, num_weights


class NaFlex(Family):
    looped = True

    @staticmethod
    def has_cls(model: Any) -> bool:
        return model.embeds.cls_token is not None

    @staticmethod
    def placed_by(model: Any) -> str | None:
        return "a mask of valid patches"

    @staticmethod
    def reads_grid(model: Any) -> str | None:
        return "the pool, by patch_valid,"

    @classmethod
    def surroundings(cls, model: Any) -> tuple[int, int, int]:
        _, height, width = cls.image_shape(model)
        rows, columns = model.embeds.patch_size
        patches = height // rows * (width // columns)
        return patches, num_weights(model.embeds), num_weights(model.head)

    @classmethod
    def image_shape(cls, model: Any) -> tuple[int, int, int]:
        """It takes any; this is the grid that its position embedding is learned on."""
        grid, patch = model.embeds.pos_embed_grid_size or (16, 16), model.embeds.patch_size
        return (model.embeds.in_chans, grid[0] * patch[0], grid[1] * patch[1])
