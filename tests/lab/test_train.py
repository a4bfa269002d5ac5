"""skipvit train, on folders of tiny pictures and a ViT of four narrow blocks."""

import csv
import errno
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import skipvit_kernels as sk
from skipvit_kernels import cli

pytest.importorskip("accelerate")
pytest.importorskip("tensorboard")

from accelerate.state import AcceleratorState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from skipvit_kernels.lab import train, train_data

ROOT = Path(__file__).parents[2]
MODEL = {"embed_dim": 32, "num_heads": 2, "depth": 4, "patch_size": 8}
BASE = (
    *("--model", "vit_tiny_patch16_224", "--img-size", "32", "--batch-size", "8", "--cpu"),
    *("--workers", "0", "--lr-warmup-epochs", "0", "--threads", "1"),
    *("--model-args", *(f"{name}={value}" for name, value in MODEL.items())),
)
# Everything that draws: what augments, what is mixed, drop path, a scorer by chance; and an
# average, accumulated gradients and a warm-up, whose states a resumption must find again.
RANDOM = (
    *("--skip", "2(50%)+4:score=random", "--epochs", "2", "--warmup-epochs", "1", "--ema", "0.9"),
    *("--accumulate", "2", "--model-args", "drop_path_rate=0.1", "--loss-args", "smoothing=0.1"),
    *("--augment-args", "auto_augment=rand-m9-mstd0.5", "re_prob=0.25"),
    *("--mixup-args", "mixup_alpha=0.8", "cutmix_alpha=1.0"),
)
STEPS = 6  # of an epoch: 48 pictures in batches of 8


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate keeps device and precision for the life of a process: a user has one training."""
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three classes, each with more of one colour: 16 pictures to train and 5 to validate."""
    root = tmp_path_factory.mktemp("data")
    noise = np.random.default_rng(0)
    for split, count in (("train", 16), ("validation", 5)):
        for label in range(3):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for at in range(count):
                pixels = noise.integers(0, 120, (32, 32, 3), dtype=np.uint8)
                pixels[..., label] += 60
                Image.fromarray(pixels).save(folder / f"{at}.png")
    return root


def run(data, out, *arguments):
    return cli.main(["train", str(data), *BASE, "--out", str(out), *arguments])


