"""The hacking gauge: what a judge is pleased by, beside what was wanted.

Idea: a reward model is a guess of what people want, learnt near the answers that it was shown. A
policy that is paid by it moves to where the guess is wrong: its reward goes on rising while what it
was meant to stand for falls. So both are on one picture, with how far the policy has moved (KL),
how long answers are, and how much they repeat.

    reward   what the judge says: the proxy
    worth    what the simulated people truly feel (tasks.utility), which no judge is shown
    kl       nats of whole answers, from what the policy was
    frontier the most reward that any policy can have at a KL: π_ref exp(r/β), for each β

Run: python align.py ppo          which draws it; python align.py hack shows it being needed

Papers: Stiennon et al. 2020 (arXiv 2009.01325), figure 5; Gao et al. 2023, "Scaling laws for reward
model overoptimization" (arXiv 2210.10760).
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import tasks
from pictures import picture, smooth
from policy import of_sequence
from rollout import Drawn
from tasks import ANSWER, Problem


def repeated(text: str, n: int = 4) -> float:
    """The share of its runs of n words that were there before."""
    words = text.split()
    runs = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def measured(
    problems: Sequence[Problem | None], drawn: Drawn, scores: Tensor, reference: Tensor
) -> dict[str, float]:
    """Sums over responses; those that need a known answer only where all have one."""
    mask = drawn.texts.mask.to(drawn.log_p.dtype)
    kl = of_sequence(drawn.log_p - reference, mask)
    sums = {
        "reward": scores.sum().item(),
        "kl": kl.sum().item(),
        "length": drawn.texts.response.sum().item(),
        "ended": drawn.ended.sum().item(),
        "repeated": sum(map(repeated, drawn.replies)),
        "thought": sum(ANSWER in said for said in drawn.replies),
    }
    if all(problem is not None for problem in problems):
        pairs = list(zip(problems, drawn.replies, strict=True))
        sums["right"] = sum(tasks.mark(*pair) for pair in pairs)
        sums["worth"] = sum(tasks.utility(*pair) for pair in pairs)
    return {name: float(x) for name, x in sums.items()}


def frontier(scores: Tensor, betas: Sequence[float]) -> list[tuple[float, float]]:
    """(KL, reward) of the best policy for each β, by answers of the reference (questions G).

    Each of G equally likely answers gets weight ∝ exp(r/β): exact if these are all that there are,
    else an estimate as far as log G nats.
    """
    found = []
    for beta in betas:
        log_w = (scores.double() / beta).log_softmax(-1)
        kl = (log_w.exp() * (log_w + torch.tensor(scores.shape[-1]).log())).sum(-1)
        found.append((kl.mean().item(), (log_w.exp() * scores).sum(-1).mean().item()))
    return found


LOOKS = {"reward": "#b5892e", "worth": "#1f4e8c", "length": "#2a7f62", "repeated": "#c8442d"}


def draw(rows: Sequence[dict], path: Path, best: Sequence[tuple[float, float]] = ()) -> None:
    """By round: reward and worth; the same by KL, below the frontier; length and repetition."""
    rows = [row for row in rows if "reward" in row]
    steps = [row["step"] for row in rows]
    with picture(path, 3, (15, 4.5)) as (by_step, by_kl, form):
        twin = by_step.twinx()
        for axes, name in ((by_step, "worth"), (twin, "reward")):  # what lies above is dashed
            if all(name in row for row in rows):
                y = smooth([row[name] for row in rows])
                axes.plot(steps, y, color=LOOKS[name], linestyle="-" if name == "worth" else "--")
                axes.set_ylabel(f"{name} ({'solid' if name == 'worth' else 'dashed'})",
                                color=LOOKS[name])  # fmt: skip
        twin.grid(visible=False)
        by_step.set(title="What the judge says, and what is felt", xlabel="round")
        kl = smooth([row["kl"] for row in rows])
        by_kl.plot(kl, smooth([row["reward"] for row in rows]), "o-", markersize=3,
                   color=LOOKS["reward"], label="the policy")  # fmt: skip
        if best:
            by_kl.plot(*zip(*best, strict=True), ":", color="#777777", label="the most possible")
        by_kl.set(title="Reward by distance", xlabel="KL from what it was, nats", ylabel="reward")
        by_kl.legend(frameon=False, loc="lower right")
        twin = form.twinx()
        form.plot(steps, smooth([row["length"] for row in rows]), color=LOOKS["length"])
        twin.plot(steps, [100 * row["repeated"] for row in rows], "--", color=LOOKS["repeated"])
        form.set(title="Form of the answers", xlabel="round", ylim=(0, None))
        form.set_ylabel("tokens of an answer (solid)", color=LOOKS["length"])
        twin.set_ylabel("repeated, % (dashed)", color=LOOKS["repeated"])
        twin.set_ylim(0, 100)
        twin.grid(visible=False)
