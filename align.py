"""From a model that continues texts to one that answers.

Idea: a base model knows language, and goes on with whatever it is given. Tuned on conversations, of
which only the assistant's words are asked for, it learns what an instruction is; that it learnt the
idea and not the sentences, tasks show whose words and combinations it was never tuned on.

    sft    supervised tuning on instructions, with an examination before and after
    label  a person puts a run's answers in order, at the terminal; what was said is a file

Run: python align.py sft                      some minutes; a base run is made if there is none
     python align.py sft --base run-001 --lessons.count 50000 --steps 3000
     python align.py sft --path conversations.jsonl            instead of the lessons
     python align.py sft --mix alpaca=alpaca_data.json --cap 500000   beside them
     python align.py label --run sft --out preferences.jsonl

Papers: Wei et al. 2022, FLAN (arXiv 2109.01652); Ouyang et al. 2022, InstructGPT (arXiv
2203.02155).
"""

import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path

import tyro
from tqdm import tqdm

import examine
import tasks
from chat import Turn, knows_roles
from data import CACHE
from examine import Examine, Manner, Result, examined, from_tasks, replies, writer_of
from generate import Sampling
from instruct import Lessons, lessons, write
from preferences import Asked, label
from run import RUNS, Run, UserError, check_free, fingerprint, main, step_of, table, write_json
from training import stored

# A base for the tasks: stories, statements in which their words occur, and what a question is.
# Its epsilon is that of a Qwen3, so that other programs can read what is made of it.
BASE = ("--data.mix", "stories=world:@1", "facts=facts:@2", "quiz=quiz:4000@1",
        "--model.norm-eps", "1e-6", "--model.context", "512",
        "--batch", "4", "--steps", "2000")  # fmt: skip


@dataclass(frozen=True)
class Sft:
    """Tune a base run on instructions."""

    base: str = ""  # a run's name or folder, or a Hugging Face folder; empty: base, made if need be
    name: str = ""  # of the tuned run; empty: the first of sft, sft-2, … that is free
    path: str = ""  # conversations of yours instead of lessons: .jsonl, .json or .csv
    mix: tuple[str, ...] = ()  # conversations of yours beside the lessons: name=path
    cap: int = (
        1_000_000  # tokens up to which each of them counts, so that a large one does not rule
    )
    lessons: Lessons = Lessons()
    steps: int = 1500  # updates
    batch: int = 4  # rows in an update
    lr: float = 0.01  # learning rate
    asked: int = 40  # questions of each task in the examinations
    seed: int = 0
    device: str = "auto"  # auto, cpu, cuda or mps

    def __post_init__(self):
        if min(self.steps, self.batch, self.asked) < 1:
            raise UserError("--steps, --batch and --asked must be at least 1")
        if self.path and self.mix:
            raise UserError("--path stands instead of the lessons, --mix beside them: give one")


def start(*words: str) -> None:
    """Run one of our scripts as a user would; its failure is ours."""
    folder = Path(__file__).parent
    print(f"\n$ python {shlex.join(words)}\n", flush=True)
    code = subprocess.run([sys.executable, str(folder / words[0]), *words[1:]]).returncode
    if code:
        sys.exit(code)


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


def lessons_file(how: Lessons) -> Path:
    """The lessons as a file, which anybody can look at; made once."""
    made_by = [Path(module.__file__).read_text() for module in (tasks, sys.modules["instruct"])]
    mark = fingerprint({"how": asdict(how), "made by": made_by})[:16]
    path = CACHE / f"lessons-{mark}.jsonl"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        bar = tqdm(lessons(how), "lessons", how.count, leave=False, disable=None)
        write(list(bar), path)
    return path


def sft(config: Sft) -> None:
    """Examine the base, tune it, examine what came of it."""
    config = replace(config, name=config.name or free("sft"))
    check_free(config.name)
    base = base_run(config.base)
    own = ("--data.path", config.path)
    if not config.path:
        own = (
            "--data.mix",
            f"lessons={lessons_file(config.lessons)}",
            *config.mix,
            "--data.cap",
            str(config.cap),
        )
    before = before_tuning(config, base)
    start("train.py", "--base", base, "--name", config.name, "--objective", "chat",
          "--data.form", "chat", *own, "--steps", str(config.steps),
          "--batch", str(config.batch), "--optim.lr", str(config.lr),
          "--seed", str(config.seed), "--device", config.device)  # fmt: skip
    report(config, before | {"tuned": examination(config, config.name, 0)})


