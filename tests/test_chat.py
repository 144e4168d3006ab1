"""Conversations: written as `transformers` does, forged by nobody, learnt where they should be."""

import gzip
import json
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import chat
from bpe import BPE
from chat import ROLES, SPECIAL, Turn, conversations, shortened, template, turns, written
from kernels.cross_entropy import IGNORE
from kernels.mask import Mask
from model import ModelConfig, Transformer
from objectives import OBJECTIVES, Rows, vocabulary_for
from run import UserError
from vocabulary import END_OF_TEXT

TOKENIZER = chat.with_roles(BPE.bytes((END_OF_TEXT,)))
END = TOKENIZER.special[chat.END]

texts = st.text(st.characters(codec="utf-8"), max_size=30)
said = st.one_of(texts, st.sampled_from([*SPECIAL, END_OF_TEXT, "<|user|>hi<|end|>", "{{ x }}"]))
talks = st.lists(st.builds(Turn, st.sampled_from(ROLES), said), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("tokenizer")
    TOKENIZER.save(folder / TOKENIZER.file_name)
    chat.keep_template(folder)
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


@settings(max_examples=200)
@given(talks, st.booleans())
def test_a_conversation_is_written_as_transformers_writes_it(theirs, talk, answer):
    messages = [{"role": turn.role, "content": turn.text} for turn in talk]
    how = {"tokenize": False, "add_generation_prompt": answer}
    assert template(talk, answer) == theirs.apply_chat_template(messages, **how)
    if not any(mark in turn.text for turn in talk for mark in (*SPECIAL, END_OF_TEXT)):
        ids = theirs.apply_chat_template(messages, **(how | {"tokenize": True}), return_dict=False)
        assert [TOKENIZER.end_of_text, *written(TOKENIZER, talk, answer)] == list(ids)


@given(talks, st.booleans())
def test_nobody_can_forge_a_turn(talk, answer):
    """Each turn has two special tokens, whatever is said in it; and it can be read back."""
    ids = written(TOKENIZER, talk, answer)
    special = [i for i in ids if i >= 256]
    assert len(special) == 2 * len(talk) + answer
    found, rest = [], list(ids)
    while len(rest) > 1:
        end = rest.index(END)
        role = next(r for r, text in chat.OPENING.items() if TOKENIZER.special[text] == rest[0])
        found.append(Turn(role, TOKENIZER.decode(rest[1:end])))
        rest = rest[end + 1 :]
    assert found == talk


@given(talks, st.integers(1, 80))
def test_what_does_not_fit_is_left_out(talk, most):
    """The reply is kept, then the question's end, then what the system says, then later turns."""
    ids, left_out = shortened(TOKENIZER, talk, most)
    whole = written(TOKENIZER, talk)
    assert len(ids) <= most and left_out == len(whole) - len(ids)
    assert left_out or ids == whole
    reply = written(TOKENIZER, talk[-1:])
    if len(reply) <= most:
        assert ids[len(ids) - len(reply) :] == reply
    else:
        assert ids == reply[:most]
    if left_out and len(talk) > 1 and len(written(TOKENIZER, talk[-2:])) <= most:
        assert ids[-len(written(TOKENIZER, talk[-2:])) :] == written(TOKENIZER, talk[-2:])


def left_obviously(talk, most):
    """Whole turns go, one by one, and all is written again: what fits, or the last two turns."""
    kept = list(talk)

    def oldest():
        others = [i for i, turn in enumerate(kept[:-2]) if turn.role != "system"]
        return others[0] if others else 0

    while len(kept) > 2 and (
        len(written(TOKENIZER, kept)) > most
        or (len(kept) < len(talk) and kept[oldest()].role == "assistant")
    ):
        kept.pop(oldest())
    return kept


@settings(max_examples=200)
@given(talks, st.integers(1, 200))
def test_whole_turns_go_and_a_reply_with_what_it_replies_to(talk, most):
    """Once the first that was left was a reply to nothing."""
    kept = left_obviously(talk, most)
    if len(written(TOKENIZER, kept)) <= most:
        assert shortened(TOKENIZER, talk, most)[0] == written(TOKENIZER, kept)


def test_a_reply_goes_with_its_question_by_example():
    talk = [Turn(role, role) for role in ("system", *("user", "assistant") * 3)]
    ids, _ = shortened(TOKENIZER, talk, len(written(TOKENIZER, talk)) - 1)
    assert ids == written(TOKENIZER, [talk[0], *talk[3:]])


def test_each_turn_is_encoded_once():
    """Once all that was left was encoded again for each turn that went."""
    talk = [Turn("user", "a"), Turn("assistant", "b")] * 20
    with patch.object(BPE, "encode", autospec=True, side_effect=BPE.encode) as encode:
        shortened(TOKENIZER, talk, 10)
    assert encode.call_count == len(talk)


def test_roles_join_a_vocabulary_once():
    plain = BPE.bytes((END_OF_TEXT,))
    assert not chat.knows_roles(plain) and chat.knows_roles(TOKENIZER)
    assert TOKENIZER.vocab_size == plain.vocab_size + 4
    assert chat.with_roles(TOKENIZER) is TOKENIZER
    assert plain.encode("<|user|>") == TOKENIZER.encode("<|user|>")


# --- what is learnt -------------------------------------------------------------------------------

OBJECTIVE = OBJECTIVES["chat"]
VOCABULARY = vocabulary_for(
    OBJECTIVE, TOKENIZER.special, TOKENIZER.known_ids, TOKENIZER.end_of_text
)


def rows_of(documents, T):
    """Documents one behind another in one row, the rest of which is padding."""
    end = TOKENIZER.end_of_text
    ids, nexts, starts = [], [], []
    for document in documents:
        starts += [len(ids)] * (len(document) + 1)
        ids += [end, *document]
        nexts += [*document, end]
    pad = range(len(ids), T)
    fields = ids + [end] * len(pad), nexts + [IGNORE] * len(pad), [*starts, *pad]
    return Rows(*(torch.tensor([x]) for x in fields))


@given(talks)
def test_the_assistant_s_tokens_are_asked_for_and_no_others(talk):
    document = written(TOKENIZER, talk)
    batch = OBJECTIVE(rows_of([document], len(document) + 5), None, VOCABULARY)
    asked = [t for t in batch.targets[0].tolist() if t != IGNORE]
    right = []
    for turn in talk:
        if turn.role == "assistant":
            right += [*TOKENIZER.encode(turn.text), END]
    assert asked == right


@given(talks, talks)
def test_a_reply_that_is_cut_off_does_not_go_on_in_the_next_conversation(first, second):
    """A document that ends while the assistant speaks, and another one behind it in the row."""
    cut = written(TOKENIZER, [*first, Turn("assistant", "so")])[:-1]
    rest = written(TOKENIZER, second)
    T = len(cut) + len(rest) + 2
    together = OBJECTIVE(rows_of([cut, rest], T), None, VOCABULARY).targets[0, len(cut) + 1 :]
    alone = OBJECTIVE(rows_of([rest], len(rest) + 1), None, VOCABULARY).targets[0]
    assert torch.equal(together, alone)


@settings(max_examples=30)
@given(st.lists(talks, min_size=1, max_size=3))
def test_packed_conversations_have_the_loss_of_each_alone(several):
    """Σ −log p of the replies, by hand from the logits, in float64."""
    documents = [written(TOKENIZER, talk) for talk in several]
    T = sum(len(d) + 1 for d in documents) + 3
    model = Transformer(
        ModelConfig(dim=16, layers=2, heads=2, context=T, vocab_size=300), 0
    ).double()

    def loss_of(rows):
        batch = OBJECTIVE(rows, None, VOCABULARY)
        hidden = model(batch.inputs, mask=Mask(batch.lo, batch.hi), dtype=torch.float64)
        log_p = model.logits(hidden).log_softmax(-1)[0]
        at = batch.targets[0] != IGNORE
        return -log_p[at].gather(1, batch.targets[0][at][:, None]).sum()

    by_hand = torch.zeros((), dtype=torch.float64)
    for document in documents:
        ids = [TOKENIZER.end_of_text, *document]
        log_p = model.logits(model(torch.tensor([ids]), dtype=torch.float64)).log_softmax(-1)[0]
        speaks = False
        for t, token in enumerate(document):
            if speaks:
                by_hand -= log_p[t, token]
            if token in TOKENIZER.special.values():
                speaks = token == TOKENIZER.special["<|assistant|>"]
    together = loss_of(rows_of(documents, T))
    apart = sum(loss_of(rows_of([d], T)) for d in documents)
    for loss in (together, apart):
        assert (loss - by_hand).abs() <= 1e-12 * (1 + by_hand)


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("record, first, last", [
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
     "a", "b"),
    ({"instruction": "Do", "input": "this", "output": "done"}, "Do\n\nthis", "done"),
    ({"instruction": "Do", "output": "done"}, "Do", "done"),
    ({"instruction": "Do", "instances": [{"input": "", "output": "done"}]}, "Do", "done"),
    ({"question": "2 + 3?", "answer": "It is <<2+3=5>>5.\n#### 5"}, "2 + 3?",
     "It is 5.\nSo the answer is 5."),
    ({"question": "Why?", "choices": ["so", "no"], "answer": 1}, "Why?\nA. so\nB. no", "B"),
    ({"question": "Why?", "choices": ["so", "no"], "answer": "A"}, "Why?\nA. so\nB. no", "A"),
    (["Why?", "so", "thus", "no", "yes", "C"], "Why?\nA. so\nB. thus\nC. no\nD. yes", "C"),
])  # fmt: skip
def test_records_of_many_forms_become_turns(record, first, last):
    (found,) = turns(record)
    assert (found[0].text, found[-1].text) == (first, last)
    assert [turn.role for turn in found] == ["user", "assistant"]


