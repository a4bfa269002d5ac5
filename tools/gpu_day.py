"""The GPU tests, then the benchmarks, on a machine without a network; see docs/gpu.md.

    OUT=results python3 tools/gpu_day.py                      # all of TARGETS
    OUT=results python3 tools/gpu_day.py bench-gpu-models     # what an earlier run did not reach
    DEVICE=cpu PHASE_S=120 python3 tools/gpu_day.py           # rehearsed, each target cut short

Makes .venv from build/gpu-kit (`make gpu-kit`) over the torch and Triton of this python3, then runs
make's targets. Every test, group of providers and model is in $OUT as soon as it ended, and
summary.md no more than some seconds later: the run may end at any moment.

Loaded by pytest (`-p gpu_day`) this file writes a line for each test, with the kernels it launched.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import venv
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KIT = ROOT / "build" / "gpu-kit"
BIN = ROOT / ".venv" / "bin"
OUT = Path(os.environ.get("OUT", ROOT / "build" / "gpu-day")).absolute()
DEVICE = os.environ.get("DEVICE", "cuda")
GRACE = 60  # seconds to write tables and charts in, after PHASE_S
TARGETS = ["test-gpu", "bench-gpu-operators", "bench-gpu-models", "bench-gpu-compiled"]

# ---------------------------------------------------------------------- the plugin of pytest

launches: Counter[str] = Counter()


def pytest_configure(config: Any) -> None:
    import torch

    # Not in the benchmarks, which know --device: a hook takes time on the host.
    if torch.cuda.is_available() and config.getoption("--device", None) is None:
        from triton import knobs

        knobs.runtime.launch_enter_hook.add(
            lambda metadata: launches.update([metadata.get()["name"].strip("_")])
        )


def pytest_runtest_setup() -> None:
    launches.clear()


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or not report.passed:
        _write(report)


def pytest_collectreport(report: Any) -> None:
    if not report.passed:
        _write(report)


def _write(report: Any) -> None:
    reason = ""
    if report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
    elif report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = str(crash.message if crash else report.longrepr).split("\n")[0]
    line = {
        "target": os.environ["TARGET"],
        "test": report.nodeid,
        "outcome": report.outcome,
        "seconds": round(getattr(report, "duration", 0), 3),
        "reason": reason,
        "kernels": dict(launches),
    }
    with (OUT / "tests.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


# ------------------------------------------------------------------------------- the machine


def make_environment() -> None:
    """Of the machine's own packages nothing is changed: .venv is over them."""
    missing = [name for name in ("make", "cc") if shutil.which(name) is None]
    if missing:
        sys.exit(f"needs {' and '.join(missing)} (Triton compiles what launches a kernel)")
    venv.create(ROOT / ".venv", clear=True, with_pip=False)
    python = str(BIN / "python")
    (site,) = (ROOT / ".venv").glob("lib/python3*/site-packages")
    # Not system_site_packages: where python3 is itself of an environment, that leaves it out.
    below = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (site / "below.pth").write_text("\n".join(below) + "\n")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    wheels = map(str, sorted(KIT.glob("*.whl")))
    # What was packed together, whatever the machine has of it.
    options = ["--no-index", "--no-deps", "--ignore-installed", "--no-warn-script-location"]
    subprocess.run([*pip, *options, *wheels], check=True)
    for library in KIT.glob("_C*.so"):
        shutil.copy(library, ROOT / "skipvit_kernels")
    (ROOT / ".venv" / ".installed").touch()


