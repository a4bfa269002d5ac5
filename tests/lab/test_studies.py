"""The studies under benchmarks/ that need data: their parts that need none."""

import dataclasses
import sys
from pathlib import Path

import pytest
import timm
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import frontier_settings
import frontier_tome
import results
import table1
import table1_cells
import table1_page


def test_tome_without_merging_is_the_model_and_a_merge_is_a_mean_by_size():
    model = timm.create_model("deit_tiny_patch16_224").eval()
    images = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        assert torch.equal(frontier_tome.ToMe(model, 0)(images), model(images))
        assert not torch.equal(frontier_tome.ToMe(model, 8)(images), model(images))
    x, keys = torch.randn(2, 9, 4).double(), torch.randn(2, 3, 9, 5).double()
    sizes = torch.rand(2, 9).double() + 1
    merged, new = frontier_tome.merge(x, keys, sizes, 3)
    assert merged.shape == (2, 6, 4)
    torch.testing.assert_close((merged * new[..., None]).sum(1), (x * sizes[..., None]).sum(1))
    torch.testing.assert_close(new.sum(1), sizes.sum(1))
    assert torch.equal(merged[:, 0], x[:, 0])  # CLS


def test_every_setting_of_the_frontier_can_be_patched():
    model = timm.create_model("deit_tiny_patch16_224")
    names = [str(setting) for setting in frontier_settings.all_settings()]
    assert len(set(names)) == len(names)
    for setting in frontier_settings.all_settings():
        setting.build(model)


@pytest.mark.parametrize("scale", (*table1_cells.CPU, *table1_cells.GPU), ids=lambda s: s.name)
def test_every_cell_of_table_1_has_a_name_a_key_and_a_model(scale):
    cells = table1_cells.cells((scale,))
    assert len({str(cell) for cell in cells}) == len(cells)
    assert len({(cell.training.key, cell.seed) for cell in cells}) == len(cells)
    small = dataclasses.replace(scale, width=scale.heads * 4)
    for training in dict.fromkeys(cell.training for cell in cells):
        assert table1.speedup(small, training) >= 1, training


@pytest.mark.parametrize("skip", ("", "6(55%)+11", "STViT"))
def test_a_cell_trains_and_the_page_names_what_is_missing(skip, tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(table1.sk, "set_epoch", lambda model, epoch: steps.append(epoch))
    draw = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (640, 1, 28, 28), generator=draw, dtype=torch.uint8)
    labels = torch.randint(0, 10, (640,), generator=draw)
    monkeypatch.setattr(table1, "load", lambda *_: [pictures, labels] * 2)
    scale = dataclasses.replace(
        table1_cells.CPU[0], width=12, images=20 * 32,
        trainings=tuple(map(table1_cells.Training, dict.fromkeys(("", skip)))),
    )  # fmt: skip
    cell = table1_cells.Cell(scale, table1_cells.Training(skip), 0)
    row = table1.train(cell, tmp_path, "cpu")
    assert steps == (list(range(20)) if cell.training.patched else [])
    results.append_csv(tmp_path / "cells.csv", table1.COLUMNS, row)
    assert list(table1_page.finished(tmp_path / "cells.csv", (scale,))) == [cell]
    table1_page.write(tmp_path, (scale,))
    page = (tmp_path / "report.md").read_text()
    assert f"`{skip or 'unpatched'}` | 1 | {100 * float(row[5]):.2f}" in page
    assert f"- {dataclasses.replace(cell, seed=1)}" in page and f"- {cell}\n" not in page


def cut(picture, down, right, flipped):
    picture = picture.flip(2) if flipped else picture
    return picture[:, down : down + 16, right : right + 16]


def test_pictures_are_shifted_and_mirrored_by_whole_pixels():
    pictures = torch.arange(2 * 3 * 16 * 16).view(2, 3, 16, 16) % 251
    seen = set()
    for seed in range(20):
        moved = table1.moved(pictures, torch.Generator().manual_seed(seed))
        for before, after in zip(pictures, moved, strict=True):
            padded = torch.nn.functional.pad(before, (2, 2, 2, 2))
            ways = [
                (down, right, flipped)
                for down in range(5)
                for right in range(5)
                for flipped in (False, True)
                if torch.equal(
                    after,
                    (padded.flip(2) if flipped else padded)[
                        :, down : down + 16, right : right + 16
                    ],
                )
            ]
            assert len(ways) == 1
            seen.add(ways[0])
    assert len(seen) > 20
