"""Laws of scaling.py: what is counted on paper is what a model has, and what the papers printed."""

import io
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from decimal import Decimal
from typing import Literal, get_args, get_origin, get_type_hints
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from helpers import seeds
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import attention
import scaling
from attention import ATTENTIONS, causal_mask, full_mask
from generate import Cache, next_logits
from heads import Pooler
from kernels.attention import attend_obvious
from kernels.mask import visible
from model import ACTIVATIONS, ModelConfig, Transformer, count_parameters
from optim import AdamW
from presets import PUBLISHED
from run import UserError
from scaling import (
    DAY,
    GB,
    HARDWARE,
    PRECISIONS,
    Cost,
    activation_bytes,
    cache_bytes,
    days,
    decode_flops,
    dollars,
    estimated_flops,
    exact_flops,
    forward_flops,
    pairs,
    palm_flops,
    parameters,
    pooler,
    script,
    show_cost,
    state_bytes,
    utilization,
)
from sparse import PATTERNS

small = st.integers(1, 5)


def at_least(examples):
    """A law with many axes is drawn so often, or as often as the profile says."""
    return settings(max_examples=max(examples, settings.default.max_examples))


GPT = {"position": "learned", "norm": "layernorm", "activation": "gelu", "bias": True}


def gpt(layers, dim, heads, vocab_size=51200):
    """GPT's shape, in which the papers of Megatron count."""
    return ModelConfig(
        layers=layers, dim=dim, heads=heads, vocab_size=vocab_size, context=2048, **GPT
    )


def printed(x, text, units=0.5):
    """Is x what was printed, to half a unit (or so many) of its last digit?"""
    last = Decimal(1).scaleb(Decimal(text).as_tuple().exponent)
    return abs(Decimal(x) - Decimal(text)) <= Decimal(units) * last


def choices():
    """For each setting of a model that is a choice: what can be chosen. New ones come by itself."""
    for name, kind in get_type_hints(ModelConfig).items():
        if kind is bool:
            yield name, st.booleans()
        elif get_origin(kind) is Literal and name != "preset":
            yield name, st.sampled_from(get_args(kind))


@st.composite
def configs(draw, **only):
    """Small models of every kind, or only of some values of a setting."""
    chosen = {name: draw(st.sampled_from(only[name]) if name in only else kind)
              for name, kind in choices()}  # fmt: skip
    kv_heads, width = draw(small), 2 * draw(small)
    sizes = {
        "heads": kv_heads * draw(small), "kv_heads": kv_heads, "layers": draw(st.integers(1, 2)),
        "ffn_dim": draw(st.integers(0, 30)), "context": draw(st.integers(1, 12)),
        "vocab_size": draw(st.integers(1, 40)), "segments": draw(st.integers(0, 3)),
        "buckets": draw(st.integers(4, 8)), "reach": draw(st.integers(8, 12)),
        "window": draw(st.integers(1, 12)),
    }  # fmt: skip
    sizes["dim"] = draw(st.integers(1, 40))
    sizes["head_width"] = width
    if draw(st.booleans()):
        sizes["dim"], sizes["head_width"] = sizes["heads"] * width, 0
    try:
        return ModelConfig(**chosen, **sizes)
    except UserError:  # these choices exclude each other
        assume(False)


def on_meta(config):
    with torch.device("meta"):
        return Transformer(config, seed=None)


# --- parameters -----------------------------------------------------------------------------------


@at_least(200)
@given(configs())
def test_the_count_is_the_number_of_weights(config):
    assert sum(parameters(config).values()) == count_parameters(on_meta(config))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_the_published_number_of_parameters(name):
    it = PUBLISHED[name]
    config = ModelConfig(**it.settings)
    model = on_meta(config)
    with torch.device("meta"):
        more = it.pooler * count_parameters(Pooler(config, seed=None))
    assert count_parameters(model) == sum(parameters(config).values())
    assert it.pooler * pooler(config) == more
    assert abs(count_parameters(model) + more - it.parameters) <= it.unit / 2


