"""Optimizers: one fused into the backward pass for the embedding tables, one ordinary one for all the rest.

A step looks up a few thousand of a table's millions of rows. FBGEMM applies the embedding optimizer inside the backward
pass, to those rows only: no dense gradient of the table ever exists, and the other rows and their state are neither
read nor written. So the embedding optimizer has no ``step``: ``loss.backward()`` is its step, and it sees the gradient
of the loss exactly as given.

No embedding optimizer has weight decay: FBGEMM 1.8 has none for Adagrad and SGD, and its CPU kernel of row-wise Adagrad
takes the argument and ignores it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
from torchrec.optim.fused import FusedOptimizerModule
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from recsys.config import Config
from recsys.errors import ConfigError

_MOST_ROWS = 2**31 - 1
"""TorchRec's fused collection hands ids to FBGEMM as int32."""


class RowwiseAdagradConfig(Config):
    """Adagrad with one accumulator a row, the mean of the squared gradient over the row: 1 float of state a row."""

    kind: Literal["rowwise_adagrad"] = "rowwise_adagrad"
    lr: float = Field(0.05, gt=0)
    eps: float = Field(1e-8, gt=0)


class AdagradConfig(Config):
    """Adagrad with one accumulator a weight."""

    kind: Literal["adagrad"] = "adagrad"
    lr: float = Field(0.05, gt=0)
    eps: float = Field(1e-8, gt=0)


class SGDConfig(Config):
    """Plain gradient descent, no state."""

    kind: Literal["sgd"] = "sgd"
    lr: float = Field(0.1, gt=0)


EmbeddingOptimizerConfig = Annotated[RowwiseAdagradConfig | AdagradConfig | SGDConfig, Field(discriminator="kind")]


class DenseAdamConfig(Config):
    """Adam (Kingma and Ba, ICLR 2015); ``weight_decay`` is L2, added to the gradient."""

    kind: Literal["adam"] = "adam"
    lr: float = Field(1e-3, gt=0)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)


class DenseAdamWConfig(Config):
    """AdamW (Loshchilov and Hutter, ICLR 2019); ``weight_decay`` is decoupled."""

    kind: Literal["adamw"] = "adamw"
    lr: float = Field(1e-3, gt=0)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.01, ge=0)


class DenseAdagradConfig(Config):
    """Adagrad (Duchi et al., JMLR 2011)."""

    kind: Literal["adagrad"] = "adagrad"
    lr: float = Field(0.01, gt=0)
    eps: float = Field(1e-10, gt=0)
    weight_decay: float = Field(0.0, ge=0)


class DenseSGDConfig(Config):
    """Gradient descent with momentum."""

    kind: Literal["sgd"] = "sgd"
    lr: float = Field(0.1, gt=0)
    momentum: float = Field(0.0, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)


DenseOptimizerConfig = Annotated[
    DenseAdamConfig | DenseAdamWConfig | DenseAdagradConfig | DenseSGDConfig, Field(discriminator="kind")
]


class EmbeddingOptimizer(NamedTuple):
    """An embedding optimizer as TorchRec takes it, to fuse or to apply in backward.

    Attributes:
        cls: names the optimizer; TorchRec maps it to FBGEMM's.
        kwargs: its arguments.
    """

    cls: type[torch.optim.Optimizer]
    kwargs: dict[str, Any]


def embedding_optimizer(config: EmbeddingOptimizerConfig) -> EmbeddingOptimizer:
    """The optimizer that a config describes, for :func:`fuse_embeddings` or for sharded tables."""
    match config:
        case RowwiseAdagradConfig():
            return EmbeddingOptimizer(RowWiseAdagrad, {"lr": config.lr, "eps": config.eps})
        case AdagradConfig():
            return EmbeddingOptimizer(torch.optim.Adagrad, {"lr": config.lr, "eps": config.eps})
        case SGDConfig():
            return EmbeddingOptimizer(torch.optim.SGD, {"lr": config.lr})


def fuse_embeddings(model: nn.Module, config: EmbeddingOptimizerConfig, *, device: torch.device) -> KeyedOptimizer:
    """Replaces every embedding collection of a model by one whose optimizer is fused into its backward pass.

    The weights and the names in the state dict stay as they were.

    Args:
        model: changed in place.
        device: where the tables go.

    Returns:
        The state of the fused optimizers, by table; its ``step`` updates nothing.

    Raises:
        ConfigError: a table has more rows than FBGEMM can count.
    """
    optimizer = embedding_optimizer(config)
    fused = []
    for path, module in list(model.named_modules()):
        if not isinstance(module, EmbeddingBagCollection):
            continue
        tables = module.embedding_bag_configs()
        # TorchRec 1.8 concatenates pooled vectors by kind of pooling, but names them in table order.
        assert len({t.pooling for t in tables}) == 1, f"{path} must pool all its tables alike"
        for table in tables:
            if table.num_embeddings > _MOST_ROWS:  # it would wrap ids around without a word
                raise ConfigError(
                    f"table {table.name!r} must have at most {_MOST_ROWS:,} rows, got {table.num_embeddings:,}",
                    hint="use fewer hash buckets, or a vocabulary with max_size",
                )
        replacement = FusedEmbeddingBagCollection(
            tables, optimizer_type=optimizer.cls, optimizer_kwargs=optimizer.kwargs, device=device
        )
        replacement.load_state_dict(module.state_dict())  # its constructor draws weights of its own
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, replacement)
        fused.append((path, replacement.fused_optimizer()))
    return CombinedOptimizer(fused)


def dense_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters outside embedding collections, fused, sharded or neither, by name."""
    embeddings: set[int] = set()
    for module in model.modules():
        if isinstance(module, EmbeddingBagCollection | FusedOptimizerModule):
            embeddings.update(id(p) for p in module.parameters())
    return {name: p for name, p in model.named_parameters() if id(p) not in embeddings and p.requires_grad}


def dense_optimizer(
    config: DenseOptimizerConfig,
    parameters: dict[str, nn.Parameter],
) -> KeyedOptimizer:
    """The optimizer of everything but the embedding tables, its state keyed by parameter and allocated.

    Args:
        parameters: by name, from :func:`dense_parameters`.
    """

    def build(values: Iterable[Tensor]) -> torch.optim.Optimizer:
        match config:
            case DenseAdamConfig():
                return torch.optim.Adam(
                    values, config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
                )
            case DenseAdamWConfig():
                return torch.optim.AdamW(
                    values, config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
                )
            case DenseAdagradConfig():
                return torch.optim.Adagrad(values, config.lr, eps=config.eps, weight_decay=config.weight_decay)
            case DenseSGDConfig():
                return torch.optim.SGD(values, config.lr, momentum=config.momentum, weight_decay=config.weight_decay)

    optimizer = KeyedOptimizerWrapper(dict(parameters), build)
    _allocate_state(optimizer)
    return optimizer


def _allocate_state(optimizer: KeyedOptimizer) -> None:
    """Makes the state that torch would allocate in the first step: a checkpoint then always finds the same tensors.

    A step with zero gradients, learning rate and decay changes no parameter and leaves zero moments; only step counts
    are set back.
    """
    kept = [(group, group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    for group, *_ in kept:
        group["lr"] = group["weight_decay"] = 0.0
    optimizer.init_state()
    for group, lr, weight_decay in kept:
        group["lr"], group["weight_decay"] = lr, weight_decay
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].zero_()
    optimizer.zero_grad()
