"""Quantizing whole models: in order, by what each layer sees, and into runs that others load."""

import copy
import json
import math
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from helpers import seeds
from hypothesis import given
from hypothesis import strategies as st
from models import MODELS, SHAPES, random_ids, shaken
from test_train import end_of, folder, run  # noqa: F401
from torch import nn

import quant
import writer
from adapters import adapt
from attention import ATTENTIONS
from calibrate import (
    CALIBRATED,
    METHODS,
    READ_BY,
    Inputs,
    Method,
    in_order,
    inputs_of,
    quantize,
)
from calibrate import run_hooked as hooked
from gptq import gptq, round_to_nearest
from lora import Adapter, adapted, exchange, linears
from model import Transformer
from objectives import Batch
from quantized import Int8Linear, PackedLinear, packed, quantized
from recompute import LiveBytes
from run import Run, UserError
from step import loss_sum


def texts(config, seed=0, count=3, rows=4):
    """Batches of random ids for any architecture."""
    found = []
    for n in range(count):
        ids, targets, source = (random_ids(config, seed + 10 * n + i, rows, 8) for i in range(3))
        lo, all = torch.zeros_like(ids), torch.full_like(ids, 7)
        more = {"source": source, "source_lo": lo, "source_hi": all, "cross_lo": lo,
                "cross_hi": all}  # fmt: skip
        hi = all if config.arch == "encoder" else None
        batch = Batch(ids, targets, lo, hi, **(more if config.arch == "encdec" else {}))
        found.append(batch)
    return found


def drawn(config, seed=0):
    return shaken(Transformer(config, seed), seed)


def how_for(name, **more):
    """Whole rows; of more what the method looks at."""
    more = {"group": 0} | more
    return Method(name, **{key: x for key, x in more.items() if name in READ_BY[key]})


# --- every architecture ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", METHODS)
def test_every_linear_of_every_architecture_is_quantized(kind, name):
    """Nothing else changes; and 8 bits of any kind change little."""
    model, batches = drawn(SHAPES[kind]), texts(SHAPES[kind], count=8)
    before = {n: x.clone() for n, x in model.state_dict().items()}
    nats = loss_sum(model, batches[0])
    layers = quantize(model, how_for(name, bits=8), batches)
    assert set(quantized(model)) == set(linears(model)) == {layer.name for layer in layers}
    assert all(isinstance(m, Int8Linear | PackedLinear) for m in quantized(model).values())
    for n, x in model.state_dict().items():
        if n in before and not n.startswith(tuple(f"{q}." for q in quantized(model))):
            assert torch.equal(x, before[n])
    assert 0 < abs(loss_sum(model, batches[0]) - nats) < 0.2 * nats
    assert max(layer.error for layer in layers) < (0.03 if name == "nf4" else 5e-3)


def test_linears_are_taken_as_they_compute():
    """Those that read the same tensor have one Hessian; an encoder comes before its decoder."""
    found = in_order(drawn(SHAPES["llama"]), texts(SHAPES["llama"])[0])
    block = [["attention.query", "attention.key", "attention.value"], ["attention.output"],
             ["ffn.up", "ffn.gate"], ["ffn.down"]]  # fmt: skip
    assert found == [[f"layers.{i}.{n}" for n in names] for i in (0, 1) for names in block]
    found = in_order(drawn(SHAPES["t5"]), texts(SHAPES["t5"])[0])
    order = [names[0] for names in found]
    assert sum(map(len, found)) == len(linears(drawn(SHAPES["t5"])))
    assert order.index("encoder.layers.1.ffn.down") < order.index("layers.0.attention.query")
    both = [f"layers.{i}.cross.{n}" for i in (0, 1) for n in ("key", "value")]
    assert both in found  # all read what the encoder says


