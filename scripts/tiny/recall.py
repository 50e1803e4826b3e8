"""Training texts that can only be continued from what they said before: facts, passages to copy, lists.

Standard library only. Everything is a pure function of the random generator that is passed in.
"""

import dataclasses
import random
from collections.abc import Callable

import tiny.stories
from tiny.documents import Document, chat, estimate_tokens, exchange, plain, system_message
from tiny.stories import COLORS
from tiny.words import NOUNS, city, digits, invented, person, two_words

PLAIN_WORDS = NOUNS + COLORS + tiny.stories.LOOKS + tiny.stories.TRAITS


def _word(rng: random.Random) -> str:
    return rng.choice(PLAIN_WORDS)


def _key(rng: random.Random) -> str:
    return rng.choice(NOUNS) if rng.random() < 0.7 else two_words(rng)


@dataclasses.dataclass(frozen=True)
class _Relation:
    """How facts of one sort are stated, asked for by the key, and asked for by the value."""

    statement: str
    question: str
    reverse: str
    key: Callable[[random.Random], str]
    value: Callable[[random.Random], str]


_RELATIONS = (
    _Relation("The code for {k} is {v}.", "What is the code for {k}?", "Which word has the code {v}?", _key, digits),
    _Relation("The code for {k} is {v}.", "What is the code for {k}?", "Which word has the code {v}?", _key, digits),
    _Relation("{k}: {v}", "What is the number of {k}?", "Whose number is {v}?", person, digits),
    _Relation("{k} = {v}", "What is {k}?", "What equals {v}?", _word, digits),
    _Relation("{k} -> {v}", "What comes after {k}?", "What comes before {v}?", _word, _word),
    _Relation("{k} lives in {v}.", "Where does {k} live?", "Who lives in {v}?", person, city),
    _Relation("{k} has the {v}.", "What does {k} have?", "Who has the {v}?", person, two_words),
    _Relation("The {k} is next to the {v}.", "What is the {k} next to?", "What is next to the {v}?", two_words, _key),
    _Relation("{k} likes the {v}.", "What does {k} like?", "Who likes the {v}?", person, _key),
    _Relation("Room {k} belongs to {v}.", "Whose room is {k}?", "Which room does {v} have?", digits, person),
    _Relation("The word of {k} is {v}.", "What is the word of {k}?", "Whose word is {v}?", person, _word),
    _Relation("The password for {k} is {v}.", "Which is for {k}?", "Whose is {v}?", _key, invented),
    _Relation("The magic number of {k} is {v}.", "What is the magic number of {k}?", "Whose is {v}?", city, digits),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Facts:
    """A text that states facts, and questions on it as (question, completion of the statement, answer)."""

    text: str
    questions: list[tuple[str, str, str]]


def _facts(rng: random.Random, count: int, questions: int, size: int) -> _Facts:
    """States `count` facts of one or two relations, with story sentences between them up to about `size` tokens."""
    relations = rng.sample(_RELATIONS, 1 if rng.random() < 0.75 else 2)
    seen: set[str] = set()
    facts: list[tuple[_Relation, str, str]] = []
    while len(facts) < count:
        relation = rng.choice(relations)
        key, value = relation.key(rng), relation.value(rng)
        if key != value and not seen & {key, value}:
            seen |= {key, value}
            facts.append((relation, key, value))
    lines = [relation.statement.format(k=key, v=value) for relation, key, value in facts]
    size -= estimate_tokens("\n".join(lines))
    separator = " " if size > 0 and rng.random() < 0.5 else "\n"
    while size > 0:
        text = tiny.stories.sentence(rng)
        lines.insert(rng.randint(0, len(lines)), text)
        size -= estimate_tokens(text)
    asked = []
    order = rng.sample(range(count), min(count, questions))
    backwards = rng.random() < 0.2
    for i in order:
        relation, key, value = facts[i]
        if backwards:
            asked.append((relation.reverse.format(v=value), "", key))
        else:
            start = relation.statement.format(k=key, v="\0").split("\0")[0].rstrip()
            asked.append((relation.question.format(k=key), start, value))
    return _Facts(separator.join(lines), asked)


def _recall_plain(rng: random.Random, kind: str, facts: _Facts) -> Document:
    spans: list[tuple[str, bool]] = [(facts.text, False)]
    complete = rng.random() < 0.4
    for question, start, answer in facts.questions:
        if complete and start:
            prompt = f"\n{start}"
        else:
            prompt = f"\nQuestion: {question}\nAnswer:"
        spans += [(prompt, False), (f" {answer}", True)]
    merged = [(spans[0][0] + "\n" * (rng.random() < 0.5) + spans[1][0], False), *spans[2:]]
    return plain(kind, *merged)


def _recall_chat(rng: random.Random, kind: str, facts: _Facts) -> Document:
    messages = system_message(rng, 0.4)
    shape = rng.randrange(3)
    first, *others = facts.questions
    if shape == 0:
        messages += exchange(f"{facts.text}\n\n{first[0]}", first[2])
    elif shape == 1:
        messages += exchange(f"{first[0]}\n\n{facts.text}", first[2])
    else:
        ask = rng.choice(("Remember this:", "Please remember:", "Here are some facts:", "Read this:"))
        messages += exchange(f"{ask}\n{facts.text}", rng.choice(("I will remember that.", "Okay.")))
        others = facts.questions
    for question, _, answer in others:
        messages += exchange(question, answer)
    return chat(kind, messages)


def recall_document(rng: random.Random) -> Document:
    """A few facts, and questions on them."""
    count = rng.choice((1, 2, 3, 4, 5, 6, 8, 10, 12))
    facts = _facts(rng, count, rng.randint(1, 9), rng.choice((0, 0, 0, 0, 100, 200)))
    return _recall_plain(rng, "recall", facts) if rng.random() < 0.55 else _recall_chat(rng, "recall", facts)


def long_recall_document(rng: random.Random) -> Document:
    """Facts spread over a long text, and many questions on them."""
    count = rng.choice((1, 3, 6, 10, 16, 20, 30, 40))
    questions = min(count, rng.randint(4, 30))
    facts = _facts(rng, count, questions, rng.randint(760, 1400) - 15 * questions)
    return _recall_plain(rng, "recall_long", facts) if rng.random() < 0.55 else _recall_chat(rng, "recall_long", facts)


def _passage(rng: random.Random, size: int) -> str:
    """Something of about `size` tokens that cannot be guessed."""
    shape = rng.randrange(7)
    if shape <= 1:
        return " ".join(_word(rng) for _ in range(max(2, size // 2)))
    if shape == 2:
        return ", ".join(rng.choice((_word, person))(rng) for _ in range(max(2, size // 3)))
    if shape == 3:
        return " ".join(str(rng.randint(0, 9)) for _ in range(max(3, size // 2)))
    if shape == 4:
        return " ".join(digits(rng) for _ in range(max(1, size // 5)))
    if shape == 5:
        return " ".join(invented(rng) for _ in range(max(2, size // 4)))
    sentences = [tiny.stories.sentence(rng)]
    while sum(map(estimate_tokens, sentences)) < size - 20:
        sentences.append(tiny.stories.sentence(rng))
    return " ".join(sentences)


def _copied(rng: random.Random, kind: str, size: int) -> Document:
    text = _passage(rng, size)
    shape = rng.randrange(5)
    if shape == 0:
        return plain(kind, (f"Copy: {text}\nCopy:", False), (f" {text}", True))
    if shape == 1:
        marker = rng.choice(("Again:", "Repeat:", "---", "Once more:", "The same:"))
        return plain(kind, (f"{text}\n{marker}\n", False), (text, True))
    if shape == 2:
        times = rng.randint(2, 4) if size < 100 else 2
        separator = rng.choice((" |", "\n", " /", " and"))
        again = [(f" {text}{separator}", True)] * (times - 2)
        return plain(kind, (text + separator, False), *again, (f" {text}", True))
    ask = rng.choice(("Repeat after me: {}", "Repeat this:\n{}", "Please copy this text:\n{}", "Copy: {}", "Say: {}"))
    if shape == 3:
        return chat(kind, system_message(rng, 0.3) + exchange(ask.format(text), text))
    other = _passage(rng, size // 2)
    return chat(kind, system_message(rng, 0.3) + exchange(ask.format(text), text) + exchange(ask.format(other), other))


def copy_document(rng: random.Random) -> Document:
    """A passage, and the same again."""
    return _copied(rng, "copy", rng.choice((6, 10, 15, 20, 30, 40, 60, 90)))


def long_copy_document(rng: random.Random) -> Document:
    """A long passage, and the same again."""
    return _copied(rng, "copy_long", rng.randint(320, 540))


def lookup_document(rng: random.Random) -> Document:
    """Which word stands after another one, first, or last in a list."""
    count = rng.choice((3, 4, 5, 6, 8, 10, 15, 20, 30))
    listed: list[str] = []
    maker = rng.choice((_word, _word, person, digits))
    while len(listed) < count:
        item = maker(rng)
        if item not in listed:
            listed.append(item)
    spans: list[tuple[str, bool]] = [(f"List: {' '.join(listed)}", False)]
    messages = []
    for _ in range(rng.randint(2, 8)):
        i = rng.randrange(count - 1)
        shape = rng.random()
        if shape < 0.7:
            prompt, question, answer = f"After {listed[i]} comes", f"What comes after {listed[i]}?", listed[i + 1]
        elif shape < 0.85:
            prompt, question, answer = "The first is", "What is the first?", listed[0]
        else:
            prompt, question, answer = "The last is", "What is the last?", listed[-1]
        spans += [(f"\n{prompt}", False), (f" {answer}", True)]
        messages += exchange(question, answer)
    if rng.random() < 0.6:
        return plain("lookup", (spans[0][0] + spans[1][0], False), *spans[2:])
    messages[0]["content"] = f"{spans[0][0]}\n{messages[0]['content']}"
    return chat("lookup", system_message(rng, 0.3) + messages)
