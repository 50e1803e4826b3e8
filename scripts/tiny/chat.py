"""Chats of the tiny model's training text: small talk and facts, tool calls, JSON.

Standard library only. Everything is a pure function of the random generator that is passed in.
"""

import dataclasses
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

import tiny.stories
from tiny.documents import Document, Message, chat, estimate_tokens, exchange, plain, system_message
from tiny.problems import arithmetic_problem, random_problem
from tiny.stories import ANIMALS, COLORS, FOODS, THINGS, article, capital, words
from tiny.words import DAYS, NOUNS, city, digits, person, two_words


def story_turn(rng: random.Random) -> list[Message]:
    """A user asks for a story about a being and a thing, and gets it."""
    being, thing = rng.choice(ANIMALS + tiny.stories.PEOPLE), rng.choice(THINGS)
    ask = rng.choice(
        (
            "Tell me a story about {} and {}.",
            "Tell me a story about {} and {}.",
            "Write a short story about {} and {}.",
            "Please tell me a story about {} and {}.",
            "Can you tell me a story with {} and {}?",
        )
    )
    return exchange(ask.format(article(being), article(thing)), tiny.stories.story(rng, being, thing))


OPPOSITES = dict(
    pair.split("-")
    for pair in words(
        "big-small hot-cold up-down old-new fast-slow day-night happy-sad wet-dry full-empty open-closed soft-hard "
        "light-dark high-low left-right good-bad loud-quiet long-short strong-weak early-late rich-poor"
    )
)
KNOWLEDGE = {
    "What color is the sky?": "The sky is blue.",
    "What color is grass?": "Grass is green.",
    "What color is snow?": "Snow is white.",
    "What color is a lemon?": "A lemon is yellow.",
    "How many days are in a week?": "A week has 7 days.",
    "How many months are in a year?": "A year has 12 months.",
    "How many hours are in a day?": "A day has 24 hours.",
    "How many legs does a dog have?": "A dog has 4 legs.",
    "How many legs does a bird have?": "A bird has 2 legs.",
    "How many legs does a spider have?": "A spider has 8 legs.",
    "What does a cat say?": "A cat says meow.",
    "What does a dog say?": "A dog says woof.",
    "What does a cow say?": "A cow says moo.",
    "What is a fox?": "A fox is a small wild animal with a red coat.",
    "What is a lantern?": "A lantern is a lamp that you can carry.",
    "What is rain?": "Rain is water that falls from the clouds.",
    "What is snow?": "Snow is frozen water that falls from the sky.",
    "What is a river?": "A river is water that flows to the sea.",
    "What is a mountain?": "A mountain is a very high hill.",
    "What is an island?": "An island is land with water all around it.",
    "What is a key?": "A key is a thing that opens a lock.",
    "What is a map?": "A map is a drawing that shows where places are.",
    "What is a friend?": "A friend is someone you like and trust.",
    "What is the sun?": "The sun is the star that gives us light.",
    "What is the moon?": "The moon is the rock that moves around the earth.",
    "What is a bee?": "A bee is a small insect that makes honey.",
    "What is bread?": "Bread is food made from flour and water.",
    "What is a library?": "A library is a house full of books.",
    "What is the capital of France?": "The capital of France is Paris.",
    "What is the capital of Italy?": "The capital of Italy is Rome.",
    "What is the capital of Norway?": "The capital of Norway is Oslo.",
    "What is the capital of Japan?": "The capital of Japan is Tokyo.",
    "What is the capital of Spain?": "The capital of Spain is Madrid.",
    "What is the capital of Germany?": "The capital of Germany is Berlin.",
    "What is the capital of Egypt?": "The capital of Egypt is Cairo.",
}
_KNOWLEDGE_PAIRS = tuple(KNOWLEDGE.items())
_NAMED_THINGS = {
    "favorite color": lambda rng: rng.choice(COLORS),
    "favorite animal": lambda rng: rng.choice(ANIMALS),
    "favorite food": lambda rng: rng.choice(FOODS),
    "favorite number": lambda rng: str(rng.randint(1, 99)),
    "favorite thing": lambda rng: rng.choice(NOUNS),
    "city": city,
    "dog's name": person,
    "cat's name": person,
    "best friend": person,
}


def _greeting(rng: random.Random) -> list[Message]:
    hello = rng.choice(("Hello!", "Hi!", "Hello", "Hi", "Hi there!", "Good morning!", "Good evening!"))
    answer = hello if hello.startswith("Good") else "Hello!"
    return exchange(hello, f"{answer} How can I help you?")


