"""The hacking gauge: what a judge is pleased by, beside what was wanted.

Idea: a reward model is a guess of what people want, learnt near the answers that it was shown. A
policy that is paid by it moves to where the guess is wrong: its reward goes on rising while what it
was meant to stand for falls. So both are on one picture, with how far the policy has moved (KL),
how long answers are, and how much they repeat.

    reward   what the judge says: the proxy
    worth    what the simulated people truly feel (tasks.utility), which no judge is shown
    kl       nats of whole answers, from what the policy was

Run: python -m pytest tests/test_gauge.py

Papers: Stiennon et al. 2020 (arXiv 2009.01325), figure 5; Gao et al. 2023, "Scaling laws for reward
model overoptimization" (arXiv 2210.10760).
"""

from collections.abc import Sequence

from torch import Tensor

import tasks
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
