r"""The unified attention block of SUAN.

A request's events and one candidate are a sequence, the candidate last. A block lets every position attend to its past
(to what of it, and with which bias: :mod:`recsys.layers.attention_patterns`), then to the tokens of the user's profile,
then chooses for each channel between the two, then transforms each position by itself.

Candidates are rows of their own here: they read the events, and no event reads them, so the events of a request are
encoded once for all its candidates.

Source: SUAN, Lai et al., RecSys 2025, arXiv 2508.15326. What we know of it is its released code (laiweijiang/SUAN) and
others' read-throughs; no equation numbers are known. Where code and paper are said to differ, there is an option.

Shapes: R requests, N candidates (rows), H heads, L events, U profile tokens, D width of a position of the sequence, d
width of a head, Y layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from recsys.errors import ConfigError
from recsys.layers.attention_patterns import CausalPattern, LocalDilatedPattern
from recsys.layers.normalisation import RMSNorm
from recsys.ops.causal_attention import candidate_attention, token_attention

NormStyle = Literal["pre", "code"]
AlignmentPooling = Literal["behaviours", "position", "causal"]


class SwiGLU(nn.Module):
    r"""A gated feed-forward layer.

    .. math:: f(x) = W_3 \big( \operatorname{SiLU}(W_1 x + b_1) \odot (W_2 x + b_2) \big) + b_3

    Source: Shazeer, "GLU Variants Improve Transformer", 2020, arXiv 2002.05202, equation 6; with biases as in SUAN's
    code.

    Args:
        width: of input and output.
        hidden: width of the gate.

    Shape:
        (..., width) -> (..., width).
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Transforms every position by itself."""
        return self.down(functional.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


class Requests(NamedTuple):
    """What every block of an encoder reads besides the sequence.

    Attributes:
        profile: (R, U, width) tokens of user and context.
        lengths: (R,) int64 events.
        valid: (R, L), True = an event is there.
        request_of_row: (N,) int64; None where R = 1.
    """

    profile: Tensor
    lengths: Tensor
    valid: Tensor
    request_of_row: Tensor | None

    def of_rows(self, x: Tensor) -> Tensor:
        """(R, ...) to rows: (N, ...), or (1, ...) where R = 1."""
        return x if self.request_of_row is None else x.index_select(0, self.request_of_row)


class Biases(NamedTuple):
    """Biases of one layer.

    Attributes:
        events: what the pattern takes.
        candidates: (R, H or 1, L), of a candidate's row.
        own: (H or 1,), of a candidate with itself.
    """

    events: tuple[Tensor, ...]
    candidates: Tensor
    own: Tensor


def _heads(x: Tensor, number: int) -> Tensor:
    """(..., D) -> (..., H, d)."""
    return x.unflatten(-1, (number, -1))  # type: ignore[no-any-return]


class SelfAttention(nn.Module):
    """Multi-head attention to the past: of events by ``pattern``, of candidates to their events and themselves.

    Four projections without bias; scores divided by the root of a head's width.

    Args:
        width: D, a multiple of ``num_heads``.
        num_heads: H.
        pattern: which events an event sees.
    """

    def __init__(self, width: int, num_heads: int, pattern: CausalPattern | LocalDilatedPattern) -> None:
        super().__init__()
        self.num_heads, self.pattern = num_heads, pattern
        self.query, self.key, self.value, self.output = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, events: Tensor, candidates: Tensor, biases: Biases, requests: Requests) -> tuple[Tensor, Tensor]:
        """Attends: events (R, L, D) and candidates (N, D) -> the same shapes."""
        query, key, value = (_heads(p(events), self.num_heads).transpose(1, 2) for p in self._projections())
        attended_RHLd = self.pattern(query, key, value, biases.events)
        query_NHd, own_key, own_value = (_heads(p(candidates), self.num_heads) for p in self._projections())
        attended_NHd = candidate_attention(
            query_NHd, own_key, own_value, key, value, biases.candidates, biases.own, requests.request_of_row
        )
        return self.output(attended_RHLd.transpose(1, 2).flatten(2)), self.output(attended_NHd.flatten(1))

    def _projections(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        return self.query, self.key, self.value


class ProfileAttention(nn.Module):
    """Multi-head attention of every position to the tokens of its request's profile; no mask, no bias.

    Differs from source: scores are divided by the root of a head's width; the code divides by the root of the number of
    tokens, which it corrected for the self-attention alone.

    Args:
        width: D, a multiple of ``num_heads``.
        profile_width: width of a token of the profile.
        num_heads: H.
    """

    def __init__(self, width: int, profile_width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(profile_width, width, bias=False)
        self.value = nn.Linear(profile_width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, events: Tensor, candidates: Tensor, requests: Requests) -> tuple[Tensor, Tensor]:
        """Attends: events (R, L, D) and candidates (N, D) -> the same shapes."""
        key, value = (_heads(p(requests.profile), self.num_heads).transpose(1, 2) for p in (self.key, self.value))
        query_RHLd = _heads(self.query(events), self.num_heads).transpose(1, 2)
        # DIFF(paper): the root of the head's width, not of the number of tokens, because that is what scales a product.
        attended_RHLd = functional.scaled_dot_product_attention(query_RHLd, key, value)
        query_NHd = _heads(self.query(candidates), self.num_heads)
        attended_NHd = token_attention(query_NHd, key, value, requests.request_of_row)
        return self.output(attended_RHLd.transpose(1, 2).flatten(2)), self.output(attended_NHd.flatten(1))


class DualAlignment(nn.Module):
    r"""Chooses, for each channel, between a sequence and what it has read in the profile.

    .. math:: z = \operatorname{ReLU}(s W_0), \qquad
              (\alpha, \beta) = \operatorname{softmax}\big((z W_1, z W_2)\big)\ \text{over the two}, \qquad
              m = \alpha \odot x + \beta \odot c

    where :math:`s` summarises :math:`x + c` by its ``pooling``:

    - ``behaviours``: the mean over the request's events. One choice a request, the same for its candidates.
    - ``position``: a position's own; no pooling.
    - ``causal``: the mean over the position and what was before it.

    Source: SUAN's code (``MS_SeNet``); "dual alignment attention" in the paper. No biases, hidden width D / 4.

    Differs from source: the code's mean is over all positions, the candidate and padding included. Through it every
    event would see the candidate, which could not be scored beside others. Which remedy the authors' LightSUAN takes is
    not known (# RECONSTRUCTION); the three here keep candidates apart.

    Args:
        width: D.
        pooling: see above.
    """

    def __init__(self, width: int, pooling: AlignmentPooling = "behaviours") -> None:
        super().__init__()
        hidden = max(width // 4, 1)
        self.pooling = pooling
        self.squeeze = nn.Linear(width, hidden, bias=False)
        self.first = nn.Linear(hidden, width, bias=False)
        self.second = nn.Linear(hidden, width, bias=False)
        self._pool = {"behaviours": _mean_of_events, "position": _own_position, "causal": _running_mean}[pooling]

    def forward(
        self, events: tuple[Tensor, Tensor], candidates: tuple[Tensor, Tensor], requests: Requests
    ) -> tuple[Tensor, Tensor]:
        """Merges the two branches: of events (R, L, D) each, and of candidates (N, D) each."""
        of_events, of_candidates = self._pool(events[0] + events[1], candidates[0] + candidates[1], requests)
        return self.merge(*events, of_events), self.merge(*candidates, of_candidates)

    def merge(self, x: Tensor, attended: Tensor, summary: Tensor) -> Tensor:
        """``alpha * x + (1 - alpha) * attended``; ``summary`` broadcasts to their shape."""
        z = functional.relu(self.squeeze(summary))
        alpha = torch.sigmoid(self.first(z) - self.second(z))  # a softmax over two
        return attended + alpha * (x - attended)

    def extra_repr(self) -> str:
        """What ``print`` shows of the layer."""
        return f"pooling={self.pooling}"


# DIFF(code): of events only, because an event that saw a candidate could not be scored beside others.
def _mean_of_events(events: Tensor, _: Tensor, requests: Requests) -> tuple[Tensor, Tensor]:
    mean_RD = _sum_of_events(events, requests) / requests.lengths.clamp(min=1).unsqueeze(1)
    return mean_RD.unsqueeze(1), requests.of_rows(mean_RD)


def _own_position(events: Tensor, candidates: Tensor, _: Requests) -> tuple[Tensor, Tensor]:
    return events, candidates


def _running_mean(events: Tensor, candidates: Tensor, requests: Requests) -> tuple[Tensor, Tensor]:
    number_L1 = torch.arange(1, events.shape[1] + 1, device=events.device).unsqueeze(1)
    before_ND = requests.of_rows(_sum_of_events(events, requests))
    return events.cumsum(1) / number_L1, (before_ND + candidates) / requests.of_rows(requests.lengths + 1).unsqueeze(1)


def _sum_of_events(events: Tensor, requests: Requests) -> Tensor:
    return torch.where(requests.valid.unsqueeze(2), events, 0.0).sum(1)


def _keep(x: Tensor, _: Tensor) -> Tensor:
    return x


def _replace(_: Tensor, normalised: Tensor) -> Tensor:
    return normalised


_SKIPS: dict[NormStyle, Callable[[Tensor, Tensor], Tensor]] = {"pre": _keep, "code": _replace}


class UnifiedAttentionBlock(nn.Module):
    r"""Self-attention, profile attention, dual alignment and SwiGLU, each behind an RMSNorm.

    With ``norm_style="pre"``, what is added to is the sequence itself:

    .. math:: x \leftarrow x + \mathrm{SA}(n_1 x), \quad x \leftarrow x + \mathrm{align}(n_2 x, \mathrm{CA}(n_2 x)),
              \quad x \leftarrow x + \mathrm{FFN}(n_3 x)

    with ``code`` it is the normalised sequence, as in the released code: :math:`x \leftarrow n_1 x`, then
    :math:`x \leftarrow x + \mathrm{SA}(x)`, and so on. The paper is said to be pre-norm.

    Args:
        width: D, a multiple of ``num_heads``.
        profile_width: width of a token of the profile.
        num_heads: H.
        hidden: width of the SwiGLU; the source: 3 D.
        pattern: which events an event sees.
        norm_style: see above.
        alignment_pooling: see :class:`DualAlignment`.
    """

    def __init__(
        self,
        width: int,
        profile_width: int,
        num_heads: int,
        *,
        hidden: int,
        pattern: CausalPattern | LocalDilatedPattern,
        norm_style: NormStyle = "pre",
        alignment_pooling: AlignmentPooling = "behaviours",
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise ConfigError(f"width must be a multiple of num_heads, got {width} and {num_heads}")
        self.norms = nn.ModuleList(RMSNorm(width) for _ in range(3))
        self.self_attention = SelfAttention(width, num_heads, pattern)
        self.profile_attention = ProfileAttention(width, profile_width, num_heads)
        self.alignment = DualAlignment(width, alignment_pooling)
        self.feed_forward = SwiGLU(width, hidden)
        self._skip = _SKIPS[norm_style]

    def forward(self, events: Tensor, candidates: Tensor, biases: Biases, requests: Requests) -> tuple[Tensor, Tensor]:
        """One layer: events (R, L, D) and candidates (N, D) -> the same shapes."""
        events, candidates = self._attended(events, candidates, biases, requests)
        return self._transformed(events), self._transformed(candidates)

    def last(self, events: Tensor, candidates: Tensor, biases: Biases, requests: Requests) -> Tensor:
        """The candidates (N, D) alone, where no layer follows to read the events."""
        _, candidates = self._attended(events, candidates, biases, requests)
        return self._transformed(candidates)

    def _attended(
        self, events: Tensor, candidates: Tensor, biases: Biases, requests: Requests
    ) -> tuple[Tensor, Tensor]:
        first, second, _ = self.norms
        normal = first(events), first(candidates)
        read = self.self_attention(*normal, biases, requests)
        events, candidates = self._skip(events, normal[0]) + read[0], self._skip(candidates, normal[1]) + read[1]
        normal = second(events), second(candidates)
        read = self.profile_attention(*normal, requests)
        merged = self.alignment((normal[0], read[0]), (normal[1], read[1]), requests)
        return self._skip(events, normal[0]) + merged[0], self._skip(candidates, normal[1]) + merged[1]

    def _transformed(self, x: Tensor) -> Tensor:
        normal = self.norms[2](x)
        return self._skip(x, normal) + self.feed_forward(normal)  # type: ignore[no-any-return]


def variance_scaling_(weight: Tensor) -> Tensor:
    """Truncated normal (two deviations) of variance 1 / inputs: what the source's framework calls variance scaling."""
    truncation = 0.87962566103423978  # deviation of a standard normal cut at two deviations
    deviation = weight.shape[1] ** -0.5 / truncation
    return nn.init.trunc_normal_(weight, std=deviation, a=-2 * deviation, b=2 * deviation)
