"""What the studies share: where their data lies, and their tables of what is finished."""

from __future__ import annotations

import argparse
import csv
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def data_folder(parser: argparse.ArgumentParser, given: Path | None, names: Iterable[str]) -> Path:
    """The folder with these files; ends the program where they are not in it."""
    folder = given or (Path(os.environ["SKIPVIT_DATA"]) if "SKIPVIT_DATA" in os.environ else None)
    if folder is None:
        parser.error(f"needs --data or SKIPVIT_DATA: a folder with {' and '.join(names)}")
    if lacking := [name for name in names if not (folder / name).exists()]:
        parser.error(f"{folder} lacks {' and '.join(lacking)}")
    return folder


def command(folder: Path) -> str:
    """How the script was called, with DIR in the place of the data's folder."""
    return shlex.join(["python", *sys.argv]).replace(str(folder), "DIR")


def read_csv(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append_csv(path: Path, columns: Sequence[str], row: Sequence[Any]) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([columns, row] if new else [row])
