"""What a run is: a folder with its settings, its measurements, its checkpoints and its pictures.

    runs/<name>/config.json        everything needed to build the run again
                metrics.jsonl      one line per measured step
                log.txt            what the terminal said
                tokenizer.json     text <-> ids, in Hugging Face's format
                checkpoints/step-000500/   model.safetensors, train_state.safetensors,
                                           train_state.json, manifest.json (a hash of each)
                loss.png           the picture

A checkpoint is written to a temporary folder, synced to the disk and then renamed: it is there
whole or not at all. Nothing is ever unpickled.

Also here, because every script needs them: streams of randomness with names, and errors that are
one sentence for the person at the terminal.

Run: python -m pytest tests/test_run.py
"""

import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

RUNS = Path("runs")
KEEP = 2  # checkpoints kept: the newest, and one before it in case that one is damaged


class UserError(Exception):
    """Something the person at the keyboard can mend: one sentence, exit status 2, no traceback."""


def main(script: Callable[[], None]) -> None:
    """Run a script; a UserError becomes its sentence and exit status 2, Ctrl-C exit status 130."""
    try:
        script()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def generator(seed: int, name: str, step: int = 0) -> torch.Generator:
    """A stream of randomness for each (seed, purpose, step); nothing global is seeded."""
    digest = hashlib.blake2b(f"{seed}/{name}/{step}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


# --- the folder -----------------------------------------------------------------------------------


class Run:
    """A run's folder. `Run.create` makes one, `Run.open` finds one."""

    def __init__(self, folder: Path):
        self.folder = folder

    @classmethod
    def create(cls, name: str, config: object) -> "Run":
        """A new folder runs/<name>, or runs/run-001, run-002 … if no name is given."""
        if not name:
            taken = [re.fullmatch(r"run-([0-9]+)", p.name) for p in RUNS.glob("run-*")]
            name = f"run-{max((int(t[1]) for t in taken if t), default=0) + 1:03d}"
        if name != Path(name).name or name.startswith("."):
            raise UserError(f"--name {name!r} cannot be the name of a folder in {RUNS}/")
        run = cls(RUNS / name)
        if run.folder.exists():
            raise UserError(
                f"{run.folder} exists already: go on with --name {name} --resume, "
                "or choose another --name"
            )
        try:
            (run.folder / "checkpoints").mkdir(parents=True)
        except OSError as error:
            raise UserError(f"cannot make the run folder {run.folder}: {error.strerror}") from None
        write_json(run.folder / "config.json", config)
        return run

    @classmethod
    def open(cls, name: str = "") -> "Run":
        """The run of this name (or path), or the newest one if no name is given."""
        if not name:
            found = sorted(RUNS.glob("*/config.json"), key=lambda p: p.stat().st_mtime)
            if not found:
                raise UserError(f"there is no run in {RUNS}/ yet: make one with python train.py")
            return cls(found[-1].parent)
        folder = next((p for p in (RUNS / name, Path(name)) if p.is_dir()), None)
        if folder is None:
            raise UserError(
                f"there is no run named {name!r}: neither {RUNS / name} nor {name} exists"
            )
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder} is not a run: it has no config.json")
        return cls(folder)

    def config(self) -> dict:
        return read_json(self.folder / "config.json")

    def log(self, text: str = "") -> None:
        """Print, above a progress bar if there is one, and keep in log.txt."""
        tqdm.write(text)
        with open(self.folder / "log.txt", "a", encoding="utf-8") as file:
            file.write(text + "\n")

    def measure(self, **values) -> None:
        """One line of metrics.jsonl."""
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def metrics(self) -> list[dict]:
        """All measurements, up to the first line that a killed process has left unfinished."""
        path = self.folder / "metrics.jsonl"
        rows = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
        return rows

    def forget_after(self, step: int) -> None:
        """Drop the measurements after a step, so that a resumed run writes them once."""
        kept = [json.dumps(row) + "\n" for row in self.metrics() if row["step"] <= step]
        write_whole(self.folder / "metrics.jsonl", "".join(kept).encode())

    # --- checkpoints

    def save(
        self, step: int, model: dict[str, Tensor], state: dict[str, Tensor], info: dict
    ) -> Path:
        """Write checkpoints/step-<step>, whole or not at all; drop old ones and any later one.

        A later one was damaged, or the run would have gone on from it.
        """
        final = self.folder / "checkpoints" / f"step-{step:06d}"
        if damage(final) is None:  # stopped just after it was resumed
            return final
        for left in final.parent.glob(".step-*.draft"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        draft = final.with_name(f".{final.name}.draft")
        draft.mkdir(parents=True)
        save_file(plain(model), draft / "model.safetensors", metadata={"format": "pt"})
        save_file(plain(state), draft / "train_state.safetensors")
        (draft / "train_state.json").write_text(json.dumps({"step": step, **info}, indent=1))
        write_json(draft / "manifest.json", {p.name: digest(p) for p in sorted(draft.iterdir())})
        for path in (*draft.iterdir(), draft):
            sync(path)
        shutil.rmtree(final, ignore_errors=True)
        draft.rename(final)
        sync(final.parent)
        found = self.checkpoints()
        at = found.index(final)
        for other in found[:at] + found[at + KEEP :]:
            shutil.rmtree(other, ignore_errors=True)
        return final

    def checkpoints(self) -> list[Path]:
        """Finished checkpoints, the newest first."""
        found = (self.folder / "checkpoints").glob("step-*")
        return sorted((p for p in found if re.fullmatch(r"step-\d{6,}", p.name)), reverse=True,
                      key=lambda p: int(p.name[5:]))  # fmt: skip

    def newest(self) -> Path:
        """The newest checkpoint that is what its manifest says; what is passed over is told."""
        for path in self.checkpoints():
            fault = damage(path)
            if fault is None:
                return path
            print(f"passed over {path}: {fault}", file=sys.stderr)
        raise UserError(f"{self.folder} has no whole checkpoint to load")


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
        for name in ("model.safetensors", "train_state.safetensors", "train_state.json"):
            if manifest[name] != digest(checkpoint / name):
                return f"{name} is not what was written"
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read the weights in {path}: {error}") from None


# --- files ----------------------------------------------------------------------------------------


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new, never a part."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    draft.write_bytes(data)
    sync(draft)
    draft.replace(path)


def write_json(path: Path, value: object) -> None:
    value = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
    write_whole(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"cannot read {path}: it should hold a JSON object")
    return value


def sync(path: Path) -> None:
    """Wait until a file's or a folder's content is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().cpu().contiguous() for name, t in tensors.items()}


# --- pictures -------------------------------------------------------------------------------------


def plot_loss(run: Run, lzma: float | None = None) -> Path:
    """loss.png: bits per byte over the steps, training and held out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = run.metrics()
    train, held = (
        [(r["step"], r[name]) for r in rows if math.isfinite(r.get(name, math.nan))]
        for name in ("train_bits_per_byte", "bits_per_byte")
    )
    figure, axes = plt.subplots(figsize=(8, 4.5), constrained_layout=True)
    if train:
        steps, values = zip(*train, strict=True)
        axes.plot(steps, values, color="#9db7d5", linewidth=0.8, label="training, each step")
        axes.plot(steps, smooth(values), color="#1f4e8c", linewidth=1.8, label="training, smoothed")
    if held:
        steps, values = zip(*held, strict=True)
        axes.plot(
            steps, values, "o-", color="#c8442d", markersize=4, linewidth=1.2, label="held out"
        )
        axes.annotate(f"{values[-1]:.3f}", (steps[-1], values[-1]), textcoords="offset points",
                      xytext=(0, -14), ha="center", color="#c8442d")  # fmt: skip
    if lzma is not None:
        axes.axhline(lzma, color="#777777", linestyle="--", linewidth=1, label="held out, by lzma")
    low = min([value for _, value in train + held], default=0)
    axes.set(xlabel="step", ylabel="bits per byte", title=run.folder.name, ylim=(0.9 * low, None))
    axes.set_ylim(top=min(axes.get_ylim()[1], 8))
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    path = run.folder / "loss.png"
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def smooth(values: tuple[float, ...], memory: float = 0.95) -> list[float]:
    """Running mean Σ memoryⁱ·x / Σ memoryⁱ, which owes nothing to its start."""
    out, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = memory * total + value, memory * weight + 1
        out.append(total / weight)
    return out


def timestamp() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")