def test_each_part_has_what_its_module_has():
    model, counted = on_meta(config := gpt(2, 12, 3, 50)), parameters(gpt(2, 12, 3, 50))
    layer = model.layers[0]
    assert counted["embedding"] == config.vocab_size * config.dim
    assert counted["positions"] == count_parameters(model.position)
    assert counted["attention"] == 2 * count_parameters(layer.attention)
    assert counted["feed-forward"] == 2 * count_parameters(layer.ffn)
    assert counted["norms"] == 5 * count_parameters(model.norm)
    assert counted["head"] == 0


# --- floating point operations --------------------------------------------------------------------


def counted(run):
    """What `run` gives, and what torch counts meanwhile, with attention as the paper states it."""
    with patch.object(attention, "attend", attend_obvious), FlopCounterMode(display=False) as mode:
        return run(), mode.get_total_flops()


# The kinds of attention that are plain products in their obvious version. Without norms of queries
# and keys: torch sums some gradients of theirs by a matrix product.
SIMPLE = {"attention": ("full", "sliding"), "qk_norm": (False,)}


@at_least(30)
@given(configs(**SIMPLE), st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), seeds)
def test_the_exact_sum_is_what_torch_counts(config, S, T, B, seed):
    S, T = min(S, config.context), min(T, config.context)
    model = Transformer(config, seed)
    source, ids = (torch.zeros((B, n), dtype=torch.long) for n in (S, T))

    def forward():
        memory = model.encode(source) if config.arch == "encdec" else None
        return model.logits(model(ids, memory=memory))

    logits, there = counted(forward)
    loss = F.cross_entropy(logits.flatten(0, 1), ids.flatten())
    _, back = counted(loss.backward)
    assert there == B * sum(forward_flops(config, T, source=S).values())
    assert there + back == B * exact_flops(config, T, source=S)
    assert forward_flops(config, T) == forward_flops(config, T, source=T)


@at_least(20)
@given(configs(**SIMPLE, arch=("decoder", "encdec")), st.integers(0, 8))
def test_one_more_token_costs_what_torch_counts(config, past):
    config = replace(config, context=12, window=12)
    model = Transformer(config, 0)
    ids = torch.zeros((1, past + 1), dtype=torch.long)
    memory = model.encode(ids) if config.arch == "encdec" else None
    cache = model.extend(ids[:, :past], None, memory=memory)[1] if past else None
    _, got = counted(lambda: model.logits(model.extend(ids[:, past:], cache, memory=memory)[0]))
    assert got == decode_flops(config, past + 1)


@given(st.sampled_from([1, 2, 4]), st.integers(1, 12), st.integers(1, 20), st.integers(1, 3))
def test_performer_s_features_cost_what_torch_counts(kv_heads, T, features, layers):
    config = ModelConfig(
        arch="encoder", dim=16, heads=4, kv_heads=kv_heads, layers=layers, context=12,
        vocab_size=7, attention="performer", features=features, position="learned", qk_norm=False,
    )  # fmt: skip
    model, ids = Transformer(config, 0), torch.zeros((1, T), dtype=torch.long)
    _, got = counted(lambda: model.logits(model(ids)))
    assert got == sum(forward_flops(config, T, seen=True).values())


def test_a_performer_s_token_costs_what_torch_counts():
    """But for the token's look at itself, 2 H (D + 1), which is a pair of its own."""
    config = ModelConfig(vocab_size=7, attention="performer", kv_heads=2, context=12)
    model, ids = Transformer(config, 0), torch.zeros((1, 12), dtype=torch.long)
    cache, pads, at = Cache(model, 1, 12), torch.zeros(1, dtype=torch.long), torch.arange(12)
    next_logits(model, cache, ids[:, :11], at[:11], pads)
    _, got = counted(lambda: next_logits(model, cache, ids[:, 11:], at[11:], pads))
    itself = config.layers * 2 * config.heads * (config.head_dim + 1)
    assert got == decode_flops(config, 12) + itself == decode_flops(config, 99) + itself


