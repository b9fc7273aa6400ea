"""FinalMLP and DualMLP on Frappe by FuxiCTR: its layers, its encoding and data loader, its own training loop.

Runs in an environment of its own (``pip install torch==2.13.0 fuxictr packaging "polars<2"``), as a process that
:mod:`benchmarks.frappe` starts; imports nothing of this project. FuxiCTR's package does not hold its zoo of models, so
both are put together here from its embeddings and MLP blocks, with the winning configs and the initialisation of its
authors.

    python benchmarks/fuxictr_frappe.py RAW OUTPUT MODEL SEED THREADS

Prints FuxiCTR's log, and at the end ``RESULT {json}``. With MODEL ``prepare`` it converts the files and ends: that is
not timed. Batches come from its loader of ``.npz`` files, its default, which needs no cluster.
"""

from __future__ import annotations

import json
import logging
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fuxictr.features import FeatureMap
from fuxictr.preprocess import FeatureProcessor
from fuxictr.pytorch.dataloaders import RankDataLoader
from fuxictr.pytorch.layers import FeatureEmbedding, MLP_Block
from fuxictr.pytorch.models import BaseModel
from torch import Tensor, nn

FIELDS = ("user", "item", "daytime", "weekday", "isweekend", "homework", "cost", "weather", "country", "city")
SPLITS = ("train", "valid", "test")
WIDTH = 10


class TwoStreams(BaseModel):
    """DualMLP, or FinalMLP where there are gates and a bilinear form."""

    def __init__(self, feature_map: Any, *, is_final: bool, **params: Any) -> None:
        super().__init__(feature_map, gpu=-1, **params)
        size = len(FIELDS) * WIDTH
        self.embedding_layer = FeatureEmbedding(feature_map, WIDTH)
        if is_final:
            self.sizes, drops, output = ([400], [100]), (0.4, 0.4), None
            self.context_embeddings = nn.ModuleList(
                FeatureEmbedding(feature_map, WIDTH, required_feature_columns=[name]) for name in ("user", "item")
            )
            self.gates = nn.ModuleList(
                MLP_Block(WIDTH, [400], hidden_activations="ReLU", output_dim=size, output_activation="Sigmoid")
                for _ in range(2)
            )
            self.linears = nn.ModuleList(nn.Linear(hidden[-1], 1) for hidden in self.sizes)
            self.bilinear = nn.Parameter(torch.empty(400 * 100 // 5, 1))
            nn.init.xavier_normal_(self.bilinear)
        else:
            self.sizes, drops, output = ([400] * 3, [500] * 3), (0.2, 0.3), 1
        self.mlps = nn.ModuleList(
            MLP_Block(size, hidden, hidden_activations="ReLU", output_dim=output, dropout_rates=drop, batch_norm=True)
            for hidden, drop in zip(self.sizes, drops, strict=True)
        )
        self.is_final = is_final
        self.compile("adam", "binary_crossentropy", 1e-3)
        self.reset_parameters()
        self.model_to_device()

    def forward(self, inputs: Any) -> dict[str, Tensor]:
        """Probabilities, as FuxiCTR's loop wants them."""
        x = self.get_inputs(inputs)
        e = self.embedding_layer(x, flatten_emb=True)
        if not self.is_final:
            return {"y_pred": self.output_activation(self.mlps[0](e) + self.mlps[1](e))}
        one, other = (
            mlp(2.0 * gate(context(x, flatten_emb=True)) * e)
            for mlp, gate, context in zip(self.mlps, self.gates, self.context_embeddings, strict=True)
        )
        heads = torch.einsum(
            "nha,hab,nhb->n", one.view(-1, 5, 80), self.bilinear.view(5, 80, 20), other.view(-1, 5, 20)
        )
        return {"y_pred": self.output_activation(self.linears[0](one) + self.linears[1](other) + heads.unsqueeze(1))}


def _prepare(processor: Any, raw: Path, output: Path, data: dict[str, Any]) -> None:
    """Fits FuxiCTR's encoder to the train file and encodes all three."""
    frames = {split: processor.preprocess(processor.read_data(str(raw / f"{split}.csv"), **data)) for split in SPLITS}
    processor.fit(frames["train"], rebuild_dataset=True, meta_ddf=None, **data)
    for split, frame in frames.items():
        columns = {name: column.to_numpy() for name, column in frame.collect().to_dict().items()}
        np.savez(output / f"{split}.npz", **processor.transform(columns))


def main(raw: str, output: str, name: str, seed: str, threads: str) -> None:
    """Prepares the files or trains one model."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    folder = Path(output).absolute()
    data = {
        "dataset_id": "frappe",
        "data_root": str(folder),
        "data_format": "csv" if name == "prepare" else "npz",
        "feature_cols": [{"name": list(FIELDS), "active": True, "dtype": "str", "type": "categorical"}],
        "label_col": {"name": "label", "dtype": "float"},
        "min_categr_count": 1,
        "embedding_dim": WIDTH,
    }
    if name == "prepare":
        _prepare(FeatureProcessor(**data), Path(raw), folder / "frappe", data)
        return
    torch.set_num_threads(int(threads))
    random.seed(int(seed))
    np.random.seed(int(seed))  # noqa: NPY002 - what FuxiCTR shuffles by
    torch.manual_seed(int(seed))
    feature_map = FeatureMap("frappe", str(folder / "frappe"))
    feature_map.load(str(folder / "frappe" / "feature_map.json"), data)
    model = TwoStreams(
        feature_map,
        is_final=name == "finalmlp",
        model_id=f"{name}_{seed}",
        model_root=str(folder / "models"),
        metrics=["AUC", "logloss"],
        monitor="AUC",
        embedding_regularizer=0.05,
        early_stop_patience=2,
        verbose=0,
    )
    (folder / "models" / "frappe").mkdir(parents=True, exist_ok=True)
    files = {f"{split}_data": str(folder / "frappe" / f"{split}.npz") for split in SPLITS}
    train, valid, test = RankDataLoader(feature_map, batch_size=4096, data_format="npz", **files)
    began = time.time()
    model.fit(train, validation_data=valid, epochs=100)
    metrics = model.evaluate(test)
    found = {
        "auc": float(metrics["AUC"]),
        "logloss": float(metrics["logloss"]),
        "fit_began": began,
        "epochs": model._epoch_index + 1,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    sys.stdout.write(f"RESULT {json.dumps(found)}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
