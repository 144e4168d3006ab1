"""The transformer, plain: it knows no ranks, no adapters, no quantization.

Idea: a stream of one vector per token runs through L blocks. Each block reads the stream twice,
once to let tokens look at each other (attention) and once to think about each token alone
(feed-forward), and adds what it finds. A last matrix turns the stream into a score for every
possible next token.

Variants are entries of tables: NORMS and ACTIVATIONS here, POSITIONS and ATTENTIONS in
attention.py. The head stands apart from the stream, so that a fused loss, a reward or a value head
attach from outside: `model(ids)` gives hidden states, `model.head_weight` the matrix,
`model.logits` their product. `Transformer.load` and `save` read and write the folders of Hugging
Face's GPT-2 and Llama, as model_files.py has it.

Run: python -m pytest tests/test_model.py

Papers: Vaswani et al. 2017 (arXiv 1706.03762); Radford et al. 2019, GPT-2; Touvron et al. 2023,
Llama (arXiv 2302.13971); Zhang and Sennrich 2019, RMSNorm (arXiv 1910.07467); Ba et al. 2016,
LayerNorm (arXiv 1607.06450); Shazeer 2020, gated units (arXiv 2002.05202); Press and Wolf 2017,
tied head (arXiv 1608.05859).

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

from attention import POSITIONS, Attention, KeyValue, Linear, Mask, Rotation, causal_mask
from kernels.elementwise import gelu, gelu_tanh, swiglu
from kernels.norm import add_layernorm, add_rmsnorm, layernorm, rmsnorm
from model_files import Weights, read_folder, write_folder
from run import UserError, generator, settings, value_of

# --- settings -------------------------------------------------------------------------------------

LARGEST = 1 << 28  # of any whole number here: a matrix with such sides has its bytes in 64 bits


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder-only transformer."""

    preset: Literal["tiny", "gpt2"] = "tiny"  # a named shape, which the other settings then change
    dim: int = 128  # width of the stream
    layers: int = 4  # blocks
    heads: int = 4  # query heads
    kv_heads: int = (
        0  # key-value heads, each shared by heads / kv_heads queries; 0: as many as heads
    )
    context: int = 256  # tokens in one row of a batch
    vocab_size: int = 0  # tokens known; 0: as many as the tokenizer has
    ffn_dim: int = 0  # feed-forward width; 0: 8/3 of dim for gated activations, else 4 of dim
    position: Literal["rope", "learned", "none"] = "rope"  # how a token knows its place
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"  # what keeps the stream's scale
    activation: Literal["swiglu", "gelu", "gelu_tanh"] = "swiglu"  # the feed-forward's bend
    attention: Literal["full"] = "full"  # who looks at whom
    bias: bool = False  # biases in linears
    tied: bool = True  # the head is the embedding
    qk_norm: bool = True  # queries and keys of unit length
    rope_base: float = 10_000.0  # the slowest of RoPE's angles turns once in 2π·base positions
    rope_scaling: Literal["none", "linear", "llama3"] = "none"  # how RoPE reaches further
    rope_factor: float = 8.0  # linear, llama3: slow angles are divided by it
    rope_context: int = 8192  # llama3: the tokens of a text before, in which an angle has turned
    rope_low: float = 1.0  # llama3: fewer times than this, so that it is divided
    rope_high: float = 4.0  # llama3: more often than this, so that it stays
    norm_eps: float = 1e-5  # added to the variance

    def __post_init__(self):
        if min(self.dim, self.layers, self.heads, self.context, self.rope_context) < 1:
            raise UserError(
                "--model.dim, layers, heads, context and rope-context must each be at least 1"
            )
        for name, value in vars(self).items():
            end = LARGEST if isinstance(value, int) else inf
            if not isinstance(value, str) and not 0 <= value < end:
                flag = name.replace("_", "-")
                raise UserError(f"--model.{flag} {short(value)} must be 0 or more, below {end:,}")
        if self.dim % self.heads:
            raise UserError(
                f"--model.dim {self.dim} is not divisible by --model.heads {self.heads}: "
                f"choose heads that divide it, such as {gcd(self.dim, self.heads)}"
            )
        if self.kv_heads and self.heads % self.kv_heads:
            raise UserError(
                f"--model.heads {self.heads} is not divisible by --model.kv-heads {self.kv_heads}"
            )
        if self.position == "rope" and self.head_dim % 2:
            raise UserError(
                f"RoPE turns pairs of channels, so --model.dim {self.dim} / --model.heads "
                f"{self.heads} = {self.head_dim} must be even"
            )
        if min(self.rope_base, self.rope_factor) < 1 or self.rope_low >= self.rope_high:
            raise UserError(
                "--model.rope-base and rope-factor must be at least 1, and rope-low below rope-high"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def kv_heads_or_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def ffn_width(self) -> int:
        """F. Gated units have three matrices, not two: 8/3 C keeps 8 C² weights (Shazeer 2020)."""
        if self.ffn_dim:
            return self.ffn_dim
        return -(-8 * self.dim // 24) * 8 if ACTIVATIONS[self.activation].gated else 4 * self.dim


GPT2 = {
    "position": "learned", "norm": "layernorm", "activation": "gelu_tanh", "bias": True,
    "qk_norm": False, "context": 1024, "vocab_size": 50257,
}  # fmt: skip
PRESETS = {
    "tiny": ModelConfig(),
    "gpt2": ModelConfig("gpt2", dim=768, layers=12, heads=12, **GPT2),
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


ACTIVATIONS = {
    "swiglu": Activation(swiglu, gated=True),
    "gelu": Activation(gelu, gated=False),
    "gelu_tanh": Activation(gelu_tanh, gated=False),
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


class Block(nn.Module):
    """x + attention(norm(x)), then x + feedforward(norm(x)): the pre-norm order."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        norm = NORMS[config.norm]
        self.attention_norm = norm(config.dim, config.norm_eps, config.bias)
        self.attention = Attention(config)
        self.ffn_norm = norm(config.dim, config.norm_eps, config.bias)
        self.ffn = FeedForward(config)

    def forward(
        self, x: Tensor, mask: Mask, rotation: Rotation | None = None, past: KeyValue | None = None
    ) -> tuple[Tensor, KeyValue]:
        """x (B T C) to x (B T C), and this block's new keys and values."""
        look, new = self.attention(self.attention_norm(x), mask, rotation, past)
        x, h = self.ffn_norm.add(x, look)
        return x + self.ffn(h), new


# --- the model ------------------------------------------------------------------------------------


class Transformer(nn.Module):
    """Token ids in, hidden states out."""

    def __init__(self, config: ModelConfig, seed: int | None = 0):
        """Weights are drawn by the seed, or left as memory was if there is none."""
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.dim))
        self.position = POSITIONS[config.position](config)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = NORMS[config.norm](config.dim, config.norm_eps, config.bias)
        self.head = (
            None if config.tied else nn.Parameter(torch.empty(config.vocab_size, config.dim))
        )
        if seed is not None:
            initialize(self, seed)

    @classmethod
    def load(cls, folder: str | Path) -> "Transformer":
        """The GPT-2 or Llama of a Hugging Face folder, in fp32; UserError where there is none."""
        values, weights = read_folder(Path(folder))
        return assembled(settings(ModelConfig, values, f"{folder}/config.json"), weights)

    def save(
        self, folder: str | Path, end: int | None = None, shard_bytes: int = 5_000_000_000
    ) -> None:
        """Write such a folder, which transformers loads too; the token `end` ends a text."""
        c = self.config
        values = asdict(c) | {"kv_heads": c.kv_heads_or_heads, "ffn_dim": c.ffn_width}
        write_folder(Path(folder), values, self.state_dict(), end, shard_bytes)

    @property
    def head_weight(self) -> Tensor:
        """The matrix (V C) that turns hidden states into logits."""
        return self.embedding if self.head is None else self.head

    def forward(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        mask: Mask | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """ids (B T) to hidden states (B T C), computed in dtype (default: that of the weights).

        positions (B T) default to 0 … T−1, the mask to causal.
        """
        return self.extend(ids, None, positions, mask, dtype)[0]

    def extend(
        self,
        ids: Tensor,
        past: list[KeyValue] | None,
        positions: Tensor | None = None,
        mask: Mask | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, list[KeyValue]]:
        """As `forward`, for ids that follow P past tokens; and each layer's new keys and values."""
        if positions is None or mask is None:
            causal = causal_mask(ids.shape[1], past[0].keys.shape[2] if past else 0, ids.device)
            positions = causal.hi if positions is None else positions
            mask = mask or causal
        x = F.embedding(ids, self.embedding).to(dtype or self.embedding.dtype)
        x = self.position.embed(x, positions)
        rotation = self.position.rotation(positions)
        new = []
        for i, layer in enumerate(self.layers):
            x, kv = layer(x, mask, rotation, past[i] if past else None)
            new.append(kv)
        return self.norm(x), new

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (… C) to scores of the next token (… V), in fp32 or wider."""
        logits = hidden @ self.head_weight.to(hidden.dtype).T
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def initialize(model: Transformer, seed: int) -> None:
    """Draw every weight from its own stream: none depends on which other weights exist.

    Matrices: normal with variance 1/fan_in, so that each keeps the scale of what goes through;
    the two that write into the stream (attention output, feed-forward down) start at zero, so that
    the model starts as the identity. Norms start at 1, biases at 0.
    """
    for name, p in model.named_parameters():
        if p.dim() < 2:
            continue
        rng = generator(seed, f"init/{name}")
        std = 0.02 if name in ("embedding", "position.table") else p.shape[1] ** -0.5
        std = 0.0 if name.endswith(("output.weight", "down.weight")) or name == "head" else std
        p.data.copy_(torch.randn(p.shape, generator=rng) * std)


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


def fill(model: Transformer, weights: Weights) -> None:
    """Give a model the weights in files; UserError, before any is read, if one does not fit."""
    found, own = weights.load("meta"), model.state_dict()
    for name in sorted(own.keys() | found.keys()):
        have, want = (tuple(d[name].shape) if name in d else None for d in (found, own))
        if have != want:
            raise UserError(
                f"{weights.files[0]} does not fit its config.json: {name} is {have}, not {want}"
            )
    model.load_state_dict(weights.load(), assign=model.embedding.is_meta)


# --- counting -------------------------------------------------------------------------------------


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def parameters_of(config: ModelConfig) -> int:
    """How many weights a model would have, without one; its blocks are all alike."""
    with torch.device("meta"):
        one, two = (
            count_parameters(Transformer(replace(config, layers=n), seed=None)) for n in (1, 2)
        )
    return one + (config.layers - 1) * (two - one)


def training_flops(model: Transformer, T: int) -> float:
    """Floating-point operations per token of a training step: 6 N + 12 L C T (PaLM, appendix B).

    N counts the weights that multiply (an untied embedding only looks up); T is the row length.
    """
    N = sum(
        p.numel() for n, p in model.named_parameters() if p.dim() == 2 and n != "position.table"
    )
    if model.head is not None:
        N -= model.embedding.numel()
    return 6 * N + 12 * model.config.layers * model.config.dim * T