@pytest.mark.parametrize("attention", [*SIMPLE["attention"], *PATTERNS])
@given(st.integers(1, 12), st.integers(1, 90))
def test_pairs_are_those_that_the_mask_shows(attention, window, T):
    config = ModelConfig(attention=attention, window=window, block=16)
    for causal, mask in ((True, causal_mask(T)), (False, full_mask(T, T))):
        mask = replace(mask, at=torch.arange(T)[None])
        mask = ATTENTIONS[config.attention].narrow(mask, T, config)
        assert pairs(config, T, causal) == int(visible(mask, T).sum())


@given(small, small, small, small, st.integers(1, 50))
def test_with_all_recomputed_the_sum_is_megatron_s(L, H, D, V, s):
    """F = 96 B s l h² (1 + s/6h + V/16lh)  (Narayanan et al. 2021, eq. 3), B = 1."""
    h = H * D
    want = 96 * s * L * h**2 * (1 + s / (6 * h) + V / (16 * L * h))
    assert exact_flops(gpt(L, h, H, V), s, "full") == pytest.approx(want, rel=1e-12)


UNLIKE_SHAW = [x for x in get_args(get_type_hints(ModelConfig)["position"]) if x != "relative"]


@given(configs(arch=("decoder",), position=UNLIKE_SHAW), st.integers(1, 12))
def test_palm_s_estimate_is_the_exact_sum_but_for_weights_that_do_not_multiply(config, T):
    parts = parameters(config)
    idle = parts["norms"] + parts["positions"] + config.segments * config.dim
    idle += 0 if config.tied else config.vocab_size * config.dim
    if config.bias:
        gates = 2 if ACTIVATIONS[config.activation].gated else 1
        width = config.head_dim * (config.heads + 2 * config.kv_heads_or_heads)
        idle += config.layers * (width + 2 * config.dim + gates * config.ffn_width)
    assert T * (palm_flops(config, T) - 6 * idle) == exact_flops(config, T)


# --- what the papers printed ----------------------------------------------------------------------

# Brown et al. 2020, table D.1: parameters (M), training FLOPs, on 300 billion tokens.
GPT3 = {
    "gpt3-small": (125, "2.25e20"), "gpt3-medium": (356, "6.41e20"),
    "gpt3-large": (760, "1.37e21"), "gpt3-xl": (1320, "2.38e21"), "gpt3-2.7b": (2650, "4.77e21"),
    "gpt3-6.7b": (6660, "1.20e22"), "gpt3-13b": (12850, "2.31e22"),
    "gpt3-175b": (174600, "3.14e23"),
}  # fmt: skip


@pytest.mark.parametrize("name", GPT3)
def test_gpt_3_s_sizes_and_training_flops(name):
    """The paper multiplied its rounded sizes: of the XL, 1,316 M, it made 1,320 M.

    From the exact size the XL has 2.37e21, so there the last digit may be off by one.
    """
    millions, flops = GPT3[name]
    config = ModelConfig(**PUBLISHED[name].settings)
    assert PUBLISHED[name].tokens == 300e9
    assert abs(sum(parameters(config).values()) - millions * 1e6) <= PUBLISHED[name].unit / 2
    assert printed(6 * millions * 1e6 * 300e9, flops)
    assert printed(estimated_flops(config, 300e9), flops, 2 if name == "gpt3-xl" else 0.5)


# The same table for T5, on 10¹² tokens, and BERT-base, on 250·10⁹; sizes there have two digits.
@pytest.mark.parametrize(
    "name, flops",
    [("t5-small", 1.80e20), ("t5-base", 6.60e20), ("t5-large", 2.31e21), ("t5-3b", 9.00e21),
     ("t5-11b", 3.30e22), ("bert-base", 1.64e20)],
)  # fmt: skip
def test_t5_s_and_bert_s_training_flops_to_the_precision_of_their_sizes(name, flops):
    it = PUBLISHED[name]
    assert estimated_flops(ModelConfig(**it.settings), it.tokens) == pytest.approx(flops, rel=0.06)


