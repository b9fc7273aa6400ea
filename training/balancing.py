"""Weights of tasks that are learnt while training: by uncertainty, or by the norms of their gradients.

A balance takes each task's loss, summed over rows, and adds them up. It comes on top of ``task_weights``: what it sees
is weighted by them already.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from recsys.config import Config
from recsys.errors import ConfigError, nearest


class NoBalancing(Config):
    """Tasks weigh what ``task_weights`` says."""

    kind: Literal["none"] = "none"


class UncertaintyBalancing(Config):
    """:class:`Uncertainty` (Kendall et al., CVPR 2018), trained by ``dense_optimizer`` without its weight decay."""

    kind: Literal["uncertainty"] = "uncertainty"


class GradNormBalancing(Config):
    """:class:`GradNorm` (Chen et al., ICML 2018); in one process only."""

    kind: Literal["gradnorm"] = "gradnorm"
    shared: tuple[str, ...] = Field(
        min_length=1,
        description="layers or parameters of the network whose gradients are compared, such as `mlp.rest.linears.0`; "
        "paper: the last layer that all tasks share",
    )
    alpha: float = Field(1.5, ge=0, description="how strongly slower tasks are pushed; paper: 1.5 on its first data")
    lr: float = Field(0.025, gt=0, description="of the Adam that moves the weights; our choice")


BalancingConfig = Annotated[NoBalancing | UncertaintyBalancing | GradNormBalancing, Field(discriminator="kind")]


class Uncertainty(nn.Module):
    r"""Each task's loss over its learnt noise.

    .. math:: \sum_t e^{-s_t} \ell_t + \frac{c_t}{2} s_t, \qquad s_t = \log \sigma_t^2

    with :math:`\ell_t` the cross-entropy summed over the :math:`c_t` rows that have the label: the likelihood of the
    labels that are there, so that a task with few labels moves its :math:`s_t` little, and one without any not at all.
    At rest :math:`e^{s_t}` is twice the mean loss of the task's labelled rows.

    Source: Kendall, Gal, Cipolla, "Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and
    Semantics", CVPR 2018, section 3.2: classification, whose loss is divided by :math:`\sigma^2`, with their
    approximation of the normaliser.

    Args:
        num_tasks: T.
    """

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        self.log_variance = nn.Parameter(torch.zeros(num_tasks))

    def forward(self, sums: Tensor, num_labelled: Tensor) -> Tensor:
        """The sum over tasks, a scalar.

        Args:
            sums: (T,) loss of each task over this rank's rows that have its label.
            num_labelled: (T,) these rows, weighted as the task is.
        """
        return (torch.exp(-self.log_variance) * sums + 0.5 * self.log_variance * num_labelled).sum()

    @property
    def current(self) -> Tensor:
        """(T,) what each task's loss is multiplied by: :math:`e^{-s}`."""
        return torch.exp(-self.log_variance.detach())


