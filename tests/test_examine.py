"""Examinations: log-likelihoods are those of `transformers`, and nothing depends on batches."""

import gzip
import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import chat
import examine
import packing
import tasks
from bpe import BPE
from examine import Asked, Examine, Manner, bootstrap, chosen, examined, log_likelihoods, prompts
from generate import Sampling, generate
from model import ModelConfig, Transformer
from packing import Shards, ShardWriter
from run import UserError
from vocabulary import END_OF_TEXT
from writer import Writer

TOKENIZER = BPE.bytes((END_OF_TEXT,))
CONFIG = ModelConfig(dim=24, layers=2, heads=2, context=512, vocab_size=264, qk_norm=False)


def writer(talks: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0) -> Writer:
    tokenizer = chat.with_roles(TOKENIZER) if talks else TOKENIZER
    model = Transformer(CONFIG, seed).to(dtype).eval()
    stop = {tokenizer.end_of_text} | ({tokenizer.special[chat.END]} if talks else set())
    return Writer(model, tokenizer, [tokenizer.end_of_text], stop)


ids = st.lists(st.integers(0, 255), min_size=1, max_size=30)


@settings(max_examples=25)
@given(st.lists(st.tuples(ids, ids), min_size=1, max_size=9), st.integers(1, 400))
def test_log_likelihoods_do_not_depend_on_what_stands_beside(pairs, at_once):
    asked, answers = [[256, *a] for a, _ in pairs], [b for _, b in pairs]
    one = writer(dtype=torch.float64)
    together = log_likelihoods(one, asked, answers, at_once)
    for a, b, found in zip(asked, answers, together, strict=True):
        alone = log_likelihoods(one, [a], [b])
        assert (alone - found).abs() < 1e-11
        log_p = one.model.logits(one.model(torch.tensor([a + b]))).log_softmax(-1)[0]
        by_hand = sum(log_p[len(a) - 1 + i, token] for i, token in enumerate(b))
        assert (by_hand - found).abs() < 1e-11


def test_log_likelihoods_are_those_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    one = writer()
    one.model.save(tmp_path / "model", end=256)
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs = load(tmp_path / "model", dtype=torch.float32).eval()
    rng = random.Random(0)
    pairs = [([256, *rng.choices(range(256), k=rng.randint(1, 40))],
              rng.choices(range(256), k=rng.randint(1, 20))) for _ in range(20)]  # fmt: skip
    found = log_likelihoods(one, [a for a, _ in pairs], [b for _, b in pairs])
    for (a, b), ours in zip(pairs, found, strict=True):
        with torch.no_grad():
            log_p = theirs(torch.tensor([a + b])).logits.double().log_softmax(-1)[0]
        right = sum(log_p[len(a) - 1 + i, token] for i, token in enumerate(b))
        assert abs(ours - right) < 1e-5 * len(b)


def test_log_likelihoods_are_those_of_the_harness(tmp_path):
    """EleutherAI's lm-evaluation-harness, on the folder that a run is written to."""
    models = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    one = writer()
    one.model.save(tmp_path / "model", end=256)
    one.tokenizer.save(tmp_path / "model" / "tokenizer.json")
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END_OF_TEXT,
         "eos_token": END_OF_TEXT}
    ))  # fmt: skip
    theirs = models.HFLM(str(tmp_path / "model"), device="cpu", dtype="float32", batch_size=3,
                         add_bos_token=True)  # fmt: skip
    rng = random.Random(0)

    def text(letters):
        return "".join(rng.choices(letters, k=rng.randint(1, 30)))

    pairs = [(f"{text('ab cd?')}:", f" {text('xyz')}") for _ in range(20)]
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    right = [log_p for log_p, _ in theirs.loglikelihood(asked, disable_tqdm=True)]
    found = log_likelihoods(one, [[256, *one.tokenizer.encode(a)] for a, _ in pairs],
                            [one.tokenizer.encode(b) for _, b in pairs])  # fmt: skip
    for (_, b), ours, other in zip(pairs, found.tolist(), right, strict=True):
        assert abs(ours - other) < 1e-5 * len(b)


