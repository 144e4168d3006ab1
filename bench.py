"""How fast the parts are beside what one would use instead: in turns, in one process, one table.

Idea: a shared machine's speed drifts by a factor of two within minutes, so a time says little. Both
sides of a comparison run alternately, and the ratio of each pair is kept: the table shows the
median ratio and what the middle 60 % of them span.

Run: python bench.py                       an update, learning a tokenizer, encoding (minutes)
     python bench.py --only update         against the same network in plain torch
     python bench.py --only tokenizer      against Hugging Face's tokenizers and tiktoken
     python bench.py --only dedup          finding near-copies, against datasketch
     python bench.py --only sampling       many texts at once, against one by one without a cache

The kernels have a bench of their own, python -m kernels.bench, and so has writing,
python generate.py --bench gpt2.
"""

import ast
import json
import sys
import sysconfig
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from tqdm import tqdm

from bpe import BPE
from dedup import Forest, Likeness, clusters, jaccard, words_of
from documents import prose
from generate import Sampling, generate
from model import (
    ACTIVATIONS,
    ModelConfig,
    Transformer,
    count_parameters,
    preset_in,
)  # fmt: skip
from objectives import Batch
from optim import OptimConfig, build
from pieces import SPLIT_PATTERNS
from run import UserError, generator, main
from scaling import exact_flops
from step import machine, matmul_peak, pick_device, to, update
from vocabulary import END_OF_TEXT

PLAIN_BENDS = {
    "swiglu": lambda up, gate: F.silu(gate) * up,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}
PLAIN = {  # what the network in plain torch can be
    "arch": ["decoder"], "order": ["pre"], "attention": ["full"], "embed_norm": [False],
    "position": ["rope", "learned", "none"], "activation": [*PLAIN_BENDS], "segments": [0],
    "head_width": [0], "rope_interleaved": [False], "scaled_head": [False], "score_scale": [0],
}  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """Time the parts against what one would use instead, alternating in one process."""

    only: Literal["", "update", "tokenizer", "dedup", "sampling"] = ""  # one part; empty: all
    model: ModelConfig = ModelConfig(dim=384, layers=6, heads=6, vocab_size=257)
    batch: int = 12  # rows of an update
    texts: int = 64  # that are written at once
    tokens: int = 128  # of each of them
    rounds: int = 9  # times that every side of the update is measured; a third for the others
    megabytes: int = 40  # of this Python's own source for the tokenizer; a quarter for near-copies
    device: str = "auto"  # of the update: auto, cpu, cuda or mps
    compile: bool = False  # torch.compile for the plain network

    def __post_init__(self):
        if min(self.rounds, self.batch, self.megabytes, self.texts, self.tokens) < 1:
            raise UserError("all numbers of a bench must be at least 1")
        if not self.model.vocab_size:
            raise UserError("without a tokenizer, --model.vocab-size must be at least 1")
        for name, known in PLAIN.items():
            if (value := getattr(self.model, name)) not in known:
                have = " or ".join(map(str, known))
                raise UserError(f"the plain network has --model.{name} {have}, not {value}")


# --- measuring ------------------------------------------------------------------------------------


class Comparison(NamedTuple):
    """A row of the table: of two sides that were measured in turns, seconds of each."""

    what: str
    ours: list[float]
    peer: str
    theirs: list[float]
    work: float  # in one measurement
    unit: str  # of work per second


