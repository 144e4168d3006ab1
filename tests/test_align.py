"""Tuning: a run begins with another's weights, learns from conversations, and can be talked to."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from test_train import end_of, run

import align
import chat
import examine
import generate
import stages
import train
import writer
from data import DataConfig, TokenizerConfig, prepare
from instruct import Lessons, lessons, rouge_l, write
from kernels.cross_entropy import IGNORE
from model import Transformer
from run import RUNS, Run, UserError, load_tensors

SMALL = ["--model.dim", "16", "--model.layers", "2", "--model.heads", "2", "--model.context", "512",
         "--model.no-qk-norm"]  # fmt: skip
TINY = ["--batch", "4", "--save-every", "2", "--evaluate-every", "4", "--device", "cpu",
        "--dtype", "float32"]  # fmt: skip
CHAT = ["--base", "base", "--objective", "chat", "--data.form", "chat", "--data.path", "talk.jsonl"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a base run and conversations."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write(list(lessons(Lessons(("copy", "add"), (1,), 60))), Path("talk.jsonl"))
        base = [
            "--data.mix",
            "stories=world:60",
            "facts=facts:60",
            "quiz=quiz:60",
            "--name",
            "base",
        ]
        small = ["--steps", "4", "--tokenizer.vocab-size", "300"]
        assert run("train.py", *base, *SMALL, *TINY, *small)[0] == 0
    return folder


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def tune(*arguments):
    return run("train.py", *CHAT, *TINY, *arguments)


def test_a_run_begins_with_the_weights_and_the_tokenizer_of_its_base(folder):
    status, out, err = tune("--name", "tuned", "--steps", "1", "--optim.lr", "1e-9")
    assert status == 0, err
    base, tuned = writer.base_of("base"), writer.load(Run.open("tuned"), torch.device("cpu"))
    old, new = base.model.state_dict(), tuned.model.state_dict()
    V = base.model.config.vocab_size
    assert tuned.model.config.vocab_size == V + 4 == tuned.tokenizer.vocab_size
    for name, x in old.items():
        assert torch.allclose(new[name][: len(x)], x, atol=1e-6), name
    assert new["embedding"][V:].abs().sum() > 0
    assert chat.knows_roles(tuned.tokenizer) and tuned.tokenizer.special[chat.END] in tuned.stop
    assert json.loads((RUNS / "tuned" / "tokenizer_config.json").read_text())["chat_template"]
    assert "→" in out


def test_a_tuned_run_can_be_stopped_and_resumed(folder):
    assert tune("--name", "whole", "--steps", "4")[0] == 0
    assert tune("--name", "parts", "--steps", "2", "--optim.schedule", "constant")[0] == 0
    assert tune("--name", "same", "--steps", "4", "--optim.schedule", "constant")[0] == 0
    shutil.rmtree(RUNS / "base")  # it is not needed any more
    status, _, err = run("train.py", "--resume", "--name", "parts", "--steps", "4")
    assert status == 0, err
    parts, same = end_of("parts"), end_of("same")
    losses = [[(row["step"], row["loss"]) for row in end[3]] for end in (parts, same)]
    assert parts[0] == same[0] and losses[0] == losses[1]
    for part in ("model", "train_state"):
        for name, x in same[1][part].items():
            assert torch.equal(x, parts[1][part][name]), name


def test_only_replies_are_asked_for_in_training(folder):
    tokenizer = chat.with_roles(writer.base_of("base").tokenizer)
    config = DataConfig("talk.jsonl", form="chat")
    corpus = prepare(config, TokenizerConfig(), tokenizer, most=512)
    seen = Counter()
    for i in range(len(corpus.train)):
        seen.update(tokenizer.decode(corpus.train.document(i)[1:].tolist()).split("<|assistant|>"))
    with open("talk.jsonl") as file:
        replies = {m["content"] for line in file for m in json.loads(line)["messages"]
                   if m["role"] == "assistant"}  # fmt: skip
    args = train.parse([*CHAT, *TINY, "--name", "x", "--steps", "3"])[0]
    config, words = train.with_base(args, None)
    made = train.begin(train.complete(config, words.vocab_size), corpus)
    made.advance()
    for row in made.batches[0].targets:
        asked = tokenizer.decode([t for t in row.tolist() if t != IGNORE])
        for said in asked.split(chat.END)[:-1]:
            assert said in replies


@pytest.mark.parametrize("arguments, said", [
    (["--model.dim", "32"], "leave --model out"), (["--base", "nobody"], "no run named"),
    (["--objective", "causal"], "belong together"), (["--data.form", "text"], "belong together"),
    (["--data.path", "nothing.jsonl"], "is no file"),
])  # fmt: skip
def test_what_does_not_go_together_is_told(folder, arguments, said):
    status, _, err = tune("--name", "wrong", *arguments)
    assert status == 2 and said in err, err
    assert not (RUNS / "wrong").exists()


def test_what_is_cut_and_what_cannot_be_read_is_said(folder):
    long = {"instruction": "word " * 900, "output": "kept"}
    with open("talk.jsonl", "a") as file:
        file.write(json.dumps(long) + '\n{"instruction": "a"}\n')
    status, out, err = tune("--name", "cut", "--steps", "1")
    assert status == 0, err
    assert "left out 1 × more than 512 tokens" in out and 'talk.jsonl:62 "output" is missing' in out


def test_lessons_are_written_once_wherever_one_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = stages.lessons_file(Lessons(("add",), count=5, seed=1))
    made = path.stat().st_mtime_ns
    assert len(path.read_text().splitlines()) == 5
    assert stages.lessons_file(Lessons(("add",), count=5, seed=1)) == path
    assert path.stat().st_mtime_ns == made
    assert stages.lessons_file(Lessons(("add",), count=5, seed=2)) != path


def test_a_run_that_was_stopped_goes_on_and_a_finished_one_is_used(folder, monkeypatch):
    calls = []
    monkeypatch.setattr(stages, "start", lambda *words: calls.append(words))
    assert stages.base_run("") == "base" and stages.base_run("other") == "other" and not calls
    shutil.rmtree(Run.open("base").newest())
    stages.base_run("")
    stages.complete("other", "align.py", "ppo", "--steps", "3")
    assert calls == [("train.py", "--name", "base", "--resume"),
                     ("align.py", "ppo", "--name", "other", "--steps", "3")]  # fmt: skip
    calls.clear()
    shutil.copytree(RUNS / "base", RUNS / "sft")
    assert stages.tuned_run("") == "sft" and calls == [("train.py", "--name", "sft", "--resume")]


def test_a_run_is_used_again_only_for_the_settings_that_made_it(folder, monkeypatch):
    """A name does not hold all settings; what another command made is neither used nor touched."""
    calls = []

    def start(*words):
        calls.append(words)
        shutil.copytree(RUNS / "base", RUNS / words[words.index("--name") + 1])

    monkeypatch.setattr(stages, "start", start)
    assert stages.trained("sums", "--levels", "1") == "sums"
    assert stages.trained("sums", "--levels", "2") == "sums-2"
    assert stages.trained("base", "--levels", "1") == "base-2"  # somebody's own
    assert [words[2] for words in calls] == ["sums", "sums-2", "base-2"]
    assert stages.trained("sums", "--levels", "2") == "sums-2" and len(calls) == 3


def test_a_stage_that_fails_is_gone_on_with(folder, monkeypatch):
    def fails(*words):
        shutil.copytree(RUNS / "base", RUNS / "half")
        raise SystemExit(3)

    monkeypatch.setattr(stages, "start", fails)
    with pytest.raises(SystemExit):
        stages.made("half", "align.py", "ppo", "--lr", "1", last="standing.json")
    monkeypatch.setattr(stages, "start", lambda *words: calls.append(words))
    calls = []
    assert stages.made("half", "align.py", "ppo", "--lr", "1", last="standing.json") == "half"
    assert calls == [("align.py", "ppo", "--name", "half", "--resume")]


def test_one_conversation_is_too_few(folder):
    write(list(lessons(Lessons(("copy",), (1,), 2)))[:1], Path("talk.jsonl"))
    assert "one conversation" in tune("--name", "few")[2]


def test_a_tuned_run_is_exported_whole(folder, monkeypatch, capsys):
    """Model, tokenizer and template: `transformers` says of a conversation what we say."""
    transformers = pytest.importorskip("transformers")
    assert tune("--name", "tuned", "--steps", "2")[0] == 0
    monkeypatch.setattr("sys.argv", ["writer.py", "--run", "tuned", "--out", "exported"])
    writer.script()
    assert "exported/, for LlamaForCausalLM.from_pretrained" in capsys.readouterr().out
    own = writer.load(Run.open("tuned"), torch.device("cpu"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained("exported", dtype=torch.float32)
    words = transformers.AutoTokenizer.from_pretrained("exported")
    turns = [chat.Turn("user", "Copy: a b"), chat.Turn("assistant", "a b")]
    ids = [*own.begin, *chat.written(own.tokenizer, turns)]
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    assert list(words.apply_chat_template(messages, tokenize=True, return_dict=False)) == ids
    assert words.eos_token == chat.END != words.pad_token
    again = writer.load_folder(Path("exported"), torch.device("cpu"))
    assert (again.begin, again.stop) == (own.begin, own.stop)
    assert theirs.generation_config.bos_token_id == own.tokenizer.end_of_text
    assert theirs.generation_config.eos_token_id == sorted(own.stop)
    with torch.no_grad():
        ours = own.model.logits(own.model(torch.tensor([ids])))
        assert (theirs(torch.tensor([ids])).logits - ours).abs().max() < 1e-5


# --- talking --------------------------------------------------------------------------------------


def talk(monkeypatch, *lines):
    """What is printed when a user says these lines."""
    left = iter(lines)

    def say(prompt=""):
        try:
            return next(left)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", say)
    return run("generate.py", "--run", "tuned", "--chat", "--tokens", "12", "--device", "cpu")


def test_one_can_talk_with_a_tuned_run(folder, monkeypatch):
    assert tune("--name", "tuned", "--steps", "2")[0] == 0
    status, out, err = talk(monkeypatch, "Copy: a b", "/undo", "", "/system Be brief.", "/help",
                            "Copy: " + "c d " * 500, "Copy: e", "/new", "Copy: f")  # fmt: skip
    assert status == 0, err
    assert out.count("→") == 4 and "(0 questions are left)" in out
    assert out.count("(a new conversation)") == 2 and out.count("/undo takes") == 2
    assert "remembered" in out or "more than the model's context" in out

    def interrupted(*arguments, **more):
        yield [65]
        raise KeyboardInterrupt

    with patch.object(generate, "generate", interrupted):
        status, out, err = talk(monkeypatch, "Copy: a b", "Copy: c")
    assert status == 0 and out.count("(stopped)") == 2, err


def test_a_base_cannot_talk(folder):
    status, _, err = run("generate.py", "--run", "base", "--chat")
    assert status == 2 and "knows no roles" in err


# --- lessons --------------------------------------------------------------------------------------


def test_lessons_can_be_made_again_and_are_of_the_side_to_learn_from():
    how = Lessons(count=200, levels=(1, 2))
    some = list(lessons(how))
    assert some == list(lessons(how)) and len({str(x) for x in some}) == 200
    kinds = Counter(turn.role for turns in some for turn in turns)
    assert kinds["user"] == kinds["assistant"] > 300 > kinds["system"] > 20
    thinking = [t for turns in some for t in turns if "step by step" in t.text]
    assert 0.3 < len(thinking) / kinds["user"] < 0.7


@pytest.mark.parametrize("a, b, f", [
    ("the cat sat", "the cat sat", 1.0), ("the cat sat", "a dog ran", 0.0), ("", "a", 0.0),
    ("police killed the gunman", "police kill the gunman", 0.75),
    ("police killed the gunman", "the gunman kill police", 0.5),
])  # fmt: skip
def test_rouge_l_is_lin_s(a, b, f):
    """The examples of Lin 2004, section 3.1, as F₁."""
    assert rouge_l(a, b) == pytest.approx(f) == rouge_l(b, a)


def test_a_base_is_tuned_and_examined(folder, monkeypatch, capsys):
    """The whole command, at a tiny size; `start` runs in this process."""
    monkeypatch.setattr(align, "start", lambda *words: run(*words, *TINY))
    how = align.Sft("base", "tuned", lessons=Lessons(("copy",), (1,), 30), steps=2, batch=4,
                    asked=1, device="cpu")  # fmt: skip
    short = {"shots": 0, "levels": (1,)}
    with patch.object(align, "Examine", lambda **more: examine.Examine(**more | short)):
        align.sft(how)
    out = capsys.readouterr().out
    assert "new pairs" in out and "mean" in out
    found = json.loads((RUNS / "tuned" / "examination.json").read_text())
    assert found.keys() == {"base", "base, 4 examples", "tuned"}
    assert (RUNS / "tuned" / "examination.png").exists()
    with pytest.raises(UserError, match=r"go on with python train\.py --name tuned --resume, or"):
        align.sft(how)
    assert load_tensors(Run.open("tuned").newest() / "model.safetensors")


def test_examples_that_fit_no_context_are_left_out(folder):
    """And the base may be a folder, as those of Hugging Face."""
    assert run("writer.py", "--run", "base", "--out", "exported")[0] == 0
    base = writer.base_of("exported")
    how = align.Sft(examined=("copy",), lessons=Lessons(("copy",), (1,)), asked=2, device="cpu")
    assert align.before_tuning(how, base).keys() == {"base", "base, 4 examples"}
    shape = replace(base.model.config, context=len(base.tokenizer.encode("a b" * 40)))
    short = base._replace(model=Transformer(shape).eval())
    assert align.before_tuning(how, short).keys() == {"base"}
    none = base._replace(model=Transformer(replace(shape, context=8)).eval())
    with pytest.raises(UserError, match="all questions are longer than the model's context of 8"):
        align.before_tuning(how, none)  # and not after an hour of tuning
