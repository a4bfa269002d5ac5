"""The Ascend binding under the real torch_npu; run by tests/ascend/torch_npu_check.py alone.

Tensors are on npu:0 of a fake driver, and the kernels are the CPU model's. Nothing else of the chip
works there: where a whole model runs, torch's own operators are computed on the CPU (OthersOnCpu).
"""

import ctypes
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

LIBRARY = os.environ.get("SKIPVIT_ASCEND_LIBRARY")
if LIBRARY is None:
    pytest.skip("opt-in: python tests/ascend/torch_npu_check.py", allow_module_level=True)

import torch_npu  # noqa: E402, F401
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_map_only  # noqa: E402

import skipvit_kernels as sk  # noqa: E402
from skipvit_kernels import ops, reference  # noqa: E402
from skipvit_kernels.backends import npu  # noqa: E402

BATCH, PREFIX, PATCHES, CHANNELS, KEEP, HEADS = 3, 1, 37, 32, 17, 4


@pytest.fixture(scope="module", autouse=True)
def kernels():
    npu.LIBRARY = Path(LIBRARY)
    npu.load()
    assert npu.unavailable_reason() is None
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*runs as plain PyTorch.*")
        yield


def on_npu(tensor):
    return tensor.detach().to("npu:0").requires_grad_(tensor.requires_grad)


