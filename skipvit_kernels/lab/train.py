"""skipvit train: a timm model that skips, on timm's data, by accelerate on any devices."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import os
import shutil
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tensorboard  # noqa: F401  (where it is missing accelerate leaves its logs out)
import torch
from accelerate import Accelerator, DistributedType, skip_first_batches
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from timm.data import Mixup, resolve_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask, LogitDistillationTask
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.utils.data import IterableDataset

from skipvit_kernels.lab import machine, report, train_data
from skipvit_kernels.lab.train_settings import LAST, Settings, make_model, told
from skipvit_kernels.skipping.patch import patch, set_epoch, unpatch

BEST = "best.pth"
NOTHING = {"loss": 0.0, "hits": 0.0, "seconds": 0.0, "steps": 0}  # of an epoch, to be summed up
READ_STEPS = 10  # steps between two looks at the losses, for which a GPU has to be waited for


def run(settings: Settings) -> list[dict[str, Any]]:
    """Train; checkpoints, log.csv and TensorBoard's files are in `settings.out`.

    Returns:
        A row for each epoch, as in log.csv.

    Raises:
        ValueError: on data, weights or settings that do not fit, a loss that is not finite, a
            picture that cannot be read (with `stop_on_bad`), a full disk: in one line.
        KeyboardInterrupt: after Ctrl-C, with the state saved.
    """
    try:
        training = Training(settings)
        try:
            return training.run()
        finally:
            training.accelerator.end_training()
    except train_data.BadPicture as error:
        # From a worker comes its traceback; what was said is the end of it.
        raise ValueError(str(error).rsplit("BadPicture: ", 1)[-1].strip()) from error
    except OSError as error:
        raise ValueError(str(error)) from error


class Training:
    """A training and its state; everything is made by timm and accelerate."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.accelerator = accelerator = Accelerator(
            mixed_precision=settings.mixed_precision,
            gradient_accumulation_steps=settings.accumulate,
            cpu=settings.cpu,
            log_with="tensorboard",
            project_dir=str(settings.out),
        )
        if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise ValueError("sharded models cannot be saved here yet: use accelerate's DDP")
        if settings.batch_size % accelerator.num_processes:
            raise ValueError(
                f"batch_size must be a multiple of the {accelerator.num_processes} processes, "
                f"got {settings.batch_size}"
            )
        self.console = Console(quiet=not accelerator.is_main_process)
        train, val = self._open()
        num_classes = train_data.count_classes(train, val, settings.num_classes)
        train_data.seed(settings.seed)
        model = make_model(settings, num_classes)
        teacher = None
        if settings.teacher:
            teacher = copy.deepcopy(model).requires_grad_(False).to(accelerator.device)
        self.patched = settings.config_of(0)
        self.running = self.patched.at(0)
        # Without a configuration any model of timm's trains, STViT among them.
        self.patches = bool(settings.config.drop_at) or settings.config.cls_only_last_block
        if self.patches:
            patch(model, self.patched)
        self.loader = self._loader(train, model, num_classes, training=True)
        self.val_loader = None
        if val is not None:
            self.val_loader = self._loader(val, model, num_classes, training=False)
        if len(self.loader) == 0:
            raise ValueError(f"batch_size must be at most the training pictures, {len(train)}")
        self.mixup = None
        if settings.mixup_args:
            if settings.batch_size // accelerator.num_processes % 2:
                raise ValueError(
                    f"batch_size must be even in each process for mixup, got {settings.batch_size}"
                )
            smoothing = settings.loss_args.get("smoothing", 0.0)
            options = {"num_classes": num_classes, "label_smoothing": smoothing}
            self.mixup = told("mixup_args", Mixup, **options | settings.mixup_args)
        model.to(accelerator.device)
        self.optimizer = told(
            "opt, opt_args", create_optimizer_v2, model, opt=settings.opt, lr=settings.lr,
            weight_decay=settings.weight_decay, **settings.opt_args,
        )  # fmt: skip
        steps = math.ceil(len(self.loader) / accelerator.gradient_accumulation_steps)
        self.scheduler, _ = told(
            "sched, sched_args", create_scheduler_v2, self.optimizer, sched=settings.sched,
            num_epochs=settings.epochs, warmup_epochs=settings.lr_warmup_epochs,
            step_on_epochs=False, updates_per_epoch=steps, **settings.sched_args,
        )  # fmt: skip
        self.ema = None if settings.ema is None else ModelEmaV3(model, decay=settings.ema)
        self.model, self.optimizer = accelerator.prepare(model, self.optimizer)
        self.unwrapped: Any = accelerator.unwrap_model(self.model)  # looks at every module
        loss = {"criterion_kwargs": {"soft_targets": self.mixup is not None, **settings.loss_args}}
        options = loss | {"device": accelerator.device, "verbose": False}
        self.task = (
            told("loss_args", ClassificationTask, self.model, **options)
            if teacher is None
            else told("loss_args, teacher_args", LogitDistillationTask, self.model, teacher,
                      **options | settings.teacher_args)
        )  # fmt: skip
        # Batches are of the running epoch, updates (steps) and those that skipped of all.
        self.epoch = self.batch = self.updates = self.skipped = 0
        self.sums: dict[str, float] = dict(NOTHING)
        self.rows: list[dict[str, Any]] = []
        self.stop = False

    def _open(self) -> tuple[Any, Any]:
        """The two splits as timm has them; None for a validation that is not wanted."""
        s = self.settings
        options = {"batch_size": s.batch_size, "seed": s.seed}
        train = train_data.open_split(s.data, s.dataset, s.train_split, training=True, **options)
        # A folder of classes alone is fine, but not one of other splits, nor a split's wrong name.
        named = s.train_split != "train" or (s.val_split and s.val_data is None)
        folder = not s.dataset and Path(s.data, s.val_split).is_dir()
        if named and folder and train_data.is_root(train, s.data):
            raise ValueError(f"data must hold the split {s.train_split!r} too, got {s.data}")
        if not s.val_split:
            return train, None
        root = s.val_data or s.data
        val = train_data.open_split(root, s.dataset, s.val_split, training=False, **options)
        if s.val_data is None and train_data.is_root(val, root):
            raise ValueError(
                f'data must hold the split {s.val_split!r} too, got {root}; val_split "" trains '
                "without validation"
            )
        return train, val

    def _loader(self, dataset: Any, model: Any, num_classes: int, *, training: bool) -> Any:
        s = self.settings
        if isinstance(dataset, IterableDataset):
            check = functools.partial(train_data.check_label, num_classes=num_classes)
            vars(dataset)["target_transform"] = check
        else:
            dataset = train_data.Pictures(dataset, s.seed, num_classes, stop=s.stop_on_bad)
        size = {"img_size": s.img_size} if s.img_size else {}
        options = resolve_data_config(size, model=model) | (s.augment_args if training else {})
        return told(
            "augment_args", train_data.make_loader, dataset, self.accelerator, seed=s.seed,
            num_workers=s.workers, batch_size=s.batch_size, is_training=training, **options,
        )  # fmt: skip

    def run(self) -> list[dict[str, Any]]:
        s, about = self.settings, machine.versions()
        s.out.mkdir(parents=True, exist_ok=True)
        if s.resume and (s.out / LAST).exists():
            self.load(s.out / LAST)
        self.accelerator.init_trackers("tensorboard")
        said = ", ".join(f"{name} {about[name]}" for name in ("torch", "timm", "CPU"))
        where = f"{self.accelerator.num_processes} x {self.accelerator.device.type}"
        self.console.print(
            f"{s.model}, {str(s.config) or 'unskipped'}, {where}; {said}", soft_wrap=True
        )
        with self._ctrl_c(), self._progress() as progress:
            while self.epoch < s.epochs:
                stop = self._epoch(progress)
                self._end_epoch()
                if stop and self.epoch < s.epochs:
                    raise KeyboardInterrupt
        self.console.print(summary(self.rows))
        return self.rows

    def _epoch(self, progress: Progress) -> bool:
        """Train on the batches of the epoch that are left; whether to stop behind it."""
        s, accelerator = self.settings, self.accelerator
        self._seed(self.batch)  # of the workers of shards; other pictures have their own
        self.loader.set_epoch(self.epoch)
        if isinstance(self.loader.dataset, train_data.Pictures):
            self.loader.dataset.epoch.fill_(self.epoch)
        left = skip_first_batches(self.loader, self.batch) if self.batch else self.loader
        task = progress.add_task(f"epoch {self.epoch}", total=len(self.loader), said="")
        self.model.train()
        parts: list[Tensor] = []  # loss and hits of the batches of a step
        found: list[Tensor] = []  # and of the steps that were not yet looked at
        stop, start = False, time.perf_counter()
        for images, labels in left:
            self._skip()
            self._seed(self.batch)
            targets = labels
            if self.mixup:
                images, targets = self.mixup(images, labels)
            with accelerator.accumulate(self.model):
                result = self.task(images, targets)
                accelerator.backward(result["loss"])
                if s.clip_grad is not None and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(self.model.parameters(), s.clip_grad)
                self.optimizer.step()
                self.optimizer.zero_grad()
            hits = (result["output"].detach().argmax(1) == labels).float().mean()
            parts.append(torch.stack([result["loss"].detach().float(), hits]))
            self.batch += 1
            if not accelerator.sync_gradients:
                continue
            found.append(torch.stack(parts).mean(0))
            parts.clear()
            self.updates += 1
            if self.scheduler:
                self.scheduler.step_update(self.updates)
            if self.ema:
                self.ema.update(self.unwrapped, step=self.updates)
            self.skipped += bool(self.running.drop_at)
            self.sums["steps"] += 1
            step, last = self.sums["steps"], accelerator.gradient_state.end_of_dataloader
            save = s.checkpoint_steps is not None and step % s.checkpoint_steps == 0
            alone = accelerator.num_processes == 1
            if save or last or step % READ_STEPS == 0 or (self.stop and alone):
                stop = self._read(found)
                found.clear()
                self.sums["seconds"] += time.perf_counter() - start
                start = time.perf_counter()
                progress.update(task, completed=self.batch, said=self._said())
                if (save or stop) and not last:
                    self.save()
                    if stop:
                        raise KeyboardInterrupt
        progress.remove_task(task)
        return stop

    def _skip(self) -> None:
        """Have the model, and its average, skip as the step wants it."""
        if not self.patches:
            return
        config = self.settings.config_of(self.epoch)
        epoch = self.epoch + self.batch / len(self.loader)
        running = config.at(epoch)
        if (config, running) == (self.patched, self.running):
            return  # as in most steps: `set_epoch` looks at every module
        for model in (self.unwrapped, *([self.ema.module] if self.ema else [])):
            if config != self.patched:
                patch(unpatch(model), config)
            set_epoch(model, epoch)
        self.patched, self.running = config, running

    def _seed(self, batch: int) -> None:
        """Before a forward: what it draws is of this batch alone."""
        number = train_data.seed(
            self.settings.seed, self.epoch, batch, self.accelerator.process_index, 1
        )
        if self.accelerator.device.type != "cpu":
            torch.manual_seed(number)

    def _read(self, found: list[Tensor]) -> bool:
        """Add up what the steps found, of all processes; whether any of these is to stop."""
        flag = torch.full((1, 2), float(self.stop), device=self.accelerator.device)
        table = torch.cat([torch.stack(found), flag])
        *steps, (stop, _) = self.accelerator.reduce(table, "mean").tolist()
        for step, (loss, hits) in enumerate(steps, self.updates - len(steps) + 1):
            if not math.isfinite(loss):
                raise self._diverged(f"the loss is {loss} at step {step}")
            self.sums["loss"] += loss
            self.sums["hits"] += hits
        if not math.isfinite(get_total_norm(list(self.model.parameters()))):
            # The next loss would tell, but a checkpoint may be written before it.
            raise self._diverged(f"the weights are not finite after step {self.updates}")
        return stop > 0

    def _diverged(self, what: str) -> ValueError:
        last = self.settings.out / LAST
        good = f"the last good checkpoint is {last}" if last.exists() else "none was saved"
        return ValueError(f"{what}, epoch {self.epoch}; {good}")

    def _said(self) -> str:
        loss, hits, seconds, steps = self.sums.values()
        return (
            f"{self.batch * self.settings.batch_size / seconds:.1f} images/s  "
            f"loss {loss / steps:.3f}  top-1 {hits / steps:.1%}  "
            f"skipped {self.skipped / self.updates:.0%} of steps"
        )

    def _end_epoch(self) -> None:
        """Validate, write and go on to the next."""
        s = self.settings
        loss, hits, seconds, steps = self.sums.values()
        row = {
            "epoch": self.epoch,
            "skip": str(self.running) if self.running.drop_at else "unskipped",  # at its last step
            "lr": self.optimizer.param_groups[0]["lr"],
            "loss": loss / steps,
            "top1": hits / steps,
            **self._validate(),
            "images_per_second": self.batch * s.batch_size / seconds,
            "steps_skipped": self.skipped / self.updates,
        }
        best = max((r.get("val_top1", 0.0) for r in self.rows), default=-1.0)
        self.rows.append(row)
        self.epoch, self.batch, self.sums = self.epoch + 1, 0, dict(NOTHING)
        if self.accelerator.is_main_process:
            write(s.out / "log.csv", lambda path: report.write_csv(path, self.rows))
            if row.get("val_top1", best) > best:
                weights = {"state_dict": self._validated().state_dict()}
                write(s.out / BEST, functools.partial(torch.save, weights))
        self.save()
        values = {name: v for name, v in row.items() if name not in ("epoch", "skip")}
        self.accelerator.log(values, step=row["epoch"])
        said = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        self.console.print(f"epoch {row['epoch']}: {said}", soft_wrap=True)

    def _validated(self) -> Any:
        """The model that is validated: the average where there is one."""
        return self.ema.module if self.ema else self.unwrapped

    @torch.inference_mode()
    def _validate(self) -> dict[str, float]:
        if self.val_loader is None:
            return {}
        model = self._validated().eval()
        sums = torch.zeros(4, device=self.accelerator.device)
        for index, (images, labels) in enumerate(self.val_loader):
            self._seed(index)  # of the scorer "random"
            with self.accelerator.autocast():
                logits = model(images)
            best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
            loss = nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
            count = sums.new_tensor(len(labels))
            sums += torch.stack([loss, best[:, 0].sum(), best.any(1).sum(), count])
        *found, count = self.accelerator.reduce(sums).tolist()
        names = ("val_loss", "val_top1", "val_top5")
        return {name: value / count for name, value in zip(names, found, strict=True)}

    def save(self) -> None:
        """Everything that the rest of the training depends on; a kill leaves the one before."""
        if not self.accelerator.is_main_process:
            return
        scaler = self.accelerator.scaler
        state = {
            "state_dict": self.unwrapped.state_dict(),
            **({"state_dict_ema": self.ema.module.state_dict()} if self.ema else {}),
            "optimizer": self.optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler else None,
            "settings": self.settings.record(),
            "at": [self.epoch, self.batch, self.updates, self.skipped],
            "sums": self.sums,
            "rows": self.rows,
        }
        write(self.settings.out / LAST, functools.partial(torch.save, state))

    def load(self, path: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: where it cannot be read, or is of a training with other settings.
        """
        state = told(str(path), torch.load, path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or "settings" not in state:
            raise ValueError(f"{path} must be a checkpoint of skipvit train")
        now, then = self.settings.record(), state["settings"]
        for name, value in now.items():
            if then.get(name) != value:
                raise ValueError(
                    f"{path} is of a training with {name} {then.get(name)}, got {value}"
                )
        self.unwrapped.load_state_dict(state["state_dict"])
        if self.ema:
            self.ema.module.load_state_dict(state["state_dict_ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.epoch, self.batch, self.updates, self.skipped = state["at"]
        self.sums, self.rows = state["sums"], state["rows"]

    @contextmanager
    def _ctrl_c(self) -> Iterator[None]:
        """The first Ctrl-C ends the training behind its step, the second at once."""

        def on_signal(*_: Any) -> None:
            if self.stop:
                raise KeyboardInterrupt
            self.stop = True

        before = signal.signal(signal.SIGINT, on_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _progress(self) -> Progress:
        columns = (TextColumn("{task.description}"), BarColumn(20), TimeRemainingColumn(),
                   TextColumn("{task.fields[said]}"))  # fmt: skip
        return Progress(*columns, console=self.console, disable=not self.console.is_terminal)


def write(path: Path, to: Callable[[Path], Any]) -> None:
    """Write a file whole or not at all: beside the one that is there, then over it."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        to(unfinished)
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save has the latter for a full disk
        free = shutil.disk_usage(path.parent).free
        unfinished.unlink(missing_ok=True)
        before = "; the one before is intact" if path.exists() else ""
        raise ValueError(
            f"{path} cannot be written, {free / 2**20:.1f} MiB are free on its disk: "
            f"{' '.join(str(error).split()):.200}{before}"
        ) from error


def summary(rows: list[dict[str, Any]]) -> Table:
    """A row for each stretch of epochs that skipped alike, and the best epoch."""
    table = Table(title="Training", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("epochs", no_wrap=True)
    table.add_column("patches", no_wrap=True)
    for name in ("images/s", "loss", "val loss", "top-1", "top-5"):
        table.add_column(name, justify="right")

    def add(name: str, group: list[dict[str, Any]]) -> None:
        last, speed = group[-1], statistics.median(row["images_per_second"] for row in group)
        forms = {"val_loss": ".3f", "val_top1": ".1%", "val_top5": ".1%"}
        cells = (format(last[key], form) if key in last else "" for key, form in forms.items())
        table.add_row(name, last["skip"], f"{speed:.1f}", f"{last['loss']:.3f}", *cells)

    for _, rows_alike in itertools.groupby(rows, lambda row: row["skip"]):
        group = list(rows_alike)
        add(f"{group[0]['epoch']}-{group[-1]['epoch']}", group)
    best = max(rows, key=lambda row: row.get("val_top1", 0.0))
    if "val_top1" in best:
        add(f"best: {best['epoch']}", [best])
    return table