def _fact_turn(rng: random.Random) -> list[Message]:
    shape = rng.randrange(8)
    if shape <= 1:
        return exchange(*rng.choice(_KNOWLEDGE_PAIRS))
    if shape == 2:
        word, opposite = rng.choice(tuple(OPPOSITES.items()))
        if rng.random() < 0.5:
            word, opposite = opposite, word
        return exchange(f"What is the opposite of {word}?", f"The opposite of {word} is {opposite}.")
    if shape == 3:
        day, step = rng.randrange(7), rng.choice((1, -1))
        relation = "after" if step == 1 else "before"
        return exchange(
            f"What day comes {relation} {DAYS[day]}?", f"{DAYS[(day + step) % 7]} comes {relation} {DAYS[day]}."
        )
    if shape == 4:
        start = rng.randint(1, 30)
        end = start + rng.randint(2, 12)
        return exchange(f"Count from {start} to {end}.", ", ".join(map(str, range(start, end + 1))))
    if shape == 5:
        word = rng.choice([word for word in NOUNS if len(word) <= 5])
        if rng.random() < 0.5:
            return exchange(f"Spell {word}.", "-".join(word))
        said = exchange(f"Say {word}.", capital(word) + ".")
        return said + exchange("Say that again in capital letters.", word.upper() + ".")
    problem = arithmetic_problem(rng)
    return exchange(problem.question, problem.answer)


def _told(rng: random.Random, thing: str, value: str) -> list[Message]:
    if thing == "name":
        tell = rng.choice(
            ("My name is {}.", "I am {}.", "Hello, my name is {}.", "Hi! I am {}.", "You can call me {}.")
        )
        return exchange(tell.format(value), rng.choice((f"Nice to meet you, {value}!", f"Hello, {value}!")))
    answer = rng.choice((f"I will remember that your {thing} is {value}.", f"{capital(value)} is nice!"))
    return exchange(f"My {thing} is {value}.", answer)


def _asked(thing: str, value: str) -> list[Message]:
    return exchange(f"What is my {thing}?", f"Your {thing} is {value}.")


def _talk(rng: random.Random, between: Sequence[Message]) -> list[Message]:
    """Things told at the start, other turns, then the things asked for."""
    chosen = rng.sample(tuple(_NAMED_THINGS), rng.randint(0, 3))
    told = {thing: _NAMED_THINGS[thing](rng) for thing in chosen}
    if not told or rng.random() < 0.7:
        told = {"name": person(rng), **told}
    messages: list[Message] = []
    if rng.random() < 0.4:
        messages += _greeting(rng)
    for thing, value in told.items():
        messages += _told(rng, thing, value)
    messages += between
    for thing in rng.sample(tuple(told), len(told)):
        messages += _asked(thing, told[thing])
        if rng.random() < 0.2:
            messages += _fact_turn(rng)
    if rng.random() < 0.3:
        messages += exchange(rng.choice(("Thank you!", "Thanks!")), "You are welcome!")
    if rng.random() < 0.3:
        messages += exchange(rng.choice(("Goodbye!", "Bye!", "See you!")), "Goodbye!")
    return messages


def chat_document(rng: random.Random) -> Document:
    """Small talk, common knowledge, and what the user told."""
    shape = rng.random()
    if shape < 0.2:
        messages = system_message(rng)
        if rng.random() < 0.6:
            messages += _greeting(rng)
        for _ in range(rng.randint(1, 4)):
            messages += _fact_turn(rng)
        return chat("chat", messages)
    if shape < 0.3:
        name = person(rng)
        messages = [{"role": "system", "content": f"You are {name}, a helpful assistant."}]
        if rng.random() < 0.5:
            messages += _greeting(rng)
        if rng.random() < 0.5:
            messages += exchange("What is your name?", f"My name is {name}.")
        return chat("chat", messages + exchange("Who are you?", f"I am {name}, a helpful assistant."))
    if shape < 0.36:
        messages = system_message(rng) + (_greeting(rng) if rng.random() < 0.5 else [])
        question, answer = rng.choice(
            (
                ("Who are you?", "I am a tiny language model."),
                ("What are you?", "I am a tiny language model."),
                ("How are you?", "I am fine, thank you. And you?"),
                ("What can you do?", "I can tell stories, solve small problems and remember what you tell me."),
                ("What is your name?", "I do not have a name. I am a tiny language model."),
            )
        )
        return chat("chat", messages + exchange(question, answer))
    between = [message for _ in range(rng.randint(0, 3)) for message in _fact_turn(rng)]
    return chat("chat", system_message(rng) + _talk(rng, between))


def long_chat_document(rng: random.Random) -> Document:
    """The name told at the very start is asked for at the end of a long talk."""
    between: list[Message] = []
    size = rng.randint(550, 1350)
    while size > 0:
        shape = rng.random()
        if shape < 0.35:
            turns = story_turn(rng)
        elif shape < 0.8:
            problem = random_problem(rng)
            turns = exchange(problem.question, problem.answer)
        else:
            turns = _fact_turn(rng)
        between += turns
        size -= sum(estimate_tokens(turn["content"]) for turn in turns)
    return chat("chat_long", system_message(rng) + _talk(rng, between))


@dataclasses.dataclass(frozen=True)
class _Tool:
    """A function the assistant may call: one argument, ways to ask, and what comes back, with the answer to it."""

    name: str
    description: str
    argument: str
    type: str
    asks: tuple[str, ...]
    value: Callable[[random.Random], Any]
    result: Callable[[random.Random], dict[str, Any]]
    answer: str

    @property
    def schema(self) -> dict[str, Any]:
        """As the chat template takes it in `tools`."""
        properties = {self.argument: {"type": self.type}}
        parameters = {"type": "object", "properties": properties, "required": [self.argument]}
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}


