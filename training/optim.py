"""Optimizers: one for the embedding tables, one for all the rest.

Two families for the tables:

- **Fused** (Adagrad, row-wise Adagrad, SGD). A step looks up a few thousand of a table's millions of rows. FBGEMM
  applies the optimizer inside the backward pass, to those rows only: no dense gradient of the table ever exists, and
  the other rows and their state are neither read nor written. Such an optimizer has no ``step``: ``loss.backward()`` is
  its step, and it sees the gradient of the loss exactly as given.
- **With gradients** (Adam, lazy Adam). FBGEMM 1.8 refuses Adam on the CPU, so these tables keep torch's own look-up and
  get gradients like any parameter. ``adam`` is Adam on the dense gradient: every row moves at every step, as in
  frameworks where a table is a plain parameter. ``lazy_adam`` has sparse gradients and moves the looked-up rows alone.
  Their gradients count in ``gradient_clip_norm``; tables under fused optimizers are updated before a norm is known.

No optimizer of tables has weight decay of its own: FBGEMM 1.8 has none for Adagrad and SGD, and its CPU kernel of
row-wise Adagrad takes the argument and ignores it. See :mod:`training.regularisation`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
from torchrec.optim.fused import FusedOptimizerModule
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from recsys.config import Config
from recsys.errors import ConfigError

_MOST_ROWS = 2**31 - 1
"""TorchRec's fused collection hands ids to FBGEMM as int32."""


Betas = tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]]


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


class AdamConfig(Config):
    """Adam (Kingma and Ba, ICLR 2015) over whole tables: rows outside the batch move too, on their decaying moments.

    Two floats of state a weight, and O(table) work a step: for tables of up to some 100,000 rows.
    """

    kind: Literal["adam"] = "adam"
    lr: float = Field(1e-3, gt=0)
    betas: Betas = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)


class LazyAdamConfig(Config):
    """Adam on the looked-up rows alone: see :class:`LazyAdam`. Two floats of state a weight."""

    kind: Literal["lazy_adam"] = "lazy_adam"
    lr: float = Field(1e-3, gt=0)
    betas: Betas = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)


FusedConfig = RowwiseAdagradConfig | AdagradConfig | SGDConfig
"""Optimizers that FBGEMM runs inside the backward pass."""

EmbeddingOptimizerConfig = Annotated[FusedConfig | AdamConfig | LazyAdamConfig, Field(discriminator="kind")]


class DenseAdamConfig(Config):
    """Adam (Kingma and Ba, ICLR 2015); ``weight_decay`` is L2, added to the gradient."""

    kind: Literal["adam"] = "adam"
    lr: float = Field(1e-3, gt=0)
    betas: Betas = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)


class DenseAdamWConfig(Config):
    """AdamW (Loshchilov and Hutter, ICLR 2019); ``weight_decay`` is decoupled."""

    kind: Literal["adamw"] = "adamw"
    lr: float = Field(1e-3, gt=0)
    betas: Betas = (0.9, 0.999)
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


class TableRows(NamedTuple):
    """The part of a table that a process holds.

    Attributes:
        weight: (rows, width), the storage itself.
        first: the table's row that stands first in it.
    """

    weight: Tensor
    first: int


def rows_of_tables(model: nn.Module) -> dict[str, TableRows]:
    """Every table of a model whose tables are whole, fused or not, by table."""
    found: dict[str, TableRows] = {}
    for module in model.modules():
        if isinstance(module, EmbeddingBagCollection | FusedEmbeddingBagCollection):
            found |= {name: TableRows(bag.weight, 0) for name, bag in module.embedding_bags.items()}
    return found


def embedding_optimizer(config: FusedConfig) -> EmbeddingOptimizer:
    """The fused optimizer that a config describes, for :func:`fuse_embeddings` or for sharded tables."""
    match config:
        case RowwiseAdagradConfig():
            return EmbeddingOptimizer(RowWiseAdagrad, {"lr": config.lr, "eps": config.eps})
        case AdagradConfig():
            return EmbeddingOptimizer(torch.optim.Adagrad, {"lr": config.lr, "eps": config.eps})
        case SGDConfig():
            return EmbeddingOptimizer(torch.optim.SGD, {"lr": config.lr})


def fuse_embeddings(model: nn.Module, config: FusedConfig, *, device: torch.device) -> KeyedOptimizer:
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


