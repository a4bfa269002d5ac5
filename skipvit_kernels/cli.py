"""The command `skipvit`."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from skipvit_kernels import __version__
from skipvit_kernels.lab.bench import Job, TooLittleMemory, at_least, build

# Per subcommand, the extra that brings what it needs beside torch, and the packages.
EXTRAS = {
    "demo": ("demo", {"timm", "sklearn", "matplotlib", "rich"}),
    "bench": ("bench", {"timm", "matplotlib", "rich"}),
    "show": ("bench", {"timm", "matplotlib", "rich", "torchvision", "PIL"}),
    "advise": ("timm", {"timm"}),
    "train": ("train", {"timm", "accelerate", "tensorboard", "matplotlib", "rich"}),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Args:
        argv: the arguments after the program's name; default those of the process.

    Returns:
        The exit code: 0; 1 where a package that the subcommand needs is missing; 2 on values that
        make no sense (SystemExit on what argparse refuses itself) and on too little memory; 130
        after Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = _parser().parse_args(argv, argparse.Namespace(argv=argv))
    try:
        if getattr(args, "threads", None) is not None:
            at_least(1, threads=args.threads)
            torch.set_num_threads(args.threads)
        args.run(args)
        return 0
    except ModuleNotFoundError as error:
        extra, packages = EXTRAS.get(args.command, ("", set()))
        if (error.name or "").partition(".")[0] not in packages:
            raise
        print(
            f"skipvit {args.command} needs {error.name}, which is not installed: "
            f'pip install "skipvit_kernels[{extra}]"',
            file=sys.stderr,
        )
        return 1
    except (ValueError, TooLittleMemory) as error:
        print(f"skipvit {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("skipvit: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="skipvit", description="Skip the patches that do not matter in a vision transformer."
    )
    parser.add_argument("--version", action="version", version=f"skipvit_kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    demo = commands.add_parser(
        "demo",
        help="train a small ViT with and without skipping, and measure what it gains",
        description="Train a small ViT on scikit-learn's handwritten digits (nothing is "
        "downloaded) without skipping, with it, with EViT's fused token and with merging; "
        "measure speed, memory and accuracy side by side. On the CPU, in about two minutes.",
    )
    demo.add_argument(
        "--epochs", type=int, default=6, help="of each training (default %(default)s)"
    )
    demo.add_argument(
        "--out", type=Path, default="demo_results", help="folder to write (default %(default)s)"
    )
    demo.add_argument(
        "--seed", type=int, default=0, help="of weights and order of images (default %(default)s)"
    )
    demo.set_defaults(run=_demo)
    _add_threads(demo)

    bench = commands.add_parser(
        "bench",
        help="measure what skipping buys for a timm model on this machine",
        description="Time a timm model unpatched, with each configuration, and with the selection "
        "for free (the floor), in turn; print speed-up, ideal speed-up, routing overhead and peak "
        "memory. Ctrl-C keeps what was measured.",
    )
    bench.add_argument("model", nargs="?", default="vit_small_patch16_224",
                       help="a timm model's name (default %(default)s)")  # fmt: skip
    bench.add_argument("--config", action="append", metavar="CONFIG", dest="configs",
                       help='e.g. "6(55%%)+11"; may be given several times (default: the usual '
                       "five, at the same fractions of the model's depth)")  # fmt: skip
    bench.add_argument("--table-1", action="store_true", help="the eight rows of SkipViT's Table 1")
    bench.add_argument("--mode", choices=("forward", "training", "both"), default="both",
                       help="what to time (default %(default)s)")  # fmt: skip
    bench.add_argument("--report", type=Path, metavar="DIR",
                       help="write one page with tables, charts, hardware and versions, and the "
                       "data as CSV and JSON")  # fmt: skip
    bench.add_argument("--rounds", type=int, default=10, help="of calls (default %(default)s)")
    bench.add_argument("--compile", action="store_true", dest="compiled",
                       help="torch.compile every variant")  # fmt: skip
    _add_workload(bench)
    bench.set_defaults(run=_bench)

    advise = commands.add_parser(
        "advise",
        help="find out in a minute which settings pay on this machine, and what limits the others",
        description="Measure a handful of settings on the device for at most a minute; print which "
        "pay, by how much, what limits the others, and recommend none where none pays.",
    )
    advise.add_argument("model", help="a timm model's name")
    advise.add_argument("--inference", action="store_true", help="rather than training")
    advise.add_argument("--seconds", type=float, default=60, help="at most (default %(default)s)")
    _add_workload(advise)
    advise.set_defaults(run=_advise)

    show = commands.add_parser(
        "show",
        help="draw which patches of pictures a model skips, merges or keeps",
        description="Draw pictures, and beside them what each drop of a patched timm model left of "
        "them: skipped patches faded, merged ones as regions in their mean colour. With several "
        "files of weights, the choice of the last drop under each.",
    )
    show.add_argument("pictures", nargs="+", type=Path, metavar="PICTURE",
                      help="a file, or a folder of them")  # fmt: skip
    show.add_argument("--model", default="deit_tiny_patch16_224",
                      help="a timm model's name (default %(default)s)")  # fmt: skip
    show.add_argument("--config", action="append", metavar="CONFIG", dest="configs",
                      help="what it is patched with; may be given several times (default "
                      "6(55%%)+12:merge)")  # fmt: skip
    show.add_argument("--weights", nargs="+", type=Path, default=(), metavar="FILE",
                      help="checkpoints of the model (default: random weights)")  # fmt: skip
    show.add_argument("--pretrained", action="store_true", help="timm's weights, downloaded")
    show.add_argument("--model-args", nargs="+", type=_assignment, action="extend", default=[],
                      metavar="NAME=VALUE",
                      help="more options of timm's create_model: img_size")  # fmt: skip
    show.add_argument("--scores", action="store_true", help="also draw the scores that chose")
    show.add_argument("--device", default="cpu", help="cpu or cuda (default %(default)s)")
    show.add_argument("--out", type=Path, default=Path("skipped.png"), metavar="FILE",
                      help="png, pdf or svg (default %(default)s)")  # fmt: skip
    _add_threads(show)
    show.set_defaults(run=_show)

    train = commands.add_parser(
        "train",
        help="train or fine-tune a timm model with skipping on one's own pictures",
        description="Train a timm model that skips, with timm's data, augmentation, losses and "
        "optimizers; accelerate runs it on CPU, GPUs and NPUs, in several processes as "
        "`accelerate launch -m skipvit_kernels train ...`. Ctrl-C saves; --resume goes on.",
    )
    _add_train(train)
    train.set_defaults(run=_train)

    info = commands.add_parser(
        "info", help="show which kernel runs for every operator on every device, and why"
    )
    info.set_defaults(run=_info)
    return parser


def _add_train(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("data", metavar="DATA", help="folder with train/ and validation/, and in each a folder for "
        "each class; or a tar file, or the root of --dataset")  # fmt: skip
    add("--model", required=True, help="a timm model's name")
    add("--skip", default="", metavar="CONFIG", help='e.g. "6(55%%)+11" (default: nothing)')
    add("--out", type=Path, default=Path("training"),
        help="folder for checkpoints and logs (default %(default)s)")  # fmt: skip
    add("--resume", action="store_true", help="go on from the last checkpoint in --out")

    add = parser.add_argument_group("when it skips, in epochs").add_argument
    add("--warmup-epochs", type=int, metavar="N", help="first ones without (default: the config's)")
    add("--ramp-epochs", type=int, default=0, metavar="N",
        help="after these, along EViT's cosine in four stairs (default: the config's)")  # fmt: skip
    add("--finish-dense", type=int, default=0, metavar="N", help="last ones without (default 0)")
    add("--cls-only-last-block", action="store_true", help="the lossless last block")

    add = parser.add_argument_group("data").add_argument
    add("--dataset", default="", help='as timm names it: "hfds/food101", "wds/", ... (default: a '
        "folder or tar file)")  # fmt: skip
    add("--train-split", default="train", metavar="SPLIT", help="(default %(default)s)")
    add(
        "--val-split", default="validation", metavar="SPLIT", help='(default %(default)s); "": none'
    )
    add("--val-data", metavar="DATA", help="where that lies (default: DATA)")
    add("--num-classes", type=int, help="where the data does not tell")
    add("--img-size", type=int, help="in pixels (default: the model's own)")
    add("--workers", type=int, default=4, help="processes that load pictures (default 4)")
    add("--stop-on-bad", action="store_true",
        help="at a picture that cannot be read (default: name it, take the next)")  # fmt: skip

    add = parser.add_argument_group("what it learns from").add_argument
    add("--epochs", type=int, default=300, help="(default %(default)s)")
    add("--batch-size", type=int, default=128, help="over all processes (default %(default)s)")
    add("--accumulate", type=int, default=1, metavar="N", help="batches of a step (default 1)")
    add("--lr", type=float, default=5e-4, help="(default %(default)s)")
    add("--lr-warmup-epochs", type=int, default=5, metavar="N", help="(default %(default)s)")
    add("--opt", default="adamw", help="timm's name of the optimizer (default %(default)s)")
    add("--weight-decay", type=float, default=0.05, help="(default %(default)s)")
    add("--sched", default="cosine", help="timm's name of the schedule (default %(default)s)")
    add("--clip-grad", type=float, metavar="NORM", help="(default: not)")
    add("--ema", type=float, metavar="DECAY", help="of an average of the weights (default: none)")
    add("--fine-tune", type=Path, metavar="WEIGHTS", help="a checkpoint to begin from")
    add("--pretrained", action="store_true", help="begin from timm's weights, downloaded")
    add("--teacher", choices=("self",), help="learn from the unpatched model's logits too")
    for name, function in (
        ("model", "create_model"), ("opt", "create_optimizer_v2"), ("sched", "create_scheduler_v2"),
        ("loss", "create_classification_loss"), ("augment", "create_loader"), ("mixup", "Mixup"),
        ("teacher", "LogitDistillationTask"),
    ):  # fmt: skip
        add(f"--{name}-args", nargs="+", type=_assignment, action="extend", default=[],
            metavar="NAME=VALUE", help=f"more options of timm's {function}")  # fmt: skip

    add = parser.add_argument_group("how it runs").add_argument
    add("--mixed-precision", choices=("no", "fp16", "bf16"), help="(default: accelerate's)")
    add("--cpu", action="store_true", help="not on the GPU that is there")
    add("--seed", type=int, default=0, help="(default %(default)s)")
    add("--checkpoint-steps", type=int, metavar="N",
        help="save within an epoch too, each N steps (default: at its end)")  # fmt: skip
    _add_threads(parser)


def _assignment(text: str) -> tuple[str, Any]:
    """A name and its value, a Python literal where it is one: "drop_path_rate=0.1"."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"must read like name=value, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


