"""Text from a model, one token at a time, with a cache of what it has already looked at.

Idea: to write a token the model needs the keys and values of all tokens before it. They do not
change, so they are kept: a new token costs one row of work instead of the whole text again. Which
token is taken is a choice: the likeliest (greedy), or one drawn from the probabilities, sharpened
by a temperature and cut to the top k or to the smallest set that holds the share p.

Run: python generate.py                              three samples from the newest run
     python generate.py --prompt "Return the" --samples 2 --temperature 0.7
     python generate.py --prompt "Return the" --greedy
     python generate.py --chat                         talk with a run of align.py
     python generate.py --bench gpt2 --samples 1       how fast this machine writes

With `--model FOLDER` the model is not a run's but one in Hugging Face's layout, such as a GPT-2, a
Llama, a T5 or a BERT. A model that has an encoder reads the prompt and writes an answer to it; one
that is an encoder fills in what is masked:

     python generate.py --prompt "Return the <|mask|> of the list."
     python generate.py --special --prompt "Return the <extra_id_0> of the list."

Papers: Fan et al. 2018, top-k (arXiv 1805.04833); Holtzman et al. 2020, top-p (arXiv 1904.09751);
Pope et al. 2023, the cache (arXiv 2211.05102).

Letters: B samples at once · T new tokens · S tokens in the cache · V vocabulary.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import inf, prod
from statistics import median
from typing import Literal, NamedTuple

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

import chat
from attention import KeyValue, Mask
from model import PRESETS, Transformer, count_parameters
from objectives import MASK
from performer import Running
from run import UserError, first_run, generator, main
from step import check_memory, pick_device, pick_dtype
from vocabulary import Tokenizer
from writer import Writer, cast, unknown, writer_of


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.8  # logits are divided by it: below 1 sharper, above 1 flatter
    top_k: int = 0  # only the k likeliest; 0: all
    top_p: float = 0.95  # only the fewest likeliest that together hold this share; 1: all
    greedy: bool = False  # always the likeliest

    def __post_init__(self):
        if not 1e-6 <= self.temperature <= 1e6:
            raise UserError(
                f"--temperature {self.temperature} must lie between 1e-6 and 1e6 (or use --greedy)"
            )
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise UserError("--top-k must be 0 or more, and --top-p above 0 and at most 1")


# --- choosing a token -----------------------------------------------------------------------------


def top_k(logits: Tensor, k: int) -> Tensor:
    """−∞ for all but the k largest of each row (… V); of equal ones the lowest ids stay."""
    order = logits.argsort(stable=True, dim=-1, descending=True)
    return logits.scatter(-1, order[..., k:], -torch.inf)


def top_p(logits: Tensor, p: float) -> Tensor:
    """−∞ outside the nucleus: the fewest likeliest tokens whose probabilities sum to at least p."""
    order = logits.argsort(stable=True, dim=-1, descending=True)
    probability = logits.softmax(-1).gather(-1, order)
    outside = probability.cumsum(-1) - probability >= p  # those before it already hold p
    return logits.masked_fill(outside.scatter(-1, order, outside), -torch.inf)


def distribution(logits: Tensor, how: Sampling) -> Tensor:
    """The probabilities (B V) from which a token is drawn: temperature, then top-k, then top-p."""
    if how.greedy:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).double()
    logits = logits.double() / how.temperature
    if how.top_k:
        logits = top_k(logits, how.top_k)
    if how.top_p < 1:
        logits = top_p(logits, how.top_p)
    return logits.softmax(-1)


def draw(probability: Tensor, u: Tensor) -> Tensor:
    """The token where the running sum of probabilities (B V) first exceeds u · total, u (B) < 1."""
    total = probability.cumsum(-1)
    token = torch.searchsorted(total, u[:, None] * total[:, -1:], right=True)[:, 0]
    last = total.shape[-1] - 1 - probability.flip(-1).gt(0).to(torch.uint8).argmax(-1)
    return token.minimum(last)  # rounding must not reach a token of probability 0


# --- the cache ------------------------------------------------------------------------------------


class Slot(NamedTuple):
    """One layer's room in the cache, where T more tokens come to stand."""

    keys: Tensor  # B K capacity D
    values: Tensor
    place: Tensor  # T
    shown: int

    def places(self, T: int) -> tuple[Tensor, int]:
        """Where the tokens come to stand, and how many keys they see."""
        return self.place, self.shown

    def append(self, k: Tensor, v: Tensor) -> KeyValue:
        """Write k and v (B K T D); what layers look at: these and all before them."""
        for room, new in ((self.keys, k), (self.values, v)):
            room.index_copy_(2, self.place, new)
        return KeyValue(self.keys[:, :, : self.shown], self.values[:, :, : self.shown])


