from __future__ import annotations

import numpy as np
import torch

from recsys.layers import MeanPooling


def test_the_mean_is_over_real_events_alone_whatever_stands_in_the_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(3, 4, 5, generator=generator)
    lengths = torch.tensor([2, 0, 4])
    request_of_row = torch.tensor([0, 0, 1, 2])
    expected = np.stack(
        [
            sum((keys[r, t].double().numpy() for t in range(int(lengths[r]))), np.zeros(5)) / max(int(lengths[r]), 1)
            for r in request_of_row.tolist()
        ]
    )
    keys[0, 2:], keys[1] = torch.nan, torch.nan
    found = MeanPooling()(torch.zeros(4, 2), keys, lengths, request_of_row)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-6)
    one = MeanPooling().single_request(torch.zeros(2, 2), keys[:1], lengths[:1])
    torch.testing.assert_close(one, found[:2], rtol=0, atol=0)
