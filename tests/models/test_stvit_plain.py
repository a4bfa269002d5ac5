"""STViT and STViT-R against loops over windows: outputs and gradients, in float64 to 1e-9."""

import pytest
import torch
from plain_stvit import deit, swin

from skipvit_kernels.models.stvit import STViT
from skipvit_kernels.models.stvit_swin import STViTSwin

TRUNK = {"embed_dim": 8, "num_heads": (1, 2, 2, 4), "num_classes": 5}
# What the papers and the released code say of each, in the oracle's own words.
FORMS = {
    "paper": {
        **{"pool": "spatial", "shortcut": True, "margin": (3, 3), "own_keys": (False, True)},
        "global_centres": True,
    },
    "classification": {
        **{"pool": "max", "shortcut": False, "margin": (3, 3), "own_keys": (True, True)},
        "global_centres": False,
    },
    "detection": {
        **{"pool": "max", "shortcut": True, "margin": (3, 4), "own_keys": (False, False)},
        "global_centres": False,
    },
}
DEITS = {
    "paper": {},
    "three generating layers": {"generating_depth": 3},
    "intra-window only": {"inter_window": False},
    "released": {"pool": "max", "global_centres": False, "shortcut": False},
    "3 x 3 tokens": {"semantic_grid": 3},
    "14 x 10 patches": {"img_size": (112, 80)},
}


def randomised(model):
    """Every part has a say: scales, biases, offsets and statistics too."""
    generator = torch.Generator().manual_seed(1)
    model = model.double().eval()
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            drawn = torch.randn(value.shape, generator=generator, dtype=value.dtype)
            around = {"gamma": (0.8, 0.2), "var": (1, 0.2), "weight": (0, 0.3)}
            middle, spread = next((v for k, v in around.items() if name.endswith(k)), (0, 0.3))
            if "norm" in name and name.endswith("weight"):
                middle = 1
            value.copy_((middle + spread * drawn).abs() if middle else spread * drawn)
    return model


def compare(model, images, plain):
    """Logits, and the gradients to the images and to every parameter."""
    images.requires_grad_()
    inputs = {"images": images, **dict(model.named_parameters())}
    cotangent = torch.linspace(-1, 1, 5, dtype=torch.float64)

    def gradients(logits):
        loss = (logits * cotangent).sum() + logits.square().sum()
        return torch.autograd.grad(loss, list(inputs.values()))

    got = model(images)
    want = plain({**dict(model.named_buffers()), **inputs}, images)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    for name, a, b in zip(inputs, gradients(got), gradients(want), strict=True):
        assert (a - b).norm() <= 1e-9 * b.norm() + 1e-12, name
        assert b.norm() > 0, f"{name} has no say in the oracle"


def pictures(height, width):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, height, width, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("options", DEITS.values(), ids=DEITS)
def test_stvit_on_deit(options):
    options = {"img_size": (112, 112), **options}
    model = randomised(
        STViT(patch_size=8, embed_dim=12, num_heads=3, depth=6, base_depth=2, num_classes=5,
              **options)
    )  # fmt: skip

    def plain(state, images):
        told = {"side": options.get("semantic_grid", 4)}
        told |= {
            name: options[name]
            for name in ("pool", "inter_window", "global_centres", "shortcut")
            if name in options
        }
        generating = options.get("generating_depth", 2)
        return deit(state, images, heads=3, depth=6, base=2, generating=generating, **told)

    compare(model, pictures(*options["img_size"]), plain)


@pytest.mark.parametrize(
    ("form", "side", "size"),
    [
        ("paper", 3, (224, 224)),
        ("paper", 4, (160, 328)),  # a map of 10 x 21 in the third stage: windows cut on both sides
        ("classification", 3, (157, 330)),
    ],
)
def test_stvit_on_swin(form, side, size):
    depths = (1, 2, 7, 2)
    model = STViTSwin(
        depths=depths, base_depth=2, semantic_side=side, form=form, img_size=size, **TRUNK
    )

    def plain(state, images):
        return swin(
            state, images, depths=depths, heads=TRUNK["num_heads"], form=FORMS[form],
            recover=False, base=2, side=side,
        )  # fmt: skip

    compare(randomised(model), pictures(*size), plain)


# The last has six windows in a row: the outer ones are too far apart for the recovery.
RECOVERED = {
    "released": ("classification", {}, (224, 224)),
    "released, all options": (
        "classification",
        {"conv_pos": True, "relative_pos": True, "shortcut": True, "global_centres": True},
        (224, 224),
    ),
    "paper": ("paper", {}, (224, 224)),
    "detection": ("detection", {}, (224, 224)),
    "released, 160 x 328": ("classification", {"relative_pos": True}, (160, 328)),
    "paper, 160 x 328, 4 x 4 tokens": ("paper", {"semantic_side": 4}, (160, 328)),
    "detection, 157 x 330": ("detection", {}, (157, 330)),
    "detection, 50 x 610": ("detection", {}, (50, 610)),
}


@pytest.mark.parametrize(("form", "options", "size"), RECOVERED.values(), ids=RECOVERED)
def test_stvit_r(form, options, size):
    depths = (2, 1, 12, 2)
    model = STViTSwin(depths=depths, recover=True, form=form, img_size=size, **options, **TRUNK)
    told, side = FORMS[form] | options, options.get("semantic_side", 3)

    def plain(state, images):
        heads = TRUNK["num_heads"]
        return swin(state, images, depths=depths, heads=heads, form=told, recover=True, side=side)

    compare(randomised(model), pictures(*size), plain)
