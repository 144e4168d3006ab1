"""What each stage of tour.sh has reached, beside what it should reach; and the tour's page.

Idea: a number without its range says nothing to someone who sees it for the first time. The ranges
are what runs have given, with room around them; a number outside is told, and is no error.

Run: bash tour.sh            all stages, each followed by
     python tour.py text     its number
     python tour.py          the page of the tour, as far as it has come
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import tyro

from pictures import table
from run import RUNS, Run, UserError, main, read_json, write_json


class Stage(NamedTuple):
    """One stage: what its number is, how it is read, between what it should lie."""

    what: str
    number: Callable[[str], float]  # of a tour's name
    low: float
    high: float
    form: str
    picture: str = ""  # below runs/, {} stands for the tour's name


def said(tour: str, stage: str) -> str:
    """All that a stage has printed."""
    return (RUNS / tour / f"{stage}.txt").read_text(encoding="utf-8")


def megabytes(tour: str) -> float:
    found = re.search(r"train +[\d,]+ documents +([\d,]+) bytes", said(tour, "text"))
    return int(found[1].replace(",", "")) / 1e6


def bits(run: str) -> float:
    """Bits per byte, or per token asked, when a run was last measured."""
    rows = Run.open(run).metrics()
    return [row for row in rows if "bits_per_byte" in row][-1]["bits_per_byte"]


def examination(run: str, when: str, kind: str) -> float:
    """Right answers to questions of a kind, before or after tuning."""
    found = read_json(Run.open(run).folder / "examination.json")[when]
    return next(r["right"] for r in found if r["kind"].startswith(kind))


def standing(run: str, when: str, name: str) -> float:
    return read_json(Run.open(run).folder / "standing.json")[when][name]


def of_results(run: str) -> float:
    """The mean of an examination's kinds."""
    found = read_json(Run.open(run).folder / "examination.json")["results"]
    return sum(r["right"] for r in found) / len(found)


def loss_of_bits(tour: str) -> float:
    row = Run.open(f"{tour}-quant").metrics()[-1]
    return row["nats_per_token"] / row["whole"]


def by_thought(tour: str) -> float:
    """How many more sums are right step by step than at once, at four digits."""
    shares = read_json(RUNS / "thought.json")
    return shares["step by step"][-1][0] - shares["at once"][-1][0]


STAGES = {
    "text": Stage("megabytes of clean text in this Python", megabytes, 1.5, 4, "{:.2f}"),
    "base": Stage("bits per byte of held-out text", lambda t: bits(f"{t}-base"), 0.6, 1, "{:.3f}",
                  "{}-base/loss.png"),
    "sft": Stage("new sums right, after tuning", lambda t: examination(f"{t}-sft", "tuned", "add"),
                 0.4, 1, "{:.0%}", "{}-sft/examination.png"),
    "reward": Stage("pairs of answers ordered as people do",
                    lambda t: read_json(RUNS / f"{t}-reward/examination.json")["accuracy"],
                    0.6, 0.9, "{:.0%}"),
    "ppo": Stage("worth of a drawn answer gained, 0 to 4",
                 lambda t: standing(f"{t}-ppo", "after", "worth")
                 - standing(f"{t}-ppo", "before", "worth"),
                 0.2, 1.5, "{:+.2f}", "{}-ppo/gauge.png"),
    "lora": Stage("a new task right, by few weights",
                  lambda t: examination(f"{t}-lora", "tuned", "copy"), 0.7, 1, "{:.0%}",
                  "{}-lora/examination.png"),
    "quant": Stage("held-out loss in four bits, by that in 32", loss_of_bits, 0.98, 1.05, "{:.3f}"),
    "thought": Stage("more sums right step by step than at once", by_thought, 0.5, 1, "{:+.0%}",
                     "thought.png"),
    "examined": Stage("sums right, aligned and in four bits",
                      lambda t: of_results(f"{t}-quant"), 0.7, 1, "{:.0%}",
                      "{}-quant/examination.png"),
}  # fmt: skip


@dataclass(frozen=True)
class Tour:
    """The number of a stage, or the page of the tour."""

    stage: tyro.conf.Positional[str] = "report"  # of tour.sh, or report
    tour: str = "tour"  # its folder in runs/
    seconds: float = 0.0  # that the stage took

    def __post_init__(self):
        if self.stage not in (*STAGES, "report"):
            raise UserError(f"{self.stage!r} is none of {', '.join(STAGES)}, report")


def note(config: Tour) -> None:
    """Print a stage's number, and keep it: with that the stage is done."""
    stage = STAGES[config.stage]
    number = stage.number(config.tour)
    kept = {"number": number, "seconds": config.seconds}
    write_json(RUNS / config.tour / f"{config.stage}.json", kept)
    print(f"-- {config.stage}: {line(stage, kept)}")


def line(stage: Stage, kept: dict) -> str:
    low, high = (stage.form.format(x) for x in (stage.low, stage.high))
    inside = stage.low <= kept["number"] <= stage.high
    return (
        f"{stage.form.format(kept['number'])} {stage.what}; expected {low} to {high}"
        f"{'' if inside else ', which it is NOT'}; {kept['seconds']:.0f} s"
    )


def report(config: Tour) -> None:
    """One page: every stage's number, its picture, and what the final model answered."""
    folder = RUNS / config.tour
    done = {n: read_json(folder / f"{n}.json") for n in STAGES if (folder / f"{n}.json").exists()}
    if not done:
        raise UserError(f"no stage of {folder} is done: bash tour.sh")
    rows, pages = [], []
    for name, kept in done.items():
        stage = STAGES[name]
        form, inside = stage.form.format, stage.low <= kept["number"] <= stage.high
        rows.append((name, form(kept["number"]), f"{form(stage.low)} to {form(stage.high)}",
                     "" if inside else "outside", f"{kept['seconds']:.0f} s",
                     stage.what))  # fmt: skip
        path = RUNS / stage.picture.format(config.tour)
        if stage.picture and path.is_file():
            pages.append(f"![{name}: {stage.what}]({os.path.relpath(path, folder)})\n")
    minutes = sum(kept["seconds"] for kept in done.values()) / 60
    head = ("stage", "number", "expected", "", "took", "what it is")
    print("\n" + table(head, *rows) + f"\n\n{minutes:.1f} minutes in all")
    path = folder / "answer.txt"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    answer = [x for x in lines if x.strip(" you") and not x.startswith("/undo")]
    text = [
        f"# The tour: {len(done)} of {len(STAGES)} stages, {minutes:.1f} minutes\n",
        *("| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *rows)),
        "\nIts last model, aligned and in four bits, was asked:\n",
        *(f"> {x}\n>" for x in answer),
        "", *pages,
    ]  # fmt: skip
    (folder / "report.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    print(f"page: {folder / 'report.md'}")


def script() -> None:
    config = tyro.cli(Tour, description=__doc__)
    (report if config.stage == "report" else note)(config)


if __name__ == "__main__":
    main(script)
