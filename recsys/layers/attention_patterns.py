"""Which events an event attends to, and the bias of a pair: what SUAN and LightSUAN differ in, and what they share.

Source: SUAN, Lai et al., RecSys 2025, arXiv 2508.15326, as far as its released code (laiweijiang/SUAN) and others'
read-throughs tell; no equation numbers are known.

Shapes: R requests, H heads, L events, d width of a head, Y layers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from recsys.errors import ConfigError
from recsys.ops.causal_attention import (
    Sparsity,
    causal_attention,
    dense_offsets,
    dilated_offsets,
    local_dilated_attention,
    local_offsets,
    split_attention,
)

NUM_TIME_BUCKETS = 129
BUCKET_LOG_WIDTH = 0.301
MICROSECONDS = 1_000_000


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
        # DIFF(code): half of its table, because no event sees what comes after it.
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

    def num_pairs(self, length: int) -> int:
        """Pairs of query and key that attention computes for so many events."""
        return length * length

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

    # RECONSTRUCTION: the formula, and what a candidate sees; the authors' LightSUAN is not released.

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
        self._candidate_window = window  # the oldest of a full history is max_length places before a candidate
        self.is_split, self.is_candidate_sparse = is_split, is_candidate_sparse
        self._attention = split_attention if is_split else local_dilated_attention

    def num_pairs(self, length: int) -> int:
        """As :meth:`CausalPattern.num_pairs`."""
        return length * (2 * self.window + -(-length // self.dilation))

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
        return (offsets > 0) & ((offsets < self._candidate_window) | (offsets % self.dilation == 0))

    def extra_repr(self) -> str:
        """What ``print`` shows of the layer."""
        return f"window={self.window}, dilation={self.dilation}, is_split={self.is_split}"
