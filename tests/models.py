"""Models of every family that files know, drawn or one small one of each, and their folders."""

import json
from dataclasses import replace

import torch
from helpers import normals
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from attention import Mask
from families import SCALINGS
from model import ModelConfig, Transformer


def shapes(**more):
    """Configs that differ in the sizes that all families have, and in more."""
    sizes = {
        "dim": st.sampled_from([16, 24, 40]),  # in fewer channels LayerNorm divides by little
        "heads": st.sampled_from([1, 2, 4]),
        "layers": st.integers(1, 3),
        "vocab_size": st.integers(2, 40),
        "context": st.integers(8, 20),
        "ffn_dim": st.integers(1, 30),
        "tied": st.booleans(),
        "norm_eps": st.sampled_from([1e-6, 1e-5, 1e-2]),
    }
    return st.builds(ModelConfig, **({"qk_norm": st.just(False)} | sizes | more))


@st.composite
def kv_heads(draw):
    """Llamas and Mistrals alike: some heads share keys and values, and have any width."""
    heads = draw(st.sampled_from([1, 2, 4]))
    kv = draw(st.sampled_from([n for n in (0, 1, 2) if not n or heads % n == 0]))
    return {"heads": heads, "kv_heads": kv, "head_width": draw(st.sampled_from([0, 6]))}


def grouped(configs):
    return st.builds(lambda config, more: replace(config, **more), configs, kv_heads())


LAYERNORM = {"norm": st.just("layernorm"), "bias": st.just(True)}
ROPED = {"rope_scaling": st.sampled_from(sorted(SCALINGS)), "rope_base": st.floats(10, 1e6)} | {
    "rope_factor": st.floats(1, 10),
    "rope_context": st.integers(4, 12),
}
CONFIGS = {
    "gpt2": shapes(
        position=st.just("learned"), activation=st.sampled_from(["gelu", "gelu_tanh"]), **LAYERNORM
    ),
    "llama": grouped(shapes(bias=st.booleans(), **ROPED)),
    "mistral": grouped(
        shapes(
            attention=st.sampled_from(["full", "sliding", "sliding"]), window=st.integers(1, 7),
            **ROPED,
        )
    ),
    "qwen3": grouped(shapes(qk_norm=st.just(True), norm_eps=st.just(1e-6), **ROPED)),
    "bert": shapes(
        arch=st.just("encoder"), order=st.just("post"), position=st.just("learned"),
        embed_norm=st.just(True), segments=st.integers(1, 3), tied=st.just(True),
        activation=st.sampled_from(["gelu", "gelu_tanh", "relu"]), **LAYERNORM,
    ),
    "t5": st.builds(
        lambda config, further: replace(config, reach=config.buckets + further),
        shapes(
            arch=st.just("encdec"), position=st.just("t5"), score_scale=st.just(1.0),
            activation=st.sampled_from(["relu", "geglu_tanh"]), scaled_head=st.booleans(),
            head_width=st.sampled_from([3, 8]), buckets=st.integers(4, 12), reach=st.just(12),
        ),
        st.integers(0, 8),
    ),
    "bloom": shapes(
        position=st.just("alibi"), embed_norm=st.just(True), activation=st.just("gelu_tanh"),
        ffn_dim=st.just(0), dim=st.just(24), heads=st.sampled_from([1, 2, 3, 6]), **LAYERNORM,
    ),
}  # fmt: skip
DECODERS = ["gpt2", "llama", "mistral", "qwen3", "bloom"]


def shaken(model, seed):
    """Every weight becomes a normal number, so that none is zero, one or like another."""
    drawn = normals(seed, *(p.shape for p in model.parameters()))
    for p, x in zip(model.parameters(), drawn, strict=True):
        p.data.copy_(0.15 * x.detach() + (p.dim() == 1))
    return model


def random_ids(config, seed, *shape):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocab_size, shape, generator=rng)


