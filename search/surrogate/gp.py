"""Gaussian-process regression with one lengthscale a kind of feature."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import minimize
from torch import Tensor

Array = npt.NDArray[np.float64]

JITTER = 1e-6
MAX_ITERATIONS = 40
# Prior of the logarithms (mean, standard deviation): a metric is mostly additive in what is
# removed, with interactions of half its size, and nearly free of noise.
LINEAR, MATERN, LENGTH, NOISE = (0.0, 1.0), (-0.7, 1.0), (0.7, 0.7), (-5.0, 1.5)


@dataclass(frozen=True)
class Hyperparameters:
    """Logarithms: variance of the linear and of the Matern part, noise, a lengthscale a kind."""

    values: Array

    @classmethod
    def prior(cls, num_kinds: int) -> Hyperparameters:
        """The prior's means."""
        return cls(np.array([LINEAR[0], MATERN[0], NOISE[0], *[LENGTH[0]] * num_kinds]))


class GaussianProcess:
    """Zero-mean regression of standardised targets; linear plus Matern 5/2.

    Rasmussen and Williams 2006, algorithm 2.1; Matern 5/2: eq. 4.17. Distances of each kind of
    features are divided by the square root of its number of features, so that a lengthscale means
    the same for a kind of two and of fifty features.

    Args:
        features: [n, d], each about in 0..1.
        targets: [n].
        kinds: Slices of the columns, one a kind.
        hyperparameters: Found by `fit_hyperparameters`; the prior's means if None.
    """

    def __init__(
        self,
        features: Array,
        targets: Array,
        kinds: Sequence[slice],
        hyperparameters: Hyperparameters | None = None,
    ) -> None:
        self._x = torch.from_numpy(features)
        self._kinds = list(kinds)
        self.mean = float(targets.mean())
        self.scale = float(targets.std()) or 1.0
        self._y = torch.from_numpy((targets - self.mean) / self.scale)
        self._distances, self._products = _geometry(self._x, self._x, self._kinds)
        self._theta = torch.from_numpy(
            (hyperparameters or Hyperparameters.prior(len(self._kinds))).values.copy()
        )
        self._solve()

    def fit_hyperparameters(self) -> Hyperparameters:
        """Maximises the marginal likelihood times the prior, from the prior's means."""

        def loss(values: Array) -> tuple[float, Array]:
            theta = torch.from_numpy(values).requires_grad_(True)
            objective = self._negative_log_posterior(theta)
            objective.backward()  # type: ignore[no-untyped-call]
            assert theta.grad is not None
            return float(objective.detach()), theta.grad.numpy()

        start = Hyperparameters.prior(len(self._kinds)).values
        found = minimize(
            loss, start, jac=True, method="L-BFGS-B", options={"maxiter": MAX_ITERATIONS},
            bounds=[(-9.0, 5.0)] * len(start),
        )  # fmt: skip
        self._theta = torch.from_numpy(found.x)
        self._solve()
        return self.hyperparameters

    @property
    def hyperparameters(self) -> Hyperparameters:
        """Those in use."""
        return Hyperparameters(self._theta.numpy())

    def predict(self, features: Array) -> tuple[Array, Array]:
        """Posterior of the noise-free value at [m, d]: mean and standard deviation, [m] each."""
        x = torch.from_numpy(features)
        cross = self._kernel(*_geometry(x, self._x, self._kinds), self._theta)
        mean = cross @ self._alpha
        half = torch.linalg.solve_triangular(self._cholesky, cross.T, upper=False)
        prior = self._prior_variance(x)
        variance = (prior - half.square().sum(0)).clamp_min(1e-10)
        return (
            (mean * self.scale + self.mean).numpy(),
            (variance.sqrt() * self.scale).numpy(),
        )

    def _solve(self) -> None:
        covariance = self._covariance(self._theta)
        self._cholesky = torch.linalg.cholesky(covariance)
        self._alpha = torch.cholesky_solve(self._y[:, None], self._cholesky)[:, 0]

    def _covariance(self, theta: Tensor) -> Tensor:
        kernel = self._kernel(self._distances, self._products, theta)
        return kernel + (theta[2].exp() + JITTER) * torch.eye(len(kernel), dtype=kernel.dtype)

    def _kernel(self, distances: Tensor, products: Tensor, theta: Tensor) -> Tensor:
        lengths = (-2 * theta[3:]).exp()
        r = ((distances * lengths[:, None, None]).sum(0) + 1e-12).sqrt() * math.sqrt(5)
        matern = (1 + r + r.square() / 3) * (-r).exp()
        return theta[0].exp() * products + theta[1].exp() * matern

    def _prior_variance(self, x: Tensor) -> Tensor:
        total = torch.zeros(len(x), dtype=x.dtype)
        for kind in self._kinds:
            total += (x[:, kind] - 0.5).square().mean(1) if x[:, kind].shape[1] else 0.0
        return self._theta[0].exp() * (1 + total) + self._theta[1].exp()

    def _negative_log_posterior(self, theta: Tensor) -> Tensor:
        cholesky = torch.linalg.cholesky(self._covariance(theta))
        alpha = torch.cholesky_solve(self._y[:, None], cholesky)[:, 0]
        likelihood = 0.5 * self._y @ alpha + cholesky.diagonal().log().sum()
        priors = [LINEAR, MATERN, NOISE, *[LENGTH] * len(self._kinds)]
        mean = torch.tensor([m for m, _ in priors], dtype=theta.dtype)
        spread = torch.tensor([s for _, s in priors], dtype=theta.dtype)
        posterior: Tensor = likelihood + 0.5 * ((theta - mean) / spread).square().sum()
        return posterior


def _geometry(a: Tensor, b: Tensor, kinds: Sequence[slice]) -> tuple[Tensor, Tensor]:
    """Squared distances a kind, [kinds, n, m], and the products of the linear part, [n, m]."""
    distances, products = [], torch.ones(len(a), len(b), dtype=a.dtype)
    for kind in kinds:
        left, right = a[:, kind], b[:, kind]
        size = max(1, left.shape[1])
        distances.append(torch.cdist(left, right).square() / math.sqrt(size))
        products = products + (left - 0.5) @ (right - 0.5).T / size
    return torch.stack(distances), products
