"""What `make gpu-kit` runs: pack what a GPU machine without a network needs; see docs/gpu.md.

    python tools/gpu_kit.py --python 3.12 --torch 2.11.0 --triton 3.6.0

The machine has Python, torch and Triton of these versions. build/gpu-kit gets the wheels of all
else that tests and benchmarks import, and the CPU kernels where `make dist` built them for this
Python; build/gpu-kit.tar that and the commit at hand.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KIT = ROOT / "build" / "gpu-kit"
# Of the package's extras `bench` and `test` what the GPU targets import.
NEEDED = ("timm", "matplotlib", "rich", "tqdm", "pytest", "pytest-benchmark", "hypothesis")
UNUSED = {"hf-xet"}  # what huggingface_hub downloads with, where it can
LIMIT = 64 * 2**20  # what services that lend a GPU by the minute take along


def pip(*arguments: str, python: str) -> None:
    # Any glibc: pip takes the names of platforms literally.
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in range(39, 4, -1)]
    options = ["--only-binary=:all:", "--implementation=cp", f"--python-version={python}"]
    options += [f"--platform={name}" for name in (*platforms, "manylinux2014_x86_64")]
    subprocess.run([sys.executable, "-m", "pip", "-q", *arguments, *options], check=True)


def resolve(requirements: list[str], python: str) -> set[str]:
    """name==version of all that pip would install; the metadata alone is downloaded."""
    report = KIT / "report.json"
    options = ["--dry-run", "--ignore-installed", f"--report={report}", f"--target={KIT}"]
    pip("install", *options, *requirements, python=python)
    found = json.loads(report.read_text())["install"]
    report.unlink()
    versions = {each["metadata"]["name"]: each["metadata"]["version"] for each in found}
    return {f"{name}=={version}" for name, version in versions.items() if name not in UNUSED}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--python", default="3.12", help="default %(default)s")
    parser.add_argument("--torch", default="2.11.0", help="default %(default)s")
    parser.add_argument("--triton", default="3.6.0", help="default %(default)s")
    args = parser.parse_args()

    shutil.rmtree(KIT, ignore_errors=True)
    KIT.mkdir(parents=True)
    there = [f"torch=={args.torch}", f"triton=={args.triton}"]
    wheels = resolve([*there, *NEEDED], args.python) - resolve(there, args.python)
    pip("download", "--no-deps", f"--dest={KIT}", *sorted(wheels), python=args.python)

    tag = "cp" + args.python.replace(".", "")
    built = sorted((ROOT / "dist").glob(f"*-{tag}-*.whl"))
    for wheel in built:
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (n for n in archive.namelist() if n.startswith("skipvit_kernels/_C"))
            (KIT / Path(name).name).write_bytes(archive.read(name))

    packed = KIT.with_suffix(".tar")
    subprocess.run(
        ["git", "archive", "--prefix=gpu-kit/", f"--output={packed}", "HEAD"], cwd=ROOT, check=True
    )
    with tarfile.open(packed, "a") as tar:
        tar.add(KIT, "gpu-kit/build/gpu-kit")
    size = packed.stat().st_size
    kernels = "with" if built else f"without ({tag} is not in dist/)"
    print(f"{packed}: {size / 2**20:.1f} MiB, {len(wheels)} wheels, {kernels} the CPU kernels")
    if size > LIMIT:
        sys.exit(f"{packed} must have at most {LIMIT / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