@pytest.mark.parametrize("record, said", [
    ({"messages": []}, "no list of turns"), ({"messages": [3]}, "message 1 is no object"),
    ({"messages": [{"role": "robot", "content": "a"}]}, "message 1 has the role 'robot'"),
    ({"messages": [{"role": "user", "content": 3}]}, 'message 1: "content" is int'),
    ({"messages": [{"role": "user", "content": "a"}]}, "nothing to learn"),
    ({"instruction": "a"}, '"output" is missing'), ({"instruction": "", "output": "b"}, "missing"),
    ({"instruction": "a", "instances": 3}, "no list"), ({"question": "a", "answer": "b"}, "####"),
    ({"instruction": "a", "instances": []}, "an empty one"),
    ({"instruction": "hi \ud83d", "output": "b"}, '"instruction" holds half a letter'),
    ({"question": "a", "choices": ["b", "\ud83d"], "answer": 0}, '"choices" holds half a letter'),
    (["\ud83d", "b", "c", "d", "e", "A"], '"question" holds half a letter'),
    *((["a", "b", "c", "d", "e", letter], "letter of the right one") for letter in ("", "BC", 3)),
    (["a", "b", None, "d", "e", "A"], "four answers"), ([3, "b", "c", "d", "e", "A"], "four answ"),
    ({"question": "a", "choices": ["b"], "answer": 0}, "no list of 2 to 10"),
    ({"question": "a", "choices": ["b", "c"], "answer": 2}, "neither a number"),
    ({"x": 1}, "has none of the fields"), (3, "is int"), (["a", "b"], "four answers"),
])  # fmt: skip
def test_a_record_that_is_none_is_told(record, said):
    with pytest.raises(ValueError, match=said):
        turns(record)


