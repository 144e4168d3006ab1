"""Families of models: what files of GPT-2, Llama, Mistral, Qwen3, BERT, T5, BLOOM call our parts.

Idea: all of them are our transformer with other words. A `Family` is a table of settings (theirs in
config.json, ours in ModelConfig), one of names (of their tensors, of ours), and a list of what its
config.json could say that our model cannot do. model_files.py reads and writes with these tables;
no code there or in the model knows a family.

Run: python -m pytest tests/test_model_files.py

To add a family: a `Family` and its entry in FAMILIES; the tests then ask for its counterpart.

Formats: the sources of transformers' GPT2Config, LlamaConfig, MistralConfig, Qwen3Config,
BertConfig, T5Config and BloomConfig, and of the models beside them.
"""

from collections.abc import Callable, Sequence
from json import dumps
from pathlib import Path
from reprlib import repr as short
from typing import Any, NamedTuple

from run import UserError, setting

BARE = ("lm_head.", "cls.")  # names before which a family's prefix never stands
IMPLIED = ("kv_heads", "head_width", "ffn_dim")  # 0 with us, null with them: as others imply

# --- values ---------------------------------------------------------------------------------------


def taken(values: dict, key: str, kind: type, where: Path, silent: Any = None) -> Any:
    """values[key], which must be of this kind; `silent` where it is missing or null."""
    value = values.get(key)
    return silent if value is None and silent is not None else setting(kind, value, where, key)


def check(key: str, value: object, known: Sequence, where: Path | str) -> None:
    if value not in known:
        known = " or ".join(dict.fromkeys(map(dumps, known)))
        raise UserError(f"{where}: {key} {short(value)} is not supported, only {known}")


# --- what a family is -----------------------------------------------------------------------------


class Part(NamedTuple):
    """Settings that do not stand one to one in config.json."""

    ours: tuple[str, ...]
    read: Callable[[dict, dict[str, Any], Path], dict[str, Any]]  # theirs, ours so far, the file
    write: Callable[[dict[str, Any]], dict[str, Any]]


class Family(NamedTuple):
    """A kind of model: what its files call our settings and tensors, and what it cannot be."""

    always: dict[str, Any]  # settings of ours that all its models share, unless they stand below
    settings: dict[str, tuple[str, Any]]  # ours -> theirs; its value where config.json is silent
    choices: dict[str, dict[str, str]]  # of a setting: theirs -> ours
    only: dict[str, Any]  # theirs that would change the function, and the one value known here
    written: dict[str, Any]  # theirs that say nothing to us, but something to transformers
    architectures: dict[tuple[str, ...], str]  # the heads beside the model -> transformers' class
    prefix: str  # may stand before every name that is not BARE
    names: dict[str, tuple[str, ...]]  # theirs -> ours, see `named`
    heads: dict[str, tuple[str, ...]]  # theirs -> those of heads.py
    parts: tuple[Part, ...] = ()
    also: tuple[tuple[str, str], ...] = ()  # another word of theirs, and the one above
    transposed: bool = False  # the matrices of its blocks are (in out)
    by_head: bool = False  # what is fused lies side by side in each head
    free_width: bool = False  # heads need not divide the width
    own_head: bool = False  # a head may stand in its files, whatever config.json says


def named(
    tensors: dict[str, str], *modules: tuple[str, str, dict[str, str]]
) -> dict[str, tuple[str, ...]]:
    """Tensors of theirs and what of ours they hold, N standing for a block's number.

    Several names of ours: these side by side. None: it is no weight, such as a mask, or that of a
    head. "=name": that tensor once more; "=1": what our models leave out, as if it were all ones.
    Modules, below a prefix of theirs and one of ours, have a weight and perhaps a bias; gamma and
    beta are what TensorFlow called them, and BERT's first files.
    """
    kinds = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias"}
    return {theirs: tuple(ours.split()) for theirs, ours in tensors.items()} | {
        f"{above}{theirs}.{spelt}": tuple(f"{below}{name}.{kind}" for name in ours.split())
        for above, below, table in modules
        for theirs, ours in table.items()
        for spelt, kind in kinds.items()
    }


def same(theirs: str, ours: str, silent: Any = None) -> Part:
    """A key that repeats another; where it is missing it is so, or means `silent`."""

    def read(hf: dict, out: dict[str, Any], where: Path) -> dict[str, Any]:
        value = silent if hf.get(theirs) is None else hf[theirs]
        check(theirs, out[ours] if value is None else value, [out[ours]], where)
        return {}

    return Part((), read, lambda settings: {theirs: settings[ours]})


