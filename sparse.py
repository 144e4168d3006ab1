"""Block-sparse attention: who sees whom is a pattern of blocks, and empty blocks are skipped.

Idea: a text of T tokens has ⌈T/block⌉ blocks, and a pattern says which blocks of queries look at
which blocks of keys. If each looks at a fixed number of them, the cost grows with T; what two
tokens cannot tell each other directly goes through a third one, in the next layer.

A pattern is a statement about two blocks' numbers i and j, so that the past looks the same however
long the text becomes, and whether it is read at once or token by token. Causality, documents and
padding stay in the mask's interval. Blocks are counted from the first place of a row: padding on
the left moves them, and in a packed row only the first document has the first blocks to look at.

Run: python sparse.py    (what every kind of attention costs as T grows; one minute)

To add a pattern: one function and one entry in PATTERNS.

Papers: Child et al. 2019, Sparse Transformer (arXiv 1904.10509); Beltagy et al. 2020, Longformer
(arXiv 2004.05150); Zaheer et al. 2020, BigBird (arXiv 2007.14062).

Letters: T positions that look · S positions looked at · H heads · i block of queries · j block of
keys.
"""

import ctypes
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from tqdm import tqdm

from kernels.attention import attend, attend_obvious
from kernels.mask import Mask
from performer import Performer
from pictures import picture
from run import RUNS, UserError, generator, main

# --- patterns -------------------------------------------------------------------------------------


