"""Bugs to plant in scaling laws and forecasts; `tests/bugs.py` says what they are for.

Many happened: a learning rate that did not fall to a run's end made Kaplan's exponents (Hoffmann et
al. 2022, section 2), a mean in the place of a sum of Huber's losses let L-BFGS stop early and made
Chinchilla's constants and its intervals too narrow (Besiroglu et al. 2024, section 4).
"""

BUGS = {
    "laws": (
        ("test_laws.py",),
        [
            ("np.power(x, -alpha)", "np.power(x, alpha)"),
            ("8.8e13**0.076", "8.8e13**0.095"),
            ("1.3e9 * (C / PF_DAY)", "1.3e9 * C"),
            ("(6.4e13 / N) ** (0.076 / 0.103)", "(6.4e13 / N) ** 0.076"),
            ("G = (alpha * A / (beta * B))", "G = (A / B)"),
            ("return G * (C / 6) ** (beta / (alpha", "return G * C ** (beta / (alpha"),
            ("(C / 6) ** (alpha / (alpha + beta)) / G", "(C / 6) ** (alpha / (alpha + beta))"),
            ("rest = (1 - share) / 2", "rest = 1 - share"),
            ("return 2 * k + floor + 2", "return 2 * k + floor"),
            ("(y - made) * (n / (n - 2 * k - floor)) ** 0.5", "(y - made) * 0.5"),
            ("scale = np.exp(terms + alpha * middle)", "scale = np.exp(terms)"),
            ("-shares[..., 1:] * logs", "shares[..., 1:] * logs"),
            ("delta * (size - delta / 2)", "delta * size"),
            ("W = delta / np.maximum(np.abs(r), delta)", "W = np.ones_like(r)"),
            ("better = after <= before", "better = after >= before"),
            ("C[1:] > 1.1 * C[:-1]", "C[1:] > 11 * C[:-1]"),
            ("if len(here) < 4", "if len(here) < 3"),
            ("if c > 0 and x.min()", "if x.min()"),
            ("-b / (2 * c)", "-b / c"),
        ],
    ),
    "forecast": (
        ("test_forecast.py",),
        [
            ("np.log(SHARES * steps), np.log(x), y", "SHARES * steps, x, y"),
            ("SHARES * steps < x[0] - 0.5", "SHARES * steps < 0"),
            (
                "NormalDist().inv_cdf((1 + holds) / 2)\n        return",
                "NormalDist().inv_cdf(holds)\n        return",
            ),
            ("math.exp(OUTSIDE * spread)", "math.exp(2 * OUTSIDE * spread)"),
            ("rho * spread / then * math.log", "rho * math.log"),
            ("math.sqrt(1 - rho**2)", "1"),
            ("run.curve[share] for run in runs]", "run.curve[-1] for run in runs]"),
            ("for run in runs) / 1.5", "for run in runs) * 1.5"),
            ("if top > r.N * r.D]", "if r.N * r.D]"),
            ("max(noise, misfit(runs, i))", "noise"),
            ("max(SURE, math.hypot(doubt,", "min(SURE, math.hypot(doubt,"),
            ("not np.isfinite(numbers).all()", "False"),
            ("min(*found.middle, *found.spread, found.shares[0]) <= 0", "False"),
            ("    if forecast.held_out != held_out:", "    if False:"),
            ("        if said != is_:", "        if said < is_:"),
            ("loss <= forecast.limit(share)", "loss <= forecast.middle[-1]"),
            ("share < forecast.shares[0] * 0.99 or ", ""),
        ],
    ),
    "budgets": (
        ("test_forecast.py",),
        [
            ("C / (6 * size", "C / (2 * size"),
            ("max(1, steps // 20),", "max(1, steps // 10),"),
            ("if steps >= self.least:", "if True:"),
            ("step_of(one) == config.steps]", "True]"),
            ("losses[-1] > 1.1 * min(losses)", "losses[-1] > 9 * min(losses)"),
            ('if config.objective != "causal":', "if False:"),
            ("    if len(marks) > 1:", "    if len(marks) > 2:"),
            ("if config.factor * most <= r.N * r.D", "if most <= r.N * r.D"),
            ("inside += low <= r.loss <= high", "inside += r.loss <= low"),
            ("config.steps * UPDATE\n", "config.steps\n"),
        ],
    ),
}