class Cache:
    """Room for the keys and values of `capacity` tokens, or for a Performer's sums.

    On a GPU layers always see all of it, and the mask hides what is not yet written (which costs
    nothing: the kernels skip it). No shape then depends on how long the text already is, and the
    step for one token can be recorded.
    """

    def __init__(self, model: Transformer, B: int, capacity: int):
        c, like = model.config, model.embedding
        self.sums, self.capacity, self.whole = c.attention == "performer", capacity, like.is_cuda
        shape = (2, B, c.kv_heads_or_heads, capacity, c.head_dim)
        dtype = like.dtype
        if self.sums:
            shape = (B, c.kv_heads_or_heads, c.features, c.head_dim + 2)
            dtype = torch.promote_types(dtype, torch.float32)
        check_memory(c.layers * prod(shape) * dtype.itemsize, like.device)
        self.buffer = torch.zeros((c.layers, *shape), dtype=dtype, device=like.device)

    def past(self, place: Tensor) -> list[Slot | Running]:
        """For each layer the past of tokens that come to stand at place (T), in order."""
        shown = self.capacity if self.whole else int(place[-1]) + 1
        if self.sums:
            return [Running(state, place, shown) for state in self.buffer]
        return [Slot(k, v, place, shown) for k, v in self.buffer]


class Source(NamedTuple):
    """What an encoder has read, for the decoder's layers to look at."""

    memory: list[KeyValue]
    last: Tensor  # (B 1), the last place of each text; behind it is nothing

    def mask(self, T: int) -> Mask:
        """T tokens of each sample see the whole of its text."""
        last = self.last.expand(-1, T)
        return Mask(torch.zeros_like(last), last)


@torch.no_grad()
def read_source(model: Transformer, texts: list[list[int]]) -> Source:
    """Texts of one token or more through the encoder, filled up on the right."""
    S, device = max(map(len, texts)), model.embedding.device
    if model.config.context < S:
        raise UserError(
            f"the prompt has {S} tokens, more than the model's context of {model.config.context}: "
            "shorten it"
        )
    ids = torch.tensor([text + [0] * (S - len(text)) for text in texts], device=device)
    last = torch.tensor([[len(text) - 1] for text in texts], device=device)
    return Source(model.encode(ids, Source([], last).mask(S)), last)


@torch.no_grad()
def next_logits(
    model: Transformer, cache: Cache, ids: Tensor, place: Tensor, pads: Tensor,
    source: Source | None = None, whole: bool = False,
) -> Tensor:  # fmt: skip
    """Logits (B V) after ids (B T), which come to stand at place (T) in the cache.

    Rows are filled on the left: one with n pads, pads (B), has its first real token at position 0
    and never sees the pads. whole: these ids all see each other.
    """
    T, hi = ids.shape[1], place[-1:] if whole else place
    mask = Mask(pads[:, None].expand(-1, T), hi.expand(len(ids), T))
    positions = (place - pads[:, None]).clamp(min=0)
    looked_at = {} if source is None else {"memory": source.memory, "cross_mask": source.mask(T)}
    hidden, _ = model.extend(ids, cache.past(place), positions, mask, **looked_at)
    return model.logits(hidden[:, -1])


# --- writing --------------------------------------------------------------------------------------


def recorded(step: Callable[[], Tensor], cache: Cache) -> Callable[[], Tensor]:
    """The same step as a CUDA graph: Python and the launches of its kernels are paid for once.

    All that it reads and writes stays where it is in memory, its result too.
    """
    before = cache.buffer.clone() if cache.sums else None
    step()  # compiles and tunes the kernels, which cannot be done while recording
    if cache.sums:  # or they would hold its token twice
        cache.buffer.copy_(before)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def choose(logits: Tensor, how: Sampling, u: Tensor) -> Tensor:
    """One token for each row of logits (B V) by u (B); in float64, which not every device has."""
    logits = logits if logits.is_cuda else logits.cpu()
    return draw(distribution(logits, how), u.to(logits.device))


