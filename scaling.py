"""What a transformer costs before anybody builds it: parameters, FLOPs, memory, days and money.

Idea: almost all work is products of matrices, and a product of (m k) with (k n) is 2 m k n floating
point operations. So a token costs twice as many as the weights it meets, the backward pass twice as
many as the forward pass (a product for the inputs' gradient, one for the weights'), in sum 6 N for
N parameters; and attention's scores, which have no weights, a little more. Everything here is such
a product, written out, as a function of the settings alone.

    FLOPs / (devices · FLOP/s of one · utilization) = time        time · devices · price = money

Run: python scaling.py        every published model in one table; what 4.6 million USD imply
     python scaling.py cost --model.preset gpt3-175b --tokens 300e9 --devices 1024
     python scaling.py run    runs of many sizes, their law, and what larger ones will reach: see
                              budgets.py, also for fit, forecast and judge

Papers: Kaplan et al. 2020 (arXiv 2001.08361, section 2.1); Rajbhandari et al. 2020, ZeRO (arXiv
1910.02054); Narayanan et al. 2021, Megatron-LM (arXiv 2104.04473); Korthikanti et al. 2022,
recomputation (arXiv 2205.05198); Chowdhery et al. 2022, PaLM (arXiv 2204.02311, appendix B); Pope
et al. 2022, inference (arXiv 2211.05102).

Letters: T tokens of a row · S positions looked at · C model width · H heads · K key-value heads ·
D head width · F feed-forward width · V vocabulary · L layers · N parameters.
"""

import os
import sys
import time
from dataclasses import dataclass, replace
from math import ceil, inf
from typing import Annotated, Literal, NamedTuple

import torch
import tyro

from attention import causal_mask, full_mask
from kernels.mask import visible
from model import ACTIVATIONS, PRESETS, ModelConfig, preset_in
from pictures import table
from presets import PUBLISHED
from run import UserError, main, start
from sparse import PATTERNS
from step import machine, matmul_peak

Parts = dict[str, int]
Recompute = Literal["none", "selective", "full"]
DAY = 86_400  # seconds
GB = 1e9  # bytes, as the papers and the sellers count

# --- parameters -----------------------------------------------------------------------------------


class Stack(NamedTuple):
    """Blocks that are alike."""

    layers: int
    looks: int  # attentions in each: at its own tokens, and at an encoder's
    causal: bool


def stacks(c: ModelConfig) -> list[Stack]:
    """The stacks of a model, the one that writes last."""
    if c.arch == "encdec":
        return [Stack(c.layers, 1, False), Stack(c.layers, 2, True)]
    return [Stack(c.layers, 1, c.arch == "decoder")]


def attention_weights(c: ModelConfig) -> int:
    """Queries and output C·HD each, keys and values C·KD each."""
    return 2 * c.dim * c.head_dim * (c.heads + c.kv_heads_or_heads)


def ffn_matrices(c: ModelConfig) -> int:
    """Of C·F weights each: up and down, and in gated units a gate."""
    return 3 if ACTIVATIONS[c.activation].gated else 2


def parameters(c: ModelConfig) -> Parts:
    """How many there are, by part; their sum is the model's `numel`.

    For GPT-2's shape 12 L C² (1 + 13/12C) + (V + context + 2) C.
    """
    C, F = c.dim, c.ffn_width
    kv, queries = c.kv_heads_or_heads * c.head_dim, c.heads * c.head_dim
    look = attention_weights(c) + c.bias * (queries + 2 * kv + C)
    ffn = ffn_matrices(c) * C * F + c.bias * ((ffn_matrices(c) - 1) * F + C)
    layernorm = c.norm == "layernorm"
    norm = C * (1 + (layernorm and c.bias))
    positions = {
        "learned": c.context * C,
        "t5": c.buckets * c.heads,
        "relative": c.layers * (2 * c.reach + 1) * c.head_dim,
    }.get(c.position, 0)
    every = stacks(c)
    return {
        "embedding": (c.vocab_size + c.segments) * C,
        "positions": len(every) * positions,
        "attention": sum(layers * looks for layers, looks, _ in every) * look,
        "feed-forward": sum(layers for layers, _, _ in every) * ffn,
        "norms": sum(layers * (looks + 1) + (c.order == "pre") for layers, looks, _ in every) * norm
        + len(every) * c.embed_norm * C * (1 + layernorm),
        "head": 0 if c.tied else c.vocab_size * C,
    }