def same(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert a.device.type == "npu" and torch.equal(a.detach().cpu(), b.detach())


@pytest.fixture(params=[torch.float32, torch.float16], ids=str)
def inputs(request):
    torch.manual_seed(0)
    x = torch.randn(BATCH, PREFIX + PATCHES, CHANNELS).to(request.param).requires_grad_()
    return x, torch.rand(BATCH, HEADS, PATCHES)


def test_every_operator_has_its_kernel_under_privateuse1():
    for name, group in ops.OPERATORS.items():
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
        assert has_kernel(f"skipvit::{name}", "PrivateUse1") == (group != "merge"), name


def test_gather_topk_forward_and_backward(inputs):
    x, scores = inputs
    expected = reference.gather_topk(x, scores, KEEP)
    device_x = on_npu(x)
    tokens, index = sk.gather_topk(device_x, scores.to("npu:0"), KEEP)
    same((tokens, index), expected)
    grad = torch.randn(tokens.shape).to(x.dtype)
    tokens.backward(grad.to("npu:0"))
    expected[0].backward(grad)
    same([device_x.grad], [x.grad])


def test_gather_rows_forward_and_backward(inputs):
    x, scores = inputs
    index = reference.gather_topk(x.detach(), scores, KEEP)[1]
    expected = reference.gather_rows(x, index)
    device_x = on_npu(x)
    rows = sk.gather_rows(device_x, index.to("npu:0"))
    same([rows], [expected])
    grad = torch.randn(rows.shape).to(x.dtype)
    rows.backward(grad.to("npu:0"))
    expected.backward(grad)
    same([device_x.grad], [x.grad])


@pytest.mark.parametrize("with_update", [False, True])
def test_scatter_back_forward_and_backward(inputs, with_update):
    x, scores = inputs
    tokens, index = (t.detach() for t in reference.gather_topk(x, scores, KEEP))
    tokens = torch.randn(tokens.shape).to(x.dtype).requires_grad_()
    update = torch.randn(BATCH, CHANNELS).to(x.dtype).requires_grad_() if with_update else None
    device = [on_npu(t) if t is not None else None for t in (x, tokens, update)]
    out = sk.scatter_back(device[0], device[1], index.to("npu:0"), update=device[2])
    same([out], [reference.scatter_back(x, tokens, index, update=update)])
    grad = torch.randn(out.shape).to(x.dtype)
    out.backward(grad.to("npu:0"))
    grads = reference.scatter_back_backward(grad, index, with_update)
    same([device[0].grad, device[1].grad], grads[:2])
    if with_update:
        assert torch.allclose(device[2].grad.cpu(), grads[2], atol=1e-2)


def test_gather_topk_fuse_forward_and_backward(inputs):
    x, scores = inputs
    device_x, device_scores = on_npu(x), on_npu(scores.requires_grad_())
    tokens, index = sk.gather_topk_fuse(device_x, device_scores, KEEP)
    expected, expected_index = reference.gather_topk_fuse(x, scores, KEEP)
    same([index], [expected_index])
    assert torch.allclose(tokens.detach().cpu(), expected, rtol=1e-3, atol=1e-4)
    grad = torch.randn(tokens.shape).to(x.dtype)
    tokens.backward(grad.to("npu:0"))
    grad_x, grad_scores = reference.gather_topk_fuse_backward(grad, x, scores, expected_index)
    same([device_x.grad], [grad_x])
    assert torch.allclose(device_scores.grad.cpu(), grad_scores, rtol=1e-4, atol=1e-4)


def test_cls_scores(inputs):
    dtype = inputs[0].dtype
    qkv = torch.randn(BATCH, 1 + PATCHES, 3, HEADS, 16).to(dtype)
    q, _, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    device_qkv = qkv.to("npu:0").permute(2, 0, 3, 1, 4)
    expected = reference.cls_scores(q[:, :, 0], qkv.permute(2, 0, 3, 1, 4)[1])
    first = q[:, :, 0].contiguous().to("npu:0")
    got = sk.cls_scores(first, device_qkv[1])  # the keys as they lie in the projection
    assert got.device.type == "npu"
    assert torch.allclose(got.cpu(), expected, atol=1e-6)


def test_what_the_chip_cannot_do_is_refused_before_a_launch():
    x = torch.randn(2, 9, 32, dtype=torch.bfloat16).to("npu:0")
    scores = torch.rand(2, 8).to("npu:0")
    with pytest.raises(TypeError, match="x must be float32 or float16 on Ascend910A, got bfloat16"):
        sk.gather_topk(x, scores, 3)
    with pytest.raises(ValueError, match=r"multiple of 8 on Ascend910A .* got 20"):
        sk.gather_topk(torch.randn(2, 9, 20).to("npu:0"), scores, 3)
    with pytest.raises(ValueError, match="at most 4096 tokens on Ascend910A, got 5001"):
        sk.gather_topk(torch.randn(1, 5001, 8).to("npu:0"), torch.rand(1, 5000).to("npu:0"), 3)


def test_a_tensor_of_another_device_reaches_no_core():
    x, index = torch.randn(2, 9, 32), torch.tensor([[0, 3], [2, 5]])
    with pytest.raises(ValueError, match="index must be on an NPU, got cpu"):
        torch.ops.skipvit.gather_rows(x.to("npu:0"), index)
    with pytest.raises(ValueError, match="x must be on an NPU, got cpu"):
        torch.ops.skipvit.gather_rows(x, index.to("npu:0"))
    with pytest.raises(ValueError, match="update must be on an NPU, got cpu"):
        rows = x.to("npu:0"), x[:, :2].to("npu:0"), index.to("npu:0")
        torch.ops.skipvit.scatter_back(*rows, update=x[:, 0].contiguous())


def test_the_number_of_cores_is_asked_once():
    driver = ctypes.CDLL(str(Path(str(LIBRARY)).with_name("libascendcl.so")))
    x, index = torch.randn(2, 9, 32).to("npu:0"), torch.tensor([[0, 3], [2, 5]]).to("npu:0")
    sk.gather_rows(x, index)
    calls = ctypes.c_int.in_dll(driver, "fake_acl_capability_calls")
    before = calls.value
    sk.gather_rows(x, index)
    assert calls.value == before


def test_a_foreign_chip_is_refused_when_the_library_loads():
    code = (
        "import torch_npu, torch\nfrom pathlib import Path\n"
        "from skipvit_kernels.backends import npu\n"
        f"npu.LIBRARY = Path({LIBRARY!r})\n"
        "print(npu.unavailable_reason())\n"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "print(has('skipvit::gather_rows', 'PrivateUse1'))"
    )
    environment = {**os.environ, "SKIPVIT_FAKE_SOC": "Ascend910B3"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    reason, registered = done.stdout.strip().splitlines()[-2:]
    assert reason.endswith("got Ascend910B3") and registered == "False"


def matmul_backward(grad, left, right, mask):
    return grad @ right.mT, left.mT @ grad  # of equal batch dimensions


def linear_backward(x, grad, weight, mask):
    rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    return grad @ weight, grads.mT @ rows, grads.sum(0)


# Operators that torch defines for foreign devices alone.
BACKWARDS = {"aten::matmul_backward": matmul_backward, "aten::linear_backward": linear_backward}


class OthersOnCpu(TorchDispatchMode):
    """Every operator but ours and the views is computed on the CPU and its result moved back."""

    def __init__(self):
        super().__init__()
        self.ours = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "skipvit":
            name = func.name().removeprefix("skipvit::")
            self.ours.append(name)
            # Making a tensor dense is an operator of the chip too; the keys are read as they lie.
            args = [a if name == "cls_scores" and i == 1 else dense(a) for i, a in enumerate(args)]
            return func(*args, **kwargs)
        tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if torch.is_tensor(t)]
        if func.is_view or not any(t.device.type == "npu" for t in tensors):
            return func(*args, **kwargs)
        copies = {}

        def down(t):
            return copies.setdefault(id(t), host(t)) if t.device.type == "npu" else t

        cpu_args, cpu_kwargs = tree_map_only(torch.Tensor, down, (args, kwargs))
        if "device" in cpu_kwargs:
            cpu_kwargs = {**cpu_kwargs, "device": "cpu"}
        out = BACKWARDS.get(func._schema.name, func)(*cpu_args, **cpu_kwargs)
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value.copy_(copies[id(value)])
                return value
        if torch.device(kwargs.get("device") or "npu").type == "cpu":
            return out
        return tree_map_only(torch.Tensor, lambda t: t.contiguous().to("npu:0"), out)


def dense(value):
    if torch.is_tensor(value) and not value.is_contiguous():
        return host(value).contiguous().to("npu:0")
    return value


def host(tensor):
    """A view, on the CPU: its storage travels whole, because a strided copy needs the chip."""
    flat = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())
    return flat.cpu().as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