def test_answers_do_not_depend_on_what_stands_beside():
    one, rng = writer(talks=True), random.Random(0)
    asked = [[256, *rng.choices(range(256), k=rng.randint(1, 60))] for _ in range(90)]
    greedy = Sampling(greedy=True)
    together = examine.replies(one, asked, greedy, 12, 0)
    for prompt, said in zip(asked[::9], together[::9], strict=True):
        steps = generate(one.model, [prompt], 12, greedy, one.stop, 0, examine.unknown(one))
        alone = [t for (t,) in steps if t is not None and t not in one.stop]
        assert said == one.tokenizer.decode(alone)


QUESTIONS = [Asked("k", f"q{i}", "no" if i % 3 else "yes", f"So the answer is {i}.", ("yes", "no"))
             for i in range(12)]  # fmt: skip


@pytest.mark.parametrize("talks", [False, True])
def test_the_likeliest_choice_is_taken(talks):
    one = writer(talks)
    asked = prompts(one, QUESTIONS, [], Manner(chat=talks), 0)
    for per_byte in (False, True):
        said = chosen(one, QUESTIONS, asked, per_byte)
        for q, prompt, best in zip(QUESTIONS, asked, said, strict=True):
            scores = []
            for choice in q.choices:
                text = choice if talks else f" {choice}"
                (score,) = log_likelihoods(one, [prompt], [one.tokenizer.encode(text)])
                scores.append(score / (len(choice) if per_byte else 1))
            assert best == q.choices[int(torch.stack(scores).argmax())]


def test_examples_stand_before_the_question_and_are_drawn_by_the_seed():
    one = writer()
    how = Manner(shots=3)
    some, same, others = (prompts(one, QUESTIONS, QUESTIONS, how, seed) for seed in (0, 0, 1))
    assert some == same and some != others
    for q, prompt in zip(QUESTIONS, some, strict=True):
        text = one.tokenizer.decode(prompt[1:])
        assert text.count("Question:") == 4 and text.endswith(f"Question: {q.question}\nAnswer:")
        assert text.count(f"Question: {q.question}\n") == 1
    thinking = prompts(one, QUESTIONS[:1], QUESTIONS, Manner(2, think=True), 0)[0]
    text = one.tokenizer.decode(thinking[1:])
    assert text.count("step by step") == 3 and text.count("So the answer is") == 2
    talk = prompts(writer(talks=True), QUESTIONS[:1], QUESTIONS, Manner(2, chat=True), 0)[0]
    assert sum(i >= 257 for i in talk) == 2 * 5 + 1


def test_wordings_are_new_or_known_and_contents_always_new():
    for wording, side in (("new", "test"), ("known", "train")):
        how = Examine(tasks=("add",), levels=(2,), wording=wording, count=40)
        asked, _ = examine.questions_of(how)
        right = [tasks.problem("add", 2, "test", n, asked=side) for n in range(40)]
        assert [q.question for q in asked] == [p.question for p in right]
        assert {p.template for p in right} <= {*tasks.templates("add", side)}