def pooler(c: ModelConfig) -> int:
    """BERT's layer C → C behind the first token, which is attached from outside."""
    return c.dim * c.dim + c.dim


# --- floating point operations --------------------------------------------------------------------


def pairs(c: ModelConfig, T: int, causal: bool) -> int:
    """How many pairs (t, s) of T tokens see each other: T², causally T (T+1)/2, or in a window.

    Of block-sparse patterns the pairs are counted one by one.
    """
    if c.attention in PATTERNS:
        mask = causal_mask(T) if causal else full_mask(T, T)
        mask = replace(mask, at=torch.arange(T)[None])
        return int(visible(PATTERNS[c.attention](mask, T, c), T).sum())
    w = min(c.window, T) if c.attention == "sliding" else T
    before = w * (w - 1) // 2 + (T - w) * (w - 1)  # Σ min(t, w − 1) for t from 0: s < t
    return T + before * (1 if causal else 2)


def forward_flops(c: ModelConfig, T: int, seen: bool = False, source: int = 0) -> Parts:
    """A row of T tokens through the model, by part; an encdec reads `source` (0: T) and writes T.

    Weights: 2·T each. Scores, QKᵀ and PV: 4·HD for each pair of tokens; for all T² of them, as the
    papers count and the obvious version multiplies, or only for the pairs that see each other.
    There Performer has its M features instead: 2·M(2D + 1) a token for each query head, φ(q) and
    what it meets, and for each key head, φ(k) and Σ φ(k) (v, 1)ᵀ (in chunks of causal text a
    little more).
    """
    C, HD = c.dim, c.heads * c.head_dim
    counted = {"attention": 0, "scores": 0, "positions": 0, "feed-forward": 0,
               "head": 2 * T * c.vocab_size * C}  # fmt: skip
    *before, (_, looks, _) = stacks(c)
    S, cross = source or T, looks - 1
    for (layers, _, causal), n in zip(stacks(c), (*(S for _ in before), T), strict=True):
        if seen and c.attention == "performer":
            heads = c.heads + c.kv_heads_or_heads
            counted["scores"] += layers * 2 * n * c.features * heads * (2 * c.head_dim + 1)
        else:
            own = pairs(c, n, causal) if seen else n * n
            counted["scores"] += layers * 4 * HD * own
        counted["attention"] += layers * 2 * n * attention_weights(c)
        counted["feed-forward"] += layers * ffn_matrices(c) * 2 * n * C * c.ffn_width
        if c.position == "relative":
            counted["positions"] += layers * 2 * n * HD * (2 * c.reach + 1)
    kv = 2 * C * c.kv_heads_or_heads * c.head_dim
    counted["attention"] += cross * c.layers * 2 * (T * 2 * C * HD + S * kv)
    counted["scores"] += cross * c.layers * 4 * HD * T * S
    return counted


def exact_flops(
    c: ModelConfig, T: int, recompute: Recompute = "none", seen: bool = False, source: int = 0
) -> int:
    """A row of T tokens forward and backward: 3 · forward, and what the backward pass repeats.

    That may be nothing, the scores (selective), or all but the head (full); with full it is, for
    GPT's shape, 96 T L C² (1 + T/6C + V/16LC) (Narayanan et al. 2021, eq. 3).
    """
    parts = forward_flops(c, T, seen, source)
    forward = sum(parts.values())
    again = {"none": 0, "selective": parts["scores"], "full": forward - parts["head"]}
    return 3 * forward + again[recompute]


def estimated_flops(c: ModelConfig, tokens: float) -> float:
    """6 N D; 3 N D if each token passes one of two stacks (Brown et al. 2020, table D.1)."""
    return 6 * sum(parameters(c).values()) * tokens / len(stacks(c))


def palm_flops(c: ModelConfig, T: int) -> int:
    """Of one token: 6 N + 12 L H D T (PaLM, appendix B)."""
    return 6 * sum(parameters(c).values()) + 12 * c.layers * c.heads * c.head_dim * T


