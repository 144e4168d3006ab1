"""PEFT's folders, both ways, against PEFT itself."""

import json
from dataclasses import replace

import pytest
import torch
from helpers import assert_close
from models import DECODERS, MODELS, SHAPES, random_ids, shaken
from safetensors.torch import load_file, save_file
from test_lora import tuned

from adapters import adapt
from lora import Adapter, adapted, use
from model import Transformer
from peft_files import load_adapter, save_adapter
from prefix import attentions
from run import UserError, generator

KINDS = [k for k in SHAPES if k != "t5 v1.1"]
ROWED = [k for k in DECODERS if SHAPES[k].attention == "full"]


@pytest.fixture(scope="module")
def peft():
    pytest.importorskip("transformers").logging.set_verbosity_error()
    return pytest.importorskip("peft")


def their_model(folder, kind):
    import transformers

    classes = {"bert": "BertModel", "t5": "T5ForConditionalGeneration"}
    kinds = getattr(transformers, classes.get(kind, "AutoModelForCausalLM"))
    return kinds.from_pretrained(folder, attn_implementation="eager").eval()


def fresh(kind: str) -> Transformer:
    return shaken(Transformer(SHAPES[kind]), 0)


def ours_says(model: Transformer, ids: torch.Tensor) -> torch.Tensor:
    if model.config.arch == "encoder":
        return model(ids)
    memory = model.encode(ids) if model.config.arch == "encdec" else None
    return model.logits(model(ids, memory=memory))


@torch.no_grad()
def they_say(model, ids: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "bert":
        return model(input_ids=ids).last_hidden_state
    if kind == "t5":
        return model(input_ids=ids, decoder_input_ids=ids).logits
    return model(input_ids=ids).logits


def spoken(how: Adapter, kind: str, seed: int = 0) -> Transformer:
    """With an adapter that says something."""
    model = fresh(kind)
    if how.kind == "lora":
        return tuned(model, how, seed)
    adapt(model, how, seed)
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.data = torch.randn(p.shape, generator=generator(seed, name)) / 2
    return model


LORAS = [Adapter("lora", 3), Adapter("lora", 2, on=("query", "output", "up", "down"), root=True)]
ROWS = [Adapter("prefix", tokens=3, hidden=2), Adapter("prompt", tokens=3)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", LORAS + ROWS, ids=["q v", "more", "prefix", "prompt"])
def test_peft_says_what_we_say_with_our_adapter(peft, tmp_path, kind, how):
    if how.kind != "lora" and kind not in ROWED:
        return  # PEFT has no rows for encoders without a task
    model = spoken(how, kind)
    fresh(kind).save(tmp_path / "base")
    save_adapter(model, tmp_path / "adapter", str(tmp_path / "base"))
    theirs = peft.PeftModel.from_pretrained(their_model(tmp_path / "base", kind),
                                            tmp_path / "adapter")  # fmt: skip
    ids = random_ids(model.config, 1, 2, 5)
    assert_close(they_say(theirs, ids, kind)[:, -5:], ours_says(model, ids), 2e-5)
    again = fresh(kind)
    load_adapter(again, tmp_path / "adapter")
    assert_close(ours_says(again, ids), ours_says(model, ids), 1e-6)
    assert not torch.allclose(ours_says(again, ids), ours_says(fresh(kind), ids), atol=1e-3)
    counted = sum(p.numel() for n, p in theirs.named_parameters() if "lora_" in n or "prompt" in n)
    kept = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert counted == sum(x.numel() for x in kept.values())


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # of a head beside GPT-2's Conv1D
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_embeddings_and_heads(peft, tmp_path, kind):
    config = replace(SHAPES[kind], tied=False)
    ids = random_ids(config, 1, 2, 5)

    def base() -> Transformer:
        return shaken(Transformer(config), 0)

    model = tuned(base(), Adapter("lora", 2, on=("embedding", "head", "query")), 0)
    base().save(tmp_path / "base")
    save_adapter(model, tmp_path / "adapter")
    their_base = their_model(tmp_path / "base", kind)
    theirs = peft.PeftModel.from_pretrained(their_base, tmp_path / "adapter")
    assert_close(they_say(theirs, ids, kind), ours_says(model, ids), 2e-5)
    again = base()
    load_adapter(again, tmp_path / "adapter")
    assert_close(ours_says(again, ids), ours_says(model, ids), 1e-6)
    with pytest.raises(UserError, match="PEFT adapts one use of an embedding"):
        tied = tuned(fresh(kind), Adapter("lora", 2, on=("embedding",)), 0)
        save_adapter(tied, tmp_path / "tied")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("root", [False, True])
def test_we_say_what_peft_says_with_its_adapter(peft, tmp_path, kind, root):
    """With a rank and an alpha of its own for one matrix, as PEFT has it."""
    names = {"gpt2": ["c_attn", "c_fc"], "bloom": ["query_key_value", "dense_h_to_4h"],
             "bert": ["query", "output.dense"], "t5": ["q", "wo"]}  # fmt: skip
    fresh(kind).save(tmp_path / "base")
    names = names.get(kind, ["q_proj", "down_proj"])
    theirs = peft.get_peft_model(
        their_model(tmp_path / "base", kind),
        peft.LoraConfig(r=3, lora_alpha=5, target_modules=names, use_rslora=root,
                        fan_in_fan_out=kind == "gpt2", rank_pattern={names[0]: 2},
                        alpha_pattern={names[0]: 7}),
    )  # fmt: skip
    for name, p in theirs.named_parameters():
        if "lora_B" in name:
            p.data.copy_(torch.randn(p.shape, generator=generator(0, name)) / 2)
    theirs.save_pretrained(tmp_path / "adapter")
    model = fresh(kind)
    load_adapter(model, tmp_path / "adapter")
    ids = random_ids(model.config, 1, 2, 5)
    assert_close(ours_says(model, ids), they_say(theirs.eval(), ids, kind), 2e-5)


@pytest.mark.parametrize("kind", ROWED)
@pytest.mark.parametrize("what", ["prefix", "prompt"])
def test_and_with_its_rows(peft, tmp_path, kind, what):
    fresh(kind).save(tmp_path / "base")
    made = {"prefix": peft.PrefixTuningConfig, "prompt": peft.PromptTuningConfig}[what]
    theirs = peft.get_peft_model(their_model(tmp_path / "base", kind),
                                 made(task_type="CAUSAL_LM", num_virtual_tokens=3))  # fmt: skip
    theirs.save_pretrained(tmp_path / "adapter")
    model = fresh(kind)
    load_adapter(model, tmp_path / "adapter")
    ids = random_ids(model.config, 1, 2, 5)
    assert_close(ours_says(model, ids), they_say(theirs.eval(), ids, kind)[:, -5:], 2e-5)


def test_a_prefix_is_as_wide_as_its_settings_say(tmp_path):
    """Where there are fewer key-value heads, PEFT overrules a wrong width; others need not."""
    save_adapter(spoken(ROWS[0], "llama"), tmp_path / "a")
    said = json.loads((tmp_path / "a/adapter_config.json").read_text())
    rows = load_file(tmp_path / "a/adapter_model.safetensors")["prompt_embeddings"]
    assert rows.shape == (said["num_virtual_tokens"], 2 * said["num_layers"] * said["token_dim"])
    assert said["num_attention_heads"] == SHAPES["llama"].kv_heads < SHAPES["llama"].heads


def test_several_adapters_stand_on_one_base(tmp_path):
    for i in range(2):
        save_adapter(spoken(LORAS[0], "llama", i), tmp_path / str(i))
    model = fresh("llama")
    for i in range(2):
        load_adapter(model, tmp_path / str(i), f"number {i}")
    ids = random_ids(model.config, 1, 2, 5)
    use(model, {"number 1": 1.0})
    assert_close(ours_says(model, ids), ours_says(spoken(LORAS[0], "llama", 1), ids), 1e-6)


@pytest.mark.parametrize("how", LORAS[:1] + ROWS, ids=["lora", "prefix", "prompt"])
def test_an_adapter_goes_on_no_other_weights(tmp_path, how):
    save_adapter(spoken(how, "llama"), tmp_path / "adapter")
    model = fresh("llama")
    model.layers[0].ffn.up.weight.data[0, 0] += 1e-3
    with pytest.raises(UserError, match="an adapter of other weights"):
        load_adapter(model, tmp_path / "adapter")
    assert not adapted(model) and model.before is None


def edited(folder, values=(), change=lambda tensors: tensors):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(values)))
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