class LazyAdam(torch.optim.Optimizer):
    r"""Adam that reads and writes the rows of the gradient alone.

    .. math:: m_j \leftarrow \beta_1 m_j + (1 - \beta_1) g_j, \qquad v_j \leftarrow \beta_2 v_j + (1 - \beta_2) g_j^2,
              \qquad w_j \leftarrow w_j - \eta \frac{m_j / (1 - \beta_1^t)}{\sqrt{v_j / (1 - \beta_2^t)} + \epsilon}

    for the rows :math:`j` that were looked up. **Bias correction counts steps, not visits**: :math:`t` is the number of
    steps taken, the same for every row. The moments of a row outside the batch wait as they are: they do not decay. A
    row that is first seen late therefore moves by up to :math:`(1 - \beta_1) / \sqrt{1 - \beta_2}` times :math:`\eta`,
    3.2 times with the usual betas. Where every row is in every batch, this is Adam.

    The same rule as ``torch.optim.SparseAdam`` but for :math:`\epsilon`, which stands outside the corrected root, as in
    Adam.

    Source: Kingma and Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015, algorithm 1.

    Args:
        params: (rows, width) each; their gradients must be sparse in the first dimension.
    """

    def __init__(self, params: Iterable[Tensor], *, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {
                    "step": torch.zeros((), dtype=torch.float32),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of every table that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                state["step"] += 1
                t = float(state["step"])
                gradient = p.grad.coalesce()
                rows, g = gradient.indices()[0], gradient.values()
                m = state["exp_avg"].index_select(0, rows).lerp_(g, 1.0 - beta1)
                v = state["exp_avg_sq"].index_select(0, rows).mul_(beta2).addcmul_(g, g, value=1.0 - beta2)
                state["exp_avg"].index_copy_(0, rows, m)
                state["exp_avg_sq"].index_copy_(0, rows, v)
                root = v.sqrt_().div_((1.0 - beta2**t) ** 0.5).add_(group["eps"])
                p.index_add_(0, rows, m.div_(root), alpha=-group["lr"] / (1.0 - beta1**t))


def table_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The tables of collections that are neither fused nor sharded, by name."""
    return {
        f"{path}.{name}": parameter
        for path, module in model.named_modules()
        if isinstance(module, EmbeddingBagCollection)
        for name, parameter in module.named_parameters()
    }


class _SingleIdBag(nn.EmbeddingBag):
    """A sum over bags that all hold one id: the id's vector, without the sorting that gradients of bags take."""

    def forward(
        self,
        input: Tensor,  # noqa: A002 - TorchRec passes it by this name
        offsets: Tensor | None = None,  # noqa: ARG002
        per_sample_weights: Tensor | None = None,  # noqa: ARG002
    ) -> Tensor:
        return functional.embedding(input, self.weight, sparse=self.sparse)

    @classmethod
    def of(cls, bag: nn.EmbeddingBag) -> _SingleIdBag:
        """The same table with the same parameter."""
        single = cls(bag.num_embeddings, bag.embedding_dim, mode=bag.mode, sparse=bag.sparse, _weight=bag.weight.data)
        single.weight = bag.weight
        return single


def optimize_tables(
    tables: dict[str, nn.Parameter], model: nn.Module, config: AdamConfig | LazyAdamConfig
) -> KeyedOptimizer:
    """The optimizer of tables that keep their gradients, its state keyed by table and allocated.

    Args:
        tables: by name, from :func:`table_parameters`; on their device.
        model: theirs; its look-ups give sparse gradients for ``lazy_adam``, dense ones else.
    """
    for module in model.modules():
        if isinstance(module, EmbeddingBagCollection):
            for name, bag in module.embedding_bags.items():
                bag.sparse = isinstance(config, LazyAdamConfig)
                if bag.mode == "sum":  # sets are averaged
                    module.embedding_bags[name] = _SingleIdBag.of(bag)
    if isinstance(config, LazyAdamConfig):
        return KeyedOptimizerWrapper(
            dict(tables), lambda values: LazyAdam(values, lr=config.lr, betas=config.betas, eps=config.eps)
        )
    optimizer = KeyedOptimizerWrapper(
        dict(tables),
        # As for the dense parameters: one pass over a table instead of seven.
        lambda values: torch.optim.Adam(values, config.lr, betas=config.betas, eps=config.eps, fused=True),
    )
    _allocate_state(optimizer)
    return optimizer


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> None:
    r"""Scales gradients, dense and sparse, so that the norm of all of them together is at most ``max_norm``.

    .. math:: g \leftarrow g \cdot \min\left(1, \frac{c}{\lVert g \rVert_2 + 10^{-6}}\right)

    as :func:`torch.nn.utils.clip_grad_norm_`, which takes dense gradients only.
    """
    values = []
    for p in parameters:
        if p.grad is not None and p.grad.is_sparse:
            p.grad = p.grad.coalesce()  # entries of one row must be added before they are squared
        if p.grad is not None:
            values.append(p.grad.values() if p.grad.is_sparse else p.grad)
    if not values:
        return
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(v) for v in values]))
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for v in values:
        v.mul_(scale)


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
        # Fused kernels go over a parameter once where the plain ones go seven times.
        match config:
            case DenseAdamConfig():
                return torch.optim.Adam(
                    values, config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=True
                )
            case DenseAdamWConfig():
                return torch.optim.AdamW(
                    values, config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=True
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