# Narayanan et al. 2021, table 1: layers, width, heads, GPUs, then as printed parameters (10⁹),
# TFLOP/s of a GPU, percent of the peak, PFLOP/s of all.
MEGATRON = [
    (24, 2304, 24, 32, "1.7", "137", "44", "4.4"),
    (30, 3072, 32, 64, "3.6", "138", "44", "8.8"),
    (36, 4096, 32, 128, "7.5", "142", "46", "18.2"),
    (40, 6144, 48, 256, "18.4", "135", "43", "34.6"),
    (48, 8192, 64, 512, "39.1", "138", "44", "70.8"),
    (60, 10240, 80, 1024, "76.1", "140", "45", "143.8"),
    (80, 12288, 96, 1536, "145.6", "148", "47", "227.1"),
    (96, 16384, 128, 1920, "310.1", "155", "50", "297.4"),
    (105, 20480, 128, 2520, "529.6", "163", "52", "410.2"),
    (128, 25600, 160, 3072, "1008.0", "163", "52", "502.0"),
]


@pytest.mark.parametrize("row", MEGATRON, ids=lambda row: row[4])
def test_megatron_s_table(row):
    layers, dim, heads, gpus, billions, tflops, percent, pflops = row
    assert printed(sum(parameters(gpt(layers, dim, heads)).values()) / 1e9, billions)
    each = float(pflops) * 1e15 / gpus  # finer than the printed TFLOP/s
    slack = 0.5 + 0.05e3 / gpus  # half a unit of the PFLOP/s, in TFLOP/s of a GPU
    assert printed(each / 1e12, tflops, slack)
    peak = HARDWARE["a100-80g"].half
    assert printed(100 * utilization(each, 1, 1, peak), percent)


def test_megatron_s_days():
    """8 T P / (n X): GPT-3 in 34 days, a trillion parameters in 84."""
    gpt3 = sum(parameters(ModelConfig(**PUBLISHED["gpt3-175b"].settings)).values())
    assert printed(days(8 * 300e9 * gpt3, 1024, 140e12), "34")
    trillion = sum(parameters(gpt(128, 25600, 160)).values())
    assert printed(days(8 * 450e9 * trillion, 3072, 163e12), "84")


PALM = ModelConfig(
    layers=118, dim=18432, heads=48, kv_heads=1, head_width=256, ffn_dim=73728, context=2048,
    vocab_size=256_000, position="rope", activation="swiglu", norm="layernorm", bias=False,
    qk_norm=False,
)  # fmt: skip
MT_NLG = gpt(105, 20480, 128)


@pytest.mark.parametrize(
    "config, billions, tokens_per_second, devices, hardware, without, mfu",
    [(PALM, "540.35", 238.3e3, 6144, "tpuv4", "45.7", "46.2"),
     (MT_NLG, "530", 65.43e3, 2240, "a100-80g", "29.7", "30.2")],
    ids=["PaLM", "MT-NLG"],
)  # fmt: skip
def test_mfu_as_palm_has_it(config, billions, tokens_per_second, devices, hardware, without, mfu):
    """Chowdhery et al. 2022, appendix B and table 3; without: attention's scores not counted."""
    N = sum(parameters(config).values())
    peak = HARDWARE[hardware].half
    assert printed(N / 1e9, billions, 1)  # PaLM's 540.358 was cut off
    assert printed(100 * utilization(6 * N * tokens_per_second, 1, devices, peak), without)
    flops = palm_flops(config, 2048) * tokens_per_second
    assert printed(100 * utilization(flops, 1, devices, peak), mfu)
    exact = exact_flops(config, 2048) / 2048 * tokens_per_second
    assert printed(100 * utilization(exact, 1, devices, peak), mfu)


# Rajbhandari et al. 2020, table 1: GB of a device by ranks; for each size stages 1, 2 and 3.
ZERO = {
    1: ("120", "120", "120", "2048", "2048", "2048", "16000", "16000", "16000"),
    4: ("52.5", "41.3", "30", "896", "704", "512", "7000", "5500", "4000"),
    16: ("35.6", "21.6", "7.5", "608", "368", "128", "4750", "2875", "1000"),
    64: ("31.4", "16.6", "1.88", "536", "284", "32", "4187", "2218", "250"),
    256: ("30.4", "15.4", "0.47", "518", "263", "8", "4046", "2054", "62.5"),
    1024: ("30.1", "15.1", "0.12", "513", "257", "2", "4011", "2013", "15.6"),
}


