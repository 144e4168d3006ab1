"""Preferences: every form is read or refused by name, and simulated people are as noisy as said."""

import json
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

import preferences
from chat import Turn
from preferences import Ranking, Rating, ranked, rated, read, write
from run import UserError
from tasks import CRITERIA, WORTHLESS, Rater, problem

WHY = [Turn("user", "Why?")]
CHAT = [{"role": "user", "content": "Why?"}]


def asked(text):
    return [{"role": "assistant", "content": text}]


GOOD = [
    ({"prompt": "Why?", "chosen": "So.", "rejected": "No."}, Ranking(WHY, ("So.", "No."), (1, 2))),
    ({"prompt": CHAT, "chosen": "So.", "rejected": "No."}, Ranking(WHY, ("So.", "No."), (1, 2))),
    ({"instruction": "Why?", "input": "", "output": "x", "chosen": "So.", "rejected": "No."},
     Ranking(WHY, ("So.", "No."), (1, 2))),
    ({"prompt": CHAT, "chosen": asked("So."), "rejected": asked("No.")},
     Ranking(WHY, ("So.", "No."), (1, 2))),
    ({"chosen": CHAT + asked("So."), "rejected": CHAT + asked("No.")},
     Ranking(WHY, ("So.", "No."), (1, 2))),
    ({"chosen": "\n\nHuman: Why?\n\nAssistant: So.\n\nIt is.",
      "rejected": "\n\nHuman: Why?\n\nAssistant: No."},
     Ranking(WHY, ("So.\n\nIt is.", "No."), (1, 2))),
    ({"prompt": "Why?", "responses": ["a", "b", "c"], "ranks": [2, 1, 2]},
     Ranking(WHY, ("a", "b", "c"), (2, 1, 2))),
    ({"prompt": "Why?", "response": "So.", "ratings": {"helpful": 3}},
     Rating(WHY, "So.", "", "helpful", 3.0)),
    ({"prompt": "Why?", "response": "So.", "rater": "Ann", "ratings": {"honest": 0.5}},
     Rating(WHY, "So.", "Ann", "honest", 0.5)),
]  # fmt: skip