def race(sides: dict[str, Callable[[], object]], rounds: int, warm_up: int) -> dict[str, list]:
    """Seconds of each side, `rounds` times, taking turns, after some that do not count."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in tqdm(range(warm_up + rounds), "measuring", leave=False, disable=None):
        for name, call in sides.items():
            start = time.perf_counter()
            call()
            if turn >= warm_up:
                times[name].append(time.perf_counter() - start)
    return times


def shown(row: Comparison) -> str:
    """The row as the table prints it."""
    ratios = sorted(t / o for t, o in zip(row.theirs, row.ours, strict=True))
    low, high = ratios[len(ratios) // 5], ratios[-1 - len(ratios) // 5]
    ours, theirs = median(row.ours), median(row.theirs)
    return (
        f"{row.what:22} {1e3 * ours:10,.0f} {row.work / ours:11,.4g} {row.unit:9} "
        f"{row.peer:18} {1e3 * theirs:10,.0f}   {median(ratios):5.2f} ({low:.2f} … {high:.2f})"
    )


HEAD = f"{'':22} {'ours, ms':>10} {'rate':>11} {'':9} {'against':18} {'ms':>10}   times as fast"


# --- an update ------------------------------------------------------------------------------------


class PlainTransformer(nn.Module):
    """Our network as plain torch has it: nn.Linear, nn.RMSNorm, SDPA, F.cross_entropy.

    Its parameters are copies of `model`'s, in the same order, so it gives the same loss.
    """

    def __init__(self, model: Transformer):
        super().__init__()
        self.config = c = model.config
        self.embedding = nn.Embedding(c.vocab_size, c.dim)
        self.head = nn.Linear(c.dim, c.vocab_size, bias=False)
        if c.tied:
            self.head.weight = self.embedding.weight
        self.place = nn.Embedding(c.context, c.dim) if c.position == "learned" else None
        self.layers = nn.ModuleList(self.block() for _ in range(c.layers))
        self.norm = self.make_norm()
        with torch.no_grad():
            for mine, theirs in zip(self.parameters(), model.parameters(), strict=True):
                mine.copy_(theirs)
        rope = c.position == "rope"
        angles = model.position.angles(torch.arange(c.context)) if rope else None
        self.register_buffer("cos", angles.cos() if rope else None)
        self.register_buffer("sin", angles.sin() if rope else None)

    def make_norm(self) -> nn.Module:
        c = self.config
        if c.norm == "layernorm":
            return nn.LayerNorm(c.dim, c.norm_eps, bias=c.bias)
        return nn.RMSNorm(c.dim, c.norm_eps)

    def block(self) -> nn.ModuleDict:
        c = self.config
        kv, width = c.kv_heads_or_heads * c.head_dim, c.ffn_width
        linear = partial(nn.Linear, bias=c.bias)
        gate = {"gate": linear(c.dim, width)} if ACTIVATIONS[c.activation].gated else {}
        return nn.ModuleDict({
            "norm1": self.make_norm(), "query": linear(c.dim, c.dim), "key": linear(c.dim, kv),
            "value": linear(c.dim, kv), "output": linear(c.dim, c.dim),
            "norm2": self.make_norm(), "up": linear(c.dim, width), **gate,
            "down": linear(width, c.dim),
        })  # fmt: skip

    def turn(self, x: Tensor) -> Tensor:
        """Queries or keys (B H T D), as attention compares them."""
        if self.config.qk_norm:
            x = F.rms_norm(x, x.shape[-1:], eps=1e-6)
        if self.cos is None:
            return x
        cos, sin = self.cos[: x.shape[2]], self.sin[: x.shape[2]]
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        c, (B, T) = self.config, ids.shape
        x, bend = self.embedding(ids), PLAIN_BENDS[c.activation]
        if self.place is not None:
            x = x + self.place.weight[:T]
        for m in self.layers:
            h = m["norm1"](x)
            q, k, v = (
                m[n](h).view(B, T, -1, c.head_dim).transpose(1, 2)
                for n in ("query", "key", "value")
            )
            q, k = self.turn(q), self.turn(k)
            h = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = x + m["output"](h.transpose(1, 2).reshape(B, T, -1))
            h = m["norm2"](x)
            x = x + m["down"](bend(*(m[n](h) for n in ("up", "gate") if n in m)))
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def sides(config: Bench, device: torch.device) -> dict[str, Callable[[], None]]:
    """Four whole updates: ours and plain torch's, each in fp32 and bf16."""
    rng = generator(0, "bench")
    shape = (config.batch, config.model.context)
    inputs, targets = (
        torch.randint(config.model.vocab_size, shape, generator=rng) for _ in range(2)
    )
    batch = to(Batch(inputs, targets, torch.zeros(shape, dtype=torch.long)), device)

    def wait() -> None:
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()

    def ours(dtype: torch.dtype) -> Callable[[], None]:
        model = Transformer(config.model).to(device)
        how = OptimConfig("adamw")
        optimizer = build(model.named_parameters(), how, dtype)
        return lambda: (update(model, [batch], optimizer, 1e-3, how, dtype), wait())

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
            wait()

        return step

    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16}
    return {
        f"{who} {n}": f(t) for n, t in kinds.items() for who, f in (("our", ours), ("plain", plain))
    }


