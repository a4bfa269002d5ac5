"""The notation, the token counts and the arithmetic, against the published and counted numbers."""

import math
from fractions import Fraction

import pytest
import timm
from hypothesis import given
from hypothesis import strategies as st

import skipvit_kernels as sk
from skipvit_kernels.skipping.config import Patches, Tokens, num_kept

# Table 1 of SkipViT: tokens in the MLPs of blocks 1..12, CLS included, and GMACs of ViT-S/16.
TABLE_1 = {
    "6(45%)+11": ([197] * 5 + [109] * 5 + [197] * 2, 3.789),
    "6(50%)+11": ([197] * 5 + [99] * 5 + [197] * 2, 3.701),
    "6(55%)+11": ([197] * 5 + [90] * 5 + [197] * 2, 3.621),
    "4,7(30%,30%)+10": ([197] * 3 + [139] * 3 + [98] * 3 + [197] * 3, 3.734),
    "4,7(30%,30%)+11": ([197] * 3 + [139] * 3 + [98] * 4 + [197] * 2, 3.536),
    "5,8(35%,35%)+10": ([197] * 4 + [129] * 3 + [85] * 2 + [197] * 3, 3.832),
    "5,8(35%,35%)+11": ([197] * 4 + [129] * 3 + [85] * 3 + [197] * 2, 3.610),
    "6(45%)+fused": ([197] * 5 + [110] * 7, 3.450),
}


@pytest.fixture(scope="module")
def vit_small():
    return timm.create_model("vit_small_patch16_224")


@pytest.mark.parametrize("text", TABLE_1)
def test_table_1(vit_small, text):
    mlp, gmacs = TABLE_1[text]
    counts = sk.SkipConfig.parse(text).token_counts(12, 196)
    assert [count.mlp for count in counts] == mlp
    # A block attends to what the block before it left, and to everything from the rejoin on.
    rejoin = sk.SkipConfig.parse(text).rejoin_at
    attention = [197, *mlp[:-1]]
    if rejoin:
        attention[rejoin - 1] = 197
    assert [count.attention for count in counts] == attention
    assert round(sk.macs(vit_small, text) / 1e9, 3) == gmacs


def test_vit_small_costs_what_the_paper_says(vit_small):
    assert round(sk.macs(vit_small) / 1e9, 3) == 4.599
    assert round(sk.ideal_speedup(vit_small, "6(55%)+11"), 3) == 1.270
    shape = sk.ViTShape(depth=12, num_patches=196, embed_dim=384)
    assert round(sk.macs(shape) / 12e6, 1) == 378.4
    assert sk.ideal_speedup(shape, "") == 1


@pytest.mark.parametrize(
    ("model", "depth", "width"),
    [
        ("deit_tiny_patch16_224", 12, 192),
        ("vit_base_patch16_224", 12, 768),
        ("vit_large_patch16_224", 24, 1024),
    ],
)
def test_macs_of_other_models(model, depth, width):
    block = 12 * width**2 * 197 + 2 * 197**2 * width
    outside = 196 * 768 * width + 1000 * width
    assert sk.macs(timm.create_model(model)) == depth * block + outside


def test_a_cls_only_last_block(vit_small):
    """Of a block, by hand: 2 C^2 per key, 2 C^2 for one query and its projection, one MLP row."""
    last = 197 * 2 * 384**2 + 2 * 384**2 + 2 * 197 * 384 + 8 * 384**2
    whole = 197 * 12 * 384**2 + 2 * 197**2 * 384
    assert sk.macs(vit_small) - sk.macs(vit_small, ":cls") == whole - last
    counts = sk.SkipConfig.parse("6(55%)+11:cls").token_counts(12, 196)
    assert (
        counts[-1] == (197, 1)
        and counts[:-1] == (sk.SkipConfig.parse("6(55%)+11").token_counts(12, 196)[:-1])
    )
    assert sk.SkipConfig.parse("6(45%)+fused:cls").token_counts(12, 196)[-1] == (110, 1)


def test_counts_are_exact_where_floats_are_not():
    assert math.ceil((1 - 0.45) * 100) == 56  # the trap
    assert num_kept(100, Fraction("0.45")) == 55
    assert num_kept(196, Fraction("0.55")) == 89


@given(st.integers(0, 5000), st.integers(0, 10000))
def test_num_kept_is_the_ceiling(num_patches, basis_points):
    ratio = Fraction(basis_points, 10000)
    assert num_kept(num_patches, ratio) == math.ceil((1 - ratio) * num_patches)


ratios = st.fractions(0, 1, max_denominator=1000) | st.decimals(0, 1, places=4).map(Fraction)