@given(seeds, st.sampled_from(["gptq", "obq"]), st.sampled_from(["llama", "bert", "t5"]))
def test_each_layer_sees_what_the_quantized_ones_make_of_the_texts(seed, name, kind):
    """True-sequential, against whole forward passes of a model exchanged by hand."""
    config = SHAPES[kind]
    model, batches = drawn(config, seed), texts(config, seed)
    by_hand = copy.deepcopy(model)
    how = how_for(name, bits=3)
    quantize(model, how, batches)
    for names in in_order(by_hand, batches[0]):
        seen = []
        hooked(by_hand, names[:1], batches, lambda _, x, seen=seen: seen.append(x.flatten(0, 1)))
        X = torch.cat(seen).double().detach()
        for n in names:
            inputs = Inputs(X.shape[1], X.device)
            inputs.hessian.sum, inputs.hessian.inputs = X.T @ X, len(X)
            exchange(by_hand, n, METHODS[name](by_hand.get_submodule(n), inputs, how))
            one, two = by_hand.get_submodule(n), model.get_submodule(n)
            apart = (one.numbers() != two.numbers()).float().mean()
            assert apart < 0.02, n  # sums in another order may turn a tie
        exchange(by_hand, names[0], model.get_submodule(names[0]))


def test_only_one_layer_s_hessian_is_held():
    """A model of twice the layers takes no more beside itself."""
    peaks = []
    for layers in (1, 4):
        config = replace(SHAPES["llama"], dim=64, layers=layers, heads=4)
        model, batches = drawn(config), texts(config, count=8)
        own = packed(copy.deepcopy(model))[0]
        with LiveBytes() as live:
            quantize(model, how_for("gptq"), batches)
        peaks.append(live.peak - sum(x.nbytes for x in packed(model)[0].values()))
        assert own
    assert peaks[1] < 1.3 * peaks[0]


# --- methods --------------------------------------------------------------------------------------


def correlated(seed, kind="llama"):
    """A model whose inputs are as unevenly spread as trained ones are."""
    config = replace(SHAPES[kind], dim=32, ffn_dim=48)
    model = drawn(config, seed)
    model.embedding.data *= torch.logspace(0.5, -1.5, 32)
    return model, texts(config, seed, 16, 8)


@pytest.mark.parametrize("bits", [3, 4])
def test_gptq_does_better_than_the_nearest_codes(bits):
    ratios = []
    for seed in range(3):
        model, batches = correlated(seed)
        layers = quantize(model, how_for("gptq", bits=bits), batches)
        ratios += [layer.error / layer.nearest for layer in layers]
    assert sum(ratios) / len(ratios) < 0.9 and max(ratios) < 1.1


def test_nearest_codes_need_no_text_and_say_the_same_with_some():
    model, batches = correlated(0)
    other = copy.deepcopy(model)
    assert quantize(model, how_for("rtn")) == []
    found = quantize(other, how_for("rtn"), batches)
    assert all(layer.error == pytest.approx(layer.nearest) for layer in found)
    one, two = packed(model), packed(other)
    assert one[1] == two[1] and all(torch.equal(x, two[0][n]) for n, x in one[0].items())


@given(seeds)
def test_the_largest_input_is_that_of_all_texts(seed):
    x = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(seed))
    inputs = Inputs(5, x.device)
    for batch in x.split(2):
        inputs.add(batch)
    assert torch.equal(inputs.largest, x.abs().amax((0, 1)))


@given(seeds)
def test_outliers_are_the_features_that_reach_six(seed):
    model, batches = correlated(seed)
    model.embedding.data[:, 3] += 5
    names = in_order(model, batches[0])
    seen = inputs_of(model, names[0][0], batches)
    quantize(model, Method("llm-int8"), batches)
    first = model.get_submodule(names[0][0])
    assert torch.equal(first.columns, (seen.largest >= 6).nonzero()[:, 0])
    assert model.get_submodule(names[0][1]).columns.tolist() == first.columns.tolist()


def test_settings_reach_the_layer():
    model, batches = correlated(0)
    quantize(model, Method("gptq", 3, 16, symmetric=True, act_order=True, damping=0.1), batches)
    linear = model.layers[0].ffn.down
    assert (linear.how.bits, linear.how.group, linear.how.symmetric) == (3, 16, True)
    model, batches = correlated(0)
    quantize(model, Method("llm-int8", dynamic=True))  # each batch will say itself: no texts
    assert all(m.how.dynamic and not len(m.columns) for m in quantized(model).values())
    model, batches = correlated(0)
    plain = model.layers[0].attention.query
    H = inputs_of(model, "layers.0.attention.query", batches).hessian.value()
    want = gptq(plain.dense(), H, Method("gptq", 3, 16, True).packed(32).grid, "act", damp=0.1)
    quantize(model, Method("gptq", 3, 16, symmetric=True, act_order=True, damping=0.1), batches)
    assert torch.equal(model.layers[0].attention.query.numbers(), want.codes)
    assert not torch.equal(want.codes, round_to_nearest(plain.dense(), H, want.grid).codes)


