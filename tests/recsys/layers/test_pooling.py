"""The mean of a history equals its sum over real events, whatever stands in the padding."""

from __future__ import annotations

import numpy as np
import torch

from recsys.layers import MeanPooling, mean_of_events
from tests.references.interactions import mean_pooled


def test_the_mean_is_over_real_events_alone_whatever_stands_in_the_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(4, 4, 5, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([2, 0, 4, 1])
    request_of_row = torch.tensor([0, 0, 1, 2, 3])
    of_requests = [mean_pooled(keys[r].numpy(), int(lengths[r])) for r in range(4)]
    keys[0, 2:], keys[1], keys[3, 1:] = 1e30, -1e30, 1e30
    np.testing.assert_allclose(mean_of_events(keys, lengths), of_requests, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(mean_of_events(keys.float(), lengths), of_requests, rtol=0, atol=1e-6)
    found = MeanPooling()(torch.zeros(5, 2), keys, lengths, request_of_row)
    np.testing.assert_allclose(found, [of_requests[r] for r in request_of_row], rtol=1e-12, atol=1e-15)
    one = MeanPooling().single_request(torch.zeros(2, 2), keys[:1], lengths[:1])
    torch.testing.assert_close(one, found[:2], rtol=0, atol=0)


def test_padding_gets_no_gradient() -> None:
    events = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    (mean_of_events(events, torch.tensor([2, 0])) * weights).sum().backward()
    half = [[0.5, 1.0], [0.5, 1.0], [0.0, 0.0]]
    torch.testing.assert_close(events.grad, torch.tensor([half, [[0.0, 0.0]] * 3], dtype=torch.float64))
