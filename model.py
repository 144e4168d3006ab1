"""The transformer, plain: it knows no ranks, no adapters, no quantization.

Idea: a stream of one vector per token runs through L blocks. Each block reads the stream twice,
once to let tokens look at each other (attention) and once to think about each token alone
(feed-forward), and adds what it finds. A last matrix turns the stream into a score for every
possible next token.

    decoder    each token sees those before it                                    GPT, Llama
    encoder    each token sees all                                                BERT
    encdec     an encoder reads one text; a decoder, which looks at it too        T5
               (cross attention), writes another

Variants are entries of tables: NORMS, ORDERS and ACTIVATIONS here, POSITIONS in positions.py and
ATTENTIONS in attention.py. The head stands apart from the stream, so that a fused loss, a reward or
a value head attach from outside: `model(ids)` gives hidden states, `model.head_weight` the matrix,
`model.logits` their product. `Transformer.load` and `save` read and write the folders of Hugging
Face's GPT-2, Llama, Mistral, Qwen3 (where its norms of queries and keys are all ones), BERT, T5 and
BLOOM, as model_files.py has it. No other script is as long: a whole forward pass is in one piece.

Run: python model.py                      every preset: its shape and its parameters, counted

Papers: Vaswani et al. 2017 (arXiv 1706.03762); Radford et al. 2019, GPT-2; Touvron et al. 2023,
Llama (arXiv 2302.13971); Zhang and Sennrich 2019, RMSNorm (arXiv 1910.07467); Ba et al. 2016,
LayerNorm (arXiv 1607.06450); Shazeer 2020, gated units (arXiv 2002.05202); Press and Wolf 2017,
tied head (arXiv 1608.05859); Devlin et al. 2019, BERT (arXiv 1810.04805); Raffel et al. 2020, T5
(arXiv 1910.10683); Xiong et al. 2020, pre- and post-norm (arXiv 2002.04745); Wang et al. 2022,
DeepNorm (arXiv 2203.00555).

Letters: B batch · T tokens · C model width · F feed-forward width · V vocabulary · L layers.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from math import gcd, inf
from pathlib import Path
from reprlib import repr as short
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention import ATTENTIONS, Attention, KeyValue, Linear, Mask, causal_mask, full_mask
from dropout import Drop
from kernels.elementwise import gelu, gelu_tanh, swiglu
from kernels.norm import add_layernorm, add_rmsnorm, layernorm, rmsnorm
from model_files import Weights, read_folder, write_folder
from optim import TABLES, learnt
from pictures import table
from positions import POSITIONS, Rotation
from presets import PUBLISHED
from run import UserError, generator, main, settings, value_of

# --- settings -------------------------------------------------------------------------------------

LARGEST = 1 << 28  # of any whole number here: a matrix with such sides has its bytes in 64 bits
ADDED_TO_SCORES = ("relative", "t5", "alibi")


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a transformer."""

    preset: Literal[("tiny", *PUBLISHED)] = "tiny"  # a named shape, which other settings change
    # who reads and who writes: as GPT, as BERT, or as T5, which has both
    arch: Literal["decoder", "encoder", "encdec"] = "decoder"
    dim: int = 128  # width of the stream
    layers: int = 4  # blocks (encdec: of the encoder, and as many of the decoder)
    heads: int = 4  # query heads
    kv_heads: int = 0  # key-value heads, shared by heads / kv_heads queries; 0: as many as heads
    head_width: int = 0  # channels of a head; 0: dim / heads
    context: int = 256  # tokens in one row of a batch
    vocab_size: int = 0  # tokens known; 0: as many as the tokenizer has
    ffn_dim: int = 0  # feed-forward width; 0: 8/3 of dim for gated activations, else 4 of dim
    # how a token knows its place
    position: Literal["rope", "learned", "sinusoidal", "relative", "t5", "alibi", "none"] = "rope"
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"  # what keeps the stream's scale
    order: Literal["pre", "post", "deepnorm"] = "pre"  # where it stands in a block
    # the feed-forward's bend; with "glu" gated
    activation: Literal[
        "relu", "gelu", "gelu_tanh", "silu", "reglu", "geglu", "geglu_tanh", "swiglu"
    ] = "swiglu"
    # who looks at whom
    attention: Literal[
        "full", "sliding", "strided", "fixed", "longformer", "bigbird", "performer"
    ] = "full"
    window: int = 128  # sliding: tokens that one sees on a side, itself counted; others: at least
    block: int = 64  # strided, fixed, longformer, bigbird: tokens that are seen together or not
    global_blocks: int = 1  # fixed: summaries of a span; longformer, bigbird: seen by all
    random_blocks: int = 2  # bigbird: that each block draws
    features: int = 256  # performer: random features of a key
    bias: bool = False  # biases in linears and norms
    tied: bool = True  # the head is the embedding
    scaled_head: bool = False  # what a head sees is divided by √dim (T5, where it is tied)
    qk_norm: bool = True  # queries and keys of mean square 1, without learnt weights
    score_scale: float = 0.0  # of the scores; 0: 1/√head width (T5: 1)
    embed_norm: bool = False  # a norm behind the embeddings (BERT, BLOOM)
    segments: int = 0  # kinds of text in a row, each with an embedding (BERT: 2)
    buckets: int = 32  # t5: of distances, of which each has a bias
    reach: int = 128  # t5, relative: the distance from which on all is alike
    rope_base: float = 10_000.0  # RoPE's slowest angle turns once in 2π·base^(1−2/D) positions
    rope_interleaved: bool = False  # RoPE turns neighbouring channels, not those D/2 apart
    rope_scaling: Literal["none", "linear", "ntk", "llama3"] = "none"  # how RoPE reaches further
    rope_factor: float = 8.0  # linear, ntk, llama3: slow angles are divided by it
    rope_context: int = 8192  # llama3: the tokens of a text before, in which an angle has turned
    rope_low: float = 1.0  # llama3: fewer times than this, so that it is divided
    rope_high: float = 4.0  # llama3: more often than this, so that it stays
    norm_eps: float = 1e-5  # added to the variance
    dropout: float = 0.0  # share of each branch's numbers that training forgets

    def __post_init__(self):
        if min(self.dim, self.layers, self.heads, self.context, self.rope_context) < 1:
            raise UserError(
                "--model.dim, layers, heads, context and rope-context must each be at least 1"
            )
        for name, value in vars(self).items():
            end = 1 if name == "dropout" else LARGEST if isinstance(value, int) else inf
            if not isinstance(value, str) and not 0 <= value < end:
                flag = name.replace("_", "-")
                raise UserError(f"--model.{flag} {short(value)} must be 0 or more, below {end:,}")
        if self.dim % self.heads and not self.head_width:
            raise UserError(
                f"--model.dim {self.dim} is not divisible by --model.heads {self.heads}: "
                f"choose heads that divide it, such as {gcd(self.dim, self.heads)}"
            )
        if self.kv_heads and self.heads % self.kv_heads:
            raise UserError(
                f"--model.heads {self.heads} is not divisible by --model.kv-heads {self.kv_heads}"
            )
        if self.position == "rope" and self.head_dim % 2:
            made = f"--model.dim {self.dim} / --model.heads {self.heads} = {self.head_dim}"
            width = f"--model.head-width {self.head_width}" if self.head_width else made
            raise UserError(f"RoPE turns pairs of channels, so {width} must be even")
        if min(self.window, self.features) < 1 or min(self.global_blocks, self.random_blocks) < 0:
            raise UserError(
                "--model.window and --model.features must be at least 1, --model.global-blocks "
                "and --model.random-blocks at least 0"
            )
        if self.block < 16 or self.block & (self.block - 1):
            raise UserError(f"--model.block {self.block} must be a power of 2, at least 16")
        if self.attention == "performer" and self.position in ADDED_TO_SCORES:
            raise UserError(
                f"--model.attention performer computes no scores to which --model.position "
                f"{self.position} could add something: choose rope, sinusoidal, learned or none"
            )
        if self.position == "t5" and not 4 <= self.buckets <= self.reach:
            raise UserError(
                "--model.position t5 needs --model.buckets of 4 or more, and a reach no smaller"
            )
        if min(self.rope_base, self.rope_factor) < 1 or self.rope_low >= self.rope_high:
            raise UserError(
                "--model.rope-base and rope-factor must be at least 1, and rope-low below rope-high"
            )

    @property
    def head_dim(self) -> int:
        return self.head_width or self.dim // self.heads

    @property
    def kv_heads_or_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def ffn_width(self) -> int:
        """F. Gated units have three matrices, not two: 8/3 C keeps 8 C² weights (Shazeer 2020)."""
        if self.ffn_dim:
            return self.ffn_dim
        return -(-8 * self.dim // 24) * 8 if ACTIVATIONS[self.activation].gated else 4 * self.dim


PRESETS = {"tiny": ModelConfig()} | {
    name: ModelConfig(name, **published.settings) for name, published in PUBLISHED.items()
}


def preset_in(arguments: list[str], default: ModelConfig) -> ModelConfig:
    """The preset that a command line names, before its other flags change it; or the default."""
    return PRESETS.get(value_of("--model.preset", arguments), default)


# --- parts ----------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """x / √(mean(x²) + ε) · w  (Zhang and Sennrich 2019, eq. 4), statistics in fp32."""

    def __init__(self, dim: int, eps: float, bias: bool):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rmsnorm(x, self.weight, self.eps)

    def add(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        """x + branch, and its norm."""
        return add_rmsnorm(x, branch, self.weight, self.eps)


class LayerNorm(nn.Module):
    """(x − mean(x)) / √(var(x) + ε) · w + b  (Ba et al. 2016, eq. 4), statistics in fp32."""

    def __init__(self, dim: int, eps: float, bias: bool):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return layernorm(x, self.weight, self.bias, self.eps)

    def add(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        """x + branch, and its norm."""
        return add_layernorm(x, branch, self.weight, self.bias, self.eps)


NORMS = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}


class Activation(NamedTuple):
    """bend(up, gate) for gated kinds, bend(up) otherwise."""

    bend: Callable[..., Tensor]
    gated: bool


def gated(bend: Callable[[Tensor], Tensor]) -> Activation:
    """bend(gate) ∘ up  (Shazeer 2020, eq. 5 and 6)."""
    return Activation(lambda up, gate: bend(gate) * up, gated=True)


ACTIVATIONS = {
    "relu": Activation(F.relu, gated=False),
    "gelu": Activation(gelu, gated=False),
    "gelu_tanh": Activation(gelu_tanh, gated=False),
    "silu": Activation(F.silu, gated=False),
    "reglu": gated(F.relu),
    "geglu": gated(gelu),
    "geglu_tanh": gated(gelu_tanh),
    "swiglu": Activation(swiglu, gated=True),  # silu(gate) ∘ up, fused
}


class FeedForward(nn.Module):
    """W_down · bend(W_up x); SwiGLU: W_down · (silu(W_gate x) ∘ W_up x) (Shazeer 2020, eq. 6)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        C, F_ = config.dim, config.ffn_width
        self.bend, gated = ACTIVATIONS[config.activation]
        self.up = Linear(C, F_, config.bias)
        self.gate = Linear(C, F_, config.bias) if gated else None
        self.down = Linear(F_, C, config.bias)

    def forward(self, x: Tensor) -> Tensor:
        ups = (self.up(x),) if self.gate is None else (self.up(x), self.gate(x))
        return self.down(self.bend(*ups))


# --- blocks ---------------------------------------------------------------------------------------

Branch = Callable[[Tensor], Tensor]


def pre(x: Tensor, norms: list[nn.Module], branches: list[Branch], alpha: float) -> Tensor:
    """x ← x + f(norm(x)) for each branch f: the stream itself is never normed (GPT-2)."""
    h = norms[0](x)
    for norm, branch in zip(norms[1:], branches, strict=False):
        x, h = norm.add(x, branch(h))
    return x + branches[-1](h)


def post(x: Tensor, norms: list[nn.Module], branches: list[Branch], alpha: float) -> Tensor:
    """x ← norm(α x + f(x)) for each branch f: α is 1 (Vaswani et al. 2017), or DeepNorm's."""
    for norm, branch in zip(norms, branches, strict=True):
        _, x = norm.add(alpha * x, branch(x))
    return x


ORDERS = {"pre": pre, "post": post, "deepnorm": post}


class Depth(NamedTuple):
    """DeepNorm's weight of the stream, and of the matrices drawn for values and feed-forward."""

    alpha: float = 1.0
    beta: float = 1.0


def deepnorm(config: ModelConfig, encoder: bool) -> Depth:
    """α and β (Wang et al. 2022, figure 2b) for N blocks of an encoder, M of a decoder:

    encoder alone (2N)^¼, (8N)^−¼ · decoder alone (2M)^¼, (8M)^−¼ · both: the encoder
    0.81 (N⁴M)^1/16, 0.87 (N⁴M)^−1/16, the decoder (3M)^¼, (12M)^−¼. All are 1 in other orders.
    """
    if config.order != "deepnorm":
        return Depth()
    n = config.layers
    if config.arch != "encdec":
        return Depth((2 * n) ** 0.25, (8 * n) ** -0.25)
    if encoder:
        return Depth(0.81 * (n**5) ** (1 / 16), 0.87 * (n**5) ** (-1 / 16))
    return Depth((3 * n) ** 0.25, (12 * n) ** -0.25)


class Block(nn.Module):
    """Attention, in a decoder that has an encoder also cross attention, and feed-forward."""

    def __init__(self, config: ModelConfig, encoder: bool, number: int):
        """number: of this block in its whole stack, whoever holds which part of it."""
        super().__init__()
        self.place = 8 * number + 4 * encoder  # of its branches, for dropout

        def norm() -> nn.Module:
            return NORMS[config.norm](config.dim, config.norm_eps, config.bias)

        self.order, self.alpha = ORDERS[config.order], deepnorm(config, encoder).alpha
        self.attention_norm, self.attention = norm(), Attention(config)
        crossed = config.arch == "encdec" and not encoder
        self.cross_norm = norm() if crossed else None
        self.cross = Attention(config, cross=True) if crossed else None
        self.ffn_norm, self.ffn = norm(), FeedForward(config)

    def forward(
        self, x: Tensor, mask: Mask, rotation: Rotation | None = None,
        past: KeyValue | None = None, memory: KeyValue | None = None,
        cross_mask: Mask | None = None, drop: Drop | None = None,
    ) -> tuple[Tensor, KeyValue]:  # fmt: skip
        """x (B T C) to x (B T C), and this block's new keys and values."""
        new = []

        def look(h: Tensor) -> Tensor:
            out, kv = self.attention(h, mask, rotation, past)
            new.append(kv)
            return out

        norms, branches = [self.attention_norm], [look]
        if self.cross is not None:
            norms.append(self.cross_norm)
            branches.append(lambda h: self.cross.look_at(h, memory, cross_mask))
        branches.append(self.ffn)
        if drop is not None:
            branches = [drop.behind(f, self.place + n) for n, f in enumerate(branches)]
        return self.order(x, [*norms, self.ffn_norm], branches, self.alpha), new[0]


class Stack(nn.Module):
    """Blocks, with what tells their tokens where they are; in the pre-norm order a last norm."""

    def __init__(self, config: ModelConfig, encoder: bool):
        super().__init__()
        self.config = config
        self.position = POSITIONS[config.position](config, not encoder)
        self.layers = nn.ModuleList(Block(config, encoder, i) for i in range(config.layers))
        norm = NORMS[config.norm]
        self.embed_norm = norm(config.dim, config.norm_eps, True) if config.embed_norm else None
        last = config.order == "pre"
        self.norm = norm(config.dim, config.norm_eps, config.bias) if last else None
        # For adapters: what stands before every text, and what dropout is drawn from, and where.
        self.before: nn.Module | None = None
        self.told: list[Tensor] | None = None

    def through(
        self, x: Tensor, positions: Tensor, mask: Mask, *rest: object, draws: Tensor | None = None
    ) -> tuple[Tensor, list[KeyValue]]:
        """Embeddings x (B T C) to hidden states, and new keys and values, as `blocks` has it."""
        x, new = self.blocks(self.enter(x, positions), positions, mask, *rest, draws=draws)
        return self.leave(x), new

    def enter(self, x: Tensor, positions: Tensor) -> Tensor:
        """Embeddings x (B T C) to what the first block reads."""
        if self.before is not None:
            x, positions = self.before.enter(self, x, positions)
        x = self.position.embed(x, positions)
        return x if self.embed_norm is None else self.embed_norm(x)

    def blocks(
        self, x: Tensor, positions: Tensor, mask: Mask, past: list[KeyValue] | None = None,
        memory: list[KeyValue] | None = None, cross_mask: Mask | None = None,
        draws: Tensor | None = None,
    ) -> tuple[Tensor, list[KeyValue]]:  # fmt: skip
        """The stream x (B T C) through all blocks, and each one's new keys and values."""
        T = positions.shape[1]
        at, S = past[0].places(T) if past else (torch.arange(T, device=x.device), T)
        mask = ATTENTIONS[self.config.attention].narrow(replace(mask, at=at[None]), S, self.config)
        if self.before is None:
            mask, rotation = self.position.scored(mask, S), self.position.rotation(positions)
        else:
            mask, rotation = self.before.seen(self.position, positions, mask, S, x.dtype)
            cross_mask = self.before.crossed(cross_mask)
        drop, new = self.drop(draws, at), []
        if self.told is not None:
            self.told[:] = [] if draws is None else [draws, at]
        for i, layer in enumerate(self.layers):
            parts = (some[i] if some else None for some in (past, memory))
            x, kv = layer(x, mask, rotation, *parts, cross_mask, drop)
            new.append(kv)
        return x, new

    def drop(self, draws: Tensor | None, at: Tensor) -> Drop | None:
        """What the blocks drop of tokens at these places, if anything."""
        p = self.config.dropout
        return Drop(p, draws, at) if p and draws is not None else None

    def leave(self, x: Tensor) -> Tensor:
        """What the last block wrote, to hidden states."""
        x = x if self.before is None else self.before.leave(x)
        return x if self.norm is None else self.norm(x)


# --- the model ------------------------------------------------------------------------------------


class Transformer(Stack):
    """Token ids in, hidden states out. Its own blocks decode, but in an encoder encode."""

    def __init__(self, config: ModelConfig, seed: int | None = 0):
        """Weights are drawn by the seed, or left as memory was if there is none."""
        super().__init__(config, encoder=config.arch == "encoder")
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.dim))
        self.segment = (
            nn.Parameter(torch.empty(config.segments, config.dim)) if config.segments else None
        )
        self.encoder = Stack(config, encoder=True) if config.arch == "encdec" else None
        self.head = (
            None if config.tied else nn.Parameter(torch.empty(config.vocab_size, config.dim))
        )
        if seed is not None:
            initialize(self, seed)

    @classmethod
    def load(cls, folder: str | Path) -> "Transformer":
        """The model of a Hugging Face folder, in fp32; UserError where families.py knows none."""
        values, weights = read_folder(Path(folder))
        return assembled(settings(ModelConfig, values, f"{folder}/config.json"), weights)

    def save(
        self, folder: str | Path, end: int | list[int] | None = None,
        shard_bytes: int = 5_000_000_000, heads: nn.Module | None = None, begin: int | None = None,
    ) -> str:  # fmt: skip
        """Write such a folder, and say of which class of transformers' it is.

        A text begins with the token `begin` and ends with `end`, one or several. The heads that
        stand beside a model, as heads.py loads them, are written with it.
        """
        c = self.config
        values = asdict(c) | {"kv_heads": c.kv_heads_or_heads, "ffn_dim": c.ffn_width}
        beside = heads.state_dict() if heads is not None else {}
        tensors = self.state_dict() | beside
        return write_folder(Path(folder), values, tensors, end, shard_bytes, begin)

    @property
    def head_weight(self) -> Tensor:
        """The matrix (V C) that turns hidden states into logits."""
        return self.embedding if self.head is None else self.head

    def embed(self, ids: Tensor, segments: Tensor | None, dtype: torch.dtype | None) -> Tensor:
        """ids and segments (B T), 0 if there are none, to the stream's beginning (B T C)."""
        x = F.embedding(ids, self.embedding)
        if self.segment is not None:
            x = x + self.segment[torch.zeros_like(ids) if segments is None else segments]
        return x.to(dtype or self.embedding.dtype)

    def encode(
        self, ids: Tensor, mask: Mask | None = None, dtype: torch.dtype | None = None,
        draws: Tensor | None = None,
    ) -> list[KeyValue]:  # fmt: skip
        """Of an encdec: what each decoder layer looks at, made of ids (B S); no mask shows all."""
        S = ids.shape[1]
        positions = torch.arange(S, device=ids.device)[None]
        mask = mask or full_mask(S, S, ids.device)
        x = self.embed(ids, None, dtype)
        hidden, _ = self.encoder.through(x, positions, mask, draws=draws)
        return [layer.cross.keys_and_values(hidden) for layer in self.layers]

    def forward(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        mask: Mask | None = None,
        dtype: torch.dtype | None = None,
        segments: Tensor | None = None,
        memory: list[KeyValue] | None = None,
        cross_mask: Mask | None = None,
        draws: Tensor | None = None,
    ) -> Tensor:
        """ids (B T) to hidden states (B T C), computed in dtype (default: that of the weights).

        positions (B T) default to 0 … T−1, the mask to causal, in an encoder to all. An encdec
        needs the memory that `encode` makes, all of which is seen unless cross_mask says otherwise.
        Nothing is dropped without draws (B 3), which say of what; see dropout.py.
        """
        rest = (mask, dtype, segments, memory, cross_mask, draws)
        return self.extend(ids, None, positions, *rest)[0]

    def extend(
        self,
        ids: Tensor,
        past: list[KeyValue] | None,
        positions: Tensor | None = None,
        mask: Mask | None = None,
        dtype: torch.dtype | None = None,
        segments: Tensor | None = None,
        memory: list[KeyValue] | None = None,
        cross_mask: Mask | None = None,
        draws: Tensor | None = None,
    ) -> tuple[Tensor, list[KeyValue]]:
        """As `forward`, for ids that follow P past tokens; and each layer's new keys and values."""
        T = ids.shape[1]
        if positions is None or mask is None:
            causal = causal_mask(T, past[0].places(0)[1] if past else 0, ids.device)
            positions = causal.hi if positions is None else positions
            whole = self.config.arch == "encoder"
            mask = mask or (full_mask(T, T, ids.device) if whole else causal)
        if memory and cross_mask is None:
            cross_mask = full_mask(T, memory[0].keys.shape[2], ids.device)
        x = self.embed(ids, segments, dtype)
        return self.through(x, positions, mask, past, memory, cross_mask, draws=draws)

    def leave(self, x: Tensor) -> Tensor:
        x = super().leave(x)
        return x * self.config.dim**-0.5 if self.config.scaled_head else x

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (… C) to scores of the next token (… V), in fp32 or wider."""
        logits = hidden @ self.head_weight.to(hidden.dtype).T
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


WRITERS = ("output.weight", "down.weight")  # write into the stream
DEEP = (*WRITERS, "value.weight", "up.weight", "gate.weight")  # what DeepNorm's β scales


def initialize(model: Transformer, seed: int) -> None:
    """Draw every weight from its own stream: none depends on which other weights exist.

    Matrices: normal with variance 1/fan_in, so that each keeps the scale of what goes through. In
    the pre-norm order the two that write into the stream (attention output, feed-forward down)
    start at zero, so that the model starts as the identity; DeepNorm multiplies some by β. Norms
    start at 1, biases at 0, and so does a head that is not the embedding: all tokens as likely.
    """
    for name, p in model.named_parameters():
        if p.dim() > 1:
            p.data.copy_(drawn(name, p.shape, model.config, seed))


def drawn(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> Tensor:
    """The matrix of this name as `initialize` has it, in fp32."""
    std = 0.02 if name.endswith(TABLES) else shape[1] ** -0.5
    if name == "head" or (config.order == "pre" and name.endswith(WRITERS)):
        std = 0.0
    if name.endswith(DEEP):
        std *= deepnorm(config, name.startswith("encoder.")).beta
    return torch.randn(shape, generator=generator(seed, f"init/{name}")) * std


# --- weights from files ---------------------------------------------------------------------------


def assembled(config: ModelConfig, weights: Weights) -> Transformer:
    """A model of weights in files: drawn by nobody, and never in memory twice.

    The number of blocks is compared first, or a config with 10⁹ of them would be built to no end.
    """
    inside = (name for name in weights.load("meta") if name.startswith("layers."))
    found = len({name.split(".")[1] for name in inside})
    if found != config.layers:
        raise UserError(
            f"{weights.files[0]} does not fit its config.json: it has {found} blocks, not "
            f"{config.layers}"
        )
    with torch.device("meta"):
        model = Transformer(config, seed=None)
    fill(model, weights)
    return model


def fill(model: nn.Module, weights: Weights) -> None:
    """Give a model the weights in files, all that are not frozen.

    UserError, before any is read, if one does not fit.
    """
    found, own = weights.load("meta"), learnt(model)
    for name in sorted(own.keys() | found.keys()):
        have, want = (tuple(d[name].shape) if name in d else None for d in (found, own))
        if have != want:
            where = f"{weights.files[0]} does not fit its config.json"
            raise UserError(f"{where}: {name} is {have}, not {want}")
    meta = next(model.parameters()).is_meta
    model.load_state_dict(weights.load(), strict=False, assign=meta)


# --- counting -------------------------------------------------------------------------------------


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def show() -> None:
    """The table of presets, each built without memory; BERT's pooler is counted, too."""
    lines = [("", "parameters", "arch", "blocks", "width", "heads", "feed-forward", "position",
              "norm", "activation", "context", "vocabulary")]  # fmt: skip
    for name, model in PUBLISHED.items():
        c = ModelConfig(**model.settings)
        with torch.device("meta"):
            N = count_parameters(Transformer(c, seed=None))
        N += model.pooler * (c.dim + 1) * c.dim
        heads = f"{c.heads}" + (f"/{c.kv_heads}" if c.kv_heads else "") + f" × {c.head_dim}"
        lines.append((name, f"{N:,}", c.arch, f"{c.layers}", f"{c.dim:,}", heads,
                      f"{c.ffn_width:,}", c.position, f"{c.order} {c.norm}", c.activation,
                      f"{c.context:,}", f"{c.vocab_size:,}"))  # fmt: skip
    print(table(*lines))


if __name__ == "__main__":
    main(show)
