"""reference_operators: the same values as the kernels', from standard operators alone."""

import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import skipvit_kernels as sk
from skipvit_kernels.ops import OPERATORS
from skipvit_kernels.ops.scores import trained_cls_scores


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operators = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators.add(func.namespace)
        return func(*args, **(kwargs or {}))


def everything(dtype, batch=2, patches=12, keep=5):
    """Every operator once on tensors that want a gradient, and that gradient."""
    torch.manual_seed(1)
    x, other = torch.randn(2, batch, 1 + patches, 6, dtype=dtype).requires_grad_().unbind()
    q, k = torch.randn(batch, 3, 4, dtype=dtype), torch.randn(batch, 3, 1 + patches, 4, dtype=dtype)
    q.requires_grad_()
    scores = sk.cls_scores(q, k)
    assert not scores.requires_grad
    ties = scores.detach().round(decimals=2)
    if patches > 3:
        ties[..., 3] = torch.nan
    tokens, index = sk.gather_topk(x, ties, keep)
    fused, _ = sk.gather_topk_fuse(x, trained_cls_scores(q, k), keep)
    update = tokens.mean(1)
    back = sk.scatter_back(x, 2 * tokens, index, update=update)
    likest = sk.match_higher(x, ties.float())
    owner = sk.match_kept(x, index)
    assert not owner.requires_grad
    merged, sizes = sk.merge_rows(x, owner, 1 + keep, sizes=torch.rand(owner.shape) + 0.5)
    restored = sk.restore_rows(x, merged, 2 * merged, owner)
    moved = [sk.gather_rows(other, index), tokens, index, owner, back, sizes]
    summed = [scores, likest, fused, merged, restored]
    loss = sum(t.double().square().sum() for t in (moved[0], tokens, back, *summed[2:]))
    return moved, summed, torch.autograd.grad(loss, [x, other, q])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_values_are_those_of_the_kernels(dtype):
    moved, summed, grads = everything(dtype)
    seen = Seen()
    with seen, sk.reference_operators():
        got_moved, got_summed, got_grads = everything(dtype)
    assert seen.operators == {"aten"}
    assert all(map(torch.equal, got_moved, moved))
    # Sums of 13 tokens, in another order: some steps of the accumulation, and one of the result.
    step = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps if dtype.itemsize > 2 else 0)
    for got, want in zip((*got_summed, *got_grads), (*summed, *grads), strict=True):
        torch.testing.assert_close(got, want, rtol=16 * step, atol=16 * step)
    # Behind the context the operators, with their own backwards, are back.
    with Seen() as seen:
        everything(dtype)
    assert "skipvit" in seen.operators


@pytest.mark.parametrize("shape", [(0, 12, 5), (2, 12, 12), (2, 0, 0), (2, 12, 1)])
def test_empty_and_full_selections(shape):
    moved, summed, _ = everything(torch.float32, *shape)
    with sk.reference_operators():
        got_moved, got_summed, _ = everything(torch.float32, *shape)
    assert all(map(torch.equal, got_moved, moved))
    for got, want in zip(got_summed, summed, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)


def test_features_that_are_nan_or_zero_have_valid_owners():
    features = torch.randn(2, 3, 9, 4, dtype=torch.bfloat16)
    features[0, :, 2], features[0, :, 5], features[1, :, 7] = torch.nan, 0, torch.nan
    index = torch.tensor([[0, 5, 8], [0, 3, 7]])
    want = sk.match_kept(features, index)
    with sk.reference_operators():
        assert torch.equal(sk.match_kept(features, index), want)


def test_gradients_of_gradients():
    """Which the operators' own backwards do not have."""
    x = torch.randn(1, 7, 3, dtype=torch.float64, requires_grad=True)
    scores = torch.rand(1, 6, dtype=torch.float64, requires_grad=True)

    def there_and_back(x, scores):
        tokens, index = sk.gather_topk(x.sin(), scores, 3)
        fused, _ = sk.gather_topk_fuse(tokens.square(), scores.gather(1, index[:, 1:] - 1), 2)
        back = sk.scatter_back(x, fused, index, update=tokens.mean(1))
        owner = sk.match_kept(x, index)
        merged, _ = sk.merge_rows(back, owner, 4)
        return sk.restore_rows(x, merged, merged.square(), owner)

    with sk.reference_operators():
        assert torch.autograd.gradgradcheck(there_and_back, (x, scores))


def test_another_thread_keeps_its_kernels():
    seen = Seen()

    def elsewhere():
        with seen:
            everything(torch.float32)

    with sk.reference_operators():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert "skipvit" in seen.operators


def test_every_operator_has_a_reference():
    for name in OPERATORS:
        assert getattr(torch.ops.skipvit, name).default in sk.ops.library._PLAIN
