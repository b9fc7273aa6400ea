from __future__ import annotations

import torch

from recsys.models import build_model
from recsys.models.din import DINConfig
from recsys.models.suan import SUANConfig
from tests.synthetic import TABLE_SIZES, random_batch, schema
from training.timing import scoring_ms


def test_every_network_is_timed_and_threads_are_as_before() -> None:
    threads = torch.get_num_threads()
    configs = {"din": DINConfig(embedding_dim=4), "suan": SUANConfig(embedding_dim=4, hidden=(8,))}
    models = {name: build_model(config, schema(), TABLE_SIZES).eval() for name, config in configs.items()}
    times = scoring_ms(models, random_batch(1, seed=1), repeats=2)
    assert set(times) == set(models)
    assert min(times.values()) > 0
    assert torch.get_num_threads() == threads
