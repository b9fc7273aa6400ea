"""Gains by quarters of users."""

import numpy as np

from benchmarks.short_histories import QUARTERS, quarters
from training.evaluate import Predictions


def predictions(user: list[int], length: list[int], labels: list[float]) -> Predictions:
    n = len(user)
    return Predictions(
        tasks=("click",),
        logits=np.zeros((n, 1), np.float32),
        labels=np.array(labels, np.float32).reshape(-1, 1),
        user_row=np.array(user),
        request=np.arange(n),
        source_row=np.arange(n),
        history_length=np.array(length),
    )


def test_users_are_cut_by_the_events_before_their_first_request() -> None:
    #      a user of 0 and 9 events counts as one of 0; user 0 is a stranger, a request each
    user = [1, 1, 2, 3, 4, 4, 0, 0]
    length = [9, 0, 2, 4, 6, 7, 1, 8]
    labels = [1.0, 0.0, 1.0, 0.0, 1.0, np.nan, 0.0, 1.0]
    parts, sizes = quarters(predictions(user, length, labels), "click")
    assert parts["all"].tolist() == [0, 1, 2, 3, 4, 6, 7]
    rows = {name: parts[name].tolist() for name in QUARTERS}
    assert rows == {"shortest": [0, 1, 6], "second": [2], "third": [3], "longest": [4, 7]}
    assert sizes["shortest"] == {"users": 2, "rows": 3, "events": [0, 1]}
    assert sizes["longest"] == {"users": 2, "rows": 2, "events": [6, 8]}