def test_a_group_that_does_not_divide_becomes_the_next_that_does():
    assert Method("rtn", 4, 64).packed(344).group == 43
    assert Method("rtn", 4, 64).packed(128).group == 64
    assert Method("rtn", 4, 64).packed(37).group == 37  # a whole row
    with pytest.raises(UserError, match="groups of 64 do not divide its 79 input features"):
        Method("rtn", 4, 64).packed(79)


# --- what cannot be done --------------------------------------------------------------------------


class Odd(nn.Module):
    """It has a matrix, but nobody knows of what kind."""

    def dense(self):
        return torch.ones(2, 2)


def refused(model, how, batches, said):
    with pytest.raises(UserError, match=said):
        quantize(model, how, batches)


def test_what_cannot_be_quantized_is_told():
    model, batches = correlated(0)
    refused(model, Method("gptq"), [], "calibration has 0 tokens, and a layer 48")
    refused(model, Method("llm-int8"), texts(model.config, 0, 1, 2), "has 16 tokens")
    quantize(model, how_for("rtn"))
    refused(model, how_for("rtn"), [], "quantized already")
    model, _ = correlated(0)
    model.layers[0].ffn.up = Odd()
    refused(model, how_for("rtn"), [], "layers.0.ffn.up is a Odd, which")
    model, _ = correlated(0)
    adapt(model, Adapter("lora"))
    refused(model, how_for("rtn"), [], "has adapters")
    model, _ = correlated(0)
    odd = drawn(replace(SHAPES["llama"], ffn_dim=47))
    refused(
        odd, Method("rtn", group=16), [], "layers.0.ffn.down: groups of 16 do not divide its 47"
    )
    model.layers[1].ffn.up.weight.data[0, 0] = torch.nan
    refused(model, how_for("rtn"), [], "layers.1.ffn.up: .*NaN")
    model, batches = correlated(0)
    model.embedding.data[:] = 0
    refused(model, how_for("gptq"), batches, "layers.0.attention.query: all calibration inputs")
    model.embedding.data[:] = torch.inf
    refused(model, how_for("obq"), batches, "infinite or NaN")
    for more in ({"bits": 1}, {"bits": 9}, {"group": -1}):
        with pytest.raises(UserError, match="a code has 2 to 8 bits"):
            Method("rtn", **more)
    for damping in (-0.1, 2.0, math.nan):
        with pytest.raises(UserError, match=r"--damping .* must be from 0 to 1"):
            Method("gptq", damping=damping)


@pytest.mark.parametrize("name", METHODS)
def test_settings_that_a_method_does_not_look_at_are_refused(name):
    others = {"bits": 3, "group": 32, "symmetric": True, "act_order": True, "dynamic": True,
              "damping": 0.1}  # fmt: skip
    assert others.keys() == READ_BY.keys() == {f.name for f in fields(Method)} - {"method"}
    for key, value in others.items():
        if name in READ_BY[key]:
            assert getattr(Method(name, **{key: value}), key) == value
        else:
            with pytest.raises(UserError, match=f"{name} has no --{key.replace('_', '-')}"):
                Method(name, **{key: value})


# --- runs -----------------------------------------------------------------------------------------

TRAIN = ["--model.dim", "32", "--model.heads", "2", "--model.layers", "2", "--model.context", "16",
         "--tokenizer.kind", "bytes", "--data.path", "text", "--batch", "4", "--device", "cpu",
         "--dtype", "float32", "--name", "base"]  # fmt: skip
SAVE = ["save", "--run", "base", "--name", "small", "--device", "cpu"]


@pytest.fixture
def base(folder):  # noqa: F811
    assert run("train.py", *TRAIN, "--steps", "12")[0] == 0
    return folder


def said(name):
    model = writer.load(Run.open(name), torch.device("cpu")).model
    with torch.no_grad():
        return model.logits(model(torch.arange(12)[None]))


