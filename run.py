"""What a run is: a folder with its settings, its measurements, its checkpoints and its pictures.

    runs/<name>/config.json        everything needed to build the run again
                metrics.jsonl      one line per measured step
                log.txt            what the terminal said
                tokenizer.json     text <-> ids, in Hugging Face's format
                checkpoints/step-000500/   model.safetensors, train_state.safetensors,
                                           train_state.json, manifest.json (a hash of each)
                loss.png           the picture
                skips.json         which updates were left out, where a guard did so
                forecast.json      what was said of it before it began, where that was asked for
                lock               held by the process that writes here, whose number it has

No run is lost to a kill, a crash or a full disk: what is written is written beside its place,
synced to the disk and then renamed, and so is there whole or not at all. Damage is known by hashes:
settings have their own, a checkpoint one for each file. Nothing is ever unpickled.

Also here, because every script needs them: streams of randomness with names, errors that are one
sentence for the person at the terminal, and a look at a flag before all are read.

Run: python -m pytest tests/test_run.py
"""

import hashlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, is_dataclass
from itertools import count, islice, pairwise
from pathlib import Path
from reprlib import repr as short
from typing import Literal, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows: there two processes can write to one run
    fcntl = None

Tensors = dict[str, Tensor]
RUNS = Path("runs")
KEEP = 2  # checkpoints kept: the newest, and one before it in case that one is damaged


class UserError(Exception):
    """Something the person at the keyboard can mend: one sentence, exit status 2, no traceback."""


class Taken(UserError):
    """Another process has this name, or writes to this run."""