def decode_flops(c: ModelConfig, S: int) -> int:
    """One more token of a text that has S with it: 2 for each weight it meets, 4·HD·S a look.

    The keys and values of S source tokens, if there is an encoder, were computed before; a
    Performer looks at its running sums, however long the text.
    """
    HD, (layers, looks, _) = c.heads * c.head_dim, stacks(c)[-1]
    sums = c.attention == "performer"
    own = min(S, c.window) if c.attention == "sliding" else 1 if sums else S
    more = 4 * HD * (own - 1) + (looks - 1) * 4 * HD * (c.dim + S)
    return sum(forward_flops(replace(c, arch="decoder"), 1, sums).values()) + layers * more


# --- memory ---------------------------------------------------------------------------------------


class State(NamedTuple):
    """Bytes that training holds of each parameter."""

    weights: float
    gradients: float
    optimizer: float  # AdamW's two moments, in mixed precision also the weights in fp32


PRECISIONS = {
    "fp32": State(4, 4, 8),
    "mixed": State(2, 2, 12),
    "mixed-fp32-grads": State(2, 4, 12),  # gradients added up in fp32, as Megatron and BLOOM do
}


def state_bytes(N: float, ranks: int = 1, stage: int = 0, precision: str = "mixed") -> State:
    """Bytes of N parameters on each of the ranks of ZeRO (Rajbhandari et al., figure 1).

    Stage 1 divides the optimizer's state by the ranks, 2 the gradients too, 3 also the weights.
    """
    parts = (ranks if stage >= first else 1 for first in (3, 2, 1))
    return State(*(N * b / p for b, p in zip(PRECISIONS[precision], parts, strict=True)))


def activation_bytes(
    c: ModelConfig, T: int, rows: int = 1, recompute: Recompute = "none", tensor: int = 1
) -> float:
    """What the forward pass keeps in 16 bits for the backward pass, by Korthikanti et al., sec. 4.

    For GPT's shape T·rows·C (34 + 5 H T/C) bytes a layer, 34 without the scores (selective), and 2
    if only each block's input is kept (full); tensor and sequence parallelism divide all of it.
    Dropout is counted as there, one byte for each mask. Behind the last block 4 (C + V): what the
    last norm and the head read, and the logits in fp32. A pipeline whose stages hold as many
    micro-batches as there are stages changes nothing.
    """
    C, HD, KD = c.dim, c.heads * c.head_dim, c.kv_heads_or_heads * c.head_dim
    look = 2 * C + 2 * (HD + 2 * KD) + 2 * HD + C  # input; q, k, v; what output reads; mask
    look += 5 * c.heads * T if recompute == "none" else 0  # softmax, its dropout, their mask
    ffn = 2 * C + 2 * ffn_matrices(c) * c.ffn_width + C  # up, gate and their product; mask
    kept = 0
    for stack in stacks(c):
        block = stack.looks * look + ffn + 2 * C * (stack.looks + 1)  # and what each norm reads
        kept += stack.layers * (2 * C if recompute == "full" else block)
    return T * rows * (kept + 4 * (C + c.vocab_size)) / tensor


def cache_bytes(c: ModelConfig, S: int, bits: int = 16) -> float:
    """Keys and values of S tokens: 2 L K D S, in an encdec those of S source tokens, too.

    A Performer's sums are L K M (D + 2) numbers of 32 bits.
    """
    layers, looks, _ = stacks(c)[-1]
    K, D, sums = c.kv_heads_or_heads, c.head_dim, c.attention == "performer"
    own = min(S, c.window) if c.attention == "sliding" else 0 if sums else S
    kept = 4 * layers * K * c.features * (D + 2) if sums else 0
    return kept + 2 * layers * K * D * (own + (looks - 1) * S) * bits / 8


# --- time and money -------------------------------------------------------------------------------


class Hardware(NamedTuple):
    """A device, by its maker's data sheet; prices are what somebody once asked, and change."""

    half: float  # FLOP/s in fp16 or bf16, dense, in its matrix units
    single: float  # FLOP/s in fp32; 0: not published
    memory: float  # bytes
    bandwidth: float  # of the memory, bytes/s
    price: float  # USD an hour
    said: str  # by whom the price was


