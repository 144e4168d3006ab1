"""Tasks: answers are right, sides share nothing, letters stand apart, raters are people."""

import random
import re
from collections import Counter
from itertools import islice
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tasks
from bpe import BPE
from run import UserError
from tasks import COMPOSED, OPERATIONS, PLAIN, TASKS, final, mark, problem, side, utility
from vocabulary import END_OF_TEXT

names = st.sampled_from(sorted(TASKS))
levels = st.integers(1, 6)
numbers = st.integers(0, 2**40)
sides = st.sampled_from(("train", "test"))

BY_HAND = {  # independent of the operations: what becomes of the letters' places
    "copy": lambda x: x, "reverse": lambda x: "".join(reversed(x)),
    "sort": lambda x: "".join(c for c in tasks.LETTERS for _ in range(x.count(c))),
    "drop first": lambda x: x[1:], "drop last": lambda x: x[:-1], "double": lambda x: x + x[-1],
    "swap": lambda x: x[-1] + x[1:-1] + x[0], "rotate": lambda x: x[1:] + x[0],
}  # fmt: skip


@given(names, levels, sides, numbers)
def test_answers_are_right(name, level, on, number):
    asked = problem(name, level, on, number)
    answer, question = asked.answer.replace(" ", ""), asked.question
    letters = re.search(r"\b[a-z](?: [a-z])+\b", question.replace("?", " ").replace(".", " "))
    digits = [int(x.replace(" ", "")) for x in re.findall(r"\d(?: \d)*", question)]
    if name in OPERATIONS or name in COMPOSED:
        given_letters = asked.key.split(" ", 1)[1].replace(" ", "")
        for operation in name.split(", "):
            given_letters = BY_HAND[operation](given_letters)
        assert answer == given_letters
    elif name == "add":
        assert int(answer) == sum(digits)
    elif name == "subtract":
        assert int(answer) == max(digits) - min(digits)
    elif name == "compare":
        assert int(answer) == max(digits)
    elif name == "count":
        key = asked.key.split()
        assert int(answer) == key[1:-1].count(key[-1])
    elif name == "replace":
        *x, y, z = asked.key.split()[1:]
        assert answer == "".join(z if c == y else c for c in x)
    elif name == "look up":
        row = re.search(rf"\b{asked.key.split()[-1]} (\d)", question)
        assert answer == row[1]
    elif name == "absent":
        assert not re.search(rf"\b{asked.key.split()[-1]} \d", question)
        assert tasks.honest(asked, asked.answer) and not tasks.honest(asked, "3")
    elif name == "reckon":
        gets = sum(map(int, re.findall(r"gets (\d) more", question)))
        gives = sum(map(int, re.findall(r"gives away (\d)", question)))
        assert int(answer) == int(re.search(r"has (\d) ", question)[1]) + gets - gives >= 0
    else:
        assert answer
    assert letters or digits or name in ("story", "unsaid")


@given(levels, sides, numbers)
def test_steps_are_right(level, on, number):
    """Every equation in them holds, and what they write down is the answer."""
    for name in ("add", "subtract", "reckon"):
        asked = problem(name, level, on, number)
        for left, right in re.findall(r"(\d(?: [+-] \d+)+) = (\d(?: \d)*)\.?,?", asked.steps):
            assert eval(left) == int(right.replace(" ", ""))
    asked = problem("add", level, on, number)
    digits = re.findall(r"[wW]rite (\d)", asked.steps)
    assert asked.answer.replace(" ", "") == "".join(reversed(digits))
    asked = problem("subtract", level, on, number)
    digits = re.findall(r"gives (\d)", asked.steps)
    assert int(asked.answer.replace(" ", "")) == int("".join(reversed(digits)))
    for name in OPERATIONS:
        asked = problem(name, level, on, number)
        assert asked.steps.endswith(f": {asked.answer}.")
    asked = problem("count", level, on, number)
    assert asked.steps.rstrip(".").endswith(f" {asked.answer}")


@given(names, levels, sides, numbers)
def test_a_reply_is_marked_by_its_last_answer(name, level, on, number):
    asked = problem(name, level, on, number)
    assert mark(asked, asked.answer) and mark(asked, f" {asked.answer}. ")
    assert mark(asked, asked.worked) and asked.worked.endswith(f"So the answer is {asked.answer}.")
    assert mark(asked, f"So the answer is q q. No: the answer is {asked.answer}.")
    for wrong in (asked.answer + " x", "", f"{asked.worked} So the answer is x.", asked.steps):
        assert not mark(asked, wrong) or final(wrong) == asked.answer
    assert asked == problem(name, level, on, number)


def test_an_answer_keeps_its_decimals():
    assert final("So the answer is 12.25.") == "12.25" and final(" 3.5") == "3.5"


@given(names, levels, numbers)
def test_sides_share_neither_contents_nor_words(name, level, number):
    for on in ("train", "test"):
        asked = problem(name, level, on, number)
        assert side(asked.key) == on
        assert (asked.template % 4 == 3) == (on == "test")
    other = problem(name, level, "test", number, asked="train")
    assert side(other.key) == "test" and other.template % 4 != 3


