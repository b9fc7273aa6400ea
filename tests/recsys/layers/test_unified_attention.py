"""The parts of SUAN's block, each against its formula."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from recsys.errors import ConfigError
from recsys.layers import CausalPattern, LocalDilatedPattern, SwiGLU, UnifiedAttentionEncoder, unified_encoder
from recsys.layers.unified_attention import DualAlignment, Requests, UnifiedAttentionBlock
from tests.references import suan as reference


def requests_of(lengths: list[int], longest: int, rows: list[int]) -> Requests:
    valid = torch.arange(longest) < torch.tensor(lengths).unsqueeze(1)
    return Requests(torch.randn(len(lengths), 2, 3), torch.tensor(lengths), valid, torch.tensor(rows))


def test_swiglu_equals_its_formula() -> None:
    layer = SwiGLU(3, 9).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    weights = {f"f.{name}": t.numpy() for name, t in layer.state_dict().items()}
    np.testing.assert_allclose(
        layer(x).detach(), [reference.swiglu(row, weights, "f") for row in x.numpy()], rtol=1e-12
    )


@pytest.mark.parametrize("pooling", ["behaviours", "position", "causal"])
def test_dual_alignment_chooses_between_its_branches(pooling: str) -> None:
    layer = DualAlignment(8, pooling)  # type: ignore[arg-type]
    requests = requests_of([3, 0], 4, [0, 0, 1])
    x, c = (torch.randn(2, 4, 8), torch.randn(3, 8)), (torch.randn(2, 4, 8), torch.randn(3, 8))
    same = layer((x[0], x[0]), (x[1], x[1]), requests)
    torch.testing.assert_close(same[0], x[0])
    torch.testing.assert_close(same[1], x[1])
    merged = layer((x[0], c[0]), (x[1], c[1]), requests)
    for m, a, b in zip(merged, (x[0], x[1]), (c[0], c[1]), strict=True):
        assert (torch.minimum(a, b) - 1e-6 <= m).all()
        assert (m <= torch.maximum(a, b) + 1e-6).all()
    swapped = DualAlignment(8, pooling)  # type: ignore[arg-type]
    swapped.load_state_dict(
        {
            n: layer.state_dict()[{"first.weight": "second.weight", "second.weight": "first.weight"}.get(n, n)]
            for n in layer.state_dict()
        }
    )
    torch.testing.assert_close(swapped((c[0], x[0]), (c[1], x[1]), requests)[0], merged[0])  # alpha + beta = 1


@pytest.mark.parametrize("pooling", ["behaviours", "position", "causal"])
def test_dual_alignment_equals_its_formula(pooling: str) -> None:
    torch.manual_seed(3)
    layer = DualAlignment(8, pooling).double()  # type: ignore[arg-type]
    lengths, rows = [3, 0], [0, 0, 1]
    requests = requests_of(lengths, 4, rows)
    x, c = ((torch.randn(2, 4, 8).double(), torch.randn(3, 8).double()) for _ in range(2))
    of_events, of_candidates = (t.detach().numpy() for t in layer((x[0], c[0]), (x[1], c[1]), requests))
    weights = {f"a.{name}": tensor.numpy() for name, tensor in layer.state_dict().items()}
    for n, r in enumerate(rows):
        sequences = [[*part[0][r, : lengths[r]].numpy(), part[1][n].numpy()] for part in (x, c)]
        *events, candidate = reference.align(*sequences, weights, "a", pooling)
        np.testing.assert_allclose(of_candidates[n], candidate, rtol=1e-12, atol=1e-14)
        for j, event in enumerate(events):
            np.testing.assert_allclose(of_events[r, j], event, rtol=1e-12, atol=1e-14)


def encoder(pattern: CausalPattern | LocalDilatedPattern, **options: object) -> UnifiedAttentionEncoder:
    torch.manual_seed(0)
    settings: dict[str, object] = {"max_length": 9, "num_layers": 2, "num_heads": 2, "hidden": 12, **options}
    return UnifiedAttentionEncoder(4, 3, pattern=pattern, **settings).double()  # type: ignore[arg-type]


class Inputs(NamedTuple):
    """What an encoder takes, but for the history's lengths: three candidates, of requests 0, 0 and 1."""

    events: Tensor
    times: Tensor
    profile: Tensor
    time: Tensor
    candidates: Tensor


