"""Tables and pictures, which all look alike: few lines, no frame, and no color that must be seen.

Lines differ by how they are drawn as well as by color, and so also in grey or to the color-blind.

Run: python -m pytest tests/test_run.py -k "picture or table or loss"
"""

import io
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from run import Run, write_whole


def table(*lines: tuple[str, ...]) -> str:
    """Columns, the first to the left, the others to the right; the first line is their head."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        (f"{line[0]:{widths[0]}}  " + "  ".join(map(str.rjust, line[1:], widths[1:]))).rstrip()
        for line in lines
    )


LINES = ("-", "--", ":", "-.")  # with which lines differ where colors do not, as in grey


@contextmanager
def picture(path: Path, columns: int = 1, size: tuple[float, float] = (8, 4.5)) -> Iterator[list]:
    """Pairs of axes beside each other, to draw on; in the end a PNG, written whole or not at all.

    matplotlib is imported here, since it takes its time and most commands draw nothing.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, columns, figsize=size, constrained_layout=True, squeeze=False)
    for each in axes[0]:
        each.grid(alpha=0.25)
        each.spines[["top", "right"]].set_visible(False)
    try:
        yield list(axes[0])
        made = io.BytesIO()
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # unknown letters
            figure.savefig(made, dpi=130)
    finally:
        plt.close(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, made.getvalue())


def plot_loss(run: Run, lzma: float | None = None) -> Path:
    """loss.png: bits per byte over the steps, training and held out; nats where that has none."""
    rows = run.metrics()
    in_bits = any("train_bits_per_byte" in r for r in rows)
    names = ("train_bits_per_byte", "bits_per_byte") if in_bits else ("loss", "held_out_loss")
    train, held = (
        [(r["step"], x) for r in rows if isinstance(x := r.get(name), float) and 0 <= x < math.inf]
        for name in names
    )
    path = run.folder / "loss.png"
    with run.writing(path), picture(path) as (axes,):
        if train:
            steps, values = zip(*train, strict=True)
            axes.plot(steps, values, color="#9db7d5", linewidth=0.8, label="training, each step")
            axes.plot(steps, smooth(values, 0.95), color="#1f4e8c", linewidth=1.8,
                      label="training, smoothed")  # fmt: skip
        if held:
            steps, values = zip(*held, strict=True)
            axes.plot(
                steps, values, "o-", color="#c8442d", markersize=4, linewidth=1.2, label="held out"
            )
            axes.annotate(f"{values[-1]:.3f}", (steps[-1], values[-1]), textcoords="offset points",
                          xytext=(0, -14), ha="center", color="#c8442d")  # fmt: skip
        if lzma is not None and in_bits:
            axes.axhline(
                lzma, color="#777777", linestyle="--", linewidth=1, label="held out, by lzma"
            )
        low = min([value for _, value in train + held], default=0)
        axes.set(xlabel="step", ylabel="bits per byte" if in_bits else "nats per token asked",
                 ylim=(0.9 * low, None))  # fmt: skip
        axes.set_title(run.folder.name, parse_math=False)
        axes.set_ylim(top=min(axes.get_ylim()[1], 8))
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
    return path


def plot_scales(run: Run) -> Path:
    """scales.png: each block's stream and gradient over the steps that were looked into."""
    rows = [row for row in run.metrics() if isinstance(row.get("scales"), dict)]
    path = run.folder / "scales.png"
    kinds = {"activation": "stream behind each block", "gradient": "gradient of its weights"}
    with run.writing(path), picture(path, 2, (12, 4.5)) as both:
        for axes, (kind, title) in zip(both, kinds.items(), strict=True):
            for n, values in enumerate(zip(*(r["scales"][kind] for r in rows), strict=True)):
                shade = shade_of(n, len(rows[0]["scales"][kind]))
                axes.plot([r["step"] for r in rows], values, color=shade, label=f"block {n}")
            axes.set(xlabel="step", title=f"{title}, root mean square", yscale="log")
        if rows:
            both[0].legend(frameon=False, ncol=2, fontsize="small")
    return path


def shade_of(n: int, of: int) -> tuple[float, float, float]:
    """From light to dark blue, with the depth."""
    share = (n + 1) / of
    return 0.75 - 0.65 * share, 0.85 - 0.6 * share, 0.95 - 0.4 * share


def smooth(values: Sequence[float], memory: float = 0.7) -> list[float]:
    """Running mean Σ memoryⁱ·x / Σ memoryⁱ, which owes nothing to its start."""
    out, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = memory * total + value, memory * weight + 1
        out.append(total / weight)
    return out