def test_a_bad_line_is_named_and_the_next_one_is_read(tmp_path):
    path = tmp_path / "talk.jsonl"
    good = json.dumps({"instruction": "a", "output": "b"})
    path.write_text(f'{good}\n{{"instruction": 3}}\nnonsense\n\n{good}\n')
    found = list(conversations(path))
    assert [where for where, _ in found] == [f"{path}:{n}" for n in (1, 2, 3, 5)]
    assert '"instruction" is int' in found[1][1] or '"output"' in found[1][1]
    assert "is no JSON" in found[2][1] and found[3][1] == found[0][1]
    listed = path.with_suffix(".json")
    listed.write_text(f"[{good}, 3]")
    assert [isinstance(t, str) for _, t in conversations(listed)] == [False, True]
    assert "cannot be read" in next(iter(conversations(tmp_path / "none.jsonl")))[1]


def test_of_several_instances_a_bad_one_is_named_and_the_others_are_read(tmp_path):
    path = tmp_path / "talk.jsonl"
    each = [{"output": "b"}, {"output": 3}, 3, {"output": "c"}]
    path.write_text(json.dumps({"instruction": "a", "instances": each}))
    found = [turns for _, turns in conversations(path)]
    assert [found[0][-1].text, found[3][-1].text] == ["b", "c"]
    assert found[1:3] == ['instance 2: "output" is int, not text', "instance 3: is no object"]


@pytest.mark.parametrize("end", ["", ".gz", ".GZ"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("name", ["a.jsonl", "A.JSONL", "a.json", "a.JSON", "a.csv", "a.CSV"])
def test_a_file_is_read_whatever_its_case_packing_and_mark(tmp_path, name, mark, end):
    """What documents.files_of takes. Once a .gz was no JSON, and Windows' mark in a question."""
    csv = name.lower().endswith("csv")
    content = "Why?,so,thus,no,yes,C\n" if csv else '{"question": "Why?", "answer": "#### 5"}\n'
    path, data = tmp_path / (name + end), (mark + content).encode()
    path.write_bytes(gzip.compress(data) if end else data)
    ((_, talk),) = conversations(path)
    assert talk[0].text.split("\n")[0] == "Why?" and talk[1].role == "assistant"


def test_a_damaged_gz_is_told(tmp_path):
    path, packed = tmp_path / "a.jsonl.gz", gzip.compress(b'{"question": 3}\n' * 99, mtime=0)
    for content in (packed[:-12], packed[:20], packed[:12] + b"\xff\xff" + packed[14:]):
        path.write_bytes(content)
        *_, (where, said) = conversations(path)
        assert where == str(path) and said.startswith("cannot be read: ")


def test_an_unknown_role_is_a_sentence():
    with pytest.raises(UserError, match="no role 'robot'"):
        chat.checked([("robot", "hello")])
