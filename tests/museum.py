"""The bug museum: mistakes that really happened, planted here, each with the law that catches it.

Idea: most bugs of language models do not crash; the loss falls, a little less than it could. What
shows them is a law that the right thing obeys. Here is what others were bitten by, in our code, one
line each. The other planted bugs, most of them nobody's, are in tests/bugs_*.py.

Run: python tests/bugs.py museum      plant each, and see its law fail (minutes)
"""

from typing import NamedTuple


class Exhibit(NamedTuple):
    name: str
    file: str
    old: str  # once in the file
    new: str
    origin: str
    looks: str  # what one sees in training
    law: str


MUSEUM = (
    Exhibit(
        "mean of means", "step.py", "dtype) / max(1, tokens)",
        "dtype) / max(1, int((batch.targets != IGNORE).sum())) / len(batches)",
        "Hugging Face's trainer, until October 2024 (transformers 4.46)",
        "with accumulation the loss is another than with one large batch; short texts rule",
        "test_step.py::test_accumulation_is_the_mean_over_all_tokens",
    ),
    Exhibit(
        "decay through the moments", "optim.py",
        "    m.lerp_(g, 1 - beta1)\n    v.mul_(beta2)", "    g = g + decay * p\n"
        "    m.lerp_(g, 1 - beta1)\n    v.mul_(beta2)",
        "L2 in Adam, as all frameworks had it before Loshchilov and Hutter 2019",
        "weights with large gradients hardly decay; the best rate moves with the decay",
        "test_optim.py::test_adamw_is_the_paper",
    ),
    Exhibit(
        "clipped before unscaled", "step.py", "norm, factor = norm / scale, 1 / scale",
        "norm, factor = norm, 1 / scale",
        "mixed precision without unscale_ before the clip, which torch's guide to AMP warns of",
        "in fp16 every step is clipped to almost nothing",
        "test_step.py::test_a_scaled_loss_gives_the_gradient_of_an_unscaled_one",
    ),
    Exhibit(
        "neighbours instead of halves", "kernels/elementwise.py",
        "x1, x2 = x.chunk(2, -1)\n    cos, sin = (part[:, :, None].to(x.dtype) for part in",
        "x1, x2 = x[..., ::2], x[..., 1::2]\n"
        "    cos, sin = (part[:, :, None].to(x.dtype) for part in",
        "Llama's own code rotates neighbours, Hugging Face's halves; ports forgot to permute q, k",
        "a model trained so is fine; a loaded one writes gibberish",
        "test_kernel_elementwise.py::test_rotate",
    ),
    Exhibit(
        "slopes of one formula", "positions.py", "powers(n) + powers(2 * n)[::2][: heads - n]",
        "[2 ** (-8 * h / heads) for h in range(1, heads + 1)]",
        "ALiBi's paper has the formula for powers of two, its code another for 12 or 40 heads",
        "a loaded BLOOM or MPT is a little worse, and nothing says why",
        "test_positions.py::test_alibi_slopes_are_the_papers",
    ),
    Exhibit(
        "NaN from an empty row", "kernels/attention.py",
        "    if blind.any():", "    if not blind.any():",
        "torch's attention until 2.5 (issue 41508): a row that sees nothing made NaN gradients",
        "NaN in the first batch with a sample that is all padding",
        "test_attention.py::test_a_query_that_sees_nothing_gets_zeros_and_gives_no_gradient",
    ),
    Exhibit(
        "a nucleus without its border", "generate.py", "cumsum(-1) - probability >= p",
        "cumsum(-1) >= p",
        "the shift by one in every top-p; without it the token that crosses p is lost",
        "p = 0.5 of (0.6, 0.4) leaves nothing to draw from",
        "test_generate.py::test_top_p_keeps_the_nucleus",
    ),
    Exhibit(
        "two signs at once", "policy.py",
        "rewards = -beta * (log_p - ref_log_p) * (mask != 0)\n"
        "    last = (mask != 0).sum(-1, keepdim=True) - 1\n"
        "    return rewards.scatter_add(-1, last, scores[:, None])",
        "rewards = beta * (log_p - ref_log_p) * (mask != 0)\n"
        "    last = (mask != 0).sum(-1, keepdim=True) - 1\n"
        "    return rewards.scatter_add(-1, last, -scores[:, None])",
        "OpenAI 2019 (Ziegler et al., section 4.4): reward and KL flipped, overnight",
        "fluent text, and the worst of it that people can imagine",
        "test_policy.py::test_rewards_pay_for_the_score_and_for_staying",
    ),
    Exhibit(
        "a score on a pad", "policy.py", "last = (mask != 0).sum(-1, keepdim=True) - 1",
        "last = 0 * (mask != 0).sum(-1, keepdim=True) + mask.shape[1] - 1",
        "Huang et al. 2024, among the details of PPO: the last column is not the last token",
        "short answers are never paid; lengths grow",
        "test_policy.py::test_rewards_pay_for_the_score_and_for_staying",
    ),
    Exhibit(
        "merged without its scale", "lora.py", "return self.scale * (self.B.to(wide)",
        "return (self.B.to(wide)",
        "α/r left out where weights are merged; PEFT's merge into int8 did so with the bias",
        "all is well until the model is deployed",
        "test_lora.py::test_merged_is_unmerged_in_fp32_and_the_bits_come_back",
    ),
)  # fmt: skip