@pytest.mark.parametrize("ranks", ZERO)
def test_all_cells_of_zero_s_table(ranks):
    """To a whole unit of the last digit: where none follows the point, the paper cut it off."""
    cells = iter(ZERO[ranks])
    for N in (7.5e9, 128e9, 1e12):
        for stage in (1, 2, 3):
            gigabytes, cell = sum(state_bytes(N, ranks, stage)) / GB, next(cells)
            assert printed(gigabytes, cell, 0.5 if "." in cell else 1), cell


def test_bloom_s_iteration():
    """2,048 rows of 2,048 tokens by 384 GPUs at 150 TFLOP/s take 105 s; 105 s are 149 to 150."""
    config = ModelConfig(**PUBLISHED["bloom-176b"].settings)
    flops = 2048 * exact_flops(config, 2048, "full")
    assert printed(DAY * days(flops, 384, 150e12), "105")
    assert 149e12 <= utilization(flops, 105, 384, 1) <= 150e12


# Korthikanti et al. 2022, table 5: layers, width, heads, GPUs, rows, seconds, MFU, HFU (percent).
KORTHIKANTI = [
    (48, 6144, 64, 8, 4, "1.10", "41.5", "43.7"),
    (96, 12288, 96, 64, 64, "13.75", "51.4", "52.8"),
    (105, 20480, 128, 280, 280, "37.83", "56.0", "57.0"),
    (128, 25600, 160, 512, 512, "71.49", "56.3", "57.0"),
]


@pytest.mark.parametrize("row", KORTHIKANTI, ids=lambda row: str(row[1]))
def test_korthikanti_s_utilization(row):
    """MFU is met. For HFU the paper (eq. 9) adds the scores three times more.

    The backward pass repeats them once, as `exact_flops(…, "selective")` has it.
    """
    layers, dim, heads, gpus, rows, seconds, mfu, hfu = row
    config, peak = gpt(layers, dim, heads), HARDWARE["a100-80g"].half
    needed = exact_flops(config, 2048)
    slack = 0.5 + 10 * float(mfu) * 0.005 / float(seconds)  # half a unit of the seconds
    assert printed(100 * utilization(rows * needed, float(seconds), gpus, peak), mfu, slack)
    scores = forward_flops(config, 2048)["scores"]
    theirs = float(hfu) / float(mfu)
    assert (needed + 3 * scores) / needed == pytest.approx(theirs, abs=0.1 / float(mfu))
    assert exact_flops(config, 2048, "selective") == needed + scores


@given(small, small, small, small, st.integers(1, 50), small)
def test_activations_are_korthikanti_s(L, H, D, V, s, b):
    """s b h L (34 + 5 a s/h) + 4 s b h (1 + v/h) bytes  (eq. 2 and section 4.3)."""
    h, config = H * D, gpt(L, H * D, H, V)
    behind = 4 * s * b * h * (1 + V / h)
    for how, factor in (("none", 34 + 5 * H * s / h), ("selective", 34), ("full", 2)):
        want = s * b * h * L * factor + behind
        assert activation_bytes(config, s, b, how) == pytest.approx(want, rel=1e-12)


def test_wider_heads_keep_more_queries_keys_values_and_outputs():
    """Two bytes of each, where the heads together are not as wide as the stream."""
    one, two = (replace(gpt(3, 12, 4, 50), head_width=D) for D in (5, 7))
    more = activation_bytes(two, 10) - activation_bytes(one, 10)
    assert more == 10 * 3 * 2 * 4 * 4 * (7 - 5)


@pytest.mark.parametrize("row, spared", [(KORTHIKANTI[1], "70"), (KORTHIKANTI[2], "65")])
def test_selective_recomputation_spares_what_the_paper_says(row, spared):
    layers, dim, heads, *_ = row
    config = gpt(layers, dim, heads, vocab_size=1)
    keep = [activation_bytes(config, 2048, 1, how) for how in ("none", "selective")]
    assert printed(100 * (1 - keep[1] / keep[0]), spared)


