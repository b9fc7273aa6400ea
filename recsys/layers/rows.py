"""From requests to rows: how a request-major network's two halves meet.

A network does a request's part once a request and then needs it at each of the request's rows. There are three cases,
and a layer that takes a :class:`Rows` works in all of them:

- :class:`ManyRequests`: the request's values are gathered, by ``request_of_row``;
- :class:`FlatRows`: every request has one row, so there is nothing to gather, and a request's and a row's part of a
  linear layer are best done as one;
- :class:`OneRequest`: the request's values, of first dimension 1, are broadcast.

Shapes: R requests, N rows, U width of what is a request's, C of what is a row's own.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from recsys.layers.mlp import JoinedLinear, JoinedMLP


class Rows(Protocol):
    """How rows stand to requests."""

    def spread(self, of_requests: Tensor) -> Tensor:
        """Gives every row the value of its request: (R, ...) -> (N, ...), or what broadcasts to it."""
        ...

    def join(self, of_requests: Tensor, rows: Tensor) -> Tensor:
        """Puts every row's request in front of the row: (R, U) and (N, C) -> (N, U + C)."""
        ...

    def linear(self, layer: JoinedLinear, of_requests: Tensor, rows: Tensor) -> Tensor:
        """Runs a linear layer over every row, each with its request: (R, U) and (N, C) -> (N, out)."""
        ...

    def mlp(self, mlp: JoinedMLP, of_requests: Tensor, rows: Tensor) -> Tensor:
        """Runs an MLP over every row, each with its request: (R, U) and (N, C) -> (N, out)."""
        ...


class ManyRequests:
    """Rows of any number of requests.

    Args:
        request_of_row: (N,) int64.
    """

    def __init__(self, request_of_row: Tensor) -> None:
        self.request_of_row = request_of_row

    def spread(self, of_requests: Tensor) -> Tensor:
        """See :class:`Rows`."""
        return of_requests.index_select(0, self.request_of_row)

    def join(self, of_requests: Tensor, rows: Tensor) -> Tensor:
        """See :class:`Rows`."""
        return torch.cat([self.spread(of_requests), rows], dim=1)

    def linear(self, layer: JoinedLinear, of_requests: Tensor, rows: Tensor) -> Tensor:
        """See :class:`Rows`."""
        return layer(of_requests, rows, self.request_of_row)  # type: ignore[no-any-return]

    def mlp(self, mlp: JoinedMLP, of_requests: Tensor, rows: Tensor) -> Tensor:
        """See :class:`Rows`."""
        return mlp(of_requests, rows, self.request_of_row)  # type: ignore[no-any-return]


class FlatRows:
    """Row n is of request n."""

    def spread(self, of_requests: Tensor) -> Tensor:
        """See :class:`Rows`."""
        return of_requests

    def join(self, of_requests: Tensor, rows: Tensor) -> Tensor:
        """See :class:`Rows`."""
        return torch.cat([of_requests, rows], dim=1)

    def linear(self, layer: JoinedLinear, of_requests: Tensor, rows: Tensor) -> Tensor:
        """See :class:`Rows`."""
        return functional.linear(self.join(of_requests, rows), layer.weight, layer.bias)

    def mlp(self, mlp: JoinedMLP, of_requests: Tensor, rows: Tensor) -> Tensor:
        """See :class:`Rows`."""
        return mlp.rest(mlp.after_first(self.linear(mlp.first, of_requests, rows)))  # type: ignore[no-any-return]


class OneRequest:
    """All rows are of one request."""

    def spread(self, of_requests: Tensor) -> Tensor:
        """See :class:`Rows`; (1, ...) stays as it is."""
        return of_requests

    def join(self, of_requests: Tensor, rows: Tensor) -> Tensor:
        """See :class:`Rows`."""
        return torch.cat([of_requests.expand(rows.shape[0], -1), rows], dim=1)

    def linear(self, layer: JoinedLinear, of_requests: Tensor, rows: Tensor) -> Tensor:
        """See :class:`Rows`."""
        return layer.single_request(of_requests, rows)

    def mlp(self, mlp: JoinedMLP, of_requests: Tensor, rows: Tensor) -> Tensor:
        """See :class:`Rows`."""
        return mlp.single_request(of_requests, rows)


def rows_of(request_of_row: Tensor, num_requests: int) -> Rows:
    """How rows stand to requests: flat where that is seen at no cost, else by their numbers.

    A look at the numbers would make a GPU wait, and a program that is exported must not depend on them.
    """
    may_be_flat = request_of_row.is_cpu and not torch.compiler.is_exporting() and num_requests == len(request_of_row)
    # Numbers alone do not tell: one request may have no row, and another two.
    if may_be_flat and torch.equal(request_of_row, torch.arange(num_requests)):
        return FlatRows()
    return ManyRequests(request_of_row)
