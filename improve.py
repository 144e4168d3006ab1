"""PPO, GRPO and DPO: a policy gets better by what its answers are worth.

Idea: the policy answers, a judge says what each answer is worth (a check, or a reward model), and
the policy moves towards those that were worth more than expected, though not far from what it was:

    PPO    expected is what a value head says, token by token; each batch is used several times
    GRPO   expected is the mean of other answers to the same question; there is no value head
    DPO    no answers are drawn: of two that somebody has compared, the better becomes likelier

One step of the first two, with the functions of policy.py:

    draw → judge → −β log(π/π_ref) → advantages → [ loss → gradient ] × minibatches × epochs

Several processes each answer some of the questions; sums go over all, so that the result is that of
one process. What may go wrong is watched (gauge.py): a judge can be pleased by what nobody wanted.

Run: python align.py ppo          and grpo, dpo; settings are below

Papers: Schulman et al. 2017, PPO (arXiv 1707.06347); Ouyang et al. 2022 (arXiv 2203.02155); Huang
et al. 2024, "The N+ implementation details" (arXiv 2403.17031); Shao et al. 2024, GRPO (arXiv
2402.03300); Rafailov et al. 2023, DPO (arXiv 2305.18290).

Letters: B responses · R tokens of a response · G responses to one question.
"""

import copy
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import tasks
from adapters import frozen_mark
from gauge import measured
from heads import ScalarHead
from lora import Adapter
from mesh import Group
from model import Transformer
from optim import OptimConfig, build, learning_rate, learnt
from policy import (
    clipped,
    dpo_loss,
    gae,
    group_advantages,
    k3,
    mean,
    next_beta,
    of_sequence,
    policy_loss,
    token_rewards,
    unended,
    value_loss,
    whiten,
)
from questions import Asked, ByModel, Judge, judged, prompt_ids, question
from rollout import Drawn, Texts, likely, sample, states
from run import Run, Tensors, UserError, generator, load_tensors, read_json
from step import clip
from writer import Writer, load_weights, unknown

IMPROVED = "-improved"  # in the place of a text's hash: by no text

