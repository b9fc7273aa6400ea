"""The contrastive loss agrees with its definition, and never pushes a row from another of its own group."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from recsys.errors import ConfigError
from recsys.losses import Similarity, contrastive_loss
from tests.references import losses as reference

GROUPS = torch.tensor([3, 3, 1, 7, 1, 8])


def drawn(seed: int = 0, rows: int = 6, size: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    anchors, positives = torch.randn(2, rows, size, generator=generator, dtype=torch.float64)
    return anchors, positives


@pytest.mark.parametrize("num_negatives", [None, 1, 3, 50])
@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_it_is_its_definition(similarity: Similarity, num_negatives: int | None) -> None:
    anchors, positives = drawn()
    got = contrastive_loss(
        anchors, positives, GROUPS, similarity=similarity, temperature=0.7, num_negatives=num_negatives
    )
    expected = reference.contrastive(
        anchors.tolist(),
        positives.tolist(),
        GROUPS.tolist(),
        cosine=similarity == "cosine",
        temperature=0.7,
        num_negatives=num_negatives,
    )
    assert got.item() == pytest.approx(math.fsum(expected), rel=1e-12)


def test_positives_that_are_the_anchors_have_an_analytic_value() -> None:
    """Orthogonal unit vectors: ln(1 + l exp(-1 / tau)) each, with l negatives."""
    g = torch.eye(6, dtype=torch.float64) * 5
    for negatives in (1, 3, 5):
        got = contrastive_loss(g, g, torch.arange(6), temperature=0.5, num_negatives=negatives)
        assert got.item() == pytest.approx(6 * math.log(1 + negatives * math.exp(-1 / 0.5)), rel=1e-12)
    # All gates equal: nothing tells the positive from the l negatives.
    same = torch.ones(4, 3, dtype=torch.float64)
    assert contrastive_loss(same, same, torch.arange(4)).item() == pytest.approx(4 * math.log(4), rel=1e-12)


@pytest.mark.parametrize("num_negatives", [None, 2])
def test_rows_of_one_group_never_meet(num_negatives: int | None) -> None:
    anchors, positives = drawn(1)
    for row in range(len(GROUPS)):
        own = anchors.clone().requires_grad_()
        takes_part = torch.zeros(len(GROUPS), dtype=torch.bool)
        takes_part[row] = True
        contrastive_loss(own, positives, GROUPS, takes_part=takes_part, num_negatives=num_negatives).backward()
        assert own.grad is not None
        touched = (own.grad != 0).any(1)
        mates = (GROUPS[row] == GROUPS) & (torch.arange(len(GROUPS)) != row)
        assert touched[row]
        assert not touched[mates].any()
        assert touched.sum().item() == 1 + min((GROUPS[row] != GROUPS).sum().item(), num_negatives or 99)


def test_rows_of_one_group_alone_have_no_loss() -> None:
    anchors, positives = drawn(2)
    anchors.requires_grad_()
    loss = contrastive_loss(anchors, positives, torch.zeros(6, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0
    assert anchors.grad is not None
    assert (anchors.grad == 0).all()


@pytest.mark.parametrize("num_negatives", [None, 3])
def test_counted_rows_are_the_rows_repeated(num_negatives: int | None) -> None:
    anchors, positives = drawn(3)
    counts, takes_part = torch.tensor([1, 3, 2, 1, 1, 4]), torch.tensor([True, True, False, True, True, True])
    again = torch.repeat_interleave(torch.arange(6), counts)
    got = contrastive_loss(
        anchors, positives, GROUPS, counts=counts, takes_part=takes_part, num_negatives=num_negatives
    )
    expected = contrastive_loss(
        anchors[again], positives[again], GROUPS[again], takes_part=takes_part[again], num_negatives=num_negatives
    )
    torch.testing.assert_close(got, expected)


def test_nobody_counted_gives_nothing() -> None:
    anchors, positives = drawn(4)
    counts = torch.tensor([1, 0, 2, 1, 1, 1])
    kept = counts > 0
    got = contrastive_loss(anchors, positives, GROUPS, counts=counts)
    expected = contrastive_loss(anchors[kept], positives[kept], GROUPS[kept], counts=counts[kept])
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_gradients(similarity: Similarity) -> None:
    anchors, positives = drawn(5)
    anchors.requires_grad_()
    positives.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a, p: contrastive_loss(a, p, GROUPS, similarity=similarity, temperature=0.5, num_negatives=2),
        (anchors, positives),
    )


def test_length_does_not_change_the_cosine() -> None:
    anchors, positives = drawn(6)
    once = contrastive_loss(anchors, positives, GROUPS)
    torch.testing.assert_close(contrastive_loss(anchors * 7, positives / 3, GROUPS), once)
    dot = contrastive_loss(anchors, positives, GROUPS, similarity="dot")
    assert (contrastive_loss(anchors * 7, positives, GROUPS, similarity="dot") - dot).abs().item() > 0.1


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e4])
def test_extremes_stay_finite(similarity: Similarity, scale: float) -> None:
    anchors, positives = (x.float() * scale for x in drawn(7))
    anchors.requires_grad_()
    loss = contrastive_loss(anchors, positives, GROUPS, similarity=similarity)
    loss.backward()
    assert torch.isfinite(loss)
    assert anchors.grad is not None
    assert torch.isfinite(anchors.grad).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"num_negatives": 0}, "num_negatives must be at least 1, got 0"),
        ({"similarity": "euclid"}, "similarity must be 'dot' or 'cosine', got 'euclid'"),
    ],
)
def test_a_broken_argument_is_named(changes: dict[str, object], message: str) -> None:
    anchors, positives = drawn()
    with pytest.raises(ConfigError, match=message):
        contrastive_loss(anchors, positives, GROUPS, **changes)  # type: ignore[arg-type]
