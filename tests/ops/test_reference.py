"""The specification against loops that spell out the contract, entry by entry."""

import math

import pytest
import torch

from skipvit_kernels import reference

NAN, INF = math.nan, math.inf


def kept_by_loop(scores: list[float], num_keep: int) -> list[int]:
    """Largest first, NaN above all, equal ones by position; then in ascending position."""

    def rank(position: int) -> tuple[int, float, int]:
        score = scores[position]
        return (0, 0.0, position) if math.isnan(score) else (1, -score, position)

    return sorted(sorted(range(len(scores)), key=rank)[:num_keep])


@pytest.mark.parametrize(
    "scores",
    [
        [0.3, 0.1, 0.2, 0.4],
        [1.0, 1.0, 1.0, 1.0],
        [0.0, -0.0, 0.0, -0.0],
        [0.1, NAN, 0.3, NAN],
        [NAN, NAN, NAN, NAN],
        [INF, -INF, INF, 0.0],
        [-INF, -INF, NAN, INF],
    ],
)
def test_select_keeps_the_largest_lower_position_first(scores):
    for num_keep in range(len(scores) + 1):
        kept, dropped = reference.select(torch.tensor([scores]), num_keep)
        assert kept[0].tolist() == kept_by_loop(scores, num_keep)
        assert sorted(kept[0].tolist() + dropped[0].tolist()) == list(range(len(scores)))


def test_heads_are_averaged_before_the_ranking():
    # Each head alone ranks another patch first.
    scores = torch.tensor([[[0.9, 0.6, 0.0], [0.0, 0.6, 0.9]]])
    _, index = reference.gather_topk(torch.randn(1, 4, 2), scores, 1)
    assert index.tolist() == [[0, 2]]


def test_cls_scores_is_the_cls_row_of_the_attention_map():
    batch, heads, num_tokens, width, prefix = 2, 3, 7, 4, 2
    q, k = torch.randn(batch, heads, width).double(), torch.randn(batch, heads, 7, width).double()
    got = reference.cls_scores(q, k, num_prefix_tokens=prefix)
    for b in range(batch):
        expected = [0.0] * num_tokens
        for h in range(heads):
            logits = [
                sum(float(q[b, h, d] * k[b, h, n, d]) for d in range(width)) / width**0.5
                for n in range(num_tokens)
            ]
            total = sum(math.exp(logit) for logit in logits)
            for n in range(num_tokens):
                expected[n] += math.exp(logits[n]) / total / heads
        assert got[b].tolist() == pytest.approx(expected[prefix:], rel=1e-6)  # float32 output


def test_rows_move_and_move_back():
    x = torch.randn(2, 6, 3)
    scores = torch.tensor([[0.1, 0.5, 0.3, 0.2, 0.4], [0.5, 0.1, 0.2, 0.3, 0.4]])
    tokens, index = reference.gather_topk(x, scores, 2)
    assert index.tolist() == [[0, 2, 5], [0, 1, 5]]
    update = torch.randn(2, 3)
    back = reference.scatter_back(x, tokens * 2, index, update=update)
    for b in range(2):
        for n in range(6):
            expected = 2 * x[b, n] if n in index[b] else x[b, n] + update[b]
            assert torch.equal(back[b, n], expected)


def test_the_fused_row_sums_the_dropped_ones_only():
    x = torch.randn(1, 5, 3)
    x[0, 2] = NAN  # kept: must not reach the fused row, not even times zero
    scores = torch.tensor([[0.1, 0.9, 0.3, 0.2]])
    tokens, index = reference.gather_topk_fuse(x, scores, 2)
    assert index.tolist() == [[0, 2, 3]]
    expected = 0.1 * x[0, 1] + 0.2 * x[0, 4]
    assert torch.allclose(tokens[0, 3], expected, rtol=4 * torch.finfo(torch.float32).eps)
    zeros = torch.zeros(2)
    grad_x, grad_scores = reference.gather_topk_fuse_backward(torch.ones(1, 4, 3), x, scores, index)
    assert torch.equal(grad_x[0, :, 0], torch.tensor([1, 0.1, 1, 1, 0.2]))
    assert torch.allclose(grad_scores[0], torch.stack([x[0, 1].sum(), *zeros, x[0, 4].sum()]))


def test_the_fused_row_is_summed_in_float32():
    x = torch.tensor([[[5.0], [1.0], [-1.0]]], dtype=torch.bfloat16)
    scores = torch.tensor([[0.1, 0.1001]])  # one number in bfloat16
    tokens, _ = reference.gather_topk_fuse(x, scores, 0)
    assert tokens[0, :, 0].tolist() == pytest.approx([5, 0.1 - 0.1001], rel=2**-8)


