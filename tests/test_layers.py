"""Who imports whom inside the package: arrows point down, never back."""

import ast
from pathlib import Path

import skipvit_kernels

ROOT = Path(skipvit_kernels.__file__).parent

# What a module (or folder) may import of the package, beside itself.
MAY = {
    "reference": (),
    "ops": ("reference",),
    "backends": ("ops", "reference"),
    "skipping.methods": ("ops",),
    "skipping.families": ("ops",),
    "skipping.scorers": ("ops", "skipping.families"),
    "skipping.config": ("skipping.methods",),
    "skipping.cost": ("skipping.config", "skipping.families"),
    "skipping.cls_only": ("skipping.families",),
    "skipping.run": (
        "skipping.config",
        "skipping.families",
        "skipping.methods",
        "skipping.scorers",
    ),
    "skipping.sequence": (
        "skipping.config",
        "skipping.families",
        "skipping.methods",
        "skipping.run",
    ),
    "skipping": ("ops", "skipping"),
    "models": ("ops",),
    "lab": ("", "ops", "backends", "skipping", "models"),
    "cli": ("", "lab", "skipping"),
    "__main__": ("cli",),
    "": ("backends", "ops", "skipping", "lab.advise"),  # the last when it is asked for
}


def imports(path):
    """(imported module, whether when the file is read) of the package's modules."""
    tree = ast.parse(path.read_text())
    typing = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and id(node) not in typing:
            for alias in node.names:
                below = ROOT.joinpath(*node.module.split(".")[1:], alias.name)
                is_module = below.is_dir() or below.with_suffix(".py").exists()
                yield f"{node.module}.{alias.name}" if is_module else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def within(module, place):
    return module == place or module.startswith(f"{place}.") if place else module == ""


def test_arrows_never_point_back():
    back = []
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        module = ".".join(parts).removesuffix("__init__").rstrip(".")
        place = max((place for place in MAY if within(module, place)), key=len)
        for imported in imports(path):
            if imported.partition(".")[0] == "skipvit_kernels":
                name = imported.removeprefix("skipvit_kernels").lstrip(".")
                if not any(within(name, allowed) for allowed in (place, *MAY[place])):
                    back.append(f"{module or '__init__'} -> {name or '__init__'}")
    assert back == []


def test_only_families_and_models_know_timm_and_methods_know_no_model():
    knowing = {
        str(path.relative_to(ROOT))
        for path in ROOT.rglob("*.py")
        if any(name.partition(".")[0] == "timm" for name in imports(path))
        and path.parent.name not in ("families", "models")
    }
    assert knowing == {
        "lab/bench.py",
        "lab/demo.py",
        "lab/show.py",
        "lab/train.py",
        "lab/train_data.py",
        "lab/train_settings.py",
    }
    for path in (ROOT / "skipping").rglob("*.py"):
        if path.parent.name != "families":
            for part in ("norm1", "ls1", "patch_embed", "attn."):
                assert part not in path.read_text(), f"{path.name} names {part}"