@pytest.mark.parametrize("name", METHODS)
def test_a_quantized_run_is_a_run(base, name):
    """Saved, loaded to the bit, generated from; small; twice the same."""
    how = how_for(name, bits=3, group=16)
    flags = ["--method", name, "--bits", str(how.bits), "--group", str(how.group)]
    status, _, err = run("quant.py", *SAVE, *flags)
    assert status == 0, err
    it = quant.subject(quant.OfRun("base", device="cpu"))
    quantize(it.writer.model, how, it.batches)
    with torch.no_grad():
        want = it.writer.model.logits(it.writer.model(torch.arange(12)[None]))
    assert torch.equal(said("small"), want) and not torch.equal(said("base"), want)
    tensors = end_of("small")[1]["model"]
    theirs, kinds = packed(it.writer.model)
    assert all(torch.equal(x, tensors[n]) for n, x in theirs.items())
    assert len(tensors) == len(theirs) and len(kinds) == 14
    once, again = (run("generate.py", "--run", "small", "--samples", "1") for _ in range(2))
    assert once[0] == 0 and once == again


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_a_run_of_every_attention_says_what_its_weights_say(folder, kind):  # noqa: F811
    """Loaded, and loaded again when it is quantized."""
    assert run("train.py", *TRAIN, "--steps", "1", "--model.attention", kind)[0] == 0
    model = Transformer(writer.model_of(Run.open("base")), seed=None)
    model.load_state_dict(end_of("base")[1]["model"])
    with torch.no_grad():
        assert torch.equal(said("base"), model.logits(model(torch.arange(12)[None])))
        status, _, err = run("quant.py", *SAVE, "--method", "rtn", "--group", "16")
        assert status == 0, err
        quantize(model, Method("rtn", group=16))
        assert torch.equal(said("small"), model.logits(model(torch.arange(12)[None])))


def test_fewer_texts_are_measured_by_their_own_bytes(folder):  # noqa: F811
    assert run("train.py", *TRAIN, "--steps", "2", "--data.held-out", "0.4")[0] == 0
    it = quant.subject(quant.OfRun("base", device="cpu"))
    corpus, model = it.training.corpus, it.writer.model
    size = corpus.meta["held"]["bytes"]
    texts = [corpus.tokenizer.decode(corpus.held.document(i)[1:].tolist()).encode()
             for i in range(len(corpus.held))]  # fmt: skip
    assert sum(map(len, texts)) == size and len(texts) > 1
    assert quant.shorter(corpus, 10 * size).meta == corpus.meta
    whole, sums = it.measured(model), []
    for i in range(len(texts)):
        it.training.corpus = part = quant.shorter(corpus, sum(map(len, texts[: i + 1])))
        assert len(part.held) == i + 1
        for j in range(i + 1):
            assert part.held.document(j).tolist() == corpus.held.document(j).tolist()
        sums.append(it.measured(model) * part.meta["held"]["bytes"])
    assert sums == sorted(sums) and sums[-1] == pytest.approx(whole * size)
    assert len(corpus.held) == len(texts)  # which is not cut itself


def test_a_quantized_run_is_no_other_s_base_but_an_adapter_s(base):
    assert run("quant.py", *SAVE, "--method", "gptq", "--group", "0")[0] == 0
    for words, told in [
        (["train.py", "--resume", "--name", "small"], "was not made by train.py"),
        (["quant.py", "save", "--run", "small", "--name", "again"], "quantized already"),
        (["train.py", *TRAIN[8:], "--base", "small", "--name", "x"], "of small cannot be trained"),
    ]:
        status, _, err = run(*words)
        assert status == 2 and err.count("\n") == 1 and told in err, err
    words = ["--base", "small", "--adapter.kind", "lora", "--name", "adapted", "--steps", "3"]
    status, _, err = run("train.py", *TRAIN[8:-2], *words)
    assert status == 0, err
    model = writer.load(Run.open("adapted"), torch.device("cpu")).model
    assert len(adapted(model)) == 4 and len(quantized(model)) == 14
    assert not torch.equal(said("adapted"), said("small"))


def test_damage_to_a_quantized_run_is_found(base):
    assert run("quant.py", *SAVE, "--method", "rtn", "--group", "16")[0] == 0
    path = Run.open("small").newest() / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    status, _, err = run("generate.py", "--run", "small")
    assert status == 2 and "model.safetensors is not what manifest.json says" in err


