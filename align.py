"""From a model that continues texts to one that answers, and then answers better.

Idea: a base model knows language, and goes on with whatever it is given. Tuned on conversations, of
which only the assistant's words are asked for, it learns what an instruction is; that it learnt the
idea and not the sentences, tasks show whose words and combinations it was never tuned on. Then it
is asked, its answers are compared, and it moves towards those that are better.

    sft      supervised tuning on instructions, with an examination before and after
    prefer   simulated people compare the answers of a run, and rate them; label: you do
    reward   a reward model, fitted to what was said
    ppo, grpo, dpo   the run improves, by a reward model, by a check, by comparisons alone
    think    a run that half of the time thinks before it answers learns, from right and wrong
             alone, that thinking pays
    hack     a weak reward model is deceived, and what the KL does about it
    all      the whole chain, with one table and one picture

Run: python align.py                          think, small: a minute or two
     python align.py sft                      some minutes; a base run is made if there is none
     python align.py sft --base run-001 --lessons.count 50000 --steps 3000
     python align.py sft --path conversations.jsonl            instead of the lessons
     python align.py sft --mix alpaca=alpaca_data.json --cap 500000   beside them
     python align.py label --run sft --out preferences.jsonl
     python align.py prefer --run sft --out simulated.jsonl
     python align.py reward --run sft --preferences preferences.jsonl
     python align.py grpo --run sft --tasks add reverse --steps 40
     python align.py ppo --run sft --reward reward
     python align.py dpo --run sft --preferences preferences.jsonl
     torchrun --nproc-per-node 2 -- align.py ppo --run sft      torchrun has a --run… itself
     python align.py all                      a quarter of an hour

Papers: Wei et al. 2022, FLAN (arXiv 2109.01652); Ouyang et al. 2022, InstructGPT (arXiv
2203.02155).
"""

from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import torch

import chain
import examine
import gauge
import improve
import judge
import preferences
import questions
import tasks
from adapters import adapt, first_ids
from chat import keep_template, knows_roles
from examine import Examine, Result, TooLong, examined
from improve import Dpo, Grpo, Improve, Improvement, Pair, Ppo, loop
from instruct import Lessons
from judge import problems
from lora import Adapter, flags, plain
from mesh import Group, join
from parallel_training import lead, one_voice, shared
from pictures import table
from questions import ByModel, judged, prompt_ids, question
from reward import load as load_reward
from rollout import sample
from run import Run, UserError, check_free, main, read_json, settings, start, write_json
from stages import base_run, choose, free, lessons_file, tuned_run
from step import pick_device
from training import stored
from writer import Writer, base_of, writer_of


@dataclass(frozen=True)
class Sft:
    """Tune a base run on instructions."""

    base: str = ""  # a run's name or folder, or a Hugging Face folder; empty: base, made if need be
    name: str = ""  # of the tuned run; empty: the first of sft, sft-2, … that is free
    path: str = ""  # conversations of yours instead of lessons: .jsonl, .json or .csv
    mix: tuple[str, ...] = ()  # conversations of yours beside the lessons: name=path
    # tokens up to which each of them counts, so that a large one does not rule
    cap: int = 1_000_000
    lessons: Lessons = Lessons()
    adapter: Adapter = Adapter()
    steps: int = 1500  # updates
    batch: int = 4  # rows in an update
    lr: float = 0.01  # learning rate
    asked: int = 40  # questions of each task in the examinations
    examined: tuple[str, ...] = ()  # tasks in them; empty: all, and pairs that no lesson had
    wording: Literal["new", "known"] = "new"  # of these: words that no lesson had, or the lessons'
    seed: int = 0
    device: str = "auto"  # auto, cpu, cuda or mps

    def __post_init__(self):
        if min(self.steps, self.batch, self.asked) < 1:
            raise UserError("--steps, --batch and --asked must be at least 1")
        tasks.check(self.examined or tasks.PLAIN, self.lessons.levels)
        if self.path and self.mix:
            raise UserError("--path stands instead of the lessons, --mix beside them: give one")


