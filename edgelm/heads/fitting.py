"""Heads fitted to the vectors of a frozen encoder: ridge, least squares, logistic. numpy and scipy.

A head's complexity is its penalty, which cross-validation chooses: the data is split into
folds (by group where there are groups), every penalty is tried on every fold, and the one
of the least mean loss outside the folds that were fitted is used on all of the data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import ConfigError, InputError, require

Kind = Literal["ridge", "linear", "logistic"]
Loss = Literal["squared", "softmax", "sigmoid"]
Rows = NDArray[np.float64]
PENALTIES = tuple(10.0**k for k in range(-5, 3))


@dataclass(frozen=True)
class HeadConfig:
    """How a head is fitted.

    Attributes:
        kind: ``ridge`` (closed form), ``linear`` (least squares, without a penalty), or
            ``logistic`` (L-BFGS).
        penalties: Those that are tried, of the mean loss on features of deviation 1.
        folds: Parts of the data that each are left out once.
        seed: Of the folds.
    """

    kind: Kind = "ridge"
    penalties: tuple[float, ...] = PENALTIES
    folds: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        """Validate."""
        if self.kind not in get_args(Kind):
            raise ConfigError(
                f"The 'kind' of a head must be one of {', '.join(get_args(Kind))}. Got {self.kind!r} instead."
            )
        if self.folds < 2:
            raise ConfigError(
                f"The 'folds' of a head must be at least 2. Got {self.folds} instead."
            )
        if not self.penalties or min(self.penalties) <= 0:
            raise ConfigError("The 'penalties' of a head must be above 0.")


@dataclass(frozen=True)
class FittedHead:
    """A head and how it was chosen.

    Attributes:
        weight: float64 ``[features, outputs]``.
        bias: float64 ``[outputs]``.
        penalty: The chosen one; 0 for least squares.
        losses: Each penalty's mean loss on left-out folds.
        held_out: What heads with the chosen penalty gave for the rows that they were not
            fitted to, ``[n, outputs]``; logits where the head is logistic.
    """

    weight: Rows
    bias: Rows
    penalty: float
    losses: dict[float, float]
    held_out: Rows


def fit_head(
    features: NDArray[Any],
    targets: NDArray[Any],
    config: HeadConfig,
    *,
    loss: Loss = "squared",
    groups: Sequence[str] | None = None,
    intercept: bool = True,
) -> FittedHead:
    """Fit a head.

    Least is ``mean loss + penalty / 2 * |weight|^2`` over features brought to mean 0 and
    deviation 1 (which the result has undone); half the squared error, or the cross
    entropy. The bias is not penalised.

    Args:
        features: float ``[n, features]``.
        targets: float ``[n, outputs]``: numbers; for ``softmax`` rows that sum to 1; for
            ``sigmoid`` each 0..1.
        config: How.
        loss: What is least; ``squared`` exactly where the kind is not logistic.
        groups: Group of each row; a group is never split between folds.
        intercept: Whether there is a bias; without it features are scaled, not centred.

    Returns:
        The head.

    Raises:
        InputError: There are fewer rows, or groups, than folds, or a number is not finite.
    """
    x, y = np.asarray(features, np.float64), np.asarray(targets, np.float64)
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise InputError("Features and targets must be finite numbers.")
    parts = folds(len(x), config.folds, config.seed, groups)
    penalties = (0.0,) if config.kind == "linear" else config.penalties
    # From strong to weak: each logistic fit begins where the one before it ended.
    penalties = tuple(sorted(penalties, reverse=True))
    held_out = {p: np.zeros(y.shape) for p in penalties}
    for part in range(config.folds):
        inside, outside = parts != part, parts == part
        heads = _path(x[inside], y[inside], penalties, loss, intercept)
        for penalty, (weight, bias) in zip(penalties, heads, strict=True):
            held_out[penalty][outside] = x[outside] @ weight + bias
    losses = {p: mean_loss(held_out[p], y, loss) for p in penalties}
    best = min(losses, key=lambda p: (losses[p], -p))
    upto = penalties[: penalties.index(best) + 1]
    weight, bias = _path(x, y, upto, loss, intercept)[-1]
    return FittedHead(weight, bias, best, losses, held_out[best])


def folds(
    rows: int, count: int, seed: int, groups: Sequence[str] | None = None
) -> NDArray[np.int64]:
    """Which fold each row is left out with; folds are about equally large.

    Args:
        rows: How many rows.
        count: How many folds.
        seed: Of their order.
        groups: Group of each row; the largest are placed first, each in the smallest fold.

    Returns:
        int64 ``[rows]``, each ``0..count - 1``.

    Raises:
        InputError: There are fewer rows or groups than folds.
    """
    random = np.random.default_rng(seed)
    names = [str(i) for i in range(rows)] if groups is None else list(groups)
    unique, member, sizes = np.unique(names, return_inverse=True, return_counts=True)
    if len(unique) < count:
        what = "rows" if groups is None else "groups"
        raise InputError(
            f"{count} folds need at least {count} {what}; there are {len(unique)}. "
            "Give more data, or ask for fewer folds."
        )
    order = random.permutation(len(unique))
    order = order[np.argsort(-sizes[order], kind="stable")]
    filled = np.zeros(count, np.int64)
    fold_of = np.zeros(len(unique), np.int64)
    for group in order:
        fold_of[group] = filled.argmin()
        filled[fold_of[group]] += sizes[group]
    found: NDArray[np.int64] = fold_of[member]
    return found


def mean_loss(outputs: Rows, targets: Rows, loss: Loss) -> float:
    """Mean over the rows of half the squared error, or of the cross entropy of logits."""
    if loss == "squared":
        return float(0.5 * np.mean(np.sum((outputs - targets) ** 2, axis=1)))
    return _LOGISTIC[loss](outputs, targets)[0]


def _path(
    x: Rows, y: Rows, penalties: Sequence[float], loss: Loss, intercept: bool
) -> list[tuple[Rows, Rows]]:
    """Weight and bias for each penalty, strongest first."""
    centre = x.mean(axis=0) if intercept else np.zeros(x.shape[1])
    scale = np.sqrt(np.mean((x - centre) ** 2, axis=0))
    scale[scale < 1e-12 * max(scale.max(initial=0.0), 1e-300)] = 1.0
    scaled = (x - centre) / scale
    solve = _ridge_path if loss == "squared" else _logistic_path
    heads = []
    for weight, bias in solve(scaled, y, penalties, loss, intercept):
        weight = weight / scale[:, None]
        heads.append((weight, bias - centre @ weight))
    return heads


def _ridge_path(
    x: Rows, y: Rows, penalties: Sequence[float], loss: Loss, intercept: bool
) -> list[tuple[Rows, Rows]]:
    """Closed form for every penalty from one singular value decomposition.

    Hoerl and Kennard 1970: ``weight = V diag(s / (s^2 + n penalty)) U^T y``; without a
    penalty the least-norm solution of least squares.
    """
    middle = y.mean(axis=0) if intercept else np.zeros(y.shape[1])
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    projected = u.T @ (y - middle)
    kept = s > s.max(initial=0.0) * max(x.shape) * np.finfo(np.float64).eps
    heads = []
    for penalty in penalties:
        shrunk = np.divide(s, s**2 + len(x) * penalty, out=np.zeros_like(s), where=kept)
        heads.append((vt.T @ (shrunk[:, None] * projected), middle))
    return heads


def _logistic_path(
    x: Rows, y: Rows, penalties: Sequence[float], loss: Loss, intercept: bool
) -> list[tuple[Rows, Rows]]:
    """L-BFGS (Liu and Nocedal 1989, scipy's), warm-started from penalty to penalty."""
    optimize = require("scipy.optimize", "eval")
    evaluate = _LOGISTIC[loss]
    inputs, outputs = x.shape[1], y.shape[1]
    state = np.zeros((inputs + 1) * outputs)
    heads = []
    for penalty in penalties:

        def objective(flat: Rows, penalty: float = penalty) -> tuple[float, Rows]:
            weight, bias = np.split(flat.reshape(inputs + 1, outputs), [inputs])
            value, slope = evaluate(x @ weight + bias, y)
            gradient = np.vstack([x.T @ slope + penalty * weight, slope.sum(axis=0)])
            if not intercept:
                gradient[-1] = 0.0
            return value + 0.5 * penalty * float((weight**2).sum()), gradient.ravel()

        found = optimize.minimize(
            objective, state, jac=True, method="L-BFGS-B", options={"maxiter": 500}
        )
        state = found.x
        both = state.reshape(inputs + 1, outputs)
        heads.append((both[:-1].copy(), both[-1].copy()))
    return heads


def _softmax_loss(logits: Rows, targets: Rows) -> tuple[float, Rows]:
    """Mean cross entropy and its gradient by the logits."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_sum = np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    log_p = shifted - log_sum
    value = -float(np.mean(np.sum(targets * log_p, axis=1)))
    return value, (np.exp(log_p) - targets) / len(logits)


def _sigmoid_loss(logits: Rows, targets: Rows) -> tuple[float, Rows]:
    """Cross entropy of each output by itself, summed; and its gradient."""
    value = np.logaddexp(0.0, logits) - targets * logits
    probability = 0.5 * (1.0 + np.tanh(0.5 * logits))
    return float(np.mean(value.sum(axis=1))), (probability - targets) / len(logits)


_LOGISTIC: dict[str, Callable[[Rows, Rows], tuple[float, Rows]]] = {
    "softmax": _softmax_loss,
    "sigmoid": _sigmoid_loss,
}
