r"""Information flow between fields, events and tasks: proxies, and the block that INFNet is a stack of.

Streams ask (proxies of fields and of histories, shared task tokens, task tokens); the tokens of the three types are
asked, and gated by the proxies of their own type.

Source: "INFNet: A Task-aware Information Flow Network for Large-Scale Recommendation Systems" (Kuaishou), 2025, arXiv
2508.11565 version 1.

Shapes: R requests, N candidates (rows), L events, M fields, D width of a token, F histories. Leading dimensions ``...``
broadcast: what is the same for all rows needs none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from recsys.layers.mlp import MLP, JoinedMLP
from recsys.layers.token_attention import (
    Call,
    GatedTokens,
    ProxyGate,
    QueryProjection,
    SourceProjection,
    cross_attention,
)

QUERIES = ("categorical", "sequence", "shared", "task")
"""Who asks: proxies of fields and of histories, shared task tokens, task tokens."""

SOURCES = {
    "categorical": ("sequence", "task"),
    "sequence": ("categorical", "task"),
    "shared": ("categorical", "sequence"),
    "task": ("categorical", "sequence"),
}
"""Whom each asks."""

GATED_BY = {"categorical": "categorical", "sequence": "sequence", "task": "shared"}
"""Proxies that gate each type of tokens."""


class Plan(NamedTuple):
    """What one block computes.

    Attributes:
        streams: those of ``QUERIES`` that it updates.
        gates: types of tokens that it gates.
    """

    streams: tuple[str, ...]
    gates: tuple[str, ...]


class SequenceProxies(nn.Module):
    r"""The first proxies of the histories: one MLP for all of them, pooled over the events of each.

    .. math:: \tilde S = \Big[ \sum_t \varphi_{seq}(s_{1,t});\ \dots;\ \sum_t \varphi_{seq}(s_{F,t}) \Big]

    Source: INFNet (arXiv 2508.11565, v1), initial proxies.

    Differs from source: r proxies of a history, a mean in place of the sum, and a LayerNorm, where asked for.

    Args:
        dim: D.
        num_proxies: r, of each history.
        hidden: widths of the MLP's hidden layers (ReLU), at least one.
        pooling: over a history's events.
        layer_norm: of every proxy.

    Shape:
        F times (R, L_h, D) -> (R, F * r, D).
    """

    def __init__(
        self, dim: int, num_proxies: int, *, hidden: Sequence[int], pooling: Literal["sum", "mean"], layer_norm: bool
    ) -> None:
        super().__init__()
        self.mlp = MLP(dim, hidden, activation="relu")
        self.output = nn.Linear(hidden[-1], num_proxies * dim)
        self.norm: nn.Module = nn.LayerNorm(dim) if layer_norm else nn.Identity()
        self._by_length = 0.0 if pooling == "sum" else 1.0
        self._shape = (num_proxies, dim)

    def forward(self, events: Sequence[Tensor], valid: Sequence[Tensor], gate: Tensor | None = None) -> Tensor:
        """Events (R, L_h, D) and where they are real (R, L_h) of each history; ``gate`` (R, D) multiplies them."""
        proxies = []
        for tokens, real in zip(events, valid, strict=True):
            gated = tokens if gate is None else tokens * gate.unsqueeze(1)
            real = real.to(tokens.dtype)
            length = real.sum(1, keepdim=True).clamp(min=1)
            # The last layer is linear: pool in front of it, and give its bias once an event.
            hidden = (real.unsqueeze(1) @ self.mlp(gated)).squeeze(1)
            total = torch.addmm(real.sum(1, keepdim=True) * self.output.bias, hidden, self.output.weight.t())
            # DIFF(paper): as many proxies a history as asked for, because formula and text name different numbers.
            proxies.append((total / length.pow(self._by_length)).unflatten(1, self._shape))
        # DIFF(paper): by default proxies of histories are normalised, because a sum grows with the number of events.
        return self.norm(torch.cat(proxies, dim=1))  # type: ignore[no-any-return]


class CategoricalProxies(nn.Module):
    r"""The first proxies of the fields: an MLP over all of them side by side, those of the request first.

    .. math:: \tilde C = \operatorname{Reshape}(\varphi_{cat}(\operatorname{Flatten}(C)))

    Source: INFNet (arXiv 2508.11565, v1), initial proxies.

    Args:
        request_size: width of the request's fields side by side.
        row_size: of a row's own.
        dim: D.
        num_proxies: m.
        hidden: widths of the MLP's hidden layers (ReLU), at least one.

    Shape:
        request (R, M_u, D), rows (N, M_c, D), request_of_row (N,) -> (N, m, D).
    """

    def __init__(self, request_size: int, row_size: int, dim: int, num_proxies: int, *, hidden: Sequence[int]) -> None:
        super().__init__()
        self.mlp = JoinedMLP(request_size, row_size, hidden, activation="relu")
        self.output = nn.Linear(hidden[-1], num_proxies * dim)
        self._shape = (num_proxies, dim)

    def forward(self, request: Tensor, rows: Tensor, request_of_row: Tensor | None) -> Tensor:
        """Proxies of every row.

        ``request_of_row`` is None where all rows are of one request, or where ``request`` has a row each already.
        """
        u, x = request.flatten(1), rows.flatten(1)
        hidden = self.mlp.single_request(u, x) if request_of_row is None else self.mlp(u, x, request_of_row)
        return self.output(hidden).unflatten(1, self._shape)  # type: ignore[no-any-return]


class FlowBlock(nn.Module):
    r"""One block: heterogeneous flow of all streams, then homogeneous flow of all tokens.

    From tokens C, S, T (fields, events, tasks) and proxies :math:`\tilde C, \tilde S, \tilde T`:

    .. math::
        \tilde C' &= CA(\tilde C, S) + CA(\tilde C, T) \\
        \tilde S' &= CA(\tilde S, C) + CA(\tilde S, T) \\
        \tilde T' &= CA(\tilde T, C) + CA(\tilde T, S) \\
        \hat T &= CA(T, C) + CA(T, S) \\
        C' &= PGU(C, \tilde C'), \quad S' = PGU(S, \tilde S'), \quad T' = PGU(\hat T, \tilde T')

    CA is :func:`~recsys.layers.token_attention.cross_attention`, PGU
    :class:`~recsys.layers.token_attention.ProxyGate`.

    Source: INFNet (arXiv 2508.11565, v1), the equations of the two flows.

    Differs from source: options settle what the paper leaves open. Above, the block's own proxies gate, as in the
    paper's prose; its formula has :math:`PGU(C, \tilde C)`, the proxies before the block. By default the input is added
    and the sum normalised. Only what ``plan`` names is computed.

    Args:
        plan: what to compute.
        num_proxies: by name in ``QUERIES`` (those that gate).
        dim: D.
        has_tasks: whether there are task tokens to ask.
        num_heads: of every cross-attention.
        key_dim: of a head; D / num_heads if None.
        projections: keys and values of each cross-attention, or shared by all onto one type.
        layer_norm: after each sum of attentions.
        residual: adds the block's input to proxies and task tokens.
        gate_proxies: proxies that gate: those of this block's heterogeneous flow, or the block's input.
        gate_hidden: widths of a gate's hidden layers.
        gate_bias: initial bias of the gates.
        gate_residual: PGU(X) = X * gate + X.
    """

    def __init__(
        self,
        plan: Plan,
        num_proxies: Mapping[str, int],
        dim: int,
        *,
        has_tasks: bool,
        num_heads: int,
        key_dim: int | None,
        projections: Literal["per_call", "per_source"],
        layer_norm: bool,
        residual: bool,
        gate_proxies: Literal["updated", "input"],
        gate_hidden: Sequence[int],
        gate_bias: float,
        gate_residual: bool,
    ) -> None:
        super().__init__()
        self._plan = plan
        self._calls = {
            stream: [source for source in SOURCES[stream] if has_tasks or source != "task"] for stream in plan.streams
        }
        shared = projections == "per_source"
        self._source_of = {
            (stream, source): source if shared else f"{source}_by_{stream}"
            for stream, sources in self._calls.items()
            for source in sources
        }
        self.query = nn.ModuleDict(
            {
                f"{stream}_to_{source}": QueryProjection(dim, num_heads=num_heads, key_dim=key_dim)
                for stream, source in self._source_of
            }
        )
        self.source = nn.ModuleDict(
            {
                name: SourceProjection(dim, num_heads=num_heads, key_dim=key_dim)
                for name in dict.fromkeys(self._source_of.values())
            }
        )
        norm = (lambda: nn.LayerNorm(dim)) if layer_norm else nn.Identity
        self.norm = nn.ModuleDict({stream: norm() for stream in plan.streams})
        self.gate = nn.ModuleDict(
            {
                kind: ProxyGate(num_proxies[GATED_BY[kind]], dim, hidden=gate_hidden, bias=gate_bias)
                for kind in plan.gates
            }
        )
        self._kept = 1.0 if residual else 0.0
        self._ungated = 1.0 if gate_residual else 0.0
        self._gate_updated = gate_proxies == "updated"

    def forward(
        self,
        streams: Mapping[str, Tensor],
        tokens: Mapping[str, GatedTokens],
        events_of_requests: GatedTokens | None,
        to_rows: Callable[[Tensor], Tensor],
    ) -> tuple[dict[str, Tensor], dict[str, GatedTokens]]:
        """One block.

        Args:
            streams: proxies and task tokens (..., n, D) by name; those of tasks have no leading dimension in the first
                block, where they are the same for all rows.
            tokens: by source.
            events_of_requests: in the first block, the sequence tokens before they were given to rows: tasks ask these.
            to_rows: gives rows what is their request's.

        Returns:
            Streams (task tokens gated) and tokens.
        """
        seen = self._heterogeneous(streams, tokens, events_of_requests, to_rows)
        # DIFF(paper): by default plus the input, as in its prose, and normalised; the formulas have neither.
        updated = {
            stream: self.norm[stream](torch.add(seen[stream], streams[stream], alpha=self._kept))
            for stream in self._plan.streams
        }
        return self._homogeneous(streams, updated, tokens)

    def _heterogeneous(
        self,
        streams: Mapping[str, Tensor],
        tokens: Mapping[str, GatedTokens],
        events_of_requests: GatedTokens | None,
        to_rows: Callable[[Tensor], Tensor],
    ) -> dict[str, Tensor]:
        """The sum of what each stream sees in its sources."""
        seen: dict[str, Tensor] = {}
        for source in ("categorical", "sequence", "task"):
            asking = [stream for stream, sources in self._calls.items() if source in sources]
            if source == "sequence" and events_of_requests is not None:
                early = [stream for stream in asking if stream in ("shared", "task")]
                for stream, values in self._ask(early, source, streams, events_of_requests):
                    seen[stream] = seen[stream] + to_rows(values) if stream in seen else to_rows(values)
                asking = [stream for stream in asking if stream not in early]
            for stream, values in self._ask(asking, source, streams, tokens[source] if asking else None):
                seen[stream] = seen[stream] + values if stream in seen else values
        return seen

    def _ask(
        self, asking: Sequence[str], source: str, streams: Mapping[str, Tensor], tokens: GatedTokens | None
    ) -> list[tuple[str, Tensor]]:
        if tokens is None or not asking:
            return []
        calls = [
            Call(streams[s], self.query[f"{s}_to_{source}"], self.source[self._source_of[s, source]])  # type: ignore[arg-type]
            for s in asking
        ]
        return list(zip(asking, cross_attention(calls, tokens), strict=True))

    def _homogeneous(
        self, before: Mapping[str, Tensor], updated: Mapping[str, Tensor], tokens: Mapping[str, GatedTokens]
    ) -> tuple[dict[str, Tensor], dict[str, GatedTokens]]:
        """PGU of each type: C', S' and T'."""
        streams, gated = dict(updated), dict(tokens)
        # DIFF(paper): by default the proxies of this block, as in its prose; the formula gates by those before it.
        proxies = updated if self._gate_updated else before
        for kind in self._plan.gates:
            factor = self.gate[kind](proxies[GATED_BY[kind]]) + self._ungated
            if kind == "task":
                streams["task"] = updated["task"] * factor.unsqueeze(-2)
            else:
                gated[kind] = tokens[kind].gated(factor)
        if "task" in streams:
            gated["task"] = GatedTokens((streams["task"],))
        return streams, gated
