"""Laws of heads.py: each is its equation, BERT's are those of transformers, all learn."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import array, assert_close, normals, seeds
from hypothesis import given
from hypothesis import strategies as st
from models import CONFIGS, MODELS, SHAPES, Batch, edit, put, random_ids, shaken, tensors
from safetensors.torch import load_file

from heads import (
    HEADS,
    Classifier,
    MaskedHead,
    NextSentenceHead,
    Pooler,
    ScalarHead,
    last,
    load_heads,
)
from model import Transformer
from run import UserError

BERT, SHAPE = MODELS["bert"], SHAPES["bert"]
CLASSES = {
    "BertForPreTraining": {"masked", "next_sentence", "pooler"},
    "BertForMaskedLM": {"masked"},
    "BertForNextSentencePrediction": {"next_sentence", "pooler"},
    "BertModel": {"pooler"},
}


@pytest.fixture(scope="module")
def transformers():
    library = pytest.importorskip("transformers")
    library.utils.logging.disable_progress_bar()
    library.utils.logging.set_verbosity_error()
    return library


def all_heads(config, seed):
    heads = torch.nn.ModuleDict({name: make(config, seed) for name, make in HEADS.items()})
    return shaken(heads, seed)


# --- equations ------------------------------------------------------------------------------------


@given(CONFIGS["bert"], seeds)
def test_each_head_is_its_equation(config, seed):
    """In float64, one text and one token at a time."""
    C = config.dim
    hidden, E = normals(seed, (2, 3, C), (config.vocab_size, C))
    h, e = array(hidden), array(E)
    heads = all_heads(config, seed).double()
    w, b = (array(p) for p in heads["pooler"].parameters())
    assert_close(heads["pooler"](hidden), np.tanh(h[:, 0] @ w.T + b))
    p = {name: array(x) for name, x in heads["masked"].named_parameters()}
    bend = {
        "gelu": lambda x: x / 2 * (1 + np.vectorize(math.erf)(x / 2**0.5)),
        "gelu_tanh": lambda x: x / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))),
        "relu": lambda x: np.maximum(x, 0),
    }[config.activation]
    inner = bend(h @ p["dense.weight"].T + p["dense.bias"])
    inner = inner - inner.mean(-1, keepdims=True)
    inner = inner / np.sqrt((inner**2).mean(-1, keepdims=True) + config.norm_eps)
    want = (inner * p["norm.weight"] + p["norm.bias"]) @ e.T + p["bias"]
    assert_close(heads["masked"](hidden, E), want, 1e-11)
    for head, rows in ((Classifier(config, 5), 5), (NextSentenceHead(config), 2)):
        w, b = (array(x) for x in shaken(head.double(), seed).parameters())
        assert w.shape == (rows, C)
        assert_close(head(hidden), h @ w.T + b)
    scalar = shaken(ScalarHead(config).double(), seed)
    w, b = (array(x) for x in scalar.parameters())
    assert_close(scalar(hidden), (h @ w.T + b)[..., 0])
    assert_close(
        scalar(last(hidden, torch.tensor([1, 3]))),
        [(h[i, t] @ w.T + b)[0] for i, t in ((0, 0), (1, 2))],
    )


def test_scores_have_32_bits_whatever_the_states_have():
    h, E = (x.detach() for x in normals(0, (5, 16), (11, 16)))
    head = shaken(MaskedHead(SHAPE), 0)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert head(h.to(dtype), E).dtype == torch.float32
    assert head.double()(h, E).dtype == torch.float64


@given(seeds)
def test_what_a_head_starts_as_depends_on_its_seed_and_name_alone(seed):
    for make in (Pooler, MaskedHead, NextSentenceHead, ScalarHead):
        one, two, other = make(SHAPE, seed), make(SHAPE, seed), make(SHAPE, seed + 1)
        for p, q, r in zip(*(head.parameters() for head in (one, two, other)), strict=True):
            assert torch.equal(p, q) and torch.equal(p, r) == (p.dim() == 1)
    assert not torch.equal(Pooler(SHAPE, seed).dense.weight, MaskedHead(SHAPE, seed).dense.weight)


def test_matrices_are_drawn_with_the_variance_that_is_said():
    wide = replace(SHAPE, dim=400)
    drawn = torch.cat([ScalarHead(wide, seed).dense.weight.flatten() for seed in range(50)])
    assert abs(drawn.var() * 401 - 1) < 0.05 and abs(drawn.mean() * 20) < 0.05
    assert abs(Pooler(wide).dense.weight.var() * 400 - 1) < 0.05


def test_a_head_learns_through_the_model_that_it_is_attached_to():
    """A value head and its model fit a number that depends on the first token, for every token."""
    model, head = Transformer(SHAPES["llama"]), ScalarHead(SHAPES["llama"])
    ids = random_ids(model.config, 0, 32, 4)
    want = (ids[:, :1] % 2).float().expand(ids.shape)
    adam = torch.optim.Adam([*model.parameters(), *head.parameters()], 2e-2)
    for _ in range(120):
        loss = (head(model(ids)) - want).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert loss < 0.01


# --- against transformers -------------------------------------------------------------------------


def theirs(transformers, name, c, seed):
    none = dict.fromkeys(["bos_token_id", "eos_token_id", "pad_token_id"])
    config = transformers.BertConfig(
        hidden_size=c.dim, num_hidden_layers=c.layers, num_attention_heads=c.heads,
        intermediate_size=c.ffn_dim, max_position_embeddings=c.context, vocab_size=c.vocab_size,
        type_vocab_size=c.segments, layer_norm_eps=c.norm_eps,
        hidden_act={"gelu_tanh": "gelu_new"}.get(c.activation, c.activation), **none,
    )  # fmt: skip
    return shaken(getattr(transformers, name)(config).eval(), seed)


def scores(heads, model, hidden):
    """What each head says, in the order of transformers' outputs."""
    pooled = heads["pooler"](hidden) if "pooler" in heads else None
    out = [heads["masked"](hidden, model.head_weight)] if "masked" in heads else []
    return out + (
        [heads["next_sentence"](pooled)] if "next_sentence" in heads else [pooled] * (not out)
    )


