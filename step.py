"""One update: from micro-batches to gradients to new weights, and what the machine makes of it.

Idea: the loss of a step is the sum over all its tokens divided by their number, however they are
cut into micro-batches; then one clip of the whole gradient, then one move of the optimizer. What
is no number moves nothing.

train.py leaves a file of such a step, and `step.py FILE` does it again.

Run: python -m pytest tests/test_step.py

Papers: Pascanu et al. 2013, clipping (arXiv 1211.5063); Micikevicius et al. 2018, mixed precision
(arXiv 1710.03740); Kalamkar et al. 2019, bfloat16 (arXiv 1905.12322).
"""

import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

try:
    import resource
except ImportError:  # Windows
    resource = None

from attention import KeyValue
from kernels.cross_entropy import cross_entropy
from kernels.mask import Mask
from model import ModelConfig, Transformer
from objectives import IGNORE, Batch
from optim import OptimConfig, Optimizer
from run import UserError, load_tensors, main, plain, settings, write_whole

# --- the update -----------------------------------------------------------------------------------


def loss_sum(model: Transformer, batch: Batch, dtype: torch.dtype | None = None) -> Tensor:
    """Σ −log p(target) over the batch, in nats; with dropout where the batch has draws."""
    memory, crossed = source_of(model, batch, dtype)
    mask = Mask(batch.lo, batch.hi)
    hidden = model(
        batch.inputs, mask=mask, dtype=dtype, memory=memory, cross_mask=crossed, draws=batch.draws
    )
    return cross_entropy(hidden.flatten(0, 1), model.head_weight, batch.targets.flatten())


def source_of(
    model: Transformer, batch: Batch, dtype: torch.dtype | None
) -> tuple[list[KeyValue] | None, Mask | None]:
    """What a decoder looks at of an encoder, and its mask; None where there is none."""
    if batch.source is None:
        return None, None
    seen = Mask(batch.source_lo, batch.source_hi)
    memory = model.encode(batch.source, seen, dtype=dtype, draws=batch.draws)
    return memory, Mask(batch.cross_lo, batch.cross_hi)


def accumulate(
    model: Transformer, batches: list[Batch], dtype: torch.dtype | None = None, scale: float = 1.0
) -> tuple[float, int]:
    """Add `scale` times the gradient of the mean loss over all tokens of all batches.

    Returns (that loss, the number of tokens). The mean is over tokens, not over batches: one with
    few targets weighs little.
    """
    tokens = sum(int((batch.targets != IGNORE).sum()) for batch in batches)
    total = 0.0
    for batch in batches:
        loss = loss_sum(model, batch, dtype) / max(1, tokens)
        (loss * scale).backward()
        total += loss.item()
    return total, tokens


def clip(
    parameters: Iterable[Tensor], largest: float, by: str = "norm", scale: float = 1.0
) -> float:
    """Divide gradients by `scale`, then make them small enough; returns their norm ‖g‖ in between.

    norm   g ← g · min(1, largest/‖g‖), all gradients as one (Pascanu et al. 2013, algorithm 1)
    value  each number of g to the nearest in −largest … largest
    Where largest is 0 or the norm no number, nothing is clipped.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    norms = torch._foreach_norm(grads)
    norm = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms])).item()
    shrink(grads, norm / scale, largest, by, scale)
    return norm / scale


def shrink(
    grads: list[Tensor], norm: float, largest: float, by: str = "norm", scale: float = 1.0
) -> None:
    """`clip` by a norm ‖g/scale‖ that is known already, as where many processes summed it."""
    factor = 1 / scale
    if by == "norm" and 0 < largest < norm < math.inf:
        factor *= largest / norm
    if factor != 1:
        torch._foreach_mul_(grads, factor)
    if by == "value" and largest > 0:
        torch._foreach_clamp_min_(grads, -largest)
        torch._foreach_clamp_max_(grads, largest)


class LossScale:
    """What the loss is multiplied by before backward, and the gradient divided by behind it.

    In fp16 numbers below 6·10⁻⁸ are 0, and so would many gradients be. A power of 2 changes no
    other bit. It halves at each overflow, whose update is skipped, and doubles after `patience`
    updates without one (Micikevicius et al. 2018, section 3.2).
    """

    def __init__(self, scale: float = 2.0**16, patience: int = 1000):
        self.scale, self.patience, self.good = scale, patience, 0

    def after(self, finite: bool) -> None:
        """Adapt to an update whose gradients were all numbers, or not."""
        self.good = self.good + 1 if finite else 0
        if not finite:
            self.scale /= 2
        elif self.good == self.patience:
            self.scale, self.good = self.scale * 2, 0

    def tensors(self) -> dict[str, Tensor]:
        """Both numbers, for a checkpoint."""
        return {"loss_scale": torch.tensor([self.scale, self.good], dtype=torch.float64)}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.scale, good = tensors["loss_scale"].tolist()
        self.good = int(good)


class Scales(NamedTuple):
    """Root mean squares, block by block: of the stream behind it, of its weights' gradient."""

    activation: list[float]
    gradient: list[float]