class GradNorm(nn.Module):
    r"""Weights under which tasks pull on shared parameters alike, slower tasks more.

    With :math:`\ell_t` the mean loss of the task's labelled rows, :math:`W` the shared parameters and

    and :math:`L_t` the sum of the task's losses over them,

    .. math:: G_t = \lVert \nabla_W w_t L_t \rVert_2, \qquad
              r_t = \frac{\ell_t / \ell_t(0)}{\operatorname{mean}_u \ell_u / \ell_u(0)}

    the weights descend :math:`\sum_t | G_t - \bar G r_t^\alpha |`, whose second term is held constant, by a step of
    Adam, and are scaled so that they add up to T again. The weights of a step come from the steps before it.

    Source: Chen, Badrinarayanan, Lee, Rabinovich, "GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep
    Multitask Networks", ICML 2018, equations 1 and 2, algorithm 1.

    Differs from source: :math:`G_t` is of sums over labelled rows, as the training loss is, so that a task with few
    labels is pulled up for it; a task without a label in a batch is left out of the means, and its weight moves with
    the scaling alone; :math:`\ell_t(0)` is of the first batch that has the task's label; a weight is at least 0.001
    before the scaling.

    Args:
        num_tasks: T.
        shared: W.
        alpha: :math:`\alpha`, at least 0.
        lr: of the weights.
    """

    weights: Tensor
    first: Tensor
    step: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor

    def __init__(
        self,
        num_tasks: int,
        shared: Sequence[nn.Parameter],
        *,
        alpha: float,
        lr: float,
    ) -> None:
        super().__init__()
        self._shared, self._alpha, self._lr = tuple(shared), alpha, lr
        self.register_buffer("weights", torch.ones(num_tasks))
        self.register_buffer("first", torch.full((num_tasks,), torch.nan))
        for name in ("step", "exp_avg", "exp_avg_sq"):
            self.register_buffer(name, torch.zeros(num_tasks))

    def forward(self, sums: Tensor, num_labelled: Tensor) -> Tensor:
        """The sum over tasks, a scalar, as :meth:`Uncertainty.forward`; moves the weights of the next step."""
        total = (self.weights.clone() * sums).sum()
        if torch.is_grad_enabled() and sums.requires_grad:
            self._update(sums, num_labelled)
        return total

    def _update(self, sums: Tensor, num_labelled: Tensor) -> None:
        norms = self._gradients(sums).norm(dim=1)
        losses, counts = sums.detach(), num_labelled
        present = counts > 0
        losses = losses / counts.clamp(min=torch.finfo(counts.dtype).tiny)
        # DIFF(paper): the first batch with the label rather than the first; means over the tasks that are present.
        self.first = torch.where(self.first.isnan() & present, losses, self.first)
        share = present.to(norms.dtype) / present.sum().clamp(min=1)
        ratio = torch.where(present, losses / self.first, 0.0)
        rate = ratio / (ratio @ share).clamp(min=1e-12)
        pull = self.weights * norms
        gradient = torch.sign(pull - (pull @ share) * rate**self._alpha) * norms
        # Adam of the usual betas; a task without labels waits.
        self.step += present
        self.exp_avg = torch.where(present, self.exp_avg.lerp(gradient, 0.1), self.exp_avg)
        self.exp_avg_sq = torch.where(present, self.exp_avg_sq.lerp(gradient.square(), 0.001), self.exp_avg_sq)
        t = self.step.clamp(min=1)
        move = (self.exp_avg / (1 - 0.9**t)) / ((self.exp_avg_sq / (1 - 0.999**t)).sqrt() + 1e-8)
        # DIFF(paper): bounded below, because a weight of 0 would never come back and a negative one ascends.
        weights = (self.weights - self._lr * torch.where(present, move, 0.0)).clamp(min=1e-3)
        self.weights = weights * (len(weights) / weights.sum())

    def _gradients(self, sums: Tensor) -> Tensor:
        """(T, size of W)."""
        rows = []
        for task_sum in sums:
            parts = torch.autograd.grad(task_sum, self._shared, retain_graph=True, materialize_grads=True)
            rows.append(torch.cat([p.detach().flatten() for p in parts]))
        return torch.stack(rows)

    @property
    def current(self) -> Tensor:
        """(T,) what each task's loss is multiplied by."""
        return self.weights


def build_balance(
    config: BalancingConfig, num_tasks: int, parameters: Mapping[str, nn.Parameter]
) -> Uncertainty | GradNorm | None:
    """What a config describes; None for none.

    Args:
        parameters: of the model outside its tables, by name.

    Raises:
        ConfigError: what is shared is not in the network.
    """
    match config:
        case NoBalancing():
            return None
        case UncertaintyBalancing():
            return Uncertainty(num_tasks)
        case GradNormBalancing():
            shared = _named(config.shared, parameters)
            return GradNorm(num_tasks, shared, alpha=config.alpha, lr=config.lr)


def _named(wanted: Iterable[str], parameters: Mapping[str, nn.Parameter]) -> list[nn.Parameter]:
    network = {name.removeprefix("network."): p for name, p in parameters.items()}
    found = []
    for name in wanted:
        own = [p for full, p in network.items() if full == name or full.startswith(f"{name}.")]
        if not own:
            raise ConfigError(
                f"training.task_balancing.shared must name layers or parameters of the network, got {name!r}",
                hint=nearest(name, [*network, *{full.rpartition(".")[0] for full in network}]),
            )
        found += own
    return found
