"""Final quality from a cheap look: regression on configuration and partial evaluation.

Baker, Gupta, Raskar and Naik, "Accelerating Neural Architecture Search using Performance Prediction" (2017,
arXiv 1705.10823), predict the final accuracy of networks from the beginning of their learning curves and their
hyperparameters, and stop those that will not do. Here nothing is trained: in place of the learning curve stands
what a model compressed on few texts is worth on few rows. Of the same kinds of regression (linear with a
penalty, trees, nu-SVR) the one of least cross-validated error is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgelm.errors import require

# Fewer results teach nothing; the dense model and the presets are so many.
LEAST = 4
_FOLDS = 5


@dataclass(frozen=True)
class Predictor:
    """A fitted regression.

    Attributes:
        kind: ``ridge``, ``forest`` or ``nu-svr``.
        error: Root mean square of its cross-validated errors, in units of quality.
        errors: The same of each kind.
    """

    kind: str
    error: float
    errors: dict[str, float]
    _fitted: Any

    def __call__(self, features: Sequence[float]) -> float:
        """The predicted quality."""
        return self.many([features])[0]

    def many(self, features: Sequence[Sequence[float]]) -> list[float]:
        """The predicted qualities of several configurations."""
        if not features:
            return []
        return [float(q) for q in self._fitted.predict(np.asarray(features, float))]


def fit(
    features: Sequence[Sequence[float]], qualities: Sequence[float], seed: int
) -> Predictor | None:
    """Fit the regression that foresees best what it has not seen.

    Args:
        features: A row for each configuration that was evaluated in full.
        qualities: What came out.
        seed: Of the folds and the forest.

    Returns:
        The regression; None where there are too few results, or they do not differ.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    if len(qualities) < LEAST or np.ptp(qualities) == 0:
        return None
    select = require("sklearn.model_selection", "tune")
    x, y = np.asarray(features, float), np.asarray(qualities, float)
    folds = select.KFold(min(len(y), _FOLDS), shuffle=True, random_state=seed)
    errors = {}
    for kind, make in _kinds(seed).items():
        predicted = select.cross_val_predict(make(), x, y, cv=folds)
        errors[kind] = float(np.sqrt(np.mean((predicted - y) ** 2)))
    best = min(errors, key=lambda kind: errors[kind])
    return Predictor(best, errors[best], errors, _kinds(seed)[best]().fit(x, y))


def _kinds(seed: int) -> dict[str, Callable[[], Any]]:
    linear = require("sklearn.linear_model", "tune")
    trees = require("sklearn.ensemble", "tune")
    vectors = require("sklearn.svm", "tune")
    scaling = require("sklearn.preprocessing", "tune").StandardScaler
    chain = require("sklearn.pipeline", "tune").make_pipeline
    scaled = require("sklearn.compose", "tune").TransformedTargetRegressor
    return {
        "ridge": lambda: chain(scaling(), linear.Ridge(1.0)),
        "forest": lambda: trees.RandomForestRegressor(30, random_state=seed),
        # Its penalty is in units of the target, which therefore is scaled, too.
        "nu-svr": lambda: scaled(
            chain(scaling(), vectors.NuSVR(nu=0.5, C=10.0)), transformer=scaling()
        ),
    }
