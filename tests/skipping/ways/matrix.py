"""The families, the methods and the ways of running that docs/ways.md crosses.

`PYTHONPATH=tests python -m skipping.ways.matrix` writes the matrix into the page; test_ways.py
holds every cell of it.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import timm
import torch
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from timm.optim import param_groups_layer_decay
from timm.utils import ModelEmaV3
from torch import func, nn

import skipvit_kernels as sk

PAGE = Path(__file__).parents[3] / "docs" / "ways.md"

# Four blocks: a tracer's time goes by them, and no way cares for more.
SIZES = dict(img_size=48, patch_size=8, embed_dim=48, depth=4, num_heads=3, num_classes=7)


def vit(kind: type[nn.Module] = VisionTransformer, **options) -> nn.Module:
    return kind(**{**SIZES, **options})


def naflex() -> nn.Module:
    sizes = dict(patch_size=8, embed_dim=48, depth=4, num_heads=3, pos_embed_grid_size=(6, 6))
    model = NaFlexVit(NaFlexVitCfg(**sizes, class_token=True, global_pool="token"), num_classes=7)
    model.pretrained_cfg = {"input_size": (3, 48, 48)}
    return model


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "ViT": vit,
    "ViT, no CLS, average": lambda: vit(class_token=False, global_pool="avg"),
    "distilled DeiT": lambda: timm.create_model("deit_tiny_distilled_patch16_224", **SIZES),
    "DINOv2: registers, LayerScale": lambda: vit(
        reg_tokens=4, no_embed_class=True, init_values=0.3
    ),
    "SigLIP: pooling latent": lambda: vit(class_token=False, global_pool="map"),
    "DINOv3: RoPE, registers": lambda: vit(
        Eva,
        **dict(num_reg_tokens=4, init_values=0.3, use_abs_pos_emb=False, global_pool="token"),
        **dict(use_rot_pos_emb=True, rope_type="dinov3", rope_rotate_half=True),
    ),
    "BEiT: relative bias": lambda: vit(Beit, use_shared_rel_pos_bias=True, init_values=0.3),
    "ViT-relpos": lambda: vit(VisionTransformerRelPos),
    "NaFlexViT": naflex,
}

METHODS = {
    "skip": "2(55%)+4",
    "mean": "1,2(30%,30%)+4:mean",
    "fuse": "2(45%)+fused",
    "merge": "2(55%)+4:merge",
    "similar": "1-3(3p)+4:merge,score=similar",
}


@dataclasses.dataclass(frozen=True)
class Refusal:
    """What does not work, the message that says so, and why; without names every one is meant."""

    message: str
    why: str
    way: str = ""
    families: tuple[str, ...] = ()
    method: str = ""

    def meets(self, way: str, family: str, method: str) -> bool:
        if self.families and family not in self.families:
            return False
        return self.way in ("", way) and self.method in ("", method)


PLACED = ("DINOv3: RoPE, registers", "BEiT: relative bias", "ViT-relpos", "NaFlexViT")
REFUSALS = [
    Refusal(
        "the fused token has no position",
        "method fuse: the fused token has no position to rotate or bias it by",
        families=PLACED,
        method="fuse",
    ),
    Refusal(
        "Unexpected keyword arguments",
        "timm hands these blocks RoPE, bias or mask by keyword, which torch's reentrant checkpoint "
        "does not take; the unpatched models are refused too",
        "reentrant",
        PLACED,
    ),
    Refusal(
        "TorchScript (torch.jit, torch.onnx.export with dynamo=False) cannot hold a patched model",
        "the number of tokens would be a tensor: torch.export and torch.onnx.export(dynamo=True) "
        "take its place",
        "TorchScript",
    ),
]


def refusal(way: str, family: str, method: str) -> Refusal | None:
    return next((each for each in REFUSALS if each.meets(way, family, method)), None)


def build(family: str, method: str = "", seed: int = 3) -> nn.Module:
    """A model in training mode, patched where a method is named."""
    torch.manual_seed(seed)
    model = FAMILIES[family]()
    for parameter in model.parameters():  # timm starts biases, registers and CLS at nearly zero
        if parameter.abs().max() < 1e-3:
            nn.init.normal_(parameter, std=0.3)
    return sk.patch(model, METHODS[method]) if method else model


def images(batch: int = 4) -> torch.Tensor:
    return torch.randn(batch, 3, 48, 48, generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The output, and every parameter's gradient."""
    torch.manual_seed(5)
    output = model(x)
    loss = output.float().square().sum()
    return [output.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def same(got, want, **tolerance) -> None:
    for mine, other in zip(got, want, strict=True):
        torch.testing.assert_close(mine, other, **(tolerance or dict(rtol=0, atol=0)))


# Sums in another order: some steps of float32 after a dozen layers, of values around 1.
REORDERED = dict(rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------- the ways


def fp32(family, method):
    """`sk.verify` holds: without drops the same outputs and gradients, in evaluation and training;
    with them the tokens counted; `unpatch` gives back the modules"""
    report = sk.verify(build(family), METHODS[method])
    assert report.max_difference <= report.tolerance < 1e-5 and report.train_difference < 1e-5
    assert min(count.mlp for count in report.token_counts) < report.token_counts[0].attention


def autocast(family, method):
    """The same under bfloat16 and under float16; a training step has finite gradients in float32"""
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            sk.verify(build(family), METHODS[method])
            output, *grads = gradients(build(family, method), images())
        assert output.dtype == dtype
        assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads)


def bf16(family, method):
    """The same of `model.bfloat16()`"""
    sk.verify(build(family).bfloat16(), METHODS[method])
    results = gradients(build(family, method).bfloat16(), images().bfloat16())
    assert all(each.dtype == torch.bfloat16 and each.isfinite().all() for each in results)


def compiled(family, method):
    """`torch.compile(fullgraph=True)` gives eager's outputs and gradients (backend `aot_eager`:
    what becomes of the graph is the backend's)"""
    torch.compiler.reset()
    model = build(family, method)
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")
    same(gradients(fast, images()), gradients(model, images()), **REORDERED)


def exported(family, method):
    """`torch.export` with a dynamic batch gives eager's outputs at two batch sizes"""
    model = build(family, method).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (images(),), dynamic_shapes=({0: batch},)).module()
    for size in (4, 1):
        same([program(images(size))], [model(images(size))], **REORDERED)


