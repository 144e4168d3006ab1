"""Each exhibit has one place, is Python, and is caught by its law."""

import ast

import pytest
from conftest import ROOT
from museum import MUSEUM, caught

NAMES = [it.name for it in MUSEUM]


@pytest.mark.parametrize("it", MUSEUM, ids=NAMES)
def test_an_exhibit_has_one_place_and_is_python(it):
    text = (ROOT / it.file).read_text(encoding="utf-8")
    assert text.count(it.old) == 1
    ast.parse(text.replace(it.old, it.new))
    file, _, law = it.law.partition("::")
    assert f"def {law}" in (ROOT / "tests" / file).read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("it", MUSEUM, ids=NAMES)
def test_an_exhibit_is_caught(it):
    assert caught(it)