HARDWARE = {
    "v100": Hardware(125e12, 15.7e12, 32 * GB, 0.9e12, 1.50, "Li 2020 implies it"),
    "a100-40g": Hardware(312e12, 19.5e12, 40 * GB, 1.555e12, 1.79, "nanochat's reports, 2025"),
    "a100-80g": Hardware(312e12, 19.5e12, 80 * GB, 2.039e12, 1.79, "as a100-40g"),
    "h100": Hardware(989.4e12, 66.9e12, 80 * GB, 3.35e12, 3.00, "nanochat's reports, 2025"),
    "h200": Hardware(989.4e12, 66.9e12, 141 * GB, 4.8e12, 3.50, "our guess"),
    "tpuv4": Hardware(275e12, 0, 32 * GB, 1.228e12, 3.22, "Google's list, 2022"),
}


def measured() -> Hardware:
    """This machine's processor: how fast it multiplies, and reads memory, here and now."""
    cpu, x, best = torch.device("cpu"), torch.ones(1 << 25), inf
    half, single = (matmul_peak(cpu, dtype) for dtype in (torch.bfloat16, torch.float32))
    for _ in range(5):
        start = time.perf_counter()
        x.sum()
        best = min(best, time.perf_counter() - start)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Hardware(half, single, memory, x.nbytes / best, 0.0, "measured")


def utilization(flops: float, seconds: float, devices: int, peak: float) -> float:
    """The share of the peak that was used (PaLM, appendix B).

    MFU if the FLOPs are those that the model needs, HFU if what is recomputed counts, too.
    """
    return flops / (seconds * devices * peak)


def days(flops: float, devices: int, rate: float) -> float:
    """rate: FLOP/s that each device keeps up (Narayanan et al. 2021, eq. 4, for 8 N D FLOPs)."""
    return flops / (devices * rate) / DAY


def dollars(days: float, devices: int, price: float) -> float:
    """price: USD for a device and an hour."""
    return days * 24 * devices * price


# --- the command line -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Show:
    """Every published model: its size, and what to train it would cost."""


@dataclass(frozen=True)
class Cost:
    """What it takes to train and to run a model."""

    model: ModelConfig = PRESETS["gpt2"]
    tokens: float = 300e9  # to train on
    devices: int = 8  # that train
    hardware: str = "a100-80g"  # v100, a100-40g, a100-80g, h100, h200, tpuv4; cpu: this, measured
    utilization: float = 0.45  # of its peak, what is recomputed counted: HFU
    price: float = -1.0  # USD for a device and an hour; below 0: as the table has it
    precision: Literal["fp32", "mixed", "mixed-fp32-grads"] = "mixed"  # of the training
    recompute: Recompute = "full"  # in the backward pass: nothing, attention's scores, all
    rows: int = 1  # of model.context tokens that go through a device at once
    tensor: int = 1  # devices among which each matrix is divided
    pipeline: int = 1  # devices among which the layers are divided
    bits: Literal[4, 8, 16, 32] = 16  # of a weight when the model writes
    cache_bits: Literal[4, 8, 16, 32] = 16  # of a number in the cache

    def __post_init__(self):
        for name in ("tokens", "devices", "rows", "tensor", "pipeline"):
            if not 1 <= getattr(self, name) <= 1e18:
                raise UserError(f"--{name} {getattr(self, name)} must be from 1 to 1e18")
        if self.hardware not in (*HARDWARE, "cpu"):
            raise UserError(f"--hardware {self.hardware} is none of {', '.join(HARDWARE)} and cpu")
        if self.precision == "fp32" and self.hardware == "tpuv4":
            raise UserError("the speed of tpuv4 in fp32 is not published: choose mixed precision")
        if not (0 < self.utilization <= 1 and self.price < 1e9):
            raise UserError("--utilization must be above 0, at most 1, and --price below 1e9 USD")
        if self.devices % (self.tensor * self.pipeline):
            raise UserError(
                f"--devices {self.devices} is not divisible by --tensor {self.tensor} times "
                f"--pipeline {self.pipeline}"
            )
        if not self.model.vocab_size:
            raise UserError("without a tokenizer, --model.vocab-size must be at least 1")


