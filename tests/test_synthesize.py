"""What a model writes is understood, and kept if it is right and new."""

from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

import synthesize
import tasks
from instruct import rouge_l
from synthesize import ALIKE, Synthesis, alike, conversations, seeds, stated, synthesized, worded
from tasks import FACTS, mark, side


@given(st.integers(0, 10**6))
def test_statements_are_understood(seed):
    for paragraph in islice(tasks.facts(seed), 15):
        found = list(stated(paragraph))
        assert all(one.right for one in found) and len(found) == 4
        assert " ".join(map(worded, found)) == paragraph


@pytest.mark.parametrize("text, right", [
    ("3 4 + 2 8 = 6 2.", True), ("3 4 + 2 8 = 6 3.", False), ("3 4 + 8 = 4 2.", False),
    ("To reverse a b c gives c b a.", True), ("To reverse a b c gives c a b.", False),
    ("In the table Ada 3, Ben 4 the number of Ben is 4.", True),
    ("In the table Ada 3, Ben 4 the number of Cleo is 4.", False),
    ("Ada has 3 cups. Ada gives away 1. Ada gets 4 more. That makes 6 cups.", True),
    ("Ada has 3 cups. Ada gives away 1. That makes 1 cups.", False),
    ("Ada has 3 cups. Ada gets 2 more. That makes 5 balls.", False),
    ("Ada has 3 cups. Bob gets 2 more. That makes 5 cups.", False),
    ("Ada has 3 cups. Ada gives away 5. Ada gets 4 more. That makes 2 cups.", False),
])  # fmt: skip
def test_what_is_wrong_is_known(text, right):
    (found,) = stated(text)
    assert found.right == right and worded(found) == text


def test_what_is_no_statement_comes_as_text():
    found = list(stated("Once upon. To sort c a gives a c. and so on"))
    assert found[0] == "Once upon." and found[1].right and found[2] == "and so on"


def test_only_what_is_right_and_new_is_kept(monkeypatch):
    start = seeds(2, 0)
    assert len(start) == 2 * len(FACTS) and all(side_of(text) == "train" for text in start)
    fresh = [p for p in islice(tasks.facts(9), 400)]
    wrong = "3 4 + 2 8 = 6 3."
    texts = iter([[start[0], wrong, "Nonsense here."], fresh[:300], fresh[300:]])
    monkeypatch.setattr(synthesize, "continued", lambda *_: next(texts))
    made = synthesized(None, start, 40, 0)
    assert len(made.kept) == 40
    assert made.dropped["wrong"] == 1 and made.dropped["no statement"] == 1
    assert made.dropped["not new"] >= 1 and made.examples["wrong"] == wrong
    texts = [*start, *map(worded, made.kept)]
    for i, text in enumerate(texts[len(start) :], len(start)):
        assert all(rouge_l(text, other) < ALIKE for other in texts[:i])
        assert side_of(text) == "train"


words = st.lists(st.sampled_from("abcd"), min_size=1, max_size=12).map(" ".join)


@given(words, words)
def test_what_is_alike_is_soon_known(a, b):
    """Also where the same words stand in another order, and with exactly 0.7 in common."""
    assert alike(a, b) == (rouge_l(a, b) >= ALIKE)
    assert alike("a b c d e f g x y z", "a b c d e f g u v w")
    assert not alike("a b c d e f g x y z", "g f e d c b a u v w")


def side_of(text):
    (said,) = stated(text)
    return side(tasks.canonical(said.task, said.content))


def test_what_is_for_examinations_is_not_kept():
    sums = [f"1 {n} + 2 3 = {tasks.apart(str(33 + n))}." for n in range(10)]
    text = next(text for text in sums if side_of(text) == "test")
    made = Synthesis([])
    made.judge(next(stated(text)))
    assert not made.kept and made.dropped["kept for examinations"] == 1


def test_statements_become_questions_with_their_answers():
    made = Synthesis([], [next(stated(text)) for text in seeds(3, 1)])
    for turns, said in zip(conversations(made, 0), made.kept, strict=True):
        asked, reply = turns
        assert reply.text == said.answer and "{" not in asked.text
        solved = tasks.TASKS[said.task].solve(said.content)
        problem = tasks.Problem(said.task, 1, asked.text, solved.answer, "", "", 0)
        assert mark(problem, reply.text)
