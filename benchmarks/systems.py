"""The three systems and merging on one trunk: tokens, MACs, speed and memory.

    python benchmarks/systems.py --out docs/results/systems_cpu

Forward and training step of DeiT-S at 224 pixels, every system in turn, on a quiet machine;
docs/systems.md has what the numbers mean, and the accuracies.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import skipvit_kernels as sk
import skipvit_kernels.models  # registers STViT with timm
from skipvit_kernels.lab import clock, machine
from skipvit_kernels.lab.report import check_folder, markdown, write_csv

TRUNK, STVIT = "deit_small_patch16_224", "stvit_deit_small_patch16_224"
SYSTEMS = {
    "no skipping": "",
    "SkipViT": "6(55%)+11",
    "EViT": "4,7,10(30%,30%,30%)+fused",
    "merging": "6(55%)+12:merge",
    "merging in three stages": "4,7,10(30%,30%,30%)+12:merge",
    "STViT": STVIT,
}
HEADER = (
    *("setting", "system", "GMACs", "by the arithmetic", "inference", "of it", "training step"),
    *("of it", "training memory"),
)


def build(setting: str) -> Any:
    torch.manual_seed(0)
    model = timm.create_model(STVIT if setting == STVIT else TRUNK)
    return model if setting in ("", STVIT) else sk.patch(model, setting)


def count(model: Any) -> int:
    """Multiply-accumulates of an image."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, 3, 224, 224))
    return counter.get_total_flops() // 2


def measure(batch: int, rounds: int, device: str) -> list[dict[str, Any]]:
    models = {name: build(setting).to(device) for name, setting in SYSTEMS.items()}
    images = torch.randn(batch, 3, 224, 224, device=device)
    labels = torch.zeros(batch, dtype=torch.int64, device=device)
    macs = {name: count(build(setting)) for name, setting in SYSTEMS.items()}
    found: dict[str, dict[str, Any]] = {name: {} for name in SYSTEMS}
    for mode in ("inference", "training"):
        calls = {
            name: clock.training_step(model.train(), images, labels)
            if mode == "training"
            else clock.forward_step(model.eval(), images)
            for name, model in models.items()
        }
        times = clock.Times([])
        with tqdm(total=(rounds + 2) * len(calls), desc=mode, unit="call") as bar:
            clock.interleave(
                calls, times, rounds=rounds, warmup=2, device=device, on_call=bar.update
            )
        for name, call in calls.items():
            found[name][f"{mode}_images_per_second"] = batch / times.best(name)
            found[name][f"{mode}_speedup"] = times.paired_ratio("no skipping", name)
            if mode == "training":
                found[name]["training_memory"] = clock.peak_memory(call, device=device)
    return [
        {"system": name, "setting": setting, "macs": macs[name]} | found[name]
        for name, setting in SYSTEMS.items()
    ]


def cells(row: dict[str, Any], dense: dict[str, Any]) -> list[str]:
    ideal = dense["macs"] / row["macs"]
    speeds = [row[f"{mode}_speedup"] for mode in ("inference", "training")]
    ratios = [cell for speed in speeds for cell in (f"x{speed:.2f}", f"{speed / ideal:.0%}")]
    memory = row["training_memory"]
    return [
        *(row["setting"] or "unpatched", row["system"], f"{row['macs'] / 1e9:.2f}"),
        *(f"x{ideal:.2f}", *ratios),
        f"{memory / 2**20:.0f} MiB, {memory / dense['training_memory']:.0%}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the page")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    check_folder("out", args.out)
    torch.set_num_threads(args.threads)
    rows = measure(args.batch_size, args.rounds, args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    write_csv(args.out / "results.csv", rows)
    lines = [f"# The systems on {TRUNK}", "", f"    {shlex.join(['python', *sys.argv])}", ""]
    lines += [f"- {name}: {value}" for name, value in machine.versions().items()]
    lines += [
        f"- batch {args.batch_size}, float32, {args.threads} threads of torch on {args.device}",
        "",
        "Speed-ups are over the trunk without skipping: medians over the rounds of all systems in",
        "turn; *of it*: as a share of what the arithmetic allows. Memory: what a training step",
        "holds at most beyond the weights.",
        *markdown(HEADER, [cells(row, rows[0]) for row in rows]),
    ]
    (args.out / "report.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