@st.composite
def configs(draw):
    layers = sorted(draw(st.sets(st.integers(1, 48), max_size=4)))
    if draw(st.booleans()):  # ranges
        layers = sorted(
            {layer + more for layer in layers for more in range(draw(st.integers(1, 5)))}
        )
    amounts = st.sampled_from([draw(ratios), draw(st.integers(0, 40).map(Patches))])
    ramp = draw(st.integers(0, 300))
    if not ramp:
        amounts |= st.integers(0, 196).map(Tokens)
    method = draw(st.sampled_from(["skip", "fuse"])) if layers else "skip"
    rejoin = None
    if layers and method == "skip":
        rejoin = draw(st.none() | st.just("end") | st.integers(layers[-1] + 1, 60))
    return sk.SkipConfig(
        layers,
        [draw(ratios | amounts) for _ in layers],
        rejoin_at=rejoin,
        method=method,
        rejoin_update=draw(st.sampled_from(["none", "mean"])) if rejoin else "none",
        scorer=draw(
            st.sampled_from([None, "cls", "mean"] + ["norm", "random"] * (method != "fuse"))
        ),
        warmup_epochs=draw(st.integers(0, 300)),
        ramp_epochs=ramp,
        ramp_stairs=draw(st.none() | st.integers(1, 9)) if ramp else None,
        cls_only_last_block=draw(st.booleans()) and rejoin != "end",
    )


def test_ranges_and_counts():
    config = sk.SkipConfig.parse("1-3, 7 (13p, 1/3) + end")
    assert config.drop_at == (1, 2, 3, 7) and config.rejoin_at == "end"
    assert config.drop_ratio == (Patches(13), Patches(13), Patches(13), Fraction(1, 3))
    assert (
        str(config) == "1-3,7(13p,1/3)+end" and sk.SkipConfig(4, "13p", 9).drop_ratio[0].count == 13
    )
    mlp = [count.mlp for count in config.token_counts(12, 196)]
    assert mlp == [184, 171, 158, 158, 158, 158, *[1 + 105] * 6]
    assert str(sk.SkipConfig((4, 5), ("13p", "13p"), 9)) == "4,5(13p,13p)+9"
    with pytest.raises(ValueError, match="at most the 31 patches that are there, got 32p"):
        sk.SkipConfig.parse("2,4(5p,32p)").token_counts(12, 36)


@given(configs())
def test_parse_and_str_are_inverse(config):
    assert sk.SkipConfig.parse(str(config)) == config


@pytest.mark.parametrize(
    "text",
    [
        *TABLE_1,
        "6(55%)",
        "6(55%)+11:mean",
        "",
        "6(12.5%)+11",
        "6(1/3)+11",
        "6(55%)+11:warmup=15",
        "6(55%)+11:mean,warmup=15",
        ":cls",
        "6(55%)+11:mean,cls,warmup=15",
        "6(55%)+11:score=random",
        "6(55%)+11:mean,score=norm,cls,warmup=15",
        "6(45%)+fused:score=mean",
        "4,7,10(30%,30%,30%)+fused:warmup=10,ramp=100",
        "4,7,10(139t,98t,69t):warmup=3",
        "4,7,10(30%,13p,30%)+11:ramp=100/4",
    ],
)
def test_the_notation_comes_back_as_written(text):
    assert str(sk.SkipConfig.parse(text)) == text


def test_an_argument_sets_the_warm_up_over_the_notation():
    config = sk.SkipConfig.parse("6(55%)+11:mean,warmup=15", warmup_epochs=3)
    assert str(config) == "6(55%)+11:mean,warmup=3"


def test_a_float_means_the_decimal_that_it_prints_as():
    assert sk.SkipConfig(6, 0.55, 11) == sk.SkipConfig.parse("6(55%)+11")
    assert sk.SkipConfig([4, 7], ["30/100", 0.3], 10) == sk.SkipConfig.parse("4,7(30%,30%)+10")
    assert sk.SkipConfig.parse("6(0.55)+11") == sk.SkipConfig.parse("6(55%)+11")


def test_configs_are_values():
    config = sk.SkipConfig.parse("6(55%)+11")
    assert hash(config) == hash(sk.SkipConfig(6, 0.55, 11))
    with pytest.raises(AttributeError):
        config.rejoin_at = 12


