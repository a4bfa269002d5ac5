"""skipvit show: what it draws of what was recorded, and what it refuses."""

import matplotlib.image
import pytest
import timm
import torch
from PIL import Image

import skipvit_kernels as sk
from skipvit_kernels import cli
from skipvit_kernels.lab import show


@pytest.fixture
def photos(tmp_path):
    """Four by two squares of one colour each, wider than high; a file that is no picture."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, mode in (("b.png", "RGB"), ("a.jpg", "RGB"), ("grey.png", "L")):
        colours = torch.randint(0, 255, (3 if mode == "RGB" else 1, 6, 9), dtype=torch.uint8)
        large = colours.repeat_interleave(40, 1).repeat_interleave(40, 2)
        picture = large.permute(1, 2, 0).numpy()
        Image.fromarray(picture if mode == "RGB" else picture[..., 0]).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


def weights(path, seed):
    torch.manual_seed(seed)
    torch.save(timm.create_model("deit_tiny_patch16_224").state_dict(), path)
    return path


def test_a_folder_is_drawn_with_a_column_for_each_drop(photos, tmp_path, monkeypatch, capsys):
    drawn = []
    real = show.draw
    monkeypatch.setattr(show, "draw", lambda columns: drawn.extend(columns) or real(columns))
    file, out = weights(tmp_path / "epoch1.pth", 1), tmp_path / "out.png"
    arguments = ["show", str(photos), "--weights", str(file), "--out", str(out), "--scores"]
    assert cli.main([*arguments, "--config", "2,4(30%,30%)+7"]) == 0
    assert f"written to {out}" in capsys.readouterr().out
    height, width, _ = matplotlib.image.imread(out).shape
    assert width == 5 * 400 and height == pytest.approx(3 * 400 + 90, abs=2)
    assert [column.title for column in drawn] == [
        *("", "scores\nlayer 2: keeps 138 of 196", "layer 2: keeps 138 of 196"),
        *("scores\nlayer 4: keeps 97 of 196", "layer 4: keeps 97 of 196"),
    ]
    # Against a forward of our own on the same crops.
    model = timm.create_model("deit_tiny_patch16_224").eval()
    model.load_state_dict(torch.load(file))
    images, shown = show.read_pictures(show.find_pictures([photos]), model)
    assert torch.equal(drawn[0].pictures, shown) and shown.shape == (3, 3, 224, 224)
    with sk.record_skips(sk.patch(model, "2,4(30%,30%)+7")) as records, torch.inference_mode():
        model(images)
    for drop, at in ((0, 2), (1, 4)):
        kept = records[0].kept(drop)[:, 1:].unflatten(1, (14, 14))
        pixels = kept.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, None].expand_as(shown)
        assert torch.equal(drawn[at].pictures[pixels], shown[pixels])
        faded = 0.8 + 0.2 * shown[~pixels]
        torch.testing.assert_close(drawn[at].pictures[~pixels], faded)
        grey = (drawn[at - 1].pictures == 0.85).all(1)[:, ::16, ::16].flatten(1)
        gone = ~records[0].kept(0)[:, 1:] if drop else torch.zeros_like(grey)
        assert torch.equal(grey, gone)


def test_merged_patches_have_the_mean_colour_of_those_they_went_with(photos):
    model = sk.patch(timm.create_model("deit_tiny_patch16_224").eval(), "6(55%)+12:merge")
    images, shown = show.read_pictures(show.find_pictures([photos]), model)
    (record,) = show.record(model, images)
    drawn = show.overlay(shown, record, 0)
    owner = record.owner()[:, 1:]
    for image, picture, owners in zip(shown, drawn, owner, strict=True):
        patches = image.unfold(1, 16, 16).unfold(2, 16, 16).flatten(1, 2).mean((2, 3))
        inner = picture[:, 8::16, 8::16].flatten(1)
        for place in owners.unique():
            mean = patches[:, owners == place].mean(1, keepdim=True)
            together = inner[:, owners == place]
            torch.testing.assert_close(together, mean.expand_as(together))
    assert ((drawn[:, :, :, 1:] - drawn[:, :, :, :-1]).abs().sum() > 0) and drawn.max() <= 1


def test_the_choice_under_several_checkpoints(photos, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(show, "AT_ONCE", 2)
    real = show.draw
    monkeypatch.setattr(show, "draw", lambda columns: drawn.extend(columns) or real(columns))
    files = [weights(tmp_path / f"epoch{seed}.pth", seed) for seed in (1, 2)]
    out = tmp_path / "epochs.pdf"
    epochs = [f"epoch{seed}\nlayer 1: keeps 79 of 196" for seed in (1, 2)]
    show.run([photos], model="deit_tiny_patch16_224", configs=["1(60%)+3"], weights=files, out=out)
    assert [column.title for column in drawn] == ["", *epochs] and out.stat().st_size
    assert not torch.equal(drawn[1].pictures, drawn[2].pictures)


def test_owners_are_told_by_colour_wherever_they_lie_and_the_picture_is_seen_through():
    pictures = torch.rand(1, 3, 8, 8)
    owner = torch.tensor([[5, 2, 2, 5]])
    seen = show.tinted(pictures, owner)
    tint = ((seen - 0.6 * pictures) / 0.4)[0]
    inside = [tint[:, 2, 2], tint[:, 2, 6], tint[:, 6, 2], tint[:, 6, 6]]
    torch.testing.assert_close(inside[0], inside[3])
    torch.testing.assert_close(inside[1], inside[2])
    assert (inside[0] - inside[1]).abs().max() > 0.3
    # A quarter's first row and column border on the other owner: half of the way to white.
    torch.testing.assert_close(
        seen[0, :, 4, 6], 0.5 + (0.6 * pictures[0, :, 4, 6] + 0.4 * inside[3]) / 2
    )


def test_a_model_of_another_shape_is_shown_with_small_pictures_enlarged(
    photos, tmp_path, monkeypatch
):
    shape = {"num_classes": 3, "img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4}
    model = timm.create_model("deit_tiny_patch16_224", **shape)
    torch.save(model.state_dict(), tmp_path / "small.pth")
    drawn, made = [], []
    real, create = show.draw, timm.create_model
    monkeypatch.setattr(show, "draw", lambda columns: drawn.extend(columns) or real(columns))
    arguments = ["show", str(photos), "--config", "2(50%)+3", "--out", str(tmp_path / "out.png")]
    files = ["--weights", str(tmp_path / "small.pth")]
    sizes = ["--model-args", *(f"{name}={value}" for name, value in shape.items())]
    assert cli.main([*arguments, *files, *sizes]) == 0
    assert drawn[1].title == "layer 2: keeps 8 of 16"
    images, shown = show.read_pictures(show.find_pictures([photos]), model, 32)
    assert images.shape == (3, 3, 32, 32)
    assert torch.equal(drawn[0].pictures, shown.repeat_interleave(7, 2).repeat_interleave(7, 3))

    def spied(name, pretrained, **options):
        made.append(pretrained)
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", spied)
    assert cli.main([*arguments, *sizes, "--pretrained"]) == 0 and made == [True]


def test_scores_are_drawn_by_rank():
    picture = torch.zeros(1, 3, 4, 4)
    heat = show.heat_map(picture, torch.tensor([[0.1, float("nan"), 9.0, 0.2]]))
    brightness = heat[0].sum(0)[::2, ::2].flatten()
    assert brightness[0] < brightness[3] < brightness[2] and (heat[0, :, 0, 2] == 0.85).all()


def test_what_cannot_be_shown_is_refused_in_one_line(photos, tmp_path, capsys):
    broken = tmp_path / "broken.png"
    broken.write_bytes((photos / "b.png").read_bytes()[:200])
    huge = tmp_path / "huge.bmp"  # which PIL's decoder refuses by an error that is no OSError
    Image.new("RGB", (4, 4)).save(huge)
    header = huge.read_bytes()
    huge.write_bytes(header[:18] + 2 * (10**6).to_bytes(4, "little") + header[26:])
    other = tmp_path / "other.pth"
    torch.save({"weight": torch.ones(3)}, other)
    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments, said in [
        ([str(tmp_path / "gone.png")], "gone.png, which is not there"),
        ([str(empty)], "pictures must be files or folders of them, got"),
        ([str(broken)], "broken.png cannot be read as a picture"),
        ([str(photos / "notes.txt")], "notes.txt cannot be read as a picture"),
        ([str(huge)], "huge.bmp cannot be read as a picture: Image size (1000000000000 pixels)"),
        ([str(photos), "--weights", "gone.pth"], "gone.pth, which is not there"),
        ([str(photos), "--weights", str(huge)], "huge.bmp cannot be loaded into the model"),
        ([str(photos), "--weights", str(other)], "other.pth cannot be loaded into the model"),
        ([str(photos), "--weights", str(empty)], "empty cannot be loaded into the model"),
        ([str(photos), "--model-args", "depht=2"], "cannot be built with {'depht': 2}"),
        ([str(photos), "--config", ":cls"], "config must drop patches somewhere, got ':cls'"),
        ([str(photos), "--model", "resnet18"], "model must be a timm"),
        ([str(photos), "--out", f"{broken}/out.png"], "out's folder must be"),
        ([str(photos), "--out", str(tmp_path / "out.txt")], "out must end in"),
    ]:
        assert cli.main(["show", *arguments]) == 2, arguments
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("skipvit show: ") and said in line


def test_semantic_tokens_of_stvit_are_drawn_as_regions(photos, tmp_path, monkeypatch):
    drawn = []
    real = show.draw
    monkeypatch.setattr(show, "draw", lambda columns: drawn.extend(columns) or real(columns))
    name = "stvit_deit_tiny_patch16_224"
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    for parameter in model.parameters():  # at the start every token reads all patches alike
        torch.nn.init.normal_(parameter, std=0.1)
    torch.save(model.state_dict(), tmp_path / "stvit.pth")
    arguments = ["--model", name, "--weights", str(tmp_path / "stvit.pth")]
    assert cli.main(["show", str(photos), *arguments, "--out", str(tmp_path / "out.png")]) == 0
    assert [column.title for column in drawn] == ["", "16 semantic tokens"]

    # The attention of the last generating layer, from its own weights.
    images, shown = show.read_pictures(show.find_pictures([photos]), model)
    with torch.inference_mode():
        x = model._pos_embed(model.patch_embed(images))
        for block in model.blocks[:5]:
            x = block(x)
        last = model.blocks[5]
        tokens, keys = last.norm1(x[:, :16] + last.global_centres), last.norm1(x)
        q, k = last.attn.q(tokens), last.attn.kv(keys)[..., :192]
        maps = [
            (a @ b.transpose(1, 2) / 8).softmax(2)
            for a, b in zip(q.split(64, 2), k.split(64, 2), strict=True)
        ]
        owner = sum(maps)[:, :, 16:].argmax(1)
    assert len(owner.unique()) > 4
    assert torch.equal(model.clusters(images), owner)
    torch.testing.assert_close(drawn[1].pictures, show.tinted(shown, owner))
