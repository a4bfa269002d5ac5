"""The paper's configurations at other depths, and what a model can have."""

import timm

import skipvit_kernels as sk
from skipvit_kernels.skipping.presets import TABLE_1, scaled, usual


def test_layers_scale_with_the_depth():
    assert scaled("6(55%)+11", 24) == "11(55%)+21"
    assert scaled("4,7(30%,30%)+10:mean,cls", 24) == "7,13(30%,30%)+19:mean,cls"
    assert scaled("6(45%)+fused", 6) == "3(45%)+fused"
    assert scaled("6(55%)+end", 24) == "11(55%)+end"
    for config in TABLE_1:
        assert scaled(config, 12) == config


def test_usual_settings_are_those_that_the_model_can_have():
    model = timm.create_model("deit_tiny_patch16_224", depth=24)
    configs, notes = usual(model)
    assert configs == (
        *(":cls", "11(55%)+21:cls", "7,13(30%,30%)+19:cls", "11(45%)+fused:cls"),
        *("11(55%)+23:merge,cls", "7,9,15(27%,33%,50%)+23:merge,score=marginal,match=keys,cls"),
    ) and not notes  # fmt: skip
    pooled = timm.create_model("deit_tiny_patch16_224", depth=2, global_pool="avg")
    configs, notes = usual(pooled)
    assert configs == ("1(55%)+2", "1(45%)+fused", "1(55%)+2:merge")
    assert "lossless last block is not possible: cls_only_last_block needs a head" in notes[0]
    assert "4,7(30%,30%)+10 is not possible here: " in notes[1]
    assert "4,5,8(27%,33%,50%)+12:merge,score=marginal,match=keys is not" in notes[-1]
    assert not sk.is_patched(model) and not sk.is_patched(pooled)
