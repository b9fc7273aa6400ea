r"""The unified attention block of SUAN, and the encoder that is a stack of them.

A request's events and one candidate are a sequence, the candidate last. A block lets every position attend to its past
(with a bias for how far back it is in place and in time), then to the tokens of the user's profile, then chooses for
each channel between the two, then transforms each position by itself.

Candidates are rows of their own here: they read the events, and no event reads them, so the events of a request are
encoded once for all its candidates.

Source: Lai, Jin, Zhang, Zheng, Dong, Cheng, Lei, Wang, "SUAN", RecSys 2025, arXiv 2508.15326. What we know of it is
its released code (laiweijiang/SUAN) and others' read-throughs; no equation numbers are known. Where code and paper are
said to differ, there is an option.

Shapes: R requests, N candidates (rows), H heads, L events, U profile tokens, D width of a position of the sequence, d
width of a head, Y layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from recsys.errors import ConfigError
from recsys.ops.causal_attention import (
    Sparsity,
    candidate_attention,
    causal_attention,
    dense_offsets,
    dilated_offsets,
    local_dilated_attention,
    local_offsets,
    split_attention,
    token_attention,
)

NormStyle = Literal["pre", "code"]
AlignmentPooling = Literal["behaviours", "position", "causal"]

NUM_TIME_BUCKETS = 129
BUCKET_LOG_WIDTH = 0.301
MICROSECONDS = 1_000_000
HOURS = 24


class RMSNorm(nn.Module):
    r"""Divides by the root mean square.

    .. math:: f(x) = \gamma \odot \frac{x}{\sqrt{\operatorname{mean}(x^2)} + \epsilon}

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019, equation 4; epsilon outside the
    root as in SUAN's code (``torch.nn.RMSNorm`` has it inside, which differs for nearly zero vectors alone).

    Args:
        width: of a vector.
        eps: added to the root mean square.

    Shape:
        (..., width) -> (..., width).

    Example:
        >>> import torch
        >>> [round(x, 3) for x in RMSNorm(2)(torch.tensor([3.0, 4.0])).tolist()]
        [0.849, 1.131]
    """

    def __init__(self, width: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets gamma to 1."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Normalises over the last dimension."""
        # vector_norm, because the gradient of a root at 0 is not finite, and a vector may be 0.
        root = torch.linalg.vector_norm(x, dim=-1, keepdim=True) * x.shape[-1] ** -0.5
        return x / (root + self.eps) * self.weight  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """What ``print`` shows of the layer."""
        return f"{self.weight.numel()}, eps={self.eps}"


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


def time_buckets(differences: Tensor) -> Tensor:
    r"""Buckets of time differences, each a third wider than the one before.

    .. math:: \operatorname{clip}\!\Big( \Big\lfloor \frac{\ln \max(1, |\Delta t|)}{0.301} \Big\rfloor, 0, 128 \Big)

    with the difference in seconds. Source: SUAN's code, whose own function ends in a bare return; the formula is what
    it was about to return. In double precision, so that a bucket does not depend on the device.

    Args:
        differences: int64 microseconds, any shape and sign.

    Returns:
        int64, of the same shape.

    Example:
        >>> import torch
        >>> time_buckets(torch.tensor([0, 1_000_000, 2_000_000, -3_600_000_000])).tolist()
        [0, 0, 2, 27]
    """
    seconds = (differences.abs().double() / MICROSECONDS).clamp(min=1.0)
    return (torch.log(seconds) / BUCKET_LOG_WIDTH).long().clamp(max=NUM_TIME_BUCKETS - 1)