@contextmanager
def watched(model: Transformer) -> Iterator[list[Scales]]:
    """Of the update made inside, a single one: gradients are those that moved the weights."""
    streams: list[list[Tensor]] = [[] for _ in model.layers]
    hooks = [
        layer.register_forward_hook(lambda module, inputs, output, kept=kept: kept.append(
            torch.stack([output[0].detach().float().square().sum(),
                         torch.tensor(float(output[0].numel()), device=output[0].device)])))
        for layer, kept in zip(model.layers, streams, strict=True)
    ]  # fmt: skip
    found: list[Scales] = []
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
    sums = [torch.stack(kept).sum(0).tolist() for kept in streams]
    grads = [[p.grad for p in layer.parameters() if p.grad is not None] for layer in model.layers]
    found.append(Scales(
        [math.sqrt(squares / count) for squares, count in sums],
        [math.sqrt(sum(g.float().square().sum().item() for g in gs)
                   / max(1, sum(map(torch.numel, gs)))) for gs in grads],
    ))  # fmt: skip


class NotFinite(UserError):
    """A loss, a gradient or a weight that is no number; the weights before it are as they were."""


class Update(NamedTuple):
    """What one step was made of."""

    loss: float  # mean over the tokens, in nats
    tokens: int
    norm: float  # of the gradient, before clipping
    moved: bool  # False where fp16 overflowed: nothing has changed but the loss scale


def update(
    model: Transformer, batches: list[Batch], optimizer: Optimizer, lr: float, config: OptimConfig,
    dtype: torch.dtype | None = None, scale: LossScale | None = None,
) -> Update:  # fmt: skip
    """One step; NotFinite, and no weight has moved, if loss or gradient are no numbers."""
    for p in model.parameters():
        p.grad = None
    factor = scale.scale if scale else 1.0
    loss, tokens = accumulate(model, batches, dtype, factor)
    norm = clip(model.parameters(), config.clip, config.clip_by, factor)
    fault = partial(whose_fault, model, batches, dtype, loss)
    return Update(loss, tokens, norm, move(optimizer, lr, loss, norm, scale, fault))


def move(
    optimizer: Optimizer, lr: float, loss: float, norm: float, scale: LossScale | None,
    fault: Callable[[], str],
) -> bool:  # fmt: skip
    """Let the optimizer step, if loss and norm are numbers; has it?

    NotFinite, with what `fault` says, if they are none and no loss scale can be to blame.
    """
    finite = math.isfinite(loss) and math.isfinite(norm)
    if finite:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    elif scale is None or scale.scale < 1 or not math.isfinite(loss):
        raise NotFinite(fault())
    if scale:
        scale.after(finite)
    return finite


def whose_fault(
    model: Transformer, batches: list[Batch], dtype: torch.dtype | None, loss: float
) -> str:
    """Words for the first thing that is no number: a weight, what a layer computes, a gradient."""
    if name := first_bad(model.named_parameters()):
        return f"the weight {name} is not finite"
    if not math.isfinite(loss):
        for number, batch in enumerate(batches):
            if name := first_bad_layer(model, batch, dtype):
                return f"what {name} computes from batch {number} is not finite"
        return f"the loss is {loss}, though all that the layers compute is finite"
    grads = ((n, p.grad) for n, p in model.named_parameters() if p.grad is not None)
    if name := first_bad(grads):
        return f"the gradient of {name} is not finite, the loss is {loss:.3f}"
    return (
        f"the norm of the gradient is not finite, though each gradient is; the loss is {loss:.3f}"
    )


