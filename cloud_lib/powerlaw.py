"""The law L = A / N^alpha + B / D^beta + E, and a solver that fits thousands of copies of it at once.

A copy is one start, one bootstrap resample or one point of a likelihood profile; all copies walk together
as rows of NumPy arrays. `scaling` turns runs into fits with it; nothing here knows about runs or files.

Objective: sum_i w_i Huber_delta(log L(N_i, D_i) - log L_i), approach 3 of Hoffmann et al. (2022). It is
summed, not averaged: an average is so small that default tolerances stop the optimizer too early
(Besiroglu et al. 2024, arXiv 2404.10102).

The solver's coordinates are theta = (log T_N, alpha, log T_D, beta, log E), where T_N = A / N^alpha and
T_D = B / D^beta are the two terms at the geometric mean of N and of D. Unlike log A and log B they hardly
correlate with the exponents, and their bounds keep every exponential finite.
"""

from copy import copy
from dataclasses import dataclass

import numpy as np

DELTA = 1e-3       # Huber's delta on log loss (Hoffmann et al., appendix D.3)
WIDE = 0.3         # a delta so wide that the objective is nearly least squares: smooth, few minima
EXPONENTS = 1e-4, 5.0  # bounds of alpha and beta
MAX_PLACES = 200   # smooth minima that walk on; more means a flat valley, where they are all the same
BLOCK = 200_000    # numbers per scratch array (copies x runs); larger blocks gain nothing
CONSTANTS = ("A", "B", "E", "alpha", "beta")
_TERMS = (slice(0, 2), slice(2, 4), slice(4, 5))  # columns of theta that belong to the N, D and E term


@dataclass(frozen=True)
class Law:
    """Constants of L(N, D) = A / N^alpha + B / D^beta + E; L and E in nats per masked token.

    The fields may be arrays of one shape, e.g. one entry per bootstrap resample.
    """

    A: float
    B: float
    E: float
    alpha: float
    beta: float

    @property
    def a(self):
        """Exponent of N_opt(C) = G (C/6)^a (paper, Eq. 5)."""
        return self.beta / (self.alpha + self.beta)

    @property
    def b(self):
        """Exponent of D_opt(C) = G^-1 (C/6)^b (paper, Eq. 5)."""
        return self.alpha / (self.alpha + self.beta)

    @property
    def G(self):
        """Coefficient of the compute-optimal frontier (paper, Eq. 5); at most e^300, where a fit on the
        boundary with two vanishing exponents would have no number."""
        ratio = np.log(self.alpha) + np.log(self.A) - np.log(self.beta) - np.log(self.B)
        return np.exp(np.clip(ratio / (self.alpha + self.beta), -300, 300))

    def loss(self, n_params, data):
        """Predicted loss [nats]; the arguments broadcast with the constants."""
        n, d = np.asarray(n_params, float), np.asarray(data, float)
        return self.A * n ** -self.alpha + self.B * d ** -self.beta + self.E


def huber(r, delta):
    """Huber's function: r^2 / 2 up to delta, delta (|r| - delta / 2) beyond."""
    clipped = np.clip(r, -delta, delta)
    return clipped * (r - 0.5 * clipped)


