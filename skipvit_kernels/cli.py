"""The command `skipvit`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from skipvit_kernels import __version__

DEMO_EXTRA = {"timm", "sklearn", "matplotlib", "rich"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Args:
        argv: the arguments after the program's name; default those of the process.

    Returns:
        The exit code: 0; 1 where a package that the subcommand needs is missing; 2 on values that
        make no sense (SystemExit on what argparse refuses itself); 130 after Ctrl-C.
    """
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("skipvit: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="skipvit", description="Skip the patches that do not matter in a vision transformer."
    )
    parser.add_argument("--version", action="version", version=f"skipvit_kernels {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    demo = commands.add_parser(
        "demo",
        help="train a small ViT with and without skipping, and measure what it gains",
        description="Train a small ViT on scikit-learn's handwritten digits (nothing is "
        "downloaded) without skipping, with it, and with EViT's fused token; measure speed, memory "
        "and accuracy side by side. On the CPU, in about two minutes.",
    )
    demo.add_argument(
        "--epochs", type=int, default=6, help="of each training (default %(default)s)"
    )
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("demo_results"),
        metavar="FOLDER",
        help="for the table and the pictures, written at the end (default %(default)s)",
    )
    demo.add_argument("--threads", type=int, help="of the CPU (default: torch's choice)")
    demo.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the weights and of the order of the images (default %(default)s)",
    )
    demo.set_defaults(run=_demo)

    info = commands.add_parser(
        "info", help="show which kernel runs for every operator on every device, and why"
    )
    info.set_defaults(run=_info)
    return parser


def _demo(args: argparse.Namespace) -> int:
    try:
        from skipvit_kernels import demo
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in DEMO_EXTRA:
            raise
        print(
            f"skipvit demo needs {error.name}, which is not installed: "
            'pip install "skipvit_kernels[demo]"',
            file=sys.stderr,
        )
        return 1
    try:
        options = demo.Options(args.epochs, args.out, args.threads, args.seed)
    except ValueError as error:
        print(f"skipvit demo: {error}", file=sys.stderr)
        return 2
    demo.run(options)
    return 0


def _info(args: argparse.Namespace) -> int:
    from skipvit_kernels import info

    print(info.text())
    return 0
