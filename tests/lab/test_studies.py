"""The studies under benchmarks/ that need data: their parts that need none."""

import argparse
import dataclasses
import functools
import math
import sys
from pathlib import Path

import pytest
import timm
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import equal_time
import fine_tune
import frontier_settings
import frontier_tome
import results
import systems_trained
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


def test_whoever_is_faster_trains_for_as_many_more_epochs(tmp_path):
    with pytest.raises(ValueError, match=r"speed.csv has no 'merging': measure with --speed"):
        equal_time.epochs_as_long(tmp_path, "merging", 8)
    results.append_csv(tmp_path / "speed.csv", ("name", "speedup"), ["merging", "1.32"])
    assert equal_time.epochs_as_long(tmp_path, "merging", 8) == 11


@pytest.mark.parametrize("name", ("EViT", "STViT"))
def test_a_system_trains_and_its_epochs_are_timed(name, tmp_path, monkeypatch):
    pictures = torch.randint(0, 256, (60, 1, 28, 28), dtype=torch.uint8)
    monkeypatch.setattr(table1, "load", lambda *_: [pictures, torch.arange(60) % 10] * 2)
    systems_trained.write_pictures(tmp_path, tmp_path, 60)
    settings = systems_trained.settings_of(name, 1, 2, tmp_path, "out")
    first, other = equal_time.speeds({"first": settings, name: settings}, 1)
    assert first["speedup"] == 1 and 0.2 < other["speedup"] < 5
    args = argparse.Namespace(out=tmp_path, epochs=2, pictures=60, threads=1)
    cell = systems_trained.Cell(name, False, 1)
    call = functools.partial(systems_trained.train_cell, args=args, folder=tmp_path, work=tmp_path)
    row = dict(zip(systems_trained.COLUMNS, call(cell), strict=True))
    assert (row["epochs"], row["pictures"]) == (2, 60)
    assert math.isfinite(float(row["loss"])) and 0 <= float(row["top1"]) <= 1
    # What is left of one that was ended does not shorten the next.
    again = dict(zip(systems_trained.COLUMNS, call(cell), strict=True))
    assert again | {"cpu_seconds": 0} == row | {"cpu_seconds": 0}


def rows_of(cells, columns, **values):
    """A row for each cell, whose top-1 rises by a point with each."""
    for at, cell in enumerate(cells):
        row = values | dataclasses.asdict(cell) | {"top1": 0.5 + at / 100}
        yield [row[name] for name in columns]


def test_the_pages_of_equal_time_have_changes_by_seed_and_name_what_is_missing(tmp_path):
    values = {"epochs": 8, "cpu_seconds": 50, "loss": 1, "pictures": 100, "tested": 60}
    cells = [
        systems_trained.Cell(name, as_long, seed)
        for seed in (0, 1)
        for name, as_long in (("no skipping", False), ("STViT", False), ("STViT", True))
    ]
    for row in rows_of(cells, systems_trained.COLUMNS, **values):
        results.append_csv(tmp_path / "cells.csv", systems_trained.COLUMNS, row)
    assert list(systems_trained.finished(tmp_path / "cells.csv")) == cells
    results.append_csv(tmp_path / "speed.csv", ("name", "speedup"), ["STViT", "1.5"])
    systems_trained.write_page(tmp_path, "python study.py")
    many, long = (tmp_path / "report.md").read_text().split("## For as long")
    plain = "| `unpatched` | no skipping | 2 | 8 | 50 ± 0.00 | 51.50 ± 2.12 |  |"
    stvit = "| `stvit_deit_tiny_patch16_224` | STViT | 2 | 8 | 50 ± 0.00 |"
    assert plain in many and plain in long and "STViT x1.50" in long
    assert f"{stvit} 52.50 ± 2.12 | +1.00 ± 0.00 |" in many
    assert f"{stvit} 53.50 ± 2.12 | +2.00 ± 0.00 |" in long
    missing = long[long.index("Not finished") :]
    assert "STViT, seed 2; " in missing and "STViT, as long, seed 1" not in missing


def test_the_page_of_fine_tuning_has_changes_by_seed_and_names_what_is_missing(tmp_path):
    values = {"epochs": 8, "cpu_seconds": 50, "loss": 1, "pictures": 100, "tested": 60}
    cells = [
        fine_tune.Cell(name, seed) for seed in (0, 1) for name in ("without skipping", "fused")
    ]
    for row in rows_of(cells, fine_tune.COLUMNS, **values):
        results.append_csv(tmp_path / "cells.csv", fine_tune.COLUMNS, row)
    for name, speedup in (("without skipping", "1"), ("fused", "1.25"), ("merged", "1.3")):
        columns = ("name", "speedup", "top1_before")
        results.append_csv(tmp_path / "speed.csv", columns, [name, speedup, "0.25"])
    fine_tune.write_page(tmp_path, "python study.py")
    page = (tmp_path / "report.md").read_text()
    fused = "fused | 2 | x1.25 | 8 | 50 ± 0.00 | 25.0 | 52.00 ± 1.41 | +1.00 ± 0.00 |"
    assert fused in page and "| merged |" not in page
    assert (
        "merged, seed 0; " in page and "fused, seed 2; " in page and "fused, seed 1; " not in page
    )
