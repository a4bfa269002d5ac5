"""Write docs/families.md: python tests/skipping/families/table.py docs/families.md"""

import collections
import pathlib
import sys

import timm
from structures import entries, proofs

PAGE = "docs/families.md"

HEAD = """# Which models skip

Every ViT-like name of timm {version}: {patched} are patched, {refused} are refused with the reason;
none is patched without a proof. Made by `tests/skipping/families/table.py`; the test beside it
fails where this page is out of date.

What is proved, for each of {structures} structures (classes of model, block, attention, norms and
pool; position, prefix tokens and flags) that these names come down to, on a model of four narrow
blocks of that structure:
- with a drop ratio of 0 the outputs are those of the unpatched model, bit for bit; where there are
  no prefix tokens, up to the rounding of its own norms and means over another memory layout;
- with 50 % dropped, outputs and gradients in float64 are those of a plain transcription with
  attention maps, sorting and loops, which looks RoPE, masks and biases up by place.

## Patched
"Given places": how the blocks know the places of their tokens, beside what the tokens hold.
"Prefix": tokens that never leave. "Reads": how the head pools. "Scorer": who says which patches
stay by default; `mean`, `norm` and `random` work everywhere, `cls` where there is a CLS token,
`latent` where a latent query pools.
"""

NOTES = """
RoPE rows, masks and relative position biases follow the patches; prefix tokens are not rotated.
Scores come from queries and keys as the attention multiplies them: after norms and RoPE, grouped
keys expanded, biases added, padding shut out. Differential attention scores by the difference of
its maps. Limits:
- Where blocks are given places (RoPE, biases, masks) EViT's fused token is refused: it has none.
- Encoders whose head reads the grid, and NaFlex with its `patch_valid`, need a rejoin.
- `ParallelScalingBlock` has nothing between attention and MLP: patches leave behind the block.
- `cls_only_last_block` needs `global_pool="token"` and blocks of ViT, Eva or Beit and relpos.
- `forward` and `forward_features` of a subclass, hooks on an attention whose parts are called, and
  unknown parts of either are refused; `is_causal=True` is refused where patches leave.

## Refused
| class | names | why |
|---|---|---|
"""


def page():
    patched = sum(map(len, proofs()))
    text = HEAD.format(
        version=timm.__version__,
        patched=patched,
        refused=len(entries()) - patched,
        structures=len(proofs()),
    )
    rows = collections.defaultdict(list)
    for each in entries():
        if each.refusal is None:
            rows[each.row].append(each.name)
    text += "\n| model | blocks | given places | prefix | reads | scorer | names |\n"
    text += "|---|---|---|---|---|---|---|\n"
    for row, names in sorted(rows.items()):
        text += f"| {' | '.join(row)} | {len(names)}: {', '.join(sorted(names))} |\n"
    refused = collections.defaultdict(list)
    for each in entries():
        if each.refusal is not None:
            refused[
                each.kind.__name__, each.refusal.partition(f"{each.kind.__name__}: ")[2]
            ].append(each.name)
    text += NOTES
    for (kind, why), names in sorted(refused.items()):
        text += f"| {kind} | {len(names)}: {', '.join(sorted(names))} | {why} |\n"
    return text


if __name__ == "__main__":
    pathlib.Path(sys.argv[1]).write_text(page())