def of_update(config: Bench) -> Iterator[Comparison]:
    device = pick_device(config.device)
    model = Transformer(config.model)
    tokens = config.batch * config.model.context
    flops = exact_flops(config.model, config.model.context) / config.model.context
    peaks = [matmul_peak(device, dtype) for dtype in (torch.float32, torch.bfloat16)]
    print(
        f"{count_parameters(model):,} parameters, {tokens:,} tokens an update, "
        f"{flops / 1e6:.1f} MFLOP per token; a matrix product reaches "
        f"{peaks[0] / 1e9:,.0f} GFLOP/s in fp32, {peaks[1] / 1e9:,.0f} in bf16"
    )
    times = race(sides(config, device), config.rounds, warm_up=1)
    for ours, peer in (
        ("our fp32", "plain fp32"),
        ("our bf16", "plain bf16"),
        ("our bf16", "our fp32"),
    ):
        yield Comparison(f"update, {ours[4:]}", times[ours], peer, times[peer], tokens, "tokens/s")


# --- a tokenizer ----------------------------------------------------------------------------------


def own_source(most: int) -> list[str]:
    """The Python files that lie on this machine, in a fixed order, about `most` bytes of them.

    Without those that hold a letter newer than this Python: regular expressions in Python and in
    Rust know Unicode of different years, and would not agree on whether it is one.
    """
    texts, size = [], 0
    roots = sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")
    for path in (path for root in roots for path in sorted(Path(root).rglob("*.py"))):
        data = path.read_bytes() if size < most else b""
        try:
            texts.append(data.decode())
            size += len(data)
        except UnicodeDecodeError:
            continue
    return [text for text in texts if text and not any(map(unassigned, set(text)))]


def unassigned(letter: str) -> bool:
    return unicodedata.category(letter) == "Cn"