class RelativeBias(nn.Module):
    r"""A learnt bias of a pair: one for how many places apart it is, one for how far apart in time.

    .. math:: b_{ij} = w^{pos}_{i - j} + w^{time}_{\mathrm{bucket}(t_i - t_j)}

    Source: SUAN's code: one scalar for each offset and bucket, shared by heads and layers, N(0, .02).

    Differs from source: the half of :math:`w^{pos}` for :math:`j > i` is left out, because the mask is causal.

    Args:
        max_offset: largest offset; larger ones are cut to it.
        num_layers: layers with biases of their own; 1 where all share.
        num_heads: heads with biases of their own; 1 where all share.
    """

    def __init__(self, max_offset: int, *, num_layers: int = 1, num_heads: int = 1) -> None:
        super().__init__()
        self.max_offset = max_offset
        self.position = nn.Parameter(torch.empty(max_offset + 1, num_layers, num_heads))
        self.time = nn.Parameter(torch.empty(NUM_TIME_BUCKETS, num_layers, num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws both from N(0, .02) (the source)."""
        nn.init.normal_(self.position, std=0.02)
        nn.init.normal_(self.time, std=0.02)

    def forward(self, offsets: Tensor, differences: Tensor, allowed: Tensor) -> Tensor:
        """Biases of pairs, by layer.

        Args:
            offsets: (R or 1, ...) int64 places between query and key.
            differences: (R, ...) int64 microseconds between them.
            allowed: (R or 1, ...), True = the query may see the key.

        Returns:
            (Y, R, H, ...); ``-inf`` where not allowed.
        """
        of_place = self._looked_up(self.position, offsets.clamp(0, self.max_offset))
        of_time = self._looked_up(self.time, time_buckets(differences))
        return (of_place + of_time).masked_fill(~allowed.unsqueeze(1), -math.inf)

    def own(self) -> Tensor:
        """The bias of a candidate with itself, (Y, H)."""
        return self.position[0] + self.time[0]

    @staticmethod
    def _looked_up(table: Tensor, at: Tensor) -> Tensor:
        """(..., Y, H) of ``at`` (R, ...) as (Y, R, H, ...)."""
        # index_select: its gradient is an index_add, several times faster on a CPU than that of indexing.
        flat = table.index_select(0, at.flatten())
        return flat.view(*at.shape, *table.shape[1:]).movedim((-2, -1), (0, 2))


class CausalPattern(nn.Module):
    """Every event sees every event before it, and itself."""

    def biases(self, relative: RelativeBias, times: Tensor) -> tuple[Tensor, ...]:
        """What :meth:`forward` takes, with a leading dimension of layers.

        Args:
            times: (R, L) int64 microseconds.
        """
        offsets = dense_offsets(times.shape[1], times.device).unsqueeze(0)
        return (relative(offsets, times.unsqueeze(2) - times.unsqueeze(1), offsets >= 0),)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, biases: tuple[Tensor, ...]) -> Tensor:
        """Attends: (R, H, L, d) each -> (R, H, L, d)."""
        return causal_attention(query, key, value, *biases)

    def is_seen(self, offsets: Tensor) -> Tensor:
        """Which events a candidate sees, by how many places before it they are."""
        return offsets > 0


class LocalDilatedPattern(nn.Module):
    r"""Every event sees the last k and every r-th before it: :math:`i - j < k` or :math:`(i - j) \bmod r = 0`.

    In a program that is exported, blocks and classes are those of the longest history, whatever the length at hand.

    Args:
        window: k.
        dilation: r.
        max_length: longest history.
        is_split: half of the heads see the local events and the others the dilated ones, instead of all both.
        is_candidate_sparse: a candidate sees the union too, instead of every event.
    """

    def __init__(
        self,
        window: int,
        dilation: int,
        *,
        max_length: int,
        is_split: bool = False,
        is_candidate_sparse: bool = False,
    ) -> None:
        super().__init__()
        if window < 1 or dilation < 1:
            raise ConfigError(f"window and dilation must be at least 1, got {window} and {dilation}")
        self.window, self.dilation, self.max_length = min(window, max_length), dilation, max_length
        self.is_split, self.is_candidate_sparse = is_split, is_candidate_sparse
        self._attention = split_attention if is_split else local_dilated_attention

    def _sparsity(self, length: int) -> Sparsity:
        return Sparsity(self.window, self.dilation, self.max_length if torch.compiler.is_exporting() else length)

    def biases(self, relative: RelativeBias, times: Tensor) -> tuple[Tensor, ...]:
        """As :meth:`CausalPattern.biases`: of local pairs in blocks, and of dilated ones in classes."""
        sparsity = self._sparsity(times.shape[1])
        offsets, allowed = local_offsets(sparsity, times.device)
        query, key = sparsity.blocks(times), sparsity.blocks_with_previous(times)
        local = relative(offsets.unsqueeze(0), query.unsqueeze(3) - key.unsqueeze(2), allowed.unsqueeze(0))
        # A pair that is local and dilated is counted once, as local.
        at_least = 0 if self.is_split else self.window
        offsets, allowed = dilated_offsets(sparsity, at_least=at_least, device=times.device)
        of_class = sparsity.classes(times)
        differences = of_class.unsqueeze(3) - of_class.unsqueeze(2)
        dilated = relative(offsets.unsqueeze(0), differences, allowed.unsqueeze(0))
        return self._halves(local, dilated) if self.is_split else (local, dilated)

    @staticmethod
    def _halves(local: Tensor, dilated: Tensor) -> tuple[Tensor, Tensor]:
        heads = local.shape[2]
        return (local, dilated) if heads == 1 else (local[:, :, : heads // 2], dilated[:, :, heads // 2 :])

    def forward(self, query: Tensor, key: Tensor, value: Tensor, biases: tuple[Tensor, ...]) -> Tensor:
        """Attends: (R, H, L, d) each -> (R, H, L, d)."""
        local, dilated = biases
        return self._attention(query, key, value, local, dilated, self._sparsity(query.shape[2]))

    def is_seen(self, offsets: Tensor) -> Tensor:
        """Which events a candidate sees, by how many places before it they are."""
        if not self.is_candidate_sparse:
            return offsets > 0
        return (offsets > 0) & ((offsets < self.window) | (offsets % self.dilation == 0))

    def extra_repr(self) -> str:
        """What ``print`` shows of the layer."""
        return f"window={self.window}, dilation={self.dilation}, is_split={self.is_split}"


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


class UnifiedAttentionEncoder(nn.Module):
    r"""A stack of :class:`UnifiedAttentionBlock` over one history and its candidates.

    .. math:: x \leftarrow x + W h + P

    before the first block: :math:`h` is a vector of the hour of the day (UTC), :math:`P` one of the position, counted
    back from the candidate, whose position is 0: a history's length moves nothing.

    Source: SUAN's code, which adds "the time embedding of each position". # RECONSTRUCTION: which time feature that
    is differs by data set; here it is the hour of the day, which needs nothing of the schema.

    Args:
        width: D, of an event and of a candidate; a multiple of ``num_heads``.
        profile_width: width of a token of the profile.
        max_length: longest history.
        num_layers: blocks.
        num_heads: H.
        hidden: width of the SwiGLU.
        pattern: which events an event sees.
        norm_style: see :class:`UnifiedAttentionBlock`.
        alignment_pooling: see :class:`DualAlignment`.
        is_bias_per_head, is_bias_per_layer: whether the relative biases are a head's or a layer's own.

    Raises:
        ConfigError: an argument is outside its domain.
    """

    def __init__(
        self,
        width: int,
        profile_width: int,
        *,
        max_length: int,
        num_layers: int,
        num_heads: int,
        hidden: int,
        pattern: CausalPattern | LocalDilatedPattern,
        norm_style: NormStyle = "pre",
        alignment_pooling: AlignmentPooling = "behaviours",
        is_bias_per_head: bool = False,
        is_bias_per_layer: bool = False,
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ConfigError(f"num_layers must be at least 1, got {num_layers}")
        self.pattern = pattern
        self.max_length = max_length
        self.positions = nn.Parameter(torch.empty(max_length + 1, width))
        self.hours = nn.Parameter(torch.empty(HOURS, profile_width))
        self.of_hour = nn.Linear(profile_width, width)
        self.bias = RelativeBias(
            max_length,
            num_layers=num_layers if is_bias_per_layer else 1,
            num_heads=num_heads if is_bias_per_head else 1,
        )
        self.blocks = nn.ModuleList(
            UnifiedAttentionBlock(
                width,
                profile_width,
                num_heads,
                hidden=hidden,
                pattern=pattern,
                norm_style=norm_style,
                alignment_pooling=alignment_pooling,
            )
            for _ in range(num_layers)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Linear weights: truncated normal of variance 1 / inputs, biases 0; tables N(0, .02) (the source's code)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                variance_scaling_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, (RMSNorm, RelativeBias)):
                module.reset_parameters()
        nn.init.normal_(self.positions, std=0.02)
        nn.init.normal_(self.hours, std=0.02)

    def forward(
        self,
        events: Tensor,
        times: Tensor,
        lengths: Tensor,
        profile: Tensor,
        time: Tensor,
        candidates: Tensor,
        request_of_row: Tensor | None,
    ) -> Tensor:
        """Encodes the candidates.

        Args:
            events: (R, L, D), finite beyond a length too.
            times: (R, L) int64 UTC microseconds.
            lengths: (R,) int64 in [0, L].
            profile: (R, U, profile_width), U at least 1.
            time: (R,) int64 UTC microseconds, of the request.
            candidates: (N, D).
            request_of_row: (N,) int64 in [0, R); None where R = 1: nothing is then gathered to rows.

        Returns:
            (N, D).
        """
        offsets_RL = lengths.unsqueeze(1) - torch.arange(events.shape[1], device=events.device)
        requests = Requests(profile, lengths, offsets_RL > 0, request_of_row)
        events = events + self._of_hours(times) + self._of_positions(offsets_RL)
        candidates = candidates + requests.of_rows(self._of_hours(time)) + self.positions[0]
        biases = self._biases(times, time, offsets_RL)
        for number, block in enumerate(self.blocks):
            layer = _of_layer(biases, number)
            if number + 1 < len(self.blocks):
                events, candidates = block(events, candidates, layer, requests)
            else:
                candidates = block.last(events, candidates, layer, requests)  # type: ignore[operator]
        return candidates

    def _of_hours(self, time: Tensor) -> Tensor:
        hour = time // (3600 * MICROSECONDS) % HOURS
        of_hour = self.of_hour(self.hours)
        return of_hour.index_select(0, hour.flatten()).view(*hour.shape, of_hour.shape[1])  # type: ignore[no-any-return]

    def _of_positions(self, offsets: Tensor) -> Tensor:
        at = offsets.clamp(0, self.max_length)
        return self.positions.index_select(0, at.flatten()).view(*at.shape, self.positions.shape[1])

    def _biases(self, times: Tensor, time: Tensor, offsets: Tensor) -> Biases:
        """Biases of all layers: computed once, whatever their number."""
        events = self.pattern.biases(self.bias, times)
        candidates = self.bias(offsets, time.unsqueeze(1) - times, self.pattern.is_seen(offsets))
        return Biases(events, candidates, self.bias.own())


def _of_layer(biases: Biases, number: int) -> Biases:
    at = min(number, biases.own.shape[0] - 1)  # where layers share, there is one
    return Biases(tuple(b[at] for b in biases.events), biases.candidates[at], biases.own[at])


def variance_scaling_(weight: Tensor) -> Tensor:
    """Truncated normal (two deviations) of variance 1 / inputs: what the source's framework calls variance scaling."""
    truncation = 0.87962566103423978  # deviation of a standard normal cut at two deviations
    deviation = weight.shape[1] ** -0.5 / truncation
    return nn.init.trunc_normal_(weight, std=deviation, a=-2 * deviation, b=2 * deviation)
