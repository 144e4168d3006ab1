"""Laws of model_files.py: a folder is written and read whole, and no file does harm."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from helpers import seeds
from hypothesis import given
from hypothesis import strategies as st
from models import CONFIGS, MODELS, SHAPES, assert_same, edit, put, shaken, tensors
from safetensors.torch import load_file

from model import Transformer
from model_files import special_ids
from run import UserError

FILES = ("config.json", "model.safetensors")
INDEX = "model.safetensors.index.json"
LLAMA = MODELS["llama"]

# --- folders --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
@given(st.data(), seeds, st.integers(100, 9000))
def test_what_is_saved_is_loaded_bit_for_bit(tmp_path_factory, kind, data, seed, shard):
    config, folder = data.draw(CONFIGS[kind]), tmp_path_factory.mktemp("ours") / "model"
    model = shaken(Transformer(config), seed)
    model.save(folder, end=1, shard_bytes=shard, begin=0)
    loaded = Transformer.load(folder)
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(x, after[name]) for name, x in before.items())
    assert all(p.is_contiguous() and p.requires_grad for p in loaded.parameters())
    assert_same(loaded, model)
    hf = json.loads((folder / "config.json").read_text())
    assert (hf["bos_token_id"], hf["eos_token_id"]) == (0, 1)
    files = {path.name for path in folder.glob("*.safetensors")}
    if len(files) > 1:
        assert {*json.loads((folder / INDEX).read_text())["weight_map"].values()} == files
    again = folder.with_name("again")
    loaded.save(again, end=1, begin=0)
    assert json.loads((again / "config.json").read_text()) == hf


def test_loading_draws_nothing_and_holds_no_view_of_the_file(tmp_path, monkeypatch):
    LLAMA.save(tmp_path / "model")
    monkeypatch.setattr("model.initialize", None)
    loaded = Transformer.load(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    assert_same(loaded, LLAMA)


def test_weights_of_16_bits_are_written_as_what_config_json_says(tmp_path):
    low = deepcopy(LLAMA).bfloat16()
    low.save(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "float32"
    written = load_file(tmp_path / "model" / "model.safetensors")
    assert {x.dtype for x in written.values()} == {torch.float32}
    assert_same(Transformer.load(tmp_path / "model"), low.float())


def test_a_mistral_s_heads_need_not_divide_its_width(tmp_path):
    config = replace(SHAPES["mistral"], heads=6, kv_heads=2, head_width=4)
    model = shaken(Transformer(config), 0)
    model.save(tmp_path / "model")
    assert_same(Transformer.load(tmp_path / "model"), model)


@pytest.mark.parametrize("said, ends", [(2, {2}), ([1, 2], {1, 2}), (None, set()), ([True], set())])
def test_what_ends_a_text_is_a_token_or_several(said, ends, tmp_path):
    LLAMA.save(tmp_path / "model")
    edit(bos_token_id=3, eos_token_id=said)(tmp_path / "model")
    assert special_ids(tmp_path / "model") == [{3}, ends, set()]


# --- what cannot be written -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, change, named",
    [
        ("llama", {"qk_norm": True}, "a llama file: qk_norm True"),
        ("llama", {"norm": "layernorm"}, "a llama file: norm 'layernorm'"),
        ("llama", {"activation": "gelu"}, "a llama file: activation 'gelu'"),
        ("llama", {"position": "none"}, "a llama file: position 'none'"),
        ("llama", {"rope_scaling": "ntk"}, "a llama file: rope_scaling 'ntk'"),
        ("llama", {"rope_interleaved": True}, "a llama file: rope_interleaved True"),
        ("llama", {"heads": 6, "head_width": 4, "bias": True}, "a llama file: heads 6 .* only 2"),
        ("gpt2", {"kv_heads": 2}, "a gpt2 file: kv_heads 2"),
        ("gpt2", {"order": "deepnorm"}, "a gpt2 file: order 'deepnorm'"),
        ("gpt2", {"head_width": 8}, "a gpt2 file: head_width 8 is not supported, only 4"),
        ("mistral", {"bias": True}, "a llama file: attention 'sliding' is not supported, only"),
        ("mistral", {"window": 3, "score_scale": 1.0}, "a mistral file: score_scale 1.0"),
        ("bert", {"tied": False}, "a bert file: tied False"),
        ("bert", {"order": "pre"}, "a bert file: order 'pre'"),
        ("t5", {"activation": "gelu"}, "a t5 file: activation 'gelu' is not supported, only"),
        ("t5", {"score_scale": 0.0}, "a t5 file: score_scale 0.0"),
        ("bloom", {"ffn_dim": 48}, "a bloom file: ffn_dim 48 is not supported, only 64"),
        ("bloom", {"embed_norm": False}, "a bloom file: embed_norm False"),
    ],
)
def test_a_model_that_has_no_counterpart_is_not_written(kind, change, named, tmp_path):
    with pytest.raises(UserError, match=named):
        Transformer(replace(SHAPES[kind], **change)).save(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_folder_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / "taken").mkdir()
    with pytest.raises(UserError, match="taken exists already"):
        LLAMA.save(tmp_path / "taken")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file/model: "):
        LLAMA.save(tmp_path / "file" / "model")
    monkeypatch.setattr("model_files.save_file", mock_full_disk)
    with pytest.raises(UserError, match=r"cannot write .*model: .*No space left"):
        LLAMA.save(tmp_path / "model")
    assert {p.name for p in tmp_path.iterdir()} == {"taken", "file"}
    LLAMA.adapter = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(UserError, match="no place for adapter"):
        LLAMA.save(tmp_path / "model")
    del LLAMA.adapter


def mock_full_disk(tensors, path, metadata):
    path.write_bytes(b"half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# --- what cannot be read --------------------------------------------------------------------------


def index(change):
    """The same weights in several files, with a change of their index's weight_map."""

    def changed(folder):
        shutil.rmtree(folder)
        LLAMA.save(folder, shard_bytes=4000)
        path = folder / INDEX
        content = json.loads(path.read_text())
        content["weight_map"] = change(content["weight_map"], folder)
        path.write_text(json.dumps(content))

    return changed


