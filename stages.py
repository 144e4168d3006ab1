"""Runs that are made of other runs, each by the command that a user would type.

Idea: alignment is a chain, and each of its links is a run with a name. A stage that needs a run
which is not there yet makes it, and shows how; one that was stopped goes on.

Run: python align.py sft --base base

Papers: Ouyang et al. 2022, InstructGPT (arXiv 2203.02155), figure 2.
"""

import sys
from collections.abc import Callable
from dataclasses import asdict
from itertools import count
from pathlib import Path

import tyro
from tqdm import tqdm

import instruct
import tasks
import world
from data import CACHE
from instruct import Lessons, lessons, write
from run import RUNS, Run, UserError, fingerprint, start, step_of
from training import stored

# A base for the tasks: stories, statements in which their words occur, and what a question is.
# Its epsilon is that of a Qwen3, so that other programs can read what is made of it.
BASE = ("--data.mix", "stories=world:@1", "facts=facts:@2", "quiz=quiz:4000@1",
        "--model.norm-eps", "1e-6", "--model.context", "512",
        "--batch", "4", "--steps", "2000")  # fmt: skip


def free(name: str) -> str:
    """name, name-2, name-3, …: the first that no run has."""
    names = (name if n == 1 else f"{name}-{n}" for n in count(1))
    return next(one for one in names if not (RUNS / one).exists())


def finished(run: Run) -> bool:
    return any(step_of(one) == stored(run).steps for one in run.checkpoints())


def trained(name: str, *words: str) -> str:
    """The run of this name; trained now if there is none, or on from where it was stopped."""
    if not (RUNS / name / "config.json").is_file():
        start("train.py", "--name", name, *words)
    elif not finished(Run.open(name)):
        start("train.py", "--resume", "--name", name)
    return name


def base_run(name: str) -> str:
    """The base to begin with."""
    return name or trained("base", *BASE)


def tuned_run(name: str) -> str:
    """A run that was tuned on instructions."""
    if not name and not (RUNS / "sft" / "config.json").is_file():
        start("align.py", "sft", "--name", "sft")
    return name or "sft"


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
                   description=kind.__doc__.split("\n")[0]))  # fmt: skip
