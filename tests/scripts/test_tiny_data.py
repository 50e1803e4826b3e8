"""The training text of the tiny model is deterministic, right, split as it says, and tokenizes as at inference."""

import hashlib
import itertools
import json
import pathlib
import random
import re

import pytest
import tiny.data
import tiny.problems
import tiny.recall
import tiny.tokenizer
import tokenizers
from tiny.data import END_OF_TEXT, END_OF_TURN, KINDS, LONG_MIXTURE, SHORT_MIXTURE

SHIPPED = pathlib.Path(__file__).parents[2] / "gdnjax" / "assets" / "tiny"

EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
TURN = re.compile(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", re.DOTALL)
CHATS = tuple(kind for kind in KINDS if kind.endswith(("chat", "turns", "turns_long", "chat_long", "tool")))

pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer.train_tokenizer(seed=0)


@pytest.fixture(scope="module")
def transformers_tokenizer(tokenizer, tmp_path_factory):
    from transformers import AutoTokenizer

    directory = tmp_path_factory.mktemp("tiny-tokenizer")
    tiny.tokenizer.write_tokenizer(tokenizer, directory)
    return AutoTokenizer.from_pretrained(directory)


def documents(kind, count, seed=0):
    rng = random.Random(f"{kind} {seed}")
    return [tiny.data.document(rng, kind) for _ in range(count)]


def is_chat(document):
    return document.text.startswith("<|im_start|>")


def messages(document):
    return [{"role": role, "content": content} for role, content in TURN.findall(document.text)]


def questions(document):
    """The word problems in a document, as (question, answer)."""
    if is_chat(document):
        turns = messages(document)
        asked = [(a["content"], b["content"]) for a, b in itertools.pairwise(turns)]
        return [(question, answer) for question, answer in asked if "####" in answer]
    spans = [span.text.removesuffix(END_OF_TEXT) for span in document.spans]
    pairs = zip(spans[::2], spans[1::2], strict=False)
    return [
        (prompt.strip().removeprefix("Question: ").removesuffix("\nAnswer:"), answer.strip())
        for prompt, answer in pairs
        if "####" in answer
    ]


def assert_worked_right(answer):
    *steps, last = answer.split("\n")
    number = re.fullmatch(r"#### (\d+)", last)
    assert number, answer
    equations = EQUATION.findall("\n".join(steps))
    assert len(equations) == "\n".join(steps).count("=")
    for left, operation, right, result in equations:
        if operation == "/":
            assert int(left) == int(right) * int(result), answer
        else:
            assert eval(f"{left} {operation} {right}") == int(result), answer
    # Counting weekdays has no equation: the last number counted is the answer.
    results = [result for *_, result in equations] or re.findall(r"\d+", steps[-1])
    assert results[-1] == number[1], answer


TRAINED_ON = {
    "problem_plain": "950cb107",
    "problem_shots": "e0572666",
    "problem_chat": "a2a4aa6b",
    "problem_turns": "7bfdfc0c",
    "story": "e1b847b6",
    "story_chat": "453b2253",
    "recall": "aff3f81e",
    "copy": "cb256259",
    "lookup": "817212c2",
    "chat": "80496fe1",
    "tool": "97c189db",
    "json": "8d7ada6e",
    "recall_long": "5cf1f4e5",
    "copy_long": "4f1b554f",
    "shots_long": "a134886e",
    "turns_long": "bdc89e1d",
    "story_long": "0273a22f",
    "chat_long": "3c22ae13",
}
"""Short hashes of 20 documents of each kind."""


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_what_the_shipped_model_was_trained_on(kind):
    """A change of the text needs a new model."""
    spans = [(span.text, span.learn) for document in documents(kind, 20) for span in document.spans]
    assert hashlib.sha256(repr(spans).encode()).hexdigest()[:8] == TRAINED_ON[kind]


def test_tokenizer_is_the_shipped_one(tokenizer):
    shipped = tokenizers.Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))
    assert tokenizer.to_str() == shipped.to_str()