# --- settings -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Improve:
    """Let a run that answers get better."""

    run: str = ""  # a run of align.py sft, by name or folder; empty: sft, made if need be
    name: str = ""  # of the improved run; empty: the first that is free of ppo, ppo-2, …
    resume: bool = False  # go on with the run of this name, with its settings
    reward: str = ""  # a run of align.py reward, which judges; empty: whether an answer is right
    tasks: tuple[str, ...] = tasks.PLAIN  # what is asked
    levels: tuple[int, ...] = (1, 2, 3)  # of their difficulty
    also: tuple[str, ...] = ()  # further tasks that only the examinations ask
    path: str = ""  # instead, conversations of yours, of which the last question is asked
    adapter: Adapter = Adapter()
    steps: int = 60  # rounds of answers
    batch: int = 64  # responses that are looked at and learnt from at once; all are drawn at once
    lr: float = 3e-4  # highest learning rate; it falls to 0
    eps: float = 1e-5  # of Adam: larger than in training, as first gradients are small
    clip_norm: float = 1.0  # largest gradient
    beta: float = 0.02  # price of a nat of KL from what the run was
    temperature: float = 1.0  # at which answers are drawn
    tokens: int = 128  # of an answer, at most
    questions: int = 16  # asked at once
    each: int = 8  # answers to each
    explode: float = 100.0  # nats of KL at which the run stops, as it has lost its language
    save_every: int = 10  # rounds between checkpoints
    asked: int = 20  # questions of each task in the examinations before and after
    seed: int = 0
    device: str = "auto"  # auto, cpu, cuda or mps

    def __post_init__(self):
        for name in ("steps", "batch", "tokens", "questions", "each", "save_every", "asked"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1")
        if min(self.beta, self.lr) < 0 or min(self.temperature, self.eps, self.explode) <= 0:
            raise UserError(
                "--beta and --lr must be at least 0, --temperature, --eps and --explode above 0"
            )
        tasks.check(self.tasks, self.levels)
        tasks.check((*self.tasks, *self.also), self.levels)
        if self.path and not self.reward:
            raise UserError("--path needs a --reward, which judges what nobody can check")


@dataclass(frozen=True)
class Online(Improve):
    """Learn from answers that are drawn on the way."""

    epochs: int = 1  # times that a round's answers are used
    minibatches: int = 1  # updates in each of these times
    clip: float = 0.2  # how far a token's probability may move in a round, as a share
    penalty: float = 1.0  # for an answer that does not end
    stop_kl: float = 0.1  # nats per token, moved in a round, behind which the round ends; 0: never
    target_kl: float = 0.0  # nats of KL that --beta is steered to; 0: it stays
    horizon: int = 2000  # answers in which it is steered

    def __post_init__(self):
        super().__post_init__()
        if min(self.epochs, self.minibatches) < 1:
            raise UserError("--epochs and --minibatches must be at least 1")
        answers = self.questions * self.each
        if self.minibatches > answers:
            raise UserError(
                f"--minibatches {self.minibatches} are more than the {answers} answers of a round"
            )
        if not 0 < self.clip < 1 or min(self.penalty, self.stop_kl, self.target_kl) < 0:
            raise UserError(
                "--clip must lie between 0 and 1, --penalty, --stop-kl, --target-kl be at least 0"
            )
        if self.horizon < (answers if self.target_kl else 1):
            raise UserError("--horizon must be at least the answers of a round, and at least 1")
        if self.target_kl and not self.beta:
            raise UserError("--target-kl steers --beta by factors, so that must be above 0")


@dataclass(frozen=True)
class Ppo(Online):
    """PPO: what is expected, a value head says."""

    epochs: int = 2  # times that a round's answers are used
    minibatches: int = 2  # updates in each of these times
    critic: Literal["shared", "own"] = "shared"  # the value head's model: the policy, or a copy
    value_weight: float = 0.1  # of its loss
    value_clip: float = 0.2  # how far a value may move in a round
    gamma: float = 1.0  # what the next token's reward counts now
    lam: float = 1.0  # of GAE: 0 trusts the values, 1 what came; 0.95 in the papers
    whiten_rewards: bool = False  # to variance 1, the mean stays
    whiten_advantages: bool = True  # to mean 0 and variance 1

    def __post_init__(self):
        super().__post_init__()
        if not (0 <= self.gamma <= 1 and 0 <= self.lam <= 1):
            raise UserError("--gamma and --lam must be from 0 to 1")
        if self.value_weight < 0 or self.value_clip <= 0:
            raise UserError("--value-weight must be at least 0, and --value-clip above 0")


@dataclass(frozen=True)
class Grpo(Online):
    """GRPO: what is expected, other answers to the same question say."""

    scaled: bool = True  # divide by the spread of a question's answers
    kl: Literal["reward", "loss"] = "reward"  # where what it costs to move away is taken

    def __post_init__(self):
        super().__post_init__()
        if self.each < 2:
            raise UserError("--each must be at least 2: an answer is compared with the others")


@dataclass(frozen=True)
class Dpo(Improve):
    """DPO: from comparisons alone."""

    preferences: str = ""  # .jsonl or .json; empty: answers of the run, put in order by simulated
    # people
    count: int = 1000  # questions that these are asked
    strict: bool = False  # end at the first record that cannot be used, instead of leaving it out
    steps: int = 200  # updates
    pairs: int = 32  # in an update
    beta: float = 0.1  # of its loss: the smaller, the further it goes
    smoothing: float = 0.0  # share of comparisons that are taken to be wrong
    save_every: int = 100  # updates between checkpoints
    evaluate_every: int = 25  # updates between looks at what the run answers

    def __post_init__(self):
        super().__post_init__()
        if min(self.count, self.pairs, self.evaluate_every) < 1 or not 0 <= self.smoothing < 0.5:
            raise UserError(
                "--count, --pairs and --evaluate-every must be at least 1, and --smoothing from 0 "
                "to below ½"
            )
        if not self.beta:
            raise UserError("--beta must be above 0: without it nothing is compared with nothing")


# --- the policy and what moves it -----------------------------------------------------------------


class Improvement:
    """A policy on its way: what it was, what it is, and what a checkpoint must hold."""

    def __init__(
        self, config: Improve, writer: Writer, judge: Judge, world: Group | None = None,
        asked: Sequence[Asked] = (),
    ):  # fmt: skip
        """asked: questions of one's own, instead of the tasks'."""
        self.config, self.judge, self.world, self.questions = config, judge, world, asked
        self.step = 0
        if world and (n := config.questions) % world.size:
            raise UserError(f"--questions {n} cannot be dealt evenly to {world.size} processes")
        self.writer = writer._replace(model=copy.deepcopy(writer.model))
        self.model, self.reference = self.writer.model, writer.model
        self.never = unknown(writer)
        self.beta = config.beta
        self.parts: dict[str, torch.nn.Module] = {"": self.model} | self.beside()
        named = [
            (f"{name}/{n}" if name else n, p)
            for name, module in self.parts.items()
            for n, p in module.named_parameters()
        ]
        self.params = [p for _, p in named if p.requires_grad]
        self.rate = OptimConfig("adamw", config.lr, weight_decay=0.0, beta2=0.99, eps=config.eps,
                                clip=config.clip_norm, warmup=0.0)  # fmt: skip
        self.optimizer = build(named, self.rate)

    def beside(self) -> dict[str, torch.nn.Module]:
        """What is learnt beside the policy, by name."""
        return {}

    @property
    def temperature(self) -> float:
        """At which log π is meant, everywhere."""
        return self.config.temperature

    def total(self, x: Tensor) -> Tensor:
        """The sum over processes."""
        if self.world is None:
            return x
        return self.world.sum_(x.to(self.world.device)).to(x.device)

    def own(self, count: int) -> range:
        """This process's share of so many."""
        w = self.world
        return range(count) if w is None else range(w.index, count, w.size)

    @torch.no_grad()
    def in_parts(self, of: Callable[[Texts], Tensor], texts: Texts) -> Tensor:
        """What a function says of each token (B R), as many responses at once as settings say."""
        width, found = texts.mask.shape[1], []
        for some in torch.arange(len(texts.ids), device=texts.ids.device).split(self.config.batch):
            x = of(texts.rows(some))
            found.append(torch.nn.functional.pad(x, (0, width - x.shape[1])))
        return torch.cat(found)

    def likely(self, model: Transformer, texts: Texts) -> Tensor:
        """log π of each token (B R)."""

        def of(part: Texts) -> Tensor:
            return likely(model, states(model, part), part, self.temperature, self.never)

        return self.in_parts(of, texts)

    def move(self) -> float:
        """One update by the gradients, which are summed over all processes; their norm."""
        for p in self.params:
            p.grad = self.total(torch.zeros_like(p) if p.grad is None else p.grad)
        norm = clip(self.params, self.rate.clip)
        if not math.isfinite(norm):
            raise UserError(
                f"round {self.step + 1}: the gradient is not finite; the last checkpoint is kept; "
                f"begin anew with less --lr than {self.config.lr}"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.rate, self.step, self.config.steps)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def advance(self) -> dict[str, float]:
        """One step; what it measured."""
        raise NotImplementedError

    # --- what it answers

    def ask(self, number: int) -> Asked:
        """Question `number` of all."""
        c = self.config
        if self.questions:
            return self.questions[number % len(self.questions)]
        task, level = c.tasks[number % len(c.tasks)], number // len(c.tasks)
        level = c.levels[level % len(c.levels)]
        return question(tasks.problem(task, level, "train", number, c.seed + 17))

    def draw(self) -> tuple[list[Asked], Drawn, list[int]]:
        """This process's questions, its answers, and their numbers among all of the step."""
        c = self.config
        own = self.own(c.questions)
        asked = [self.ask(self.step * c.questions + q) for q in own]
        prompts = [prompt_ids(self.writer, one.turns) for one in asked for _ in range(c.each)]
        numbers = [q * c.each + i for q in own for i in range(c.each)]
        drawn = sample(self.writer, prompts, c.tokens, self.temperature,
                       c.seed + 10**6 * (self.step + 1), numbers)  # fmt: skip
        return [one for one in asked for _ in range(c.each)], drawn, numbers

    def seen(
        self, asked: Sequence[Asked], drawn: Drawn, scores: Tensor, reference: Tensor
    ) -> dict[str, float]:
        """The gauge's numbers, over all processes; UserError if the policy has gone too far."""
        sums = measured([one.problem for one in asked], drawn, scores, reference)
        found = self.averages(sums, len(asked))
        self.check(found["kl"])
        return found

    def check(self, kl: float) -> None:
        if not kl <= self.config.explode:
            raise UserError(
                f"round {self.step + 1}: the policy is {kl:.1f} nats from what it was, more than "
                f"--explode {self.config.explode:g}; the last checkpoint is kept; begin anew "
                f"with more --beta than {self.config.beta:g}, or less --lr than {self.config.lr:g}"
            )

    def totals(self, sums: dict[str, float]) -> dict[str, float]:
        """Of sums over this process's responses those over all."""
        x = self.total(torch.tensor([*sums.values()], dtype=torch.float64))
        return dict(zip(sums, x.tolist(), strict=True))

    def averages(self, sums: dict[str, float], count: int) -> dict[str, float]:
        *found, (_, count) = self.totals({**sums, "count": count}).items()
        return {name: x / count for name, x in found}

    # --- checkpoints

    def save(self, run: Run) -> None:
        """Weights, and what it takes to go on; the first process writes."""
        if self.world is not None and self.world.index:
            return
        state: Tensors = {"beta": torch.tensor(self.beta, dtype=torch.float64)}
        state |= self.optimizer.tensors()
        for name, module in self.parts.items():
            state |= {f"beside/{name}/{n}": x for n, x in learnt(module).items() if name}
        info = {
            "text": f"{self.writer.tokenizer.fingerprint}{IMPROVED}",
            "settings": {"model": asdict(self.model.config)},
            "base": frozen_mark(self.model),
        }
        run.save(self.step, learnt(self.model), state, info, self.config.save_every)

    def load(self, run: Run) -> None:
        """Go on from the newest whole checkpoint."""
        folder = run.newest()
        load_weights(self.model, folder / "model.safetensors")
        state = load_tensors(folder / "train_state.safetensors")
        self.beta = state.pop("beta").item()
        for name, module in self.parts.items():
            for n, p in learnt(module).items() if name else ():
                p.data.copy_(state[f"beside/{name}/{n}"])
        self.optimizer.load_tensors(state)
        self.step = read_json(folder / "train_state.json")["step"]


# --- PPO and GRPO ---------------------------------------------------------------------------------


class Round(NamedTuple):
    """A round's responses of this process, and all that their updates need (B R)."""

    texts: Texts
    old: Tensor  # log π when they were drawn
    reference: Tensor  # log π_ref
    advantages: Tensor
    values: Tensor
    returns: Tensor

    def rows(self, some: Tensor) -> "Round":
        texts = self.texts.rows(some)
        return Round(texts, *(x[some][:, : texts.mask.shape[1]] for x in self[1:]))


class OnlineImprovement(Improvement):
    """Rounds: draw, judge, and use what came several times."""

    config: Online

    @property
    def watched(self) -> tuple[str, ...]:
        """What is measured in updates; a process without rows has nothing of it."""
        return ("clipped", "moved", *(["value_loss"] if isinstance(self.config, Ppo) else []))

    def beside(self) -> dict[str, torch.nn.Module]:
        """PPO's value head, which begins at 0, and the model below it if it has its own."""
        c = self.config
        if not isinstance(c, Ppo):
            return {}
        head = ScalarHead(self.model.config, c.seed).to(self.model.embedding)
        torch.nn.init.zeros_(head.dense.weight)
        return {"value": head} | ({"critic": self.critic_model()} if c.critic == "own" else {})

    def critic_model(self) -> Transformer:
        """The reward model's, which knows what is good, or else a copy of the policy."""
        known = self.judge.model.model if isinstance(self.judge, ByModel) else None
        alike = known is not None and known.config == self.model.config
        return copy.deepcopy(known if alike else self.model)

    def values(self, texts: Texts, h: Tensor | None = None) -> Tensor:
        """What is expected before each token (B R); h are the policy's states, if known."""
        critic = self.parts.get("critic", self.model)
        known = h is not None and critic is self.model
        return self.parts["value"](h if known else states(critic, texts))

    def round(self, drawn: Drawn, scores: Tensor) -> Round:
        """The advantages of a round's responses."""
        c, texts, log_p = self.config, drawn.texts, drawn.log_p
        mask = texts.mask.to(log_p.dtype)
        reference = self.likely(self.reference, texts)
        scores = unended(scores, drawn.ended, c.penalty)
        if isinstance(c, Ppo):
            values = self.in_parts(self.values, texts)
            rewards = token_rewards(scores, log_p, reference, mask, self.beta)
            if c.whiten_rewards:
                rewards = whiten(rewards, mask, shift=False, total=self.total)
            advantages, returns = gae(rewards, values, mask, c.gamma, c.lam)
            if c.whiten_advantages:
                advantages = whiten(advantages, mask, total=self.total)
            return Round(texts, log_p, reference, advantages, values, returns)
        if c.kl == "reward":
            scores = scores - self.beta * of_sequence(log_p - reference, mask)
        groups = group_advantages(scores.view(-1, c.each), c.scaled).view(-1, 1)
        nothing = torch.zeros_like(log_p)
        return Round(texts, log_p, reference, groups * mask, nothing, nothing)

    def loss(self, some: Round, tokens: Tensor) -> tuple[Tensor, dict[str, float]]:
        """The loss of some responses, as a share of that of `tokens` tokens; what was seen."""
        c, mask = self.config, some.texts.mask.to(some.old.dtype)
        h = states(self.model, some.texts)
        log_p = likely(self.model, h, some.texts, self.temperature, self.never)
        loss = mean(policy_loss(log_p, some.old, some.advantages, c.clip), mask, tokens)
        seen = {
            "clipped": (clipped(log_p, some.old, some.advantages, c.clip) * mask).sum().item(),
            "moved": (k3(some.old, log_p.detach()) * mask).sum().item(),
        }
        if isinstance(c, Ppo):
            values = self.values(some.texts, h)
            losses = value_loss(values, some.values, some.returns, c.value_clip)
            seen["value_loss"] = (losses.detach() * mask).sum().item()
            loss = loss + c.value_weight * mean(losses, mask, tokens)
        elif c.kl == "loss":
            loss = loss + self.beta * mean(k3(log_p, some.reference), mask, tokens)
        return loss, seen

    def learn(self, experience: Round, numbers: list[int]) -> dict[str, float]:
        """All updates of a round; the means over the tokens that they looked at."""
        c, found, norms, looked_at = self.config, Counter(), [], 0.0
        for own in self.minibatches(numbers):
            own = own.to(experience.old.device)
            tokens = self.total(experience.texts.response[own].sum().double())
            seen = Counter()
            for some in own.split(c.batch) if len(own) else ():
                loss, more = self.loss(experience.rows(some), tokens.to(experience.old))
                loss.backward()
                seen.update(more)
            seen = self.totals({name: seen[name] for name in self.watched})
            if c.stop_kl and seen["moved"] > c.stop_kl * tokens.item():
                self.optimizer.zero_grad()
                break
            norms.append(self.move())
            looked_at += tokens.item()
            found.update(seen)
        means = {name: x / max(1, looked_at) for name, x in found.items()}
        return {**means, "updates": len(norms), "norm": sum(norms) / max(1, len(norms))}

    def minibatches(self, numbers: list[int]) -> Iterator[Tensor]:
        """This process's rows in each: of all responses there is one order for all processes."""
        c, place = self.config, {number: i for i, number in enumerate(numbers)}
        for epoch in range(c.epochs):
            rng = generator(c.seed, "minibatches", self.step * c.epochs + epoch)
            order = torch.randperm(c.questions * c.each, generator=rng)
            for part in order.tensor_split(c.minibatches):
                own = [place[n] for n in part.tolist() if n in place]
                yield torch.tensor(own, dtype=torch.long)

    def advance(self) -> dict[str, float]:
        asked, drawn, numbers = self.draw()
        scores = judged(self.judge, asked, drawn)
        experience = self.round(drawn, scores)
        found = self.seen(asked, drawn, scores, experience.reference)
        found |= {"beta": self.beta, **self.learn(experience, numbers)}
        if self.config.target_kl:
            count = self.config.questions * self.config.each
            self.beta = next_beta(self.beta, found["kl"], self.config.target_kl, count,
                                  self.config.horizon)  # fmt: skip
        self.step += 1
        return found


# --- DPO ------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """Two responses to a prompt, as ids."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


class DpoImprovement(Improvement):
    """Updates by pairs, whose log π_ref is computed once."""

    config: Dpo

    def __init__(
        self, config: Dpo, writer: Writer, judge: Judge, pairs: Sequence[Pair],
        world: Group | None = None, asked: Sequence[Asked] = (),
    ):  # fmt: skip
        super().__init__(config, writer, judge, world, asked)
        self.pairs, self.known = list(pairs), {}
        if world and config.pairs < world.size:
            raise UserError(f"--pairs {config.pairs} are less than the {world.size} processes")

    @property
    def temperature(self) -> float:
        return 1.0

    def order(self) -> Iterator[int]:
        """The pairs of this step: each epoch has all of them, in an order of its own."""
        n, first = len(self.pairs), self.step * self.config.pairs
        for place in range(first, first + self.config.pairs):
            rng = generator(self.config.seed, "pairs", place // n)
            yield int(torch.randperm(n, generator=rng)[place % n])

    def texts(self, some: Sequence[Pair]) -> Texts:
        """Chosen ones, then rejected ones: all in one forward pass."""
        prompts = [p.prompt for p in some] * 2
        answers = [p.chosen for p in some] + [p.rejected for p in some]
        return Texts.of(prompts, answers, self.model.embedding.device)

    def of_reference(self, numbers: Sequence[int]) -> Tensor:
        """log π_ref of chosen and rejected (2 B)."""
        if missing := [n for n in numbers if n not in self.known]:
            texts = self.texts([self.pairs[n] for n in missing])
            whole = self.likely(self.reference, texts).sum(-1).view(2, -1).T
            self.known |= dict(zip(missing, whole, strict=True))
        return torch.stack([self.known[n] for n in numbers]).T.reshape(-1)

    def advance(self) -> dict[str, float]:
        c = self.config
        numbers = [n for i, n in enumerate(self.order()) if i in self.own(c.pairs)]
        sums = Counter()
        for first in range(0, len(numbers), max(1, c.batch // 2)):
            some = numbers[first : first + max(1, c.batch // 2)]
            texts = self.texts([self.pairs[n] for n in some])
            h = states(self.model, texts)
            log_p = likely(self.model, h, texts, self.temperature, self.never).sum(-1)
            (chosen, rejected), (ref_chosen, ref_rejected) = (
                x.view(2, -1) for x in (log_p, self.of_reference(some))
            )
            losses = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, c.beta, c.smoothing)
            (losses.sum() / c.pairs).backward()
            better, worse = (chosen - ref_chosen).detach(), (rejected - ref_rejected).detach()
            sums.update({
                "loss": losses.sum().item(), "ordered": (better > worse).sum().item(),
                "chosen": c.beta * better.sum().item(), "rejected": c.beta * worse.sum().item(),
            })  # fmt: skip
        found = self.averages(dict(sums), len(numbers))
        if self.step % c.evaluate_every == 0:
            asked, drawn, _ = self.draw()
            scores = judged(self.judge, asked, drawn)
            found |= self.seen(asked, drawn, scores, self.likely(self.reference, drawn.texts))
        found["norm"] = self.move()
        self.step += 1
        return found


# --- the loop -------------------------------------------------------------------------------------


def loop(it: Improvement, run: Run) -> None:
    """To the last step, with measurements and checkpoints."""
    c, began = it.config, time.monotonic()
    with tqdm(total=c.steps, initial=it.step, unit="step", disable=None) as bar:
        while it.step < c.steps:
            row = it.advance()
            run.measure(step=it.step, **row, seconds=time.monotonic() - began)
            if it.step % c.save_every == 0 or it.step == c.steps:
                it.save(run)
            bar.update()
            said = {"reward": "{:.2f}", "right": "{:.0%}", "kl": "{:.1f}", "length": "{:.0f}"}
            bar.set_postfix_str(", ".join(f"{n} {form.format(row[n])}"
                                          for n, form in said.items() if n in row))  # fmt: skip
