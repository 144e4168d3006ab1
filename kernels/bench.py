"""Every kernel against what a user would pick instead, in one process, with its error beside it.

On CUDA: our kernel and each peer take turns, so that clocks and neighbours disturb both alike; the
L2 cache is emptied before each call, and the GPU waits until the host has launched all of it: times
are the GPU's own, without what Python needs for a launch. A row gives the median time, TFLOP/s or
TB/s by the smallest work and traffic that the operation allows, its share of a ceiling measured in
the same run (a large product of matrices, a large copy), and the median of the paired ratios with
the band that holds the middle 60 %. Elsewhere: the same calls at a small size in Triton's
interpreter, errors only.

The error is ‖ours − truth‖/‖truth‖ at the small size, where truth is the obvious version in float64
on the same rounded inputs; torch's own error in the same precision stands beside it.

Run: python -m kernels.bench                  every kernel
     python -m kernels.bench attention int8   only those whose name holds one of these words
"""

import os
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

CUDA = torch.cuda.is_available()
if not CUDA:  # before Triton is imported
    os.environ["TRITON_INTERPRET"] = "1"

from kernels import (  # noqa: E402
    adamw,
    attention,
    cross_entropy,
    decode,
    elementwise,
    int4,
    int8,
    linear_attention,
    norm,
)
from kernels.mask import Mask  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
LOW = torch.bfloat16 if CUDA else torch.float16  # the interpreter has no bf16 arithmetic
ROUNDS = 15
AHEAD = 4_000_000  # clock cycles, about 2 ms, that the host is given to launch a call
FIGURE = Path("runs/kernels.png")


class Case(NamedTuple):
    """One operation at one size; `truth` computes in float64 what `ours` and the peers compute."""

    ours: Callable
    peers: dict[str, Callable]
    truth: Callable
    work: float  # floating-point operations, or bytes that must be moved
    unit: str  # TFLOP/s or TB/s


def normal(*shape: int, dtype: torch.dtype = LOW, grad: bool = False) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype).requires_grad_(grad)


def double(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]


# --- the operations -------------------------------------------------------------------------------