@pytest.mark.parametrize("config", ["2(50%)+3", "2(50%)+3:mean", "2(50%)+fused"])
def test_a_patched_vit_runs_and_trains_as_on_the_cpu(config):
    if not hasattr(torch.ops.torchvision, "nms"):
        # timm imports torchvision, whose operators may be built for another torch: name two for it.
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
    on_cpu = timm.models.VisionTransformer(**sizes, num_classes=5)
    device = timm.models.VisionTransformer(**sizes, num_classes=5)
    device.load_state_dict(on_cpu.state_dict())
    sk.patch(on_cpu, config)
    for parameter in device.parameters():  # Module.to() would have the chip re-order weights
        parameter.data = parameter.data.to("npu:0")
    sk.patch(device, config)
    images = torch.randn(2, 3, 32, 32)
    expected = on_cpu(images)
    expected.square().sum().backward()
    with OthersOnCpu() as mode:
        got = device(images.to("npu:0"))
        got.square().sum().backward()
    assert got.device.type == "npu"
    assert torch.allclose(got.detach().cpu(), expected, atol=1e-4)
    for (name, want), have in zip(on_cpu.named_parameters(), device.parameters(), strict=True):
        if want.grad is not None:
            assert torch.allclose(have.grad.cpu(), want.grad, atol=1e-3), name
    assert any(name.startswith("gather_topk") for name in mode.ours)
    assert any(name.endswith("backward") for name in mode.ours)
