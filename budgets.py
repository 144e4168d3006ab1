"""Small runs that say what a larger one will reach: a grid of sizes and budgets, and its law.

    run        train the grid, runs that differ in width and length only, and fit it
    fit        the law of runs that are there: exponents with intervals, the best size of a budget
    forecast   what a larger run will reach, as a file that train.py --forecast holds it to
    judge      larger runs that have ended beside what smaller ones say of them

Idea: with 6 N D operations one can train a large model shortly or a small one long, and for each
budget some size is best. Runs of several budgets show where, and how the lowest places move.

Run: python scaling.py run                        19 runs, ten to twenty minutes; a picture
     python scaling.py forecast --width 96 --steps 1920
     python scaling.py judge --large "large-*"    larger runs, made by run --name large …

Papers: Hoffmann et al. 2022 (arXiv 2203.15556), sections 3.2 and 3.3; Kaplan et al. 2020 (arXiv
2001.08361).

Letters: N parameters · D tokens · C operations · L bits per byte.
"""

import math
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from documents import files_of
from forecast import Forecast, Small, curve, evaluations, forecast, law_of, write
from laws import Law, Valley, optimum, power, valleys
from model import ModelConfig
from pictures import picture, table
from run import RUNS, Run, UserError, main, read_json, step_of
from scaling import parameters
from stages import choose, finished
from training import stored

COMMON = ("--tokenizer.kind", "bytes", "--data.held-out", "0.02", "--model.context", "128",
          "--batch", "8")  # fmt: skip
UPDATE = 8 * 128  # bytes of one update of these
LEAST = 140  # updates of a run that counts: fewer say little of many