@pytest.mark.parametrize(("file", "split", "count"), [("problems", "held_out", 500), ("shots", "train", 8)])
def test_shipped_problems_are_those_of_their_split(file, split, count):
    lines = (SHIPPED / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()
    shipped = [tiny.data.Problem(**json.loads(line)) for line in lines]
    assert shipped == tiny.data.problems(split, count, seed=0)


def test_mixtures_name_every_kind_once():
    assert sorted([*SHORT_MIXTURE, *LONG_MIXTURE]) == sorted(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_documents_are_a_function_of_the_generator(kind):
    assert documents(kind, 5) == documents(kind, 5)
    assert documents(kind, 5) != documents(kind, 5, seed=1)
    assert all(document.kind == kind for document in documents(kind, 5))


@pytest.mark.parametrize("kind", KINDS)
def test_documents_end_where_generation_ends(kind):
    for document in documents(kind, 50):
        end = END_OF_TURN if is_chat(document) else END_OF_TEXT
        assert document.spans[-1].learn
        assert document.text.endswith(end)
        assert document.text.count(END_OF_TEXT) == (not is_chat(document))
        assert all(span.text for span in document.spans)
        if is_chat(document):
            # Each reply is one learned span, and nothing else is learned.
            said = [m["content"] + END_OF_TURN for m in messages(document) if m["role"] == "assistant"]
            assert [span.text for span in document.spans if span.learn] == said


@pytest.mark.parametrize("kind", tiny.problems.PROBLEMS, ids=lambda kind: kind.__name__)
def test_every_kind_of_problem_is_worked_right(kind):
    rng = random.Random(0)
    for _ in range(1000):
        problem = kind(rng)
        assert_worked_right(problem.answer)
        assert not re.search(r"\b(\d*[02-9]|\d*11) (dollar|day|year|mile|hour|apple)\b", problem.question)


def test_answer_is_that_of_the_question():
    """The plainest kinds read back by other means than those that wrote them."""
    spoken = {"plus": "+", "minus": "-", "times": "*", "divided by": "/"}
    boxes = re.compile(r"A \w+ has (\d+) \w+\. (\d+) more are put in\. How many \w+ are in the \w+\?")
    sums = re.compile(r"What is (\d+(?: [-+*/] \d+)+)\?|(\d+ (?:plus|minus|times|divided by) \d+)\?")
    read = 0
    for problem in tiny.data.problems("train", 3000, seed=1):
        number = int(problem.answer.split("#### ")[1])
        if box := boxes.fullmatch(problem.question):
            assert number == int(box[1]) + int(box[2])
        elif asked := sums.fullmatch(problem.question):
            expression = asked[1] or asked[2]
            for word, operation in spoken.items():
                expression = expression.replace(word, operation)
            assert number == eval(expression)
        else:
            continue
        read += 1
    assert read > 100


def test_splits_are_disjoint_and_distinct():
    train, held_out = (tiny.data.problems(split, 2000, seed=0) for split in ("train", "held_out"))
    assert len({problem.question for problem in train}) == len({problem.question for problem in held_out}) == 2000
    assert not any(tiny.data.is_held_out(problem.question) for problem in train)
    assert all(tiny.data.is_held_out(problem.question) for problem in held_out)
    assert held_out == tiny.data.problems("held_out", 2000, seed=0) != tiny.data.problems("held_out", 2000, seed=1)


@pytest.mark.parametrize("kind", KINDS)
def test_documents_hold_no_held_out_question(kind):
    found = [pair for document in documents(kind, 200) for pair in questions(document)]
    assert found or not kind.startswith(("problem", "shots", "turns", "chat"))
    for question, answer in found:
        assert not tiny.data.is_held_out(question), question
        assert_worked_right(answer)


def test_few_shot_prompt_is_that_of_the_documents():
    for document in documents("problem_shots", 100):
        *examples, (question, _) = questions(document)
        prompt = tiny.data.shots([tiny.data.Problem(*pair) for pair in examples], question)
        assert "".join(span.text for span in document.spans[:-1]) == prompt


@pytest.mark.parametrize("kind", ["recall", "recall_long", "copy", "copy_long", "lookup"])
def test_what_is_recalled_stands_in_the_prompt(kind):
    for document in documents(kind, 200):
        before = ""
        for span in document.spans:
            text = re.sub(r"( \||\n| /| and)$", "", span.text.removesuffix(END_OF_TEXT).removesuffix(END_OF_TURN))
            if span.learn and text not in ("I will remember that.", "Okay."):
                assert text.strip() in before, document.text
            before += span.text


def test_facts_have_one_answer():
    rng = random.Random(0)
    for _ in range(200):
        facts = tiny.recall._facts(rng, 20, 20, 0)
        answers = [answer for _, _, answer in facts.questions]
        assert len({question for question, _, _ in facts.questions}) == len(set(answers)) == 20


def test_story_is_about_what_was_asked():
    for document in documents("story_chat", 200):
        *_, user, assistant = messages(document)
        being, thing = re.findall(r"\ban? (?!story|short)(\w+)", user["content"])
        assert re.search(rf"\b{being}\b", assistant["content"])
        assert re.search(rf"\b{thing}\b", assistant["content"])


@pytest.mark.parametrize("kind", KINDS)
def test_documents_fit_their_mixture(tokenizer, kind):
    shortest, longest = (1, tiny.data.SHORT_LIMIT) if kind in SHORT_MIXTURE else (tiny.data.SHORT_LIMIT, 2048)
    for ids, learn in tiny.tokenizer.encode_all(tokenizer, documents(kind, 200)):
        assert shortest <= len(ids) == len(learn) <= longest


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_decode_to_the_text(tokenizer, kind):
    for document in documents(kind, 20):
        ids, learn = tiny.tokenizer.encode(tokenizer, document)
        assert tokenizer.decode(ids, skip_special_tokens=False) == document.text
        learned = [token for token, learned in zip(ids, learn, strict=True) if learned]
        text = "".join(span.text for span in document.spans if span.learn)
        assert tokenizer.decode(learned, skip_special_tokens=False) == text


def test_tokenizer_has_exactly_its_size_and_single_digits(tokenizer):
    vocabulary = tokenizer.get_vocab()
    assert sorted(vocabulary.values()) == list(range(1024))
    assert [token for token in vocabulary if re.search(r"\d", token) and len(token) > 1] == []
    assert tokenizer.encode("4821").tokens == list("4821")
    assert tokenizer.encode("####").tokens == ["####"]
    for marker in (*tiny.tokenizer.SPECIAL_TOKENS, *tiny.tokenizer.MARKERS):
        assert tokenizer.encode(marker).tokens == [marker]
    # Any text survives, not only that of the training.
    odd = "Zürich, 東京 № 12\t\x00 🙂"
    assert tokenizer.decode(tokenizer.encode(odd).ids) == odd
    assert tokenizer.decode(tokenizer.encode("<tool_call>{}<|im_end|>").ids) == "<tool_call>{}"


def test_tokenizer_is_a_function_of_the_seed():
    one, other = (tiny.tokenizer.train_tokenizer(seed=3, vocab_size=400, documents=300) for _ in range(2))
    assert one.to_str() == other.to_str()


def test_too_few_documents_for_the_vocabulary_are_refused():
    with pytest.raises(ValueError, match="train on more"):
        tiny.tokenizer.train_on(documents("copy", 1), 5000)


@pytest.mark.parametrize("kind", CHATS)
def test_chats_are_what_the_template_writes(tokenizer, transformers_tokenizer, kind):
    for document in documents(kind, 20):
        turns = messages(document)
        assert transformers_tokenizer.apply_chat_template(turns, tokenize=False) == document.text + "\n"
        start = next(i for i, turn in enumerate(turns) if turn["role"] == "assistant")
        prompt = transformers_tokenizer.apply_chat_template(turns[:start], add_generation_prompt=True, tokenize=False)
        assert prompt == document.spans[0].text
        # A prompt at inference is one text; in training it was several spans.
        ids, _ = tiny.tokenizer.encode(tokenizer, document)
        assert transformers_tokenizer.encode(document.text) == ids


def test_shots_tokenize_alike_as_one_text(tokenizer):
    for document in documents("problem_shots", 50):
        assert tokenizer.encode(document.text).ids == tiny.tokenizer.encode(tokenizer, document)[0]


def test_tools_are_what_the_template_writes(transformers_tokenizer):
    for document in documents("tool", 50):
        turns = messages(document)
        system, listed = turns[0]["content"].split("Tools:\n")
        tools = [json.loads(line) for line in listed.split("\n")]
        given = [{"role": "system", "content": system.strip()}] if system else []
        for turn in turns[1:]:
            if call := re.fullmatch(r"<tool_call>\n(.*)\n</tool_call>", turn["content"]):
                calls = [{"type": "function", "function": json.loads(call[1])}]
                turn = {"role": "assistant", "content": None, "tool_calls": calls}
                assert calls[0]["function"]["name"] in {tool["function"]["name"] for tool in tools}
            given.append(turn)
        text = transformers_tokenizer.apply_chat_template(given, tools=tools, tokenize=False)
        assert text == document.text + "\n"


def test_json_holds_what_was_said():
    for document in documents("json", 200):
        if not is_chat(document):
            continue
        turns = [turn for turn in messages(document) if turn["role"] != "system"]
        for user, assistant in zip(turns[::2], turns[1::2], strict=True):
            if ": " in user["content"] and not user["content"].startswith("{"):
                record = json.loads(assistant["content"])
                listed = ", ".join(f"{field} {value}" for field, value in record.items())
                assert user["content"].endswith(f": {listed}")