def onnx(family, method):
    """`torch.onnx.export(dynamo=True)` inside `sk.reference_operators()` and `torch.no_grad()`,
    with a dynamic batch: standard operators only, and eager's outputs in onnxruntime at two batch
    sizes"""
    import onnxruntime

    model = build(family, method).eval()
    batch, file = torch.export.Dim("batch", min=1, max=64), io.BytesIO()
    with sk.reference_operators(), torch.no_grad():
        program = torch.onnx.export(
            model, (images(),), dynamo=True, dynamic_shapes=({0: batch},), verbose=False
        )
    assert {node.domain for node in program.model.graph} == {""} and not program.model.functions
    file.write(program.model_proto.SerializeToString())
    session = onnxruntime.InferenceSession(file.getvalue())
    (given,) = session.get_inputs()
    for size in (4, 1):
        (output,) = session.run(None, {given.name: images(size).numpy()})
        same([torch.from_numpy(output)], [model(images(size))], **REORDERED)


def checkpointed(family, method, *, reentrant=False):
    """`model.set_grad_checkpointing()`, without reentrance as timm has it: the same bits"""
    model = build(family, method)
    want = gradients(model, images())
    model.set_grad_checkpointing()
    with mock.patch("timm.models._manipulate.use_reentrant_ckpt", lambda: reentrant):
        torch.manual_seed(5)
        output = model(images().requires_grad_())
        output.square().sum().backward()
    same([output.detach(), *(p.grad for p in model.parameters())], want)


def reentrant(family, method):
    """Gradient checkpointing with `TIMM_REENTRANT_CKPT=1`: the same bits"""
    checkpointed(family, method, reentrant=True)


def functional(family, method):
    """`torch.func`: functional_call as it is; inside `sk.reference_operators()` grad, gradients per
    image (vmap of grad) and, without gradients, an ensemble (vmap over stacked models)"""
    models, x = [build(family, method, seed).eval() for seed in (3, 4)], images()
    output, *grads = gradients(models[0], x)
    parameters = dict(models[0].named_parameters())
    same([func.functional_call(models[0], parameters, (x,))], [output])

    def loss(parameters, x):
        return func.functional_call(models[0], parameters, (x,)).square().sum()

    with sk.reference_operators():
        got = func.grad(loss)(parameters, x)
        each = func.vmap(func.grad(lambda p, image: loss(p, image[None])), (None, 0))(parameters, x)
        with torch.no_grad():
            together = func.vmap(lambda *state: func.functional_call(models[0], state, (x,)))
            outputs = together(*func.stack_module_state(models))
    same(got.values(), grads, **REORDERED)
    same([per_image.sum(0) for per_image in each.values()], grads, **REORDERED)
    same(outputs, [model(x) for model in models], **REORDERED)


