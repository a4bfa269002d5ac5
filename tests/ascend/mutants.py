"""Mutation check of the Ascend kernels: does the suite notice when one of them is wrong?

    python tests/ascend/mutants.py                # all; writes docs/results/ascend_mutants.txt
    python tests/ascend/mutants.py "name" ...     # some, by name

Each mutant of mutants.txt is one fault in a copy of the sources: a barrier left out, a length off
by a block, a flag swapped, a tie rule turned round. The copy is built, and the tests of the kernels
run on it until one fails. A mutant with a `why` changes nothing that anybody could see.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "docs" / "results" / "ascend_mutants.txt"
TIMEOUT = 300  # a mutant that never ends is caught


@dataclasses.dataclass(frozen=True)
class Mutant:
    name: str
    file: str  # under ascend_ops
    edits: tuple[tuple[str, str], ...]  # each text must occur once
    why: str = ""  # equivalent, because


CONTROL = Mutant("no fault: must pass", "chip.h", ())


def read_mutants(text: str) -> list[Mutant]:
    found = []
    for block in text.split("\n@ ")[1:]:
        name, file, *lines = block.rstrip("\n").split("\n")
        why = lines.pop(0).removeprefix("why ") if lines[0].startswith("why ") else ""
        edits = []
        for hunk in "\n".join(lines).split("\n...\n"):
            old = [line[1:] for line in hunk.split("\n") if line[0] in " -"]
            new = [line[1:] for line in hunk.split("\n") if line[0] in " +"]
            edits.append(
                ("".join(f"{line}\n" for line in old), "".join(f"{line}\n" for line in new))
            )
        found.append(Mutant(name, file.removeprefix("in "), tuple(edits), why))
    return found


MUTANTS = read_mutants((ROOT / "tests" / "ascend" / "mutants.txt").read_text())


def mutated(mutant: Mutant, root: Path = ROOT) -> str:
    """The file with the fault."""
    text = "\n" + (root / "ascend_ops" / mutant.file).read_text()
    places = []
    for old, new in mutant.edits:
        if text.count("\n" + old) != 1:
            raise ValueError(f"{mutant.name}: not once in {mutant.file}: {old!r}")
        places.append((text.index("\n" + old) + 1, old, new))
    for start, old, new in sorted(places, reverse=True):  # from the end: no edit moves another
        text = text[:start] + new + text[start + len(old) :]
    return text[1:]


def copy_sources(root: Path, folder: Path) -> None:
    shutil.copytree(root / "ascend_ops", folder / "ascend_ops")
    shutil.copytree(root / "tests" / "ascend", folder / "tests" / "ascend")


def caught_by(mutant: Mutant, root: Path = ROOT) -> str:
    """The first test that fails on the mutant, or an empty string."""
    with tempfile.TemporaryDirectory() as folder:
        copy_sources(root, Path(folder))
        (Path(folder) / "ascend_ops" / mutant.file).write_text(mutated(mutant, root))
        environment = {
            **os.environ,
            "SKIPVIT_ASCEND_SOURCES": folder,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        }
        build = [sys.executable, "-c", "from ascend import model; model.build()"]
        if subprocess.run(build, env=environment, capture_output=True).returncode != 0:
            return "the compiler"
        # The tests of the model itself say nothing about a kernel, those of the counts nothing
        # about results.
        select = "(npu-model or ascend_model) and not (model_objects or compile or page or share)"
        tests = [
            str(ROOT / "tests" / f)
            for f in ("ascend/test_ascend_model.py", "ops/test_operators.py")
        ]
        options = ["-x", "-q", "--no-header", "--tb=no", "-rfE", "-p", "no:cacheprovider"]
        command = [sys.executable, "-m", "pytest", *options, "-k", select, *tests]
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT
            )
        except subprocess.TimeoutExpired:
            return "time limit"
    if done.returncode == 0:
        return ""
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if not lines:
        raise SystemExit(f"{mutant.name}: the tests did not run\n{done.stdout}{done.stderr}")
    return lines[0].split(" ")[1].rpartition("/")[2].split(" - ")[0]


def main(names: list[str]) -> int:
    chosen = [m for m in MUTANTS if not names or m.name in names]
    lines, survivors, equivalent = [], 0, 0
    snapshot = Path(tempfile.mkdtemp())  # so that the tree may be worked on meanwhile
    copy_sources(ROOT, snapshot)
    if test := caught_by(CONTROL, snapshot):
        raise SystemExit(f"the tests fail without any fault: {test}")
    for mutant in chosen:
        start = time.time()
        test = caught_by(mutant, snapshot)
        verdict = f"caught      {test}" if test else "SURVIVED"
        if mutant.why:
            verdict = f"equivalent  {mutant.why}" if not test else f"caught, though marked: {test}"
        equivalent += bool(mutant.why) and not test
        survivors += not test and not mutant.why
        line = f"{Path(mutant.file).name:18} {mutant.name:52} {verdict}"
        print(f"{line}   ({time.time() - start:.0f} s)", flush=True)
        lines.append(line)
    real = len(chosen) - equivalent
    summary = (
        f"{len(chosen)} mutants, {equivalent} equivalent, {real - survivors} of the other {real} "
        f"caught ({100 * (real - survivors) / max(1, real):.1f} %)"
    )
    print(summary)
    shutil.rmtree(snapshot)
    if not names:
        date = datetime.date.today().isoformat()
        head = [f"tests/ascend/mutants.py, {date}", summary, ""]
        RESULT.write_text("\n".join([*head, *lines, ""]))
    return int(100 * (real - survivors) < 95 * real)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
