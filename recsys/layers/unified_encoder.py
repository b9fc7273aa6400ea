r"""The encoder of SUAN: a stack of unified attention blocks, long histories a few requests at a time.

Source: see :mod:`recsys.layers.unified_attention`.

Shapes: R requests, N candidates (rows), L events, U profile tokens, D width of a position of the sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from recsys.errors import ConfigError
from recsys.layers.attention_patterns import MICROSECONDS, CausalPattern, LocalDilatedPattern, RelativeBias
from recsys.layers.normalisation import RMSNorm
from recsys.layers.unified_attention import (
    AlignmentPooling,
    Biases,
    NormStyle,
    Requests,
    UnifiedAttentionBlock,
    variance_scaling_,
)

HOURS = 24

_PAIRS_OF_A_GROUP = 1 << 18
"""Pairs of events of the requests that are encoded together."""
_PAIRS_KEPT = 1 << 25
"""Pairs of events whose scores and weights are kept for the backward pass: some 30 bytes a pair and layer."""


class UnifiedAttentionEncoder(nn.Module):
    r"""A stack of :class:`~recsys.layers.unified_attention.UnifiedAttentionBlock` over one history and its candidates.

    .. math:: x \leftarrow x + W h + P

    before the first block: :math:`h` is a vector of the hour of the day (UTC), :math:`P` one of the position, counted
    back from the candidate, whose position is 0: a history's length moves nothing.

    Requests of many pairs of events go through it in groups of about one length, which are padded to that length only.
    Where all their pairs together are too many to be kept for the backward pass, it computes each group again.

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
        norm_style: see :class:`~recsys.layers.unified_attention.UnifiedAttentionBlock`.
        alignment_pooling: see :class:`~recsys.layers.unified_attention.DualAlignment`.
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
        if (
            request_of_row is None
            or torch.compiler.is_compiling()
            or times.shape[0] * self.pattern.num_pairs(times.shape[1]) <= _PAIRS_OF_A_GROUP
        ):
            return self._encoded(events, times, lengths, profile, time, candidates, request_of_row)
        groups = _groups(lengths, request_of_row, self.pattern.num_pairs)
        is_kept = not torch.is_grad_enabled() or sum(group.num_pairs for group in groups) <= _PAIRS_KEPT
        encoded = []
        for of_rows, requests, rows, length, _ in groups:
            inputs = (
                events[:, :length].index_select(0, requests),
                times[:, :length].index_select(0, requests),
                *(x.index_select(0, requests) for x in (lengths, profile, time)),
                candidates.index_select(0, rows),
                of_rows,
            )
            encoded.append(
                self._encoded(*inputs)
                if is_kept
                else checkpoint(self._encoded, *inputs, use_reentrant=False, preserve_rng_state=False)
            )
        return torch.cat(encoded).index_select(0, torch.cat([group.rows for group in groups]).argsort())

    def _encoded(
        self,
        events: Tensor,
        times: Tensor,
        lengths: Tensor,
        profile: Tensor,
        time: Tensor,
        candidates: Tensor,
        request_of_row: Tensor | None,
    ) -> Tensor:
        """All requests at a time."""
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


class _Group(NamedTuple):
    """Requests that are encoded together.

    Attributes:
        request_of_row: (n,) int64, the position of each row's request in ``requests``, non-decreasing.
        requests: (r,) int64, positions.
        rows: (n,) int64, theirs.
        length: of the longest history, at least 1.
        num_pairs: that attention computes.
    """

    request_of_row: Tensor
    requests: Tensor
    rows: Tensor
    length: int
    num_pairs: int


def _groups(lengths: Tensor, request_of_row: Tensor, num_pairs: Callable[[int], int]) -> list[_Group]:
    """Requests by length, the longest first, as many in a group as have ``_PAIRS_OF_A_GROUP`` pairs, at least one."""
    ordered, requests = lengths.sort(descending=True, stable=True)
    rank = torch.empty_like(requests).index_copy_(0, requests, torch.arange(len(requests), device=requests.device))
    request_of_row, rows = rank[request_of_row].sort(stable=True)
    longest = ordered.tolist()
    starts = [0]
    while starts[-1] < len(longest):
        pairs = num_pairs(max(longest[starts[-1]], 1))
        starts.append(min(starts[-1] + max(_PAIRS_OF_A_GROUP // pairs, 1), len(longest)))
    bounds = torch.searchsorted(request_of_row, torch.tensor(starts, device=rows.device)).tolist()
    groups = []
    for start, stop, first, last in zip(starts, starts[1:], bounds, bounds[1:], strict=False):
        length = max(longest[start], 1)
        of_rows = request_of_row[first:last] - start
        groups.append(
            _Group(of_rows, requests[start:stop], rows[first:last], length, (stop - start) * num_pairs(length))
        )
    return groups


def _of_layer(biases: Biases, number: int) -> Biases:
    at = min(number, biases.own.shape[0] - 1)  # where layers share, there is one
    return Biases(tuple(b[at] for b in biases.events), biases.candidates[at], biases.own[at])