RATIOS = 'ratios must read like "55%", "13p" or "139t", got '
OPTIONS = (
    'options must be "mean", "merge", "cls", "score=random", "match=keys", "warmup=15" or '
    '"ramp=100", got '
)
SCORERS = (
    'scorer must be one of "cls", "mean", "latent", "norm", "similar", "marginal", "random", got '
)
BAD_NOTATIONS = {
    "6(120%)": "ratios must lie between 0% and 100%, got 120% in '6(120%)'",
    "6(-5%)": "ratios must lie between 0% and 100%, got -5% in '6(-5%)'",
    "6(half)": RATIOS + "'half' in '6(half)'",
    "6()": RATIOS + "'' in '6()'",
    "6(1/0)": RATIOS + "'1/0' in '6(1/0)'",
    "6(55%)+4": "rejoin_at must come after the last drop, in layer 6, got 4",
    "6(55%)+6": "rejoin_at must come after the last drop, in layer 6, got 6",
    "6,4(30%,30%)+10": "drop_at must ascend, got (6, 4)",
    "4,4(30%,30%)+10": "drop_at must ascend, got (4, 4)",
    "4,7(30%)+10": "drop_at and drop_ratio must have the same length, got 2 layers and 1 ratios",
    "6(30%,30%)+10": "drop_at and drop_ratio must have the same length, got 1 layers and 2 ratios",
    "0(55%)+11": "layers must be integers counted from 1, got 0",
    "6(55%):mean": 'rejoin_update="mean" needs a rejoin_at, got None',
    "6(55%)+11:median": OPTIONS + "'median' in '6(55%)+11:median'",
    "6(55%)+11:": OPTIONS + "''",
    "6(55%)+11:score=": OPTIONS,
    "6(55%)+11:score=luck": SCORERS + "'luck'",
    "6(55%)+11:warmup=": "options must be",
    "6(55%)+fuzed": "rejoin must be a layer or \"end\" or \"fused\", got 'fuzed' in '6(55%)+fuzed'",
    "6(55%)+fused:score=norm": 'scorer must be "cls" or "mean" or "latent", attention weights',
    "9-4(13p)+12": "a range of layers must ascend, got 9-4 in '9-4(13p)+12'",
    "4-9(13p,13p)+12": "drop_at and drop_ratio must have the same length, got 6 layers and 2",
    "6(1.5p)+11": RATIOS + "'1.5p' in '6(1.5p)+11'",
    "6(55%)+end:cls": 'rejoin_at must be a layer or None with cls_only_last_block, got "end"',
    "6(55%)+11:score=similar": 'drop_ratio must be at most 50% with scorer "similar"',
    "6(55%)+11:match=keys": 'match must be "tokens", the default, where nothing is matched',
    "6(45%)+11:score=similar,match=hue": 'match must be "tokens" or "keys", got \'hue\'',
    "six(55%)": 'config must read like "6(55%)+11"',
    "6 55%": "config must read like",
}


@pytest.mark.parametrize(("text", "message"), BAD_NOTATIONS.items(), ids=BAD_NOTATIONS)
def test_bad_notations_raise_by_name(text, message):
    with pytest.raises(ValueError) as caught:
        sk.SkipConfig.parse(text)
    assert str(caught.value).startswith(message)


def test_bad_fields_raise_by_name():
    with pytest.raises(ValueError, match=r"drop_ratio must be in \[0, 1\].*got 1.2"):
        sk.SkipConfig(6, 1.2, 11)
    with pytest.raises(ValueError, match=r"drop_ratio must be a number in .* got 'lots'"):
        sk.SkipConfig(6, "lots", 11)
    with pytest.raises(ValueError, match='method must be "fuse" or "merge" or "skip", got'):
        sk.SkipConfig(6, 0.5, method="blend")
    with pytest.raises(ValueError, match='rejoin_update must be "none" or "mean", got \'max\''):
        sk.SkipConfig(6, 0.5, 11, rejoin_update="max")
    with pytest.raises(ValueError, match=r'rejoin_at must be None with method "fuse".* got 11'):
        sk.SkipConfig(6, 0.5, 11, method="fuse")
    with pytest.raises(ValueError, match="rejoin_at must be None where nothing drops, got 11"):
        sk.SkipConfig(rejoin_at=11)
    with pytest.raises(ValueError, match="warmup_epochs must be an integer >= 0, got -1"):
        sk.SkipConfig(6, 0.5, 11, warmup_epochs=-1)
    with pytest.raises(ValueError, match="cls_only_last_block must be True or False, got 2"):
        sk.SkipConfig(cls_only_last_block=2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("13(55%)+14", "drop_at must be at most 12, the model's depth, got 13"),
        ("6(55%)+13", "rejoin_at must be at most 12, the model's depth, got 13"),
    ],
)
def test_layers_beyond_the_depth_raise(text, message):
    with pytest.raises(ValueError) as caught:
        sk.SkipConfig.parse(text).token_counts(12, 196)
    assert str(caught.value) == message


def test_13_before_11_raises_at_once():
    with pytest.raises(ValueError, match="rejoin_at must come after the last drop, in layer 13"):
        sk.SkipConfig.parse("13(55%)+11")
