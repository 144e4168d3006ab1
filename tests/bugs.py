"""All planted bugs: shown, or planted one by one to see that the tests catch them.

A law that never failed on a bug is not yet a test. Two kinds are here: the museum's, which happened
to others (tests/museum.py), and what a tired author might have written (tests/bugs_*.py).

Run: python tests/bugs.py             the museum, and how many others there are
     python tests/bugs.py museum      plant its exhibits (minutes)
     python tests/bugs.py lora        plant those of lora.py; all: every one (hours)
"""

import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import bugs_adapters  # noqa: E402
import bugs_align  # noqa: E402
import bugs_kernels  # noqa: E402
import bugs_parallel  # noqa: E402
import bugs_scaling  # noqa: E402
from museum import MUSEUM  # noqa: E402

from pictures import table  # noqa: E402
from run import UserError, main  # noqa: E402

# A file's name: the tests that must catch its bugs, and (what stands there, what is planted).
BUGS = (
    bugs_kernels.BUGS | bugs_adapters.BUGS | bugs_align.BUGS | bugs_parallel.BUGS
    | bugs_scaling.BUGS
)  # fmt: skip
LIMIT = 300  # seconds for one bug

# The first failure is enough: no smaller one is looked for.
QUICK = """
from hypothesis import Phase

settings.register_profile("quick", settings.default, phases=[Phase.explicit, Phase.generate])
settings.load_profile("quick")
"""


class Planted(NamedTuple):
    file: str  # from the root
    old: str
    new: str
    tests: tuple[str, ...]


def file_of(name: str) -> str:
    """A kernel's, or else that of a root script."""
    kernel = f"kernels/{name}.py"
    return kernel if (ROOT / kernel).exists() else f"{name}.py"


def bugs_of(name: str) -> list[Planted]:
    """Those of the museum, of a file, or all."""
    if name == "museum":
        return [Planted(it.file, it.old, it.new, (it.law,)) for it in MUSEUM]
    if name == "all":
        return [it for one in ("museum", *BUGS) for it in bugs_of(one)]
    if name not in BUGS:
        raise UserError(f"{name!r} is none of museum, all, {', '.join(BUGS)}")
    tests, some = BUGS[name]
    return [Planted(file_of(name), old, new, tests) for old, new in some]


def planted(it: Planted, limit: float = LIMIT) -> subprocess.CompletedProcess:
    """Its tests in a copy of the project that has the bug, until the first that fails."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        leave = shutil.ignore_patterns(".*", "runs", "__pycache__", "shared")
        shutil.copytree(ROOT, copy, ignore=leave)
        with (copy / "tests/conftest.py").open("a", encoding="utf-8") as conftest:
            conftest.write(QUICK)
        file = copy / it.file
        file.write_text(file.read_text(encoding="utf-8").replace(it.old, it.new), encoding="utf-8")
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider",
             "-m", "not slow",
             *(f"tests/{test}" for test in it.tests)],
            cwd=copy, capture_output=True, text=True, timeout=limit,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        )  # fmt: skip


def caught(done: subprocess.CompletedProcess) -> bool:
    """pytest's exit status 1: a test failed; 2 would be a file that cannot be imported.

    A bug that writes beyond its memory may kill the process after the failure was reported.
    """
    return "\nFAILED " in done.stdout and (done.returncode == 1 or done.returncode < 0)


# --- the script -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Visit:
    """Planted bugs, and the laws that catch them."""

    plant: tyro.conf.Positional[str] = ""  # museum, a file's name as lora, or all; empty: only look


def show() -> None:
    for it in MUSEUM:
        print(f"{it.name} ({it.file})")
        for what, text in (("happened", it.origin), ("looks", it.looks), ("law", it.law)):
            print(textwrap.fill(text, 98, initial_indent=f"  {what:9}", subsequent_indent=" " * 11))
    each = ", ".join(f"{name} {len(some)}" for name, (_, some) in BUGS.items())
    print("\n" + textwrap.fill(f"Others, by file: {each}", 98))


def outcome(it: Planted) -> str:
    try:
        done = planted(it)
    except subprocess.TimeoutExpired:
        return f"NOT TRIED: no end in {LIMIT} s"
    if done.returncode and not caught(done):
        return f"NOT TRIED: pytest's status {done.returncode}"
    return "caught" if caught(done) else "SURVIVED"


def plant(some: Sequence[Planted]) -> None:
    """Plant each, print the table; exit status 1 if one survives."""
    found = [outcome(it) for it in tqdm(some, "planting", leave=False, disable=None)]
    rows = [(it.file, textwrap.shorten(it.new, 60), how)
            for it, how in zip(some, found, strict=True)]  # fmt: skip
    good = sum(how.startswith("caught") for how in found)
    print(table(("file", "planted", ""), *rows) + f"\n\n{good} of {len(some)} caught")
    sys.exit(good < len(some))


def script() -> None:
    config = tyro.cli(Visit, description=__doc__)
    plant(bugs_of(config.plant)) if config.plant else show()


if __name__ == "__main__":
    main(script)