class Problem:
    """Runs in the solver's coordinates.

    n_params, data, loss: (n,), positive. weights: (n,), or (K, n) with one row per copy (how often a
    bootstrap resample drew each run).
    """

    def __init__(self, n_params, data, loss, weights=None, delta=DELTA):
        log_n, log_d = np.log(n_params), np.log(data)
        self.centre = log_n.mean(), log_d.mean()
        self.target = np.log(loss)
        self.weights = np.ones(len(log_n)) if weights is None else np.asarray(weights, float)
        self.delta = delta
        self.memory = None
        x, y, one = log_n - self.centre[0], log_d - self.centre[1], np.ones_like(log_n)
        self.slopes = np.stack([one, -x]), np.stack([one, -y]), one[None]  # d log(term) / d theta
        self.products = {(i, j): (self.slopes[i][:, None] * self.slopes[j]).reshape(-1, len(x)).T.copy()
                         for i in range(3) for j in range(i + 1)}
        low, high = self.target.min(), self.target.max()
        self.lower = np.array([low - 30, EXPONENTS[0], low - 30, EXPONENTS[0], low - 16])
        self.upper = np.array([high + 3, EXPONENTS[1], high + 3, EXPONENTS[1], high])

    def in_single(self):
        """The same problem in single precision: half the memory, for the rough part of a search."""
        single = copy(self)
        single.memory = None
        single.target, single.weights = self.target.astype(np.float32), self.weights.astype(np.float32)
        single.slopes = tuple(slope.astype(np.float32) for slope in self.slopes)
        single.products = {key: product.astype(np.float32) for key, product in self.products.items()}
        return single

    def theta(self, constants):
        """Rows (A, B, E, alpha, beta) -> rows theta, moved inside the bounds."""
        A, B, E, alpha, beta = np.atleast_2d(constants).T
        rows = np.stack([np.log(A) - alpha * self.centre[0], alpha,
                         np.log(B) - beta * self.centre[1], beta, np.log(E)], axis=1)
        return np.clip(rows, self.lower, self.upper)

    def constants(self, theta):
        """Rows theta -> rows (A, B, E, alpha, beta)."""
        log_tn, alpha, log_td, beta, log_e = np.atleast_2d(theta).T
        return np.stack([np.exp(log_tn + alpha * self.centre[0]), np.exp(log_td + beta * self.centre[1]),
                         np.exp(log_e), alpha, beta], axis=1)

    def residuals(self, theta):
        """(K, n): log of the predicted loss minus log of the loss."""
        logs = np.stack([theta[:, rows] @ slope for rows, slope in zip(_TERMS, self.slopes)])
        return np.logaddexp.reduce(logs, axis=0) - self.target

    def derivatives(self, theta, weights, delta, newton):
        """Objective (K,), gradient (K, 5), Hessian (K, 5, 5) and its majoriser (K, 5, 5).

        The majoriser takes for every Huber term the parabola that touches it from above (iteratively
        re-weighted least squares), so it is positive and steps along it descend. newton=False returns it
        in the place of the Hessian (Gauss-Newton).
        """
        share, r, clipped, force, major, stiff, pull, heavy, pair = self._scratch(len(theta))
        own = theta.astype(self.target.dtype)
        for term, rows, slope in zip(share, _TERMS, self.slopes):
            np.exp(np.matmul(own[:, rows], slope, out=term), out=term)
        np.add(np.add(share[0], share[1], out=r), share[2], out=r)
        share /= r                                                # each term's part of the loss
        np.subtract(np.log(r, out=r), self.target, out=r)
        np.clip(r, -delta, delta, out=clipped)
        np.multiply(weights, clipped, out=force)                  # d objective / d r
        value = np.einsum("kn,kn->k", force, r) - 0.5 * np.einsum("kn,kn->k", force, clipped)
        np.abs(r, out=major)
        if newton:                                                # curvature of Huber, less that of the log
            np.multiply(np.less_equal(major, delta, out=stiff), weights, out=stiff)
            stiff -= force
        np.multiply(np.divide(delta, np.maximum(major, delta, out=major), out=major), weights, out=major)
        gradient, majoriser = np.empty((len(theta), 5)), np.empty((len(theta), 5, 5))
        hessian = np.empty_like(majoriser) if newton else majoriser
        for i, rows in enumerate(_TERMS):
            np.multiply(force, share[i], out=pull)
            np.multiply(major, share[i], out=heavy)
            gradient[:, rows] = pull @ self.slopes[i].T
            for j, columns in enumerate(_TERMS[:i + 1]):
                np.multiply(heavy, share[j], out=pair)
                self._fill(majoriser, rows, columns, pair @ self.products[i, j])
                if newton:
                    np.multiply(np.multiply(stiff, share[i], out=pair), share[j], out=pair)
                    if i == j:
                        pair += pull
                    self._fill(hessian, rows, columns, pair @ self.products[i, j])
        return value.astype(float), gradient, hessian, majoriser

    def _scratch(self, n_copies):
        """Arrays to compute in, kept between calls: (3, n_copies, n) and eight of (n_copies, n).

        Asking the system for this memory at every step costs more than the arithmetic.
        """
        if self.memory is None or self.memory.shape[1] < n_copies:
            self.memory = np.empty((11, n_copies, len(self.target)), self.target.dtype)
        return self.memory[:3, :n_copies], *self.memory[3:, :n_copies]

    @staticmethod
    def _fill(matrix, rows, columns, flat):
        """Write the moments of two terms (K, p*q) into a symmetric matrix."""
        block = flat.reshape(len(flat), rows.stop - rows.start, columns.stop - columns.start)
        matrix[:, rows, columns] = block
        matrix[:, columns, rows] = block.transpose(0, 2, 1)


