"""Blank bodies are missed by the tests that are named, and nothing else of a file changes."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT
from exercise import BOOK, bodies, copy, without

from run import UserError


@pytest.mark.parametrize("name", BOOK)
def test_signatures_and_docstrings_stay(name):
    it = BOOK[name]
    assert (ROOT / it.tests).is_file() and it.hints
    for path, names in it.blank.items():
        source = (ROOT / path).read_text(encoding="utf-8")
        before, after = ast.parse(source), ast.parse(without(source, names.split()))
        whole, blank = bodies(before), bodies(after)
        assert whole.keys() == blank.keys()
        for function, node in whole.items():
            left = blank[function]
            assert ast.dump(node.args) == ast.dump(left.args)
            assert ast.get_docstring(node) == ast.get_docstring(left)
            if function in names.split():
                assert isinstance(left.body[-1], ast.Raise) and len(left.body) <= 2
            else:
                assert ast.dump(node) == ast.dump(left)


def missed(name, folder):
    """Whether the tests of a technique fail without it."""
    copy(name, folder)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", BOOK[name].tests],
        cwd=folder, text=True, capture_output=True,
    )  # fmt: skip
    return done.returncode in (1, 2) and "NotImplementedError" in done.stdout


def test_a_blank_body_is_missed(tmp_path):
    assert missed("scaling", tmp_path / "copy")
    with pytest.raises(UserError, match="exists already"):
        copy("scaling", tmp_path / "copy")


@pytest.mark.slow
@pytest.mark.parametrize("name", BOOK)
def test_every_blank_body_is_missed(name, tmp_path):
    assert missed(name, tmp_path / "copy")


def test_the_book_says_what_to_do(tmp_path):
    def go(*words):
        return subprocess.run(
            [sys.executable, str(ROOT / "tests/exercise.py"), *words],
            cwd=tmp_path, text=True, capture_output=True,
        )  # fmt: skip

    said = go("dpo").stdout
    assert "cd exercise-dpo && pytest tests/test_policy.py" in said and "dpo_loss" in said
    assert (tmp_path / "exercise-dpo/model.py").is_file()
    listed = go().stdout
    assert all(name in listed for name in BOOK)
    assert "σ" in go("dpo", "--hints").stdout
    for words, sentence in ((["knitting"], "is none of bpe"), (["dpo"], "exists already")):
        failed = go(*words)
        assert failed.returncode == 2 and sentence in failed.stderr