def show() -> None:
    """The table of presets, where 4.6 million USD come from, and this machine."""
    it, share = HARDWARE["a100-80g"], Cost.utilization
    lines = []
    for name, model in PUBLISHED.items():
        c = ModelConfig(**model.settings)
        N = sum(parameters(c).values()) + model.pooler * pooler(c)
        exact = exact_flops(c, c.context) / estimated_flops(c, c.context * len(stacks(c)))
        flops = exact * estimated_flops(c, model.tokens)
        alone = days(flops, 1, share * it.half)
        trained = (f"{model.tokens:.3g}", f"{flops:.2e}", f"{alone / 365:,.2f}",
                   f"{dollars(alone, 1, it.price):,.0f}") if flops else ("",) * 4  # fmt: skip
        memory = (f"{sum(state_bytes(N)) / GB:,.1f}", f"{2 * N / GB:,.1f}",
                  f"{cache_bytes(c, 1) / 1e3:,.0f}" if c.arch != "encoder" else "")  # fmt: skip
        lines.append((name, f"{N:,}", *trained, f"{exact:.2f}", *memory))
    head = ("", "parameters", "tokens", "FLOP", "years", "USD", "/ 6ND", "train GB", "use GB",
            "cache kB")  # fmt: skip
    print(table(head, *lines))
    print(
        f"""
FLOP: exact, nothing recomputed; / 6ND: that as a share of 6 N D (T5: of 3 N D).
years, USD: of one A100 at {share:.0%} of {it.half / 1e12:.0f} TFLOP/s and {it.price} USD an hour.
train: weights, gradients, AdamW in mixed precision. use: weights in 16 bits; cache: of a token.
"""
    )
    show_implied(4.6e6)
    cpu, c = measured(), ModelConfig(**PUBLISHED["gpt2"].settings)
    need = days(exact_flops(c, 1024) * 1e9 / 1024, 1, share * max(cpu.half, cpu.single))
    print(
        f"\nHere ({machine(torch.device('cpu'))}) a matrix product reaches {cpu.single / 1e9:,.0f} "
        f"GFLOP/s in fp32, {cpu.half / 1e9:,.0f} in bf16,\nand memory is read at "
        f"{cpu.bandwidth / GB:,.0f} GB/s: GPT-2 would learn a billion tokens in {need:,.0f} days."
    )


def show_implied(usd: float) -> None:
    """Which price and utilization an often told price of GPT-3 takes for granted."""
    flops = estimated_flops(ModelConfig(**PUBLISHED["gpt3-175b"].settings), 300e9)
    cases = [  # device, hours
        ("1,024 A100 in 34 days (Narayanan 2021)", "a100-80g", 1024 * 34 * 24),
        ("V100 at 28 TFLOP/s (Li 2020)", "v100", flops / 28e12 / 3600),
        *((f"{x} at our table's price", x, usd / HARDWARE[x].price) for x in ("a100-80g", "h100")),
    ]
    lines = (
        (name, f"{hours:,.0f}", f"{usd / hours:.2f}", f"{flops / hours / 3600 / 1e12:.1f}",
         f"{utilization(flops, hours * 3600, 1, HARDWARE[device].half):.1%}")
        for name, device, hours in cases
    )  # fmt: skip
    print(f"If the {flops:.2e} FLOP of GPT-3 cost {usd / 1e6:.1f} million USD, that was by")
    print(table(("", "device hours", "USD an hour", "TFLOP/s", "MFU"), *lines))


def show_cost(config: Cost) -> None:
    """A model's parts, its training, what must be held in memory, and its use."""
    c = config.model
    hardware = measured() if config.hardware == "cpu" else HARDWARE[config.hardware]
    shape = (
        f"{c.preset}: {c.layers} blocks, {c.dim:,} wide, {c.heads} heads of {c.head_dim}, "
        f"feed-forward {c.ffn_width:,}, context {c.context:,}"
    )
    parts = (part(config, hardware) for part in (show_training, show_memory, show_use))
    print("\n\n".join([shape, show_parts(c), *parts]))


def show_parts(c: ModelConfig) -> str:
    weights, flops = parameters(c), forward_flops(c, c.context)
    N, work = sum(weights.values()), sum(flops.values())
    lines = []
    for name in (*dict.fromkeys((*weights, *flops)), "sum"):
        n, f = (N, work) if name == "sum" else (weights.get(name, 0), flops.get(name, 0))
        token = f / c.context / len(stacks(c))
        if n or f:
            lines.append((name, f"{n:,}", f"{n / N:.1%}", f"{token:.3g}", f"{f / work:.1%}"))
    return table(("", "parameters", "", "FLOP of a token, forward", ""), *lines)


