"""What is planted is there, and is found by its step."""

import re

import pytest

from planted import FAULTS, Found, Show, card, cleaned, documents
from redact import find
from run import UserError


@pytest.mark.parametrize("seed", [0, 1])
def test_each_step_finds_what_was_planted_for_it(tmp_path, seed):
    planted = documents(300, 0.1, seed)
    assert {one.fault for one in planted} == {"", *FAULTS}
    found = {f.fault: f for f in cleaned(planted, tmp_path)}
    assert found.keys() == FAULTS.keys()
    for fault, (_, step) in FAULTS.items():
        assert found[fault].step == step and found[fault].planted >= 20
        assert found[fault].recall >= 0.95, found[fault]
        assert found[fault].precision >= (0.7 if fault == "no prose" else 0.95), found[fault]


def test_a_step_that_removes_nothing_removes_nothing_wrongly():
    found = Found("copies", "copy", 5, 0, 0, 0)
    assert found.precision == 1 and found.recall == 0


@pytest.mark.parametrize(("count", "share"), [(1, 0.1), (5, 0.1), (0, 1.0), (9, 0.0), (9, 1.1)])
def test_something_is_planted_or_it_is_told(count, share):
    """Once a single document was planted with nothing, of which nothing was found: 0 %."""
    with pytest.raises(UserError, match="--share"):
        Show(count, share)
    assert {one.fault for one in documents(6, 0.1, 0)} == {"", *FAULTS}
    assert Show(6, 0.1).count == 6


def test_what_is_planted_as_private_looks_so():
    for one in documents(100, 0.2, 0):
        for mark in one.marks if one.fault == "private" else ():
            assert mark in one.text
            assert any(one.text[s.start : s.end] == mark for s in find(one.text)), mark


def test_a_card_s_number_is_valid():
    for digits in ("411111000000000", "411111123456789"):
        number = re.sub(" ", "", card(digits))
        assert number[:-1] == digits
        doubled = [int(d) * (1 + i % 2) for i, d in enumerate(reversed(number))]
        assert sum(n - 9 * (n > 9) for n in doubled) % 10 == 0
