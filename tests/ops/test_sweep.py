"""The sweep: thousands of small cells of every operator, each held against the reference.

They run in a child process, so that a kernel that ends it is a failure with the cell's name.
`sweep.py` has the cells, what each is held to, and the command for one alone.
"""

import collections
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import sweep
import torch
from backend_matrix import BACKENDS, launches

from skipvit_kernels import reference

# A new child imports torch, 3 s: after so many deaths the rest is not worth the wait.
MAX_DEATHS = 5
SHOWN = 20
CHILD = [sys.executable, "-W", "ignore", str(Path(sweep.__file__)), "BACKEND"]


class Child:
    """A process that runs cells by name, and is started again where it dies."""

    def __init__(self, command):
        self.command, self.process = command, None

    def run(self, name):
        """(what was wrong or None, the operators launched); a death by signal is in capitals."""
        if self.process is None:
            path = os.pathsep.join(filter(None, sys.path))  # the packages that this process has
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            )
        self.process.stdin.write(f"{name}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        return json.loads(answer) if answer else (self.died(), [])

    def died(self):
        status = self.process.wait()
        self.close()
        return f"DIED OF {signal.Signals(-status).name}" if status < 0 else f"EXITED WITH {status}"

    def close(self):
        if self.process is not None:
            self.process.stdin.close()
            self.process.stdout.close()
            self.process.wait()
            self.process = None


def run_all(child, names):
    """(failures by name, operators launched); ends early at the last death that is allowed."""
    failures, launched, deaths = {}, collections.Counter(), 0
    for done, name in enumerate(names):
        failure, operators = child.run(name)
        launched.update(operators)
        if failure:
            failures[name] = failure
            deaths += child.process is None
            if deaths == MAX_DEATHS:
                failures[f"{len(names) - done - 1} cells"] = f"not run after {deaths} deaths"
                break
    return failures, launched


@pytest.fixture(scope="module", params=BACKENDS.values(), ids=BACKENDS)
def backend(request):
    request.param.require()
    return request.param


@pytest.fixture(scope="module")
def child(backend):
    child = Child([*CHILD[:-1], backend.name])
    yield child
    child.close()


@pytest.mark.parametrize("part", sweep.PARTS)
def test_sweep(backend, child, part):
    names = [str(cell) for cell in sweep.cells(part, backend)]
    if not names:
        pytest.skip(f"{backend.name} leaves the checks of arguments to the public functions")
    failures, launched = run_all(child, names)
    for operator, count in launched.items():
        launches[backend.name, operator] += count
    text = "\n".join(f"{name}: {failure}" for name, failure in list(failures.items())[:SHOWN])
    assert not failures, (
        f"{len(failures)} of {len(names)} cells; one alone: PYTHONPATH=tests python "
        f'tests/ops/sweep.py {backend.name} "<cell>"\n{text}'
    )


# ----------------------------------------------------------------------- the sweep itself


@pytest.mark.parametrize("part", sweep.PARTS)
def test_a_name_is_all_of_a_cell(part):
    cells = sweep.cells(part, BACKENDS["cpu"])
    assert [sweep.Cell.named(str(cell)) for cell in cells] == cells
    assert len(set(cells)) == len(cells)


def test_the_shapes_have_every_combination_of_empty_dimensions():
    cells = {name: list(sweep.shapes(backend)) for name, backend in BACKENDS.items()}
    combinations = [{sweep.emptiness(cell) for cell in cells[name]} for name in cells]
    assert combinations[0] == combinations[1] and len(combinations[0]) == 800
    left_out = BACKENDS["npu-model"].left_out
    assert combinations[2] == {c for c in combinations[0] if sweep.base(c[0]) not in left_out}
    assert len(cells["cpu"]) == 35_424


def test_a_death_is_a_failure_with_the_name_of_its_cell():
    dies = """if True:
        import os, sys
        for line in sys.stdin:
            if "bad" in line: os.kill(os.getpid(), int(line.split()[1]))
            if "exit" in line: os._exit(3)
            print('["wrong", []]' if "wrong" in line else '[null, ["x"]]', flush=True)
    """
    child = Child([sys.executable, "-c", dies])
    names = ["a", "bad 8", "b", "wrong", "bad 11", "exit", "c"]
    failures, launched = run_all(child, names)
    child.close()
    assert failures == {
        "bad 8": "DIED OF SIGFPE",
        "wrong": "wrong",
        "bad 11": "DIED OF SIGSEGV",
        "exit": "EXITED WITH 3",
    }
    assert launched["x"] == 3
    failures, launched = run_all(child, ["bad 8 ", *(f"bad 8 {i}" for i in range(9))])
    child.close()
    assert len(failures) == MAX_DEATHS + 1 and failures["5 cells"] == "not run after 5 deaths"


def reference_launcher(operator):
    def launch(*args, **options):
        return getattr(reference, sweep.base(operator))(*args, **options)

    return launch


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("operator", sweep.CHECKS)
def test_the_reference_passes_and_one_wrong_element_of_it_does_not(operator):
    """In each output in turn, its first element and its last."""
    cell = sweep.Cell(operator, H=3)
    right = reference_launcher(operator)
    sweep.run(cell, BACKENDS["cpu"], right)

    def wrong(output, position):
        def launch(*args, **options):
            got = right(*args, **options)
            results = got if isinstance(got, tuple) else (got,)
            changed = results[output].view(-1)
            if changed.numel():
                # One more is far outside every bound, and a row like others in an index.
                value = changed[position]
                changed[position] = value + 1 if value.isfinite() else 0
                faults.append(output)
            return got

        return launch

    faults = []
    for output in range(3):
        for position in (0, -1):
            try:
                sweep.run(cell, BACKENDS["cpu"], wrong(output, position))
            except AssertionError:
                continue
            except IndexError:
                break
            assert output not in faults, f"output {output} at {position}"
    assert faults


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("operator", sweep.CHECKS)
def test_a_write_into_an_input_or_beside_it_is_found(operator):
    right = reference_launcher(operator)

    def beside(*args, **options):
        got = right(*args, **options)
        view = args[0]
        view.as_strided((1,), (1,), view.storage_offset() + view.numel()).zero_()
        return got

    def into(*args, **options):
        got = right(*args, **options)
        args[0].view(-1)[3] += 1
        return got

    for launch in (beside, into):
        with pytest.raises(AssertionError, match="wrote into an input or beside it"):
            sweep.run(sweep.Cell(operator), BACKENDS["cpu"], launch)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("rows", ["repeated", *sweep.OUT_OF_RANGE])
@pytest.mark.parametrize("operator", [*filter(sweep.takes_index, sweep.CHECKS)])
def test_an_index_that_is_taken_as_it_is_does_not_pass(operator, rows):
    """Where a backend looks at the index or the owners; 0 in the place of every bad entry."""
    right = reference_launcher(operator)
    cell = sweep.Cell(operator, rows=rows)
    limit = cell.P + (cell.K if sweep.takes_owner(operator) else cell.n)

    def in_range(argument):
        if not isinstance(argument, torch.Tensor) or argument.dtype != torch.int64:
            return argument
        return argument.where((argument >= 0) & (argument < limit), 0)

    def launch(*args, **options):
        return right(*map(in_range, args), **options)

    if rows == "repeated" and not sweep.refuses_repeated(cell):
        sweep.run(cell, BACKENDS["cpu"], launch)
    else:
        with pytest.raises(AssertionError, match="was not refused"):
            sweep.run(cell, BACKENDS["cpu"], launch)
