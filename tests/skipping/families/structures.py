"""Every ViT-like name of timm: patched or refused, and which structure of blocks proves it."""

import functools
import typing

import timm
import timm.models.vitamin
import torch
from timm.models import model_entrypoint

import skipvit_kernels as sk
from skipvit_kernels.skipping import families

# timm's modules whose models attend to patches of an image. Networks that only convolve, gate or
# mix (and MobileNets with an attention here and there) are none.
MODULES = (
    "beit cait coat convit crossvit csatv2 davit deepseek_vit deit edgenext efficientformer "
    "efficientformer_v2 efficientvit_mit efficientvit_msra eva fastvit gcvit gemma4_vit hiera "
    "hieradet_sam2 iformer levit maxxvit metaformer mobilevit mvitv2 naflexvit nest nextvit pit "
    "pvt_v2 qwen3_vit repvit shvit swiftformer swin_transformer swin_transformer_v2 "
    "swin_transformer_v2_cr tiny_vit tnt twins visformer vision_transformer "
    "vision_transformer_hybrid vision_transformer_relpos vision_transformer_sam vitamin volo "
    "xcit"
)
DEPTH = 4


class Entry(typing.NamedTuple):
    """A name: its model's class, why it is refused (None: it is patched), its structure.

    `row` is the page's: model, blocks, positions, prefix tokens, what the head reads, scorer.
    """

    name: str
    kind: type
    refusal: str | None
    structure: tuple = ()
    weights: int = 0
    row: tuple = ()


@functools.cache
def entries():
    """One for each name, in timm's order."""
    known = set(timm.list_modules())
    modules = [module for module in MODULES.split() if module in known]
    return [entry(name) for module in modules for name in timm.list_models(module=module)]


def proofs():
    """Of each structure the names that have it, the smallest model first."""
    groups = {}
    for each in sorted(entries(), key=lambda each: each.weights):
        if each.refusal is None:
            groups.setdefault(each.structure, []).append(each)
    return list(groups.values())


def entry(name):
    """A name's, from a model without weights (meta tensors) and of four blocks.

    Of a class that is refused none is built: the class is the return type of the name's function,
    where that has one.
    """
    kind = typing.get_type_hints(model_entrypoint(name)).get("return")
    with torch.device("meta"):
        kind = kind if isinstance(kind, type) else type(timm.create_model(name))
    try:
        families.of_class(kind)
    except ValueError as error:
        return Entry(name, kind, str(error))
    with torch.device("meta"):
        model = build(name)
    try:
        sk.patch(model, f"2(50%)+{DEPTH}")
    except ValueError as error:
        return Entry(name, type(model), str(error))
    sk.unpatch(model)
    weights = sum(parameter.numel() for parameter in model.parameters())
    return Entry(name, type(model), None, structure(model), weights, row(model))


def row(model):
    family = families.of(model)
    trunk, block = family.trunk(model), family.blocks(model)[1]
    parts = dict(block.named_modules())
    attn = parts.get("attn") or parts.get("attns.0.attn")
    prefix = family.num_prefix_tokens(model)
    return (
        type(model).__name__,
        type(block).__name__ + ("" if attn is None else f", {type(attn).__name__}"),
        family.placed_by(model) or "none",
        f"CLS + {prefix - 1}" if family.has_cls(model) else str(prefix),
        getattr(trunk, "global_pool", "") or getattr(model, "global_pool", "") or "all",
        family.scorer(model),
    )


def build(name, **options):
    """The model with four blocks; whole where each has a number of key heads of its own."""
    if "sapiens2" in name:
        return timm.create_model(name, **options)
    return timm.create_model(name, **{"depth": DEPTH, **options})


def structure(model):
    """What its routing depends on: classes of all parts around and in the blocks, and their flags.

    Sizes do not count: widths, heads, patches; of prefix tokens, 0, 1 and more.
    """
    family = families.of(model)
    trunk, blocks = family.trunk(model), family.blocks(model)
    around = (
        type(model).__name__,
        type(trunk).__name__,
        family.has_cls(model),
        min(family.num_prefix_tokens(model), 2),
        *(getattr(model, name, None) for name in ("global_pool", "pool_include_prefix")),
        *(getattr(trunk, name, None) for name in ("global_pool", "no_embed_class", "rope_mixed")),
        *(getattr(trunk, name, None) for name in ("rope_is_mixed", "use_key_only_attn_mask")),
        getattr(trunk, "pos_embed", None) is None,
        *(
            (name, type(part).__name__)
            for owner in dict.fromkeys((model, trunk))
            for name, part in owner.named_children()
            if part is not blocks and part is not trunk
        ),
    )
    return (around, *dict.fromkeys(inside(block) for block in blocks))