def sft(config: Sft) -> None:
    """Examine the base, tune it, examine what came of it."""
    config = replace(config, name=config.name or free("sft"))
    check_free(config.name, "go on with python train.py {}, or ")
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
    begun = base_of(base)
    begun.model.to(pick_device(config.device))
    before = before_tuning(config, begun)
    start("train.py", "--base", base, "--name", config.name, "--objective", "chat",
          "--data.form", "chat", *own, "--steps", str(config.steps),
          "--batch", str(config.batch), "--optim.lr", str(config.lr),
          "--seed", str(config.seed), "--device", config.device,
          *flags(config.adapter))  # fmt: skip
    writer = writer_of(config.name, "", config.device)
    report(config, before | {"tuned": examination(config, writer, 0)})


def before_tuning(config: Sft, base: Writer) -> dict[str, list[Result]]:
    """A base is asked as it stands, and with four examples, which tell it the form, if they fit."""
    found = {"base": examination(config, base, 0), "base, 4 examples": examination(config, base, 4)}
    return {name: each for name, each in found.items() if each}


NEW = "new pairs"  # of operations: compositions that no lesson had


def examination(config: Sft, writer: Writer, shots: int) -> list[Result]:
    """On problems, words and compositions that no lesson had; the compositions together. Or on
    problems of named tasks alone, at the lessons' levels. Where no question fits into the context
    behind its examples, there is no result; UserError if none fits without any."""
    how = Examine(tasks=tasks.PLAIN, count=config.asked, shots=shots, seed=config.seed, tokens=60,
                  wording=config.wording)  # fmt: skip
    if config.examined:
        how = replace(how, tasks=config.examined, levels=config.lessons.levels, tokens=160)
        parts = [(how, "")]
    else:
        pairs = tuple(tasks.composed("test"))
        some = replace(how, tasks=pairs, count=max(1, config.asked // len(pairs)))
        parts = [(how, ""), (some, NEW)]
    found = []
    for part, together in parts:
        with suppress(TooLong) if shots else nullcontext():
            found += examined(writer, part, together)
    return found


def report(config: Sft, found: dict[str, list[Result]]) -> None:
    """A table and a picture of all examinations, beside the run; - where none of the questions
    fitted, with four examples, into the context."""
    right = {name: {r.kind: f"{r.right:.0%}" for r in each} for name, each in found.items()}
    kinds = dict.fromkeys(r.kind for each in found.values() for r in each)
    rows = [(kind, *(some.get(kind, "-") for some in right.values())) for kind in kinds]
    means = (f"{mean(each):.0%}" for each in found.values())
    print("\n" + table(("right answers", *found), *rows, ("mean", *means)))
    folder = Run.open(config.name).folder
    write_json(folder / "examination.json", {
        name: [r._asdict() for r in each] for name, each in found.items()
    })  # fmt: skip
    path = folder / "examination.png"
    of = "Problems" if config.examined else "Problems and compositions"
    of += ", in words" if config.wording == "new" else ""
    examine.draw(found, path, f"{of} that no lesson had")
    print(f"\npicture: {path}\nchat:    python generate.py --run {config.name} --chat")


def mean(found: Sequence[Result]) -> float:
    return sum(r.right for r in found) / len(found)


# --- better answers -------------------------------------------------------------------------------

KINDS = {"ppo": Ppo, "grpo": Grpo, "dpo": Dpo}


def better(config: Improve) -> None:
    """Examine the run, improve it, examine what came of it; several processes share the work."""
    world = join()
    with one_voice(world):
        group = world if world.size > 1 else None
        kind = type(config).__name__.lower()
        if config.resume:
            run = shared(world, lambda: Run.resume(config.name))
            config = as_begun(config, run)
        else:
            config = replace(config, run=lead(world, lambda: tuned_run(config.run)))
        writer = writer_of(config.run, "", config.device)
        if config.adapter.kind != "none":
            writer = writer._replace(model=plain(writer.model))
            adapt(writer.model, config.adapter, config.seed,
                  ids=first_ids(config.adapter, writer.tokenizer, config.seed))  # fmt: skip
        if isinstance(config, Dpo) and not config.preferences:
            path = lead(world, lambda: judge.simulated(config))
            config = replace(config, preferences=path)
        it = improvement(config, writer, group)
        if config.resume:
            it.load(run)
            run.forget_after(it.step)
        else:
            config = replace(config, name=config.name or lead(world, lambda: free(kind)))
            run = shared(world, lambda: new_run(config, writer))
            it.save(run)
        before = standing(writer, config) if world.index == 0 else {}
        loop(it, run)
        if world.index == 0:
            told(run, it, {"before": before, "after": standing(it.writer, config)})


def as_begun(config: Improve, run: Run) -> Improve:
    """The settings with which a run began; UserError if others are given beside --resume."""
    path = run.folder / "improvement.json"
    kept = settings(type(config), read_json(path), str(path))
    for field in fields(config):
        given = getattr(config, field.name)
        if field.name not in ("name", "resume") and given not in (
            field.default, getattr(kept, field.name)
        ):  # fmt: skip
            flag = field.name.replace("_", "-")
            raise UserError(f"--resume goes on as {run.name} began: leave out --{flag}")
    return replace(kept, name=config.name, resume=True)


def improvement(config: Improve, writer: Writer, world: Group | None) -> Improvement:
    """What moves the run, with its judge; UserError if they do not belong together."""
    if not knows_roles(writer.tokenizer):
        raise UserError(f"{config.run} knows no roles: tune it first with python align.py sft")
    judged_by = questions.checked
    if config.reward:
        device = writer.model.embedding.device
        judged_by = ByModel(load_reward(Run.open(config.reward), writer.tokenizer, device))
    asked = questions.questions_of(Path(config.path)) if config.path else ()
    if isinstance(config, Dpo):
        found = pairs(config, writer)
        return improve.DpoImprovement(config, writer, judged_by, found, world, asked)
    return improve.OnlineImprovement(config, writer, judged_by, world, asked)


def pairs(config: Dpo, writer: Writer) -> list[Pair]:
    """Of each order all pairs, but for equal ones."""
    found = []
    orders = [one for one in preferences.usable(Path(config.preferences), config.strict)
              if isinstance(one, preferences.Ranking)]  # fmt: skip
    for one, (prompt, ids) in judge.in_context(writer, orders, config.strict):
        found += [Pair(prompt, ids[i], ids[j]) for i, j, often in one.pairs() if often == 1]
    if not found:
        raise UserError(
            f"{config.preferences} holds no order of answers, and DPO learns from nothing else"
        )
    return found


def new_run(config: Improve, writer: Writer) -> Run:
    """A run that other scripts know: with the settings of the one that it comes from.

    If that one is an adapter of a base, so is this one, unless it has an adapter of its own.
    """
    old = stored(Run.open(config.run))
    kept = old.adapter.kind != "none" and config.adapter.kind == "none"
    own = old.adapter if kept else config.adapter
    new = replace(old, name=config.name, base=old.base if kept else config.run, adapter=own)
    run = Run.create(config.name, new)
    writer.tokenizer.save(run.folder / writer.tokenizer.file_name)
    keep_template(run.folder)
    write_json(run.folder / "improvement.json", asdict(config))
    return run


def drawn_answers(
    writer: Writer, names: Sequence[str], config: Improve
) -> list[tuple[tasks.Problem, str]]:
    """One to each question of the tasks, as the policy draws them."""
    asked = problems(names, config.levels, config.asked * len(names), "test", config.seed)
    said = judge.answered(writer, [question(p) for p in asked], 1, config.temperature,
                          config.tokens, config.seed + 1)  # fmt: skip
    return [(p, "".join(one)) for p, one in zip(asked, said, strict=True)]


def standing(writer: Writer, config: Improve) -> dict[str, float]:
    """On questions that no round asks: right answers by task, and what drawn answers are worth.

    Means are over the tasks that are improved; made up is what nobody can know, of all tasks.
    """
    how = Examine(tasks=(*config.tasks, *config.also), levels=config.levels, wording="known",
                  count=config.asked, seed=config.seed, tokens=config.tokens)  # fmt: skip
    found = {r.kind: r.right for r in examined(writer, how)}
    drawn = drawn_answers(writer, config.tasks, config)
    worth = torch.tensor([tasks.utility(*pair) for pair in drawn])
    found |= {
        "right": sum(found[name] for name in config.tasks) / len(config.tasks),
        "drawn": sum(tasks.mark(*pair) for pair in drawn) / len(drawn),
        "worth": worth.mean().item(),
        "worth_error": (worth.std() / len(drawn) ** 0.5).item(),
    }
    if config.also:
        drawn += drawn_answers(writer, config.also, config)
    unsaid = [not tasks.honest(*pair) for pair in drawn if tasks.honest(pair[0], pair[0].answer)]
    return found | ({"made_up": sum(unsaid) / len(unsaid)} if unsaid else {})


def best_possible(it: Improvement, questions: int = 12, each: int = 16) -> list:
    """The gauge's frontier, by answers of what the policy was; those that did not end as scored."""
    c = it.config
    asked = [it.ask(10**6 + q) for q in range(questions) for _ in range(each)]
    was = it.writer._replace(model=it.reference)
    prompts = [prompt_ids(was, one.turns) for one in asked]
    drawn = sample(was, prompts, c.tokens, it.temperature, c.seed)
    scores = judged(it.judge, asked, drawn).view(questions, each)
    spread = max(scores.std().item(), 1e-6)
    return gauge.frontier(scores, [spread * 10 ** (1 - 0.1 * i) for i in range(25)])


def told(run: Run, it: Improvement, found: dict[str, dict[str, float]]) -> None:
    """A table of before and after, the gauge's picture, and the numbers behind both."""
    names = {
        "right": "mean, the likeliest answers",
        "drawn": "mean, drawn answers",
        "worth": "worth of a drawn answer, 0 to 4",
        "made_up": "made up what nobody can know",
    }
    rows = []
    for name in found["before"]:
        if name != "worth_error":
            values = (each[name] for each in found.values())
            form = "{:.2f}" if name == "worth" else "{:.0%}"
            rows.append((names.get(name, name), *(form.format(x) for x in values)))
    print("\n" + table(("right answers", *found), *rows))
    write_json(run.folder / "standing.json", found)
    path = run.folder / "gauge.png"
    gauge.draw(run.metrics(), path, best_possible(it))
    print(f"\npicture: {path}\nchat:    python generate.py --run {run.name} --chat")


# --- the script -----------------------------------------------------------------------------------


STAGES = {
    "sft": (Sft, sft),
    "prefer": (judge.Prefer, judge.prefer),
    "label": (judge.Label, judge.labels),
    "reward": (judge.Reward, judge.reward),
    **{name: (kind, better) for name, kind in KINDS.items()},
    "think": (chain.Think, chain.think),
    "hack": (chain.Hack, chain.hack),
    "all": (chain.All, chain.everything),
}


DEMO = ("think", "--digits", "3", "--tuning", "250", "--lessons", "6000", "--steps", "12",
        "--asked", "40", "--tokens", "80")  # fmt: skip


def script() -> None:
    """Without arguments: think, small."""
    choose(STAGES, [*DEMO], __doc__)


if __name__ == "__main__":
    main(script)