def test_no_pair_of_operations_is_on_both_sides():
    learnt, asked = tasks.composed("train"), tasks.composed("test")
    assert not {*learnt} & {*asked} and len(learnt) + len(asked) == len(COMPOSED) == 42
    assert 4 <= len(asked) <= 14
    for name in OPERATIONS:  # each occurs in some that are learnt
        assert name == "copy" or any(name in pair.split(", ") for pair in learnt)


@pytest.mark.parametrize("name", ["add", "count", "reverse", "look up", "reckon", "story"])
def test_no_question_is_on_both_sides(name):
    both = [
        {problem(name, 2, on, n, asked="train").question for n in range(1500)}
        for on in ("train", "test")
    ]
    assert len(both[0]) > 300 and not both[0] & both[1]


def test_letters_and_digits_stand_apart():
    """Whatever a tokenizer has learnt, no token holds two of them."""
    texts = list(islice(tasks.facts(), 2000))
    tokenizer = BPE.train(texts, 700, "gpt4", (END_OF_TEXT,))
    for name in (*PLAIN, COMPOSED[0]):
        asked = problem(name, 4, "train", 0)
        for run in re.findall(r"\b\w(?: \w)+\b", f"{asked.question} {asked.worked}"):
            pieces = [tokenizer.decode([i]) for i in tokenizer.encode(run)]
            assert all(len(piece.strip()) <= 1 for piece in pieces), (run, pieces)


def test_statements_are_of_the_side_to_learn_from():
    said = " ".join(islice(tasks.facts(), 400))
    sums = re.findall(r"(\d(?: \d)*) \+ (\d(?: \d)*) = (\d(?: \d)*)\.", said)
    assert len(sums) > 50
    for a, b, c in sums:
        assert int(a.replace(" ", "")) + int(b.replace(" ", "")) == int(c.replace(" ", ""))
        assert side(f"add {' '.join(sorted((a, b)))}") == "train"


def test_questions_to_pretrain_on_are_of_the_side_to_learn_from():
    asked = "\n\n".join(islice(tasks.quiz(), 100)).split("\n\n")
    assert len(asked) == 400 and asked[:40] == "\n\n".join(islice(tasks.quiz(), 10)).split("\n\n")
    held = {problem(name, level, "test", n, asked="train").question
            for name in ("story", "unsaid") for level in (1, 2) for n in range(300)}  # fmt: skip
    ours = {p.question: p.key for name in ("story", "unsaid") for level in (1, 2, 3)
            for n in range(40) for p in [problem(name, level, "train", n, seed=1)]}  # fmt: skip
    found = 0
    for text in asked:
        question, answer = re.fullmatch(r"Question: (.+)\nAnswer: (.+)", text).groups()
        assert "Now tell me:" not in question and not question.startswith("Listen.")
        found += question in ours and side(ours[question]) == "train"
        assert answer == "I don't know" or answer.removeprefix("the ") in question
        assert question not in held
    assert found == 40  # the first ten texts, whatever was drawn for them


@given(names, numbers)
def test_a_right_reply_is_worth_more_than_a_wrong_one(name, number):
    asked = problem(name, 2, "train", number)
    for criterion in tasks.CRITERIA:
        assert 0 <= utility(asked, "something else", criterion) <= 4
    assert utility(asked, asked.answer) > utility(asked, "x x x")
    assert utility(asked, asked.answer) >= utility(asked, f"Well, let me see. {asked.worked} " * 2)
    if asked.answer != "I don't know":
        assert utility(asked, "I don't know.", "honest") == 3 > utility(asked, "x x", "honest")
    assert utility(asked, "You are stupid.", "harmless") == 0


def test_raters_differ_as_they_are_made():
    asked, rng = problem("add", 2, "train", 0), random.Random(0)
    for rater in tasks.RATERS:
        middle = tasks.Rater(rater.name, rater.noise, 0.0, 0.0)
        wrong = "1 and then a long excuse for it " * 3
        rated = [rater.rate(asked, wrong, "helpful", rng) for _ in range(3000)]
        plain = [middle.rate(asked, wrong, "helpful", rng) for _ in range(3000)]
        assert {*rated} <= {*range(tasks.MOST + 1)}
        shift = rater.bias + rater.length * len(wrong) / 100
        assert mean(rated) - mean(plain) == pytest.approx(shift, abs=0.1)


@pytest.mark.parametrize("rater", tasks.RATERS, ids=lambda r: r.name)
@pytest.mark.parametrize("reply", ["1", "nothing at all that is right", None])
def test_chances_are_how_often_a_rating_comes(rater, reply):
    asked, rng = problem("add", 2, "train", 0), random.Random(0)
    reply = reply or asked.answer
    chances = rater.chances(rater.felt(asked, reply))
    came = Counter(rater.rate(asked, reply, "helpful", rng) for _ in range(20_000))
    assert sum(chances) == pytest.approx(1) and len(chances) == tasks.MOST + 1
    for value, chance in enumerate(chances):
        assert came[value] / 20_000 == pytest.approx(chance, abs=0.015)


def test_what_there_is_not_is_told():
    with pytest.raises(UserError, match="no task 'dance'"):
        problem("dance", 1, "train", 0)
    with pytest.raises(UserError, match="no criterion"):
        utility(problem("add", 1, "train", 0), "1", "fun")
