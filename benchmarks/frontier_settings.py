"""The settings of the frontier, by method."""

from __future__ import annotations

import dataclasses

from frontier_tome import ToMe
from torch import nn

import skipvit_kernels as sk
from skipvit_kernels.skipping import floor

TOME = "ToMe r="
REDUNDANT = "merge,score=similar,match=keys"
MARGINAL = "merge,score=marginal,match=keys"
SETTINGS: dict[str, tuple[str, ...]] = {
    "unpatched": ("",),
    "paper": ("6(45%)+11", "6(55%)+11", "4,7(30%,30%)+10", "6(55%)+12"),
    "mean": ("6(45%)+11:mean", "6(55%)+11:mean", "4,7(30%,30%)+11:mean", "6(55%)+12:mean"),
    "never": ("6(45%)", "6(55%)", "4,7(30%,30%)", "4(55%)"),
    "fused": ("6(45%)+fused", "6(55%)+fused", "4(55%)+fused"),
    "merge in stages": (
        *("6(108p)+12:merge", "4(108p)+12:merge", "4,6(70p,60p)+12:merge"),
        *("4,7,10(40p,40p,40p)+12:merge", "4,6,8(55p,45p,40p)+12:merge"),
        f"4,7,10(40p,40p,40p)+12:{REDUNDANT}",
        f"4,6,8(55p,45p,40p)+12:{REDUNDANT}",
        f"4,7,10(40p,40p,40p)+12:{MARGINAL}",
        *(f"4,6,8({counts})+12:{MARGINAL}" for counts in ("50p,40p,40p", "55p,45p,40p")),
        *(f"4,5,8({counts})+12:{MARGINAL}" for counts in ("50p,50p,40p", "53p,48p,48p")),
        f"4,5,7(52p,46p,40p)+12:{MARGINAL}",
        f"4,5,7,10(53p,48p,32p,16p)+12:{MARGINAL}",
        f"3,5,8(39p,48p,49p)+12:{MARGINAL}",
        f"2,5,8(30p,58p,56p)+12:{MARGINAL}",
        f"2,5,8,9(30p,58p,48p,12p)+12:{MARGINAL}",
        f"2,4,5,8(37p,32p,48p,32p)+12:{MARGINAL}",
        f"2,4,5,8,9(36p,22p,60p,40p,8p)+12:{MARGINAL}",
        *(f"2,5,8({counts})+12:{MARGINAL}" for counts in ("46p,90p,28p", "60p,86p,30p")),
    ),
    "merge in many layers": (
        *(f"4-11({r}p)+12:{REDUNDANT}" for r in (16, 20)),
        *(f"4-11({r}p)+12:{MARGINAL}" for r in (16, 20, 24)),
        *(f"3-11({r}p)+12:{MARGINAL}" for r in (18, 20)),
        *(f"{layers}+12:{MARGINAL}" for layers in ("4-10(27p)", "2-10(21p)")),
        *(f"1-11({r}p)+12:{MARGINAL}" for r in (13, 16)),
        *(f"1-11({r}p)+12:{REDUNDANT}" for r in (8, 13, 16)),
        f"1-9(18p)+12:{REDUNDANT}",
    ),
    "merge, not restored": (
        "6(55%):merge",
        f"4,5,8(53p,48p,48p):{MARGINAL}",
        f"2,4,5,8(37p,32p,48p,32p):{MARGINAL}",
        *(f"{at}-11({r}p):{REDUNDANT}" for at, r in ((4, 16), (1, 13), (1, 16))),
    ),
    "ToMe": tuple(f"{TOME}{r}" for r in (4, 8, 11, 13, 16, 19)),
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One row: how the model runs, and the group that it belongs to.

    Attributes:
        group: of SETTINGS.
        text: the notation, or "ToMe r=8".
        cls_only: with the last block lossless, its CLS row alone.
    """

    group: str
    text: str
    cls_only: bool

    def __str__(self) -> str:
        if not self.cls_only:
            return self.text or "unpatched"
        return f"{self.text},cls" if ":" in self.text else f"{self.text}:cls"

    @property
    def config(self) -> sk.SkipConfig | None:
        """None for ToMe."""
        return None if self.text.startswith(TOME) else sk.SkipConfig.parse(self.text)

    @property
    def restores(self) -> bool:
        """Whether every patch is back before the last block, or never left."""
        config = self.config
        return config is not None and (not config.drop_at or config.rejoin_at is not None)

    @property
    def merges(self) -> bool:
        """Whether it is one of ours that does."""
        return self.config is not None and self.config.method == "merge"

    def build(self, model: nn.Module) -> nn.Module:
        """A model that runs so on the weights of `model`, which is left as it is."""
        if self.text.startswith(TOME):
            return ToMe(model, int(self.text.removeprefix(TOME)), cls_only_last_block=self.cls_only)
        twin = floor.twin(model)
        return sk.patch(twin, str(self)) if self.text or self.cls_only else twin


def all_settings() -> list[Setting]:
    return [
        Setting(group, text, cls_only)
        for group, texts in SETTINGS.items()
        for text in texts
        for cls_only in (False, True)
    ]
