"""The world: it understands its own stories, finds what is wrong in others, answers truly."""

import random
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

import data
import documents
import world
from run import UserError
from world import ASKED, NAMES, NOBODY, PLACES, SAID, UNSAID, WORDS, Event, question, read, story


@given(st.integers(0, 2**32), st.integers(1, 12))
def test_a_story_is_whole_and_true_when_read_back(seed, length):
    told = story(random.Random(seed), length)
    reading = read(told.text)
    assert reading.true and not reading.unknown
    assert reading.state == told.state
    assert told == story(random.Random(seed), length)


@given(st.sampled_from(sorted(SAID)), st.integers(0, 2**32))
def test_a_sentence_is_understood_as_what_it_says(kind, seed):
    rng = random.Random(seed)
    for template in SAID[kind]:
        who = {
            name: rng.choice(words) for name, words in WORDS.items() if f"{{{name}}}" in template
        }
        found = world.understood(template.format(**who))
        assert found is not None and found.who == who
        # "A had it" and the like may be said of several events, which then mean the same
        assert found == Event(kind, who) or template in SAID[found.kind]


def changed(told, rng):
    """The same story with one thing wrong, and of what kind that is."""
    sentences = world.sentences(told.text)
    a, b = told.state.people
    stranger = rng.choice([n for n in NAMES if n not in (a, b)])
    yield "no end", " ".join(sentences[:-1])
    yield "no beginning", " ".join(sentences[1:])
    yield "begins twice", " ".join([sentences[0], *sentences])
    yield "a stranger", told.text[::-1].replace(a[::-1], stranger[::-1], 1)[::-1]
    yield "behind the end", f"{told.text} {sentences[-1]}"
    yield "no sentence", told.text.replace(".", " perhaps.", 1)
    thing = rng.choice([t for t in world.THINGS if t != told.state.thing])
    if told.text.count(told.state.thing) > 1:
        at = told.text.rindex(told.state.thing)
        yield "another thing", f"{told.text[:at]}{thing}{told.text[at + len(told.state.thing) :]}"
    colour = rng.choice([c for c in world.COLOURS if c != told.state.colour])
    yield "another colour", told.text[::-1].replace(told.state.colour[::-1], colour[::-1], 1)[::-1]


@given(st.integers(0, 2**32))
def test_what_is_wrong_is_found(seed):
    rng = random.Random(seed)
    told = story(rng)
    for kind, text in changed(told, rng):
        reading = read(text)
        assert not reading.true, (kind, text)
        if kind in ("no end", "no beginning", "a stranger", "no sentence"):
            assert not reading.whole, (kind, text)


@pytest.mark.parametrize("text, said", [
    ("Ada and Ben were friends. Ada was in the barn. Ben was in the hall. Ada had a red cup. "
     "Ada gave the cup to Ben. In the end Ben had the red cup.", "apart"),
    ("Ada and Ben were friends. Ada was in the barn. Ben was in the barn. Ada had a red cup. "
     "Ben gave the cup to Ada. In the end Ada had the red cup.", "Ben does not have it"),
    ("Ada and Ben were friends. Ada was in the barn. Ben was in the hall. Ada had a red cup. "
     "Ada put the cup into the box. Ben found the cup in the box. In the end Ben had the red cup.",
     "not there"),
    ("Ada and Ben were friends. Ada was in the barn. Ben was in the hall. Ada had a red cup. "
     "In the end the red cup was in the bag.", "not there"),
    ("Ada and Ada were friends.", "one person is two"),
])  # fmt: skip
def test_what_cannot_be_is_told(text, said):
    assert any(said in why for why in read(text).wrong)


@given(st.integers(0, 2**32), st.sampled_from(sorted(ASKED)), st.integers(0, 2))
def test_answers_are_true(seed, kind, template):
    rng = random.Random(seed)
    told = story(rng)
    asked = question(told, kind, rng, template)
    state = read(told.text).state  # found by reading alone
    if asked is None:
        assert kind == ("box" if state.holder else "holder")
        return
    if kind in UNSAID:
        assert asked.answer == NOBODY
        return
    assert asked.because and all(s in told.text for s in world.sentences(asked.because))
    if kind == "place":
        name = next(n for n in state.people if n in asked.text)
        assert asked.answer == f"the {state.place[name]}" and state.place[name] in PLACES
        assert state.place[name] in asked.because
    else:
        right = {"holder": state.holder, "box": f"the {state.box}", "colour": state.colour}
        assert asked.answer == right[kind]


def test_stories_are_many_and_each_can_be_made_again():
    some = [s.text for s in islice(world.stories(), 3000)]
    assert len(set(some)) == 3000
    assert [s.text for s in islice(world.stories(first=2990), 10)] == some[2990:]
    assert next(world.stories(seed=1)).text != some[0]


def test_stories_and_statements_are_sources_of_documents():
    found = list(documents.read("world:5"))
    assert [d.text for d in found] == [s.text for s in islice(world.stories(), 5)]
    assert found[3].source == "world:3" and len(list(documents.read("facts:4"))) == 4
    assert data.sources_of(data.DataConfig(source="world"))[0].path == "world:"
    for wrong in ("world:many", "facts:0"):
        with pytest.raises(UserError, match="stands how many"):
            list(documents.read(wrong))
    with pytest.raises(UserError, match="needs no"):
        data.DataConfig(source="world", path="book.txt")


def test_stories_are_judged_together():
    """Of one that is true, one that only keeps its characters, and one that is none."""
    told = next(world.stories()).text
    colour = next(c for c in world.COLOURS if c in told)
    other = next(c for c in world.COLOURS if c != colour)
    begin, _, end = told.rpartition(colour)
    wrong = f"{begin}{other}{end}"
    assert world.read(told).true and world.read(wrong).whole and not world.read(wrong).true
    said = world.judged([told, wrong, "Once."])
    assert "2 of 3 stories are whole" in said and "in 1 of them nothing is impossible" in said