def show_training(config: Cost, hardware: Hardware) -> str:
    c, n, T = config.model, config.devices, config.model.context
    peak = hardware.single if config.precision == "fp32" else hardware.half
    rate = config.utilization * peak
    price = hardware.price if config.price < 0 else config.price
    rows, guess = config.tokens / T / len(stacks(c)), estimated_flops(c, config.tokens)
    needed, done = (rows * exact_flops(c, T, how) for how in ("none", config.recompute))
    found = {
        f"{6 // len(stacks(c))} N D": guess,
        f"{8 // len(stacks(c))} N D, all recomputed": guess * 8 / 6,
        "exact": needed,
        "exact, only pairs that see each other": rows * exact_flops(c, T, seen=True),
        f"exact, recomputed: {config.recompute}": done,
    }
    lines = []
    for name, flops in found.items():
        long = days(flops, n, rate)
        lines.append((name, f"{flops:.2e}", f"{long:,.2f}", f"{dollars(long, n, price):,.0f}"))
    return (
        f"training on {config.tokens:.4g} tokens by {n:,} × {config.hardware} at {price:.2f} USD "
        f"an hour and {config.utilization:.0%} of {peak / 1e12:.4g} TFLOP/s\n"
        f"(HFU; MFU {config.utilization * needed / done:.1%})\n"
    ) + table(("", "FLOP", "days", "USD"), *lines)


def show_memory(config: Cost, hardware: Hardware) -> str:
    c, parts = config.model, config.tensor * config.pipeline
    N, ranks = sum(parameters(c).values()) / parts, config.devices // parts
    kept = activation_bytes(c, c.context, config.rows, config.recompute, config.tensor)
    lines = []
    for stage in range(4):
        held = state_bytes(N, ranks, stage, config.precision)
        cells = (f"{x / GB:,.2f}" for x in (*held, kept, sum(held) + kept))
        fits = "fits" if sum(held) + kept <= hardware.memory else "too much"
        lines.append((f"ZeRO {stage}", *cells, fits))
    return (
        f"training holds in each device, GB of {hardware.memory / GB:,.0f} ({config.precision}, "
        f"{ranks:,} ranks × {config.tensor} tensor × {config.pipeline} pipeline)\n"
    ) + table(("", "weights", "gradients", "optimizer", "activations", "sum", ""), *lines)


def show_use(config: Cost, hardware: Hardware) -> str:
    c, S = config.model, config.model.context
    weights = sum(parameters(c).values()) * config.bits / 8
    said = f"use: weights in {config.bits} bits {weights / GB:,.2f} GB"
    if c.arch == "encoder":
        return f"{said}; a row of {S:,} tokens {sum(forward_flops(c, S).values()):.3g} FLOP"
    cache, flops = cache_bytes(c, S, config.cache_bits), decode_flops(c, S)
    n = ceil((weights + cache) / hardware.memory)
    seconds = max(flops / hardware.half, (weights + cache) / hardware.bandwidth) / n
    return (
        f"{said}, the cache of {S:,} tokens in {config.cache_bits} bits {cache / GB:,.2f} GB;\n"
        f"the next token takes {flops:.3g} FLOP and reads all that: from {n} × {config.hardware} "
        f"come at most {1 / seconds:,.1f} tokens/s"
    )


OF_RUNS = ("run", "fit", "forecast", "judge")  # which stand on this file, and so in another


def script() -> None:
    if sys.argv[1:2] and sys.argv[1] in OF_RUNS:
        return start("budgets.py", *sys.argv[1:], told=False)
    default = Cost(model=preset_in(sys.argv[1:], Cost.model))
    kinds = (
        Annotated[Show, tyro.conf.subcommand("show", default=Show())]
        | Annotated[Cost, tyro.conf.subcommand("cost", default=default)]
    )
    config = tyro.cli(kinds, default=Show(), description=__doc__)
    show_cost(config) if isinstance(config, Cost) else show()


if __name__ == "__main__":
    main(script)