def reach(config) -> int:
    """⌈window / block⌉: with the blocks so far away, every token nearer than `window` is seen."""
    return -(-config.window // config.block)


def strided(i: Tensor, j: Tensor, config) -> Tensor:
    """|i − j| ≤ l, or (i − j) mod l = 0: what is near, and every l-th block (Child et al., 4.3).

    The paper's A(1) and A(2), with blocks for its tokens and l = reach; every head sees both ("a
    merged head", section 5.1), so that heads can be split over processes. It costs the least where
    l is about √(T/block).
    """
    l = reach(config)
    return ((i - j).abs() <= l) | ((i - j) % l == 0)


def fixed(i: Tensor, j: Tensor, config) -> Tensor:
    """⌊i/l⌋ = ⌊j/l⌋, or j mod l ≥ l − c: its own span of l blocks, and the last c of each.

    Child et al., section 4.3, merged as in `strided`; l = reach, c = global_blocks. The last blocks
    of a span tell what stood in it.
    """
    l = reach(config)
    return (i // l == j // l) | (j % l >= l - config.global_blocks)


def longformer(i: Tensor, j: Tensor, config) -> Tensor:
    """|i − j| ≤ reach, or i < g, or j < g: a window, and g blocks which see and are seen by all.

    Beltagy et al., section 3.1, with the text's first g = global_blocks for its chosen tokens.
    """
    first = config.global_blocks
    return ((i - j).abs() <= reach(config)) | (i < first) | (j < first)


def bigbird(i: Tensor, j: Tensor, config) -> Tensor:
    """As `longformer`, and random pairs of blocks (Zaheer et al., section 2, appendix D).

    The later of two blocks draws: r = random_blocks of the earlier ones which it does not see yet.
    So a pair's lot depends on the pair alone, not on the length of the text, and the graph of who
    sees whom is undirected; without a mask for the future, early blocks see more than r.
    """
    table = random_table(
        len(j), config.random_blocks, config.global_blocks, reach(config), str(j.device)
    )
    drawn = table[torch.maximum(i, j)] == torch.minimum(i, j)[..., None]
    return longformer(i, j, config) | drawn.any(-1)


@cache
def random_table(blocks: int, drawn: int, first: int, near: int, device: str) -> Tensor:
    """(blocks drawn): for each block the earlier ones that it drew; −1 where there are no more."""
    table = torch.full((blocks, drawn), -1)
    for i in range(blocks):
        free = torch.arange(first, max(first, i - near))  # beyond these it sees the rest anyway
        order = torch.randperm(len(free), generator=generator(0, "random blocks", i))
        found = free[order[:drawn]]
        table[i, : len(found)] = found
    return table.to(device)


# --- from a pattern to a mask ---------------------------------------------------------------------


def sparse(mask: Mask, S: int, config, pattern: Callable[..., Tensor]) -> Mask:
    """The mask with the pattern's layout, for queries at the places mask.at (1 T) among S keys.

    pattern(i, j, config) takes blocks of queries (n 1) and all blocks of keys (m). Where queries
    begin in the middle of a block and reach into the next (a prompt behind a past), no layout of
    whole blocks fits: on a CPU it becomes one of single tokens. ValueError, one sentence.
    """
    block, at = config.block, mask.at
    if len(at) != 1:
        raise ValueError(
            f"block-sparse attention: mask.at {tuple(at.shape)} must be (1 T): all samples of a "
            "batch stand at the same places"
        )
    j, T = torch.arange(-(-S // block), device=at.device), at.shape[1]
    first = 0 if T in (1, S) else int(at[0, 0]) % block  # a GPU is waited for only with a past
    if first == 0 or first + T <= block:
        rows = pattern(at[0, ::block, None] // block, j, config)
        return replace(mask, layout=rows[None], block=block)
    if at.is_cuda:
        raise ValueError(
            f"block-sparse attention on a GPU: the {int(at[0, 0])} tokens of the past must be a "
            f"multiple of --model.block {block}"
        )
    rows = pattern(at[0, :, None] // block, j, config)
    return replace(mask, layout=rows.repeat_interleave(block, 1)[None, :, :S], block=1)


patterns = strided, fixed, longformer, bigbird
PATTERNS = {f.__name__: partial(sparse, pattern=f) for f in patterns}  # mask, S, config -> mask


# --- what attention costs as T grows --------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    shortest: int = 512  # tokens of the shortest text
    longest: int = 16_384  # of the longest; each is twice the one before
    obvious: int = 8_192  # of the longest for the obvious version, which writes T × T scores
    heads: int = 4  # of queries, keys and values
    head_dim: int = 64  # numbers of a head
    window: int = 256  # tokens that one sees: of sliding; in bigbird on each side
    block: int = 64  # tokens of a block
    global_blocks: int = 1  # bigbird: first blocks, which all see
    random_blocks: int = 2  # bigbird: random ones
    features: int = 256  # of a Performer
    backward: bool = False  # measure forward and backward pass
    rounds: int = 3  # of all kinds in turn; the median is shown

    def __post_init__(self):
        if not 1 <= self.shortest <= min(self.obvious, self.longest) or self.rounds < 1:
            raise UserError(
                "--shortest must be from 1 to --obvious and --longest, --rounds at least 1"
            )
        if self.block < 16 or self.block & (self.block - 1):
            raise UserError(f"--block {self.block} must be a power of 2, at least 16")
        if min(self.window, self.heads, self.head_dim, self.features) < 1:
            raise UserError("--window, --heads, --head-dim and --features must be at least 1")
        if min(self.global_blocks, self.random_blocks) < 0:
            raise UserError("--global-blocks and --random-blocks must be at least 0")


COLORS = {
    "full, obvious": "#777777", "full": "#1f4e8c", "sliding": "#2f8f5b", "strided": "#b5892e",
    "bigbird": "#c8442d", "performer": "#7b4fa3", "SDPA of torch": "#111111",
}  # fmt: skip
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Cost = tuple[float, float]  # seconds of one processor, and bytes beyond those of q, k and v


def kinds(T: int, config: Settings) -> dict[str, Attend]:
    """Causal attention of every kind; strided with the stride that costs it least, √(T/block)."""
    at, scale = torch.arange(T)[None], config.head_dim**-0.5
    mask = Mask(torch.zeros_like(at), at, at=at)
    window = replace(mask, lo=at - config.window + 1)
    blocks = max(1, round((T / config.block) ** 0.5)) * config.block
    strides = PATTERNS["strided"](mask, T, replace(config, window=blocks))
    performer = Performer(config)
    return {
        "full, obvious": partial(attend_obvious, mask=mask, scale=scale),
        "full": partial(attend, mask=mask, scale=scale),
        "sliding": partial(attend, mask=window, scale=scale),
        "strided": partial(attend, mask=strides, scale=scale),
        "bigbird": partial(attend, mask=PATTERNS["bigbird"](mask, T, config), scale=scale),
        "performer": partial(performer, mask=mask, scale=scale),
        "SDPA of torch": partial(F.scaled_dot_product_attention, is_causal=True),
    }


def resident(what: str) -> int:
    """Bytes of memory in use now (VmRSS) or at most since the last reset (VmHWM); 0 if unknown."""
    lines = Path("/proc/self/status").read_text().splitlines() if sys.platform == "linux" else []
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(what))


def cost(function: Attend, T: int, config: Settings) -> Cost:
    shape = 1, config.heads, T, config.head_dim
    rng = generator(0, "attention cost", T)
    q, k, v = (torch.randn(shape, generator=rng).requires_grad_(config.backward) for _ in range(3))
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # else memory kept from the last one would not count
        Path("/proc/self/clear_refs").write_text("5")
    before, start = resident("VmRSS"), time.process_time()
    out = function(q, k, v)
    if config.backward:
        out.backward(torch.ones_like(out))
    return time.process_time() - start, resident("VmHWM") - before


def measure(config: Settings) -> dict[tuple[str, int], Cost]:
    """The median cost of each kind at each length; they take turns, so that all share a bad day."""
    lengths = [config.shortest]
    while lengths[-1] * 2 <= config.longest:
        lengths.append(lengths[-1] * 2)
    turns = [(round_, T) for round_ in range(config.rounds) for T in lengths]
    costs = defaultdict(list)
    for function in kinds(config.shortest, config).values():
        cost(function, config.shortest, config)  # the first call of anything takes longer
    for _, T in tqdm(turns, "measuring", disable=None):
        for name, function in kinds(T, config).items():
            if name != "full, obvious" or config.obvious >= T:
                costs[name, T].append(cost(function, T, config))
    return {key: tuple(map(median, zip(*each, strict=True))) for key, each in costs.items()}


def show(costs: dict[tuple[str, int], Cost]) -> None:
    """Tables of time and memory, and how they compare at the longest text that all have seen."""
    lengths = sorted({T for _, T in costs})
    for column, (title, unit) in enumerate((("milliseconds", 1e-3), ("megabytes", 1e6))):
        print(f"\n{title:>14}" + "".join(f"{T:>10,}" for T in lengths))
        for name in COLORS:
            row = [costs[name, T][column] / unit for T in lengths if (name, T) in costs]
            print(f"{name:>14}" + "".join(f"{number:10,.1f}" for number in row))
    T = max(T for name, T in costs if name == "full, obvious")
    print(f"\nAt {T:,} tokens, as a share of the obvious version's, and what twice as many cost:")
    (most_time, most_memory), twice = costs["full, obvious", T], 2 * T
    for name in COLORS:
        seconds, size = costs[name, T]
        more = costs.get((name, twice), (0, 0))[0] / seconds
        more = f", × {more:.2f} at {twice:,}" if more else ""
        share = f", memory {size / most_memory:.3f}" if most_memory > 0 else ""  # else unknown
        print(f"{name:>14}  time {seconds / most_time:.3f}{more}{share}")


def draw(costs: dict[tuple[str, int], Cost], config: Settings, path: Path) -> None:
    """Two pictures, time and memory over T, both axes in powers of 2."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    kinds = (("milliseconds of one processor", 1e-3), ("megabytes beyond q, k and v", 1e6))
    with picture(path, 2, (11, 4.8)) as both:
        for column, (axes, (label, unit)) in enumerate(zip(both, kinds, strict=True)):
            for name, color in COLORS.items():
                lengths = sorted(T for n, T in costs if n == name)
                values = [max(costs[name, T][column] / unit, 0.1) for T in lengths]
                style = "o--" if "SDPA" in name else "o-"
                axes.plot(lengths, values, style, color=color, markersize=3.5, label=name)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.10g}"))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set(xlabel="tokens", ylabel=label)
        both[0].legend(frameon=False)
        passes = "forward" + " and backward" * config.backward
        both[0].figure.suptitle(
            f"Causal attention, {passes}: {config.heads} heads of {config.head_dim}, "
            f"window {config.window}, {config.features} features"
        )


def script() -> None:
    config = tyro.cli(Settings, description=__doc__)
    torch.set_num_threads(1)  # then processor time is time, whatever else the machine does
    print(config)
    show(costs := measure(config))
    draw(costs, config, path := RUNS / "attention_cost.png")
    print(f"\npicture: {path}")


if __name__ == "__main__":
    main(script)
