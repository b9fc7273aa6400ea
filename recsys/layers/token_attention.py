r"""Cross-attention onto tokens that share a gate, without ever projecting or gating the tokens.

A gate of one factor a channel is linear in the tokens, and so are keys and values. Both can be moved to the query and
to the result: with :math:`X = S \operatorname{diag}(a)`, query :math:`q` and projections :math:`W_Q, W_K, W_V`

.. math:: (q W_Q)(X W_K)^\top = \big( (q W_Q W_K^\top) \odot a \big)\, S^\top, \qquad
          P\,(X W_V) = \big( (P S) \odot a \big)\, W_V

Queries are few and tokens many: of a sequence of L tokens nothing is computed but two products with the tokens as they
came, which all rows of a request, all calls and all blocks share.

Shapes: Q queries, K keys (tokens), D width of a token, H heads, E ``key_dim``. Leading dimensions ``...`` broadcast, as
in :func:`torch.matmul`: tokens that are the same for all rows need none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from recsys.errors import ConfigError
from recsys.layers.mlp import MLP


class GatedTokens(NamedTuple):
    """Tokens of one type, stored once, and the gate that multiplies them all.

    Attributes:
        groups: ``(..., K_i, D)`` each; the tokens are all groups one after the other. What is the same for all rows of
            a request and what is not need not be put together.
        valid: ``(..., K)``, True = a token, over all groups; None: all are.
        gate: ``(..., D)`` factor of every token's channels; None: 1.
    """

    groups: tuple[Tensor, ...]
    valid: Tensor | None = None
    gate: Tensor | None = None

    def gated(self, factor: Tensor) -> GatedTokens:
        """The same tokens, multiplied by one more factor ``(..., D)``."""
        return self._replace(gate=factor if self.gate is None else self.gate * factor)


def masked_softmax(scores: Tensor, valid: Tensor | None) -> Tensor:
    """Softmax over the last dimension where ``valid``, 0 elsewhere, and all 0 where nothing is valid.

    Args:
        scores: (..., Q, K), finite.
        valid: (..., K), or None: all are.
    """
    if valid is None:
        return scores.softmax(-1)
    # RECONSTRUCTION: padding has no weight, and an empty history gives zeros; the paper's text has no mask.
    valid = valid.unsqueeze(-2)
    weights: Tensor = scores.masked_fill(~valid, torch.finfo(scores.dtype).min).softmax(-1)
    return weights * valid


def attend(queries: Tensor, tokens: GatedTokens) -> Tensor:
    """Softmax-weighted sums of tokens for queries that are in the tokens' own space: (..., Q, D) -> (..., Q, D)."""
    if tokens.gate is not None:
        queries = queries * tokens.gate.unsqueeze(-2)
    scores = [queries @ group.transpose(-1, -2) for group in tokens.groups]
    leading = torch.broadcast_shapes(*(part.shape[:-1] for part in scores))
    weights = masked_softmax(torch.cat([part.expand(*leading, -1) for part in scores], dim=-1), tokens.valid)
    parts = weights.split([group.shape[-2] for group in tokens.groups], dim=-1)
    pooled = [part @ group for part, group in zip(parts, tokens.groups, strict=True)]
    total = sum(pooled[1:], pooled[0])
    return total if tokens.gate is None else total * tokens.gate.unsqueeze(-2)  # type: ignore[no-any-return]


class QueryProjection(nn.Module):
    """W_Q of a cross-attention.

    Args:
        dim: D.
        num_heads: H.
        key_dim: E, of a head.
    """

    def __init__(self, dim: int, *, num_heads: int = 1, key_dim: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, _key_dim(dim, num_heads, key_dim), dim))


