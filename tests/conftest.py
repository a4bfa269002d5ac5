import backend_matrix
import pytest
import torch

# The models here are tiny: on a busy machine two threads that wait for each other take eight times
# as long as one. Threads are exercised where they matter, in test_threads_do_not_change_a_bit.
torch.set_num_threads(1)


@pytest.fixture
def poisoned():
    """Every freshly allocated tensor holds NaN (integers: the largest value) until written."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pytest_collection_modifyitems(config, items):
    """Leave out the dtypes that a backend does not have: there is nothing to run."""

    def has_dtypes(item):
        params = getattr(item, "callspec", None) and item.callspec.params
        if not params or not isinstance(params.get("backend"), backend_matrix.Backend):
            return True
        wanted = {params.get("dtype"), params.get("scores_dtype")} - {None}
        return wanted <= set(params["backend"].dtypes)

    deselected = [item for item in items if not has_dtypes(item)]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if has_dtypes(item)]


def pytest_terminal_summary(terminalreporter):
    """Say which kernels this run really launched."""
    if backend_matrix.launches:
        terminalreporter.section("kernels exercised by the operator suite")
        for (backend, operator), count in sorted(backend_matrix.launches.items()):
            terminalreporter.line(f"{backend:8} {operator:28} {count:6} times")
