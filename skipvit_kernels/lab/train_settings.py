"""What `skipvit train` trains: its settings, when the model skips, the model's weights."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
from timm.models import load_state_dict

import skipvit_kernels.models  # noqa: F401  (registers its models with timm)
from skipvit_kernels.lab import report
from skipvit_kernels.lab.bench import at_least
from skipvit_kernels.skipping.config import SkipConfig

LAST = "last.pth"
RAMP_STAIRS = 4  # of `ramp_epochs`: EViT's own changes the number of tokens with every few steps
# May differ between a training and its resumption.
OF_A_RUN = {
    *("data", "val_data", "out", "resume", "workers", "checkpoint_steps", "cpu", "stop_on_bad"),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of a training; `skipvit train --help` has them in words.

    Attributes:
        data: folder with a folder for each split and in those one for each class, a tar file; or
            what timm's create_dataset takes as root beside `dataset`.
        model: a timm model's name.
        out: folder for checkpoints and logs.
        skip: in the notation of `SkipConfig`; "" drops nothing.
        warmup_epochs: without dropping; None: the configuration's.
        ramp_epochs: after them, in which the share that is dropped rises along EViT's cosine, in
            four stairs; 0: the configuration's own.
        finish_dense: last epochs, without dropping.
        val_split: "" trains without validation.
        val_data: where it lies, default `data`.
        batch_size: images of a forward of all processes together.
        accumulate: batches of an optimizer's step.
        fine_tune: a checkpoint to begin from; its head is kept where it has as many classes.
        teacher: "self": also learn from the logits of the model as it began, without skipping.
        ema: decay of a moving average of the weights, which is then what is validated.
        ..._args: further options of timm's create_model, create_optimizer_v2, create_scheduler_v2,
            create_classification_loss, create_loader (of the training: augmentation), Mixup, and
            LogitDistillationTask.
        mixed_precision: "no", "fp16", "bf16"; default accelerate's.
        checkpoint_steps: also within an epoch, each so many steps of the optimizer.
        resume: go on from the last checkpoint in `out`.
        stop_on_bad: at a picture that cannot be read; default: it is named and left out.
    """

    data: str
    model: str
    out: Path
    skip: str = ""
    warmup_epochs: int | None = None
    ramp_epochs: int = 0
    finish_dense: int = 0
    cls_only_last_block: bool = False
    dataset: str = ""
    train_split: str = "train"
    val_split: str = "validation"
    val_data: str | None = None
    num_classes: int | None = None
    img_size: int | None = None
    epochs: int = 300
    batch_size: int = 128
    accumulate: int = 1
    lr: float = 5e-4
    lr_warmup_epochs: int = 5
    opt: str = "adamw"
    weight_decay: float = 0.05
    sched: str = "cosine"
    clip_grad: float | None = None
    ema: float | None = None
    fine_tune: Path | None = None
    pretrained: bool = False
    teacher: str | None = None
    model_args: dict[str, Any] = dataclasses.field(default_factory=dict)
    opt_args: dict[str, Any] = dataclasses.field(default_factory=dict)
    sched_args: dict[str, Any] = dataclasses.field(default_factory=dict)
    loss_args: dict[str, Any] = dataclasses.field(default_factory=dict)
    augment_args: dict[str, Any] = dataclasses.field(default_factory=dict)
    mixup_args: dict[str, Any] = dataclasses.field(default_factory=dict)
    teacher_args: dict[str, Any] = dataclasses.field(default_factory=dict)
    mixed_precision: str | None = None
    cpu: bool = False
    workers: int = 4
    seed: int = 0
    checkpoint_steps: int | None = None
    resume: bool = False
    stop_on_bad: bool = False

    def __post_init__(self) -> None:
        names = ("epochs", "batch_size", "accumulate", "img_size", "checkpoint_steps")
        at_least(1, **{name: getattr(self, name) for name in names})
        names = ("ramp_epochs", "finish_dense", "workers", "seed", "lr_warmup_epochs")
        at_least(0, **{name: getattr(self, name) for name in names})
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ValueError(f"ema must be a decay in [0, 1), got {self.ema}")
        if self.clip_grad is not None and not self.clip_grad > 0:
            raise ValueError(f"clip_grad must be above 0, got {self.clip_grad}")
        if self.fine_tune and not self.fine_tune.exists():
            raise ValueError(
                f"fine_tune must be a checkpoint, got {self.fine_tune}, which is not there"
            )
        config = self.config
        spent = config.warmup_epochs + config.ramp_epochs + self.finish_dense
        if config.drop_at and spent > self.epochs:
            raise ValueError(
                "warmup_epochs, ramp_epochs and finish_dense must be at most the "
                f"{self.epochs} epochs together, got {spent}"
            )
        if self.teacher not in (None, "self"):
            raise ValueError(f'teacher must be "self", got {self.teacher!r}')
        if self.teacher and not (self.fine_tune or self.pretrained):
            raise ValueError("teacher self needs weights to begin from: fine_tune or pretrained")
        if not timm.is_model(self.model):
            raise ValueError(f"model must be a timm model's name, got {self.model!r}")
        report.check_folder("out", self.out)
        if (self.out / LAST).exists() and not self.resume:
            raise ValueError(f"{self.out / LAST} is there: resume that, or take another out")

    @functools.cached_property  # asked for in every step
    def config(self) -> SkipConfig:
        """What the training is for."""
        config = SkipConfig.parse(self.skip, warmup_epochs=self.warmup_epochs)
        cls = config.cls_only_last_block or self.cls_only_last_block
        config = dataclasses.replace(config, cls_only_last_block=cls)
        if not self.ramp_epochs:
            return config
        return dataclasses.replace(config, ramp_epochs=self.ramp_epochs, ramp_stairs=RAMP_STAIRS)

    def config_of(self, epoch: int) -> SkipConfig:
        """What the model is patched with in an epoch: at the end it drops nothing."""
        if epoch >= self.epochs - self.finish_dense:
            return SkipConfig(cls_only_last_block=self.config.cls_only_last_block)
        return self.config

    def record(self) -> dict[str, str]:
        """What a resumption must share, by name."""
        found = dataclasses.asdict(self).items()
        return {name: str(value) for name, value in found if name not in OF_A_RUN}


