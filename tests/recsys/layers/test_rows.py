"""The three ways from requests to rows are one function of a row and its request."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recsys.layers import FlatRows, JoinedLinear, JoinedMLP, ManyRequests, OneRequest, Rows, rows_of
from tests.references.interactions import mlp
from tests.references.layers import linear

CASES: dict[str, tuple[Rows, list[int]]] = {
    "many": (ManyRequests(torch.tensor([0, 0, 2, 2])), [0, 0, 2, 2]),
    "flat": (FlatRows(), [0, 1, 2, 3]),
    "one": (OneRequest(), [0, 0, 0, 0]),
}


@pytest.mark.parametrize("case", CASES)
def test_every_row_meets_its_request(case: str) -> None:
    which, request_of_row = CASES[case]
    torch.manual_seed(0)
    requests, rows = torch.randn(max(request_of_row) + 1, 2).double(), torch.randn(4, 3).double()
    layer, network = JoinedLinear(2, 3, 5).double(), JoinedMLP(2, 3, [6, 4], activation="relu").double()
    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    state = {f"m.{name}": tensor.numpy() for name, tensor in network.state_dict().items()}
    joined, spread = which.join(requests, rows).numpy(), which.spread(requests).expand(4, -1).numpy()
    mapped, through = which.linear(layer, requests, rows).detach(), which.mlp(network, requests, rows).detach()
    for n, r in enumerate(request_of_row):
        x = np.concatenate([requests[r], rows[n]])
        np.testing.assert_array_equal(spread[n], requests[r])
        np.testing.assert_array_equal(joined[n], x)
        np.testing.assert_allclose(mapped[n], linear(x, weight, bias), rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(through[n], mlp(x, state, "m"), rtol=1e-12, atol=1e-14)


def test_rows_are_flat_only_where_each_request_has_one() -> None:
    assert isinstance(rows_of(torch.tensor([0, 1, 2]), 3), FlatRows)
    assert isinstance(rows_of(torch.tensor([0, 0, 2]), 3), ManyRequests)  # request 1 has no row
    assert isinstance(rows_of(torch.tensor([0, 1]), 3), ManyRequests)