def test_what_4_6_million_dollars_imply():
    """Li 2020: a V100 at 28 TFLOP/s takes 355 years, so a device and hour cost 1.48 USD."""
    flops = estimated_flops(ModelConfig(**PUBLISHED["gpt3-175b"].settings), 300e9)
    years = days(3.14e23, 1, 28e12) / 365
    assert printed(years, "355", 1)
    assert printed(dollars(355 * 365, 1, 1.48) / 1e6, "4.6")
    assert printed(dollars(34, 1024, 5.51) / 1e6, "4.6")
    assert printed(100 * utilization(flops, 34 * DAY, 1024, HARDWARE["a100-80g"].half), "33.5")


# --- memory ---------------------------------------------------------------------------------------


@given(st.integers(1, 10**12), st.integers(1, 5000), st.sampled_from(sorted(PRECISIONS)))
def test_zero_divides_one_thing_after_the_other(N, ranks, precision):
    held = [state_bytes(N, ranks, stage, precision) for stage in range(4)]
    assert held[0] == tuple(N * b for b in PRECISIONS[precision])
    assert sum(held[3]) == pytest.approx(sum(held[0]) / ranks)
    for stage, name in ((1, "optimizer"), (2, "gradients"), (3, "weights")):
        want = held[stage - 1]._replace(**{name: getattr(held[0], name) / ranks})
        assert held[stage] == pytest.approx(want)
    assert state_bytes(N, 1, 3, precision) == held[0]


def test_fp32_is_what_training_really_holds():
    model = Transformer(gpt(2, 12, 3, 50), 0)
    optimizer = AdamW(model.named_parameters())
    model.logits(model(torch.zeros((1, 5), dtype=torch.long))).sum().backward()
    want = state_bytes(count_parameters(model), precision="fp32")
    assert sum(p.nbytes for p in model.parameters()) == want.weights
    assert sum(p.grad.nbytes for p in model.parameters()) == want.gradients
    assert sum(x.nbytes for n, x in optimizer.tensors().items() if n[0] != "t") == want.optimizer


@given(configs(), st.integers(1, 12))
def test_the_cache_is_as_large_as_counted(config, S):
    config = replace(config, context=12, window=12)
    model, ids = Transformer(config, 0), torch.zeros((1, S), dtype=torch.long)
    memory = model.encode(ids) if config.arch == "encdec" else None
    own = model.extend(ids, None, memory=memory)[1]
    if config.attention == "performer":
        own = [[Cache(model, 1, S).buffer]]
    kept = [*own, *(memory or [])]
    assert sum(x.nbytes for kv in kept for x in kv) == cache_bytes(config, S, bits=32)


@pytest.mark.parametrize("arch, stacks", [("decoder", 1), ("encdec", 2)])
def test_a_window_keeps_its_own_tokens_only(arch, stacks):
    """Of 12 tokens the last 5; of a source, at which a decoder looks without a window, all."""
    full = ModelConfig(arch=arch, vocab_size=1, window=5)
    sliding = replace(full, attention="sliding")
    own, all_ = (cache_bytes(full, S) / stacks for S in (5, 12))
    assert cache_bytes(sliding, 12) == own + (stacks - 1) * all_
    spared = full.layers * 4 * full.dim * (12 - 5)
    assert decode_flops(sliding, 12) == decode_flops(full, 12) - spared


# --- the command line -----------------------------------------------------------------------------


def said(capsys, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["scaling.py", *arguments])
    script()
    return capsys.readouterr().out


def test_the_table_shows_every_preset(capsys, monkeypatch):
    out = said(capsys, monkeypatch)
    for name, it in PUBLISHED.items():
        line = next(line for line in out.splitlines() if line.startswith(name + " "))
        assert it.unit or f"{it.parameters:,}" in line
    assert "835,584         5.51    104.5  33.5%" in out


