"""What `skipvit train` learns from: timm's data sets and loaders, with a seed for each picture."""

from __future__ import annotations

import random
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from PIL import Image
from timm.data import create_dataset, create_loader
from torch.utils.data import Dataset, IterableDataset

NEIGHBOURS = 10  # pictures tried in the place of one that cannot be read


class BadPicture(ValueError):
    """A picture that cannot be read, or whose label is no class: its text names it."""


def seed(*key: int) -> int:
    """Seed every generator of the CPU from a key; the seed.

    What augments a picture is drawn from its own key, and what a step draws from its: a training
    that goes on in the middle, with more workers or processes, draws the same, and nothing of the
    generators needs to be stored. torch.manual_seed takes 140 us where a GPU is idle, this 25 us.
    """
    number = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(number)
    np.random.seed(number)
    torch.default_generator.manual_seed(number)
    return number


class Pictures(Dataset):
    """A data set of timm's that can be indexed: every picture under a seed of its own.

    Args:
        dataset: made by timm's create_dataset: a folder, tar files, a data set of the hub.
        seed: of the training.
        num_classes: labels must be below.
        stop: raise `BadPicture` on a picture that cannot be read, rather than name it on stderr and
            take the next one.
    """

    def __init__(self, dataset: Any, seed: int, num_classes: int, *, stop: bool) -> None:
        self.dataset, self.seed, self.num_classes, self.stop = dataset, seed, num_classes, stop
        self.transform: Any = None  # timm's create_loader sets it
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers live on

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        seed(self.seed, int(self.epoch), index)
        for at in range(index, index + NEIGHBOURS):
            name = self.dataset.filename(at % len(self))
            try:
                file, label = self.dataset.reader[at % len(self)]
                with Image.open(file) as opened:
                    picture = opened.convert("RGB")
                break
            except Exception as error:  # PIL's decoders have a dozen kinds
                reason = f"{name} cannot be read as a picture: {error}"
                if self.stop:
                    raise BadPicture(reason) from error
                print(f"skipped: {reason}", file=sys.stderr, flush=True)
        else:
            raise BadPicture(f"{NEIGHBOURS} in a row cannot be read; {reason}")
        check_label(int(label), self.num_classes, name)
        return self.transform(picture), label


def check_label(label: int, num_classes: int, name: str = "a picture") -> int:
    """The label; a `BadPicture` where it is no class."""
    if not 0 <= label < num_classes:
        raise BadPicture(f"labels must be in [0, {num_classes}), got {label} of {name}")
    return label


def open_split(
    root: str, name: str, split: str, *, training: bool, batch_size: int, seed: int
) -> Any:
    """A split as timm opens it, or a ValueError in one line."""
    if name.partition("/")[0] not in ("", "hfds", "hfids", "wds", "tfds"):
        raise ValueError(f'dataset must be "", "hfds/", "hfids/", "wds/" or "tfds/", got {name!r}')
    if not name and not Path(root).exists():
        raise ValueError(f"data must be a folder or a tar file, got {root}, which is not there")
    try:
        return create_dataset(
            name, root, split, is_training=training, batch_size=batch_size, seed=seed
        )
    except (AssertionError, ImportError, OSError, RuntimeError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"data {root} cannot be opened: {reason or error!r}") from error


def class_names(dataset: Any) -> list[str] | None:
    """Sorted by label; None where the data does not tell, as shards do not."""
    reader = dataset.reader
    labels = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)
    return sorted(labels, key=labels.get) if labels else None


def count_classes(train: Any, validation: Any, num_classes: int | None) -> int:
    """How many the data has, or as given where it does not tell.

    Raises:
        ValueError: where training and validation, or the number given, do not match.
    """
    names = class_names(train)
    if names is None:
        if num_classes is None:
            raise ValueError("num_classes must be given: this data does not tell its classes")
        return num_classes
    if len(names) < 2:
        raise ValueError(
            f"data must hold a folder of pictures for each of two classes or more, "
            f"got {len(names)} in {train.reader.root}"
        )
    if num_classes not in (None, len(names)):
        raise ValueError(f"num_classes must be that of the data, {len(names)}, got {num_classes}")
    others = names if validation is None else class_names(validation) or names
    if others != names:
        odd = ", ".join(sorted(set(names) ^ set(others))[:3])
        raise ValueError(f"training and validation must have the same classes, but not so: {odd}")
    return len(names)


def make_loader(dataset: Any, accelerator: Accelerator, *, seed: int, **options: Any) -> Any:
    """timm's loader, its batches split between the processes and moved to the device.

    Shards split themselves: there each process reads whole batches of its share.

    Args:
        dataset: a `Pictures`, or an iterable one of timm's.
        accelerator: of the training.
        seed: of the order.
        options: of timm's create_loader; batch_size is of all processes together.
    """
    iterable = isinstance(dataset, IterableDataset)
    if iterable:
        options["batch_size"] //= accelerator.num_processes
    loader: Any = create_loader(
        dataset,
        use_prefetcher=False,  # it erases and normalises batches, from no picture's own seed
        pin_memory=accelerator.device.type == "cuda",
        # The workers of shards begin anew with each epoch, and so do their seeds.
        persistent_workers=not iterable,
        worker_seeding=_start_worker,  # type: ignore[arg-type]  # timm calls it
        **options,
    )
    return prepare_data_loader(
        loader,
        device=accelerator.device,
        num_processes=1 if iterable else accelerator.num_processes,
        process_index=0 if iterable else accelerator.process_index,
        split_batches=not iterable,
        even_batches=False,
        put_on_device=True,
        dispatch_batches=False,
        use_seedable_sampler=True,
        data_seed=seed,
        non_blocking=True,
    )


def _start_worker(worker: Any) -> int:
    """Ctrl-C reaches the workers too, but is the trainer's to answer; the worker's seed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return worker.seed % 2**32


def is_root(dataset: Any, root: str) -> bool:
    """Whether a split of a folder was not found, so that timm took the whole folder for it."""
    reader_root = getattr(dataset.reader, "root", None)
    return reader_root is not None and Path(str(reader_root)) == Path(root)
