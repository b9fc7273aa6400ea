"""The look-up: pooled, padded vectors agree with a slow loop over the batch."""

from __future__ import annotations

import numpy as np
import torch

from recsys.batch import Bags, Column
from recsys.embeddings import Lookup, Space, Use, uses_of_features, uses_of_tables, widths
from recsys.schema import Categorical
from tests.synthetic import TABLE_SIZES, random_batch, schema

D = 4


def make_lookup(seed: int = 0) -> Lookup:
    torch.manual_seed(seed)
    return Lookup(schema(), TABLE_SIZES, D)


def tables_of(lookup: Lookup) -> dict[str, np.ndarray]:
    return {name.split(".")[-2]: p.detach().numpy().astype(np.float64) for name, p in lookup.named_parameters()}


def vector(tables: dict[str, np.ndarray], feature: str, column: Column, row: int) -> np.ndarray:
    spec = schema().feature(feature)
    if not isinstance(spec, Categorical):
        assert isinstance(column, torch.Tensor)
        return column[row].numpy()
    table = tables[spec.table_name]
    if isinstance(column, Bags):
        ids = column.values[column.offsets[row] : column.offsets[row + 1]].tolist()
        return np.mean([table[i] for i in ids], axis=0) if ids else np.zeros(D)
    return table[int(column[row])]


def test_every_vector_equals_a_loop() -> None:
    lookup, batch = make_lookup(), random_batch(6, seed=3)
    tables = tables_of(lookup)

    embedded = lookup(batch)

    for name, column in {**batch.user, **batch.context}.items():
        for r in range(batch.num_requests):
            np.testing.assert_allclose(embedded.request[name][r].detach(), vector(tables, name, column, r), rtol=1e-6)
    for name, column in {**batch.item, **batch.candidate}.items():
        for n in range(batch.num_rows):
            np.testing.assert_allclose(embedded.candidate[name][n].detach(), vector(tables, name, column, n), rtol=1e-6)
    for name, history in batch.histories.items():
        padded = embedded.histories[name]
        assert padded.lengths.tolist() == history.lengths.tolist()
        for feature, column in history.features.items():
            for r in range(batch.num_requests):
                first, length = int(history.offsets[r]), int(history.lengths[r])
                got = padded.features[feature][r].detach().numpy()
                for place in range(length):
                    np.testing.assert_allclose(got[place], vector(tables, feature, column, first + place), rtol=1e-6)
                    assert int(padded.times[r, place]) == int(history.times[first + place])
                assert (got[length:] == 0).all()


def test_a_history_of_nobody_still_has_one_place() -> None:
    embedded = make_lookup()(random_batch(3, empty_history=True))
    assert embedded.histories["clicked"].features["item_id"].shape == (3, 1, D)
    assert embedded.histories["clicked"].lengths.tolist() == [0, 0, 0]


def test_a_table_shared_by_candidates_and_histories_is_one_parameter() -> None:
    lookup = make_lookup()
    names = sorted(name.split(".")[-2] for name, _ in lookup.named_parameters())
    assert names == sorted(TABLE_SIZES)
    assert uses_of_tables(schema())["item"] == [
        Use("candidate", "item_id"),
        Use("clicked", "item_id"),
        Use("seen", "item_id"),
    ]


def test_only_looked_up_rows_get_a_gradient() -> None:
    lookup, batch = make_lookup(), random_batch(3, seed=5)
    embedded = lookup(batch)
    total = sum(t.sum() for t in (*embedded.request.values(), *embedded.candidate.values()))
    total = total + sum(t.sum() for h in embedded.histories.values() for t in h.features.values())
    total.backward()
    gradient = next(p.grad for n, p in lookup.named_parameters() if ".item." in n)
    assert gradient is not None
    dense = gradient.to_dense() if gradient.is_sparse else gradient
    item = batch.item["item_id"]
    assert isinstance(item, torch.Tensor)
    seen = set(item.tolist())
    for history in batch.histories.values():
        column = history.features["item_id"]
        assert isinstance(column, torch.Tensor)
        seen |= set(column.tolist())
    assert set(torch.nonzero(dense.abs().sum(1)).flatten().tolist()) == seen


def test_initialisation_is_bounded_whatever_the_size_of_the_table() -> None:
    for parameter in make_lookup().parameters():
        assert 0 < float(parameter.detach().abs().max()) <= 0.01


def test_a_space_gives_the_same_places_other_vectors() -> None:
    torch.manual_seed(0)
    spec = schema()
    role = Space("role", 8, uses_of_features(spec, ("item_id", "tags")))
    assert role.of_side("seen") == ["item_id"]
    lookup, batch = Lookup(spec, TABLE_SIZES, D, spaces=(role,)), random_batch(5, seed=6)
    tables = tables_of(lookup)
    assert {name: table.shape[1] for name, table in tables.items() if "@" in name} == {"item@role": 8, "tags@role": 8}
    embedded, plain = lookup(batch), dict(tables)
    plain["item"], plain["tags"] = tables["item@role"], tables["tags@role"]
    for n in range(batch.num_rows):
        for feature in ("item_id", "tags"):
            wanted = vector(plain, feature, batch.item[feature], n) if _filled(batch.item[feature], n) else np.zeros(8)
            np.testing.assert_allclose(embedded.candidate[f"{feature}@role"][n].detach(), wanted, rtol=1e-6)
        main = vector(tables, "item_id", batch.item["item_id"], n)
        np.testing.assert_allclose(embedded.candidate["item_id"][n].detach(), main, rtol=1e-6)
    history = batch.histories["seen"]
    for r in range(batch.num_requests):
        for place in range(int(history.lengths[r])):
            wanted = vector(plain, "item_id", history.features["item_id"], int(history.offsets[r]) + place)
            got = embedded.histories["seen"].features["item_id@role"][r, place].detach()
            np.testing.assert_allclose(got, wanted, rtol=1e-6)
    assert widths(spec, D, (role,))["item_id@role"] == 8
    assert torch.equal(embedded.time, batch.time)
    assert Space.from_json(role.to_json()) == role


def _filled(column: Column, row: int) -> bool:
    return not isinstance(column, Bags) or bool(column.offsets[row + 1] > column.offsets[row])
