"""Laws of families.py: whatever transformers computes with a folder, so do we, and back."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from helpers import assert_close, seeds
from hypothesis import given
from hypothesis import strategies as st
from models import (
    CONFIGS,
    DECODERS,
    MODELS,
    SHAPES,
    SMALL,
    Batch,
    assert_same,
    edit,
    random_ids,
    shaken,
    tensors,
)
from safetensors.torch import load_file

from families import ALWAYS, FAMILIES, ROPE
from generate import Sampling, generate
from model import ModelConfig, Transformer
from model_files import read_settings
from run import UserError

every_family = pytest.mark.parametrize("kind", CONFIGS)


@pytest.fixture(scope="module")
def transformers():
    library = pytest.importorskip("transformers")
    library.utils.logging.disable_progress_bar()
    library.utils.logging.set_verbosity_error()
    return library


# --- the same shape in transformers, written down by hand -----------------------------------------


def their_rope(c):
    rope = {"rope_type": "default" if c.rope_scaling == "none" else c.rope_scaling}
    if c.rope_scaling != "none":
        rope["factor"] = c.rope_factor
    if c.rope_scaling == "llama3":
        rope |= {"low_freq_factor": c.rope_low, "high_freq_factor": c.rope_high}
        rope["original_max_position_embeddings"] = c.rope_context
    return rope | {"rope_theta": c.rope_base}


def their_llama(c):
    return {
        "hidden_size": c.dim, "num_hidden_layers": c.layers, "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads or c.heads, "max_position_embeddings": c.context,
        "vocab_size": c.vocab_size, "intermediate_size": c.ffn_dim, "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tied, "rope_parameters": their_rope(c),
        "head_dim": c.head_width or None,
    }  # fmt: skip


THEIRS = {
    "gpt2": ("GPT2LMHeadModel", lambda c: {
        "n_embd": c.dim, "n_layer": c.layers, "n_head": c.heads, "n_positions": c.context,
        "vocab_size": c.vocab_size, "n_inner": c.ffn_dim, "layer_norm_epsilon": c.norm_eps,
        "tie_word_embeddings": c.tied,
        "activation_function": {"gelu": "gelu", "gelu_tanh": "gelu_new"}[c.activation],
    }),
    "llama": ("LlamaForCausalLM", lambda c: {
        **their_llama(c), "attention_bias": c.bias, "mlp_bias": c.bias
    }),
    "mistral": ("MistralForCausalLM", lambda c: {
        **their_llama(c), "sliding_window": c.window if c.attention == "sliding" else None
    }),
    "qwen3": ("Qwen3ForCausalLM", lambda c: {**their_llama(c), "head_dim": c.head_dim}),
    "bert": ("BertModel", lambda c: {
        "hidden_size": c.dim, "num_hidden_layers": c.layers, "num_attention_heads": c.heads,
        "intermediate_size": c.ffn_dim, "max_position_embeddings": c.context,
        "vocab_size": c.vocab_size, "type_vocab_size": c.segments, "layer_norm_eps": c.norm_eps,
        "hidden_act": {"gelu_tanh": "gelu_new"}.get(c.activation, c.activation),
    }),
    "t5": ("T5ForConditionalGeneration", lambda c: {
        "d_model": c.dim, "num_layers": c.layers, "num_heads": c.heads, "d_kv": c.head_width,
        "d_ff": c.ffn_dim, "vocab_size": c.vocab_size, "layer_norm_epsilon": c.norm_eps,
        "relative_attention_num_buckets": c.buckets, "relative_attention_max_distance": c.reach,
        "feed_forward_proj": {"relu": "relu", "geglu_tanh": "gated-gelu"}[c.activation],
        "tie_word_embeddings": c.scaled_head,  # which says no more than this: see families.py
    }),
    "bloom": ("BloomForCausalLM", lambda c: {
        "hidden_size": c.dim, "n_layer": c.layers, "n_head": c.heads, "vocab_size": c.vocab_size,
        "layer_norm_epsilon": c.norm_eps, "tie_word_embeddings": c.tied,
    }),
}  # fmt: skip


def theirs(transformers, kind, config, seed):
    name, values = THEIRS[kind]
    kinds = getattr(transformers, name)
    none = dict.fromkeys(["bos_token_id", "eos_token_id", "pad_token_id"])  # a pad has no gradient
    model = kinds(kinds.config_class(**values(config), **none)).eval()
    if kind == "t5" and not config.tied:
        model.lm_head.weight = torch.nn.Parameter(torch.zeros(config.vocab_size, config.dim))
    return with_ones(shaken(model, seed))


def with_ones(model):
    """Qwen3's norms of queries and keys have weights there, which are ones here."""
    for name, p in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            p.data = torch.ones_like(p)
    return model