@pytest.mark.parametrize("record, right", GOOD)
def test_every_form_is_read(record, right, tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_text(json.dumps(record) + "\n")
    assert list(read(path)) == [(f"{path}:1", right)]
    write([right, right], path)
    assert [one for _, one in read(path)] == [right, right]


BAD = [
    (3, "is int, not an object"),
    ({"prompt": "Why?"}, "has none of the fields"),
    ({"prompt": "Why?", "chosen": "So."}, '"rejected" is missing'),
    ({"prompt": "", "chosen": "So.", "rejected": "No."}, '"prompt" is missing or empty'),
    ({"prompt": "a", "responses": ["\ud83d", "b"], "ranks": [1, 2]}, "half a letter"),
    ({"prompt": [], "chosen": "So.", "rejected": "No."}, "no list of turns"),
    ({"chosen": "So.", "rejected": "No."}, "is no transcript"),
    ({"chosen": asked("a"), "rejected": asked("b")}, '"prompt" is missing'),
    ({"chosen": CHAT + asked("a"), "rejected": asked("b")}, "differ before their last turn"),
    ({"prompt": "Why?", "responses": ["a", 3], "ranks": [1, 2]}, "no list of texts"),
    ({"prompt": "Why?", "responses": ["a", "b"], "ranks": [1, 0]}, "whole numbers from 1"),
    ({"prompt": "Why?", "responses": ["a", "b"], "ranks": [1]}, "2 responses and 1 ranks"),
    ({"prompt": "Why?", "responses": ["a"], "ranks": [1]}, "1 responses and 1 ranks"),
    ({"prompt": "Why?", "response": "a", "ratings": []}, "no object of criteria"),
    ({"prompt": "Why?", "response": "a", "ratings": {"helpful": True}}, "helpful is True"),
    ({"prompt": "Why?", "response": "a", "ratings": {"helpful": math.inf}}, "helpful is inf"),
    ({"prompt": "Why?", "response": "a", "rater": 3, "ratings": {"helpful": 1}}, '"rater" is int'),
]


@pytest.mark.parametrize("record, why", BAD)
def test_what_cannot_be_read_is_named(record, why, tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_text(json.dumps(record) + "\n{\n")
    (where, said), (_, broken) = read(path)
    assert where == f"{path}:1" and isinstance(said, str) and why in said
    assert "is no JSON" in broken
    ((_, said),) = read(tmp_path / "nowhere.jsonl")
    assert "cannot be read" in said


@given(st.lists(st.integers(1, 4), min_size=2, max_size=6))
def test_a_ranking_is_all_of_its_pairs(ranks):
    one = Ranking(WHY, tuple("abcdef"[: len(ranks)]), tuple(ranks))
    pairs = one.pairs()
    assert {frozenset(p[:2]) for p in pairs} == {
        frozenset((i, j)) for i in range(len(ranks)) for j in range(i)
    }
    assert len(pairs) == len(ranks) * (len(ranks) - 1) // 2
    for i, j, often in pairs:
        assert often == (1.0 if ranks[i] < ranks[j] else 0.5) and ranks[i] <= ranks[j]


@pytest.mark.parametrize("noise", [0.5, 2.0])
def test_simulated_people_are_as_noisy_as_they_are_said_to_be(noise):
    """i stands before j with probability σ((uᵢ − uⱼ)/s); nobody is equal where all count."""
    problem_ = problem("add", 1, "train", 0)
    replies = (problem_.answer, "x", problem_.worked)
    rater, rng, n = Rater("one", noise, 0.3, 0.1), random.Random(0), 4000
    felt = [rater.felt(problem_, reply) for reply in replies]
    before = [[0] * 3 for _ in replies]
    for _ in range(n):
        ranks = ranked(problem_, replies, rater, rng, alike=0.0).ranks
        assert sorted(ranks) == [1, 2, 3]
        for i in range(3):
            for j in range(3):
                before[i][j] += ranks[i] < ranks[j]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        p = 1 / (1 + math.exp((felt[j] - felt[i]) / noise))
        assert abs(before[i][j] / n - p) < 4 * (p * (1 - p) / n) ** 0.5 + 1e-3


def test_what_lies_close_together_is_equal():
    one, rng = problem("copy", 1, "train", 0), random.Random(1)
    ranks = [ranked(one, ("x",) * 5, Rater("one", 0.5), rng, 0.3).ranks for _ in range(200)]
    assert any(len(set(r)) < 5 for r in ranks)
    for r in ranks:  # competition ranks: 1 1 3, never 1 1 2
        assert sorted(r) == [1 + sum(x < y for x in r) for y in sorted(r)]
    assert ranked(one, ("x",) * 4, Rater("one", 0.5), rng, 99).ranks == (1, 1, 1, 1)


def test_a_response_is_rated_by_each_criterion():
    one = problem("copy", 1, "train", 0)
    found = rated(one, one.answer, Rater("one", 1e-9), random.Random(0))
    assert [r.criterion for r in found] == list(CRITERIA) and {r.value for r in found} == {
        WORTHLESS + 4
    }
    rude = rated(one, "silly", Rater("one", 1e-9), random.Random(0))
    assert rude[-1].value == WORTHLESS == 3


# --- a person at a terminal -----------------------------------------------------------------------


@pytest.mark.parametrize("keys, ranks", [
    ("213", (2, 1, 3)), ("2 > 1 > 3", (2, 1, 3)), ("2=13", (1, 1, 3)), ("3", (2, 2, 1)),
    ("1=2=3", (1, 1, 1)), ("31=2", (2, 2, 1)),
])  # fmt: skip
def test_keys_are_an_order(keys, ranks):
    assert preferences.order_of(keys, 3) == ranks


@pytest.mark.parametrize("keys", ["", "4", "0", "11", "=1", "1=", "1==2", "x", "²"])
def test_other_keys_are_none(keys):
    with pytest.raises(ValueError):
        preferences.order_of(keys, 3)


ITEMS = [([Turn("user", f"Why {n}?")], ("a", "b", "c")) for n in range(4)]


def session(path, *keys):
    """What is labelled when these keys are typed; an exception among them is raised."""
    left = iter(keys)

    def say(prompt):
        key = next(left, EOFError())
        if isinstance(key, BaseException):
            raise key
        return key

    return [(one.prompt[0].text, one.ranks) for one in preferences.label(ITEMS, path, say)]


def test_a_person_labels_stops_goes_on_and_takes_back(tmp_path, capsys):
    path = tmp_path / "mine.jsonl"
    first = [("Why 0?", (2, 1, 3)), ("Why 1?", (1, 1, 3))]
    assert session(path, "213", "9", "1=2", KeyboardInterrupt()) == first
    assert [one.ranks for _, one in read(path)] == [(2, 1, 3), (1, 1, 3)]
    assert "'9' is none of the answers 1 to 3" in capsys.readouterr().out
    changed = [("Why 1?", (2, 2, 1)), ("Why 3?", (1, 2, 3))]
    assert session(path, "u", "3", "s", "12", "q") == [first[0], *changed]
    whole = session(path, "1")
    assert [name for name, _ in whole] == ["Why 0?", "Why 1?", "Why 3?", "Why 2?"]
    assert session(path, "1") == whole and len(list(read(path))) == 4
    path.write_text('{"prompt": "a"}\n')
    with pytest.raises(UserError, match=r"mine.jsonl:1 has none of the fields"):
        session(path, "1")


def test_what_is_taken_back_is_gone_from_the_file_too(tmp_path):
    path = tmp_path / "mine.jsonl"
    first = session(path, "213", "1", "q")
    assert session(path, "u", "q") == first[:1] and len(list(read(path))) == 1


def test_each_answer_is_saved_before_the_next_question(tmp_path):
    path, seen = tmp_path / "mine.jsonl", []

    def say(prompt):
        seen.append(len(list(read(path))) if path.exists() else 0)
        return "1"

    preferences.label(ITEMS, path, say)
    assert seen == [0, 1, 2, 3]


def test_the_same_people_say_the_same():
    first, again = (list(preferences.simulated(3)) for _ in range(2))
    assert first == again and first != list(preferences.simulated(4))