def learn_with_hugging_face(texts: list[str], vocab_size: int) -> list[list[str]]:
    """The merges that their `tokenizers` learns in the same setting, as pairs of characters."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    theirs, level = tokenizers.Tokenizer(models.BPE()), pre_tokenizers.ByteLevel
    split = pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERNS["gpt4"]), "isolated")
    as_bytes = level(add_prefix_space=False, use_regex=False)
    theirs.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=level.alphabet(), special_tokens=[END_OF_TEXT],
        show_progress=False,
    )  # fmt: skip
    theirs.train_from_iterator(texts, trainer)
    return json.loads(theirs.to_str())["model"]["merges"]


def of_tokenizer(config: Bench) -> Iterator[Comparison]:
    texts = own_source(config.megabytes * 10**6)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    print(f"{len(texts):,} files of Python source, {megabytes:.1f} MB")
    rounds = -(-config.rounds // 3)
    for vocab_size in (4096, 32768):
        learn = {
            "ours": partial(BPE.train, texts, vocab_size),
            "theirs": partial(learn_with_hugging_face, texts, vocab_size),
        }
        try:
            times = race(learn, rounds, warm_up=0).values()
        except ImportError:
            print("tokenizers, a library for developers, is not installed: learning is left out")
            break
        ours, theirs = times
        yield Comparison(
            f"learn {vocab_size:,} tokens", ours, "tokenizers", theirs, megabytes, "MB/s"
        )
    bpe = BPE.train(texts, 32768)
    fresh = [BPE(bpe.tokens, bpe.merges, bpe.special, bpe.pattern) for _ in range(2 * rounds + 1)]
    fast = bpe.to_tiktoken()
    encode = {  # a new tokenizer each time, which remembers no piece
        "ours": lambda: [*map(fresh.pop().encode, texts)],
        "in two processes": lambda: [*fresh.pop().encode_batch(texts, processes=2)],
        "theirs": lambda: [*map(fast.encode_ordinary, texts)],
    }
    times = race(encode, rounds, warm_up=0)
    for name, what in (("ours", "encode"), ("in two processes", "encode, two processes")):
        yield Comparison(what, times[name], "tiktoken", times["theirs"], megabytes, "MB/s")
    equal = encode["in two processes"]() == encode["theirs"]()
    print("our ids are tiktoken's" if equal else "OUR IDS ARE NOT TIKTOKEN'S")


# --- near-copies ----------------------------------------------------------------------------------

LIKE = Likeness()


def docstrings(most: int) -> list[str]:
    """Prose in the Python files that lie on this machine, about `most` bytes of it."""
    texts, size = [], 0
    for source in own_source(10 * most):
        with suppress(SyntaxError, ValueError):
            for _, text in prose(source, ast.parse(source)):
                if len(text) >= 200 and size < most:
                    texts.append(text)
                    size += len(text.encode())
    return texts


def cluster_with_datasketch(texts: list[str]) -> list[int]:
    """The same with their MinHash and LSH: same shingles, bands and exact comparison."""
    from datasketch import MinHash, MinHashLSH

    lsh = MinHashLSH(num_perm=LIKE.bands * LIKE.rows, params=(LIKE.bands, LIKE.rows))
    first = MinHash(num_perm=LIKE.bands * LIKE.rows)
    same = {"permutations": first.permutations, "scheme": first.scheme}
    sets, forest = [], Forest(len(texts))
    for i, text in enumerate(texts):
        words = words_of(text)
        runs = (words[k : k + LIKE.words] for k in range(max(1, len(words) - LIKE.words + 1)))
        sets.append(frozenset(map(" ".join, runs)))
        signature = MinHash(num_perm=LIKE.bands * LIKE.rows, **same)
        signature.update_batch([shingle.encode() for shingle in sets[i]])
        for other in lsh.query(signature):
            if jaccard(sets[other], sets[i]) >= LIKE.threshold:
                forest.unite(other, i)
        lsh.insert(i, signature)
    return [*map(forest.find, range(len(texts)))]


def of_dedup(config: Bench) -> Iterator[Comparison]:
    texts = docstrings(config.megabytes * 250_000)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    print(f"{len(texts):,} docstrings and comments, {megabytes:.1f} MB")
    sides = {
        "ours": partial(clusters, texts, LIKE, processes=1),
        "theirs": partial(cluster_with_datasketch, texts),
    }
    try:
        ours, theirs = race(sides, -(-config.rounds // 3), warm_up=0).values()
    except ImportError:
        print("datasketch, a library for developers, is not installed: near-copies are left out")
        return
    kept = [sum(first == i for i, first in enumerate(side())) for side in sides.values()]
    print(f"kept: {kept[0]:,} of {len(texts):,}, with datasketch {kept[1]:,}")
    yield Comparison("near-copies", ours, "datasketch", theirs, megabytes, "MB/s")


# --- writing --------------------------------------------------------------------------------------


@torch.no_grad()
def one_by_one(model: Transformer, prompts: list[list[int]], tokens: int) -> None:
    """As a plain loop writes: each token from all before it, each text by itself."""
    for prompt in prompts:
        ids = torch.tensor([prompt])
        for _ in range(tokens):
            last = model(ids[:, -model.config.context :])[:, -1]
            ids = torch.cat((ids, model.logits(last).softmax(-1).multinomial(1)), 1)


def of_sampling(config: Bench) -> Iterator[Comparison]:
    """The model of train.py, in fp32 on the CPU; of the slow side one text, counted as all."""
    model, prompts = Transformer(ModelConfig(vocab_size=2048)).eval(), [[0]] * config.texts
    how = Sampling(1.0, top_p=1.0)
    times = race(
        {
            "ours": lambda: list(generate(model, prompts, config.tokens, how, set(), 0)),
            "theirs": lambda: one_by_one(model, prompts[:1], config.tokens),
        },
        -(-config.rounds // 3), warm_up=1,
    )  # fmt: skip
    theirs = [config.texts * seconds for seconds in times["theirs"]]
    work = config.texts * config.tokens
    yield Comparison("sampling", times["ours"], "one by one", theirs, work, "tokens/s")


PARTS = {
    "update": of_update, "tokenizer": of_tokenizer, "dedup": of_dedup, "sampling": of_sampling
}  # fmt: skip


def bench() -> None:
    default = Bench()
    shape = preset_in(sys.argv[1:], default.model)
    vocab_size = shape.vocab_size or default.model.vocab_size
    default = replace(default, model=replace(shape, vocab_size=vocab_size))
    config = tyro.cli(Bench, default=default, description=__doc__)
    print(f"{machine(pick_device(config.device))}, torch {torch.__version__}")
    rows = [
        row for name, part in PARTS.items() if config.only in ("", name) for row in part(config)
    ]
    print("\n" + "\n".join([HEAD, *map(shown, rows)]))


if __name__ == "__main__":
    main(bench)
