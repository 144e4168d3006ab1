"""Models as they were published: their shapes, their sizes, what they were trained on.

Idea: a preset is nothing but settings of `ModelConfig`, which flags then change. Beside them stands
the number of parameters that its authors, or the files they published, give: a shape is right when
the model that is built from it has exactly so many.

Two rows of GPT-3's table 2.1 contradict themselves. The 13B is said to be 5140 wide with 40 heads
of 128, which is 5120; and 5120 gives the 12,850 M parameters of table D.1, where 5140 gives 12,936.
The 1.3B is said to be 2048 wide with 24 heads of 128, which is 3072; 16 heads give D.1's 1,320 M,
and 24 would give 1,517. Here both stand with the shape that fits the count. Every other layer of
GPT-3 looks only at a band of neighbours, which changes no weight; here all look everywhere.

Run: python -m pytest tests/test_scaling.py

Papers: Radford et al. 2019, GPT-2; Brown et al. 2020, GPT-3 (arXiv 2005.14165); Devlin et al. 2019,
BERT (arXiv 1810.04805); Raffel et al. 2020, T5 (arXiv 1910.10683); Touvron et al. 2023, Llama 2
(arXiv 2307.09288); Grattafiori et al. 2024, Llama 3 (arXiv 2407.21783); Workshop 2022, BLOOM (arXiv
2211.05100).
"""

from typing import NamedTuple


class Published(NamedTuple):
    """A model, and what was said of it."""

    settings: dict[str, object]  # of ModelConfig
    parameters: int
    source: str
    tokens: float = 0  # that it was trained on; 0: nobody said
    unit: int = 0  # to which the number of parameters was rounded; 0: it is exact
    pooler: bool = False  # is BERT's layer C → C behind the first token among the parameters?


MILLION, BILLION = 10**6, 10**9

GPT = {
    "position": "learned", "norm": "layernorm", "activation": "gelu_tanh", "bias": True,
    "qk_norm": False, "vocab_size": 50257,
}  # fmt: skip


def gpt2(layers: int, dim: int, heads: int, parameters: int) -> Published:
    shape = {"layers": layers, "dim": dim, "heads": heads, "context": 1024}
    return Published(GPT | shape, parameters, "weights, huggingface.co/openai-community")


def gpt3(layers: int, dim: int, heads: int, millions: int, unit: int = 10) -> Published:
    shape = {"layers": layers, "dim": dim, "heads": heads, "context": 2048}
    source = "Brown et al. 2020, tables 2.1 and D.1"
    return Published(GPT | shape, millions * MILLION, source, 300e9, unit * MILLION)


def bert(layers: int, dim: int, heads: int, parameters: int) -> Published:
    shape = {
        "arch": "encoder", "layers": layers, "dim": dim, "heads": heads, "context": 512,
        "vocab_size": 30522, "segments": 2, "embed_norm": True, "position": "learned",
        "norm": "layernorm", "order": "post", "activation": "gelu", "bias": True, "qk_norm": False,
        "norm_eps": 1e-12,
    }  # fmt: skip
    source = "weights, huggingface.co/google-bert (uncased); tokens: Brown et al. 2020, table D.1"
    return Published(shape, parameters, source, 250e9, pooler=True)


def t5(layers: int, dim: int, heads: int, width: int, ffn: int, parameters: int) -> Published:
    shape = {
        "arch": "encdec", "layers": layers, "dim": dim, "heads": heads, "head_width": width,
        "ffn_dim": ffn, "context": 512, "vocab_size": 32128, "position": "t5", "norm": "rmsnorm",
        "order": "pre", "activation": "relu", "bias": False, "tied": True, "qk_norm": False,
        "norm_eps": 1e-6, "score_scale": 1.0, "scaled_head": True,
    }  # fmt: skip
    source = "weights, huggingface.co/google-t5; tokens: Brown et al. 2020, table D.1"
    return Published(shape, parameters, source, 1000e9)


def llama(
    version: int, layers: int, dim: int, heads: int, kv_heads: int, ffn: int, parameters: int
) -> Published:
    of_version = {
        2: {"vocab_size": 32000, "context": 4096},
        3: {"vocab_size": 128256, "context": 8192, "rope_base": 500_000.0},
    }[version]
    shape = {
        "layers": layers, "dim": dim, "heads": heads, "kv_heads": kv_heads, "ffn_dim": ffn,
        "position": "rope", "norm": "rmsnorm", "activation": "swiglu", "bias": False,
        "tied": False, "qk_norm": False, **of_version,
    }  # fmt: skip
    source, tokens = "weights, huggingface.co/meta-llama", {2: 2e12, 3: 15e12}[version]
    return Published(shape, parameters, source, tokens)


BLOOM = {
    "layers": 70, "dim": 14336, "heads": 112, "context": 2048, "vocab_size": 250880,
    "position": "alibi", "norm": "layernorm", "embed_norm": True, "activation": "gelu_tanh",
    "bias": True, "tied": True, "qk_norm": False,
}  # fmt: skip

PUBLISHED = {
    "gpt2": gpt2(12, 768, 12, 124_439_808),
    "gpt2-medium": gpt2(24, 1024, 16, 354_823_168),
    "gpt2-large": gpt2(36, 1280, 20, 774_030_080),
    "gpt2-xl": gpt2(48, 1600, 25, 1_557_611_200),
    "gpt3-small": gpt3(12, 768, 12, 125, unit=1),
    "gpt3-medium": gpt3(24, 1024, 16, 356, unit=1),
    "gpt3-large": gpt3(24, 1536, 16, 760, unit=1),
    "gpt3-xl": gpt3(24, 2048, 16, 1_320),  # table 2.1: 24 heads
    "gpt3-2.7b": gpt3(32, 2560, 32, 2_650),
    "gpt3-6.7b": gpt3(32, 4096, 32, 6_660),
    "gpt3-13b": gpt3(40, 5120, 40, 12_850),  # table 2.1: 5140 wide
    "gpt3-175b": gpt3(96, 12288, 96, 174_600),
    "bert-base": bert(12, 768, 12, 109_482_240),
    "bert-large": bert(24, 1024, 16, 335_141_888),
    "t5-small": t5(6, 512, 8, 64, 2048, 60_506_624),
    "t5-base": t5(12, 768, 12, 64, 3072, 222_903_552),
    "t5-large": t5(24, 1024, 16, 64, 4096, 737_668_096),
    "t5-3b": t5(24, 1024, 32, 128, 16384, 2_851_598_336),
    "t5-11b": t5(24, 1024, 128, 128, 65536, 11_307_321_344),
    "llama2-7b": llama(2, 32, 4096, 32, 32, 11008, 6_738_415_616),
    "llama2-13b": llama(2, 40, 5120, 40, 40, 13824, 13_015_864_320),
    "llama2-70b": llama(2, 80, 8192, 64, 8, 28672, 68_976_648_192),
    "llama3-8b": llama(3, 32, 4096, 32, 8, 14336, 8_030_261_248),
    "llama3-70b": llama(3, 80, 8192, 64, 8, 28672, 70_553_706_496),
    "bloom-176b": Published(BLOOM, 176_247_271_424, "Le Scao et al. 2022, table 3", 366e9),
}