@pytest.mark.parametrize(
    ("values", "change", "said"),
    [
        ({"peft_type": "IA3"}, None, "peft_type 'IA3' is not known here"),
        ({"use_dora": True}, None, "use_dora True is not known"),
        ({"alora_invocation_tokens": [7, 8]}, None, "alora_invocation_tokens .* is not known"),
        ({"use_qalora": True}, None, "use_qalora True is not known"),
        ({"use_bdlora": {}}, None, "use_bdlora {} is not known"),
        ({"kasa_config": {"beta": 1e-4}}, None, "kasa_config .* is not known"),
        ({"init_lora_weights": "pissa"}, None, "init_lora_weights 'pissa' is not known"),
        ({"lora_alpha": "a"}, None, "lora_alpha cannot be 'a'"),
        ({"alpha_pattern": {"*": 3}}, None, r"alpha_pattern {'\*': 3} is no table"),
        ({"alpha_pattern": ["q_proj"]}, None, r"alpha_pattern \['q_proj'\] is no table"),
        ({}, lambda t: {k.replace("layers.0", "layers.9"): x for k, x in t.items()}, "no adapter"),
        ({}, lambda t: {k: x[:, :-1].contiguous() for k, x in t.items()}, "does not fit"),
        ({}, lambda t: {}, "has nothing, which"),
    ],
)
def test_what_is_no_adapter_of_this_model(tmp_path, values, change, said):
    how = replace(LORAS[0], on=("layers.*.query", "layers.*.value"))
    save_adapter(spoken(how, "llama"), tmp_path / "a")
    if "lora_alpha" in values:
        values |= {"alpha_pattern": {}}
    edited(tmp_path / "a", values, change or (lambda t: t))
    with pytest.raises(UserError, match=said):
        load_adapter(fresh("llama"), tmp_path / "a")


def test_prompts_that_do_not_fit(tmp_path):
    save_adapter(spoken(ROWS[0], "llama"), tmp_path / "a")
    edited(tmp_path / "a", {"num_virtual_tokens": 4})
    with pytest.raises(UserError, match=r"prompt_embeddings is \(3, \d+\), not \(4, "):
        load_adapter(fresh("llama"), tmp_path / "a")


def test_a_folder_holds_one_adapter(tmp_path):
    with pytest.raises(UserError, match="0 adapters are on the model"):
        save_adapter(fresh("llama"), tmp_path / "a")
    model = tuned(spoken(LORAS[0], "llama"), LORAS[0], 1, "two")
    with pytest.raises(UserError, match="2 adapters are on the model"):
        save_adapter(model, tmp_path / "a")
    with pytest.raises(UserError, match="prefixes are those of decoders"):
        save_adapter(spoken(ROWS[0], "t5"), tmp_path / "a")
    assert len(attentions(model)) == model.config.layers
    assert MODELS