class SourceProjection(nn.Module):
    """W_K and W_V of a cross-attention.

    Args:
        dim: D; a head's values are D / H wide, and heads are put side by side.
        num_heads: H, a divisor of D.
        key_dim: E, of a head; D / H if not given.

    Raises:
        ConfigError: D is no multiple of H.
    """

    def __init__(self, dim: int, *, num_heads: int = 1, key_dim: int | None = None) -> None:
        super().__init__()
        self.key = nn.Parameter(torch.empty(num_heads, _key_dim(dim, num_heads, key_dim), dim))
        self.value = nn.Parameter(torch.empty(num_heads, dim // num_heads, dim))


def _key_dim(dim: int, num_heads: int, key_dim: int | None) -> int:
    if num_heads < 1 or dim % num_heads:
        raise ConfigError(f"num_heads must be a divisor of the tokens' width {dim}, got {num_heads}")
    return key_dim or dim // num_heads


class Call(NamedTuple):
    """One cross-attention: who asks, and with which projections."""

    queries: Tensor
    query: QueryProjection
    source: SourceProjection


def cross_attention(calls: Sequence[Call], tokens: GatedTokens) -> list[Tensor]:
    r"""Several cross-attentions onto the same tokens, in one pass over them.

    .. math:: \mathrm{CA}(Q, X, X)
              = \operatorname{softmax}\!\big( (Q W_Q)(X W_K)^\top / \sqrt{E} \big)\, (X W_V)

    per head. No biases and no projection of the output. Without any valid token the result is zero.

    Source: the equations of INFNet (arXiv 2508.11565, v1). Differs from source: heads, a mask, and the algebra above;
    with one head and all tokens valid it is equal in exact arithmetic.

    Args:
        calls: queries (..., Q_i, D) each.
        tokens: what is attended to.

    Returns:
        (..., Q_i, D) of each call.
    """
    folded = [_folded(call) for call in calls]
    leading = torch.broadcast_shapes(*(queries.shape[:-2] for queries in folded))
    together = torch.cat([queries.expand(*leading, *queries.shape[-2:]) for queries in folded], dim=-2)
    pooled = attend(together, tokens).split([queries.shape[-2] for queries in folded], dim=-2)
    return [_values(call, part) for call, part in zip(calls, pooled, strict=True)]


def _folded(call: Call) -> Tensor:
    """Queries in the space of tokens, a head after the other: (..., Q, D) -> (..., Q * H, D)."""
    num_heads, key_dim, dim = call.source.key.shape
    fold_DHD = torch.einsum("hea,heb->ahb", call.query.weight, call.source.key) * key_dim**-0.5
    folded = call.queries @ fold_DHD.reshape(dim, num_heads * dim)
    per_head = folded.unflatten(-1, (num_heads, dim))
    return per_head.flatten(-3, -2)  # type: ignore[no-any-return]


def _values(call: Call, pooled: Tensor) -> Tensor:
    """Each head's own W_V, side by side: (..., Q * H, D) -> (..., Q, D)."""
    num_heads = call.source.value.shape[0]
    if num_heads == 1:
        return pooled @ call.source.value.squeeze(0).t()
    heads = pooled.unflatten(-2, (pooled.shape[-2] // num_heads, num_heads))
    return torch.einsum("...hd,hvd->...hv", heads, call.source.value).flatten(-2)


class ProxyGate(nn.Module):
    r"""The gate of a Proxy Gated Unit: one factor in (0, 1) a channel, from all proxies of a type.

    .. math:: \mathrm{PGU}(X, \tilde X) = X \odot \sigma(\mathrm{MLP}(\mathrm{flatten}(\tilde X)))

    Source: INFNet (arXiv 2508.11565, v1), homogeneous flow.

    Args:
        num_proxies: of the type.
        dim: D.
        hidden: widths of the MLP's hidden layers (ReLU), at least one.
        bias: initial bias of the last layer; 0 starts at factors around one half.

    Shape:
        proxies (..., num_proxies, D) -> (..., D).

    Example:
        >>> gate = ProxyGate(2, 3, hidden=(4,))
        >>> _ = nn.init.zeros_(gate.output.weight)
        >>> gate(torch.randn(5, 2, 3))[0].tolist()
        [0.5, 0.5, 0.5]
    """

    def __init__(self, num_proxies: int, dim: int, *, hidden: Sequence[int], bias: float = 0.0) -> None:
        super().__init__()
        self.mlp = MLP(num_proxies * dim, hidden, activation="relu")
        self.output = nn.Linear(hidden[-1], dim)
        self.bias = bias
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights Xavier-uniform, biases 0, the last one ``bias``."""
        for linear in (*self.mlp.linears, self.output):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        nn.init.constant_(self.output.bias, self.bias)

    def forward(self, proxies: Tensor) -> Tensor:
        """The factors of all tokens of the type."""
        return self.output(self.mlp(proxies.flatten(-2))).sigmoid()  # type: ignore[no-any-return]
