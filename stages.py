"""Runs that are made of other runs, each by the command that a user would type.

Idea: alignment is a chain, and each of its links is a run with a name. A stage that needs a run
which is not there yet makes it, and shows how; one that was stopped goes on.

Run: python align.py sft --base base

Papers: Ouyang et al. 2022, InstructGPT (arXiv 2203.02155), figure 2.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import count, takewhile
from pathlib import Path

import tyro
from tqdm import tqdm

import instruct
import tasks
import world
from data import CACHE
from instruct import Lessons, lessons, write
from run import RUNS, Run, UserError, fingerprint, read_json, start, step_of, write_json
from training import stored

# A base for the tasks: stories, statements in which their words occur, and what a question is.
# Its epsilon is that of a Qwen3, so that other programs can read what is made of it.
BASE = ("--data.mix", "stories=world:@1", "facts=facts:@2", "quiz=quiz:4000@1",
        "--model.norm-eps", "1e-6", "--model.context", "512",
        "--batch", "4", "--steps", "2000")  # fmt: skip


def numbered(name: str) -> Iterator[str]:
    """name, name-2, name-3, …"""
    return (name if n == 1 else f"{name}-{n}" for n in count(1))


def free(name: str) -> str:
    """The first of these names that no run has."""
    return next(one for one in numbered(name) if not (RUNS / one).exists())


def finished(run: Run) -> bool:
    return any(step_of(one) == stored(run).steps for one in run.checkpoints())


MADE_BY = "made_by.json"  # in a run's folder: the command, without the name


def made(name: str, *command: str, last: str = "") -> str:
    """The run that this command makes, or has made: the first of name, name-2, … that is free or is
    that run. A name alone does not tell with which settings a run was made."""

    def there(one: str) -> bool:
        path = RUNS / one / MADE_BY
        return path.is_file() and read_json(path).get("command") == [*command]

    found = next(one for one in numbered(name) if there(one) or not (RUNS / one).exists())
    return complete(found, *command, last=last)


def complete(name: str, *command: str, last: str = "") -> str:
    """The run of this name; made now if there is none, or on from where it was stopped.

    last: the file that its command writes last, if that is not its last checkpoint.
    """
    script = [*takewhile(lambda word: not word.startswith("--"), command)]
    if not (RUNS / name / "config.json").is_file():
        try:
            start(*script, "--name", name, *command[len(script) :])
        finally:
            if (RUNS / name).is_dir():
                write_json(RUNS / name / MADE_BY, {"command": command})
    elif not ((RUNS / name / last).is_file() if last else finished(Run.open(name))):
        start(*script, "--name", name, "--resume")
    return name


def trained(name: str, *words: str) -> str:
    """A run of train.py with these settings."""
    return made(name, "train.py", *words)


def base_run(name: str) -> str:
    """The base to begin with: the one of this name, or else whichever is called base."""
    return name or complete("base", "train.py", *BASE)


def tuned_run(name: str) -> str:
    """A run that was tuned on instructions: the one of this name, or else that called sft."""
    if name:
        return name
    if not (RUNS / "sft" / "config.json").is_file():
        start("align.py", "sft", "--name", "sft")
    return complete("sft", "train.py")  # if it was stopped


def lessons_file(how: Lessons) -> Path:
    """The lessons as a file, which anybody can look at; made once."""
    made_by = [Path(module.__file__).read_text() for module in (tasks, world, instruct)]
    mark = fingerprint({"how": asdict(how), "made by": made_by})[:16]
    path = CACHE / f"lessons-{mark}.jsonl"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        bar = tqdm(lessons(how), "lessons", how.count, leave=False, disable=None)
        write(list(bar), path)
    return path


def choose(stages: dict[str, tuple[type, Callable]], default: list[str], doc: str) -> None:
    """Run the stage that the command line names, by its settings; UserError if it names none."""
    what, *arguments = sys.argv[1:] or default
    if what in ("-h", "--help"):
        return print(doc)
    if what not in stages:
        raise UserError(f"there is no {what}: choose among {', '.join(stages)}")
    kind, stage = stages[what]
    stage(tyro.cli(kind, prog=f"{Path(sys.argv[0]).name} {what}", args=arguments,
                   description=kind.__doc__))  # fmt: skip