class Batch:
    """Two texts, one of them padded: before it and, where all is read at once, behind it too."""

    def __init__(self, config, seed):
        T = config.context
        self.ids, self.targets, self.source = (random_ids(config, seed + i, 2, T) for i in range(3))
        self.segments = self.ids % max(1, config.segments)
        behind = 0 if config.arch == "decoder" else seed // 4 % 3
        lo, hi = torch.tensor([0, seed % 4]), torch.tensor([T, T - behind]) - 1
        at = torch.arange(T)
        self.there = (at >= lo[:, None]) & (at <= hi[:, None])  # B T
        self.positions = (at - lo[:, None]).clamp(min=0)
        lo, hi = (x[:, None].expand(2, T) for x in (lo, hi))
        self.mask = Mask(lo, torch.minimum(hi, at) if config.arch == "decoder" else hi)

    def ours(self, model):
        if model.config.arch == "encoder":
            return model.logits(model(self.ids, mask=self.mask, segments=self.segments))
        if model.config.arch == "decoder":
            return model.logits(model(self.ids, self.positions, self.mask))
        memory = model.encode(self.source, self.mask)
        return model.logits(model(self.ids, memory=memory, cross_mask=self.mask))

    def theirs(self, model):
        there, kind = self.there.long(), model.config.model_type
        if kind == "bert":
            states = model(self.ids, there, self.segments).last_hidden_state
            return states @ model.embeddings.word_embeddings.weight.T
        if kind == "t5":
            return model(self.source, there, decoder_input_ids=self.ids).logits
        places = {} if kind == "bloom" else {"position_ids": self.positions}
        return model(self.ids, attention_mask=there, **places).logits

    def loss(self, logits, encdec):
        """Of what is no padding; T5 has that in what it reads, not in what it writes."""
        kept = torch.ones_like(self.there) if encdec else self.there
        return torch.nn.functional.cross_entropy(logits[kept], self.targets[kept]), logits[kept]


# --- one of each ----------------------------------------------------------------------------------

SMALL = ModelConfig(dim=16, layers=2, heads=4, kv_heads=2, vocab_size=11, context=8, qk_norm=False)
GPT = {"kv_heads": 0, "norm": "layernorm", "activation": "gelu_tanh", "bias": True}
SHAPES = {
    "llama": SMALL,
    "gpt2": replace(SMALL, **GPT, position="learned"),
    "mistral": replace(SMALL, attention="sliding", window=3, head_width=6),
    "qwen3": replace(SMALL, qk_norm=True, norm_eps=1e-6, head_width=6),
    "bert": replace(
        SMALL, **GPT, position="learned", arch="encoder", order="post", embed_norm=True, segments=2
    ),
    "t5": replace(
        SMALL, arch="encdec", position="t5", kv_heads=0, activation="relu", score_scale=1.0,
        scaled_head=True,
    ),
    "bloom": replace(SMALL, **GPT, position="alibi", embed_norm=True),
}  # fmt: skip
SHAPES["t5 v1.1"] = replace(
    SHAPES["t5"], activation="geglu_tanh", tied=False, scaled_head=False, head_width=3
)
MODELS = {kind: shaken(Transformer(config), 0) for kind, config in SHAPES.items()}


def assert_same(one, two):
    batch = Batch(two.config, 5)
    assert torch.equal(batch.ours(one), batch.ours(two))


# --- changes of a folder --------------------------------------------------------------------------


def edit(**values):
    """A change of config.json; ... takes a key away."""

    def change(folder):
        hf = json.loads((folder / "config.json").read_text()) | values
        kept = {key: value for key, value in hf.items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(kept))

    return change


def tensors(change):
    """A change of model.safetensors, which `change` makes in a dict."""

    def changed(folder):
        path = folder / "model.safetensors"
        weights = load_file(path)
        change(weights)
        save_file({name: x.clone() for name, x in weights.items()}, path)

    return changed


def put(name, *shape):
    return tensors(lambda t: t.update({name: torch.ones(shape)}))