def copies(family, method):
    """`copy.deepcopy`, `pickle` and `torch.save` give a patched model that is independent"""
    model = build(family, method).eval()

    def saved(model):
        file = io.BytesIO()
        torch.save(model, file)
        return torch.load(io.BytesIO(file.getvalue()), weights_only=False)

    want, dense = model(images()), sk.unpatch(copy.deepcopy(model))(images())
    assert not torch.equal(want, dense)
    for clone in (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved):
        other = clone(model)
        same([other(images())], [want])
        same([sk.unpatch(other)(images()), model(images())], [dense, want])


def ema(family, method):
    """timm's `ModelEmaV3`: the average skips as the model does, and follows it"""
    model = build(family, method)
    average = ModelEmaV3(model, decay=0.5)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    average.update(model)
    halfway = copy.deepcopy(model)
    halfway.load_state_dict({n: before[n].lerp(p, 0.5) for n, p in model.state_dict().items()})
    assert sk.is_patched(average)
    same([average.eval()(images())], [halfway.eval()(images())], **REORDERED)


def layer_decay(family, method):
    """timm's `param_groups_layer_decay` makes of the patched model the groups of the unpatched"""

    def groups(model):
        names = {parameter: name for name, parameter in model.named_parameters()}
        return [
            (group["lr_scale"], group["weight_decay"], [names[p] for p in group["params"]])
            for group in param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.75)
        ]

    made = groups(build(family, method))
    assert made == groups(build(family)) and len({scale for scale, _, _ in made}) == 6


def torchscript(family, method):
    """`torch.jit.script`, `torch.jit.trace` and the exporters built on them"""
    torch.jit.trace(build(family, method).eval(), images())


def ddp(family, method):
    """`DistributedDataParallel` over two processes (gloo): the gradients of one"""


def fsdp2(family, method):
    """`fully_shard` of every block (`model.blocks[:]`) and of the model, over two processes (gloo):
    the gradients of one"""


WAYS: dict[str, Callable[[str, str], None]] = {
    "fp32": fp32,
    "autocast": autocast,
    "bf16": bf16,
    "compile": compiled,
    "export": exported,
    "ONNX": onnx,
    "checkpoint": checkpointed,
    "reentrant": reentrant,
    "torch.func": functional,
    "copies": copies,
    "EMA": ema,
    "layer decay": layer_decay,
    "DDP": ddp,
    "FSDP2": fsdp2,
    "TorchScript": torchscript,
}


# ---------------------------------------------------------------------------- the page


def cell(way: str, family: str) -> str:
    refused = [refusal(way, family, method) for method in METHODS]
    whole = next((each for each in refused if each and each.way), None)
    notes = [whole] if whole else [each for each in refused if each]
    return " ".join(
        ["refused" if whole else "pass", *(f"[{REFUSALS.index(each) + 1}]" for each in notes)]
    )


def page() -> str:
    lines = ["| family |", "|---|"]
    for way in WAYS:
        lines = [f"{lines[0]} {way} |", f"{lines[1]}---|"]
    lines += [f"| {f} | {' | '.join(cell(way, f) for way in WAYS)} |" for f in FAMILIES]
    lines += [""]
    for at, each in enumerate(REFUSALS, start=1):
        lines += [f'- [{at}] refused with "... {each.message} ...": {each.why}.']
    lines += ["", "| way | what passes |", "|---|---|"]
    lines += [f"| {name} | {' '.join((way.__doc__ or '').split())} |" for name, way in WAYS.items()]
    methods = ", ".join(f"{name} `{text}`" for name, text in METHODS.items())
    lines += ["", f"Methods: {methods}."]
    return "\n".join(lines)


BEGIN, END = "<!-- the matrix, written by its test -->\n", "\n<!-- the end of the matrix -->"


def parts() -> tuple[str, str, str]:
    """The page before, within and behind the matrix."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    matrix, _, after = rest.partition(END)
    return before + BEGIN, matrix, END + after


def sampled(way: str, family: str) -> str:
    """One method for a cell, so that all of them meet every way: a tracer takes seconds."""
    methods = [method for method in METHODS if not refusal(way, family, method)]
    turns = itertools.cycle(methods)
    start = list(FAMILIES).index(family) + list(WAYS).index(way)
    return next(itertools.islice(turns, start, None))


if __name__ == "__main__":
    before, _, after = parts()
    PAGE.write_text(before + page() + after)
