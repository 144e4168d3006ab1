"""One update: from micro-batches to gradients to new weights, and what the machine makes of it.

Idea: the loss of a step is the sum over all its tokens divided by their number, however they are
cut into micro-batches; then one clip of the whole gradient, then one move of the optimizer.

Run: python step.py      our update against the same network in plain torch, side by side (a minute)

Papers: Pascanu et al. 2013, clipping (arXiv 1211.5063); Micikevicius et al. 2018, mixed precision
(arXiv 1710.03740); Kalamkar et al. 2019, bfloat16 (arXiv 1905.12322).
"""

import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from tqdm import tqdm

from attention import document_mask
from kernels.cross_entropy import cross_entropy
from model import ModelConfig, Transformer, count_parameters, training_flops
from objectives import IGNORE, Batch
from optim import OPTIMIZERS, OptimConfig
from run import UserError, generator, main

# --- the update -----------------------------------------------------------------------------------


def loss_sum(model: Transformer, batch: Batch, dtype: torch.dtype | None = None) -> Tensor:
    """Σ −log p(target) over the batch, in nats."""
    hidden = model(batch.inputs, mask=document_mask(batch.starts), dtype=dtype)
    return cross_entropy(hidden.flatten(0, 1), model.head_weight, batch.targets.flatten())


def accumulate(
    model: Transformer, batches: list[Batch], dtype: torch.dtype | None = None
) -> tuple[float, int]:
    """Add the gradient of the mean loss over all tokens of all batches; (that loss, their number).

    The mean is over tokens, not over batches: one with few targets weighs little.
    """
    tokens = sum(int((batch.targets != IGNORE).sum()) for batch in batches)
    total = 0.0
    for batch in batches:
        loss = loss_sum(model, batch, dtype) / max(1, tokens)
        loss.backward()
        total += loss.item()
    return total, tokens


def clip_by_norm(parameters: Iterable[Tensor], largest: float) -> float:
    """g ← g · min(1, largest/‖g‖), all gradients as one; returns ‖g‖ (Pascanu et al., alg. 1).

    largest = 0 clips nothing.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = torch.linalg.vector_norm(
        torch.stack([torch.linalg.vector_norm(g) for g in grads])
    ).item()
    if 0 < largest < norm:
        for g in grads:
            g.mul_(largest / norm)
    return norm


def update(
    model: Transformer, batches: list[Batch], optimizer, lr: float, clip: float,
    dtype: torch.dtype | None = None,
) -> tuple[float, int, float]:  # fmt: skip
    """One step: (mean loss in nats per token, tokens, gradient norm before clipping)."""
    for p in model.parameters():
        p.grad = None
    loss, tokens = accumulate(model, batches, dtype)
    norm = clip_by_norm(model.parameters(), clip)
    optimizer.step(lr)
    return loss, tokens, norm


@torch.no_grad()
def evaluate(
    model: Transformer, batches: Iterable[Batch], dtype: torch.dtype | None = None
) -> tuple[float, int]:
    """(Σ −log p(target) in nats, number of targets) over all batches."""
    nats, tokens = 0.0, 0
    for batch in batches:
        nats += loss_sum(model, batch, dtype).item()
        tokens += int((batch.targets != IGNORE).sum())
    return nats, tokens


def to(batch: Batch, device: torch.device) -> Batch:
    return Batch(*(field.to(device, non_blocking=True) for field in batch))


# --- the machine ----------------------------------------------------------------------------------


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA if there is one, else Apple's MPS, else the CPU."""
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(kind for kind, found in there.items() if found)
    if not there.get(name):
        found = " or ".join(kind for kind in there if there[kind])
        raise UserError(f"--device {name}: this machine has no such device, only {found}")
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the processor multiplies it natively, else float32."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cuda":
        pays = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        pays = device.type == "cpu" and bool({"avx512_bf16", "amx_bf16"} & cpu_flags())
    return torch.bfloat16 if pays else torch.float32


def cpu_flags() -> set[str]:
    """The processor's capability flags, as Linux names them; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line.split(":")[1].split() for line in lines if line.startswith("flags")), []))


def machine(device: torch.device) -> str:
    """The machine in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def matmul_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """How fast a large product of matrices runs here and now, in FLOP/s: the best of several."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        a @ b
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def commit() -> str:
    """The commit that this code is, or an empty string."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
            cwd=Path(__file__).parent, timeout=5,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


# --- against plain torch --------------------------------------------------------------------------