def inputs_of(num_requests: int, longest: int) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    events = torch.randn(num_requests, 9, 4, generator=generator, dtype=torch.float64)[:, :longest].requires_grad_()
    profile = torch.randn(num_requests, 2, 3, generator=generator, dtype=torch.float64)
    candidates = torch.randn(3, 4, generator=generator, dtype=torch.float64).requires_grad_()
    times = torch.randint(0, 10**12, (num_requests, 9), generator=generator)[:, :longest].sort(1).values
    return Inputs(events, times, profile, torch.full((2,), 2 * 10**12), candidates)


def run(layer: UnifiedAttentionEncoder, lengths: list[int], longest: int) -> tuple[Tensor, Inputs]:
    inputs = inputs_of(len(lengths), longest)
    events, times, profile, time, candidates = inputs
    rows = torch.tensor([0, 0, 1])
    return layer(events, times, torch.tensor(lengths), profile, time, candidates, rows), inputs


PATTERNS = {
    "causal": (CausalPattern(), reference.causal),
    "local or dilated": (LocalDilatedPattern(2, 3, max_length=9), reference.local_or_dilated(2, 3)),
    "candidates too": (
        LocalDilatedPattern(2, 3, max_length=9, is_candidate_sparse=True),
        reference.local_or_dilated(2, 3, sparse_candidate=True),
    ),
    "split": (LocalDilatedPattern(2, 3, max_length=9, is_split=True), reference.local_then_dilated(2, 3, 2)),
}


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize(("norm_style", "pooling"), [("pre", "behaviours"), ("code", "causal")])
def test_the_encoder_equals_its_formulas_in_float64(name: str, norm_style: str, pooling: str) -> None:
    """Every block with its two attentions, one candidate at a time."""
    pattern, mask = PATTERNS[name]
    layer = encoder(pattern, norm_style=norm_style, alignment_pooling=pooling, is_bias_per_layer=True)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    lengths = [7, 0]
    out, inputs = run(layer, lengths, 9)
    weights = {key: tensor.numpy() for key, tensor in layer.state_dict().items()}
    for n, r in enumerate([0, 0, 1]):
        expected = reference.encode(
            inputs.events[r, : lengths[r]].detach().numpy(),
            inputs.times[r, : lengths[r]].tolist(),
            inputs.candidates[n].detach().numpy(),
            int(inputs.time[r]),
            list(inputs.profile[r].numpy()),
            weights,
            "",
            mask,
            reference.Options(2, norm_style, pooling),
        )
        np.testing.assert_allclose(out[n].detach(), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("pooling", ["behaviours", "position", "causal"])
@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("kept", [0, 10**9])
def test_groups_of_requests_are_encoded_as_all_at_once(
    name: str, pooling: str, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all lengths, none included; in any order; requests without rows; kept or computed again for the gradient."""
    layer = encoder(PATTERNS[name][0], alignment_pooling=pooling)
    lengths, rows = torch.tensor([3, 0, 9, 1, 8, 0, 5]), torch.tensor([0, 0, 1, 2, 2, 2, 4, 5, 6])
    generator = torch.Generator().manual_seed(5)
    events, profile, candidates = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((7, 9, 4), (7, 2, 3), (9, 4))
    )
    times = torch.randint(0, 10**12, (7, 9), generator=generator).sort(1).values
    weight = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    read = (events, profile, candidates, *layer.parameters())

    def encoded() -> tuple[Tensor, tuple[Tensor, ...]]:
        out = layer(events, times, lengths, profile, torch.full((7,), 2 * 10**12), candidates, rows)
        return out, torch.autograd.grad((out * weight).sum(), read)

    whole, gradients = encoded()
    monkeypatch.setattr(unified_encoder, "_PAIRS_KEPT", kept)
    calls: list[tuple[int, int]] = []
    original = layer._encoded
    monkeypatch.setattr(layer, "_encoded", lambda *a: calls.append(tuple(a[1].shape)) or original(*a))  # type: ignore[func-returns-value]
    for most, number in ((100, 2), (1, 7)):
        calls.clear()
        monkeypatch.setattr(unified_encoder, "_PAIRS_OF_A_GROUP", most)
        again, of_groups = encoded()
        assert len(calls) >= number * (1 if kept else 2), "computed again where not kept"
        assert calls[0][1] == 9, "the longest first"
        assert min(shape[1] for shape in calls) < 9, "padded to its own length"
        torch.testing.assert_close(again, whole)
        for got, expected in zip(of_groups, gradients, strict=True):
            torch.testing.assert_close(got, expected)
        with torch.no_grad():
            calls.clear()
            alone = layer(events, times, lengths, profile, torch.full((7,), 2 * 10**12), candidates, rows)
            torch.testing.assert_close(alone, whole)
            assert len(calls) >= number


@pytest.mark.parametrize("pattern", ["dense", "sparse"])
def test_gradients_stay_within_a_request_and_out_of_padding(pattern: str) -> None:
    layer = encoder(CausalPattern() if pattern == "dense" else LocalDilatedPattern(2, 3, max_length=9))
    out, inputs = run(layer, [6, 2], 9)
    of_events, of_candidates = torch.autograd.grad(out[2].sum(), [inputs.events, inputs.candidates])
    assert (of_events[1, :2] != 0).any(1).all()
    assert (of_events[0] == 0).all()
    assert (of_events[1, 2:] == 0).all()
    assert (of_candidates[:2] == 0).all()
    assert (of_candidates[2] != 0).all()


def test_gradients_of_the_sparse_encoder_are_right() -> None:
    layer = encoder(LocalDilatedPattern(2, 3, max_length=9), num_layers=2)

    def function(events: Tensor, candidates: Tensor) -> Tensor:
        times = torch.tensor([[0, 10**7, 10**8, 10**9, 10**10]])
        return layer(
            events,
            times,
            torch.tensor([4]),
            torch.ones(1, 2, 3).double(),
            times[:, -1],
            candidates,
            torch.zeros(2).long(),
        )

    generator = torch.Generator().manual_seed(2)
    events = torch.randn(1, 5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    candidates = torch.randn(2, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (events, candidates))


def test_layers_and_heads_may_have_biases_of_their_own() -> None:
    shared, own = encoder(CausalPattern()), encoder(CausalPattern(), is_bias_per_head=True, is_bias_per_layer=True)
    assert shared.bias.position.shape == (10, 1, 1)
    assert own.bias.position.shape == (10, 2, 2)
    state = shared.state_dict()
    for name in ("bias.position", "bias.time"):
        state[name] = state[name].expand(-1, 2, 2).clone()
    own.load_state_dict(state)
    torch.testing.assert_close(run(own, [6, 2], 9)[0], run(shared, [6, 2], 9)[0])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: encoder(CausalPattern(), num_heads=3), "width must be a multiple of num_heads, got 4 and 3"),
        (lambda: encoder(CausalPattern(), num_layers=0), "num_layers must be at least 1, got 0"),
        (lambda: LocalDilatedPattern(0, 2, max_length=5), "window and dilation must be at least 1, got 0 and 2"),
    ],
)
def test_broken_arguments_are_named(build: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()  # type: ignore[operator]


def test_a_block_has_the_parameters_of_the_source() -> None:
    """28,800 with a profile as wide as an event, 26,240 with tokens of 8: the sizes of the released configs."""
    count = lambda block: sum(p.numel() for p in block.parameters())  # noqa: E731
    assert count(UnifiedAttentionBlock(40, 40, 2, hidden=120, pattern=CausalPattern())) == 28_800
    assert count(UnifiedAttentionBlock(40, 8, 2, hidden=120, pattern=CausalPattern())) == 26_240