def run(target: str, done: list[str]) -> None:
    """One of make's targets, for PHASE_S seconds at most; its lines go to log.txt."""
    limit = float(os.environ.get("PHASE_S", "inf"))
    variables = [f"DEVICE={DEVICE}", f"RESULTS={OUT}"]
    env = {
        **os.environ,
        "TARGET": target,
        "OUT": str(OUT),
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tools'}",
        "PYTEST_ADDOPTS": f"{os.environ.get('PYTEST_ADDOPTS', '')} -p gpu_day",
        "PYTHONUNBUFFERED": "1",
    }
    earlier = [line for line in read_lines(OUT / "tests.jsonl") if line["target"] != target]
    (OUT / "tests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in earlier))
    started = time.time()
    with (OUT / "log.txt").open("a+") as log:
        log.seek(0, os.SEEK_END)
        begin = log.tell()
        process = subprocess.Popen(
            ["make", target, *variables],
            cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        interrupted = False
        try:
            while process.poll() is None:
                seconds = time.time() - started
                write_summary([*done, f"{target}: running for {seconds:.0f} s"])
                if seconds > limit + GRACE:  # what hangs in a kernel or a compiler hears no Ctrl-C
                    os.killpg(process.pid, signal.SIGKILL)
                elif seconds > limit and not interrupted:
                    os.killpg(process.pid, signal.SIGINT)  # pytest ends and writes its tables
                    interrupted = True
                time.sleep(2)
        finally:
            if process.poll() is None:  # this script is being ended: nothing keeps the device
                os.killpg(process.pid, signal.SIGKILL)
        log.seek(begin)
        errors = re.findall(r"^E  .*", log.read(), re.MULTILINE)
    how = f"cut off after {limit:.0f} s" if interrupted else f"exit status {process.returncode}"
    if process.returncode != 0 and errors:
        how += f": {errors[-1]}"
    done.append(f"{target}: {time.time() - started:.0f} s, {how}")
    pack(OUT / "models_gpu")
    write_summary(done)


def pack(folder: Path) -> None:
    """The page of the models beside its data: no more than eight files in all.

    That is what some services bring back that lend a machine by the minute.
    """
    if (folder / "report.md").exists():
        with tarfile.open(OUT / "models_gpu.tar.gz", "w:gz") as tar:
            tar.add(folder, folder.name)
        for file in folder.iterdir():
            if file.name != "results.json":
                file.unlink()


# ------------------------------------------------------------------------------- the summary


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Without a last line that a kill cut short."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def read_table(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def counted(reasons: Iterable[str], most: int = 12) -> list[str]:
    found = Counter(reasons).most_common()
    more = [f"- ... and {len(found) - most} more"] if len(found) > most else []
    return [f"- {count} x {reason[:200]}" for reason, count in found[:most]] + more


def summarise_tests(tests: list[dict[str, Any]]) -> list[str]:
    lines = []
    for target in dict.fromkeys(test["target"] for test in tests):
        outcomes = Counter(test["outcome"] for test in tests if test["target"] == target)
        counts = (f"{n} {name}" for name, n in sorted(outcomes.items()))
        lines.append(f"- {target}: " + ", ".join(counts))
    for outcome in ("failed", "skipped"):
        found = [test for test in tests if test["outcome"] == outcome]
        if found:
            lines += ["", f"{outcome.capitalize()}:", ""]
            names = (re.sub(r"\[.*", "", test["test"]) for test in found)
            reasons = (test["reason"] for test in found)
            lines += counted(f"`{n}`: {r}" for n, r in zip(names, reasons, strict=True))
    return lines


def summarise_kernels(tests: list[dict[str, Any]]) -> list[str]:
    """Launches by Triton's own hook, of each kernel that the package has."""
    sources = (ROOT / "skipvit_kernels" / "backends" / "triton").glob("*.py")
    names = re.findall(r"def _(\w+_kernel)\(", "".join(map(Path.read_text, sources)))
    total: Counter[str] = Counter()
    for test in tests:
        if test["outcome"] == "passed":
            total.update(test["kernels"])
    ran = [f"`{name}` {total[name]}" for name in sorted(names) if total[name]]
    never = [f"`{name}`" for name in sorted(names) if not total[name]]
    return [
        f"Launched in tests that passed: {', '.join(ran) or 'none'}.",
        f"Never launched: {', '.join(never) or 'none'}.",
    ]


def summarise_operators() -> list[str]:
    """A row an operator, a column a shape: times the fastest chain / compiled, share of a copy."""
    rows = read_table(OUT / "operators_gpu.csv")
    compiled = {}
    for row in read_table(OUT / "operators_gpu_compiled.csv"):
        compiled[row["operator"], row["shape"], row["dtype"]] = row["speedup"]
    columns = list(dict.fromkeys((row["shape"], row["dtype"]) for row in rows))
    cells: dict[str, dict[tuple[str, str], str]] = {}
    for row in rows:
        key = (row["shape"], row["dtype"])
        rival = compiled.get((row["operator"], *key)) or "-"
        share = f"{float(row['share_of_copy']):.0%}" if row["share_of_copy"] else "-"
        cells.setdefault(row["operator"], {})[key] = f"{row['speedup'] or '-'} / {rival} / {share}"
    if not rows:
        return ["None yet."]
    header = ["operator", *(f"{shape} {dtype}" for shape, dtype in columns)]
    table = [[name, *(found.get(key, "") for key in columns)] for name, found in cells.items()]
    lines = ["| " + " | ".join(each) + " |" for each in (header, *table)]
    return [lines[0], "|" + "---|" * len(header), *lines[1:]]


def summarise_models() -> list[str]:
    path = OUT / "models_gpu" / "results.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    jobs: dict[str, list[str]] = {}
    for row in rows:
        if row["config"] == "unpatched" or row["config"].startswith("sliced"):
            continue
        ways = [way for way in ("compiled", "cuda_graph") if row[way]]
        job = ", ".join([row["model"], row["mode"], f"batch {row['batch_size']}", *ways])
        overhead = row["paired_overhead"]
        figures = f"{row['paired_speedup']:.3f}" + (f" ({overhead:+.1%})" if overhead else "")
        jobs.setdefault(job, []).append(f"`{row['config']}` {figures}")
    return [f"- {job}: " + ", ".join(found) for job, found in jobs.items()] or ["None yet."]


def write_summary(done: list[str]) -> None:
    tests = read_lines(OUT / "tests.jsonl")
    log = (OUT / "log.txt").read_text() if (OUT / "log.txt").exists() else ""
    about = OUT / "info.txt"
    lines = [
        f"# {DEVICE}, {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}",
        *("", *(f"- {each}" for each in done)),
        *("", "## Tests", "", *summarise_tests(tests)),
        *("", "## Triton kernels", "", *summarise_kernels(tests)),
        *("", "## Operators", "", "Times faster than the fastest plain chain / than the compiled"),
        *("one / the share of a copy's speed.", "", *summarise_operators()),
        *("", *re.findall(r"^\w+, host us a call: .*", log, re.MULTILINE)),
        *("", "## Models", "", "Speed-up, and in brackets the time over the floor's.", ""),
        *summarise_models(),
        *("", "## Machine", "", "```"),
        *(about.read_text().rstrip().split("\n") if about.exists() else []),
        "```",
    ]
    unfinished = OUT / "summary.unfinished"
    unfinished.write_text("\n".join(lines) + "\n")
    unfinished.replace(OUT / "summary.md")


def earlier(targets: list[str]) -> list[str]:
    """How the targets went in an earlier run that are not run again."""
    path = OUT / "summary.md"
    head = path.read_text().split("## ")[0] if path.exists() else ""
    return [line for line in re.findall("^- (.*)", head, re.MULTILINE)
            if line.split(":")[0] not in targets]  # fmt: skip


def main() -> None:
    targets = sys.argv[1:] or TARGETS
    # A shell starts background jobs with SIGINT ignored, and so would pytest be.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    OUT.mkdir(parents=True, exist_ok=True)
    if not (ROOT / ".venv" / ".installed").exists():
        make_environment()
    with (OUT / "info.txt").open("w") as file:
        subprocess.run([BIN / "python", "-m", "skipvit_kernels", "info"], cwd=ROOT, stdout=file)
    done = earlier(targets)
    for target in targets:
        run(target, done)
    print((OUT / "summary.md").read_text())


if __name__ == "__main__":
    main()
