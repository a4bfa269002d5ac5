"""How much of STViT's saved arithmetic is saved time: a trunk and its STViT, timed in turn.

    python benchmarks/stvit_speed.py --threads 1
    python benchmarks/stvit_speed.py swin_tiny_patch4_window7_224 stvit_swin_tiny_patch4_window7_224

Inference; the ratio of the shortest times over that of the multiply-accumulates, which torch counts
in both. 100 % would be a model as fast per multiply-accumulate as its trunk.
"""

from __future__ import annotations

import argparse
import sys

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import skipvit_kernels.models  # noqa: F401  (registers the names)
from skipvit_kernels.lab import clock, machine
from skipvit_kernels.lab.bench import at_least


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("trunk", nargs="?", default="deit_small_patch16_224")
    parser.add_argument("stvit", nargs="?", default="stvit_deit_small_patch16_224")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    at_least(1, batch_size=args.batch_size, rounds=args.rounds, threads=args.threads)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    calls, macs = {}, {}
    images = torch.randn(args.batch_size, 3, 224, 224, device=args.device)
    for name in (args.trunk, args.stvit):
        model = timm.create_model(name).to(args.device).eval()
        calls[name] = clock.forward_step(model, images)
        with FlopCounterMode(display=False) as counter:
            calls[name]()
        macs[name] = counter.get_total_flops() / 2 / args.batch_size
    times = clock.Times([])
    clock.interleave(calls, times, rounds=args.rounds, warmup=1, device=args.device)
    print(f"batch {args.batch_size}, {args.device}, {machine.versions()['CPU']}")
    for name in calls:
        rate = args.batch_size / times.best(name)
        print(f"{name:40} {rate:8.1f} images/s, {macs[name] / 1e9:.3f} GMACs")
    faster, less = times.ratio(args.trunk, args.stvit), macs[args.trunk] / macs[args.stvit]
    print(f"{faster:.3f} times as fast, 1/{less:.3f} of the arithmetic: {faster / less:.1%} of it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
