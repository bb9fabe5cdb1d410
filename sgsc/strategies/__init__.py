"""DQSS: the quantization strategy of each layer, found without retraining or with it."""

from __future__ import annotations

from . import inputs, training, weights
from .calibration import calibrate
from .folding import fold_batch_norms
from .problem import make_problem
from .qat import StrategyTraining
from .registry import INPUTS, WEIGHTS, InputStrategy, WeightStrategy
from .search import Strategies, search_strategies
from .settings import LOSSES, StrategySettings
from .statistics import InputStatistics

__all__ = [
    "INPUTS",
    "LOSSES",
    "WEIGHTS",
    "InputStatistics",
    "InputStrategy",
    "Strategies",
    "StrategySettings",
    "StrategyTraining",
    "WeightStrategy",
    "calibrate",
    "fold_batch_norms",
    "inputs",
    "make_problem",
    "search_strategies",
    "training",
    "weights",
]