def log(out):
    """The rows of log.csv without their speed."""
    with (out / "log.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k[:6] != "images"} for row in csv.DictReader(file)]


def last(out):
    return torch.load(out / "last.pth", weights_only=True)


def same(a, b):
    """Whether two checkpoints are of the same training at the same point, bit for bit."""
    a, b = ({k: v for k, v in torch.utils._pytree.tree_leaves_with_path(x)
             if "images_per_second" not in str(k)} for x in (a, b))  # fmt: skip
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a
    )


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A training that nothing interrupted."""
    AcceleratorState._reset_state(True)
    out = tmp_path_factory.mktemp("whole") / "out"
    assert run(data, out, *RANDOM) == 0
    return out


def test_a_training_learns_writes_its_logs_and_loads_unpatched(data, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    skips = ("--skip", "2(50%)+4", "--warmup-epochs", "1", "--finish-dense", "1")
    assert run(data, out, *skips, "--epochs", "4", "--lr", "3e-3", "--cls-only-last-block") == 0
    rows = log(out)
    assert [row["skip"] for row in rows] == ["unskipped", *2 * ["2(50%)+4:cls"], "unskipped"]
    assert [row["steps_skipped"] for row in rows] == ["0", "0.5", "0.66667", "0.5"]
    assert float(rows[-1]["loss"]) < 0.7 * float(rows[0]["loss"])
    assert float(rows[-1]["val_top1"]) > 0.9
    printed = capsys.readouterr().out
    for whole in ("epochs", "images/s", "0-0", "1-2", "3-3", "best: ", "2(50%)+4:cls"):
        assert whole in printed
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    shown = [event.value for event in events.Scalars("loss")]
    assert shown == pytest.approx([float(row["loss"]) for row in rows], rel=1e-4)  # of CSV's digits
    # An unpatched model takes the checkpoints; the best one is as good as the log says.
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3, **MODEL)
    for name in ("last.pth", "best.pth"):
        timm.models.load_checkpoint(model, str(out / name))
    assert not sk.is_patched(model)


def test_stvit_trains_and_cannot_skip_besides(data, tmp_path, capsys):
    shape = ("base_depth=1", "semantic_grid=2")
    stvit = ("--model", "stvit_deit_tiny_patch16_224", "--model-args", *shape)
    assert run(data, tmp_path / "out", *stvit, "--epochs", "4", "--lr", "3e-3") == 0
    rows = log(tmp_path / "out")
    assert {row["skip"] for row in rows} == {"unskipped"}
    assert float(rows[-1]["val_top1"]) > 0.9
    model = timm.create_model(
        "stvit_deit_tiny_patch16_224", img_size=32, num_classes=3, base_depth=1, semantic_grid=2,
        **MODEL,
    )  # fmt: skip
    timm.models.load_checkpoint(model, str(tmp_path / "out" / "best.pth"))
    capsys.readouterr()
    assert run(data, tmp_path / "no", *stvit, "--skip", "1(50%)") != 0
    assert "STViT: its semantic tokens take the place of the patches" in capsys.readouterr().err


def test_the_model_is_patched_as_each_epoch_says(data, tmp_path, monkeypatch):
    seen = []
    forward = train.ClassificationTask.forward

    def counted(task, images, labels):
        with sk.record_skips(task.trainable_module) as records:
            result = forward(task, images, labels)
        seen.append([len(index[0]) - 1 for record in records for index in record.indices])
        return result

    monkeypatch.setattr(train.ClassificationTask, "forward", counted)
    epochs = ("--warmup-epochs", "1", "--ramp-epochs", "8", "--finish-dense", "1", "--epochs", "11")
    # accelerate replaces the model's forward, and patching anew its class: both together too.
    how = ("--batch-size", "48", "--cls-only-last-block", "--mixed-precision", "bf16")
    assert run(data, tmp_path / "out", "--skip", "2(50%)+4", *epochs, *how) == 0
    # Of 16 patches: none, along the cosine in four stairs to the eight that leave, all, none.
    assert seen == [[], [], [], [14], [12], [12], [10], [8], [8], [8], []]
    ramp = train.Settings("", "vit_tiny_patch16_224", tmp_path / "x", "2(8p)", ramp_epochs=4)
    assert [str(ramp.config_of(epoch).at(epoch)) for epoch in range(5)] == [
        *("", "2(2p)", "2(6p)", "2(8p)", "2(8p)"),
    ]


def test_the_share_rises_with_every_step_as_the_configuration_says(data, tmp_path, monkeypatch):
    seen = []
    forward = train.ClassificationTask.forward

    def counted(task, images, labels):
        with sk.record_skips(task.trainable_module) as records:
            result = forward(task, images, labels)
        seen.append(next((16 - len(r.indices[0][0]) + 1 for r in records), 0))
        return result

    monkeypatch.setattr(train.ClassificationTask, "forward", counted)
    skip = ("--skip", "2(50%)+fused:warmup=1,ramp=2", "--epochs", "4")
    assert run(data, tmp_path / "out", *skip) == 0
    # Half of a cosine over two epochs of six steps; the share at each, and the patches that stay.
    shares = [(1 - math.cos(math.pi * step / 12)) / 4 for step in range(12)]
    left = [16 - math.ceil((1 - share) * 16) for share in shares]
    assert seen == [0] * 6 + left + [8] * 6
    rows = log(tmp_path / "out")
    # The last of a cosine's steps, in each of its epochs.
    assert [row["skip"] for row in rows] == [
        *("unskipped", "2(18.5295%)+fused", "2(49.14815%)+fused", "2(50%)+fused"),
    ]
    assert [row["steps_skipped"] for row in rows] == ["0", "0.41667", "0.61111", "0.70833"]


def test_resume_is_bit_for_bit_the_uninterrupted_run(data, whole, tmp_path, monkeypatch, capsys):
    """Ctrl-C in the middle of an epoch; the rest with workers."""
    out = tmp_path / "out"
    read = train.Training._read

    def interrupted(self, found):
        result = read(self, found)
        if self.updates == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return result

    monkeypatch.setattr(train.Training, "_read", interrupted)
    assert run(data, out, *RANDOM, "--checkpoint-steps", "1") == 130
    assert "interrupted" in capsys.readouterr().err
    # At the Ctrl-C behind step 1 the step that runs is the next: two batches each.
    assert last(out)["at"] == [0, 4, 2, 0]
    monkeypatch.undo()
    AcceleratorState._reset_state(True)
    assert run(data, out, *RANDOM, "--resume", "--workers", "2") == 0
    assert log(out) == log(whole) and same(last(out), last(whole))


def test_kill_9_loses_no_more_than_the_steps_since_the_last_checkpoint(data, whole, tmp_path):
    out = tmp_path / "out"
    killed = (
        "import os, sys\n"
        "from skipvit_kernels import cli\n"
        "from skipvit_kernels.lab import train\n"
        "read = train.Training._read\n"
        "def kill(self, found):\n"
        "    if self.updates == 5: os.kill(os.getpid(), 9)\n"
        "    return read(self, found)\n"
        "train.Training._read = kill\n"
        "cli.main(sys.argv[1:])\n"
    )
    arguments = ["train", str(data), *BASE, "--out", str(out), *RANDOM, "--checkpoint-steps", "1"]
    done = subprocess.run([sys.executable, "-c", killed, *arguments], capture_output=True)
    assert done.returncode == -9, done.stderr.decode()
    assert last(out)["at"] == [1, 2, 4, 1]
    assert run(data, out, *RANDOM, "--resume") == 0
    assert log(out) == log(whole) and same(last(out), last(whole))


def test_two_processes_give_the_losses_of_one(data, tmp_path):
    """By SGD, whose updates differ as the gradients do: Adam's divide what is only rounding."""
    alike = ("--skip", "2(50%)+4", "--epochs", "2", "--opt", "sgd", "--lr", "0.1")
    alike += ("--augment-args", "auto_augment=rand-m9-mstd0.5")
    one, two = tmp_path / "one", tmp_path / "two"
    assert run(data, one, *alike) == 0
    launch = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    arguments = ("-m", "skipvit_kernels", "train", str(data), *BASE, "--out", str(two), *alike)
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([*launch, *arguments], capture_output=True, env=os.environ | paths)
    assert done.returncode == 0, done.stderr.decode()
    assert "2 x cpu" in done.stdout.decode()
    # float32 rounds to 6e-8; each of 12 steps adds up gradients in another order.
    for a, b in zip(last(one)["rows"], last(two)["rows"], strict=True):
        for name in ("loss", "top1", "val_loss", "val_top1"):
            assert b[name] == pytest.approx(a[name], rel=1e-5), name


