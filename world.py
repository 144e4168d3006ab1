"""A small world that writes stories, and knows what is true in them.

Idea: two people, a thing, a box, some places. What happens changes a state, the state decides what
can happen, and each sentence says one event. So a story can be read back, sentence by sentence, and
whoever continues one can be judged: is the sentence one of this world, are the people still the
same, did Ann give away what she did not have?

    story     events from a seed, and the state that they lead to
    read      the events of a text, and all that is wrong with it
    question  what can be asked about a story, with its true answer; or what the story does not say

Run: python world.py       three stories with what is asked about them, and a wrong one, read back
     python train.py --data.source world

Papers: Weston et al. 2015, bAbI (arXiv 1502.05698); Eldan and Li 2023, TinyStories (arXiv
2305.07759).
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

from run import generator, main

# --- what there is --------------------------------------------------------------------------------

NAMES = (
    "Ada", "Ben", "Cleo", "Dan", "Ella", "Finn", "Gus", "Hana", "Ida", "Jon", "Kim", "Leo", "Mia",
    "Ned", "Ola", "Pia", "Ravi", "Sam", "Tess", "Uma", "Vic", "Wim", "Yara", "Zoe",
)  # fmt: skip
THINGS = ("ball", "book", "bell", "cup", "drum", "flag", "hat", "kite", "key", "lamp", "map",
          "pen", "ring", "rope", "shell", "stone")  # fmt: skip
COLOURS = ("black", "blue", "brown", "green", "grey", "pink", "red", "white", "yellow")
PLACES = ("barn", "cave", "cellar", "forest", "garden", "hall", "kitchen", "library", "market",
          "park", "school", "tower")  # fmt: skip
BOXES = ("bag", "basket", "box", "chest", "jar", "sack")
MOODS = ("bored", "calm", "cold", "glad", "hungry", "proud", "sad", "tired")
WORDS = {"a": NAMES, "b": NAMES, "thing": THINGS, "colour": COLOURS, "place": PLACES,
         "other": PLACES, "box": BOXES, "mood": MOODS}  # fmt: skip
NOBODY = "I don't know."  # the honest answer to what a story does not say

# What can happen, and how it is said.
SAID = {
    "begin": ("This is a story about {a} and {b}.", "Once there were two friends, {a} and {b}.",
              "{a} and {b} were friends.", "{a} knew {b} well."),
    "at": ("{a} was in the {place}.", "At first {a} was in the {place}.",
           "In the morning {a} was in the {place}."),
    "own": ("{a} had a {colour} {thing}.", "{a} owned a {colour} {thing}.",
            "A {colour} {thing} belonged to {a}."),
    "go": ("{a} went to the {place}.", "{a} walked to the {place}.", "Then {a} ran to the {place}.",
           "After that {a} came to the {place}."),
    "give": ("{a} gave the {thing} to {b}.", "{a} handed the {thing} to {b}.",
             "Then {b} got the {thing} from {a}."),
    "hide": ("{a} put the {thing} into the {box}.", "{a} hid the {thing} in the {box}.",
             "Then {a} laid the {thing} into the {box}."),
    "take": ("{a} took the {thing} out of the {box}.", "{a} found the {thing} in the {box}.",
             "Then {a} got the {thing} out of the {box}."),
    "feel": ("{a} felt {mood}.", "{a} was {mood}.", "Now {a} was very {mood}."),
    "end with": ("In the end {a} had the {colour} {thing}.",
                 "So {a} had the {colour} {thing} at the end of the day.",
                 "In the evening {a} still had the {colour} {thing}."),
    "end in": ("In the end the {colour} {thing} was in the {box}.",
               "So the {colour} {thing} was in the {box} at the end of the day.",
               "In the evening the {colour} {thing} was still in the {box}."),
}  # fmt: skip


class Event(NamedTuple):
    """What a sentence says: its kind, and who and what is in it."""

    kind: str
    who: dict[str, str]


@dataclass
class State:
    """What is true at some moment of a story."""

    people: tuple[str, ...] = ()
    place: dict[str, str] = field(default_factory=dict)  # of each person
    thing: str = ""
    colour: str = ""
    holder: str = ""  # a person; empty: it is in the box
    box: str = ""  # the one in which it is, or was at last
    box_place: str = ""  # where that stands
    ended: bool = False

    def wrong(self, event: Event) -> str:
        """Why this cannot happen now, in words; an empty string if it can."""
        who, kind = event.who, event.kind
        a, b = who.get("a", ""), who.get("b", "")
        if self.ended:
            return "something happens behind the end"
        if kind == "begin":
            return "it begins twice" if self.people else "one person is two" if a == b else ""
        if not self.people:
            return "it does not begin"
        if strangers := {x for x in (a, b) if x} - {*self.people}:
            return f"{' and '.join(sorted(strangers))} is not in it"
        if who.get("thing", self.thing) != self.thing and kind != "own":
            return f"there is no {who['thing']}"
        if who.get("colour", self.colour) != self.colour and kind != "own":
            return f"the {self.thing} is {self.colour}"
        here = self.place.get(a)
        match kind:
            case "at":
                return f"{a} is somewhere already" if here else ""
            case "own":
                return f"there is a {self.thing} already" if self.thing else ""
            case "go":
                return f"{a} is there already" if here == who["place"] else ""
            case "give" if self.holder != a:
                return f"{a} does not have it"
            case "give":
                return "" if here and here == self.place.get(b) and a != b else "they are apart"
            case "hide":
                return "" if self.holder == a and here else f"{a} does not have it"
            case "take":
                there = not self.holder and who["box"] == self.box and here == self.box_place
                return "" if there and self.box else "it is not there"
            case "end with":
                return "" if self.holder == a else f"{a} does not have it"
            case "end in":
                return "" if not self.holder and who["box"] == self.box else "it is not there"
        return ""

    def happen(self, event: Event) -> None:
        """Let an event change what is true."""
        who = event.who
        match event.kind:
            case "begin":
                self.people = who["a"], who["b"]
            case "at" | "go":
                self.place[who["a"]] = who["place"]
            case "own":
                self.thing, self.colour, self.holder = who["thing"], who["colour"], who["a"]
            case "give":
                self.holder = who["b"]
            case "hide":
                self.holder, self.box, self.box_place = "", who["box"], self.place.get(who["a"], "")
            case "take":
                self.holder = who["a"]
            case "end with" | "end in":
                self.ended = True


# --- stories --------------------------------------------------------------------------------------


class Story(NamedTuple):
    text: str
    events: list[Event]
    state: State  # at its end


def story(rng: random.Random, length: int = 4) -> Story:
    """A story in which about `length` things happen between beginning and end."""
    a, b = rng.sample(NAMES, 2)
    near, far = rng.sample(PLACES, 2)
    state, events = State(), []
    colour, thing = rng.choice(COLOURS), rng.choice(THINGS)

    def then(kind: str, **who: str) -> None:
        events.append(Event(kind, who))
        state.happen(events[-1])

    then("begin", a=a, b=b)
    then("at", a=a, place=near)
    then("at", a=b, place=rng.choice((near, far)))
    then("own", a=rng.choice((a, b)), colour=colour, thing=thing)
    for _ in range(rng.randint(length - 1, length + 1)):
        event = rng.choice(possible(state, rng))
        then(event.kind, **event.who)
    if state.holder:
        then("end with", a=state.holder, colour=colour, thing=thing)
    else:
        then("end in", box=state.box, colour=colour, thing=thing)
    text = " ".join(rng.choice(SAID[kind]).format(**who) for kind, who in events)
    return Story(text, events, state)


def possible(state: State, rng: random.Random) -> list[Event]:
    """Of what can happen now some of each kind, what moves the thing twice."""
    a, b = rng.sample(state.people, 2)
    found = [
        Event("go", {"a": a, "place": rng.choice([p for p in PLACES if p != state.place[a]])}),
        Event("go", {"a": b, "place": state.place[a]}),
        Event("feel", {"a": a, "mood": rng.choice(MOODS)}),
        *2 * [Event("give", {"a": a, "b": b, "thing": state.thing})],
        *2 * [Event("hide", {"a": a, "thing": state.thing, "box": rng.choice(BOXES)})],
        *2 * [Event("take", {"a": a, "thing": state.thing, "box": state.box})],
    ]
    return [event for event in found if not state.wrong(event)]


def stories(seed: int = 0, first: int = 0) -> Iterator[Story]:
    """Endless, each from its own number, so that any part can be made again."""
    while True:
        yield story(random.Random(generator(seed, "story", first).initial_seed()))
        first += 1


# --- reading them back ----------------------------------------------------------------------------


@cache
def patterns() -> list[tuple[str, re.Pattern[str]]]:
    """Of each sentence the kind of event, and an expression that finds who is in it."""
    found = []
    for kind, templates in SAID.items():
        for template in templates:
            expression, seen = "", set()
            for text, name in re.findall(r"([^{]*)(?:\{(\w+)\})?", template):
                expression += re.escape(text)
                if name:
                    expression += f"(?P<{name}>{'|'.join(WORDS[name])})"
                    seen.add(name)
            found.append((kind, re.compile(expression)))
    return found


def sentences(text: str) -> list[str]:
    return [s for s in re.split(r"(?<=\.)\s+", text.strip()) if s]


def understood(sentence: str) -> Event | None:
    """The event that a sentence says, if it is one of this world."""
    for kind, pattern in patterns():
        if match := pattern.fullmatch(sentence):
            return Event(kind, match.groupdict())
    return None


class Reading(NamedTuple):
    """What the world makes of a text."""

    state: State
    unknown: list[str]  # sentences that are none of this world
    wrong: list[str]  # what cannot be, in words

    @property
    def whole(self) -> bool:
        """Does it begin, end, and keep its people, in sentences of this world?"""
        strangers = any("is not in it" in why or "begin" in why for why in self.wrong)
        return self.state.ended and not self.unknown and not strangers

    @property
    def true(self) -> bool:
        """Is it whole, and nothing in it impossible?"""
        return self.whole and not self.wrong


def read(text: str) -> Reading:
    """Follow a text; what cannot happen is noted, and then has happened all the same."""
    reading = Reading(State(), [], [])
    for sentence in sentences(text):
        event = understood(sentence)
        if event is None:
            reading.unknown.append(sentence)
            continue
        if why := reading.state.wrong(event):
            reading.wrong.append(f"{sentence} But {why}.")
        if not reading.state.ended:
            reading.state.happen(event)
    return reading


def judged(texts: list[str]) -> str:
    """In words, how many of some texts are stories of this world."""
    found = [read(text) for text in texts]
    whole, true = sum(r.whole for r in found), sum(r.true for r in found)
    return (
        f"read back: {whole} of {len(texts)} stories are whole and keep their characters; "
        f"in {true} of them nothing is impossible"
    )


# --- questions ------------------------------------------------------------------------------------


class Question(NamedTuple):
    """What can be asked, the answer, and the sentences from which it follows."""

    kind: str
    text: str
    answer: str
    because: str


ASKED = {
    "holder": ("Who has the {thing} at the end?", "Who ends up with the {thing}?",
               "In whose hands is the {thing} in the end?"),
    "box": ("What is the {thing} in at the end?", "In what is the {thing} left?",
            "Where is the {thing} kept in the end?"),
    "place": ("Where is {a} at the end?", "In which place does {a} end up?",
              "At the end of the story, where is {a}?"),
    "colour": ("What colour is the {thing}?", "Which colour has the {thing}?",
               "The {thing} in this story, what colour is it?"),
    "age": ("How old is {a}?", "What is the age of {a}?", "How many years has {a} lived?"),
    "stranger": ("Where is {b} at the end?", "In which place does {b} end up?",
                 "At the end of the story, where is {b}?"),
    "other thing": ("Who has the {other} at the end?", "Who ends up with the {other}?",
                    "In whose hands is the {other} in the end?"),
}  # fmt: skip
UNSAID = ("age", "stranger", "other thing")  # what no story says


def question(told: Story, kind: str, rng: random.Random, template: int = 0) -> Question | None:
    """A question of this kind about a story, if it has one."""
    state = told.state
    a = rng.choice(state.people)
    words = {
        "thing": state.thing,
        "a": a,
        "b": rng.choice([n for n in NAMES if n not in state.people]),
        "other": rng.choice([t for t in THINGS if t != state.thing]),
    }
    answers = {"holder": state.holder, "box": "" if state.holder else f"the {state.box}",
               "place": f"the {state.place[a]}", "colour": state.colour}  # fmt: skip
    if (answer := answers.get(kind, NOBODY)) == "":
        return None
    because = evidence(told, kind, a) if kind in answers else []
    text = ASKED[kind][template].format(**words)
    return Question(kind, text, answer, " ".join(because) or "The story does not say this.")


def evidence(told: Story, kind: str, a: str) -> list[str]:
    """The sentences that decide an answer, in order."""
    wanted = {
        "holder": ("own", "give", "hide", "take"), "box": ("own", "give", "hide", "take"),
        "place": ("at", "go"), "colour": ("own",),
    }[kind]  # fmt: skip
    found = []
    for sentence, event in zip(sentences(told.text), told.events, strict=True):
        if event.kind in wanted and (kind != "place" or event.who["a"] == a):
            found.append(sentence)
    return found if kind != "place" else found[-1:]


# --- the script -----------------------------------------------------------------------------------


def script() -> None:
    rng = random.Random(0)
    for number, told in zip(range(3), stories(), strict=False):
        print(f"{number + 1}. {told.text}\n")
        for kind in ASKED:
            if asked := question(told, kind, rng, rng.randrange(3)):
                print(f"   {asked.text} — {asked.answer} ({asked.because})")
        print()
    told = story(rng)
    a, b = told.state.people
    wrong = told.text.replace(a, rng.choice([n for n in NAMES if n not in (a, b)]), 1)
    print(f"and one in which a name was changed:\n\n   {wrong}\n")
    for why in read(wrong).wrong:
        print(f"   {why}")


if __name__ == "__main__":
    main(script)
