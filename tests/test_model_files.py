"""Laws of model_files.py: models are exchanged with transformers, and no file does harm."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from helpers import assert_close, normals, seeds
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from generate import Sampling, generate
from model import ModelConfig, Transformer
from model_files import FAMILIES, ROPE, SCALINGS, read_settings
from run import UserError

FILES = ("config.json", "model.safetensors")
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def transformers():
    library = pytest.importorskip("transformers")
    library.utils.logging.disable_progress_bar()
    library.utils.logging.set_verbosity_error()
    return library


# --- models ---------------------------------------------------------------------------------------


@st.composite
def shapes(draw):
    """The sizes that both families have."""
    return {
        "dim": draw(st.sampled_from([16, 24, 40])),  # in fewer channels LayerNorm divides by little
        "heads": draw(st.sampled_from([1, 2, 4])),
        "layers": draw(st.integers(1, 3)),
        "vocab_size": draw(st.integers(2, 40)),
        "context": draw(st.integers(8, 20)),
        "ffn_dim": draw(st.integers(1, 30)),
        "tied": draw(st.booleans()),
        "norm_eps": draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
        "qk_norm": False,
    }


gpt2s = st.builds(
    lambda shape, activation: ModelConfig(
        **shape, activation=activation, position="learned", norm="layernorm", bias=True
    ),
    shapes(),
    st.sampled_from(["gelu", "gelu_tanh"]),
)
llamas = st.builds(
    lambda shape, kv_heads, **more: ModelConfig(
        **shape, **more, kv_heads=kv_heads if shape["heads"] % max(1, kv_heads) == 0 else 0
    ),
    shapes(),
    st.sampled_from([0, 1, 2]),
    bias=st.booleans(),
    rope_scaling=st.sampled_from(sorted(SCALINGS)),
    rope_base=st.floats(10, 1e6),
    rope_factor=st.floats(1, 10),
    rope_context=st.integers(4, 12),
)
configs = st.one_of(gpt2s, llamas)


def shaken(model, seed):
    """Every weight becomes a normal number, so that none is zero, one or like another."""
    drawn = normals(seed, *(p.shape for p in model.parameters()))
    for p, x in zip(model.parameters(), drawn, strict=True):
        p.data.copy_(0.15 * x.detach() + (p.dim() == 1))
    return model


def theirs(transformers, config, seed):
    """The same shape in transformers, written down by hand."""
    c = config
    if c.position == "learned":
        return shaken(
            transformers.GPT2LMHeadModel(
                transformers.GPT2Config(
                    n_embd=c.dim, n_layer=c.layers, n_head=c.heads, n_positions=c.context,
                    vocab_size=c.vocab_size, n_inner=c.ffn_dim, layer_norm_epsilon=c.norm_eps,
                    tie_word_embeddings=c.tied, bos_token_id=None, eos_token_id=None,
                    activation_function={"gelu": "gelu", "gelu_tanh": "gelu_new"}[c.activation],
                )
            ).eval(), seed,
        )  # fmt: skip
    kind = "default" if c.rope_scaling == "none" else c.rope_scaling
    rope = {"rope_type": kind, "rope_theta": c.rope_base}
    if kind != "default":
        rope["factor"] = c.rope_factor
    if kind == "llama3":
        rope |= {"low_freq_factor": c.rope_low, "high_freq_factor": c.rope_high}
        rope["original_max_position_embeddings"] = c.rope_context
    return shaken(
        transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                hidden_size=c.dim, num_hidden_layers=c.layers, num_attention_heads=c.heads,
                num_key_value_heads=c.kv_heads_or_heads, max_position_embeddings=c.context,
                vocab_size=c.vocab_size, intermediate_size=c.ffn_dim, rms_norm_eps=c.norm_eps,
                tie_word_embeddings=c.tied, attention_bias=c.bias, mlp_bias=c.bias,
                rope_parameters=rope, bos_token_id=None, eos_token_id=None,
            )
        ).eval(), seed,
    )  # fmt: skip


def random_ids(config, seed, *shape):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocab_size, shape, generator=rng)


# --- against transformers -------------------------------------------------------------------------


@given(configs, seeds, st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_logits_and_gradients_are_those_of_transformers(
    transformers, tmp_path_factory, config, seed, dtype
):
    """In fp32, of a folder that transformers wrote, in one file or in many, in 16 bits or 32."""
    folder = tmp_path_factory.mktemp("theirs")
    written = theirs(transformers, config, seed).to(dtype)
    written.save_pretrained(folder, max_shard_size=[4000, "5GB"][seed % 2])
    other = type(written).from_pretrained(folder, dtype=torch.float32)
    model = Transformer.load(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    ids, targets = (random_ids(config, seed + i, 2, config.context) for i in range(2))
    results = []
    for logits in (model.logits(model(ids)), other(ids).logits):
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        results.append(logits)
    assert_close(*results, 1e-5)
    for got, want in zip(gradients(model), their_gradients(other), strict=True):
        assert_close(got, want, 1e-5)


def gradients(model):
    block = model.layers[-1]
    inner = block.attention.key, block.attention.output, block.ffn.up, block.ffn.down
    return [model.embedding.grad, model.norm.weight.grad, *(part.weight.grad for part in inner)]


def their_gradients(model):
    """The same tensors, found by hand."""
    base = model.base_model
    if model.config.model_type == "gpt2":
        h = base.h[-1]
        key = h.attn.c_attn.weight.grad.T.chunk(3)[1]
        inner = [part.weight.grad.T for part in (h.attn.c_proj, h.mlp.c_fc, h.mlp.c_proj)]
        return [base.wte.weight.grad, base.ln_f.weight.grad, key, *inner]
    layer = base.layers[-1]
    inner = layer.self_attn.k_proj, layer.self_attn.o_proj, layer.mlp.up_proj, layer.mlp.down_proj
    return [
        base.embed_tokens.weight.grad, base.norm.weight.grad, *(part.weight.grad for part in inner)
    ]  # fmt: skip


@given(configs, seeds, st.integers(100, 9000))
def test_what_is_written_here_loads_there(transformers, tmp_path_factory, config, seed, shard):
    folder = tmp_path_factory.mktemp("ours") / "model"
    model = shaken(Transformer(config), seed)
    model.save(folder, shard_bytes=shard)
    other, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(info.values()), info
    names = {name for path in folder.glob("*.safetensors") for name in load_file(path)}
    assert names == other.state_dict().keys() - ({"lm_head.weight"} if config.tied else set())
    ids = random_ids(config, seed, 2, config.context)
    assert_close(model.logits(model(ids)), other(ids).logits, 1e-5)
    weights = sum(p.numel() for p in model.parameters())
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (4 * weights > shard)
    assert (other.config.bos_token_id, other.config.eos_token_id) == (None, None)


@given(configs, seeds)
def test_greedy_text_is_that_of_transformers(transformers, tmp_path_factory, config, seed):
    folder = tmp_path_factory.mktemp("theirs")
    other = theirs(transformers, config, seed)
    other.save_pretrained(folder)
    ids = random_ids(config, seed, 1, 3)
    want = other.generate(ids, do_sample=False, max_new_tokens=5)[0, 3:].tolist()
    model = Transformer.load(folder)
    got = generate(model, ids.tolist(), 5, Sampling(greedy=True), set(), 0)
    assert [token for (token,) in got] == want


# --- folders --------------------------------------------------------------------------------------


@given(configs, seeds, st.integers(100, 9000))
def test_what_is_saved_is_loaded_bit_for_bit(tmp_path_factory, config, seed, shard):
    folder = tmp_path_factory.mktemp("ours") / "model"
    model = shaken(Transformer(config), seed)
    model.save(folder, end=1, shard_bytes=shard)
    loaded = Transformer.load(folder)
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(x, after[name]) for name, x in before.items())
    assert all(p.is_contiguous() and p.requires_grad for p in loaded.parameters())
    ids = random_ids(config, seed, 1, config.context)
    assert torch.equal(model(ids), loaded(ids))
    hf = json.loads((folder / "config.json").read_text())
    assert hf["bos_token_id"] == hf["eos_token_id"] == 1
    again = folder.with_name("again")
    loaded.save(again, end=1)
    assert json.loads((again / "config.json").read_text()) == hf


def test_every_setting_has_its_place_in_every_family():
    """Or a new one would be lost in a file, and the model become another."""
    for family in FAMILIES.values():
        placed = {"preset", "kv_heads", *family.settings, *family.always}
        silent = {"rope_base", "rope_scaling", *ROPE}  # of RoPE, which only Llama has
        assert placed | silent == {field.name for field in fields(ModelConfig)}


@pytest.mark.parametrize("kind", FAMILIES)
def test_where_a_config_is_silent_transformers_default_holds(transformers, kind):
    family, default = FAMILIES[kind], transformers.AutoConfig.for_model(kind)
    silent = {theirs: value for theirs, value in family.settings.values() if value}
    assert silent == {theirs: getattr(default, theirs) for theirs in silent}
    for key, value in family.only.items():
        assert getattr(default, key, None) in (None, value)


def test_a_llama_that_says_nothing_of_rope_has_that_of_the_paper(transformers):
    needed = [theirs for theirs, value in FAMILIES["llama"].settings.values() if value is None]
    read = read_settings({"model_type": "llama"} | dict.fromkeys(needed, 8), Path("config.json"))
    want = {"rope_type": "default", "rope_theta": read["rope_base"]}
    assert read["rope_scaling"] == "none" and transformers.LlamaConfig().rope_parameters == want


@given(gpt2s, seeds)
def test_gpt_2_as_first_released_is_the_same(tmp_path_factory, config, seed):
    """Without "transformer." before its names, with masks among its weights, head and all."""
    folder = tmp_path_factory.mktemp("ours") / "model"
    model = shaken(Transformer(config), seed)
    model.save(folder)
    path = folder / "model.safetensors"
    old = {name.removeprefix("transformer."): x for name, x in load_file(path).items()}
    for layer in range(config.layers):
        old[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8)
        old[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    old["lm_head.weight"] = model.head_weight.detach().clone()
    save_file(old, path)
    assert_same(Transformer.load(folder), model)


@given(llamas, seeds)
def test_llama_as_before_transformers_5_is_the_same(tmp_path_factory, config, seed):
    """With rope_theta and rope_scaling, "type" in it, and the frequencies among the weights."""
    folder = tmp_path_factory.mktemp("ours") / "model"
    model = shaken(Transformer(config), seed)
    model.save(folder)
    hf = json.loads((folder / "config.json").read_text())
    rope = hf.pop("rope_parameters")
    hf["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    hf["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    (folder / "config.json").write_text(json.dumps(hf))
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, folder / "model.safetensors")
    assert_same(Transformer.load(folder), model)


def assert_same(one, two):
    ids = random_ids(two.config, 0, 2, two.config.context)
    assert torch.equal(one.logits(one(ids)), two.logits(two(ids)))


def test_loading_draws_nothing_and_holds_no_view_of_the_file(tmp_path, monkeypatch):
    LLAMA.save(tmp_path / "model")
    monkeypatch.setattr("model.initialize", None)
    loaded = Transformer.load(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    assert_same(loaded, LLAMA)


# --- what cannot be written -----------------------------------------------------------------------

SMALL = ModelConfig(dim=16, layers=2, heads=4, kv_heads=2, vocab_size=11, context=8, qk_norm=False)
LLAMA = shaken(Transformer(SMALL), 0)
GPT2 = shaken(
    Transformer(
        replace(
            SMALL, kv_heads=0, position="learned", norm="layernorm", activation="gelu", bias=True
        )
    ),
    0,
)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"qk_norm": True}, "a llama file: qk_norm True"),
        ({"norm": "layernorm"}, "a llama file: norm 'layernorm'"),
        ({"activation": "gelu"}, "a llama file: activation 'gelu'"),
        ({"position": "none"}, "a gpt2 file: "),
        ({"position": "learned", "norm": "layernorm", "activation": "gelu"}, "kv_heads 2"),
    ],
)
def test_a_model_that_has_no_counterpart_is_not_written(change, named, tmp_path):
    with pytest.raises(UserError, match=named):
        Transformer(replace(SMALL, **change)).save(tmp_path / "model")
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
        save_file(weights, path)

    return changed


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
    "another family": (edit(model_type="bert"), "model_type 'bert' is not supported, only"),
    "a family that is a list": (edit(model_type=["llama"]), "model_type"),
    "no family": (edit(model_type=...), "model_type None"),
    "no width": (edit(hidden_size=...), "hidden_size cannot be None"),
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
    "a head of another width": (edit(head_dim=8), "head_dim 8 is not supported, only 4"),
    "another activation": (edit(hidden_act="gelu"), "hidden_act 'gelu' is not supported, only"),
    "half its biases": (edit(mlp_bias=True), "mlp_bias True is not supported, only false"),
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
    "infinity": (tensors(lambda t: t[K].view(-1)[:1].fill_(torch.inf)), f"{K} .* is not finite"),
    "two heads": (
        tensors(lambda t: t.update({"lm_head.weight": torch.ones(11, 16)})), "is not the embedding"
    ),
    # the index
    "no table": (index(lambda home, f: [1]), "weight_map is no table"),
    "a shard that is missing": (index(moved), "there is no file .*/model-0"),
    "a shard outside": (index(lambda home, f: home | {K: "../x.safetensors"}), "cannot stand in"),
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


@pytest.mark.parametrize(
    "change, named",
    [
        (edit(scale_attn_by_inverse_layer_idx=True), "only false"),
        (edit(scale_attn_weights=False), "only true"),
        (edit(add_cross_attention=True), "add_cross_attention"),
        (edit(activation_function="relu"), "activation_function 'relu'"),
        (edit(n_inner=65), "ffn.down.weight is .16, 64., not .16, 65."),
        (edit(n_positions=2**28 - 1), "position.table is .8, 16., not .268435455, 16."),
        (
            tensors(lambda t: t.update({"transformer.h.0.attn.c_attn.bias": torch.ones(16)})),
            "attention.key.bias is .6,., not .16,.",
        ),
    ],
)
def test_a_gpt_2_that_cannot_be_read_gets_one_sentence(change, named, tmp_path):
    folder = tmp_path / "model"
    GPT2.save(folder)
    change(folder)
    with pytest.raises(UserError, match=named) as caught:
        Transformer.load(folder)
    assert str(folder) in str(caught.value)


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
    for number, (model, most) in enumerate([(LLAMA, 4000), (LLAMA, 10**6), (GPT2, 10**6)]):
        models.append(folder / str(number))
        model.save(models[-1], shard_bytes=most)
    for _ in range(count):
        path = rng.choice(sorted(rng.choice(models).iterdir()))
        data = path.read_bytes()
        ways = ["bit", "cut", "put"] + ["json"] * (2 * (path.suffix == ".json"))
        path.write_bytes(damaged(data, rng.choice(ways), rng))
        try:
            model = Transformer.load(path.parent)
            model.logits(model(torch.zeros(1, 2, dtype=torch.long)))
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
    """Run a script that may set limits to itself; half a minute for the imports, then two more."""
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
        timeout=150, env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
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
@pytest.mark.parametrize("model", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_loading_takes_the_memory_of_one_model(model, tmp_path):
    """And of its mapped file, which Linux counts too: together less than 2.2 times the file."""
    folder = tmp_path / "model"
    Transformer(replace(model.config, dim=1024, heads=8, kv_heads=0, vocab_size=9000)).save(folder)
    more = 2.2 * (folder / "model.safetensors").stat().st_size
    limited(
        f"limit(resource.RLIMIT_DATA, {int(more)})\ntests.Transformer.load(sys.argv[1])\n",
        str(folder),
    )  # fmt: skip