def before_tuning(config: Sft, base: str) -> dict[str, list[Result]]:
    """A base is asked as it stands, and with four examples, which tell it the form."""
    return {
        "base": examination(config, base, 0),
        "base, 4 examples": examination(config, base, 4),
    }


NEW = "new pairs"  # of operations: compositions that no lesson had


def examination(config: Sft, run: str, shots: int) -> list[Result]:
    """On problems, words and compositions that no lesson had; the compositions together."""
    how = Examine(tasks=tasks.PLAIN, count=config.asked, shots=shots, seed=config.seed, tokens=60)
    writer, pairs = writer_of(run, "", config.device), tuple(tasks.composed("test"))
    some = replace(how, tasks=pairs, count=max(1, config.asked // len(pairs)))
    return [*examined(writer, how), *examined(writer, some, NEW)]


def report(config: Sft, found: dict[str, list[Result]]) -> None:
    """A table and a picture of all examinations, beside the run."""
    each = zip(*found.values(), strict=True)
    rows = [(kinds[0].kind, *(f"{r.right:.0%}" for r in kinds)) for kinds in each]
    means = (f"{mean(each):.0%}" for each in found.values())
    print("\n" + table(("right answers", *found), *rows, ("mean", *means)))
    folder = Run.open(config.name).folder
    write_json(folder / "examination.json", {
        name: [r._asdict() for r in each] for name, each in found.items()
    })  # fmt: skip
    path = folder / "examination.png"
    examine.draw(found, path, "Problems, words and compositions that no lesson had")
    print(f"\npicture: {path}\nchat:    python generate.py --run {config.name} --chat")


def mean(found: Sequence[Result]) -> float:
    return sum(r.right for r in found) / len(found)


# --- what a person prefers ------------------------------------------------------------------------


@dataclass(frozen=True)
class Label:
    """Put the answers of a run in order, at the terminal."""

    run: str = ""  # whose answers: a run's name or folder; empty: the newest
    out: str = "preferences.jsonl"  # the file to which each order goes as soon as it is given
    count: int = 20  # questions
    each: int = 4  # answers to a question, at most
    temperature: float = 1.0  # at which they are drawn
    tokens: int = 80  # of an answer, at most
    seed: int = 0
    device: str = "auto"  # auto, cpu, cuda or mps

    def __post_init__(self):
        if self.count < 1 or not 2 <= self.each <= 9:
            raise UserError("--count must be at least 1, and --each from 2 to 9")


def answers(config: Label) -> list[Asked]:
    """Questions and what the run says to each; the same answer is there once."""
    writer = writer_of(config.run, "", config.device)
    how = Manner(chat=knows_roles(writer.tokenizer))
    asked = from_tasks(
        tasks.PLAIN, -(-config.count // len(tasks.PLAIN)), "train", config.seed, (1,)
    )
    asked = asked[: config.count]
    prompts = examine.prompts(writer, asked, [], how, config.seed)
    drawn = Sampling(config.temperature, top_p=1.0)
    said = [
        replies(writer, prompts, drawn, config.tokens, config.seed + 10**6 * i)
        for i in range(config.each)
    ]
    each = (tuple(dict.fromkeys(some)) for some in zip(*said, strict=True))
    return [([Turn("user", q.question)], some) for q, some in zip(asked, each, strict=True)]


def labels(config: Label) -> None:
    label([one for one in answers(config) if len(one[1]) > 1], Path(config.out))


# --- the script -----------------------------------------------------------------------------------


STAGES = {"sft": (Sft, sft), "label": (Label, labels)}


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


def script() -> None:
    """Without arguments: sft."""
    choose(STAGES, ["sft"], __doc__)


if __name__ == "__main__":
    main(script)