def shape(width: int) -> ModelConfig:
    """A model of a width, whose depth and heads grow with it."""
    return ModelConfig(
        dim=width, layers=max(1, width // 32), heads=max(1, width // 16), context=128,
        vocab_size=257,
    )  # fmt: skip


def size(model: ModelConfig) -> int:
    return sum(parameters(model).values())


def command(name: str, width: int, steps: int, path: str) -> list[str]:
    """What begins a run of the grid, of Python's texts or a path's; it is measured twenty times."""
    c = shape(width)
    sizes = {"--model.dim": c.dim, "--model.layers": c.layers, "--model.heads": c.heads,
             "--steps": steps, "--evaluate-every": max(1, steps // 20),
             "--save-every": steps}  # fmt: skip
    own = ["--data.path", path] if path else []
    return ["train.py", "--name", name, *COMMON, *own,
            *(str(x) for pair in sizes.items() for x in pair)]  # fmt: skip


# --- the commands ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """Train runs of every width with every budget, and fit their law."""

    name: str = "small"  # of the runs: <name>-<width>-<steps>
    widths: tuple[int, ...] = (16, 24, 32, 48, 64)  # of the models
    budgets: tuple[float, ...] = (0.5e11, 1e11, 2e11, 4e11)  # operations, 6 N D
    least: int = LEAST  # updates below which a run is left out
    path: str = ""  # text to train on: a file, folder or glob; empty: Python's own documentation

    def __post_init__(self):
        if any(w < 16 or (w % 16 and w != 24) for w in self.widths) or not self.widths:
            raise UserError("widths must be multiples of 16, or 24")
        if not all(1e6 <= C <= 1e21 for C in self.budgets) or not self.budgets:
            raise UserError("--budgets must be from 1e6 to 1e21 operations")
        if self.least < 1:
            raise UserError("--least must be at least 1")

    def runs(self) -> dict[str, list[str]]:
        """Names, and the command of each."""
        found = {}
        for C in self.budgets:
            for width in self.widths:
                steps = max(1, round(C / (6 * size(shape(width))) / UPDATE / 20)) * 20
                name = f"{self.name}-{width}-{steps}"
                if steps >= self.least:
                    found[name] = command(name, width, steps, self.path)
        return found


@dataclass(frozen=True)
class Fitted:
    """The law of runs that are there."""

    runs: tuple[str, ...] = ("small-*",)  # names, * for anything
    budget: float = 1e13  # operations, for which the best size is asked

    def __post_init__(self):
        if not 1e6 <= self.budget <= 1e30:
            raise UserError("--budget must be from 1e6 to 1e30 operations")


@dataclass(frozen=True)
class Told:
    """What a larger run will reach, as a file."""

    runs: tuple[str, ...] = ("small-*",)  # that say it
    width: int = 96  # of the larger one
    steps: int = 1920  # and its updates
    out: str = "forecast.json"  # where it is written

    def __post_init__(self):
        Grid(widths=(self.width,))
        if self.steps < 1:
            raise UserError("--steps must be at least 1")


@dataclass(frozen=True)
class Judged:
    """Larger runs beside what smaller ones say of them."""

    runs: tuple[str, ...] = ("small-*",)  # that say it
    large: tuple[str, ...] = ("large-*",)  # that it is said of
    factor: float = 10.0  # a larger run has so many times the operations of the largest small one


def grid(config: Grid) -> None:
    """Train what is not there yet; a run that fails is named, and the others go on."""
    if config.path:
        files_of(config.path)  # before any run
    runs, failed = config.runs(), []
    for name in runs:
        check_text(name, config.path)
    for name, words in tqdm(runs.items(), "runs", leave=False, disable=None):
        known = (RUNS / name / "config.json").is_file()
        if known and finished(Run.open(name)):
            continue
        file, *flags = ["train.py", "--resume", "--name", name] if known else words
        program = [sys.executable, str(Path(__file__).with_name(file)), *flags]
        made = subprocess.run(program, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if made.returncode == 130:
            raise KeyboardInterrupt
        if made.returncode:
            failed.append(f"{name} failed: {made.stderr.strip().splitlines()[-1:] or ''}")
    print("\n".join(failed) + "\n" if failed else "", end="")
    show(Fitted(tuple(runs), 10 * max(config.budgets)))


def check_text(name: str, path: str) -> None:
    """UserError if there is a run of this name that learnt from another text."""
    if not (RUNS / name / "config.json").is_file():
        return
    data = stored(Run.open(name)).data
    if (data.path, data.source, data.mix) != (path, "files", ()):
        other = " ".join(data.mix) or data.path or data.source
        text = "Python's own documentation" if other == "files" else other
        raise UserError(f"{name} was trained on {text}: choose another --name")


# --- reading runs ---------------------------------------------------------------------------------


def read(names: Sequence[str]) -> tuple[list[Small], list[str], str]:
    """(runs that count, why others do not, the mark of their held-out documents).

    UserError if nothing has such a name, if none counts, or if they were measured on different
    documents. Their tokenizers may differ: bits per byte do not ask which one.
    """
    paths = sorted({p for name in names for p in RUNS.glob(f"{name}/config.json")})
    if not paths:
        raise UserError(f"no run in {RUNS}/ is named {' or '.join(names)}: python scaling.py run")
    runs, left, marks = [], [], {}
    for path in paths:
        run = Run(path.parent)
        config, found = stored(run), evaluations(run)
        ends = [one for one in run.checkpoints() if step_of(one) == config.steps]
        if config.objective != "causal":
            left.append(f"{run.name}: {config.objective}, which has no bits per byte")
        elif not ends or not found or found[-1][0] != config.steps:
            left.append(f"{run.name}: has not come to its end")
        elif not all(math.isfinite(x) for _, x in found) or diverged([x for _, x in found]):
            left.append(f"{run.name}: has diverged")
        else:
            last = [row for row in run.metrics() if row["step"] == config.steps][-1]
            marks[read_json(ends[-1] / "train_state.json").get("held_out", "")] = run.name
            losses = curve(found, config.steps)
            runs.append(Small(run.name, size(config.model), last["tokens"], losses))
    if not runs:
        raise UserError(f"none of these runs counts: {left[0]}")
    if len(marks) > 1:
        raise UserError(
            f"{' and '.join(marks.values())} were measured on different held-out documents, and "
            "cannot be compared: give runs of one text and one --data.held-out"
        )
    return runs, left, next(iter(marks), "")


def diverged(losses: Sequence[float]) -> bool:
    """Has it ended far above where it has been?"""
    return losses[-1] > 1.1 * min(losses)


def named(left: Sequence[str]) -> str:
    return "".join(f"left out {why}\n" for why in left)


# --- what they say --------------------------------------------------------------------------------


def show(config: Fitted) -> None:
    """Table, law, optimum and picture."""
    runs, left, _ = read(config.runs)
    print(named(left), end="")
    found = law_of(runs, resamples=400)
    lines = [(r.name, f"{r.N:,}", f"{r.D:,}", f"{6 * r.N * r.D:.2g}", f"{r.loss:.3f}",
              f"{found.law(r.N, r.D):.3f}") for r in runs]  # fmt: skip
    print(table(("", "N", "D", "operations", "bits per byte", "law"), *lines))
    E, (A, B), (alpha, beta) = found.law
    print(
        f"\nL(N, D) = {E:.3f} + {A:.3g}/N^{alpha:.3f} + {B:.3g}/D^{beta:.3f}; without the last "
        "term L(N), of text\nwithout end, without the middle one L(D), of endless models. 95 % of "
        "the bootstrap lie in:"
    )
    numbers = {
        "E": lambda law: law.E,
        "α": lambda law: law.alpha[0],
        "β": lambda law: law.alpha[1],
        f"best N for {config.budget:.0e} operations": lambda law: optimum(law, config.budget)[0],
        "and D": lambda law: optimum(law, config.budget)[1],
        "its loss": lambda law: law(*optimum(law, config.budget)),
    }
    lines = [(name, *(f"{x:,.3f}" if x < 100 else f"{x:,.0f}"
                      for x in (value(found.law), *found.between(value))))
             for name, value in numbers.items()]  # fmt: skip
    print(table(("", "", "from", "to"), *lines))
    lowest = valleys(*np.array([(r.N, r.D, r.loss) for r in runs], float).T)
    for v in lowest:
        print(f"equal compute {v.C:.2g}: best N {v.N:,.0f}, {v.loss:.3f} bits per byte")
    if len(lowest) > 1:
        C = [v.C for v in lowest]
        k, a = power(C, [v.N for v in lowest])
        scale, slope = power(C, [v.loss for v in lowest])
        print(f"along these N = {k:.3g} · C^{a:.2f}, and L(C) = {scale:.3g} · C^{slope:.3f}")
    print(f"\npicture: {draw(runs, found.law, lowest, RUNS / 'scaling.png')}")


def draw(runs: Sequence[Small], law: Law, lowest: Sequence[Valley], path: Path) -> Path:
    """Left each budget's runs over N, with their parabolas; right all runs over compute."""
    C = np.array([6 * r.N * r.D for r in runs])
    with picture(path, 2, (12, 4.5)) as (left, right):
        for v in lowest:
            here = [r for r in runs if abs(math.log(6 * r.N * r.D / v.C)) < 0.1]
            N = np.geomspace(min(r.N for r in here), max(r.N for r in here), 50)
            (line,) = left.plot(N, np.exp(np.polyval(v.parabola, np.log(N))))
            left.plot([r.N for r in here], [r.loss for r in here], "o", color=line.get_color(),
                      label=f"{v.C:.1g} operations")  # fmt: skip
            left.plot(v.N, v.loss, "*", ms=14, color=line.get_color())
        right.plot(C, [r.loss for r in runs], "o", color="#9db7d5", label="runs")
        x = np.geomspace(C.min() / 2, C.max() * 30, 50)
        right.plot(x, [law(*optimum(law, c)) for c in x], color="#1f4e8c", label="best, by the law")
        left.set(xscale="log", yscale="log", xlabel="parameters", ylabel="bits per byte")
        right.set(xscale="log", yscale="log", xlabel="operations, 6 N D")
        for axes in (left, right):
            axes.legend(frameon=False)
            axes.yaxis.set_minor_formatter("{x:.1f}")
    return path


def tell(config: Told) -> None:
    """Write a forecast, and say what begins its run."""
    runs, left, held_out = read(config.runs)
    print(named(left), end="")
    name = f"large-{config.width}-{config.steps}"
    words = command(name, config.width, config.steps, stored(Run.open(runs[0].name)).data.path)
    begin = shlex.join(["python", *words, "--forecast", config.out])
    N, D = size(shape(config.width)), config.steps * UPDATE
    told = forecast(runs, N, D, begin, held_out)
    write(told, Path(config.out))
    low, high = told.interval()
    print(
        f"{N:,} parameters, {D:,} tokens, {6 * N * D / max(6 * r.N * r.D for r in runs):.1f} × the "
        f"operations of the largest of {len(runs)} runs:\n{told.middle[-1]:.3f} bits per byte, in "
        f"4 of 5 cases from {low:.3f} to {high:.3f}\n\nwritten to {config.out}; now\n  {begin}"
    )


def judge(config: Judged) -> None:
    """The forecasts of larger runs, from the smaller ones alone, beside what was measured."""
    runs, left, mark = read(config.runs)
    large, more, other = read(config.large)
    print(named([*left, *more]), end="")
    if mark != other:
        raise UserError("smaller and larger runs were measured on different held-out documents")
    most = max(r.N * r.D for r in runs)
    told = {r: forecast(runs, r.N, r.D, "", mark) for r in map(frozen, large)
            if config.factor * most <= r.N * r.D}  # fmt: skip
    if not told:
        raise UserError(
            f"none of the larger runs has {config.factor:g} × the operations of the largest of the "
            "smaller ones: lower --factor, or train larger ones"
        )
    lines, inside, errors = [], 0, []
    for r, of in told.items():
        (low, high), error = of.interval(), of.middle[-1] / r.loss - 1
        inside += low <= r.loss <= high
        errors.append(abs(error))
        lines.append((r.name, f"{r.N * r.D / most:.1f} ×", f"{of.middle[-1]:.3f}",
                      f"{low:.3f} to {high:.3f}", f"{r.loss:.3f}", f"{error:+.1%}",
                      "inside" if low <= r.loss <= high else "outside"))  # fmt: skip
    print(table(("", "operations", "forecast", "80 %", "measured", "error", ""), *lines))
    print(f"\n{inside} of {len(told)} inside; median error {np.median(errors):.1%}")
    print(f"picture: {draw_judged(runs, told, RUNS / 'forecast.png')}")


def frozen(run: Small) -> Small:
    """A run that can be the key of a table."""
    return run._replace(curve=tuple(run.curve))


def draw_judged(runs: Sequence[Small], told: dict[Small, Forecast], path: Path) -> Path:
    """Over compute the small runs, and of each larger one what was forecast and measured."""
    with picture(path) as (axes,):
        axes.plot([6 * r.N * r.D for r in runs], [r.loss for r in runs], "o", color="#9db7d5",
                  label=f"{len(runs)} small runs, from which the law is fitted")  # fmt: skip
        # runs of one budget stand beside each other
        for n, (r, of) in enumerate(told.items()):
            x, (low, high) = 6 * r.N * r.D * 1.06 ** (n % 5), of.interval()
            axes.plot([x, x], [low, high], color="#1f4e8c", lw=6, alpha=0.4, solid_capstyle="butt",
                      label=None if n else "forecast, 80 %")  # fmt: skip
            axes.plot(x, of.middle[-1], "_", color="#1f4e8c", ms=9)
            axes.plot(x, r.loss, "o", color="#c8442d", ms=5, label=None if n else "measured")
        axes.set(xscale="log", yscale="log", xlabel="operations, 6 N D", ylabel="bits per byte")
        axes.yaxis.set_minor_formatter("{x:.1f}")
        axes.yaxis.set_major_formatter("{x:.0f}")
        axes.legend(frameon=False)
    return path


STAGES = {"run": (Grid, grid), "fit": (Fitted, show), "forecast": (Told, tell),
          "judge": (Judged, judge)}  # fmt: skip

if __name__ == "__main__":
    main(lambda: choose(STAGES, ["run"], __doc__))