def tokens_on_device(
    model: Transformer,
    prompts: list[list[int]],
    tokens: int,
    how: Sampling,
    seed: int,
    never: Sequence[int] = (),
    sources: list[list[int]] | None = None,
    whole: bool = False,
    numbers: Sequence[int] = (),
    look: Callable[[Tensor, Tensor], None] | None = None,
) -> Iterator[Tensor]:
    """The next token of each prompt (B), `tokens` times: nothing here waits for a GPU.

    numbers: of whose streams they are drawn, default 0, 1, …; `look` is shown the logits (B V) and
    the token (B) of each step.
    """
    longest, device = max(map(len, prompts)), model.embedding.device
    pads = torch.tensor([longest - len(p) for p in prompts], device=device)
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
    place = torch.arange(longest, device=device)
    streams = [generator(seed, "sample", i) for i in numbers or range(len(prompts))]
    drawn = [torch.rand(tokens, dtype=torch.float64, generator=s) for s in streams]
    u = torch.stack(drawn, 1).to("cuda" if ids.is_cuda else "cpu")  # T B
    cache = Cache(model, len(prompts), longest + tokens - 1)
    source = read_source(model, sources) if sources else None
    unknown = torch.tensor(never, dtype=torch.long, device=device)

    def step() -> Tensor:
        logits = next_logits(model, cache, ids, place, pads, source, whole)
        return logits.index_fill(-1, unknown, -torch.inf) if never else logits

    logits = step()
    ids, place = ids[:, -1:].clone(), place[-1:].clone()
    for i in range(tokens):
        token = choose(logits, how, u[i])
        if look:
            look(logits, token)
        yield token
        if i == tokens - 1:
            return
        ids.copy_(token[:, None])
        place += 1
        if i == 0 and ids.is_cuda:
            step = recorded(step, cache)
        logits = step()


def read(tokens: Iterator[Tensor]) -> Iterator[list[int]]:
    """The tokens as numbers; a GPU is already at work on the next ones while these are read."""
    last = None
    for token in tokens:
        if not token.is_cuda:
            yield token.tolist()
            continue
        token, copied = token.to("cpu", non_blocking=True), torch.cuda.Event()
        copied.record()
        if last:
            last[1].synchronize()
            yield last[0].tolist()
        last = token, copied
    if last:
        last[1].synchronize()
        yield last[0].tolist()


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: list[list[int]],
    tokens: int,
    how: Sampling,
    stop: set[int],
    seed: int,
    never: Sequence[int] = (),
    sources: list[list[int]] | None = None,
    whole: bool = False,
) -> Iterator[list[int | None]]:
    """Continue each prompt by at most `tokens` tokens; yields one a prompt, None where it ended.

    A sample ends at a stop token, which is yielded too; all end when the longest prompt and its
    text have filled the context. Sample i draws from its own stream of randomness, whatever stands
    beside it. No token of `never` is drawn. sources: what the encoder of an encdec reads for each;
    whole: the tokens of a prompt see each other, as in a prefix LM.
    """
    longest, room = max(map(len, prompts)), model.config.context
    if min(map(len, prompts)) == 0:
        raise UserError("a prompt must have at least one token, such as the end of text")
    if longest > room:
        raise UserError(
            f"the prompt has {longest} tokens, more than the model's context of {room}: shorten it"
        )
    tokens = min(tokens, room - longest + 1)
    done = [False] * len(prompts)
    for chosen in read(tokens_on_device(model, prompts, tokens, how, seed, never, sources, whole)):
        yield [None if ended else t for ended, t in zip(done, chosen, strict=True)]
        done = [ended or t in stop for ended, t in zip(done, chosen, strict=True)]
        if all(done):
            return


# --- the script -----------------------------------------------------------------------------------


MOST = 1 << 20  # samples or tokens


@dataclass(frozen=True)
class Generate(Sampling):
    """Write text with a trained model."""

    # a run's name or folder; empty: the newest (a small one is trained if there is none)
    run: str = ""
    model: str = ""  # instead of a run: the folder of a model in Hugging Face's layout
    adapter: str = ""  # beside it: the folder of an adapter in PEFT's layout
    prompt: str = ""  # what the text begins with, or answers; empty: the beginning of a document
    special: bool = False  # special tokens in the prompt, such as <extra_id_0>, are not its letters
    samples: int = 3  # texts written at once
    tokens: int = 200  # longest text, in tokens
    stop: tuple[str, ...] = ()  # further texts, each one token, that end a sample
    chat: bool = False  # talk with a model that was tuned on conversations
    system: str = ""  # what it is told before the conversation
    seed: int = 0  # of the choices
    device: str = "auto"  # auto, cpu, cuda or mps
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # what the model computes in
    bench: Literal["", "tiny", "gpt2"] = ""  # time a model of this shape, with random weights

    def __post_init__(self):
        super().__post_init__()
        if min(self.samples, self.tokens) < 1 or max(self.samples, self.tokens) > MOST:
            raise UserError(f"--samples and --tokens must be at least 1, at most {MOST:,}")
        if self.run and self.model:
            raise UserError("--run and --model are two models: give one of them")