def owners_by_loop(features, kept):
    """Of one image, places of `kept` by cosine; the first of equal ones."""

    def cosine(a, b):
        norm = math.sqrt(sum(y * y for y in b))
        return sum(x * y for x, y in zip(a, b, strict=True)) / norm

    def owner(row):
        cosines = [cosine(features[row], features[k]) for k in kept]
        return cosines.index(max(cosines))

    return [kept.index(row) if row in kept else owner(row) for row in range(len(features))]


def test_rows_are_owned_by_the_kept_patch_most_like_them():
    features = torch.randn(3, 2, 12, 5, dtype=torch.float64)
    index = torch.tensor([[0, 1, 4, 7, 9], [0, 1, 2, 3, 11], [0, 1, 8, 10, 11]])
    got = reference.match_kept(features, index, num_prefix_tokens=2)
    for b in range(3):
        mean = features[b].mean(0).tolist()
        patches = owners_by_loop(mean, index[b, 2:].tolist())
        want = [row if row < 2 else owner + 2 for row, owner in enumerate(patches)]
        assert got[b].tolist() == want


def test_the_cosine_with_a_patch_of_higher_rank():
    features = torch.randn(2, 2, 9, 5, dtype=torch.float64)
    ranks = torch.tensor([[3.0, 1, 4, 1, 5, 9, 2], [2.0, 7, 1, 8, 2, 8, math.nan]])
    got = reference.match_higher(features, ranks, num_prefix_tokens=2)
    for b in range(2):
        mean = features[b].mean(0)[2:]
        for i in range(7):
            order = [r if r == r else math.inf for r in ranks[b].tolist()]
            cosines = [
                torch.nn.functional.cosine_similarity(mean[i], mean[j], dim=0).item()
                for j in range(7)
                if order[j] > order[i]
            ]
            assert got[b, i].item() == pytest.approx(max(cosines, default=-math.inf), abs=1e-6)


def test_merged_rows_are_means_by_size_and_come_back_with_what_they_gained():
    x = torch.randn(1, 6, 2, dtype=torch.float64)
    owner, sizes = (
        torch.tensor([[0, 2, 1, 2, 2, 1]]),
        torch.tensor([[1.0, 2.0, 1.0, 1.0, 4.0, 3.0]]),
    )
    tokens, merged = reference.merge_rows(x, owner, 3, sizes=sizes)
    assert merged.tolist() == [[1, 4, 7]]
    assert torch.equal(tokens[0, 0], x[0, 0])
    assert torch.allclose(tokens[0, 1], (x[0, 2] + 3 * x[0, 5]) / 4)
    assert torch.allclose(tokens[0, 2], (2 * x[0, 1] + x[0, 3] + 4 * x[0, 4]) / 7)
    gain = torch.randn(1, 3, 2, dtype=torch.float64)
    restored = reference.restore_rows(x, tokens, tokens + gain, owner)
    assert torch.equal(restored[0, 0], (tokens + gain)[0, 0])
    assert torch.allclose(restored[0, 1:], x[0, 1:] + gain[0, owner[0, 1:]])


def test_every_result_is_contiguous():
    """As the fakes promise torch.compile, whatever the strides of the inputs."""

    def strided(*sizes):
        return torch.rand(sizes[::-1]).permute(*reversed(range(len(sizes))))

    x, scores = strided(2, 6, 3), strided(2, 4, 5)
    tokens, index = reference.gather_topk(x, scores, 2)
    owner = torch.tensor([[0, 1, 2], [2, 1, 0]]).repeat(1, 2)
    for result in (
        tokens,
        reference.cls_scores(strided(2, 4, 3), strided(2, 4, 6, 3)),
        reference.gather_rows(x, index),
        reference.gather_rows_backward(strided(2, 3, 3), index, 6),
        *reference.gather_topk_fuse(x, scores, 2),
        *reference.gather_topk_fuse_backward(strided(2, 4, 3), x, scores, index),
        reference.scatter_back(x, strided(2, 3, 3), index),
        *reference.scatter_back_backward(x, index, True),
        reference.match_higher(x, strided(2, 5)),
        reference.match_kept(x, index),
        *reference.merge_rows(x, owner, 3, sizes=strided(2, 6)),
        reference.merge_rows_backward(strided(2, 3, 3), owner, None, strided(2, 3)),
        reference.restore_rows(x, strided(2, 3, 3), strided(2, 3, 3), owner),
        *reference.restore_rows_backward(x, owner, 3),
    ):
        assert result.is_contiguous()