def test_cost_of_gpt_3(capsys):
    """At 45 % of the peak, 140 TFLOP/s, 1,024 A100 take Megatron's 34 days; divided, it fits."""
    config = ModelConfig(**PUBLISHED["gpt3-175b"].settings)
    show_cost(Cost(config, tokens=300e9, devices=1024, tensor=8, pipeline=8))
    lines = {line.split("  ")[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert lines["sum"][1] == "174,604,259,328"
    assert printed(lines["6 N D"][-3], "3.14e23")
    assert printed(lines["8 N D, all recomputed"][-2], "34")
    assert lines["ZeRO 0"][-1] == "fits"
    show_cost(Cost(config, tokens=300e9, devices=1024))
    ends = [line.split("  ")[-1] for line in capsys.readouterr().out.splitlines()]
    assert ends.count("too much") == 3 and ends.count("fits") == 1  # only with all divided


def test_each_number_of_the_sheet_is_that_of_its_formula(capsys):
    """A T5, of whose tokens a row reads the half and writes the half, in fp32; then GPT-3's use."""
    it, device = PUBLISHED["t5-large"], HARDWARE["a100-80g"]
    c = ModelConfig(**it.settings)
    show_cost(Cost(c, 1e12, 16, precision="fp32", price=2.0, recompute="none", rows=3, tensor=2,
                   pipeline=2))  # fmt: skip
    out = capsys.readouterr().out
    lines = {line.split("  ")[0]: line.split() for line in out.splitlines()}
    flops = 1e12 / 1024 * exact_flops(c, 512)
    long = flops / (16 * 0.45 * device.single) / DAY
    assert lines["exact"][1:] == [f"{flops:.2e}", f"{long:,.2f}", f"{long * 24 * 16 * 2:,.0f}"]
    kept = activation_bytes(c, 512, 3) / 2
    for stage, parts in ((0, (1, 1, 1)), (3, (4, 4, 4))):
        held = [it.parameters / 4 * b / p for b, p in zip((4, 4, 8), parts, strict=True)]
        cells = [f"{x / GB:,.2f}" for x in (*held, kept, sum(held) + kept)]
        assert lines[f"ZeRO {stage}"][2:-1] == cells
    gpt3 = ModelConfig(**PUBLISHED["gpt3-175b"].settings)
    show_cost(Cost(gpt3))
    read = 2 * sum(parameters(gpt3).values()) + cache_bytes(gpt3, 2048)
    assert 4 < read / device.memory < 5
    assert f"at most {5 * device.bandwidth / read:,.1f} tokens/s" in capsys.readouterr().out


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("hardware", [*HARDWARE, "cpu"])
def test_cost_of_every_preset_on_everything(capsys, monkeypatch, name, hardware):
    monkeypatch.setattr(scaling, "matmul_peak", lambda device, dtype: 1e11)
    show_cost(Cost(ModelConfig(**PUBLISHED[name].settings), hardware=hardware, bits=4))
    out = capsys.readouterr().out
    assert "nan" not in out and "inf" not in out and len(out.splitlines()) > 20


@pytest.mark.parametrize(
    "words, names",
    [
        ("--devices 0", "--devices 0"),
        ("--devices 1000000000000000000000", "--devices"),
        ("--tokens nan", "--tokens nan"),
        ("--tokens -3", "--tokens -3"),
        ("--tokens inf", "--tokens inf"),
        ("--hardware abacus", "--hardware abacus"),
        ("--hardware tpuv4 --precision fp32", "tpuv4"),
        ("--utilization 1.5", "--utilization"),
        ("--utilization nan", "--utilization"),
        ("--price inf", "--price"),
        ("--price nan", "--price"),
        ("--devices 8 --tensor 3", "--tensor 3"),
        ("--rows 0", "--rows 0"),
        ("--model.preset tiny", "--model.vocab-size"),
        ("--model.dim 0", "--model.dim"),
        ("--model.dim 268435456", "--model.dim"),
    ],
)
def test_a_mistake_is_one_sentence(monkeypatch, words, names):
    monkeypatch.setattr(sys, "argv", ["scaling.py", "cost", *words.split()])
    with pytest.raises(UserError) as error:
        script()
    assert names in str(error.value) and "\n" not in str(error.value)


@given(st.integers(1, (1 << 28) - 1), st.integers(1, 10**18), st.floats(1, 1e18))
def test_the_largest_sizes_have_a_cost(dim, devices, tokens):
    big = ModelConfig(dim=dim, heads=1, layers=dim, vocab_size=dim, position="none", context=dim)
    with redirect_stdout(io.StringIO()) as out:
        show_cost(Cost(big, tokens=tokens, devices=devices))
    assert "nan" not in out.getvalue()