def encoded(tokenizer: Tokenizer, flag: str, text: str, special: str = "text") -> list[int]:
    try:
        return tokenizer.encode(text, special)
    except ValueError as error:
        raise UserError(f"{flag} cannot become tokens: {error}") from None


def stop_tokens(tokenizer: Tokenizer, texts: tuple[str, ...]) -> set[int]:
    stop = set()
    for text in texts:
        ids = encoded(tokenizer, "--stop", text, special="ids")
        if len(ids) != 1:
            raise UserError(f"--stop {text!r} is {len(ids)} tokens; it must be one")
        stop.update(ids)
    return stop


def continued(tokenizer: Tokenizer, prompt: list[int], ids: Iterable[int]) -> Iterator[str]:
    """The text of ids behind a prompt: there a piece may go on with a word, or begin with a blank.

    Of what is decoded the prompt goes, in whose place stands what its user wrote.
    """
    known = len(tokenizer.decode(prompt))
    for text in tokenizer.decode_stream(chain(prompt, ids)):
        yield text[known:]
        known = max(0, known - len(text))


def write(writer: Writer, config: Generate) -> None:
    """Print the samples: a single one while it is written, several when all are."""
    model, tokenizer, arch = writer.model, writer.tokenizer, writer.model.config.arch
    special = "ids" if config.special or arch == "encoder" else "text"
    prompt = encoded(tokenizer, "--prompt", config.prompt, special)
    start = [*writer.begin, *prompt, *(writer.close if arch != "decoder" else [])]
    if not start:
        raise UserError("--prompt must not be empty: this model has no token that begins a text")
    if arch == "encoder":
        return print(filled(writer, start))
    stop = writer.stop | stop_tokens(tokenizer, config.stop)
    sources = None
    shown = config.prompt
    if arch == "encdec":
        sources, start, prompt, shown = [start] * config.samples, [*writer.answer], [], ""
    steps = generate(
        model, [start] * config.samples, config.tokens, config, stop, config.seed,
        unknown(writer), sources, writer.whole,
    )  # fmt: skip
    if config.samples == 1:
        ids = (token for (token,) in steps if token is not None and token not in stop)
        print(shown, end="", flush=True)
        for text in continued(tokenizer, prompt, ids):
            print(text, end="", flush=True)
        print()
        return
    steps = list(tqdm(steps, "writing", config.tokens, leave=False, disable=None))
    for number, column in enumerate(zip(*steps, strict=True), 1):
        ids = [token for token in column if token is not None and token not in stop]
        text = "".join(continued(tokenizer, prompt, ids))
        print(f"--- {number} ---\n{shown}{text}\n")


# --- talking --------------------------------------------------------------------------------------

HELP = (
    "/undo takes the last question back, /new begins anew, /system TEXT tells the model something; "
    "Ctrl-C stops an answer, Ctrl-D ends"
)


def talk(writer: Writer, config: Generate) -> None:
    """A conversation in the terminal, until its user ends it."""
    if not chat.knows_roles(writer.tokenizer):
        raise UserError(
            "this model knows no roles, so that it cannot talk: tune one with python align.py sft"
        )
    print(HELP)
    system, turns = config.system, []
    while (line := asked()) is not None:
        command, _, text = line.partition(" ")
        if command == "/undo":
            turns = turns[:-2]
            print(f"({len(turns) // 2} questions are left)")
        elif command in ("/new", "/system"):
            turns, system = [], text if command == "/system" else system
            print("(a new conversation)")
        elif line.startswith("/"):
            print(HELP)
        elif line.strip():
            turns.append(chat.Turn("user", line))
            start = [chat.Turn("system", system)] if system else []
            turns.append(chat.Turn("assistant", answered(writer, config, start, turns)))