def _add_workload(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch-size", type=int, default=8, help="images (default %(default)s)")
    parser.add_argument("--image-size", type=int, help="in pixels (default: the model's own)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default %(default)s)")
    parser.add_argument("--bfloat16", action="store_true", help="under bfloat16 autocast")
    _add_threads(parser)


def _add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, help="of the CPU (default: torch's choice)")


def _workload(args: argparse.Namespace) -> dict[str, Any]:
    """What `_add_workload` takes in, by the attributes of a `Job`."""
    names = ("model", "batch_size", "image_size", "device", "bfloat16")
    return {name: getattr(args, name) for name in names}


def _demo(args: argparse.Namespace) -> None:
    from skipvit_kernels.lab import demo

    demo.run(args.epochs, args.out, args.seed)


def _bench(args: argparse.Namespace) -> None:
    from skipvit_kernels.lab import report
    from skipvit_kernels.skipping import presets
    from skipvit_kernels.skipping.cost import ViTShape

    configs = (*(args.configs or ()), *(presets.TABLE_1 if args.table_1 else ()))
    job = Job(
        configs=configs,
        training=False,
        compiled=args.compiled,
        rounds=args.rounds,
        **_workload(args),
    )
    if not configs:
        model = build(job)
        usual, _ = presets.usual(model)
        bare = presets.scaled("6(55%)+11", ViTShape.of(model).depth)
        job = dataclasses.replace(job, configs=(bare, *usual))
    modes = {"forward": [False], "training": [True], "both": [False, True]}[args.mode]
    jobs = [dataclasses.replace(job, training=training) for training in modes]
    report.run_jobs(jobs, report=args.report, command=f"skipvit {shlex.join(args.argv)}")


def _advise(args: argparse.Namespace) -> None:
    from skipvit_kernels.lab.advise import advise

    job = Job(configs=(), training=not args.inference, **_workload(args))
    model = build(job)
    advice = advise(
        model, job.batch_size, training=job.training, bfloat16=job.bfloat16, seconds=args.seconds
    )
    print(advice)


def _show(args: argparse.Namespace) -> None:
    from skipvit_kernels.lab import show
    from skipvit_kernels.skipping import presets

    names = ("model", "weights", "pretrained", "scores", "device", "out")
    options = {name: getattr(args, name) for name in names}
    options["model_args"] = dict(args.model_args)
    show.run(args.pictures, configs=args.configs or presets.UNTRAINED[:1], **options)
    print(f"written to {args.out}")


def _train(args: argparse.Namespace) -> None:
    from skipvit_kernels.lab import train

    options = {
        field.name: getattr(args, field.name) for field in dataclasses.fields(train.Settings)
    }
    further = {name: dict(options[name]) for name in options if name.endswith("_args")}
    train.run(train.Settings(**options | further))


def _info(args: argparse.Namespace) -> None:
    from skipvit_kernels.lab import info

    print(info.text())