ROPE = {  # ours -> theirs
    "rope_factor": ("factor", float),
    "rope_context": ("original_max_position_embeddings", int),
    "rope_low": ("low_freq_factor", float),
    "rope_high": ("high_freq_factor", float),
}
ROPES = {"default": "none", "linear": "linear", "llama3": "llama3"}  # theirs -> ours
SCALINGS = {"none": (), "linear": ("rope_factor",), "llama3": tuple(ROPE)}  # what they have of it


def read_rope(hf: dict, out: dict[str, Any], where: Path) -> dict[str, Any]:
    """rope_parameters, or rope_theta and rope_scaling, as it was before transformers 5."""
    key = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    if not isinstance(rope := hf.get(key) or {}, dict):
        raise UserError(f"{where}: {key} cannot be {short(rope)}")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    check("rope_type", kind, list(ROPES), where)
    for key in rope:
        known = [theirs for theirs, _ in ROPE.values()]
        check("RoPE's", key, ["rope_type", "type", "rope_theta", *known], where)
    base = taken({"rope_theta": hf.get("rope_theta"), **rope}, "rope_theta", float, where, 1e4)
    scaled = {ours: taken(rope, *ROPE[ours], where) for ours in SCALINGS[ROPES[kind]]}
    return {"rope_scaling": ROPES[kind], "rope_base": base, **scaled}


def write_rope(settings: dict[str, Any]) -> dict[str, Any]:
    scaling = settings["rope_scaling"]
    rope = {ROPE[ours][0]: settings[ours] for ours in SCALINGS[scaling]}
    kind = next(theirs for theirs, ours in ROPES.items() if ours == scaling)
    return {"rope_parameters": rope | {"rope_type": kind, "rope_theta": settings["rope_base"]}}


def read_window(hf: dict, out: dict[str, Any], where: Path) -> dict[str, Any]:
    """Tokens that one sees, itself counted, as we count too; null: all."""
    if (window := hf.get("sliding_window", 4096)) is None:
        return {"attention": "full"}
    return {"attention": "sliding", "window": setting(int, window, where, "sliding_window")}


def write_window(settings: dict[str, Any]) -> dict[str, Any]:
    return {"sliding_window": settings["window"] if settings["attention"] == "sliding" else None}


def read_layers(hf: dict, out: dict[str, Any], where: Path) -> dict[str, Any]:
    """What each layer looks at: all of them at everything."""
    alike = ["full_attention"] * out["layers"]
    check("layer_types", hf.get("layer_types"), [None, alike], where)
    return {}


def read_scale(hf: dict, out: dict[str, Any], where: Path) -> dict[str, Any]:
    """T5 divides what its head sees where config.json says so, or else where it shares the head."""
    silent = hf.get("tie_word_embeddings") is not False
    value = hf.get("scale_decoder_outputs", silent)
    return {"scaled_head": setting(bool, value, where, "scale_decoder_outputs")}


def write_scale(settings: dict[str, Any]) -> dict[str, Any]:
    return {"scale_decoder_outputs": settings["scaled_head"]}


# --- the families ---------------------------------------------------------------------------------