def main(script: Callable[[], None]) -> None:
    """Run a script; what its user can mend is one sentence and exit status 2, Ctrl-C is 130.

    A terminal that knows only some characters gets the others as escapes. SIGTERM ends the script
    like an exception, so that nothing half made is left behind.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        script()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `| head` has seen enough
        drop_output()
    except Exception as error:
        if (said := sentence(error)) is None:
            raise
        print(f"error: {said}", file=sys.stderr)
        drop_output()
        sys.exit(2)
    finally:
        signal.signal(signal.SIGTERM, before)


def start(script: str, *flags: str, told: bool = True) -> None:
    """Run one of our scripts as a user would; its failure is ours.

    torchrun's RANK is not for it, or it would wait for others.
    """
    if told:
        print(f"\n$ python {shlex.join((script, *flags))}\n", flush=True)
    program = [sys.executable, str(Path(__file__).with_name(script)), *flags]
    env = {name: value for name, value in os.environ.items() if name != "RANK"}
    if code := subprocess.run(program, env=env).returncode:
        sys.exit(code)


def first_run() -> None:
    """Where nobody named a run: train a small one, if there is none."""
    if not any(RUNS.glob("[!.]*/config.json")):
        print("there is no run yet: training a small model first")
        start("train.py", "--steps", "200")


def drop_output() -> None:
    """What could not be printed is not tried again when Python ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def sentence(error: Exception) -> str | None:
    """What to say of an error that its user can mend; None for a bug."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):  # whoever knew more about it has said so in a UserError
        return f"{error.filename or 'the output'}: {error.strerror or error}"
    full = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    if full or isinstance(error, MemoryError | torch.OutOfMemoryError):
        return "this takes more memory than there is: choose smaller sizes"
    return None


def generator(seed: int, name: str, step: int = 0) -> torch.Generator:
    """A stream of randomness for each (seed, purpose, step); nothing global is seeded."""
    digest = hashlib.blake2b(f"{seed}/{name}/{step}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def value_of(flag: str, arguments: list[str]) -> str:
    """What stands behind a flag or its equals sign, the last time that it is given."""
    words = [w for a in arguments for w in (a.split("=", 1) if a.startswith("--") else [a])]
    return dict(pairwise([*words, ""])).get(flag, "")


# --- the folder -----------------------------------------------------------------------------------


def check_free(name: str, go_on: str = "go on with {}, or ") -> None:
    """UserError if no new folder in runs/, and no word behind a flag, can have this name.

    go_on: what to do with a run that has it, {} being the flags.
    """
    proper = name.isprintable() and name[:1] not in (".", "-") and len(name.encode()) <= 200
    if name != Path(name).name or not proper:
        raise UserError(f"--name {name!r} cannot be the name of a folder in {RUNS}/")
    if os.path.lexists(RUNS / name):
        again = shlex.join(["--name", name, "--resume"])
        raise Taken(f"{RUNS / name} exists already: {go_on.format(again)}choose another")


class Run:
    """A run's folder: `create` makes one, `open` finds one to read, `resume` one to go on with."""

    def __init__(self, folder: Path):
        self.folder = folder

    @classmethod
    def create(cls, name: str, config: object) -> "Run":
        """A new folder runs/<name>, or runs/run-001, run-002 … if no name is given.

        It appears with its settings or not at all, and this process is the one that writes to it.
        """
        if name:
            return cls._create(name, config)
        numbers = [re.fullmatch(r"run-([0-9]+)", p.name) for p in RUNS.glob("run-*")]
        last = max((int(n[1]) for n in numbers if n), default=0)
        for number in count(last + 1):  # several that start together get one each
            with suppress(Taken):
                return cls._create(f"run-{number:03d}", config)

    @classmethod
    def _create(cls, name: str, config: object) -> "Run":
        check_free(name)
        folder, run = RUNS / name, cls(RUNS / f".{name}.draft")
        try:
            run.folder.mkdir(parents=True, exist_ok=True)  # it exists if its maker was killed
            run.lock()
            (run.folder / "checkpoints").mkdir(exist_ok=True)
            run.keep(config)
            run.folder = run.folder.rename(folder)
        except OSError as error:
            check_free(name)  # was another process faster?
            shutil.rmtree(run.folder, ignore_errors=True)
            raise UserError(f"cannot make the run folder {folder}: {error.strerror}") from None
        with run.writing(folder):
            sync(RUNS)
        return run

    @classmethod
    def open(cls, name: str = "") -> "Run":
        """The run of this name (or path), or the newest one if no name is given."""
        if not name:
            found = sorted(RUNS.glob("[!.]*/config.json"), key=lambda p: p.stat().st_mtime)
            if not found:
                raise UserError(f"there is no run in {RUNS}/ yet: make one with python train.py")
            return cls(found[-1].parent)
        folder = next((p for p in (RUNS / name, Path(name)) if os.path.isdir(p)), None)
        if folder is None:
            raise UserError(f"there is no run named {name!r}: no folder {RUNS / name} or {name}")
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder} is not a run: it has no config.json")
        return cls(folder)

    @classmethod
    def resume(cls, name: str = "") -> "Run":
        """The run that `open` finds, if no other process writes to it."""
        run = cls.open(name)
        with run.writing(run.folder / "lock"):
            run.lock()
        return run

    def lock(self) -> None:
        """Be the only process that writes here until this one ends, however it ends."""
        self.file = open(self.folder / "lock", "a+", errors="replace")  # noqa: SIM115 or it is lost
        try:
            if fcntl:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.seek(0)
            writer = re.sub(r"\D", "", self.file.read(20))
            raise Taken(
                f"process {writer} is writing to {self.folder}: wait for its end, or stop it"
            ) from None
        except OSError:
            pass  # a file system without locks
        for left in self.folder.glob(".*.draft"):  # by a process that was killed
            left.unlink()
        self.file.truncate(0)
        self.file.write(f"{os.getpid()}\n")
        self.file.flush()

    @property
    def name(self) -> str:
        """What `open` finds it by."""
        return self.folder.name if self.folder.parent == RUNS else str(self.folder)

    @property
    def command(self) -> str:
        """How to go on with this run."""
        return shlex.join(["python", "train.py", "--name", self.name, "--resume"])

    @contextmanager
    def writing(self, path: Path) -> Iterator[None]:
        """A disk that is full, read-only or broken becomes one sentence that says how to go on."""
        try:
            yield
        except BrokenPipeError:  # main knows what that means
            raise
        except (OSError, SafetensorError) as error:
            why = error.strerror if isinstance(error, OSError) else f"{error}".split(": ")[-1]
            raise UserError(f"cannot write {path}: {why}; mend that, then {self.command}") from None

    # --- settings

    def config(self) -> dict:
        """The settings as they were written, or a UserError."""
        return read_sealed(self.folder / "config.json")

    def keep(self, config: object) -> None:
        """Write config.json, with a hash of itself."""
        values = asdict(config) if is_dataclass(config) else config
        write_sealed(self.folder / "config.json", values)

    # --- measurements

    def log(self, text: str = "") -> None:
        """Print, above a progress bar if there is one, and keep in log.txt."""
        text = text.encode(errors="backslashreplace").decode()  # a path may be no text
        path = self.folder / "log.txt"
        with self.writing(path), open(path, "a", encoding="utf-8") as file:
            file.write(text + "\n")
        with self.writing(Path("the output")):
            tqdm.write(text)
            sys.stdout.flush()  # a pipe shows it now

    def measure(self, **values) -> None:
        """One line of metrics.jsonl."""
        path = self.folder / "metrics.jsonl"
        with self.writing(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def metrics(self) -> list[dict]:
        """All measurements; damaged lines, as a killed process leaves one, are passed over."""
        path = self.folder / "metrics.jsonl"
        try:
            lines, rows = path.read_bytes().splitlines(), []
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        for line in lines:
            with suppress(ValueError, LookupError, TypeError, RecursionError):
                row = json.loads(line)
                if isinstance(row["step"], int) and 0 <= row["step"] < 1 << 53:
                    rows.append(row)
        if lost := len(lines) - len(rows):
            print(f"passed over {lost} of {len(lines)} lines in {path}: damaged", file=sys.stderr)
        return rows

    def forget_after(self, step: int) -> None:
        """Drop the measurements after a step, so that a resumed run writes them once."""
        path = self.folder / "metrics.jsonl"
        kept = [json.dumps(row) + "\n" for row in self.metrics() if row["step"] <= step]
        with self.writing(path):
            write_whole(path, "".join(kept).encode())

    # --- checkpoints

    def save(self, step: int, model: Tensors, state: Tensors, info: dict, every: int = 1) -> Path:
        """Write checkpoints/step-<step>, whole or not at all; only then drop old ones.

        Beside it the newest KEEP of the steps 0, every, 2·every … stay: what is kept must not
        depend on when somebody stopped the run. A later one goes, too: it was damaged, or the run
        would have gone on from it.
        """
        final = self.folder / "checkpoints" / f"step-{step:06d}"
        if damage(final) is None:  # stopped just after it was resumed
            return final
        for left in final.parent.glob(".step-*.draft"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        draft = final.with_name(f".{final.name}.draft")
        try:
            with self.writing(final):
                draft.mkdir(parents=True)
                save_file(plain(model), draft / "model.safetensors", metadata={"format": "pt"})
                save_file(plain(state), draft / "train_state.safetensors")
                (draft / "train_state.json").write_text(json.dumps({"step": step, **info}))
                hashes = {p.name: digest(p) for p in sorted(draft.iterdir())}
                (draft / "manifest.json").write_text(json.dumps(hashes, indent=1))
                for path in (*draft.iterdir(), draft, *self.folder.glob("metrics.jsonl")):
                    sync(path)
                remove(final)
                draft.rename(final)
                sync(final.parent)
        finally:
            shutil.rmtree(draft, ignore_errors=True)  # frees a full disk
        found = self.checkpoints()
        older = (p for p in found[found.index(final) + 1 :] if step_of(p) % every == 0)
        more = KEEP - (step % every == 0)
        kept = {final, *islice((p for p in older if damage(p) is None), more)}
        for path in set(found) - kept:
            remove(path)
        return final

    def checkpoints(self) -> list[Path]:
        """Finished checkpoints, the newest first; UserError if nobody can know what is there."""
        place = self.folder / "checkpoints"
        try:
            names = [name for name in os.listdir(place) if re.fullmatch(r"step-[0-9]{6,}", name)]
        except OSError as error:
            raise UserError(f"cannot read {place}: {error.strerror}") from None
        return sorted((place / name for name in names), key=step_of, reverse=True)

    def newest(self) -> Path:
        """The newest checkpoint that is what its manifest says; what is passed over is told."""
        faults = []
        for path in self.checkpoints():
            if (fault := damage(path)) is None:
                if faults:
                    print("passed over " + "; ".join(faults), file=sys.stderr)
                return path
            faults.append(f"{path}: {fault}")
        why = "; ".join(faults) or f"stopped before its first, it starts anew by {self.command}"
        raise UserError(f"{self.folder} has no whole checkpoint to load: {why}")


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None; UserError if they may not be read."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_bytes())
        for name in ("model.safetensors", "train_state.safetensors", "train_state.json"):
            if manifest[name] != digest(checkpoint / name):
                return f"{name} is not what manifest.json says"
        if (step := json.loads((checkpoint / name).read_bytes())["step"]) != step_of(checkpoint):
            return f"it is that of step {short(step)}"
    except PermissionError as error:  # whole, perhaps, and so not to be passed over
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from None
    except OSError as error:
        return f"{Path(error.filename or checkpoint).name}: {error.strerror}"
    except (ValueError, LookupError, TypeError, RecursionError):
        return "manifest.json is damaged"
    return None


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def remove(path: Path) -> None:
    """A folder with all that is in it; or a file or link in its place, and not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def load_tensors(path: Path) -> Tensors:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read the weights in {path}: {error}") from None


# --- settings -------------------------------------------------------------------------------------


def settings(kind: type, values: object, where: str, path: str = "") -> object:
    """The dataclass that a JSON object holds; what it lacks, as an old one may, has its default.

    A UserError names a setting that is unknown or has a value of another type.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where}: {path.strip('.') or 'it'} cannot be {short(values)}")
    types = get_type_hints(kind)
    if unknown := sorted(values.keys() - types.keys()):
        names = ", ".join(short(path + name) for name in unknown)
        raise UserError(f"{where}: this program knows no setting {names}")
    made = {name: setting(types[name], x, where, path + name) for name, x in values.items()}
    try:
        return kind(**made)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def setting(kind: type, value: object, where: str, name: str) -> object:
    """One value of `settings`; an int may stand for a float, and a list stands for a tuple."""
    if is_dataclass(kind):
        return settings(kind, value, where, f"{name}.")
    if kind is float and type(value) is int and abs(value) < 2**53:
        return float(value)
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(setting(get_args(kind)[0], x, where, name) for x in value)
    if value in get_args(kind) if get_origin(kind) is Literal else type(value) is kind:
        return value
    raise UserError(f"{where}: {name} cannot be {short(value)}")


# --- files ----------------------------------------------------------------------------------------


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new, never a part."""
    draft = path.with_name(f".{path.name}.draft")
    try:
        draft.write_bytes(data)
        sync(draft)
        draft.replace(path)
        sync(path.parent)
    finally:
        with suppress(OSError):  # frees a full disk
            draft.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    write_whole(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"cannot read {path}: it should hold a JSON object")
    return value


def write_sealed(path: Path, values: dict) -> None:
    """A JSON object with a hash of itself."""
    write_json(path, {"hash": fingerprint(values), **values})


def read_sealed(path: Path) -> dict:
    """What `write_sealed` wrote, or a UserError; without its hash it may be anything."""
    values = read_json(path)
    try:
        written = "hash" not in values or values.pop("hash") == fingerprint(values)
    except RecursionError:
        written = False
    if not written:
        raise UserError(
            f"{path} is not what was written; if you changed it yourself, delete its hash, too"
        )
    return values


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


def fingerprint(values: dict) -> str:
    """A hash of JSON values, however they are spaced and ordered."""
    text = json.dumps(values, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def plain(tensors: Tensors) -> Tensors:
    return {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
