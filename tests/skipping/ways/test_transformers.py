"""docs/transformers.md as it stands, on a small model instead of one from the Hub."""

import re
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import skipvit_kernels as sk

PAGE = Path(__file__).parents[3] / "docs" / "transformers.md"
transformers = pytest.importorskip("transformers", reason="lacks transformers")


@pytest.mark.parametrize("kind", ["TimmWrapperForImageClassification", "TimmWrapperModel"])
def test_the_recipe(kind, tmp_path):
    sizes = dict(img_size=48, patch_size=8, embed_dim=48, depth=12, num_heads=3)
    config = transformers.TimmWrapperConfig(
        architecture="vit_small_patch16_224", num_labels=7, model_args=sizes
    )
    model = getattr(transformers, kind)(config)
    keys = list(model.state_dict())
    first, *blocks = re.findall(r"(?:^    .*\n|^\n(?=    ))+", PAGE.read_text(), re.MULTILINE)
    assert "from_pretrained" in first and len(blocks) == 3
    images, labels = torch.randn(2, 3, 48, 48), torch.tensor([1, 2])
    names = dict(model=model, images=images, labels=labels, folder=tmp_path)
    if kind == "TimmWrapperModel":  # has no loss
        blocks[0] = (
            blocks[0]
            .replace("labels=labels, ", "")
            .replace("output.loss", "output.pooler_output.sum()")
        )
    for block in blocks:
        exec(textwrap.dedent(block), names)

    assert list(model.state_dict()) == keys and sk.is_patched(model)
    assert all(p.grad is not None for p in model.parameters())
    hidden = names["output"].hidden_states
    assert len(hidden) == 12 and {h.shape for h in hidden} == {(2, 48, 6, 6)}
    dense, epochs = model.eval()(images)[0], names["Epochs"]()
    for epoch in (14.0, 15.0):
        epochs.on_epoch_begin(None, SimpleNamespace(epoch=epoch), None, model=model)
        assert torch.equal(model(images)[0], dense) == (epoch < 15)
    other = names["other"].eval()
    sk.set_epoch(other, 15)
    assert torch.equal(other(images)[0], model(images)[0])