class PlainTransformer(nn.Module):
    """The default network in plain torch: nn.Linear, nn.RMSNorm, SDPA, F.cross_entropy.

    Its parameters are copies of `model`'s, so it gives the same loss; here only its speed counts.
    """

    def __init__(self, model: Transformer):
        super().__init__()
        self.config = c = model.config
        self.embedding = nn.Embedding(c.vocab_size, c.dim)
        self.layers = nn.ModuleList(self.block(c) for _ in range(c.layers))
        self.norm = nn.RMSNorm(c.dim, c.norm_eps)
        with torch.no_grad():
            for mine, theirs in zip(self.parameters(), model.parameters(), strict=True):
                mine.copy_(theirs)

    @staticmethod
    def block(c: ModelConfig) -> nn.ModuleDict:
        kv, width = c.kv_heads_or_heads * c.head_dim, c.ffn_width
        shapes = {
            "query": (c.dim, c.dim),
            "key": (c.dim, kv),
            "value": (c.dim, kv),
            "output": (c.dim, c.dim),
        }
        ffn = {"up": (c.dim, width), "gate": (c.dim, width), "down": (width, c.dim)}
        make = lambda shapes: {n: nn.Linear(*s, bias=False) for n, s in shapes.items()}  # noqa: E731
        norms = [nn.RMSNorm(c.dim, c.norm_eps) for _ in range(2)]
        return nn.ModuleDict({"norm1": norms[0], **make(shapes), "norm2": norms[1], **make(ffn)})

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        c, (B, T) = self.config, ids.shape
        exponent = torch.arange(0, c.head_dim, 2, device=ids.device) / c.head_dim
        angles = torch.arange(T, device=ids.device)[:, None] * c.rope_base**-exponent
        cos, sin = angles.cos(), angles.sin()

        def turn(x: Tensor) -> Tensor:
            if c.qk_norm:
                x = F.rms_norm(x, (c.head_dim,), eps=1e-6)
            a, b = x.chunk(2, -1)
            return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)

        x = self.embedding(ids)
        for m in self.layers:
            h = m["norm1"](x)
            q, k, v = (
                m[n](h).view(B, T, -1, c.head_dim).transpose(1, 2)
                for n in ("query", "key", "value")
            )
            h = F.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True, enable_gqa=True)
            x = x + m["output"](h.transpose(1, 2).reshape(B, T, -1))
            h = m["norm2"](x)
            x = x + m["down"](F.silu(m["gate"](h)) * m["up"](h))
        logits = F.linear(self.norm(x), self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


@dataclass(frozen=True)
class Bench:
    """Time an update against the same network in plain torch, alternating in one process."""

    model: ModelConfig = ModelConfig(dim=384, layers=6, heads=6, vocab_size=257)
    batch: int = 12  # rows of a step
    rounds: int = 9  # times that every arm is measured
    device: str = "auto"  # auto, cpu, cuda or mps
    compile: bool = False  # torch.compile for the plain network


def arms(config: Bench, device: torch.device) -> dict[str, Callable[[], None]]:
    """The four things to time: ours and plain torch, each in fp32 and bf16, each a whole update."""
    rng = generator(0, "bench")
    shape = (config.batch, config.model.context)
    inputs, targets = (
        torch.randint(config.model.vocab_size, shape, generator=rng) for _ in range(2)
    )
    batch = to(Batch(inputs, targets, torch.zeros(shape, dtype=torch.long)), device)

    def ours(dtype: torch.dtype) -> Callable[[], None]:
        model = Transformer(config.model).to(device)
        optimizer = OPTIMIZERS["adamw"](model.named_parameters(), OptimConfig("adamw"), dtype)
        return lambda: update(model, [batch], optimizer, 1e-3, 1.0, dtype)

    def plain(dtype: torch.dtype) -> Callable[[], None]:
        model = PlainTransformer(Transformer(config.model)).to(device)
        model = torch.compile(model) if config.compile else model
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)

        def step() -> None:
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = model(batch.inputs, batch.targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            loss.item()

        return step

    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16}
    return {
        f"{who} {n}": f(t)
        for n, t in kinds.items()
        for who, f in (("ours", ours), ("plain", plain))
    }


def bench() -> None:
    config = tyro.cli(Bench)
    device = pick_device(config.device)
    steps = arms(config, device)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in tqdm(range(config.rounds + 1), "measuring", leave=False, disable=None):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if device.type != "cpu":
                getattr(torch, device.type).synchronize()
            if turn:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    model = Transformer(config.model)
    tokens = config.batch * config.model.context
    flops = tokens * training_flops(model, config.model.context)
    print(f"{count_parameters(model):,} parameters, {tokens:,} tokens an update, "
          f"{machine(device)}, torch {torch.__version__}")  # fmt: skip
    for name, seconds in times.items():
        t = statistics.median(seconds)
        print(
            f"{name:12} {1e3 * t:8.1f} ms   {tokens / t:9,.0f} tokens/s   "
            f"{flops / t / 1e9:7,.0f} GFLOP/s"
        )
    for slow, fast in (
        ("plain fp32", "ours fp32"),
        ("plain bf16", "ours bf16"),
        ("ours fp32", "ours bf16"),
    ):
        ratios = sorted(s / f for s, f in zip(times[slow], times[fast], strict=True))
        low, high = ratios[len(ratios) // 5], ratios[-1 - len(ratios) // 5]
        print(f"{fast} is {statistics.median(ratios):.2f} × as fast as {slow}   "
              f"(middle 60 % of pairs: {low:.2f} … {high:.2f})")  # fmt: skip


if __name__ == "__main__":
    main(bench)
