"""ActivationStatistics: what a compression method knows of a layer's input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
    """

    count: float
    sequences: int
    mean: torch.Tensor
    scatter: torch.Tensor
    within: torch.Tensor
    cross: torch.Tensor | None
    _lost: dict[str, torch.Tensor]

    @classmethod
    def empty(
        cls, width: int, *, gram: bool = False, device: torch.device | str = "cpu"
    ) -> ActivationStatistics:
        """Statistics of no token.

        Args:
            width: Features of the input.
            gram: Whether to keep ``cross``.
            device: Where to keep them.
        """
        mean, scatter, within = torch.zeros(3, width, device=device).unbind()
        cross = torch.zeros(width, width, device=device) if gram else None
        return cls(0.0, 0, mean.clone(), scatter.clone(), within.clone(), cross, {})

    @classmethod
    def of(
        cls, inputs: torch.Tensor, weights: torch.Tensor, *, gram: bool = False
    ) -> ActivationStatistics:
        """Statistics of one batch.

        Args:
            inputs: ``[batch, sequence, in]``, any float dtype.
            weights: Weight of each token, ``[batch, sequence]``; 0 for padding.
            gram: Whether to take ``cross``.
        """
        used = weights.sum(dim=1) > 0
        weights = weights[used].float()
        # Zero weight must silence even a padding row that is not finite.
        inputs = inputs[used].float().masked_fill(weights.unsqueeze(-1) == 0, 0.0)
        if not used.any():
            return cls.empty(inputs.shape[-1], gram=gram, device=inputs.device)
        totals = weights.sum(dim=1, keepdim=True)
        sequence_means = torch.einsum("bt,bti->bi", weights, inputs) / totals
        count = totals.sum()
        mean = (totals * sequence_means).sum(dim=0) / count
        within = torch.einsum(
            "bt,bti->i", weights, (inputs - sequence_means.unsqueeze(1)).square()
        )
        centred = (inputs - mean) * weights.sqrt().unsqueeze(-1)
        flat = centred.flatten(0, 1)
        cross = flat.T @ flat if gram else None
        scatter = (
            cross.diagonal().clone() if cross is not None else flat.square().sum(dim=0)
        )
        return cls(float(count), int(used.sum()), mean, scatter, within, cross, {})

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
        self._sum_("mean", shift * (other.count / count))
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
        mean = total(self._value("mean").double() * (self.count / count)).float()
        shift = self._value("mean") - mean
        scatter = self._value("scatter") + self.count * shift.square()
        cross = None
        if self.cross is not None:
            cross = total(self._value("cross").addr(shift, shift, alpha=self.count))
        within = total(self._value("within").clone())
        return ActivationStatistics(
            count, int(sequences), mean, total(scatter), within, cross, {}
        )

    def __add__(self, other: ActivationStatistics) -> ActivationStatistics:
        """Statistics of the tokens of both."""
        copy = ActivationStatistics.empty(
            len(self.mean), gram=self.cross is not None, device=self.mean.device
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

    def reordered(self, order: torch.Tensor) -> ActivationStatistics:
        """Statistics of the features in another order: position i is feature ``order[i]``."""

        def take(tensor: torch.Tensor) -> torch.Tensor:
            return tensor[order][:, order] if tensor.ndim == 2 else tensor[order]

        lost = {name: take(tensor) for name, tensor in self._lost.items()}
        cross = None if self.cross is None else take(self.cross)
        return ActivationStatistics(
            self.count,
            self.sequences,
            take(self.mean),
            take(self.scatter),
            take(self.within),
            cross,
            lost,
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