def told(what: str, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What the call returns, or a ValueError in one line that says what its options came from."""
    try:
        return call(*args, **options)
    except Exception as error:  # timm and torch raise a dozen kinds, assertions among them
        text = " ".join(str(error).split()) or repr(error)
        # torch names every key of a checkpoint that does not fit: the first three of each list.
        text = re.sub(r'("[^"]+"(?:, "[^"]+"){2})(?:, "[^"]+")+', r"\1, ...", text)
        raise ValueError(f"{what}: {text:.600}") from error


def make_model(settings: Settings, num_classes: int) -> Any:
    """The model with weights to begin from, and a new head where theirs has other classes."""
    size = {"img_size": settings.img_size} if settings.img_size else {}
    options = size | settings.model_args
    if settings.fine_tune is None and not settings.pretrained:
        create = functools.partial(timm.create_model, settings.model)
        return told("model, model_args", create, num_classes=num_classes, **options)
    source, given = "pretrained", timm.get_pretrained_cfg(settings.model)
    overlay: dict[str, Any] = {}
    had = given.num_classes if given else num_classes
    if settings.fine_tune is not None:
        source = f"{settings.fine_tune} cannot be loaded into the model"
        state = told(source, load_state_dict, str(settings.fine_tune))
        heads: Any = given.classifier if given else "head"
        head = state.get(f"{heads if isinstance(heads, str) else heads[0]}.weight")
        had = num_classes if head is None else len(head)
        overlay = {"file": str(settings.fine_tune), "num_classes": had, "custom_load": False}
    model = told(
        source, timm.create_model, settings.model, pretrained=True,
        pretrained_cfg_overlay=overlay, num_classes=had, **options,
    )  # fmt: skip
    if had != num_classes:
        if settings.teacher:
            raise ValueError(
                f"teacher self needs weights of the data's {num_classes} classes, got {had}"
            )
        model.reset_classifier(num_classes)
    return model