def test_what_cannot_be_asked_is_told(tmp_path, capsys):
    one = writer()
    with pytest.raises(UserError, match="more than the 11 examples of k"):
        prompts(one, QUESTIONS, QUESTIONS, Manner(shots=12), 0)
    table = tmp_path / "long.csv"
    table.write_text(f"{'x' * 600},a,b,c,d,B\n")
    with pytest.raises(UserError, match="all questions are longer than the model's context of 512"):
        examined(one, Examine(file=str(table)))
    table.write_text(f"{'x' * 600},a,b,c,d,B\n" + f"Why?,{'y' * 500},b,c,d,B\nWhy?,a,b,c,d,B\n")
    (found,) = examined(one, Examine(file=str(table), ask="answer", tokens=3))
    assert found.asked == 1 and "left out 2 of 3 questions" in capsys.readouterr().out
    with pytest.raises(UserError, match="no task 'dance'"):
        Examine(tasks=("dance",))
    with pytest.raises(UserError, match="add has none"):
        examined(one, Examine(tasks=("add",), count=1, ask="choice"))
    for wrong, why in (
        ({"votes": 0}, "at least 1"), ({"votes": 3, "ask": "choice"}, "leave --ask out"),
        ({"run": "a", "model": "b"}, "give one"), ({"tasks": ()}, "one at least"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=why):
            Examine(**wrong)
    reads = one._replace(model=Transformer(replace(CONFIG, arch="encoder")))
    with pytest.raises(UserError, match="for a decoder"):
        examined(reads, Examine())


def test_steps_have_lines_and_end_where_examples_do(tmp_path, monkeypatch):
    """GSM8K's worked answers have many lines, whose last is the answer: given back, it is right."""
    path = tmp_path / "gsm.jsonl"
    clips = "Natalia sold 48/2 = 24 clips.\n48+24 = 72 clips.\n#### 1,072"
    path.write_text(json.dumps({"question": "How many?", "answer": clips}) + "\n")
    (asked,) = examine.from_file(path)
    said = f" {asked.worked}\n\nQuestion: And then?\nAnswer: 3"
    monkeypatch.setattr(examine, "generate",
                        lambda *_: iter([[t] for t in TOKENIZER.encode(said)]))  # fmt: skip
    for think, right in ((True, 1), (False, 0)):
        (found,) = examined(writer(), Examine(file=str(path), think=think))
        assert found.right == right, found
    assert examine.right(asked, "1072") and examine.right(asked, "So the answer is 1,072.")
    assert not examine.right(asked, "10,72") and not examine.right(asked, "1.072")


def test_an_answer_of_one_letter_is_no_choice(tmp_path):
    path = tmp_path / "open.jsonl"
    path.write_text(json.dumps({"instruction": "Apple begins with?", "output": "A"}) + "\n")
    (asked,) = examine.from_file(path)
    assert asked.choices == () and examine.unlisted(asked) == asked
    with pytest.raises(UserError, match="open has none"):
        examined(writer(), Examine(file=str(path), ask="choice"))


def test_a_chosen_answer_is_right_whatever_it_says():
    odd = Asked("k", "q", "The answer is unknown", choices=("The answer is unknown", "etc ."))
    assert examine.right(odd, odd.answer) and not examine.right(odd, "etc .")


def test_examples_of_one_kind_may_be_called_otherwise(tmp_path):
    for name in ("gsm", "open"):
        record = {"instruction": f"{name}?", "output": "yes"}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(record) + "\n")
    file, examples = (str(tmp_path / f"{name}.jsonl") for name in ("gsm", "open"))
    (found,) = examined(writer(), Examine(file=file, examples=examples, shots=1, tokens=3))
    assert found.kind == "gsm" and found.asked == 1


@pytest.mark.parametrize("shard_tokens", [1 << 20, 40])
def test_what_was_trained_on_is_found(tmp_path, monkeypatch, shard_tokens):
    """A question of which 13 tokens in a row, or all, stand in the training text, in any file."""
    monkeypatch.setattr(packing, "SHARD_TOKENS", shard_tokens)
    texts = ["The quick brown fox jumps over the lazy dog again.", "Short.", "Nothing of it here.",
             "x" * 70_000 + " At the end of much text there is this."]  # fmt: skip
    shard = ShardWriter(tmp_path, "train", np.dtype(np.uint16), 256)
    for text in texts:
        shard.write(TOKENIZER.encode(text), len(text))
    meta = shard.close() | {"dtype": "uint16"}
    asked = {
        "Why does a brown fox jumps over it?": True,  # 18 letters in a row
        "Why does a brown dog jump?": False,
        "Short.": True, "Shorter.": False, "Of other things nothing.": False,
        "Short.Nothing of": False,  # across a border
        "Is much text there where?": True,  # far behind
    }  # fmt: skip
    questions = [Asked("k", text, "") for text in asked]
    found = examine.leaked(questions, TOKENIZER, Shards(tmp_path, "train", meta))
    assert dict(zip(asked, found, strict=True)) == asked
    assert examine.words_in_tokens([Asked("k", "one two", ""), Asked("k", "three", "")],
                                   TOKENIZER) == math.ceil(13 * 12 / 3)  # fmt: skip
    assert examine.words_in_tokens([Asked("k", "", "")], TOKENIZER) == 0
    assert examine.leaked([Asked("k", "", "x")], TOKENIZER, Shards(tmp_path, "train", meta)) == [
        False
    ]


