"""Method merge: into the kept patch most like it, and back with what that one gained."""

import copy

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import skipvit_kernels as sk
from skipvit_kernels.skipping import floor
from skipvit_kernels.skipping.config import num_kept


def vit(**options):
    torch.manual_seed(3)
    model = VisionTransformer(
        **{
            **dict(img_size=48, patch_size=8, embed_dim=48, depth=8, num_heads=3, num_classes=7),
            **options,
        }
    )
    for parameter in model.parameters():
        if parameter.abs().max() < 1e-3:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture
def images():
    torch.manual_seed(5)
    return torch.randn(3, 3, 48, 48)


def merged_plainly(model, images, config):
    """The same on a VisionTransformer, with attention maps and one image at a time."""
    outputs, prefix = [], model.num_prefix_tokens
    for image in images:
        x = model.norm_pre(model._pos_embed(model.patch_embed(image[None])))[0]
        sizes, away = torch.ones(len(x)), []
        for layer, block in enumerate(model.blocks, start=1):
            if layer == config.rejoin_at:
                for full, before, owner, old in reversed(away):
                    x, sizes = full + (x - before)[owner], old
            attn, y = block.attn, block.norm1(x)
            q, k, v = attn.qkv(y).reshape(len(y), 3, attn.num_heads, -1).permute(1, 2, 0, 3)
            q, k = attn.q_norm(q), attn.k_norm(k)
            logits = q @ k.transpose(-2, -1) * attn.scale
            attention = (logits + sizes.log().to(x)).softmax(-1)
            x = x + block.ls1(attn.proj((attention @ v).transpose(0, 1).flatten(1)))
            if layer in config.drop_at:
                alike = x if config.match == "tokens" else k.transpose(0, 1).flatten(1)
                cosine = nn.functional.cosine_similarity(alike[:, None], alike[None], dim=-1)
                if config.scorer == "similar":
                    likest = cosine[prefix:, prefix:][:, 1::2].amax(1)
                    odd = torch.arange(len(likest)) % 2 == 1
                    scores = torch.where(odd, torch.inf, -likest)
                else:
                    query = q[:, 0] if model.cls_token is not None else q.mean(1)
                    row = (query[:, None] @ k.transpose(-2, -1) * attn.scale).softmax(-1)
                    scores = row.mean((0, 1))[prefix:] * sizes[prefix:]
                if config.scorer == "marginal":
                    more = scores[None] > scores[:, None]
                    likest = torch.where(more, cosine[prefix:, prefix:], -torch.inf).amax(1)
                    scores = (scores * sizes[prefix:]).sqrt() * (1 - likest)
                keep = num_kept(len(x) - prefix, config.drop_ratio[config.drop_at.index(layer)])
                best = scores.argsort(descending=True, stable=True)[:keep].sort().values.tolist()
                kept = [*range(prefix), *(prefix + at for at in best)]
                cosine = cosine[:, kept]
                owner = [
                    kept.index(n) if n in kept else prefix + int(cosine[n, prefix:].argmax())
                    for n in range(len(x))
                ]
                groups = [[n for n in range(len(x)) if owner[n] == r] for r in range(len(kept))]
                old, full = sizes, x
                x = torch.stack(
                    [(old[g, None].to(x) * full[g]).sum(0) / old[g].sum() for g in groups]
                )
                sizes = torch.stack([old[g].sum() for g in groups])
                away.append((full, x, torch.tensor(owner), old))
            x = x + block.ls2(block.mlp(block.norm2(x)))
        if config.rejoin_at == "end":
            for full, before, owner, _ in reversed(away):
                x = full + (x - before)[owner]
        if config.rejoin_at is None and model.global_pool == "avg":
            for _, _, owner, _ in reversed(away):
                x = x[owner]
        outputs.append(model.forward_head(model.norm(x[None]))[0])
    return torch.stack(outputs)


AVERAGE = dict(class_token=False, global_pool="avg")


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("3(55%)+7:merge", {}),
        ("3(55%)+7:merge", dict(reg_tokens=2, init_values=0.3, qk_norm=True)),
        ("2,4(30%,30%)+8:merge,cls", {}),
        ("2,4,6(20%,25%,30%)+8:merge,match=keys,cls", {}),
        ("2,4(60%,20%)+8:merge,score=marginal,match=keys,cls", {}),
        ("3(55%):merge,cls", {}),
        ("3(55%):merge", {}),
        ("1-7(4p)+8:merge,score=similar,match=keys,cls", {}),
        ("1-7(4p)+end:merge,score=similar", {}),
        ("2,4(30%,30%)+7:merge", AVERAGE),
        ("2,4(30%,30%):merge", AVERAGE),  # the average weighs by size
        ("2,4(30%,30%)+end:merge,score=similar", AVERAGE),
    ],
    ids=str,
)
def test_merging_is_what_a_plain_transcription_does(images, text, options):
    """In double, outputs and gradients."""
    config = sk.SkipConfig.parse(text)
    assert str(config) == text and config.method == "merge"
    model, images = vit(**options).double(), images.double()
    expected = merged_plainly(model, images, config)
    weights = [p for p in model.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(expected.square().sum(), weights)
    sk.patch(model, text)
    got = model(images)
    # Sizes, and so the bias of the logits, are held in float32.
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)
    grads = torch.autograd.grad(got.square().sum(), weights)
    for grad, want in zip(grads, wanted, strict=True):
        scale = want.abs().max().item()
        torch.testing.assert_close(grad, want, rtol=1e-5, atol=1e-6 * scale + 1e-12)


