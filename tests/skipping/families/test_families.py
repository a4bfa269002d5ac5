"""Every ViT-like name of timm is patched, and proved, or refused with the reason."""

import copy
import dataclasses
import pathlib

import pytest
import timm
import torch
from plain import transcribed
from structures import entries, images_for, inside, packed_for, proofs, tiny
from table import PAGE, page
from torch import nn

import skipvit_kernels as sk
from skipvit_kernels.skipping import families
from skipvit_kernels.skipping.families import Context

CURRENT = "1.0.31"  # of the page and its numbers; other versions have other names

try:
    with torch.device("meta"):
        timm.create_model("vit_tiny_patch16_224", depth=1)
except RuntimeError:
    pytest.skip(
        f"timm {timm.__version__} does not build models without weights", allow_module_level=True
    )


def prove(model, images, text):
    """In double: outputs, and gradients of all parameters, are the transcription's."""
    model, images, config = model.double(), doubled(images), sk.SkipConfig.parse(text)
    config = dataclasses.replace(config, scorer=config.scorer or families.of(model).scorer(model))
    plain, parameters = transcribed(model, config, config.scorer)
    expected = plain(images)
    wanted = torch.autograd.grad(expected.square().sum(), parameters, allow_unused=True)
    got = sk.patch(model, config)(images)
    grads = torch.autograd.grad(got.square().sum(), list(model.parameters()), allow_unused=True)
    sk.unpatch(model)
    # Steps of 2e-16, some thousand of them; of a norm that is float32 by itself, of 6e-8.
    single = any("Fp32" in type(module).__name__ for module in model.modules())
    step = 1e-6 if single else 1e-9
    close(got, expected, step)
    largest = max(float(want.abs().max()) for want in wanted if want is not None)
    for grad, want in zip(grads, wanted, strict=True):
        assert (grad is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(grad, want, rtol=1e3 * step, atol=step * largest)


def close(got, want, step):
    torch.testing.assert_close(
        got, want, rtol=1e3 * step, atol=step * float(want.detach().abs().max())
    )


def doubled(images):
    if isinstance(images, dict):
        return {name: t.double() if t.is_floating_point() else t for name, t in images.items()}
    return images.double()


# --------------------------------------------------------------------------- every name


def test_every_name_is_patched_and_proved_or_refused_with_the_reason():
    """Exact with nothing dropped, and at 50 % what maps, sorting and loops give."""
    wrong = {}
    for group in proofs():
        model = tiny(group[0].name)
        extra = {inside(b) for b in families.of(model).blocks(model)} - set(group[0].structure)
        assert not extra, (group[0].name, extra, group[0].structure)
        try:
            report = sk.verify(model, "2(50%)+4", images=images_for(model))
            # Without prefix tokens some models' rows lie channel by channel until a gather, and a
            # norm or a mean over them rounds by the layout; else it is the same arithmetic.
            same = report.max_difference == 0
            assert same or not families.of(model).num_prefix_tokens(model)
            prove(model, images_for(model), "2(50%)+4")
        except Exception as error:
            wrong[", ".join(each.name for each in group)] = f"{type(error).__name__}: {error}"
    assert not wrong, wrong
    if timm.__version__ == CURRENT:
        patched = [each for each in entries() if each.refusal is None]
        assert len(patched) == sum(map(len, proofs())) >= 290
        unknown = [each.name for each in entries() if "not known" in (each.refusal or "")]
        assert unknown == []


@pytest.mark.skipif(timm.__version__ != CURRENT, reason=f"the page is of timm {CURRENT}")
def test_the_page_is_up_to_date():
    written = pathlib.Path(__file__).parents[3] / PAGE
    assert written.read_text() == page(), f"run python tests/skipping/families/table.py {PAGE}"


# --------------------------------------------------------------------------- each kind of block


def kinds():
    """By class of block and of attention, the smallest model."""
    found = {}
    for group in proofs():
        for block in group[0].structure[1:]:
            parts = dict(block[0])
            key = group[0].kind.__name__, parts[""], parts.get("attn")
            found.setdefault(key, group[0].name)
    return found


@pytest.fixture(scope="module")
def by_kind():
    return {key: tiny(name) for key, name in kinds().items()}


def test_drops_in_two_layers(by_kind):
    """Of what is left: rows, masks and biases are narrowed twice."""
    for model in by_kind.values():
        prove(copy.deepcopy(model), images_for(model), "1,2(30%,30%)+4")


def test_drops_for_good(by_kind):
    for model in by_kind.values():
        if families.of(model).reads_grid(model) is None:
            prove(copy.deepcopy(model), images_for(model), "2(50%)")
        else:
            with pytest.raises(ValueError, match=r"rejoin_at must be a layer, got None: .* reads"):
                sk.patch(model, "2(50%)")


def test_taps_give_every_position(by_kind):
    """As the unpatched model with nothing dropped; and what would rejoin there with half."""
    tapped = 0
    for key, model in by_kind.items():
        if not hasattr(model, "forward_intermediates"):
            continue
        tapped += 1
        model, images = copy.deepcopy(model), images_for(model)
        options = dict(intermediates_only=True)
        dense = model.forward_intermediates(images, **options)
        same = model.forward_features(images) if hasattr(model, "forward_features") else None
        sk.patch(model, "2(0%)+4")
        for got, want in zip(model.forward_intermediates(images, **options), dense, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, msg=str(key))
        sk.unpatch(model)
        if same is not None and not isinstance(same, dict):
            assert torch.equal(model.forward_features(images), same)
        taps = {}
        for rejoin in ("3", "4"):
            taps[rejoin] = sk.patch(model, f"2(50%)+{rejoin}").forward_intermediates(
                images, **options
            )
            sk.unpatch(model)
        # Behind layer 2 both show what comes back before layer 3.
        assert torch.equal(taps["3"][1], taps["4"][1]) and torch.equal(taps["3"][0], dense[0])
        assert not torch.equal(taps["3"][3], taps["4"][3])
        assert "forward_intermediates" not in {n for m in model.modules() for n in vars(m)}
    assert tapped >= 12


def test_eager_attention(by_kind):
    """TIMM_FUSED_ATTN=0."""
    for model in by_kind.values():
        model = copy.deepcopy(model)
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
        prove(model, images_for(model), "2(50%)+4")


def test_the_pools_latent_says_who_stays():
    pools = [g[0].name for g in proofs() if any("Latent" in str(p) for p in g[0].structure[0])]
    assert pools
    for name in pools:
        prove(tiny(name), images_for(tiny(name)), "2(50%)+4:score=latent")


def test_padding_is_dropped_first():
    """Packed patches of two sizes: padding scores nothing, and neither asks nor answers."""
    names = [g[0].name for g in proofs() if "patch_valid" in forward_of(g[0].kind)]
    assert names
    for name in names:
        model = tiny(name)
        images = packed_for(model)
        dense = model(images)
        sk.patch(model, "2(0%)+4")
        assert torch.equal(model(images), dense), name
        sk.unpatch(model)
        prefix = families.of(model).num_prefix_tokens(model)
        for scorer in ("mean", "norm", "random"):
            sk.patch(model, f"2(50%)+4:score={scorer}")
            with sk.record_skips(model) as records:
                model(images)
            kept = records[0].kept()[1, prefix:].tolist()
            assert kept == images["patch_valid"][1].tolist(), (name, scorer)
            sk.unpatch(model)
        prove(model, images, "2(50%)+4")
        prove(model, images, "2(30%)+4")  # 26 stay of 36, and the second image has 18


def test_a_mask_given_with_the_images_follows_them():
    """Of Eva, whose forward takes one: True where a key is seen, or what is added to its logits."""
    model = tiny("vit_tiny_patch16_dinov3_qkvb")
    images, prefix = images_for(model), model.num_prefix_tokens
    seen = torch.ones(2, 1, 1, prefix + 36, dtype=torch.bool)
    seen[1, ..., prefix + 9 : prefix + 27] = False
    added = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    dense = model(images, attn_mask=seen)
    whole = seen.expand(-1, -1, prefix + 36, -1)
    sk.patch(model, "2(50%)+4")
    outputs = []
    for mask in (seen, added, whole):
        with sk.record_skips(model) as records:
            outputs.append(model(images, attn_mask=mask))
        assert records[0].kept()[1, prefix:].tolist() == seen[1, 0, 0, prefix:].tolist()
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=1e-5, atol=1e-6)
    sk.unpatch(model)
    sk.patch(model, "2(0%)+4")
    torch.testing.assert_close(model(images, attn_mask=seen), dense, rtol=1e-5, atol=1e-6)


