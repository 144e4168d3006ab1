"""Bugs to plant in alignment; `tests/bugs.py` says what they are for.

Most happened: the sign of the KL (Ziegler et al.'s worst policy), the place of the score, whitening
by each process, the temperature that only sampling knows, a clip with max for min.
"""

BUGS = {
    "policy": (
        ("test_policy.py",),
        [
            ("(logits / temperature)", "logits"),
            ("rewards = -beta *", "rewards = beta *"),
            ("keepdim=True) - 1", "keepdim=True) - 2"),
            ("(log_p - ref_log_p) * (mask != 0)", "(log_p - ref_log_p)"),
            ("last = (mask != 0).sum(-1, keepdim=True) - 1", "last = 0 * mask[:, :1].long() - 1"),
            ("rewards.scatter_add(-1, last, scores[:, None])", "rewards + scores[:, None]"),
            ("(delta + gamma * lam * advantage) * there", "(delta + gamma * advantage) * there"),
            ("+ gamma * value - values", "+ value - values"),
            ("advantage) * there[:, t]", "advantage)"),
            ("value = values[:, t] * there[:, t]", "value = values[:, t]"),
            ("return advantages, (advantages + values) * there", "return advantages, advantages"),
            ("advantages, (advantages + values) * there", "advantages, advantages + values"),
            ("center = sums / count", "center = (x * mask).sum() / mask.sum()"),
            ("variance = total(((x", "variance = alone(((x"),
            ("** 2 * mask).sum()) / count", "** 2).sum()) / count"),
            ("y if shift else y + center", "y"),
            ("else y + center) * (mask != 0)", "else y + center)"),
            ("-torch.minimum(ratio", "-torch.maximum(ratio"),
            ("(log_p - old_log_p).exp()\n    return -", "(old_log_p - log_p).exp()\n    return -"),
            ("0.5 * torch.maximum(", "0.5 * torch.minimum("),
            ("near = old_values + (values - old_values)", "near = returns + (values - returns)"),
            ("delta = ref_log_p - log_p", "delta = log_p - ref_log_p"),
            ("(chosen - ref_chosen) - (rejected", "(chosen - ref_chosen) + (rejected"),
            ("return (log_p * mask).sum(-1)", "return (log_p * mask).sum(-1) / mask.sum(-1)"),
            ("scores.std(-1, keepdim=True)", "scores.std(keepdim=True)"),
            ("- smoothing * F.logsigmoid(-h)", "- smoothing * F.logsigmoid(h)"),
            ("(mask.sum() if count is None else count)", "mask.sum()"),
            ("min(0.2, max(-0.2, kl / target - 1))", "kl / target - 1"),
            ("penalty * (~ended)", "penalty * ended"),
            ("ratio > 1 + clip, ratio < 1 - clip", "ratio < 1 - clip, ratio > 1 + clip"),
        ],
    ),
}  # fmt: skip