ALWAYS = {
    "arch": "decoder", "order": "pre", "attention": "full", "qk_norm": False, "kv_heads": 0,
    "head_width": 0, "segments": 0, "embed_norm": False, "scaled_head": False, "score_scale": 0.0,
}  # fmt: skip
# What any config.json may say, also where the family's class has no such key: that layers differ,
# that weights are no plain numbers, that other code than the family's belongs to them.
ONLY = {
    "layer_types": None, "per_layer_config": None, "quantization_config": None, "auto_map": None,
}  # fmt: skip
# Of what writes: transformers asks the first for its mask, the others for what its cache forgets.
CAUSAL = {**ONLY, "is_causal": True, "attention_chunk_size": None, "sliding_window": None}
GPT2 = Family(
    always={**ALWAYS, "position": "learned", "norm": "layernorm", "bias": True},
    settings={
        "dim": ("n_embd", None), "ffn_dim": ("n_inner", 0), "heads": ("n_head", None),
        "layers": ("n_layer", None), "context": ("n_positions", None),
        "vocab_size": ("vocab_size", None), "tied": ("tie_word_embeddings", True),
        "norm_eps": ("layer_norm_epsilon", 1e-5), "activation": ("activation_function", "gelu_new"),
    },
    choices={"activation": {"gelu_new": "gelu_tanh", "gelu": "gelu"}},
    only={
        **CAUSAL, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    written={"model_type": "gpt2", "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    architectures={(): "GPT2LMHeadModel"},
    prefix="transformer.",
    names=named(
        {
            "wte.weight": "embedding", "wpe.weight": "position.table", "lm_head.weight": "head",
            "h.N.attn.bias": "", "h.N.attn.masked_bias": "",  # masks
        },
        ("", "", {"ln_f": "norm"}),
        ("h.N.", "layers.N.", {
            "ln_1": "attention_norm", "ln_2": "ffn_norm",
            "attn.c_attn": "attention.query attention.key attention.value",
            "attn.c_proj": "attention.output", "mlp.c_fc": "ffn.up", "mlp.c_proj": "ffn.down",
        }),
    ),
    heads={},
    also=(
        ("hidden_size", "n_embd"), ("max_position_embeddings", "n_positions"),
        ("num_attention_heads", "n_head"), ("num_hidden_layers", "n_layer"),
    ),
    transposed=True,
)  # fmt: skip
LLAMA = Family(
    always={**ALWAYS, "position": "rope", "norm": "rmsnorm", "rope_interleaved": False},
    settings={
        "dim": ("hidden_size", None), "ffn_dim": ("intermediate_size", None),
        "heads": ("num_attention_heads", None), "kv_heads": ("num_key_value_heads", 0),
        "head_width": ("head_dim", 0),
        "layers": ("num_hidden_layers", None), "context": ("max_position_embeddings", 2048),
        "vocab_size": ("vocab_size", None), "tied": ("tie_word_embeddings", False),
        "norm_eps": ("rms_norm_eps", 1e-6), "bias": ("attention_bias", False),
        "activation": ("hidden_act", "silu"),
    },
    choices={"activation": {"silu": "swiglu"}, "rope_scaling": ROPES},
    only={
        **CAUSAL, "partial_rotary_factor": 1.0, "original_max_position_embeddings": None,
    },
    written={"model_type": "llama"},
    architectures={(): "LlamaForCausalLM"},
    prefix="model.",
    names=named(
        {
            "embed_tokens.weight": "embedding", "lm_head.weight": "head",
            "layers.N.self_attn.rotary_emb.inv_freq": "",
        },
        ("", "", {"norm": "norm"}),
        ("layers.N.", "layers.N.", {
            "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
            "self_attn.q_proj": "attention.query", "self_attn.k_proj": "attention.key",
            "self_attn.v_proj": "attention.value", "self_attn.o_proj": "attention.output",
            "mlp.gate_proj": "ffn.gate", "mlp.up_proj": "ffn.up", "mlp.down_proj": "ffn.down",
        }),
    ),
    heads={},
    parts=(
        Part(("rope_base", "rope_scaling", *ROPE), read_rope, write_rope),
        same("mlp_bias", "bias", silent=False),
    ),
)  # fmt: skip
MISTRAL = LLAMA._replace(
    always={**LLAMA.always, "bias": False},
    settings={ours: at for ours, at in LLAMA.settings.items() if ours != "bias"} | {
        "kv_heads": ("num_key_value_heads", 8), "context": ("max_position_embeddings", 131072),
    },
    only={theirs: known for theirs, known in LLAMA.only.items() if theirs != "sliding_window"},
    written={"model_type": "mistral"},
    architectures={(): "MistralForCausalLM"},
    parts=(LLAMA.parts[0], Part(("attention", "window"), read_window, write_window)),
    free_width=True,
)  # fmt: skip
QWEN3_EPS = 1e-6  # in all its norms; in ours of queries and keys (attention.py) it always is
QWEN3 = MISTRAL._replace(
    always={**MISTRAL.always, "qk_norm": True, "norm_eps": QWEN3_EPS},
    settings={ours: at for ours, at in MISTRAL.settings.items() if ours != "norm_eps"} | {
        "kv_heads": ("num_key_value_heads", 32),
        "head_width": ("head_dim", 128), "context": ("max_position_embeddings", 32768),
    },
    only={theirs: known for theirs, known in LLAMA.only.items() if theirs != "layer_types"} | {
        "attention_bias": False, "use_sliding_window": False, "rms_norm_eps": QWEN3_EPS,
    },
    written={"model_type": "qwen3", "rms_norm_eps": QWEN3_EPS},
    architectures={(): "Qwen3ForCausalLM"},
    names={
        **LLAMA.names, "layers.N.self_attn.q_norm.weight": ("=1",),
        "layers.N.self_attn.k_norm.weight": ("=1",),
    },
    parts=(LLAMA.parts[0], Part((), read_layers, lambda settings: {})),
)  # fmt: skip
BERT = Family(
    always={
        **ALWAYS, "arch": "encoder", "order": "post", "position": "learned", "norm": "layernorm",
        "bias": True, "embed_norm": True, "tied": True,
    },
    settings={
        "dim": ("hidden_size", None), "ffn_dim": ("intermediate_size", None),
        "heads": ("num_attention_heads", None), "layers": ("num_hidden_layers", None),
        "context": ("max_position_embeddings", 512), "vocab_size": ("vocab_size", None),
        "segments": ("type_vocab_size", 2), "norm_eps": ("layer_norm_eps", 1e-12),
        "activation": ("hidden_act", "gelu"),
    },
    choices={"activation": {"gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu"}},
    only={
        **ONLY, "position_embedding_type": "absolute", "tie_word_embeddings": True,
        "is_decoder": False, "add_cross_attention": False,
    },
    written={
        "model_type": "bert", "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    },
    architectures={
        (): "BertModel", ("pooler",): "BertModel", ("masked",): "BertForMaskedLM",
        ("next_sentence", "pooler"): "BertForNextSentencePrediction",
        ("masked", "next_sentence", "pooler"): "BertForPreTraining",
    },
    prefix="bert.",
    names=named(
        {
            "embeddings.word_embeddings.weight": "embedding",
            "embeddings.position_embeddings.weight": "position.table",
            "embeddings.token_type_embeddings.weight": "segment",
            "embeddings.position_ids": "",
            "cls.predictions.decoder.weight": "=embedding",
        },
        ("embeddings.", "", {"LayerNorm": "embed_norm"}),
        ("encoder.layer.N.", "layers.N.", {
            "attention.self.query": "attention.query", "attention.self.key": "attention.key",
            "attention.self.value": "attention.value", "attention.output.dense": "attention.output",
            "attention.output.LayerNorm": "attention_norm", "intermediate.dense": "ffn.up",
            "output.dense": "ffn.down", "output.LayerNorm": "ffn_norm",
        }),
    ),
    heads=named(
        {"cls.predictions.bias": "masked.bias", "cls.predictions.decoder.bias": "=masked.bias"},
        ("", "", {
            "pooler.dense": "pooler.dense", "cls.seq_relationship": "next_sentence.dense",
            "cls.predictions.transform.dense": "masked.dense",
            "cls.predictions.transform.LayerNorm": "masked.norm",
        }),
    ),
)  # fmt: skip
T5_DECODER = {
    "layer.0.layer_norm": "attention_norm", "layer.0.SelfAttention.q": "attention.query",
    "layer.0.SelfAttention.k": "attention.key", "layer.0.SelfAttention.v": "attention.value",
    "layer.0.SelfAttention.o": "attention.output", "layer.1.layer_norm": "cross_norm",
    "layer.1.EncDecAttention.q": "cross.query", "layer.1.EncDecAttention.k": "cross.key",
    "layer.1.EncDecAttention.v": "cross.value", "layer.1.EncDecAttention.o": "cross.output",
    "layer.2.layer_norm": "ffn_norm", "layer.2.DenseReluDense.wi": "ffn.up",
    "layer.2.DenseReluDense.wo": "ffn.down",
}  # fmt: skip


def t5_names(decoder: dict[str, str]) -> dict[str, tuple[str, ...]]:
    """Of both stacks: an encoder's block lacks the decoder's layer 1."""
    encoder = {
        theirs.replace("layer.2.", "layer.1."): ours
        for theirs, ours in decoder.items()
        if not theirs.startswith("layer.1.")
    }
    bias = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"  # of the whole stack
    return named(
        {
            "shared.weight": "embedding", "lm_head.weight": "head",
            "encoder.embed_tokens.weight": "=embedding",
            "decoder.embed_tokens.weight": "=embedding",
            f"encoder.{bias}": "encoder.position.table", f"decoder.{bias}": "position.table",
            "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": "",
        },
        ("", "", {"encoder.final_layer_norm": "encoder.norm", "decoder.final_layer_norm": "norm"}),
        ("encoder.block.N.", "encoder.layers.N.", encoder),
        ("decoder.block.N.", "layers.N.", decoder),
    )  # fmt: skip


T5 = Family(
    always={
        **ALWAYS, "arch": "encdec", "position": "t5", "norm": "rmsnorm", "bias": False,
        "activation": "relu", "score_scale": 1.0,
    },
    settings={
        "dim": ("d_model", None), "ffn_dim": ("d_ff", None), "heads": ("num_heads", None),
        "head_width": ("d_kv", 64), "layers": ("num_layers", None), "context": ("n_positions", 512),
        "vocab_size": ("vocab_size", None), "tied": ("tie_word_embeddings", True),
        "buckets": ("relative_attention_num_buckets", 32),
        "reach": ("relative_attention_max_distance", 128),
        "norm_eps": ("layer_norm_epsilon", 1e-6),
    },
    choices={},
    only={
        **CAUSAL, "feed_forward_proj": "relu", "dense_act_fn": "relu", "is_gated_act": False,
        "is_encoder_decoder": True,
    },
    written={
        "model_type": "t5", "feed_forward_proj": "relu", "is_encoder_decoder": True,
        "dropout_rate": 0.0, "decoder_start_token_id": 0, "pad_token_id": 0,
    },
    architectures={(): "T5ForConditionalGeneration"},
    prefix="",
    names=t5_names(T5_DECODER),
    heads={},
    parts=(
        Part(("scaled_head",), read_scale, write_scale), same("num_decoder_layers", "layers"),
    ),
    also=(
        ("hidden_size", "d_model"), ("num_attention_heads", "num_heads"),
        ("num_hidden_layers", "num_layers"), ("head_dim", "d_kv"),
    ),
    free_width=True,
    own_head=True,
)  # fmt: skip
T5_GATED = {theirs: ours for theirs, ours in T5_DECODER.items() if ours != "ffn.up"} | {
    "layer.2.DenseReluDense.wi_0": "ffn.gate", "layer.2.DenseReluDense.wi_1": "ffn.up",
}  # fmt: skip
T5_1_1 = T5._replace(
    settings={**T5.settings, "activation": ("feed_forward_proj", "relu")},
    choices={"activation": {"gated-gelu": "geglu_tanh"}},
    only={
        **T5.only, "feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu_new",
        "is_gated_act": True,
    },
    names=t5_names(T5_GATED),
)  # fmt: skip
BLOOM = Family(
    always={
        **ALWAYS, "position": "alibi", "norm": "layernorm", "bias": True, "embed_norm": True,
        "activation": "gelu_tanh", "ffn_dim": 0,
    },
    settings={
        "dim": ("hidden_size", None), "heads": ("n_head", None), "layers": ("n_layer", None),
        "context": ("seq_length", 2048), "vocab_size": ("vocab_size", None),
        "tied": ("tie_word_embeddings", True), "norm_eps": ("layer_norm_epsilon", 1e-5),
    },
    choices={},
    only={
        **CAUSAL, "apply_residual_connection_post_layernorm": False,
        "slow_but_exact": False,  # or its sums lack their biases
    },
    written={"model_type": "bloom", "hidden_dropout": 0.0, "attention_dropout": 0.0},
    architectures={(): "BloomForCausalLM"},
    prefix="transformer.",
    names=named(
        {"word_embeddings.weight": "embedding", "lm_head.weight": "head"},
        ("", "", {"word_embeddings_layernorm": "embed_norm", "ln_f": "norm"}),
        ("h.N.", "layers.N.", {
            "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
            "self_attention.query_key_value": "attention.query attention.key attention.value",
            "self_attention.dense": "attention.output",
            "mlp.dense_h_to_4h": "ffn.up", "mlp.dense_4h_to_h": "ffn.down",
        }),
    ),
    heads={},
    also=(
        ("n_embed", "hidden_size"), ("num_attention_heads", "n_head"),
        ("num_hidden_layers", "n_layer"),
    ),
    by_head=True,
)  # fmt: skip
FAMILIES = {
    "gpt2": GPT2, "llama": LLAMA, "mistral": MISTRAL, "qwen3": QWEN3, "bert": BERT, "t5": T5,
    "t5 v1.1": T5_1_1, "bloom": BLOOM,
}  # fmt: skip
