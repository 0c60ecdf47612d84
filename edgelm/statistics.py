"""ActivationStatistics: what a compression method knows of a layer's input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch


@dataclass
class ActivationStatistics:
    """Moments of the input of a layer, over tokens; padding excluded.

    Everything is kept centred, so that a mean far from zero costs no digits, and
    sums carry a compensation term (Neumaier 1974), so that float32 does not drown
    small batches in a large total. Two statistics of different tokens add up to
    the statistics of all of them (Chan, Golub and LeVeque 1983).

    Attributes:
        count: Sum of the tokens' weights.
        sequences: Number of sequences.
        mean: float32 ``[in]``.
        scatter: Sum of squared deviations from ``mean``, float32 ``[in]``.
        within: The same from each sequence's own mean, float32 ``[in]``.
        cross: Sum of products of deviations, float32 ``[in, in]``, or None where no
            method asks for it. Its diagonal is ``scatter``.
        drift_mean: Mean of the drift of the layer's output, float32 ``[out]``: what the
            layers before have changed in it. Of size 0 where it is not followed.
        drift_scatter: Sum of its squared deviations, float32 ``[out]``.
        drift_cross: Sum of products of its deviations and the input's, float32
            ``[out, in]``.
    """

    count: float
    sequences: int
    mean: torch.Tensor
    scatter: torch.Tensor
    within: torch.Tensor
    cross: torch.Tensor | None
    drift_mean: torch.Tensor
    drift_scatter: torch.Tensor
    drift_cross: torch.Tensor
    _lost: dict[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def empty(
        cls,
        width: int,
        *,
        gram: bool = False,
        outputs: int = 0,
        device: torch.device | str = "cpu",
    ) -> ActivationStatistics:
        """Statistics of no token.

        Args:
            width: Features of the input.
            gram: Whether to keep ``cross``.
            outputs: Features of the drift; 0 not to follow it.
            device: Where to keep them.
        """

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, device=device)

        cross = zeros(width, width) if gram else None
        moments = zeros(width), zeros(width), zeros(width), cross
        drift = zeros(outputs), zeros(outputs), zeros(outputs, width)
        return cls(0.0, 0, *moments, *drift)

    @classmethod
    def of(
        cls,
        inputs: torch.Tensor,
        weights: torch.Tensor,
        *,
        gram: bool = False,
        drift: torch.Tensor | None = None,
    ) -> ActivationStatistics:
        """Statistics of one batch.

        Args:
            inputs: ``[batch, sequence, in]``, any float dtype.
            weights: Weight of each token, ``[batch, sequence]``; 0 for padding.
            gram: Whether to take ``cross``.
            drift: Of the layer's output, ``[batch, sequence, out]``; None not to
                follow it.
        """
        used = weights.sum(dim=1) > 0
        weights = weights[used].float()
        if drift is None:
            drift = inputs[..., :0]
        # Zero weight must silence even a padding row that is not finite. These are copies.
        inputs, drift = (
            x[used].float().masked_fill(weights.unsqueeze(-1) == 0, 0.0)
            for x in (inputs, drift)
        )
        if not used.any():
            width, outputs = inputs.shape[-1], drift.shape[-1]
            return cls.empty(width, gram=gram, outputs=outputs, device=inputs.device)
        totals = weights.sum(dim=1)
        count = totals.sum()
        means = torch.bmm(weights.unsqueeze(1), inputs).squeeze(1) / totals.unsqueeze(1)
        mean = (totals @ means) / count
        own = (inputs - means.unsqueeze(1)).square_().flatten(0, 1)
        root = weights.sqrt().unsqueeze(-1)
        flat = inputs.sub_(mean).mul_(root).flatten(0, 1)
        cross = flat.T @ flat if gram else None
        scatter = (
            cross.diagonal().clone() if cross is not None else flat.square().sum(dim=0)
        )
        drift_mean = weights.flatten() @ drift.flatten(0, 1) / count
        moved = drift.sub_(drift_mean).mul_(root).flatten(0, 1)
        return cls(
            float(count),
            int(used.sum()),
            mean,
            scatter,
            weights.flatten() @ own,
            cross,
            drift_mean,
            moved.square().sum(dim=0),
            moved.T @ flat,
        )

    def add_(self, other: ActivationStatistics) -> ActivationStatistics:
        """Add the statistics of other tokens in place; returns self."""
        if other.count == 0:
            return self
        count = self.count + other.count
        shift = other._value("mean") - self._value("mean")
        between = self.count * other.count / count
        self._sum_("scatter", other._value("scatter") + between * shift.square())
        self._sum_("within", other._value("within"))
        if self.cross is not None and other.cross is not None:
            cross = other._value("cross")
            self._sum_("cross", cross.addr(shift, shift, alpha=between))
        moved = other._value("drift_mean") - self._value("drift_mean")
        scatter = other._value("drift_scatter") + between * moved.square()
        self._sum_("drift_scatter", scatter)
        cross = other._value("drift_cross").addr(moved, shift, alpha=between)
        self._sum_("drift_cross", cross)
        self._sum_("mean", shift * (other.count / count))
        self._sum_("drift_mean", moved * (other.count / count))
        self.count = count
        self.sequences += other.sequences
        return self

    def summed(
        self, total: Callable[[torch.Tensor], torch.Tensor]
    ) -> ActivationStatistics:
        """Statistics of the tokens of several processes.

        Args:
            total: Adds a tensor up over the processes; gives each the same.
        """
        own = torch.tensor([self.count, self.sequences], dtype=torch.float64)
        count, sequences = total(own.to(self.mean.device)).tolist()

        def of_all(name: str) -> torch.Tensor:
            return total(self._value(name).double() * (self.count / count)).float()

        mean, drift_mean = of_all("mean"), of_all("drift_mean")
        shift = self._value("mean") - mean
        moved = self._value("drift_mean") - drift_mean
        between = self.count
        cross = None
        if self.cross is not None:
            cross = total(self._value("cross").addr(shift, shift, alpha=between))
        drift_cross = self._value("drift_cross").addr(moved, shift, alpha=between)
        return ActivationStatistics(
            count,
            int(sequences),
            mean,
            total(self._value("scatter") + between * shift.square()),
            total(self._value("within").clone()),
            cross,
            drift_mean,
            total(self._value("drift_scatter") + between * moved.square()),
            total(drift_cross),
        )

    def __add__(self, other: ActivationStatistics) -> ActivationStatistics:
        """Statistics of the tokens of both."""
        copy = ActivationStatistics.empty(
            len(self.mean),
            gram=self.cross is not None,
            outputs=len(self.drift_mean),
            device=self.mean.device,
        )
        return copy.add_(self).add_(other)

    @property
    def variance(self) -> torch.Tensor:
        """Population variance over all tokens, ``[in]``."""
        return self._value("scatter") / self.count

    @property
    def within_variance(self) -> torch.Tensor:
        """Token-weighted mean of the sequences' own population variances, ``[in]``."""
        return self._value("within") / self.count

    @property
    def second_moment(self) -> torch.Tensor:
        """``E[x^2]`` per feature, ``[in]``; its root is Wanda's norm per token."""
        return self.variance + self._value("mean").square()

    def gram(self, *, centred: bool = False) -> torch.Tensor:
        """``E[x x^T]``, or with ``centred`` the covariance, ``[in, in]``.

        Raises:
            ValueError: The statistics were taken without it.
        """
        if self.cross is None:
            raise ValueError("These statistics were taken without the Gram matrix.")
        covariance = self._value("cross") / self.count
        mean = self._value("mean")
        return covariance if centred else covariance.addr(mean, mean)

    def drift(self, *, centred: bool = False) -> torch.Tensor:
        """``E[d x^T]`` of the drift d, or with ``centred`` its covariance, ``[out, in]``."""
        covariance = self._value("drift_cross") / self.count
        mean, moved = self._value("mean"), self._value("drift_mean")
        return covariance if centred else covariance.addr(moved, mean)

    @property
    def drift_variance(self) -> torch.Tensor:
        """Population variance of the drift, ``[out]``."""
        return self._value("drift_scatter") / self.count

    def of_outputs(self, rows: slice) -> ActivationStatistics:
        """With the drift of some of the outputs; everything else is shared."""
        lost = dict(self._lost)
        for name in ("drift_mean", "drift_scatter", "drift_cross"):
            if name in lost:
                lost[name] = lost[name][rows]
        return replace(
            self,
            drift_mean=self.drift_mean[rows],
            drift_scatter=self.drift_scatter[rows],
            drift_cross=self.drift_cross[rows],
            _lost=lost,
        )

    def _sum_(self, name: str, term: torch.Tensor) -> None:
        """``self.name += term``, keeping what float32 loses."""
        total: torch.Tensor = getattr(self, name)
        result = total + term
        first_is_larger = total.abs() >= term.abs()
        lost = torch.where(
            first_is_larger, (total - result) + term, (term - result) + total
        )
        self._lost[name] = self._lost[name] + lost if name in self._lost else lost
        setattr(self, name, result)

    def _value(self, name: str) -> torch.Tensor:
        total: torch.Tensor = getattr(self, name)
        return total + self._lost[name] if name in self._lost else total
