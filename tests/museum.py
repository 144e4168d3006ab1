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
        "clipped before unscaled", "step.py", "shrink(grads, norm / scale, largest",
        "shrink(grads, norm, largest",
        "mixed precision without unscale_ before the clip, which torch's guide to AMP warns of",
        "in fp16 every step is clipped to almost nothing",
        "test_step.py::test_clipping_keeps_the_direction_and_bounds_the_length",
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
    Exhibit(
        "letters cut in half", "bpe.py", 'return self.decode_bytes(ids).decode(errors="replace")',
        'return "".join(self.token(id).decode(errors="replace") for id in ids)',
        "exo until March 2026 (PR 1691), and tt-inference-server (PR 2594): each token by itself",
        "English is fine; an emoji or a Chinese letter of two tokens becomes two question marks",
        "test_tokenizer.py::test_decoding_undoes_encoding",
    ),
    Exhibit(
        "a forged turn", "vocabulary.py", 'def encode(self, text: str, special: str = "text")',
        'def encode(self, text: str, special: str = "ids")',
        "Hugging Face's chat templates: special tokens that a user types are special (issue 29279)",
        "nothing; but whoever types <|assistant|> puts words into its mouth",
        "test_chat.py::test_nobody_can_forge_a_turn",
    ),
    Exhibit(
        "questions are learnt, too", "objectives.py",
        "only(rows.nexts, speaks & (last >= rows.starts))", "rows.nexts",
        "nanochat until March 2026 (PR 582): a rewrite had dropped the mask of the loss",
        "the loss falls as before, and answers are worse: ChatCORE 0.315 instead of 0.355",
        "test_chat.py::test_the_assistant_s_tokens_are_asked_for_and_no_others",
    ),
    Exhibit(
        "neighbours in a row", "packing.py", "starts[b, here] = at", "starts[b, here] = 0",
        "TRL's packed rows until 2025 (issues 805 and 1230): examples saw those before them",
        "a lower loss than each example has alone, where neighbours are alike",
        "test_data.py::test_a_token_sees_its_own_piece_and_nothing_across_a_border",
    ),
    Exhibit(
        "copies on both sides", "dedup.py", "return (hashes[clusters] >> np.uint64(11))",
        "return (hashes >> np.uint64(11))",
        "C4, RealNews and others: over 4 % of what is held out is trained on (Lee et al. 2022)",
        "a held-out loss that is too good, as copies are known by heart",
        "test_dedup.py::test_a_cluster_is_on_one_side_and_stays_there",
    ),
    Exhibit(
        "pads that move the text", "rollout.py", "(at - lo).clamp(min=0), Mask(lo, at)",
        "at, Mask(lo, at)",
        "GPT-2 in Hugging Face: pads on the left counted as places (issues 3021 and 21080)",
        "a prompt is answered in another way beside a longer one",
        "test_rollout.py::test_pads_change_nothing",
    ),
    Exhibit(
        "places in 16 bits", "positions.py",
        "return positions[..., None] * self.scale(1 / self.base**exponent)",
        "return positions[..., None].bfloat16() * self.scale(1 / self.base**exponent)",
        "Llama and Gemma in Hugging Face until 2024 (PR 29285): in bf16, 257 is 256",
        "far tokens share their places: long texts are worse, short ones are not",
        "test_positions.py::test_rope_is_the_paper",
    ),
    Exhibit(
        "scaled embeddings", "model.py", "if name.endswith(DEEP):",
        "if name.endswith((*DEEP, *TABLES)):",
        "DALL·E mini until 2022 (PR 150): DeepNet's factor stood on embeddings, too",
        "the deeper the model, the smaller its embeddings begin",
        "test_model.py::test_deepnorm_has_the_numbers_of_table_1",
    ),
    Exhibit(
        "moments without correction", "optim.py",
        "root = v.sqrt().div_(math.sqrt(1 - beta2**t)).add_(eps)\n"
        "    p.mul_(1 - lr * decay).addcdiv_(m, root, value=-lr / (1 - beta1**t))",
        "root = v.sqrt().add_(eps)\n    p.mul_(1 - lr * decay).addcdiv_(m, root, value=-lr)",
        "BERT's optimizer, by an oversight (google-research/bert, issue 153; Zhang et al. 2021)",
        "first updates are three times too large, and with some seeds nothing is learnt",
        "test_optim.py::test_adamw_is_the_paper",
    ),
    Exhibit(
        "warm-up after a restart", "training.py",
        "self.lr = learning_rate(c.optim, self.step, c.steps)",
        'self.since = getattr(self, "since", -1) + 1\n'
        "        self.lr = learning_rate(c.optim, self.since, c.steps)",
        "OpenFold in 2022 (issue 181): behind a checkpoint the rate began anew",
        "the rate leaps at each restart, and never comes to its end",
        "test_train.py::test_a_run_stopped_anywhere_ends_bit_for_bit_in_every_setting",
    ),
    Exhibit(
        "clipped on one rank", "parallel.py", "norm, config.clip, config.clip_by",
        "norm, 0.0 if part.mesh.tensor.index else config.clip, config.clip_by",
        "BLOOM until 24 March 2022, by its chronicles: not all tensor ranks clipped",
        "the loss is fine; copies of the layer norms drift apart, and can never be one again",
        "test_parallel.py::test_any_plan_computes_what_one_process_computes",
    ),
    Exhibit(
        "each whitens its own", "policy.py", "count, sums = total(torch.stack(",
        "total = alone\n    count, sums = total(torch.stack(",
        "TRL's PPO (PR 1540), as the code of Huang et al. 2024: mean and variance of one process",
        "with another number of processes the same run ends elsewhere",
        "test_policy.py::test_whitened_over_all_processes",
    ),
    Exhibit(
        "a mean for each answer", "improve.py",
        "loss = mean(policy_loss(log_p, some.old, some.advantages, c.clip), mask, tokens)",
        "share = mask.sum() / len(mask) / mask.sum(1, keepdim=True)\n"
        "        loss = policy_loss(log_p, some.old, some.advantages, c.clip)\n"
        "        loss = mean(share * loss, mask, tokens)",
        "GRPO as published in 2024; Liu et al. 2025 (arXiv 2503.20783) found its bias by length",
        "wrong answers grow longer and longer, as each of their tokens then costs less",
        "test_improve.py::test_the_loss_is_its_formula",
    ),
    Exhibit(
        "a zero point less 1", "quantized.py",
        "zero = unpack(self.zero, how.bits, self.step.shape[1])",
        "zero = unpack(self.zero, how.bits, self.step.shape[1]) + 1",
        "files of GPTQ hold z − 1, those of its second format z: vLLM took all alike (issue 26343)",
        "every weight is a step off: the model writes !!!! and nothing else",
        "test_quantized.py::test_codes_stand_for_the_nearest_numbers",
    ),
    Exhibit(
        "the question among its examples", "examine.py",
        "own = [one for one in kinds[asked.kind] if one.question != asked.question]",
        "own = list(kinds[asked.kind])",
        "EleutherAI's lm-evaluation-harness, of tasks that have only a test set (issue 4145)",
        "examples help more than they should, most of all where questions are few",
        "test_examine.py::test_examples_stand_before_the_question_and_are_drawn_by_the_seed",
    ),
    Exhibit(
        "a head for nothing", "scaling.py", '"head": 2 * T * c.vocab_size * C}', '"head": 0}',
        "Kaplan et al. 2020; Porian et al. 2024 (arXiv 2406.19146) found what that did",
        "small models look cheaper than they are, so that the best size grows too fast",
        "test_scaling.py::test_the_exact_sum_is_what_torch_counts",
    ),
)  # fmt: skip