def first_bad(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first that holds a number which is not finite."""
    return next((name for name, x in tensors if not torch.isfinite(x).all()), None)


@torch.no_grad()
def first_bad_layer(model: Transformer, batch: Batch, dtype: torch.dtype | None) -> str | None:
    """The name of the first module of a forward pass whose output is not finite."""
    bad: list[str] = []

    def look(name: str, output: object) -> None:
        parts = output if isinstance(output, tuple) else (output,)
        if not all(torch.isfinite(x).all() for x in parts if isinstance(x, Tensor)):
            bad.append(name)

    hooks = [
        module.register_forward_hook(lambda module, inputs, output, name=name: look(name, output))
        for name, module in model.named_modules()
        if name
    ]
    try:
        loss_sum(model, batch, dtype)
    finally:
        for hook in hooks:
            hook.remove()
    return bad[0] if bad else None


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
    return batch.each(lambda x: x.to(device, non_blocking=True))


# --- a step again ---------------------------------------------------------------------------------


def write_replay(
    path: Path, model: Transformer, batches: list[Batch], dtype: torch.dtype | None
) -> None:
    """A file of weights and batches, with which `replay` does the same step again."""
    tensors = {f"model/{name}": x for name, x in model.state_dict().items()}
    for number, batch in enumerate(batches):
        fields = ((name, x) for name, x in vars(batch).items() if x is not None)
        tensors |= {f"batch/{number}/{name}": x.clone() for name, x in fields}
    about = {"model": json.dumps(asdict(model.config)), "dtype": str(dtype or torch.float32)}
    write_whole(path, save(plain(tensors), about))


def replay(path: Path) -> str:
    """What was no number in the step that a file of `write_replay` holds, in words."""
    tensors = load_tensors(path)
    with safe_open(path, "pt") as file:
        about = file.metadata() or {}
    try:
        config = settings(ModelConfig, json.loads(about["model"]), str(path))
        dtype = {str(d): d for d in (torch.float32, torch.bfloat16, torch.float16)}[about["dtype"]]
    except (LookupError, ValueError):
        raise UserError(f"{path} is not a file that train.py left of a step") from None
    parts: dict[str, dict[str, Tensor]] = {}
    for name, x in tensors.items():
        kind, _, rest = name.partition("/")
        group, _, field = rest.partition("/") if kind == "batch" else (kind, "", rest)
        parts.setdefault(group, {})[field] = x
    weights = parts.pop("model", {})
    model = Transformer(config, seed=None)
    try:
        model.load_state_dict(weights)
        batches = [Batch(**parts[key]) for key in sorted(parts, key=int)]
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{path} does not fit together: {str(error).splitlines()[0]}") from None
    loss, tokens = accumulate(model, batches, dtype)
    norm = clip(model.parameters(), 0.0)
    said = f"{len(batches)} batches, {tokens:,} tokens: loss {loss:.4f}, gradient's norm {norm:.4g}"
    if math.isfinite(loss) and math.isfinite(norm):
        return f"{said}; all is finite"
    return f"{said}; {whose_fault(model, batches, dtype, loss)}"


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
        if name == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
            raise UserError(f"{machine(device)} does not multiply bfloat16: give --dtype float16")
        return getattr(torch, name)
    if device.type == "cuda":
        pays = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        pays = device.type == "cpu" and bool({"avx512_bf16", "amx_bf16"} & cpu_flags())
    return torch.bfloat16 if pays else torch.float32


def device_memory(device: torch.device) -> float:
    """The bytes that a device has; inf where nobody says."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return math.inf


def check_memory(needed: int, device: torch.device) -> None:
    """UserError if a device has not so many bytes; on a CPU the system would kill the process."""
    if needed > (there := device_memory(device)):
        raise UserError(
            f"this takes at least {needed / 1e9:,.1f} GB of memory, and {device.type} has "
            f"{there / 1e9:,.1f} GB: choose smaller sizes"
        )


def cpu_flags() -> set[str]:
    """The processor's capability flags, as Linux names them; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line.split(":")[1].split() for line in lines if line.startswith("flags")), []))


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held at once: of tensors on CUDA, else of all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    kilo = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo


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


def script() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise UserError("give the file that train.py left of a step: python step.py FILE")
    print(replay(Path(sys.argv[1])))


if __name__ == "__main__":
    main(script)