_TOOLS = (
    _Tool(
        "get_weather",
        "The weather in a city",
        "city",
        "string",
        ("What is the weather in {}?", "How is the weather in {}?", "Is it cold in {}?"),
        city,
        lambda rng: {"weather": rng.choice(words("sunny cloudy rainy windy snowy")), "degrees": rng.randint(1, 35)},
        "In {value} it is {weather} with {degrees} degrees.",
    ),
    _Tool(
        "get_time",
        "The time in a city",
        "city",
        "string",
        ("What time is it in {}?", "Tell me the time in {}."),
        city,
        lambda rng: {"time": f"{rng.randint(0, 23)}:{rng.randint(10, 59)}"},
        "In {value} it is {time}.",
    ),
    _Tool(
        "get_price",
        "The price of a thing",
        "item",
        "string",
        ("What does the {} cost?", "How much is the {}?", "Tell me the price of the {}."),
        lambda rng: rng.choice(NOUNS),
        lambda rng: {"price": rng.randint(1, 99)},
        "The {value} costs {price} dollars.",
    ),
    _Tool(
        "find_phone",
        "The phone number of a person",
        "name",
        "string",
        ("What is the phone number of {}?", "I want to call {}. What is the number?"),
        person,
        lambda rng: {"phone": str(rng.randint(1000, 99999))},
        "The phone number of {value} is {phone}.",
    ),
    _Tool(
        "set_timer",
        "Sets a timer",
        "minutes",
        "integer",
        ("Set a timer for {} minutes.", "Wake me in {} minutes."),
        lambda rng: rng.randint(2, 90),
        lambda rng: {"ok": True},
        "The timer is set for {value} minutes.",
    ),
    _Tool(
        "play_song",
        "Plays a song",
        "title",
        "string",
        ("Play the song {}.", "I want to hear {}."),
        lambda rng: two_words(rng).title(),
        lambda rng: {"ok": True},
        "Now playing {value}.",
    ),
)


def tools_message(system: str, tools: Sequence[dict[str, Any]]) -> str:
    """The text of a system message that lists tools; the chat template writes the same."""
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return f"{system}\n\nTools:\n{listed}" if system else f"Tools:\n{listed}"


def tool_call(name: str, arguments: dict[str, Any]) -> str:
    """What the assistant says to call a tool."""
    call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{call}\n</tool_call>"


def tool_document(rng: random.Random) -> Document:
    """Calls of tools that the system message lists, and answers made of what they return."""
    offered = rng.sample(_TOOLS, rng.choice((1, 1, 2)))
    system = "You are a helpful assistant." if rng.random() < 0.7 else ""
    messages = [{"role": "system", "content": tools_message(system, [tool.schema for tool in offered])}]
    for _ in range(rng.choice((1, 1, 2))):
        if rng.random() < 0.15:
            messages += _greeting(rng)
        tool = rng.choice(offered)
        value = tool.value(rng)
        messages += exchange(rng.choice(tool.asks).format(value), tool_call(tool.name, {tool.argument: value}))
        result = tool.result(rng)
        messages.append({"role": "tool", "content": json.dumps(result, ensure_ascii=False)})
        messages.append({"role": "assistant", "content": tool.answer.format(value=value, **result)})
    return chat("tool", messages)


_FIELDS: dict[str, Callable[[random.Random], str | int]] = {
    "name": person,
    "age": lambda rng: rng.randint(1, 99),
    "city": city,
    "color": lambda rng: rng.choice(COLORS),
    "animal": lambda rng: rng.choice(ANIMALS),
    "price": lambda rng: rng.randint(1, 999),
    "item": lambda rng: rng.choice(NOUNS),
    "count": lambda rng: rng.randint(1, 99),
    "code": lambda rng: int(digits(rng)),
    "food": lambda rng: rng.choice(FOODS),
}


def _record(rng: random.Random) -> dict[str, str | int]:
    fields = rng.sample(tuple(_FIELDS), rng.randint(1, 5))
    return {field: _FIELDS[field](rng) for field in fields}


def json_document(rng: random.Random) -> Document:
    """Records written as JSON, or read."""

    def pair() -> tuple[str, str]:
        record = _record(rng)
        listed = ", ".join(f"{field} {value}" for field, value in record.items())
        return f"{ask}: {listed}", json.dumps(record, ensure_ascii=False)

    ask = rng.choice(("Write as JSON", "Write as JSON", "As JSON", "Turn into JSON"))
    pairs = [pair() for _ in range(rng.choice((1, 1, 2, 3)))]
    if rng.random() < 0.25:
        return plain("json", (pairs[0][0], False), (f"\n{pairs[0][1]}", True))
    if rng.random() < 0.2:
        record = _record(rng)
        field = rng.choice(tuple(record))
        return chat(
            "json", system_message(rng) + exchange(f"{json.dumps(record)}\nWhat is the {field}?", str(record[field]))
        )
    return chat(
        "json", system_message(rng) + [message for user, assistant in pairs for message in exchange(user, assistant)]
    )