# --- against transformers -------------------------------------------------------------------------


@every_family
@given(st.data(), seeds, st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_logits_and_gradients_are_those_of_transformers(
    transformers, tmp_path_factory, kind, data, seed, dtype
):
    """In fp32, of a folder that transformers wrote, in one file or in many, in 16 bits or 32.

    Every gradient is compared: theirs are written as if they were weights, and read by our names.
    """
    config, folder = data.draw(CONFIGS[kind]), tmp_path_factory.mktemp("theirs")
    written = theirs(transformers, kind, config, seed).to(dtype)
    written.save_pretrained(folder / "model", max_shard_size=[4000, "5GB"][seed % 2])
    other = type(written).from_pretrained(folder / "model", dtype=torch.float32)
    model, batch = Transformer.load(folder / "model"), Batch(config, seed)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    logits = []
    for values in (batch.ours(model), batch.theirs(other)):
        loss, kept = batch.loss(values, config.arch == "encdec")
        loss.backward()
        logits.append(kept)
    assert_close(*logits, 1e-5)
    for p in other.parameters():
        p.data = torch.zeros_like(p) if p.grad is None else p.grad
    with_ones(other).save_pretrained(folder / "gradients")
    want = dict(Transformer.load(folder / "gradients").named_parameters())
    for name, p in model.named_parameters():
        assert_close(p.grad, want[name], 1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
@given(st.data(), seeds)
def test_in_float64_they_agree_to_13_digits(transformers, tmp_path_factory, kind, data, seed):
    """Where transformers computes nothing in fp32 by itself."""
    config, folder = data.draw(CONFIGS[kind]), tmp_path_factory.mktemp("theirs")
    other = theirs(transformers, kind, config, seed)
    other.save_pretrained(folder)
    model, batch = Transformer.load(folder).double(), Batch(config, seed)
    assert_close(batch.ours(model)[batch.there], batch.theirs(other.double())[batch.there], 1e-13)


@every_family
@given(st.data(), seeds)
def test_cached_decoding_is_the_whole_of_transformers(
    transformers, tmp_path_factory, kind, data, seed
):
    config, folder = data.draw(CONFIGS[kind]), tmp_path_factory.mktemp("theirs")
    if config.arch == "encoder":
        return
    other = theirs(transformers, kind, config, seed)
    other.save_pretrained(folder)
    model, batch = Transformer.load(folder), Batch(config, 0)
    first = data.draw(st.integers(1, config.context - 1))
    with torch.no_grad():
        memory = model.encode(batch.source) if config.arch == "encdec" else None
        hidden, past = model.extend(batch.ids[:, :first], None, memory=memory)
        parts = [hidden]
        for t in range(first, config.context):
            hidden, new = model.extend(batch.ids[:, t : t + 1], past, memory=memory)
            parts.append(hidden)
            past = [one.append(*more) for one, more in zip(past, new, strict=True)]
        assert_close(model.logits(torch.cat(parts, 1)), batch.theirs(other), 1e-5)


@every_family
@given(st.data(), seeds, st.integers(100, 9000))
def test_what_is_written_here_loads_there(transformers, tmp_path_factory, kind, data, seed, shard):
    config, folder = data.draw(CONFIGS[kind]), tmp_path_factory.mktemp("ours") / "model"
    model, batch = shaken(Transformer(config), seed), Batch(config, seed)
    model.save(folder, shard_bytes=shard)
    auto = {"encoder": "AutoModel", "encdec": "AutoModelForSeq2SeqLM"}
    read = getattr(transformers, auto.get(config.arch, "AutoModelForCausalLM"))
    bare = {"add_pooling_layer": False} if kind == "bert" else {}
    other, info = read.from_pretrained(folder, output_loading_info=True, **bare)
    assert not any(info.values()), info
    files = folder.glob("*.safetensors")
    names = {name.removeprefix("bert.") for path in files for name in load_file(path)}
    shared = {f"{stack}.embed_tokens.weight" for stack in ("encoder", "decoder")}
    shared |= {"lm_head.weight"} if config.tied else set()
    assert names == other.state_dict().keys() - shared
    results = (batch.loss(x, kind == "t5")[1] for x in (batch.ours(model), batch.theirs(other)))
    assert_close(*results, 1e-5)
    weights = sum(p.numel() for p in model.parameters())
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (4 * weights > shard)
    assert (other.config.bos_token_id, other.config.eos_token_id) == (None, None)


@pytest.mark.parametrize("kind", DECODERS)
@given(st.data(), seeds)
def test_greedy_text_is_that_of_transformers(transformers, tmp_path_factory, kind, data, seed):
    config, folder = data.draw(CONFIGS[kind]), tmp_path_factory.mktemp("theirs")
    other = theirs(transformers, kind, config, seed)
    other.save_pretrained(folder)
    ids = random_ids(config, seed, 1, 3)
    want = other.generate(ids, do_sample=False, max_new_tokens=5)[0, 3:].tolist()
    model = Transformer.load(folder)
    got = generate(model, ids.tolist(), 5, Sampling(greedy=True), set(), 0)
    assert [token for (token,) in got] == want


# --- settings -------------------------------------------------------------------------------------

ANYTHING = [..., None, True, False, 0, 1, 2, 0.5, "gelu", "relu", [], {}]  # ... takes a key away
UNWRITTEN = [  # keys that our files do not have, and transformers may look at
    "is_causal", "is_decoder", "is_gated_act", "dense_act_fn", "hidden_act", "layer_types",
    "num_attention_heads", "head_dim", "n_embed", "slow_but_exact", "pretraining_tp", "rope_theta",
    "rope_scaling", "partial_rotary_factor", "scale_attn_by_inverse_layer_idx", "sliding_window",
    "scale_attn_weights", "apply_residual_connection_post_layernorm", "num_key_value_heads",
]  # fmt: skip


@pytest.mark.parametrize("kind", SHAPES)
@given(st.data())
def test_whatever_a_config_says_is_refused_or_means_the_same_there(
    transformers, tmp_path_factory, kind, data
):
    """Some keys changed, some taken away; what transformers cannot load may mean anything."""
    folder = tmp_path_factory.mktemp("config") / "model"
    MODELS[kind].save(folder)
    keys = sorted({*json.loads((folder / "config.json").read_text()), *UNWRITTEN} - {"dtype"})
    values = st.sampled_from(ANYTHING)
    changes = data.draw(st.dictionaries(st.sampled_from(keys), values, min_size=1, max_size=3))
    edit(**changes)(folder)
    try:
        model = Transformer.load(folder)
    except UserError:
        return
    batch = Batch(SHAPES[kind], 5)
    read = getattr(transformers, THEIRS[kind.removesuffix(" v1.1")][0])
    bare = {"add_pooling_layer": False} if kind == "bert" else {}
    try:
        other, info = read.from_pretrained(folder, output_loading_info=True, **bare)
        want = batch.theirs(other.float().eval())
    except Exception:
        return
    if not any(info.values()):
        kept = slice(None) if model.config.arch == "encdec" else batch.there
        assert_close(batch.ours(model)[kept], want[kept], 1e-5)


def test_every_setting_has_its_place_in_every_family():
    """Or a new one would be lost in a file, and the model become another.

    What is nowhere must belong to what the family never has. Dropout is of a training, which a file
    knows nothing of.
    """
    belongs = {"window": ("attention", "sliding"), "rope_interleaved": ("position", "rope")}
    belongs |= dict.fromkeys(("buckets", "reach"), ("position", "t5"))
    belongs |= dict.fromkeys(("block", "global_blocks", "random_blocks"), ("attention", "fixed"))
    belongs |= {"features": ("attention", "performer")}
    belongs |= dict.fromkeys(("rope_base", "rope_scaling", *ROPE), ("position", "rope"))
    for family in FAMILIES.values():
        assert family.always.keys() >= ALWAYS.keys()
        placed = {"preset", "dropout", *family.settings, *family.always}
        placed |= {name for part in family.parts for name in part.ours}
        for name in {field.name for field in fields(ModelConfig)} - placed:
            setting, value = belongs[name]
            assert setting not in family.settings and family.always[setting] != value


@pytest.mark.parametrize("kind", FAMILIES)
def test_where_a_config_is_silent_transformers_default_holds(transformers, kind):
    family = FAMILIES[kind]
    default = transformers.AutoConfig.for_model(family.written["model_type"])
    silent = {theirs: value for theirs, value in family.settings.values() if value}
    silent = {theirs: value for theirs, value in silent.items() if hasattr(default, theirs)}
    assert silent == {theirs: getattr(default, theirs) for theirs in silent}
    for key, value in family.only.items() if kind != "t5 v1.1" else ():
        assert default.to_dict().get(key) in (None, value)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3"])
def test_a_config_that_says_nothing_of_rope_or_window_has_transformers_own(transformers, kind):
    needed = [theirs for theirs, value in FAMILIES[kind].settings.values() if value is None]
    _, read = read_settings({"model_type": kind} | dict.fromkeys(needed, 8), Path("config.json"))
    default = transformers.AutoConfig.for_model(kind)
    want = {"rope_type": "default", "rope_theta": read["rope_base"]}
    assert read["rope_scaling"] == "none" and default.rope_parameters == want
    if kind == "mistral":
        assert (read["attention"], read["window"]) == ("sliding", default.sliding_window)


# --- other spellings ------------------------------------------------------------------------------


def both(*changes):
    return lambda folder: [change(folder) for change in changes]


def renamed(old, new):
    return tensors(lambda t: [t.update({n.replace(old, new): t.pop(n)}) for n in [*t] if old in n])


def old_rope(**rope):
    """As before transformers 5: rope_theta and rope_scaling, with "type" in it."""
    rope = rope or None
    return edit(rope_parameters=..., rope_theta=SMALL.rope_base, rope_scaling=rope)


GPT2_MASKS = {"h.1.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8)} | {
    "h.1.attn.masked_bias": torch.tensor(-1e4)
}
FREQUENCIES = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
EMBEDDING = MODELS["t5"].embedding.detach()
LLAMA3 = {"factor": 8.0, "original_max_position_embeddings": 8192} | {
    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
}  # fmt: skip
SPELT = {
    "gpt2 as first released": ("gpt2", {}, both(
        renamed("transformer.", ""),
        tensors(lambda t: t.update(GPT2_MASKS, **{"lm_head.weight": t["wte.weight"].clone()})),
    )),
    "llama before transformers 5": ("llama", {}, both(
        old_rope(), tensors(lambda t: t.update(FREQUENCIES))
    )),
    "its RoPE, scaled": (
        "llama", {"rope_scaling": "linear"}, old_rope(type="linear", factor=8.0)
    ),
    "its RoPE, scaled in the old words, beside the new ones": (
        "llama", {"rope_scaling": "linear"}, edit(rope_scaling={"type": "linear", "factor": 8.0})
    ),
    "its RoPE, scaled in the newer of two words": (
        "llama", {"rope_scaling": "linear"},
        old_rope(type="default", rope_type="linear", factor=8.0),
    ),
    "a file that is whole, and an index beside it": (
        "llama", {}, lambda folder: (folder / "model.safetensors.index.json").write_text("{}")
    ),
    "llama 3.1": ("llama", {"rope_scaling": "llama3"}, old_rope(type="llama3", **LLAMA3)),
    "mistral without a window": ("mistral", {"attention": "full"}, edit(sliding_window=None)),
    "bert as first released": ("bert", {}, both(
        renamed("LayerNorm.weight", "LayerNorm.gamma"), renamed("LayerNorm.bias", "LayerNorm.beta"),
        edit(position_embedding_type="absolute", type_vocab_size=...),
    )),
    "bert with its heads": ("bert", {}, tensors(lambda t: t.update({
        "bert.embeddings.position_ids": torch.arange(8)[None],
        "cls.predictions.bias": torch.ones(11), "bert.pooler.dense.weight": torch.ones(16, 16),
        "cls.predictions.decoder.weight": MODELS["bert"].embedding.detach().clone(),
    }))),
    "t5 as first released": ("t5", {}, both(
        edit(scale_decoder_outputs=..., num_decoder_layers=..., tie_word_embeddings=...,
             feed_forward_proj=..., n_positions=512),
        tensors(lambda t: t.update({
            "encoder.embed_tokens.weight": EMBEDDING.clone(), "lm_head.weight": EMBEDDING.clone(),
            "decoder.embed_tokens.weight": EMBEDDING.clone(),
            "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight":
                torch.ones(32, 4),
        })),
    )),
    "t5 v1.1 before transformers 5": ("t5 v1.1", {}, edit(scale_decoder_outputs=...)),
    "t5 v1.1 after it": ("t5 v1.1", {}, edit(tie_word_embeddings=True, dense_act_fn="gelu_new")),
    "bloom as first released": ("bloom", {}, both(
        renamed("transformer.", ""),
        edit(n_embed=16, num_attention_heads=4, hidden_size=..., n_head=..., n_inner=None),
    )),
    "gpt2 by the words of others": ("gpt2", {}, edit(
        n_embd=..., n_head=..., n_layer=..., n_positions=..., hidden_size=16, num_attention_heads=4,
        num_hidden_layers=2, max_position_embeddings=8,
    )),
    "t5 by the words of others": ("t5", {}, edit(
        d_model=..., num_heads=..., num_layers=..., d_kv=..., hidden_size=16, num_attention_heads=4,
        num_hidden_layers=2, head_dim=4,
    )),
}  # fmt: skip


@pytest.mark.parametrize("case", SPELT)
def test_a_folder_in_other_words_is_the_same(case, tmp_path):
    kind, more, change = SPELT[case]
    MODELS[kind].save(tmp_path / "model")
    change(tmp_path / "model")
    model = Transformer(replace(SHAPES[kind], **more))
    model.load_state_dict(MODELS[kind].state_dict())
    loaded = Transformer.load(tmp_path / "model")
    assert (loaded.head is None) == (model.head is None)
    assert_same(loaded, model)