def moved(home, folder):
    (folder / home[K]).rename(folder / "elsewhere")
    return home


def doubled(home, folder):
    shutil.copy(folder / home["model.embed_tokens.weight"], folder / "more.safetensors")
    return home | {"lm_head.weight": "more.safetensors"}


def as_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def rope(**values):
    return edit(rope_parameters={"rope_theta": 500.0, "rope_type": "default"} | values)


K = "model.layers.1.self_attn.k_proj.weight"
BAD = {
    # config.json
    "no config": (lambda f: (f / "config.json").unlink(), "there is no file .*config.json"),
    "half a config": (lambda f: (f / "config.json").write_text('{"a": '), "cannot read"),
    "deep": (lambda f: (f / "config.json").write_text("[" * 10**6), "cannot read .*config.json"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "should hold a JSON object"),
    "another family": (edit(model_type="opt"), "model_type 'opt' is not supported, only"),
    "a family that is a list": (edit(model_type=["llama"]), "model_type"),
    "no family": (edit(model_type=...), "model_type None"),
    "no width": (edit(hidden_size=...), "hidden_size cannot be None"),
    "no width within": (edit(intermediate_size=None), "intermediate_size cannot be None"),
    "a width in words": (edit(hidden_size="16"), "hidden_size cannot be '16'"),
    "a negative width": (edit(hidden_size=-16), "config.json: "),
    "a broken width": (edit(hidden_size=16.5), "hidden_size cannot be 16.5"),
    "a true width": (edit(hidden_size=True), "hidden_size cannot be True"),
    "a huge width": (edit(hidden_size=10**400), "config.json: "),
    "a width of 10^9": (edit(hidden_size=10**9, head_dim=...), "config.json: "),
    "a width of 2^27": (edit(hidden_size=2**27), "embedding is .11, 16., not .11, 134217728."),
    "10^9 blocks": (edit(num_hidden_layers=10**9), "num_hidden|layers"),
    "10^8 blocks": (edit(num_hidden_layers=10**8), "it has 2 blocks, not 100000000"),
    "no heads": (edit(num_attention_heads=0), "config.json: "),
    "10^8 heads": (edit(num_attention_heads=10**8), "config.json: "),
    "3 key-value heads": (edit(num_key_value_heads=3), "config.json: .*kv-heads 3"),
    "a head of another width": (edit(head_dim=8), "key.weight is .8, 16., not .16, 16."),
    "another activation": (edit(hidden_act="gelu"), "hidden_act 'gelu' is not supported, only"),
    "half its biases": (edit(mlp_bias=True), "mlp_bias True is not supported, only false"),
    "half its biases, the other unsaid": (
        edit(mlp_bias=..., attention_bias=True), "mlp_bias False is not supported, only true"
    ),
    "biases that are not there": (edit(mlp_bias=True, attention_bias=True), "does not fit"),
    "NaN": (edit(rms_norm_eps=float("nan")), "norm-eps nan"),
    "a head that is not there": (edit(tie_word_embeddings=False), "head is None, not .11, 16."),
    "a sliding window": (edit(sliding_window=4), "sliding_window 4 is not supported"),
    "quantized": (edit(quantization_config={"bits": 4}), "quantization_config"),
    "RoPE in words": (edit(rope_parameters="llama3"), "rope_parameters cannot be 'llama3'"),
    "yarn": (rope(rope_type="yarn", factor=2.0), "rope_type 'yarn' is not supported, only"),
    "half a RoPE": (rope(partial_rotary_factor=0.5), "RoPE's 'partial_rotary_factor'"),
    "no factor": (rope(rope_type="linear"), "factor cannot be None"),
    "a small factor": (rope(rope_type="linear", factor=0.5), "rope-factor must be at least 1"),
    "a base of 10^400": (rope(rope_theta=10**400), "rope_theta cannot be"),
    "a base of 0": (rope(rope_theta=0), "rope-base"),
    # model.safetensors
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
    "pickle": (as_pickle, "pytorch_model.bin is never unpickled"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "cannot read the weights in"),
    "text": (lambda f: (f / "model.safetensors").write_text("x" * 99), "cannot read the weights"),
    "a tensor less": (tensors(lambda t: t.pop(K)), "attention.key.weight is None, not .8, 16."),
    "a tensor more": (tensors(lambda t: t.update(x=torch.ones(1))), "'x' is no tensor of such"),
    "a block more": (
        tensors(lambda t: t.update({K.replace("1", "7"): t[K].clone()})), "has 3 blocks, not 2"
    ),
    "a tensor twice": (
        tensors(lambda t: t.update({K.removeprefix("model."): t[K].clone()})), "is there twice"
    ),
    "another shape": (tensors(lambda t: t.update({K: torch.ones(16, 8)})), "is .16, 8., not"),
    "no shape": (tensors(lambda t: t.update({K: torch.tensor(1.0)})), "is no weight"),
    "nothing in it": (tensors(lambda t: t.update({K: torch.ones(0, 16)})), "is no weight"),
    "whole numbers": (tensors(lambda t: t.update({K: t[K].int()})), "'I32' is not supported"),
    "64 bits": (tensors(lambda t: t.update({K: t[K].double()})), "'F64' is not supported"),
    "infinity": (tensors(lambda t: t[K].view(-1)[:1].fill_(torch.inf)), f"{K} .* is not finite"),
    "two heads": (
        tensors(lambda t: t.update({"lm_head.weight": torch.ones(11, 16)})), "is not the embedding"
    ),
    # the index
    "no table": (index(lambda home, f: [1]), "weight_map is no table"),
    "a shard that is missing": (index(moved), "there is no file .*/model-0"),
    "a shard outside": (index(lambda home, f: home | {K: "../x.safetensors"}), "cannot stand in"),
    "a shard below another": (
        index(lambda home, f: home | {K: "x.safetensors/../../x.safetensors"}), "cannot stand in"
    ),
    "a shard anywhere": (index(lambda home, f: home | {K: "/x.safetensors"}), "cannot stand in"),
    "a shard that is a number": (index(lambda home, f: home | {K: 3}), "cannot stand in 3"),
    "a tensor in no shard": (
        index(lambda home, f: home | {"x": home[K]}), "safetensors lacks 'x', against"
    ),
    "a tensor in another shard": (
        index(lambda home, f: home | {K: home["model.embed_tokens.weight"]}), "against"
    ),
    "a tensor that is not told": (
        index(lambda home, f: {n: x for n, x in home.items() if n != K}), "holds .*k_proj"
    ),
    "a tensor in two shards": (index(doubled), "against|twice"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_read_gets_one_sentence(case, tmp_path):
    folder = tmp_path / "model"
    LLAMA.save(folder)
    change, named = BAD[case]
    change(folder)
    with pytest.raises(UserError, match=named) as caught:
        Transformer.load(folder)
    assert str(folder) in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 400


GPT2_BIAS, BLOOM_QKV = "h.0.attn.c_attn.bias", "h.0.self_attention.query_key_value.weight"
T5_COPY, BERT_COPY = "encoder.embed_tokens.weight", "cls.predictions.decoder.weight"
CROSS = "decoder.block.1.layer.1.EncDecAttention.k.weight"
Q_NORM = "model.layers.1.self_attn.q_norm.weight"
BAD_OF = [
    ("gpt2", edit(scale_attn_by_inverse_layer_idx=True), "only false"),
    ("gpt2", edit(scale_attn_weights=False), "only true"),
    ("gpt2", edit(add_cross_attention=True), "add_cross_attention"),
    ("gpt2", edit(num_attention_heads=2), "n_head 4 is not supported, only 2"),
    ("gpt2", edit(activation_function="relu"), "activation_function 'relu'"),
    ("gpt2", edit(n_inner=65), "ffn.down.weight is .16, 64., not .16, 65."),
    ("gpt2", edit(n_positions=2**28 - 1), "position.table is .8, 16., not .268435455, 16."),
    ("gpt2", put("transformer." + GPT2_BIAS, 16), "c_attn.bias has 16 rows, which are not 3 alike"),
    ("mistral", edit(sliding_window=0), "--model.window and --model.features must be at least 1"),
    ("mistral", edit(sliding_window="3"), "sliding_window cannot be '3'"),
    ("mistral", edit(layer_types=["full_attention"] * 2), "layer_types .* is not supported"),
    ("mistral", edit(num_key_value_heads=...), "kv-heads 8"),
    ("qwen3", edit(layer_types=["full_attention", "sliding_attention"]), "layer_types .* is not"),
    ("qwen3", edit(rms_norm_eps=1e-5), "rms_norm_eps 1e-05 is not supported, only 1e-06"),
    ("qwen3", edit(layer_types=3), "layer_types 3 is not"),
    ("qwen3", edit(use_sliding_window=True), "use_sliding_window True is not"),
    ("qwen3", tensors(lambda t: t.update({Q_NORM: t[Q_NORM] * 1.01})),
     f"{Q_NORM} is not all ones, and our models have no learnt norm of queries and keys"),
    ("bert", edit(position_embedding_type="relative_key"), "'relative_key' is not .* only \"abs"),
    ("bert", edit(is_decoder=True), "is_decoder True is not supported, only false"),
    ("bert", edit(add_cross_attention=True), "add_cross_attention True"),
    ("bert", edit(tie_word_embeddings=False), "tie_word_embeddings False"),
    ("bert", edit(hidden_act="silu"), "hidden_act 'silu' is not supported"),
    ("bert", edit(type_vocab_size=3), "segment is .2, 16., not .3, 16."),
    ("bert", put(BERT_COPY, 11, 16), f"{BERT_COPY} is not the embedding"),
    ("bert", put("qa_outputs.weight", 2, 16), "'qa_outputs.weight' is no tensor of such"),
    ("t5", edit(feed_forward_proj="gated-silu"), "silu' .*, only \"relu\" or \"gated-gelu\""),
    ("t5", edit(feed_forward_proj="gated-gelu"), "ffn.gate.weight is None|'.*wi.weight' is no"),
    ("t5", edit(dense_act_fn="gelu"), "dense_act_fn 'gelu'"),
    ("t5", edit(is_encoder_decoder=False), "is_encoder_decoder False"),
    ("t5", edit(num_decoder_layers=3), "num_decoder_layers 3 is not supported, only 2"),
    ("t5", edit(num_layers=3, num_decoder_layers=3), "it has 2 blocks, not 3"),
    ("t5", edit(d_kv=64), "attention.key.weight is .16, 16., not .256, 16."),
    ("t5", edit(relative_attention_num_buckets=16), "encoder.position.table is .32, 4., not"),
    ("t5", edit(relative_attention_max_distance=5), "reach no smaller"),
    ("t5", edit(scale_decoder_outputs=0.5), "scale_decoder_outputs cannot be 0.5"),
    ("t5", edit(scale_decoder_outputs=None), "scale_decoder_outputs cannot be None"),
    ("t5", edit(head_dim=8), "d_kv 4 is not supported, only 8"),
    ("t5", put(T5_COPY, 11, 16), f"{T5_COPY} is not the embedding"),
    ("t5", put("lm_head.weight", 12, 16), "lm_head.weight is not the embedding"),
    ("t5", put("lm_head.weight", 11), "lm_head.weight is not the embedding"),
    ("t5", tensors(lambda t: t.update({"lm_head.weight": t[CROSS].int()})), "'I32' is not"),
    ("t5", tensors(lambda t: t.pop(CROSS)), "layers.1.cross.key.weight is None"),
    ("t5", put(CROSS.replace("1", "7", 1), 16, 16), "it has 3 blocks, not 2"),
    ("t5", put(CROSS.replace("decoder", "encoder"), 16, 16), "is no tensor of such a model"),
    ("t5 v1.1", tensors(lambda t: t.pop("lm_head.weight")), "head is None, not .11, 16."),
    ("t5 v1.1", edit(feed_forward_proj=..., is_gated_act=...), "wi_0.weight' is no tensor"),
    ("t5 v1.1", edit(feed_forward_proj=..., is_gated_act=True), "'relu' .* only \"gated-gelu\""),
    ("bloom", edit(apply_residual_connection_post_layernorm=True), "only false"),
    ("bloom", edit(slow_but_exact=True, pretraining_tp=2), "slow_but_exact True .* only false"),
    ("bloom", edit(n_embed=24), "hidden_size 16 is not supported, only 24"),
    ("bloom", edit(n_head=3), "not divisible by --model.heads 3"),
    ("bloom", put("transformer." + BLOOM_QKV, 40, 16), "has 40 rows, which are not 3 × 4 alike"),
]  # fmt: skip


@pytest.mark.parametrize("kind, change, named", BAD_OF)
def test_what_a_family_cannot_be_gets_one_sentence(kind, change, named, tmp_path):
    folder = tmp_path / "model"
    MODELS[kind].save(folder)
    change(folder)
    with pytest.raises(UserError, match=named) as caught:
        Transformer.load(folder)
    assert str(folder) in str(caught.value) and len(str(caught.value).splitlines()) == 1


ANY = {"layer_types": ["full_attention", "chunked_attention"]} | {
    "per_layer_config": {"0": {"rms_norm_eps": 1e-3}},
    "quantization_config": {"bits": 4}, "auto_map": {"AutoModel": "other.OtherModel"},
}  # fmt: skip
WRITERS = {"is_causal": False, "attention_chunk_size": 4, "sliding_window": 4}


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("key", [*ANY, *WRITERS])
def test_what_any_config_may_say_gets_one_sentence(kind, key, tmp_path):
    """transformers looks at these keys whatever the family: a decoder that is not causal sees the
    future there, and a cache with a window forgets."""
    if (kind == "bert" and key in WRITERS) or (kind, key) == ("mistral", "sliding_window"):
        return
    folder = tmp_path / "model"
    MODELS[kind].save(folder)
    edit(**{key: (ANY | WRITERS)[key]})(folder)
    with pytest.raises(UserError, match=f"^{folder}.config.json: {key} .* is not supported, only"):
        Transformer.load(folder)
    edit(**{key: None})(folder)
    if key == "is_causal":  # to transformers null is no
        with pytest.raises(UserError, match="is_causal None is not supported, only true"):
            Transformer.load(folder)
    else:
        assert_same(Transformer.load(folder), MODELS[kind])


def test_what_is_no_folder_or_no_file_gets_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "nowhere", tmp_path / "file", tmp_path):
        with pytest.raises(UserError, match=str(folder)):
            Transformer.load(folder)
    for name in FILES:  # a pipe, which nobody writes to, and a folder
        for make in (os.mkfifo, os.mkdir):
            folder = tmp_path / f"{name}-{make.__name__}"
            LLAMA.save(folder)
            (folder / name).unlink()
            make(folder / name)
            with pytest.raises(UserError, match=f"{name}.*"):
                Transformer.load(folder)


def test_a_config_larger_than_any_is_not_read(tmp_path):
    LLAMA.save(tmp_path / "model")
    with open(tmp_path / "model" / "config.json", "ab") as file:
        file.truncate(1 << 40)  # nothing is written: the file has a hole
    with pytest.raises(UserError, match="too large"):
        Transformer.load(tmp_path / "model")


# --- damage ---------------------------------------------------------------------------------------

NASTY = [0, -1, 1.5, 2**31, 2**63, 10**9, 10**400, 1e308, True, None, "", "x" * 999, [], {}, [[]]]


def damaged(data, how, rng):
    """A file's bytes, cut, with a bit turned, with bytes put in, or as JSON with another value."""
    at = rng.randrange(len(data))
    if how == "bit":
        at = rng.choice([at, rng.randrange(min(2000, len(data)))])  # headers are where it hurts
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if how == "cut":
        return data[: at // 64 * 64]
    if how == "put":
        return data[:at] + rng.randbytes(rng.randrange(1, 9)) + data[at:]
    values = json.loads(data)
    place = values
    while (inner := place.get(rng.choice(sorted(place)))) and isinstance(inner, dict):
        place = inner
    place[rng.choice(sorted(place))] = rng.choice(NASTY)
    return json.dumps(values).encode()


def attack(folder, seed, count):
    """Damage one file at a time and load: a UserError, or a model that runs. How often each."""
    rng = random.Random(seed)
    outcomes = {"refused": 0, "loaded": 0}
    models = []
    for number, (model, most) in enumerate([(LLAMA, 4000), *((m, 10**6) for m in MODELS.values())]):
        models.append(folder / str(number))
        model.save(models[-1], shard_bytes=most)
    for _ in range(count):
        path = rng.choice(sorted(rng.choice(models).iterdir()))
        data = path.read_bytes()
        ways = ["bit", "cut", "put"] + ["json"] * (2 * (path.suffix == ".json"))
        path.write_bytes(damaged(data, rng.choice(ways), rng))
        try:
            model = Transformer.load(path.parent)
            ids = torch.zeros(1, 2, dtype=torch.long)
            memory = model.encode(ids) if model.config.arch == "encdec" else None
            model.logits(model(ids, memory=memory))
            outcomes["loaded"] += 1
        except UserError as error:
            assert str(path.parent) in str(error) and len(str(error)) < 600
            outcomes["refused"] += 1
        path.write_bytes(data)
    return outcomes


def test_a_damaged_file_is_refused_or_harmless(tmp_path):
    outcomes = attack(tmp_path, 0, 300)
    assert min(outcomes.values()) > 20, outcomes


def limited(script, *arguments):
    """Run a script that may set limits to itself; five minutes for all, on a busy machine."""
    head = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "import test_model_files as tests\n"
        "def limit(kind, more):\n"
        "    at = 0 if kind == resource.RLIMIT_AS else 5\n"
        "    pages = int(Path('/proc/self/statm').read_text().split()[at])\n"
        "    now = pages * resource.getpagesize()\n"
        "    resource.setrlimit(kind, (now + more, now + more))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", head + script, *arguments], text=True, capture_output=True,
        timeout=300, env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 9))
def test_thousands_of_damaged_files_cost_neither_time_nor_memory(seed, tmp_path):
    """2,000 damages in a process that may take a quarter of a gigabyte more."""
    limited(
        "limit(resource.RLIMIT_AS, 1 << 28)\n"
        "print(tests.attack(Path(sys.argv[1]), int(sys.argv[2]), 2000))\n",
        str(tmp_path), str(seed),
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", SHAPES)
def test_loading_takes_the_memory_of_one_model(kind, tmp_path):
    """And of its mapped file, which Linux counts too: together less than 2.2 times the file."""
    folder = tmp_path / "model"
    wide = replace(
        SHAPES[kind], dim=1024, heads=8, kv_heads=0, head_width=0, vocab_size=3000, ffn_dim=0
    )
    Transformer(wide).save(folder)
    more = 2.2 * (folder / "model.safetensors").stat().st_size
    limited(
        f"limit(resource.RLIMIT_DATA, {int(more)})\ntests.Transformer.load(sys.argv[1])\n",
        str(folder),
    )  # fmt: skip