def forward_of(kind):
    return kind.forward.__code__.co_varnames


def test_a_cls_only_last_block_where_the_head_reads_cls(by_kind):
    read = 0
    for model in by_kind.values():
        model = copy.deepcopy(model).double()
        images, family = images_for(model).double(), families.of(model)
        if family.has_cls(model) and hasattr(model, "global_pool"):
            model.reset_classifier(7, "token")
            model.head.double()
        try:
            expected = model(images)
            sk.patch(model, ":cls")
        except ValueError as error:
            assert "cls_only_last_block" in str(error)
            continue
        read += 1
        close(model(images), expected, 1e-12)
        sk.unpatch(model)
        expected = sk.patch(model, "1(50%)+3")(images)
        sk.unpatch(model)
        close(sk.patch(model, "1(50%)+3:cls")(images), expected, 1e-12)
    assert read >= 4


def test_a_merged_tokens_key_counts_as_often_as_it_has_patches(by_kind):
    """A key of size 2 is two equal keys: in `attend` and in `call`, of the tokens that are left."""
    for key, model in by_kind.items():
        model = copy.deepcopy(model).double()
        family, given = families.of(model), {}
        block = family.blocks(model)[1]
        of_block = families.of_block(block)

        def keep(_, args, kwargs, given=given, names=of_block.positional):
            given |= dict(x=args[0], **dict(zip(names, args[1:], strict=False)), **kwargs)

        block.register_forward_pre_hook(keep, with_kwargs=True)
        model(images_for(model).double())
        x = given.pop("x")
        index = torch.arange(12).expand(len(x), -1)
        once = of_block.narrow(Context(given), index, family.num_prefix_tokens(model))
        twice = of_block.narrow(
            Context(given), torch.cat([index, index[:, 11:]], 1), family.num_prefix_tokens(model)
        )
        sizes = torch.ones(len(x), 12).index_fill(1, torch.tensor([11]), 2.0)
        once = once._replace(sizes=sizes)
        few, more = x[:, :12], torch.cat([x[:, :12], x[:, 11:12]], 1)
        for does in (of_block.call, lambda *args, f=of_block: f.attend(*args).x):
            close(does(block, few, once), does(block, more, twice)[:, :12], 1e-6)
        assert key