def inside(block):
    """Classes of its parts, names of its parameters, flags of its attention."""
    attn = getattr(block, "attn", block)
    flags = ("rotate_half", "qkv_bias_separate", "num_prefix_tokens", "dual_lambda")
    return (
        tuple((name, type(part).__name__) for name, part in block.named_modules()),
        tuple(sorted(name for name, _ in block.named_parameters())),
        (
            *(min(getattr(attn, flag, 0), 2) for flag in flags),
            getattr(attn, "num_kv_groups", 1) > 1,
        ),
    )


@torch.no_grad()
def tiny(name):
    """The model of four narrow blocks on a grid of 6 x 6, with weights that tell rows apart."""
    with torch.device("meta"):
        trunk = build(name)
    trunk = families.of(trunk).trunk(trunk)
    kind, embed = type(trunk).__name__, type(getattr(trunk, "patch_embed", None)).__name__
    # 96: of some, an MLP of 8 / 3 of the width must be whole.
    options = dict(embed_dim=96, num_heads=4, num_classes=7)
    if kind != "NaFlexVit":
        side = 4 if embed == "HybridEmbed" else 6
        options |= dict(img_size=side * trunk.feature_info[0]["reduction"])
    if kind == "Gemma4VitEncoder":
        options |= dict(head_dim=24, intermediate_size=96, position_embedding_size=32)
    if kind == "Qwen3VitEncoder":
        options |= dict(pos_embed_grid_size=6)
    if hasattr(trunk, "merger") or hasattr(trunk, "aligner"):
        options |= dict(out_features=24)
    if "vitamin" in name:
        norm = timm.models.vitamin.VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6)
        stem = dict(embed_dim=(24, 48, 96), depths=(2, 4, 1), stem_width=24, head_type="1d")
        options |= dict(embed_cfg=timm.models.vitamin.VitCfg(**stem, conv_cfg=norm))
    if "sapiens2" in name:
        groups = [trunk.blocks[at].attn.num_kv_groups for at in (0, 6, 6, -1)]
        options |= dict(depth=DEPTH, num_kv_heads=tuple(4 // group for group in groups))
    if name == "vit_base_mci_224":
        del options["embed_dim"]  # its stem is made for it
    torch.manual_seed(3)
    model = build(name, **options)
    for parameter in model.parameters():
        if parameter.dim() in (2, 4):
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        else:
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def images_for(model, batch=2):
    """Of the grid of `tiny`."""
    if patch := patch_of(model):
        height, width = 6 * patch[0], 6 * patch[1]
    else:
        _, height, width = families.of(model).image_shape(model)
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(5))


def patch_of(model):
    """The patch of a model that takes any grid, packed too; None of others."""
    trunk = families.of(model).trunk(model)
    owner = {"NaFlexVit": lambda: trunk.embeds, "Gemma4VitEncoder": lambda: trunk}
    kind = type(trunk).__name__
    return owner[kind]().patch_size if kind in owner else None


def packed_for(model):
    """Patches of two images, of 6 x 6 and of 3 x 6 with padding between, as NaFlex packs them."""
    rows, columns = patch_of(model)
    patches = torch.rand(2, 36, rows * columns * 3, generator=torch.Generator().manual_seed(5))
    grid = torch.stack(torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij"), -1)
    coordinates = grid.reshape(1, 36, 2).repeat(2, 1, 1)
    coordinates[1, 27:] = coordinates[1, 9:18].clone()
    valid = torch.ones(2, 36, dtype=torch.bool)
    # Not at the end: a mask that did not follow would there be hard to tell from one that does.
    for each in (patches, coordinates, valid):
        each[1, 9:27] = 0
    return dict(patches=patches, patch_coord=coordinates, patch_valid=valid)