def test_fine_tuning_begins_from_the_weights_and_learns_from_the_unpatched_model(
    data, whole, tmp_path, monkeypatch
):
    teachers = []
    make = train.LogitDistillationTask

    def spied(model, teacher, **options):
        teachers.append(teacher)
        return make(model, teacher, **options)

    monkeypatch.setattr(train, "LogitDistillationTask", spied)
    begun = whole / "best.pth"
    weights = torch.load(begun, weights_only=True)["state_dict"]
    options = ("--epochs", "1", "--lr", "0.01", "--fine-tune", str(begun), "--skip", "2(50%)+4")
    assert run(data, tmp_path / "a", *options, "--teacher", "self") == 0
    (teacher,) = teachers
    assert not sk.is_patched(teacher)
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, weights[name]) and not value.requires_grad, name
    # Data of other classes: everything but the head.
    two = tmp_path / "two"
    shutil.copytree(data, two, ignore=shutil.ignore_patterns("class2"))
    AcceleratorState._reset_state(True)
    assert run(two, tmp_path / "b", *options, "--lr", "0") == 0
    tuned = last(tmp_path / "b")["state_dict"]
    assert tuned.pop("head.weight").shape == (2, 32) and tuned.pop("head.bias").shape == (2,)
    assert all(torch.equal(value, weights[name]) for name, value in tuned.items())


