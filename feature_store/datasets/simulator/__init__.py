"""Click logs of any size with a known answer.

:func:`simulate` writes the views of a :class:`SimulatorConfig` and, beside them, the true click probability of every
impression: the best possible AUC and logloss are known, and a model can be judged against them. See
:mod:`feature_store.datasets.simulator.world` for the formula.
"""

from feature_store.datasets.simulator.ceiling import Ceiling
from feature_store.datasets.simulator.config import SimulatorConfig
from feature_store.datasets.simulator.simulate import SimulationSummary, simulate

__all__ = ["Ceiling", "SimulationSummary", "SimulatorConfig", "simulate"]
