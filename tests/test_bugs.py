"""Every planted bug of tests/bugs*.py is caught by the tests of its file.

Run: pytest tests/test_bugs.py -m slow -n auto --dist load    all of them, an hour or so
     pytest tests/test_bugs.py -m slow -k flash               those of one file
"""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import bugs
import bugs_adapters
import bugs_align
import bugs_parallel
import bugs_scaling
import pytest
from conftest import ROOT

BUGS = bugs.BUGS | bugs_adapters.BUGS | bugs_align.BUGS | bugs_parallel.BUGS | bugs_scaling.BUGS
ALL = [
    pytest.param(name, old, new, id=f"{name}-{number}")
    for name, (_, some) in BUGS.items()
    for number, (old, new) in enumerate(some)
]
LIMIT = 300  # seconds for one bug


def file_of(name: str, root: Path = ROOT) -> Path:
    """A kernel's, or else that of a root script."""
    kernel = root / "kernels" / f"{name}.py"
    return kernel if kernel.exists() else root / f"{name}.py"


# The first failure is enough: no smaller one is looked for.
QUICK = """
from hypothesis import Phase

settings.register_profile("quick", settings.default, phases=[Phase.explicit, Phase.generate])
settings.load_profile("quick")
"""


@pytest.mark.parametrize("name, old, new", ALL)
def test_a_bug_has_one_place_and_is_python(name, old, new):
    text = file_of(name).read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times"
    assert old != new
    ast.parse(text.replace(old, new))


@pytest.mark.slow
@pytest.mark.parametrize("name, old, new", ALL)
def test_a_bug_is_caught(name, old, new, tmp_path):
    """pytest's exit status 1: a test failed; 2 would be a file that cannot be imported.

    A bug that writes beyond its memory may kill the process after the failure was reported.
    """
    for path in (*ROOT.glob("*.py"), ROOT / "pyproject.toml"):
        shutil.copy(path, tmp_path)
    for folder in ("kernels", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pyc*"))
    with (tmp_path / "tests" / "conftest.py").open("a", encoding="utf-8") as file:
        file.write(QUICK)
    path = file_of(name, tmp_path)
    path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    files = [tmp_path / "tests" / file for file in BUGS[name][0]]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", *files],
        cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    reported = "\nFAILED " in done.stdout and (done.returncode == 1 or done.returncode < 0)
    assert reported, f"{old!r} → {new!r}: status {done.returncode}\n{done.stdout[-500:]}"