def test_shards_and_tar_files_are_read(data, tmp_path):
    for split in ("train", "validation"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
            tar.add(data / split, arcname=".")
    out, val = tmp_path / "out", ("--val-data", str(tmp_path / "validation.tar"))
    assert run(tmp_path / "train.tar", out, *val, "--epochs", "1") == 0
    assert run(data, tmp_path / "folder", "--epochs", "1") == 0
    assert log(out)[0].keys() == log(tmp_path / "folder")[0].keys()

    pytest.importorskip("webdataset")
    with tarfile.open(tmp_path / "shard-0.tar", "w") as tar:
        for at, path in enumerate(sorted((data / "train").rglob("*.png"))):
            label = tmp_path / "label"
            label.write_text(path.parent.name[-1])
            tar.add(path, arcname=f"{at:04}.png")
            tar.add(label, arcname=f"{at:04}.cls")
    shards = ("--dataset", "wds/", "--train-split", "shard-0.tar|48", "--val-split", "")
    AcceleratorState._reset_state(True)
    assert run(tmp_path, tmp_path / "wds", *shards, "--num-classes", "3", "--epochs", "2") == 0
    assert [row["epoch"] for row in log(tmp_path / "wds")] == ["0", "1"]


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_bad_picture_is_named_and_left_out_or_the_end(data, workers, tmp_path, capfd):
    bad = tmp_path / "bad"
    shutil.copytree(data, bad)
    (bad / "train" / "class0" / "3.png").write_bytes(b"")
    cut = bad / "train" / "class1" / "2.png"
    cut.write_bytes(cut.read_bytes()[:900])
    arguments = ("--epochs", "1", "--workers", workers)
    assert run(bad, tmp_path / "out", *arguments) == 0
    said = capfd.readouterr().err
    for name in ("class0/3.png", "class1/2.png"):
        assert f"skipped: {name} cannot be read as a picture" in said
    assert run(bad, tmp_path / "stopped", *arguments, "--stop-on-bad") == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert re.match(r"skipvit train: class\d/\d.png cannot be read as a picture: ", line)


def test_a_loss_that_is_no_number_stops_with_step_and_checkpoint(
    data, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    diverge = ("--opt", "sgd", "--epochs", "2", "--sched", "none")
    assert run(data, out, *diverge, "--lr", "1e9") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(r"the loss is (nan|inf) at step \d, epoch 0; none was saved", line)
    # Weights that only the next loss would have told of do not overwrite a checkpoint.
    read = train.Training._read

    def spoilt(self, found):
        if self.updates == 4:
            with torch.no_grad():
                self.unwrapped.cls_token.fill_(torch.nan)
        return read(self, found)

    monkeypatch.setattr(train.Training, "_read", spoilt)
    assert run(data, out, *diverge, "--lr", "0", "--checkpoint-steps", "2") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"not finite after step 4, epoch 0; the last good checkpoint is {out}/last.pth" in line
    assert last(out)["at"] == [0, 2, 2, 0]


def refused(arguments, said, capsys):
    assert cli.main(["train", *map(str, arguments)]) == 2, arguments
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("skipvit train: ") and said in line, line


def test_what_cannot_be_trained_is_refused_in_one_line(data, whole, tmp_path, capsys):
    out = ("--out", tmp_path / "out", "--epochs", "1")
    empty, flat, other, half = (tmp_path / name for name in ("empty", "flat", "other", "half"))
    empty.mkdir()
    for split in ("train", "validation"):
        shutil.copytree(data / split / "class0", flat / split)
    shutil.copytree(data, other)
    (other / "validation" / "class2").rename(other / "validation" / "class7")
    shutil.copytree(data / "train", half / "train")
    for root, said in [
        (tmp_path / "gone", "data must be a folder or a tar file"),
        (empty, "cannot be opened: 'Found 0 images"),
        (flat, "data must hold a folder of pictures for each of two classes or more, got 1"),
        (other, "must have the same classes, but not so: class2, class7"),
        (half, "data must hold the split 'validation' too"),
    ]:
        refused([root, *BASE, *out], said, capsys)
    for arguments, said in [
        (["--num-classes", "5"], "num_classes must be that of the data, 3, got 5"),
        (["--batch-size", "100"], "batch_size must be at most the training pictures, 48"),
        (["--model", "vit_tiny"], "model must be a timm model's name, got 'vit_tiny'"),
        (["--model", "resnet18"], "model_args: "),
        (["--skip", "9(50%)"], "drop_at must be at most 4"),
        (["--skip", "2(50%)", "--warmup-epochs", "2"], "must be at most the 1 epochs together"),
        (["--model-args", "depht=3"], "model, model_args: "),
        (["--loss-args", "smooting=0.1"], "loss_args: "),
        (["--mixup-args", "alpha=1"], "mixup_args: "),
        (["--batch-size", "3", "--mixup-args", "mixup_alpha=1"], "batch_size must be even"),
        (["--dataset", "torch/mnist"], 'dataset must be "", '),
        (["--out", __file__], "out must be a folder that can be written"),
        (["--out", whole], "last.pth is there: resume that, or take another out"),
        (["--out", whole, "--resume"], "last.pth is of a training with "),
        (["--teacher", "self"], "teacher self needs weights to begin from"),
        (["--train-split", "nope"], "data must hold the split 'nope' too"),
        (["--train-split", "nope", "--val-split", ""], "data must hold the split 'nope' too"),
        (["--ema", "1"], "ema must be a decay in [0, 1), got 1.0"),
        (["--clip-grad", "0"], "clip_grad must be above 0, got 0.0"),
        (["--fine-tune", "gone.pth"], "fine_tune must be a checkpoint, got gone.pth, which is not"),
        (["--fine-tune", data], "cannot be loaded into the model"),
        (["--fine-tune", data / "train" / "class0" / "0.png"], "0.png cannot be loaded into"),
        (["--fine-tune", whole / "best.pth", "--model-args", "qk_norm=True"],
         'Missing key(s) in state_dict: "blocks.0.attn.q_norm.weight", '),
    ]:  # fmt: skip
        AcceleratorState._reset_state(True)
        refused([data, *BASE, *out, *arguments], said, capsys)
    assert not (tmp_path / "out" / "last.pth").exists()


def test_labels_beyond_the_classes_are_named(data):
    pictures = train_data.open_split(str(data), "", "train", training=True, batch_size=8, seed=0)
    few = train_data.Pictures(pictures, 0, 2, stop=False)
    few.transform = lambda picture: picture
    assert few[0][1] == 0
    with pytest.raises(ValueError, match=r"labels must be in \[0, 2\), got 2 of class2/"):
        few[47]


def full(mount, data, capsys):
    """Train until the disk is full; the checkpoint before it is whole."""
    out = mount / "out"
    assert run(data, out, "--epochs", "3") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "last.pth cannot be written" in line and "MiB are free on its disk" in line
    assert line.endswith("the one before is intact")
    assert last(out)["at"] == [1, 0, STEPS, 0]
    assert not [path for path in out.iterdir() if "unfinished" in path.name]


def test_a_full_disk_leaves_the_checkpoint_before(data, tmp_path, capsys):
    mount = tmp_path / "small"
    mount.mkdir()
    # 240 KiB of weights, thrice for the optimizer, and the best ones: one such set, not two.
    command = ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(mount)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if mounted.returncode:
        pytest.skip(f"mounting a tmpfs is not allowed: {mounted.stderr.strip()}")
    try:
        full(mount, data, capsys)
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_a_write_that_fails_leaves_the_file_before(tmp_path, monkeypatch):
    file = tmp_path / "last.pth"
    train.write(file, lambda path: path.write_text("first"))

    def failing(path):
        path.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ValueError, match=r"last.pth cannot be written.*No space.*intact"):
        train.write(file, failing)
    assert file.read_text() == "first" and list(tmp_path.iterdir()) == [file]


def page_code(headline):
    """What docs/training.md shows under a headline, for this file's model."""
    text = (ROOT / "docs" / "training.md").read_text()
    code = re.search(rf"## {headline}\n.*?```\w+\n(.*?)```", text, re.S)[1]
    for page, here in [
        ('"vit_small_patch16_224"', '"vit_tiny_patch16_224", num_classes=3, img_size=32, **MODEL'),
        ("6(55%)+11", "2(50%)+4"), ("warmup_epochs=15", "warmup_epochs=1"), ("(100)", "(2)"),
    ]:  # fmt: skip
        code = code.replace(page, here)
    return code


def test_the_loop_of_the_page_skips_after_the_warmup():
    names = {"timm": timm, "torch": torch, "F": torch.nn.functional, "MODEL": MODEL}
    kept = []

    class Loader:
        def __iter__(self):
            with sk.record_skips(names["model"]) as records:
                yield torch.randn(4, 3, 32, 32), torch.randint(3, (4,))
            kept.append([record.indices[0].shape[1] - 1 for record in records])

    names["loader"] = Loader()
    exec(page_code("In your own loop"), names)
    assert kept == [[], [8]]


def test_timms_train_script_takes_the_lines_of_the_page(data, tmp_path):
    """The script is in timm's repository, not in its package."""
    script = os.environ.get("SKIPVIT_TIMM_TRAIN")
    if not script:
        pytest.skip("SKIPVIT_TIMM_TRAIN names no copy of timm's train.py")
    text = Path(script).read_text()
    lines = page_code("In timm's train script").splitlines()
    for added, before in zip(lines[::2], lines[1::2], strict=True):
        assert added[0] == "+" and text.count(f"\n{before[1:]}\n") == 1, before
        text = text.replace(f"\n{before[1:]}\n", f"\n{added[1:]}\n{before[1:]}\n")
    # What it shows: the number of records of a forward in each epoch.
    shown = "print('drops', [b.dropping for b in model.modules() if hasattr(b, 'dropping')])"
    at = "            sk.set_epoch(model, epoch)\n"
    (tmp_path / "train.py").write_text(text.replace(at, f"{at}            {shown}\n"))
    arguments = (
        *(str(data), "--model", "vit_tiny_patch16_224", "--img-size", "32", "--num-classes", "3"),
        *("--model-kwargs", "img_size=32", *(f"{name}={value}" for name, value in MODEL.items())),
        *("--device", "cpu", "--epochs", "2", "-b", "8", "-j", "0", "--warmup-epochs", "0"),
        *("--opt", "adamw", "--lr", "1e-3", "--output", str(tmp_path / "out")),
    )
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, str(tmp_path / "train.py"), *arguments], text=True,
                          capture_output=True, env=os.environ | paths)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.findall("drops .*", done.stdout) == ["drops [False]", "drops [True]"]