def asked() -> str | None:
    """A line of the user's, or None at the end."""
    try:
        return input("\nyou  ")
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def answered(writer: Writer, config: Generate, start: list, turns: list) -> str:
    """Print an answer while it is written; what was said if Ctrl-C stops it.

    Of a conversation longer than the context the oldest turns are forgotten.
    """
    context, kept = writer.model.config.context, list(turns)
    room = context - min(config.tokens, context // 2)

    def prompt() -> list[int]:
        return [*writer.begin, *chat.written(writer.tokenizer, [*start, *kept], answer=True)]

    while len(prompt()) > room and len(kept) > 2:
        kept = kept[2:]
    if len(kept) < len(turns):
        print(f"(of {len(turns) // 2} questions before, {len(kept) // 2} are remembered)")
    said: list[str] = []
    print("  →  ", end="", flush=True)
    try:
        steps = generate(writer.model, [prompt()], config.tokens, config, writer.stop,
                         config.seed + len(turns), unknown(writer))  # fmt: skip
        ids = (token for (token,) in steps if token is not None and token not in writer.stop)
        for text in writer.tokenizer.decode_stream(ids):
            said.append(text)
            print(text, end="", flush=True)
    except KeyboardInterrupt:
        print(" (stopped)", end="")
    except UserError as error:
        print(f"({error})", end="")
    print()
    return "".join(said) or "…"


# --- filling in -----------------------------------------------------------------------------------

MASKS = (MASK, "[MASK]")  # ours, and BERT's


@torch.no_grad()
def filled(writer: Writer, ids: list[int], most: int = 5) -> str:
    """The text with the likeliest token at each mask, and below the likeliest few of each."""
    tokenizer, model = writer.tokenizer, writer.model
    masks = {tokenizer.special[text] for text in MASKS if text in tokenizer.special}
    asked = [t for t, id in enumerate(ids) if id in masks]
    if not asked:
        raise UserError(
            f"an encoder fills in what is masked: give a --prompt with {' or '.join(MASKS)} in it"
        )
    if len(ids) > model.config.context:
        raise UserError(f"the prompt has {len(ids)} tokens, more than the model's context")
    hidden = model(torch.tensor([ids], device=model.embedding.device))[0, asked]
    scores = writer.head(hidden).index_fill(-1, hidden.new_tensor(unknown(writer)).long(), -inf)
    p, best = scores.softmax(-1).sort(-1, descending=True)
    guesses = [
        ", ".join(f"{tokenizer.decode([id])!r} {x:.0%}" for id, x in zip(*row, strict=True))
        for row in zip(best[:, :most].tolist(), p[:, :most].tolist(), strict=True)
    ]
    text = list(ids)
    for t, id in zip(asked, best[:, 0].tolist(), strict=True):
        text[t] = id
    inner = text[len(writer.begin) : len(text) - len(writer.close)]
    return "\n".join([tokenizer.decode(inner), "", *guesses])


ROUNDS, PROMPT = 5, 32


def bench(config: Generate, device: torch.device, dtype: torch.dtype) -> None:
    """Print how long the prompt takes, and how many tokens a second follow; medians of rounds."""
    shape = PRESETS[config.bench]
    model = Transformer(replace(shape, vocab_size=shape.vocab_size or 4096)).to(device)
    cast(model, dtype)
    prompts = [[0] * PROMPT] * config.samples
    if config.tokens < 3:
        raise UserError("--bench needs --tokens 3 or more")
    prompt, rest = [], []
    for turn in tqdm(range(ROUNDS + 1), "measuring", leave=False, disable=None):
        times = [time.perf_counter()]
        for _ in generate(model, prompts, config.tokens, config, set(), config.seed):
            times.append(time.perf_counter())
        if turn:  # the first round compiles and tunes
            prompt.append(times[1] - times[0])
            rest.append((times[-1] - times[2]) / (len(times) - 3))  # the second records the step
    each = median(rest)
    print(
        f"{config.bench}, {count_parameters(model) / 1e6:.1f} M parameters, "
        f"{str(dtype).removeprefix('torch.')} on {device}, {config.samples} at once: "
        f"prompt of {PROMPT} tokens {1e3 * median(prompt):.1f} ms, "
        f"then {1e3 * each:.3f} ms a step, {config.samples / each:,.0f} tokens/s"
    )


def script() -> None:
    config = tyro.cli(Generate, description=__doc__)
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    if config.bench:
        return bench(config, device, dtype)
    if not config.run and not config.model:
        first_run()
    writer = writer_of(config.run, config.model, device, config.adapter)
    cast(writer.model, dtype)
    talk(writer, config) if config.chat else write(writer, config)


if __name__ == "__main__":
    main(script)
