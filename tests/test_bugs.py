"""Every planted bug of tests/bugs.py has one place, is Python, and is caught by its tests.

And there are mutants of every file (tests/mutants.py).

Run: pytest tests/test_bugs.py -m slow -n auto --dist load    all of them, an hour or so
     pytest tests/test_bugs.py -m slow -k flash               those of one file
"""

import ast
import random
from pathlib import Path

import pytest
from bugs import BUGS, bugs_of, caught, planted
from conftest import ROOT
from museum import MUSEUM
from mutants import mutant, own_tests

NAMES = ("museum", *BUGS)
ALL = [
    pytest.param(it, id=f"{name}-{number}")
    for name in NAMES
    for number, it in enumerate(bugs_of(name))
]


@pytest.mark.parametrize("it", ALL)
def test_a_bug_has_one_place_and_is_python(it):
    text = (ROOT / it.file).read_text(encoding="utf-8")
    assert text.count(it.old) == 1, f"{it.old!r} occurs {text.count(it.old)} times"
    assert it.old != it.new
    ast.parse(text.replace(it.old, it.new))


@pytest.mark.parametrize("it", MUSEUM, ids=[it.name for it in MUSEUM])
def test_an_exhibit_names_its_law(it):
    file, _, law = it.law.partition("::")
    assert f"def {law}(" in (ROOT / "tests" / file).read_text(encoding="utf-8")


def test_all_files_of_bugs_are_collected():
    for path in Path(__file__).parent.glob("bugs_*.py"):
        assert path.stem in (ROOT / "tests/bugs.py").read_text(encoding="utf-8")


def test_every_file_has_mutants_and_tests_that_should_see_them():
    tests = own_tests()
    files = {str(path.relative_to(ROOT)) for path in (*ROOT.glob("*.py"), *ROOT.glob("kernels/*"))}
    assert {f for f in files if f.endswith(".py")} - {"kernels/__init__.py"} == tests.keys()
    for number, file in enumerate(sorted(tests)):
        it, where = mutant(file, tests[file], random.Random(number))
        assert it.new != it.old and where.startswith(f"{file}:"), where
        assert all((ROOT / "tests" / test).is_file() for test in it.tests)


@pytest.mark.slow
@pytest.mark.parametrize("it", ALL)
def test_a_bug_is_caught(it):
    done = planted(it)
    assert caught(done), f"{it.old!r} → {it.new!r}: status {done.returncode}\n{done.stdout[-500:]}"