def minimise(problem, theta, lower=None, upper=None, delta=None, newton=True, max_steps=300, tolerance=1e-11):
    """Minimise the objective from every row of theta (K, 5); returns (theta (K, 5), objective (K,)).

    Newton steps damped by the majoriser (Levenberg-Marquardt) and projected on the bounds; equal bounds
    freeze a parameter. A row stops when a nearly undamped step gains less than tolerance, relatively.
    """
    delta = problem.delta if delta is None else delta
    lower = np.broadcast_to(problem.lower if lower is None else lower, theta.shape)
    upper = np.broadcast_to(problem.upper if upper is None else upper, theta.shape)
    shared = problem.weights.ndim == 1
    best, value = np.empty(theta.shape), np.empty(len(theta))
    copies = max(32, BLOCK // len(problem.target))
    for start in range(0, len(theta), copies):
        rows = slice(start, start + copies)
        weights = problem.weights if shared else problem.weights[rows]
        best[rows], value[rows] = _walk(problem, theta[rows], weights, lower[rows], upper[rows],
                                        delta, newton, max_steps, tolerance)
    return best, value


def _walk(problem, theta, weights, lower, upper, delta, newton, max_steps, tolerance):
    """One block of `minimise`; rows leave the arrays when they have converged."""
    theta = np.clip(theta, lower, upper)
    best, value, live = theta.copy(), np.empty(len(theta)), np.arange(len(theta))
    state = problem.derivatives(theta, weights, delta, newton)
    damping = np.full(len(theta), 0.1)
    for _ in range(max_steps):
        trial = np.clip(theta + _step(theta, *state[1:], damping, lower, upper), lower, upper)
        new = problem.derivatives(trial, weights, delta, newton)
        better = new[0] < state[0]
        done = np.where(better, (state[0] - new[0] <= tolerance * state[0]) & (damping < 1e-2),
                        (np.abs(trial - theta).max(axis=1) <= 1e-13) | (damping > 1e10))
        damping = np.maximum(np.where(better, damping / 3, damping * 4), 1e-12)
        theta = np.where(better[:, None], trial, theta)
        state = [np.where(better.reshape(-1, *[1] * (old.ndim - 1)), fresh, old)
                 for fresh, old in zip(new, state)]
        if done.any():
            best[live[done]], value[live[done]] = theta[done], state[0][done]
            if done.all():
                return best, value
            live, theta, damping, lower, upper, *state = (
                part[~done] for part in (live, theta, damping, lower, upper, *state))
            weights = weights if weights.ndim == 1 else weights[~done]
    best[live], value[live] = theta, state[0]
    return best, value


def _step(theta, gradient, hessian, majoriser, damping, lower, upper):
    """Damped Newton step (K, 5); a parameter pressed against its bound stays there."""
    free = ~(((theta <= lower) & (gradient > 0)) | ((theta >= upper) & (gradient < 0)) | (lower == upper))
    matrix = hessian + damping[:, None, None] * majoriser
    matrix *= free[:, :, None] & free[:, None, :]
    size = np.einsum("kii->k", majoriser)[:, None]
    matrix[:, range(5), range(5)] += np.where(free, 1e-12 * (1 + damping[:, None]) * size + 1e-300, 1.0)
    return -np.linalg.solve(matrix, np.where(free, gradient, 0)[..., None])[..., 0]


def start_grid(problem, n_exponents=10, n_shares=11):
    """Grid of starts (K, 5): exponents 0.05 to 2, and how the middle run's loss splits into three terms.

    The defaults give 10 x 10 exponents times 45 splits = 4,500 starts.
    """
    exponents = np.geomspace(0.05, 2, n_exponents)
    split = np.array([(i, j, n_shares - i - j)
                      for i in range(1, n_shares - 1) for j in range(1, n_shares - i)])
    logs = np.log(split / n_shares) + np.median(problem.target)
    alpha, beta, row = (g.ravel() for g in np.meshgrid(exponents, exponents, range(len(logs)), indexing="ij"))
    return np.stack([logs[row, 0], alpha, logs[row, 1], beta, logs[row, 2]], axis=1)


def search(problem, starts):
    """Best minimum from many starts: (theta (5,), objective, share of starts that led to it).

    Every start first solves the smooth problem (delta = WIDE, single precision). Rows that met there walk
    on as one: the solver is deterministic, so they would never part again. As a check on that detour every
    20th start also descends the true objective directly, crease by crease.
    """
    smooth, depth = minimise(problem.in_single(), starts, delta=WIDE, newton=False, max_steps=50,
                             tolerance=1e-5)
    places, member = _merge(smooth[depth.argsort()])
    theta, value = minimise(problem, np.concatenate([places, starts[::20]]))
    end = np.concatenate([value[:len(places)][member[member >= 0]], value[len(places):]])
    equal = value.min() * (1 + 1e-6) + 1e-6 * problem.delta ** 2
    reached = (end <= equal).sum() / (member.size + len(starts[::20]))
    return theta[value.argmin()], value.min(), reached


def _merge(theta, radius=1e-3):
    """The first MAX_PLACES distinct rows (P, 5); per row (K,) which of them it is within radius of, or -1."""
    member, places = np.full(len(theta), -1), []
    while (member < 0).any() and len(places) < MAX_PLACES:
        place = theta[np.argmax(member < 0)]
        member[(member < 0) & (np.abs(theta - place).max(axis=1) < radius)] = len(places)
        places.append(place)
    return np.array(places), member