def test_every_kind_of_block_merges(by_kind):
    """Two merges, restored: nothing changes at a ratio of 0, and every patch has an owner."""
    for key, model in by_kind.items():
        model, images = copy.deepcopy(model), images_for(model)
        report = sk.verify(model, "1,2(30%,30%)+4:merge", images=images)
        assert report.max_difference <= report.tolerance, key
        dense, prefix = model(images), families.of(model).num_prefix_tokens(model)
        sk.patch(model, "1,2(30%,30%)+4:merge")
        with sk.record_skips(model) as records:
            got = model(images)
        for drop in (0, 1):
            owner = records[0].owner(drop)
            assert records[0].kept(drop).gather(1, owner).all(), key
            assert (owner[:, prefix:] >= prefix).all(), key
        assert got.isfinite().all() and not torch.equal(got, dense), key
        got.square().sum().backward()


# --------------------------------------------------------------------------- what is refused


def everything_about(model):
    return {name: (type(m), sorted(vars(m)), list(m._modules)) for name, m in model.named_modules()}


def refused(model, text, message):
    before = everything_about(model)
    with pytest.raises(ValueError, match=message):
        sk.patch(model, text)
    assert everything_about(model) == before


def small(name, **options):
    return timm.create_model(name, **dict(depth=4, embed_dim=48, num_heads=4) | options)


def test_a_subclass_with_a_forward_of_its_own_is_refused():
    for overridden in ("forward", "forward_features"):
        model = small("vit_tiny_patch16_224")
        mine = type("Mine", (type(model),), {overridden: lambda self, x: x})
        model.__class__ = mine
        refused(model, "2(50%)+4", f"got Mine, whose Mine overrides {overridden}: wrap runs")
    model.__class__ = type("Mine", (timm.models.VisionTransformer,), {"extra": 1})
    sk.patch(model, "2(50%)+4")


def test_an_unknown_block_or_attention_is_refused():
    model = small("eva02_tiny_patch14_224")
    model.blocks[2].attn = timm.layers.Attention(48, num_heads=4)
    message = "attention of block 1 of the run must be a timm.models.eva.EvaAttention or "
    refused(model, "2(50%)+4", message + r".*AttentionRope, got timm.layers.attention.Attention")
    model.blocks[2] = type("MyBlock", (type(model.blocks[1]),), {})(48, 4)
    refused(model, "2(50%)+4", "block 1 of the run must be one of timm's .*, got .*MyBlock")


def test_hooks_that_would_not_fire_are_refused():
    """A layer that drops calls the parts of its block; all other blocks are called."""
    for name in ("vit_tiny_patch16_224", "eva02_tiny_patch14_224", "beit_base_patch16_224"):
        model = small(name)
        model.blocks[1].attn.register_forward_hook(lambda *_: None)
        where = "layer 2" if "beit" not in name else "block 0 of the run"
        refused(model, "2(50%)+4", f"attn of {where}, a .*ttention, must have no hooks, got 1")
        if "beit" in name:  # the blocks behind a drop are run by their parts too
            refused(model, "1(50%)", "attn of block 1 of the run, a .*, must have no hooks, got 1")
            continue
        model.blocks[2].register_full_backward_hook(lambda *_: None)
        sk.patch(model, "3(50%)+4")  # a block's own hooks do fire: tests/skipping/ways


def test_what_a_model_cannot_do_is_refused():
    eva = small("eva02_tiny_patch14_224")
    refused(eva, "2(50%)+fused", 'method must not be "fuse" on a model with RoPE, got a Eva')
    refused(eva, "2(50%)+4:score=latent", 'scorer must not be "latent" .* got a Eva .*"cls" suits')
    refused(eva, ":cls", 'global_pool="token", got global_pool=')
    sam = timm.create_model("samvit_base_patch16", depth=2, embed_dim=48, num_heads=4)
    refused(
        sam, "1(50%)+2", "got VisionTransformerSAM: it attends in windows of the grid, in which"
    )
    refused(nn.Sequential(eva), "1(50%)+2", "got Sequential: .* before DDP or torch.compile")
    with pytest.raises(ValueError, match='"latent" in a SkipBlock, which has no head'):
        sk.SkipBlock(list(eva.blocks)[:2], 0.5, scorer="latent")
    model = sk.patch(eva.eval(), "2(50%)+4")
    with pytest.raises(ValueError, match=r"blocks must be given .* alone, got also is_causal"):
        model(torch.randn(1, 3, 224, 224), is_causal=True)
