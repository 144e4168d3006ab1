"""Scaling laws: how loss falls with parameters, tokens and compute, and what that says of more.

Idea: over many orders of magnitude the loss of a language model is a sum of powers,

    L(N, D) = E + A / N^α + B / D^β

E the text's own entropy, the rest what too few parameters and too few tokens cost. Fitted to small
runs it says what a large one will reach, and, as training takes 6 N D operations, how a budget of
them is best divided: where no operation lowers the loss more in N than in D.

A fit makes Σ huber(log L − log L̂) least (Hoffmann et al. 2022, eq. 3). They descend by L-BFGS, one
start after another; here all starts, and all resamples of a bootstrap, go down at once by
Levenberg's and Marquardt's steps, with weights that make squares of Huber's loss.

Run: python laws.py        the published laws: what they say, and where they contradict each other

Papers: Kaplan et al. 2020 (arXiv 2001.08361); Hoffmann et al. 2022, Chinchilla (arXiv 2203.15556);
Besiroglu et al. 2024, who fitted its data again (arXiv 2404.10102); Huber 1964; Efron 1979.

Letters: N parameters · D tokens · C operations · n runs · k quantities · B fits at once.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pictures import table
from run import UserError, main

# Of log L: errors beyond it count by their size, not its square. Hoffmann et al. (D.2) have 1e-3,
# which is less than our runs' noise, and makes intervals too narrow.
HUBER = 1e-2
STEEPEST = 5.0  # α; none is negative
RESAMPLED_STEPS = 300  # after which 996 of 1,000 resamples of our runs stand still to 1e-6
PF_DAY = 1e15 * 86_400  # operations

# --- what was published ---------------------------------------------------------------------------


class Law(NamedTuple):
    """E + Σ_k A_k / x_k^α_k."""

    E: float
    A: tuple[float, ...]
    alpha: tuple[float, ...]

    def __call__(self, *x: float | np.ndarray) -> float | np.ndarray:
        terms = zip(self.A, x, self.alpha, strict=True)
        return self.E + sum(A * np.power(x, -alpha) for A, x, alpha in terms)


# nats a token of their texts; Kaplan counts no embeddings, and C in petaflop-days
KAPLAN_N = Law(0.0, (8.8e13**0.076,), (0.076,))  # eq. 1.1: (8.8e13 / N)^0.076, with text enough
KAPLAN_D = Law(0.0, (5.4e13**0.095,), (0.095,))  # eq. 1.2, stopped where it overfits
KAPLAN_C = Law(0.0, (3.1e8**0.050,), (0.050,))  # eq. 1.3, with C divided as is best
HOFFMANN = Law(1.69, (406.4, 410.7), (0.34, 0.28))  # eq. 10, as printed
BESIROGLU = Law(1.8172, (482.01, 2085.43), (0.3478, 0.3658))  # the same runs, fitted again

CHINCHILLA = (  # table 3: parameters, operations, tokens of the best runs, by their first approach
    (400e6, 1.92e19, 8.0e9),
    (1e9, 1.21e20, 20.2e9),
    (10e9, 1.23e22, 205.1e9),
    (67e9, 5.76e23, 1.5e12),
    (175e9, 3.85e24, 3.7e12),
    (280e9, 9.90e24, 5.9e12),
    (520e9, 3.43e25, 11.0e12),
    (1e12, 1.27e26, 21.2e12),
    (10e12, 1.30e28, 216.2e12),
)


def kaplan(N: float | np.ndarray, D: float | np.ndarray) -> float | np.ndarray:
    """[(N_c/N)^(α_N/α_D) + D_c/D]^α_D  (Kaplan et al. 2020, eq. 1.5, constants of table 2)."""
    return ((6.4e13 / N) ** (0.076 / 0.103) + 1.8e13 / D) ** 0.103


def kaplan_optimum(C: float) -> float:
    """N that is best for C operations: 1.3e9 · C^0.73, C in petaflop-days (table 6)."""
    return 1.3e9 * (C / PF_DAY) ** 0.73


def optimum(law: Law, C: float) -> tuple[float, float]:
    """(N, D) with the least loss of all with 6 N D = C  (Hoffmann et al. 2022, eq. 4).

    N = G (C/6)^(β/(α+β)), D = (C/6)^(α/(α+β)) / G, G = (αA / βB)^(1/(α+β)).
    """
    (A, B), (alpha, beta) = law.A, law.alpha
    G = (alpha * A / (beta * B)) ** (1 / (alpha + beta))
    return G * (C / 6) ** (beta / (alpha + beta)), (C / 6) ** (alpha / (alpha + beta)) / G


# --- fits -----------------------------------------------------------------------------------------


class Fit(NamedTuple):
    """A law, and the laws that as good measurements might have given (a bootstrap's)."""

    law: Law
    resampled: list[Law]
    residuals: np.ndarray  # of log L, each as large as one of a new run (n)

    def between(self, value, share: float = 0.95) -> tuple[float, float]:
        """The interval that holds this share of what a function says of the resampled laws."""
        rest = (1 - share) / 2
        low, high = np.quantile([value(law) for law in self.resampled], (rest, 1 - rest))
        return float(low), float(high)


def least(k: int, floor: bool = True) -> int:
    """Runs that a law of k quantities needs: two more than it has numbers."""
    return 2 * k + floor + 2


def fit(
    x: Sequence[Sequence[float]] | np.ndarray,
    losses: Sequence[float] | np.ndarray,
    floor: bool = True,
    delta: float = HUBER,
    resamples: int = 0,
    seed: int = 0,
) -> Fit:
    """The law of runs: x (n k) what each had of each quantity, losses (n). UserError if too few.

    floor: whether the law has an E; without, it is Kaplan's power. delta: Huber's, of log L.
    Resampled are the residuals, made √(n / (n − numbers)) larger, since a fit follows its noise:
    each resample is what the law says of the runs, and some of them drawn for each.
    """
    if not len(losses):
        raise UserError("there is no run that a law could be fitted to")
    x, y = np.asarray(x, float).reshape(len(losses), -1), np.log(np.asarray(losses, float))
    n, k = x.shape
    if n < least(k, floor):
        raise UserError(
            f"{n} runs fit no law of {2 * k + floor} numbers: {least(k, floor) - n} more are needed"
        )
    if any(len(np.unique(column)) < 3 for column in x.T):
        raise UserError("the runs must have at least three values of each quantity")
    middle = np.log(x).mean(0)
    logs = np.log(x) - middle
    found = descend(starts(logs, y, floor), logs, y, delta, floor)
    best = found[np.argmin(objective(found, logs, y, delta))]
    made = predict(best[None], logs)[0][0]
    residuals = (y - made) * (n / (n - 2 * k - floor)) ** 0.5
    drawn = np.random.default_rng(seed).choice(residuals - residuals.mean(), (resamples, n))
    again = descend(
        np.tile(best, (resamples, 1)), logs, made + drawn, delta, floor, RESAMPLED_STEPS
    )
    law, *others = (as_law(theta, middle, floor) for theta in (best, *again))
    return Fit(law, others, residuals)


def as_law(theta: np.ndarray, middle: np.ndarray, floor: bool) -> Law:
    """A fit's numbers, log E, log of each term at the runs' middle, α, as the law's."""
    k = len(middle)
    terms, alpha = theta[1 : 1 + k], theta[1 + k :]
    scale = np.exp(terms + alpha * middle)
    return Law(float(np.exp(theta[0])) if floor else 0.0, tuple(scale), tuple(alpha))


def starts(logs: np.ndarray, y: np.ndarray, floor: bool) -> np.ndarray:
    """Laws to begin with: some E, the rest in equal terms, and all pairs of some α (B 1+2k)."""
    k = logs.shape[1]
    alphas = np.stack(np.meshgrid(*[[0.1, 0.3, 0.6, 1.0]] * k), -1).reshape(-1, k)
    found = []
    for share in (0.1, 0.4, 0.7, 0.95) if floor else (0.0,):
        E = share * np.exp(y.min())
        term = np.log((np.exp(np.median(y)) - E) / k)
        for alpha in alphas:
            found.append([np.log(E) if floor else -np.inf, *[term] * k, *alpha])
    return np.array(found)


def predict(theta: np.ndarray, logs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log L̂ (B n), and its derivatives by the numbers of the law (B n 1+2k)."""
    k = logs.shape[1]
    terms = theta[:, None, 1 : 1 + k] - theta[:, None, 1 + k :] * logs  # B n k
    E = np.broadcast_to(theta[:, :1, None], (*terms.shape[:2], 1))
    all_terms = np.concatenate((E, terms), -1)
    y = np.logaddexp.reduce(all_terms, -1)
    shares = np.exp(all_terms - y[..., None])
    return y, np.concatenate((shares, -shares[..., 1:] * logs), -1)


def huber(r: np.ndarray, delta: float) -> np.ndarray:
    """r²/2 near zero, δ(|r| − δ/2) beyond δ."""
    size = np.abs(r)
    return np.where(size <= delta, r * r / 2, delta * (size - delta / 2))


def objective(theta: np.ndarray, logs: np.ndarray, y: np.ndarray, delta: float) -> np.ndarray:
    """Σ huber(log L̂ − log L) of each fit (B)."""
    return huber(predict(theta, logs)[0] - y, delta).sum(-1)


def descend(
    theta: np.ndarray, logs: np.ndarray, y: np.ndarray, delta: float, floor: bool, steps: int = 3000
) -> np.ndarray:
    """Each of B laws (B 1+2k) to its minimum, for losses y (n) or (B n).

    A step solves (JᵀWJ + λ diag) s = JᵀW r, where weights W = min(1, δ/|r|) make a parabola that
    touches Huber's loss at r and lies nowhere below it; λ falls behind a step that helped.
    """
    theta, y = theta.copy(), np.broadcast_to(y, (len(theta), len(logs)))
    damping, moving = np.full(len(theta), 1e-2), np.arange(len(theta))
    free = slice(None) if floor else slice(1, None)
    for _ in range(steps):
        if not len(moving):
            break
        old, target, damp = theta[moving], y[moving], damping[moving]
        made, J = predict(old, logs)
        r, J = made - target, J[..., free]
        W = delta / np.maximum(np.abs(r), delta)
        H = np.einsum("bnp,bn,bnq->bpq", J, W, J)
        g = np.einsum("bnp,bn->bp", J, W * r)
        ridge = damp[:, None] * (np.einsum("bpp->bp", H) + 1e-9)
        new = old.copy()
        new[:, free] -= np.linalg.solve(H + ridge[..., None] * np.eye(H.shape[-1]), g[..., None])[
            ..., 0
        ]
        new[:, 1 + logs.shape[1] :] = new[:, 1 + logs.shape[1] :].clip(0, STEEPEST)
        before = huber(r, delta).sum(-1)
        after = objective(new, logs, target, delta)
        better = after <= before
        theta[moving[better]] = new[better]
        damping[moving] = np.clip(np.where(better, damp / 4, damp * 4), 1e-9, 1e9)
        still = np.abs(new[:, free] - old[:, free]).max(-1) < 1e-10
        moving = moving[~still]
    return theta


# --- equal compute --------------------------------------------------------------------------------


class Valley(NamedTuple):
    """Runs of one budget: log L ≈ a + b log N + c log² N, with its lowest place."""

    C: float
    N: float  # best
    loss: float  # there
    parabola: np.ndarray  # c, b, a


def valleys(N: np.ndarray, D: np.ndarray, losses: np.ndarray) -> list[Valley]:
    """One for each budget 6 N D (neighbours within 10 %) that has four runs or more, and its lowest
    place between them (Hoffmann et al. 2022, section 3.2)."""
    order = np.argsort(N * D)
    C, found = 6 * (N * D)[order], []
    for here in np.split(order, np.flatnonzero(C[1:] > 1.1 * C[:-1]) + 1):
        if len(here) < 4:
            continue
        x = np.log(N[here])
        c, b, a = np.polyfit(x, np.log(losses[here]), 2)
        if c > 0 and x.min() < (best := -b / (2 * c)) < x.max():
            mean = np.exp(np.log(6 * (N * D)[here]).mean())
            loss = np.exp(np.polyval((c, b, a), best))
            found.append(Valley(float(mean), float(np.exp(best)), float(loss), np.array((c, b, a))))
    return found


def power(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """(k, a) of y = k xᵃ, by least squares of logarithms; of lowest places' C and N, a is that of
    Hoffmann et al. 2022, table 2, of C and their loss −a is Kaplan's α_C."""
    a, k = np.polyfit(np.log(x), np.log(y), 1)
    return float(np.exp(k)), float(a)


# --- the published laws ---------------------------------------------------------------------------


def script() -> None:
    """What the published laws say of the same budgets."""
    lines = []
    for N, C, D in CHINCHILLA:
        row = [f"{C:.2e}", f"{N:.3g}", f"{D / N:.0f}"]
        for law in (HOFFMANN, BESIROGLU):
            n, d = optimum(law, C)
            row += [f"{n:.3g}", f"{d / n:.0f}"]
        lines.append((*row, f"{kaplan_optimum(C):.3g}"))
    head = ("operations", "table 3", "D/N", "eq. 10", "D/N", "again", "D/N", "Kaplan")
    print(table(head, *lines))
    print(
        "\ntable 3: Hoffmann et al. by minima over runs. eq. 10: the law that they print, whose\n"
        "constants ask for other sizes. again: Besiroglu et al. fitted it to the same runs, and\n"
        "come to the table's 20 tokens a parameter. Kaplan: without embeddings, and from runs\n"
        "whose learning rate did not fall to their end."
    )
    lines = [(f"{N:.1e}", f"{KAPLAN_N(N):.2f}", f"{kaplan(N, 300e9):.2f}",
              f"{HOFFMANN(N, 300e9):.2f}") for N in (1e8, 1e9, 1e10, 1.75e11)]  # fmt: skip
    print("\nnats a token, each of its own text:")
    print(table(("parameters", "Kaplan, D = ∞", "D = 300e9", "Hoffmann"), *lines))


if __name__ == "__main__":
    main(script)