@pytest.mark.parametrize(
    "text", ["3(55%)+7:merge", "2,4(30%,30%)+8:merge,cls", "1-6(3p)+end:merge,score=similar"]
)
def test_merging_does_all_that_the_other_methods_do(images, text):
    model, config = vit(), sk.SkipConfig.parse(text)
    assert sk.verify(model, text).max_difference < 1e-5
    counts = config.token_counts(8, 36)
    for variant in (floor.sliced(model, text), sk.patch(copy.deepcopy(model), text)):
        assert seen_by_mlps(variant, images) == [count.mlp for count in counts]
    assert sk.ideal_speedup(model, text) > 1
    sk.patch(model, text)
    routed = model(images)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), routed, rtol=1e-5, atol=1e-5)
    model.train().set_grad_checkpointing()
    torch.testing.assert_close(model(images), routed, rtol=1e-5, atol=1e-5)


def seen_by_mlps(model, images):
    seen = []
    for block in model.blocks._modules.values():
        block.norm2.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    model(images)
    return seen


def test_a_drop_of_nothing_is_the_unpatched_model_bit_for_bit(images):
    model = vit()
    expected = model(images)
    sk.patch(model, "2,4(0%,0p)+7:merge")
    assert torch.equal(model(images), expected)


def test_a_merged_token_counts_as_often_as_it_has_patches(images):
    """Behind a merge of equal tokens nothing has changed: softmax sums over what was equal."""
    model = vit(pos_embed="none", drop_path_rate=0.0).double()
    flat = images.double().mean((2, 3), keepdim=True).expand_as(images)
    expected = model(flat)
    sk.patch(model, "3(55%)+7:merge")
    torch.testing.assert_close(model(flat), expected, rtol=1e-6, atol=1e-8)
    sk.unpatch(model)
    sk.patch(model, "3(55%):merge,cls")
    torch.testing.assert_close(model(flat), expected, rtol=1e-6, atol=1e-8)


def test_records_say_which_patch_went_to_which(images):
    model = sk.patch(vit(), "2,4(30%,30%)+7:merge,match=keys")
    keys = {}
    for at in (2, 4):
        model.blocks[at - 1].attn.k_norm.register_forward_hook(
            lambda _, args, out, at=at: keys.__setitem__(at, out.transpose(1, 2).flatten(2))
        )
    with sk.record_skips(model) as records:
        model(images)
    (record,) = records
    everyone = torch.arange(37)
    for drop in (0, 1):
        kept, owner = record.kept(drop), record.owner(drop)
        assert torch.equal(owner[kept], everyone.expand(3, -1)[kept])
        assert kept.gather(1, owner).all() and (owner[:, 1:] > 0).all()
    first, second = record.owner(0), record.owner(1)
    assert torch.equal(second, second.gather(1, first))  # who went with whom, goes on with it
    for b in range(3):
        like = nn.functional.cosine_similarity(keys[2][b][:, None], keys[2][b][None], dim=-1)
        for n in (~record.kept(0)[b]).nonzero()[:, 0].tolist():
            best = like[n].masked_fill(~record.kept(0)[b] | (everyone == 0), -2)
            assert best[first[b, n]] == best.max()
    sk.unpatch(model)
    with sk.record_skips(sk.patch(model, "3(55%)+7")) as records:
        model(images)
    assert (records[0].owner() == -1).sum() == (~records[0].kept()).sum() == 3 * 19


def test_patches_that_must_stay_stay_whole(images):
    model = sk.patch(vit(), "2,4(30%,30%)+7:merge,score=similar")
    mask = torch.zeros(3, 36, dtype=torch.bool)
    mask[:, 20:30:2] = True
    with sk.record_skips(model) as records, sk.keep_patches(model, mask):
        model(images)
    assert records[0].kept()[:, 1:][mask].all()


def test_what_cannot_be_merged_is_refused(images):
    model = sk.patch(vit(), "3(100%)+7:merge")
    with pytest.raises(ValueError, match="index must hold at least one kept patch"):
        model(images)
    model = sk.patch(sk.unpatch(model), "1-3(13p)+7:merge,score=similar")
    with pytest.raises(ValueError, match='"similar" keeps the 11 patches of odd position of 23'):
        model(images)
    with pytest.raises(ValueError, match='rejoin must be a layer or "end" or "fused"'):
        sk.SkipConfig.parse("3(55%)+merge")
    with pytest.raises(ValueError, match=r"rejoin_update must be .none. with method .merge."):
        sk.SkipConfig.parse("3(55%)+7:merge,mean")


@pytest.mark.parametrize("fill", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("text", ["1(50%)+3:merge", "1-3(9p)+4:merge,score=similar"])
def test_any_features_leave_valid_owners(text, fill):
    model = sk.patch(vit(), text)
    tokens = torch.randn(2, 37, 48)
    tokens[0, 3:20] = fill
    with sk.record_skips(model) as records:
        model.blocks(tokens)
    owner = records[0].owner()
    assert records[0].kept().gather(1, owner).all() and (owner[:, 1:] > 0).all()