@given(st.sampled_from(sorted(CLASSES)), CONFIGS["bert"], seeds)
def test_scores_and_gradients_are_those_of_transformers(
    transformers, tmp_path_factory, name, config, seed
):
    """Of each class that has such heads; then the folder is written here and read there."""
    folder = tmp_path_factory.mktemp("bert")
    other = theirs(transformers, name, config, seed)
    other.save_pretrained(folder / "theirs")
    model, heads = Transformer.load(folder / "theirs"), load_heads(folder / "theirs")
    assert set(heads) == CLASSES[name]
    batch = Batch(config, seed)
    there = batch.there.long()
    ours = scores(heads, model, model(batch.ids, mask=batch.mask, segments=batch.segments))
    hf = other(batch.ids, there, batch.segments)
    names = {"BertForPreTraining": ["prediction_logits", "seq_relationship_logits"]}
    want = [
        hf[key] for key in names.get(name, ["pooler_output" if name == "BertModel" else "logits"])
    ]
    for one, two in zip(ours, want, strict=True):
        kept = batch.there if one.dim() == 3 else slice(None)
        assert_close(one[kept], two[kept], 1e-5)
        one[kept].square().mean().backward(retain_graph=True)
        two[kept].square().mean().backward(retain_graph=True)
    grad = other.get_input_embeddings().weight.grad
    assert_close(model.embedding.grad, grad, 1e-5)
    model.save(folder / "ours", heads=heads)
    again, info = type(other).from_pretrained(folder / "ours", output_loading_info=True)
    assert again.config.architectures == [name] and not any(info.values()), info
    for key, x in other.state_dict().items():
        assert torch.equal(x, again.state_dict()[key])


@given(CONFIGS["bert"], seeds)
def test_heads_are_saved_and_loaded_bit_for_bit(tmp_path_factory, config, seed):
    folder = tmp_path_factory.mktemp("ours") / "model"
    model, heads = shaken(Transformer(config), seed), all_heads(config, seed)
    model.save(folder, shard_bytes=3000, heads=heads)
    assert len(list(folder.glob("*.safetensors"))) > 1
    loaded = load_heads(folder).state_dict()
    assert loaded.keys() == heads.state_dict().keys()
    assert all(torch.equal(x, loaded[name]) for name, x in heads.state_dict().items())
    body = Transformer.load(folder).state_dict()
    assert all(torch.equal(x, body[name]) for name, x in model.state_dict().items())


# --- what cannot be -------------------------------------------------------------------------------

BIAS = "cls.predictions.bias"


@pytest.mark.parametrize(
    "change, named",
    [
        (tensors(lambda t: t.pop(BIAS)), "masked.bias is None, not .11,."),
        (put(BIAS, 12), "masked.bias is .12,., not .11,."),
        (put("cls.seq_relationship.weight", 3, 16), "next_sentence.dense.weight is .3, 16."),
        (put("cls.predictions.decoder.bias", 11), "decoder.bias is not the masked.bias"),
        (put("cls.other.weight", 1, 1), "'cls.other.weight' is no tensor of such a model"),
        (edit(hidden_size=32), "masked.dense.bias is .16,., not .32,."),
        (edit(vocab_size=12), "masked.bias is .11,., not .12,."),
        (edit(model_type="gpt2", n_embd=16, n_head=4, n_layer=2, n_positions=8), "no tensor of"),
        (tensors(lambda t: [t.pop(n) for n in [*t] if "cls" in n or "pool" in n]), "has no head"),
    ],
)  # fmt: skip
def test_heads_that_cannot_be_read_get_one_sentence(change, named, tmp_path):
    folder = tmp_path / "model"
    BERT.save(folder, heads=all_heads(SHAPE, 0))
    change(folder)
    with pytest.raises(UserError, match=named) as caught:
        load_heads(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_heads_that_transformers_has_no_model_for_are_not_written(tmp_path):
    heads = all_heads(SHAPE, 0)
    del heads["pooler"]
    with pytest.raises(UserError, match="no model with the heads masked and next_sentence alone"):
        BERT.save(tmp_path / "model", heads=heads)
    with pytest.raises(UserError, match="no place for masked"):
        MODELS["gpt2"].save(tmp_path / "model", heads=heads)
    assert not list(tmp_path.iterdir())


def test_a_model_without_heads_has_none_in_its_files(tmp_path):
    BERT.save(tmp_path / "model")
    names = load_file(tmp_path / "model" / "model.safetensors")
    assert not any("cls." in name or "pooler" in name for name in names)