def interval(kind: str, T: int) -> Mask:
    """Causal, full, a window of 1,024, documents of about 500 tokens, or causal with ALiBi."""
    t = torch.arange(T, device=DEVICE)[None]
    width = min(1024, T // 4)
    document = t // max(1, T // 8 + 13) * max(1, T // 8 + 13)
    lo = {"window": (t - width + 1).clamp(min=0), "document": document}.get(kind, 0 * t)
    return Mask(lo, torch.full_like(t, T - 1) if kind == "full" else t)


def attend(small: bool, D: int, kind: str, backward: bool = False) -> Case:
    B, H, T = (1, 2, 80) if small else (4, 2048 // D, 4096)
    q, k, v = (normal(B, T, H, D).transpose(1, 2).detach().requires_grad_() for _ in range(3))
    mask = interval("causal" if kind == "alibi" else kind, T)
    if kind == "alibi":
        slopes = 2.0 ** (-8 * torch.arange(1, H + 1, device=DEVICE) / H)
        mask = Mask(mask.lo, mask.hi, slopes=slopes, at=mask.hi)
    scale, pairs = D**-0.5, int((mask.hi - mask.lo + 1).sum())
    functions = {"ours": lambda *qkv: attention.attend_triton(*qkv, mask, scale)}
    if kind in ("causal", "full"):
        functions["cuDNN"] = sdpa(SDPBackend.CUDNN_ATTENTION, kind == "causal")
        functions["FA2"] = sdpa(SDPBackend.FLASH_ATTENTION, kind == "causal")
    else:
        functions["Flex"] = flex(mask, T)
    if not CUDA:
        functions = {"ours": functions["ours"], "torch": obvious_attention(mask, scale)}
    wrap = gradients if backward else bound
    calls = {name: wrap(f, q, k, v) for name, f in functions.items()}
    truth = wrap(obvious_attention(mask, scale), *double(q, k, v))
    flops = 4 * B * H * pairs * D * (2.5 if backward else 1)
    return Case(calls.pop("ours"), calls, truth, flops, "TFLOP/s")


def obvious_attention(mask: Mask, scale: float) -> Callable:
    return lambda q, k, v: attention.attend_obvious(q, k, v, mask, scale)


def sdpa(backend: SDPBackend, causal: bool) -> Callable:
    def call(q, k, v):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    return call


def flex(mask: Mask, T: int) -> Callable:
    """FlexAttention with the same mask, compiled; the block mask is made beforehand."""
    from torch._functorch import config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    config.donated_buffer = False  # `gradients` goes back through one graph many times

    lo, hi, slopes = mask.lo[0], mask.hi[0], mask.slopes
    blocks = create_block_mask(
        lambda b, h, t, s: (lo[t] <= s) & (s <= hi[t]), None, None, T, T, device=DEVICE
    )
    score = None if slopes is None else lambda x, b, h, t, s: x - slopes[h] * (t - s)
    compiled = torch.compile(flex_attention)
    return lambda q, k, v: compiled(q, k, v, block_mask=blocks, score_mod=score)


def bound(function: Callable, *tensors: Tensor) -> Callable:
    """A call without gradients."""
    inputs = [x.detach() for x in tensors]
    return lambda: function(*inputs)


def gradients(function: Callable, *tensors: Tensor) -> Callable:
    """A call of the backward pass alone: the gradients of Σ out²/2; the forward pass runs once."""
    made = []

    def call():
        if not made:
            made.append(function(*tensors))
        return torch.autograd.grad(made[0], tensors, made[0].detach(), retain_graph=True)

    return call


def table(small: bool, *names: str, dtype: torch.dtype = LOW) -> list[Tensor]:
    """Tables of 16,384 rows of 4,096 numbers, each with a gradient."""
    shape = (20, 48) if small else (16384, 4096)
    return [normal(*shape, dtype=dtype, grad=True) for _ in names]


def streamed(ours: Callable, obvious: Callable, inputs: list, backward: bool, times: int) -> Case:
    """A function that moves `times` tables of its first input's size, against torch.compile."""
    wrap = gradients if backward else bound
    peers = {"compile": torch.compile(obvious) if CUDA else obvious}
    calls = {name: wrap(f, *inputs) for name, f in peers.items()}
    moved = times * inputs[0].numel() * inputs[0].element_size()
    return Case(wrap(ours, *inputs), calls, wrap(obvious, *double(*inputs)), moved, "TB/s")


def normalize(small: bool, kind: str, backward: bool) -> Case:
    (x,) = table(small, "x")
    weights = [normal(x.shape[1], dtype=LOW, grad=True) for _ in range(1 + (kind == "layernorm"))]
    ours, obvious = (getattr(norm, f"{kind}_{version}") for version in ("triton", "obvious"))
    case = streamed(
        lambda *a: ours(*a, 1e-5), lambda *a: obvious(*a, 1e-5), [x, *weights], backward,
        3 if backward else 2,
    )  # fmt: skip
    fused = F.rms_norm if kind == "rmsnorm" else F.layer_norm
    theirs = (gradients if backward else bound)(
        lambda x, *w: fused(x, x.shape[1:], *w, eps=1e-5), x, *weights
    )
    return case._replace(peers={"torch": theirs, **case.peers})


def gated(small: bool, backward: bool) -> Case:
    inputs = table(small, "up", "gate")
    functions = elementwise.swiglu_triton, elementwise.swiglu_obvious
    return streamed(*functions, inputs, backward, 5 if backward else 3)


def rotation(small: bool) -> Case:
    B, T, H, K, D = (1, 9, 2, 1, 16) if small else (8, 4096, 32, 8, 128)
    q, k = normal(B, T, H, D), normal(B, T, K, D)
    angles = torch.rand(1, T, D // 2, device=DEVICE)
    functions = (
        lambda q, k, f=f: f(q, k, angles.cos(), angles.sin())
        for f in (elementwise.rotate_pair_triton, elementwise.rotate_pair_obvious)
    )
    return streamed(*functions, [q, k], False, 2 * (H + K) / H)


def loss(small: bool) -> Case:
    """Forward and backward of projection and loss together, as training needs them."""
    N, C, V = (40, 32, 300) if small else (16384, 768, 50304)
    h, W = normal(N, C, grad=True), normal(V, C, dtype=torch.float32, grad=True)
    with torch.no_grad():
        W *= C**-0.5
    targets = torch.randint(V, (N,), device=DEVICE)

    def step(function, h, W):
        return lambda: torch.autograd.grad(function(h, W, targets), (h, W))

    ours = step(cross_entropy.cross_entropy_triton, h, W)
    peers = {"eager": step(cross_entropy.cross_entropy_obvious, h, W)}
    truth = step(cross_entropy.cross_entropy_obvious, *double(h, W))
    return Case(ours, peers, truth, 6 * N * C * V, "TFLOP/s")


def update(small: bool) -> Case:
    """AdamW on the shapes of GPT-2 124M: 28 bytes for each weight."""
    C, L, V = (16, 1, 50) if small else (768, 12, 50304)
    shapes = [(V, C), *[(C, C), (3 * C, C), (4 * C, C), (C, 4 * C), (C,), (C,)] * L]
    p, g = ([normal(*s, dtype=torch.float32) for s in shapes] for _ in range(2))
    m, v = ([torch.zeros_like(x) for x in p] for _ in range(2))
    rest = (1, 1e-3, [0.1] * len(p), 0.9, 0.95, 1e-8)
    table = adamw.Table()

    def theirs() -> Callable:
        params = [torch.nn.Parameter(x.clone()) for x in p]
        for x, gradient in zip(params, g, strict=True):
            x.grad = gradient
        optimizer = torch.optim.AdamW(params, 1e-3, (0.9, 0.95), 1e-8, 0.1, fused=True)

        def call():
            optimizer.step()
            return params

        return call

    precise = [[x.double() for x in xs] for xs in (p, g, m, v)]

    def ours():
        adamw.adamw_triton(p, g, m, v, *rest, table=table)
        return p

    def truth():
        adamw.adamw_obvious(*precise, *rest)
        return precise[0]

    return Case(ours, {"fused": theirs()}, truth, 28 * sum(x.numel() for x in p), "TB/s")


def product8(small: bool, outliers: bool) -> Case:
    M, N, K = (33, 48, 64) if small else (4096, 8192, 8192)
    x, w = normal(M, K), normal(N, K)
    columns = torch.arange(0, K, 101, device=DEVICE) if outliers else None
    if outliers:
        x[:, columns] *= 20
    q, s = int8.quantize_rows_obvious(w)
    thin = w[:, columns].contiguous() if outliers else None
    arguments = (q, s, None, columns, thin)
    precise = (q, s.double(), None, columns, thin.double() if outliers else None)
    ours = lambda: int8.int8_linear_triton(x, *arguments)  # noqa: E731
    truth = lambda: int8.int8_linear_obvious(x.double(), *precise)  # noqa: E731
    return Case(ours, {"bf16": lambda: x @ w.T}, truth, 2 * M * N * K, "TFLOP/s")


def product4(small: bool, M: int) -> Case:
    N, K = (48, 256) if small else (8192, 8192)
    x, w = normal(M, K), normal(N, K)
    packed = int4.quantize_int4_obvious(w)
    ours = lambda: int4.int4_linear_triton(x, *packed)  # noqa: E731
    truth = lambda: int4.int4_linear_obvious(x.double(), *packed)  # noqa: E731
    return Case(ours, {"bf16": lambda: x @ w.T}, truth, N * K * (4 + 20 / 128) / 8, "TB/s")


def one_query(small: bool) -> Case:
    """Decoding: 32 query heads on 8 key-value heads and a cache of 32,768 tokens."""
    B, H, K, S, D = (1, 4, 2, 300, 16) if small else (8, 32, 8, 32768, 128)
    q, k, v = normal(B, H, 1, D), normal(B, K, S, D), normal(B, K, S, D)
    mask = Mask(torch.zeros(B, 1, device=DEVICE).long(), torch.full((B, 1), S - 1, device=DEVICE))
    with torch.no_grad():
        truth = bound(lambda *x: decode.decode_obvious(*x, mask, D**-0.5), *double(q, k, v))
    theirs = lambda *x: F.scaled_dot_product_attention(*x, enable_gqa=True)  # noqa: E731
    ours = bound(lambda *x: decode.decode_triton(*x, mask, D**-0.5), q, k, v)
    return Case(ours, {"torch": bound(theirs, q, k, v)}, truth, 4 * B * K * S * D, "TB/s")


def performer(small: bool, backward: bool) -> Case:
    """128 features of 64-wide heads; the work is that of the three products of a chunk."""
    B, H, T, M, D = (1, 2, 40, 16, 16) if small else (4, 16, 8192, 128, 64)
    q, k, v = (normal(B, H, T, width) for width in (M, M, D))
    q, k, v = (x.detach().requires_grad_() for x in (q.abs(), k.abs(), v))
    wrap = gradients if backward else bound
    ours, peer, truth = (
        lambda *x, f=f: f(*x)[0]
        for f in (
            linear_attention.linear_attention_triton,
            linear_attention.linear_attention_chunked,
            linear_attention.linear_attention_obvious,
        )
    )
    N = linear_attention.CHUNK
    flops = 2 * B * H * T * (N * (M + D) + 2 * M * D) * (3 if backward else 1)
    calls = wrap(ours, q, k, v), {"torch": wrap(peer, q, k, v)}
    return Case(*calls, wrap(truth, *double(q, k, v)), flops, "TFLOP/s")


CASES: dict[str, Callable[[bool], Case]] = {
    **{
        f"attention {way} D {D} {kind}": lambda small, D=D, kind=kind, way=way: attend(
            small, D, kind, way == "backward"
        )
        for way in ("forward", "backward")
        for D in (64, 128)
        for kind in ("full", "causal", *(("window", "document", "alibi") if D == 64 else ()))
    },
    **{
        f"{kind} {way}": lambda small, kind=kind, way=way: normalize(small, kind, way == "backward")
        for kind in ("rmsnorm", "layernorm")
        for way in ("forward", "backward")
    },
    "SwiGLU forward": lambda small: gated(small, False),
    "SwiGLU backward": lambda small: gated(small, True),
    "RoPE of queries and keys": rotation,
    "projection + cross-entropy": loss,
    "AdamW, GPT-2 124M": update,
    "int8 linear": lambda small: product8(small, False),
    "int8 linear, 1 % outliers": lambda small: product8(small, True),
    "int4 linear, 1 row": lambda small: product4(small, 1),
    "int4 linear, 16 rows": lambda small: product4(small, 16),
    "decode attention": one_query,
    "linear attention forward": lambda small: performer(small, False),
    "linear attention backward": lambda small: performer(small, True),
}


# --- measuring ------------------------------------------------------------------------------------


def flat(result) -> Tensor:
    """All numbers of a result in one row."""
    parts = [result] if isinstance(result, Tensor) else list(result)
    return torch.cat([x.detach().double().flatten() for x in parts])


def error(got, true: Tensor) -> float:
    return ((flat(got) - true).norm() / true.norm()).item()


def time_once(call: Callable, flush: Tensor) -> float:
    """Seconds on the GPU, with nothing of use in its L2 cache and every launch already waiting."""
    flush.zero_()
    torch.cuda._sleep(AHEAD)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def race(calls: dict[str, Callable]) -> dict[str, list[float]]:
    """Seconds of each call, ROUNDS times, taking turns."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device=DEVICE)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(ROUNDS + 3):
        for name, call in calls.items():
            seconds = time_once(call, flush)
            if turn >= 3:  # the first turns compile, tune and warm up
                times[name].append(seconds)
    return times


def memory(call: Callable) -> float:
    """Bytes that a call needs beyond what is there."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def ceilings() -> dict[str, float]:
    """What this GPU does here and now: a product of matrices, and a copy."""
    a, b = (normal(8192, 8192) for _ in range(2))
    x = torch.empty(1 << 30, dtype=torch.int8, device=DEVICE)
    times = race({"product": lambda: a @ b, "copy": x.clone})
    return {"TFLOP/s": 2 * 8192**3 / min(times["product"]), "TB/s": 2 * 2**30 / min(times["copy"])}


def band(ratios: list[float]) -> str:
    """The median of paired ratios, and what holds the middle 60 % of them."""
    ratios = sorted(ratios)
    fifth = len(ratios) // 5
    return f"{statistics.median(ratios):.2f} ({ratios[fifth]:.2f} … {ratios[-1 - fifth]:.2f})"


def errors(make: Callable[[bool], Case]) -> tuple[float, float]:
    """Our error and the first peer's, at the small size."""
    case = make(True)
    true = flat(case.truth())
    peer = next(iter(case.peers.values()))
    theirs = error(peer(), true)
    return error(case.ours(), true), theirs


def checks(names: list[str]) -> None:
    """Without CUDA: every kernel in Triton's interpreter at a small size."""
    print("This machine has no CUDA: the kernels run in Triton's interpreter at a small size, in "
          f"{str(LOW).removeprefix('torch.')}; no times.\n")  # fmt: skip
    print(f"{'kernel':36} {'our error':>10} {'peer':>10}")
    for name in tqdm(names, leave=False, disable=None):
        ours, theirs = errors(CASES[name])
        tqdm.write(f"{name:36} {ours:10.1e} {theirs:10.1e}")


def rows(names: list[str], limits: dict[str, float]) -> Iterator[tuple[str, float, str]]:
    """Measure and print each kernel; (name, share of the ceiling, unit)."""
    for name in tqdm(names, leave=False, disable=None):
        error_ours, error_peer = errors(CASES[name])
        case = CASES[name](False)
        times = race({"ours": case.ours, **case.peers})
        seconds = statistics.median(times["ours"])
        rate = case.work / seconds
        line = (
            f"{name:36} {1e6 * seconds:9.1f} µs {rate / 1e12:7.2f} {case.unit:7} "
            f"{100 * rate / limits[case.unit]:4.0f} %  "
            f"error {error_ours:.1e} (peer {error_peer:.1e})"
        )
        for peer in case.peers:
            pairs = zip(times["ours"], times[peer], strict=True)
            line += f"  × {peer} {band([theirs / ours for ours, theirs in pairs])}"
        if name.startswith("projection"):
            line += f"  memory / eager {memory(case.ours) / memory(case.peers['eager']):.3f}"
        tqdm.write(line)
        yield name, rate / limits[case.unit], case.unit
        del case
        torch.cuda.empty_cache()


def draw(shares: list[tuple[str, float, str]]) -> None:
    """One bar per kernel: how much of the ceiling it reaches."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.3 * len(shares) + 1), layout="constrained")
    names = [f"{name} ({unit})" for name, _, unit in shares]
    axes.barh(names, [share for _, share, _ in shares], color="C0")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("share of the measured ceiling")
    FIGURE.parent.mkdir(exist_ok=True)
    figure.savefig(FIGURE, dpi=120)
    print(f"\nfigure: {FIGURE}")


def main(words: list[str]) -> None:
    names = [n for n in CASES if not words or any(word in n for word in words)]
    if not names:
        sys.exit(f"no kernel's name holds {' or '.join(words)}; there are: {', '.join(CASES)}")
    torch.manual_seed(0)
    if not CUDA:
        return checks(names)
    import triton

    limits = ceilings()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, "
        f"product {limits['TFLOP/s'] / 1e12:.0f} TFLOP/s, copy {limits['TB/s'] / 1e12:.2f} TB/s\n"
    )
    draw(list(rows(names, limits)))


if __name__ == "__main__":
    main(sys.argv[1:])