@pytest.mark.parametrize("marks", [[True] * 30, [False] * 30, [True, False] * 40])
def test_the_interval_holds_the_share(marks):
    assert bootstrap([True] * 10) == (0.05**0.1, 1.0) and bootstrap([False]) == (0.0, 0.95)
    low, high = bootstrap(marks)
    assert low <= sum(marks) / len(marks) <= high
    assert low < high


def test_the_interval_holds_the_truth_in_about_95_of_100_cases():
    rng, held = random.Random(0), 0
    for n in range(300):
        low, high = bootstrap([rng.random() < 0.3 for _ in range(80)], n, draws=500)
        held += low <= 0.3 <= high
    assert 0.89 <= held / 300 <= 0.99


def test_the_most_frequent_answer_counts():
    assert examine.voted(["1", "So the answer is 2.", "2", "3"]) == "2"
    assert examine.voted(["4", "5"]) == "4"


def test_questions_come_from_files(tmp_path):
    path = tmp_path / "gsm.jsonl"
    path.write_text(json.dumps({"question": "2 + 3?", "answer": "2 + 3 = 5\n#### 5"}) + "\n")
    (found,) = examine.from_file(path)
    assert (found.kind, found.answer, found.choices) == ("gsm", "5", ())
    assert found.worked.endswith("So the answer is 5.")
    for name in ("test.jsonl", "gsm_train.jsonl"):
        path.rename(tmp_path / name)
        assert examine.from_files(tmp_path)[0].kind == (tmp_path.name if name[0] == "t" else "gsm")
        (tmp_path / name).rename(path)
    (tmp_path / "more_TEST.JSONL.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert [q.kind for q in examine.from_files(tmp_path)] == ["gsm", "more_TEST"]
    (tmp_path / "more_TEST.JSONL.gz").unlink()
    table = tmp_path / "history.csv"
    table.write_text('"Who, when?",Ann,Ben,Cleo,Dan,B\n')
    (found,) = examine.from_file(table)
    assert found.answer == "B" and found.choices == tuple("ABCD") and "B. Ben" in found.question
    bare = examine.unlisted(found)
    assert bare.question == "Who, when?" and bare.answer == "Ben"
    assert bare.choices == ("Ann", "Ben", "Cleo", "Dan") and examine.unlisted(bare) == bare
    one = replace_tokens(writer())
    table.write_text('"Who?\nA. or B.",Ann,"Ben\nof X",Cleo,Dan,B\n')
    (tricky,) = examine.from_file(table)
    assert tricky.choices == tuple("ABCD")
    assert examine.unlisted(tricky)[1:3] == ("Who?\nA. or B.", "Ben\nof X")
    table.write_text('"Who, when?",Ann,Ben,Cleo,Dan,B\n')
    for ask in ("choice", "answer", "answer-per-byte"):
        results = examined(one, Examine(file=str(table), ask=ask))
        assert [(r.kind, r.asked) for r in results] == [("history", 1)]
    assert results[0].example[1] in bare.choices and results[0].example[2] == "Ben"
    table.write_text("a,b\n")
    with pytest.raises(UserError, match=r"history.csv:1 is not a question"):
        examine.from_file(table)


def replace_tokens(one: Writer) -> Writer:
    return one._replace(model=Transformer(replace(CONFIG, vocab_size=300), 1).eval())


@pytest.mark.parametrize("more", [{}, {"shots": 1}, {"think": True, "votes": 3}])
def test_an_examination_can_be_held_again(more):
    one = writer(talks=True)
    how = Examine(tasks=("copy", "add"), levels=(1,), count=6, tokens=8, **more)
    first, again = examined(one, how), examined(one, how)
    assert first == again and [r.kind for r in first] == ["copy", "add"]
    assert all(r.asked == 6 and 0 <= r.low <= r.right <= r.high <= 1 for r in first)
    assert "copy" in examine.show(first)