def test_what_no_run_can_be_is_told(base):
    for words, told in [
        (["--run", "none"], "there is no run named 'none'"),
        (["--run", "base", "--calibration", "0", "--method", "gptq"], "has 0 tokens"),
        (["--run", "base", "--calibration", "-1"], "--calibration -1 must be"),
        (["--run", "base", "--bits", "9"], "a code has 2 to 8 bits"),
        (["--run", "base", "--method", "nf4", "--bits", "3"], "nf4 has no --bits"),
        (["--run", "base", "--damping", "2"], "--damping 2.0 must be from 0 to 1"),
    ]:
        status, _, err = run("quant.py", "save", "--device", "cpu", *words)
        assert status == 2 and err.count("\n") == 1 and told in err, err
    assert not [p for p in Path("runs").iterdir() if p.name not in ("base", "cache")]
    Path("text/00.txt").write_text("another text, with other words in it")
    status, _, err = run("quant.py", *SAVE)
    assert status == 2 and "no longer" in err, err


def test_what_is_saved_is_checked_before_a_model_is_loaded():
    for more in ({"bits": 1}, {"group": -3}, {"calibration": -1}):
        with pytest.raises(UserError):
            quant.Save(**more)


def test_the_ladder_may_be_climbed_from_any_rung(base):
    words = ["ladder", "--run", "base", "--device", "cpu"]
    status, _, err = run("quant.py", *words, "--rows", "int8", "fp32")
    assert status == 0, err
    for more, told in ((["--rows"], "--rows must name at least one"),
                       (["--group", "-3"], "a group of weights")):  # fmt: skip
        status, _, err = run("quant.py", *words, *more)
        assert status == 2 and err.count("\n") == 1 and told in err, err


def test_the_ladder_and_the_demo_show_a_table_and_a_picture(base):
    rows = ["fp32", "bf16", "int8", "int8, zero point", "LLM.int8", "nearest 4", "GPTQ 3, groups"]
    status, out, err = run("quant.py", "ladder", "--run", "base", "--rows", *rows,
                           "--group", "16", "--device", "cpu")  # fmt: skip
    assert status == 0, err
    assert (Run.open("base").folder / "ladder.png").stat().st_size > 10_000
    lines = {line.split("  ")[0].strip(): line.split() for line in out.split("\n\n")[1].split("\n")}
    assert set(rows) <= set(lines) and lines["fp32"][1] == "32.00" and lines["bf16"][1] == "16.00"
    status, _, err = run("quant.py", "ladder", "--rows", "int7")
    assert status == 2 and "'int7' is none of fp32" in err
    status, out, err = run("quant.py", "demo", "--run", "base", "--device", "cpu")
    assert status == 0 and "4 bits, gptq, groups" in out, err
    status, _, err = run("quant.py", "stairs")
    assert status == 2 and "choose among demo, save, ladder, outliers" in err


# --- outliers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "qwen3"])
def test_planted_outliers_change_nothing_but_for_integers(kind):
    """By a power of two no bit; then bytes lose what is small, and LLM.int8 hardly anything."""
    config = replace(SHAPES[kind], dim=64, head_width=0)
    model, batches = drawn(config), texts(config, count=8)
    for p in model.parameters():
        p.data /= 1 if p.dim() == 1 else 3
    before = [loss_sum(model, batch) for batch in batches]
    quant.plant(model, [5, 17], 64.0)
    assert all(torch.equal(loss_sum(model, b), x) for b, x in zip(batches, before, strict=True))
    shown = quant.magnitudes(model, batches)
    assert all((x[[5, 17]] > 6).all() for n, x in shown.items() if n.endswith(("query", "up")))
    apart = {}
    for name in ("int8", "llm-int8"):
        quantize(made := copy.deepcopy(model), Method(name), batches)
        apart[name] = max(abs(loss_sum(made, b) - x) for b, x in zip(batches, before, strict=True))
    assert apart["int8"] > 5 * apart["llm-int8"]
    with pytest.raises(UserError, match="outliers need --order pre"):
        quant.plant(drawn(SHAPES["bert"]), [1], 64.0)


def test_the_outliers_command_shows_both(base):
    words = ["outliers", "--run", "base", "--device", "cpu"]
    status, out, err = run("quant.py", *words)
    assert status == 0, err
    assert (Run.open("base").folder / "outliers.png").stat().st_size > 10_000
    assert "of the inputs' values" in out
    status, _, err = run("quant.py", *words, "--calibration", "0")
    assert status == 2 and "give a --calibration of at least 1" in err


def test_methods_say_which_need_texts():
    assert set(CALIBRATED) < set(METHODS) == set(json.loads(json.dumps([*METHODS])))
