"""Word problems with worked steps, in a training and a held-out split.

Standard library only. Everything is a pure function of the random generator that is passed in.
"""

import dataclasses
import random
import zlib
from collections.abc import Callable, Sequence
from typing import Literal

import tiny.stories
from tiny.stories import NAMES, article, capital, words
from tiny.words import DAYS, ITEMS

Split = Literal["train", "held_out"]


@dataclasses.dataclass(frozen=True)
class Problem:
    """A word problem; the answer is worked steps, one a line, and a last line "#### N" as in GSM8K."""

    question: str
    answer: str


def problems(split: Split, count: int, seed: int) -> list[Problem]:
    """As many problems with distinct questions, of the mixture of kinds that the training text has."""
    rng = random.Random(f"{split} {seed}")
    found: dict[str, Problem] = {}
    while len(found) < count:
        problem = random_problem(rng, split)
        found.setdefault(problem.question, problem)
    return list(found.values())


def is_held_out(question: str) -> bool:
    """Whether a question belongs to the held-out split, whatever generated it."""
    return zlib.crc32(question.encode()) % 16 == 0


CONTAINERS = words("box bag basket jar bowl drawer chest bucket sack tin crate pot")

_OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": lambda left, right: left + right,
    "-": lambda left, right: left - right,
    "*": lambda left, right: left * right,
    "/": lambda left, right: left // right,
}


class _Work:
    """Worked steps under construction."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def step(self, before: str, left: int, operation: str, right: int, after: str = "") -> int:
        """Adds "{before} {left} {operation} {right} = {result} {after}." and, above it, what makes it easy."""
        result = _OPERATIONS[operation](left, right)
        self.lines += _easier(left, operation, right)
        if after:
            after = " " + (after if result == 1 else ITEMS.get(after, after))
        self.lines.append(f"{before} {left} {operation} {right} = {result}{after}.")
        return result

    def problem(self, question: str, result: int) -> Problem:
        return Problem(question, "\n".join([*self.lines, f"#### {result}"]))


def _easier(left: int, operation: str, right: int) -> list[str]:
    """Smaller operations that lead to the result, where a tiny model should not take it in one step."""
    if operation in "+-" and max(left, right) >= 100:
        parts = [int(digit) * 10**place for place, digit in enumerate(reversed(str(right))) if digit != "0"][::-1]
        if len(parts) < 2:
            return []
        lines = []
        for part in parts:
            result = _OPERATIONS[operation](left, part)
            lines.append(f"{left} {operation} {part} = {result}")
            left = result
        return lines
    if operation == "*":
        # The factor of two digits is taken apart.
        large, small = max(left, right), min(left, right)
        if large <= 12 or large % 10 == 0:
            return []
        tens, ones = large // 10 * 10, large % 10
        return [
            f"{tens} * {small} = {tens * small}",
            f"{ones} * {small} = {ones * small}",
            f"{tens * small} + {ones * small} = {large * small}",
        ]
    if operation == "/" and left // right > 12:
        tens = left // right // 10 * 10 * right
        if tens == left:
            return []
        rest = left - tens
        return [
            f"{tens} / {right} = {tens // right}",
            f"{rest} / {right} = {rest // right}",
            f"{tens // right} + {rest // right} = {left // right}",
        ]
    return []


def _amount(rng: random.Random) -> int:
    size = rng.random()
    if size < 0.45:
        return rng.randint(2, 20)
    return rng.randint(10, 99) if size < 0.93 else rng.randint(100, 999)


def _below(rng: random.Random, limit: int) -> int:
    """An amount that can be taken away; seldom everything."""
    return limit if rng.random() < 0.02 else rng.randint(1, max(1, limit - 1))


def _factors(rng: random.Random) -> tuple[int, int]:
    """Two factors out of the times tables, now and then two digits by one."""
    if rng.random() < 0.2:
        return rng.randint(2, 9), rng.randint(13, 50)
    return rng.randint(2, 12), rng.randint(2, 12)


def _quotient(rng: random.Random) -> tuple[int, int, int]:
    """Dividend, divisor and quotient."""
    divisor = rng.randint(2, 9 if rng.random() < 0.8 else 12)
    result = rng.randint(13, 33) if divisor < 10 and rng.random() < 0.15 else rng.randint(2, 12)
    return divisor * result, divisor, result


def _count(number: int, item: str) -> str:
    return f"{number} {item if number == 1 else ITEMS[item]}"


def _item(rng: random.Random) -> tuple[str, str]:
    return rng.choice(_ITEM_PAIRS)


_ITEM_PAIRS = tuple(ITEMS.items())
_HE = {name: "she" if name in tiny.stories.GIRLS else "he" for name in NAMES}


def _people(rng: random.Random, count: int) -> list[str]:
    return rng.sample(NAMES, count)


def _put_in(rng: random.Random) -> Problem:
    w, (item, items), box, a, b = _Work(), _item(rng), rng.choice(CONTAINERS), _amount(rng), _amount(rng)
    question = rng.choice(
        (
            f"A {box} has {_count(a, item)}. {b} more are put in. How many {items} are in the {box}?",
            f"A {box} has {_count(a, item)}. {b} more are put in. How many {items} are in the {box} now?",
            f"There are {_count(a, item)} in a {box}. {rng.choice(NAMES)} puts in {b} more. How many {items} are in "
            f"the {box} now?",
            f"A {box} holds {_count(a, item)}. Then {b} more are added. How many {items} does the {box} hold?",
        )
    )
    return w.problem(question, w.step(f"The {box} has", a, "+", b, item))


def _take_out(rng: random.Random) -> Problem:
    w, (item, items), box, a, name = _Work(), _item(rng), rng.choice(CONTAINERS), _amount(rng), rng.choice(NAMES)
    b = _below(rng, a)
    question = rng.choice(
        (
            f"A {box} has {_count(a, item)}. {b} are taken out. How many {items} are in the {box}?",
            f"There are {_count(a, item)} in a {box}. {name} takes out {b}. How many {items} are left in the {box}?",
            f"A {box} holds {_count(a, item)}. {name} takes {b} of them. How many are left?",
        )
    )
    return w.problem(question, w.step(f"The {box} has", a, "-", b, item))


def _in_and_out(rng: random.Random) -> Problem:
    w, (item, items), box, a, b = _Work(), _item(rng), rng.choice(CONTAINERS), _amount(rng), _amount(rng)
    if rng.random() < 0.5:
        c = _below(rng, a + b)
        question = (
            f"A {box} has {_count(a, item)}. {b} more are put in. Then {c} are taken out. How many {items} are in the "
            f"{box}?"
        )
        total = w.step(f"The {box} first has", a, "+", b, item)
        return w.problem(question, w.step("Then it has", total, "-", c, item))
    c = _below(rng, a)
    question = (
        f"A {box} has {_count(a, item)}. {c} are taken out. Then {b} more are put in. How many {items} are in the "
        f"{box}?"
    )
    total = w.step(f"The {box} first has", a, "-", c, item)
    return w.problem(question, w.step("Then it has", total, "+", b, item))


def _gets_more(rng: random.Random) -> Problem:
    w, (item, items), (one, two), a, b = _Work(), _item(rng), _people(rng, 2), _amount(rng), _amount(rng)
    question = rng.choice(
        (
            f"{one} has {_count(a, item)}. {two} gives {'her' if _HE[one] == 'she' else 'him'} {b} more. How many "
            f"{items} does {one} have now?",
            f"{one} found {_count(a, item)} in the morning and {b} in the evening. How many {items} did {one} find?",
            f"{one} picks {_count(a, item)}. {two} picks {_count(b, item)}. How many {items} do they have together?",
            f"{one} has {_count(a, item)} and {two} has {b}. How many {items} do they have in all?",
            f"How many {items} does {one} have, if {_HE[one]} had {a} and bought {b} more?",
        )
    )
    who = "Together they have" if "they have" in question else f"{one} has"
    return w.problem(question, w.step(who, a, "+", b, item))


def _gives_away(rng: random.Random) -> Problem:
    w, (item, items), (one, two), a = _Work(), _item(rng), _people(rng, 2), _amount(rng)
    b = _below(rng, a)
    verb = rng.choice(("gives", "sells", "sends", "lends"))
    question = rng.choice(
        (
            f"{one} has {_count(a, item)}. {capital(_HE[one])} {verb} {b} to {two}. How many {items} does {one} have "
            "left?",
            f"{one} had {_count(a, item)} and lost {b} of them. How many {items} are left?",
            f"{one} {verb} {b} of {'her' if _HE[one] == 'she' else 'his'} {_count(a, item)} to {two}. How many {items} "
            f"does {one} still have?",
        )
    )
    return w.problem(question, w.step(f"{one} has", a, "-", b, "left"))


def _compare(rng: random.Random) -> Problem:
    w, (item, items), (one, two), a = _Work(), _item(rng), _people(rng, 2), _amount(rng)
    b = _below(rng, a)
    first, second = ((one, a), (two, b)) if rng.random() < 0.5 else ((two, b), (one, a))
    facts = f"{first[0]} has {_count(first[1], item)}. {second[0]} has {_count(second[1], item)}."
    if rng.random() < 0.6:
        return w.problem(
            f"{facts} How many more {items} does {one} have than {two}?", w.step(f"{one} has", a, "-", b, "more")
        )
    return w.problem(
        f"{facts} How many {items} does {two} need to have as many as {one}?", w.step(f"{two} needs", a, "-", b, "more")
    )


def _more_than(rng: random.Random) -> Problem:
    w, (item, items), (one, two), a, b = _Work(), _item(rng), _people(rng, 2), _amount(rng), _amount(rng)
    more = a < 3 or rng.random() < 0.6
    b = b if more else _below(rng, a)
    facts = f"{one} has {_count(a, item)}. {two} has {b} {'more' if more else 'fewer'} than {one}."
    other = w.step(f"{two} has", a, "+" if more else "-", b, item)
    if rng.random() < 0.4:
        return w.problem(f"{facts} How many {items} does {two} have?", other)
    question = f"{facts} How many {items} do they have together?"
    return w.problem(question, w.step("Together they have", a, "+", other, item))


def _groups(rng: random.Random) -> Problem:
    w, (item, items), box, (a, b), name = _Work(), _item(rng), rng.choice(CONTAINERS), _factors(rng), rng.choice(NAMES)
    boxes = "boxes" if box == "box" else f"{box}s"
    question = rng.choice(
        (
            f"There are {a} {boxes} with {_count(b, item)} in each. How many {items} are there in all?",
            f"{name} has {a} {boxes}. Each {box} has {_count(b, item)}. How many {items} does {name} have?",
            f"{name} fills {a} {boxes} and puts {_count(b, item)} in each {box}. How many {items} is that?",
            f"Each {box} holds {_count(b, item)}. How many {items} do {a} {boxes} hold?",
        )
    )
    return w.problem(question, w.step(f"{a} {boxes} hold", a, "*", b, item))


def _groups_and(rng: random.Random) -> Problem:
    w, (item, items), box, (a, b), name = _Work(), _item(rng), rng.choice(CONTAINERS), _factors(rng), rng.choice(NAMES)
    boxes = "boxes" if box == "box" else f"{box}s"
    total = w.step(f"{a} {boxes} hold", a, "*", b, item)
    if rng.random() < 0.5:
        c = rng.randint(1, 40)
        question = (
            f"{name} has {a} {boxes} with {_count(b, item)} in each, and {c} more on the table. How many {items} does "
            f"{name} have?"
        )
        return w.problem(question, w.step(f"{name} has", total, "+", c, item))
    c = _below(rng, total)
    question = rng.choice(
        (
            f"{name} has {a} {boxes} with {_count(b, item)} in each. {capital(_HE[name])} gives away {c}. How many "
            f"{items} are left?",
            f"There are {a} {boxes} of {items}, with {b} in each {box}. {c} {items} are sold. How many are left?",
        )
    )
    return w.problem(question, w.step("There are", total, "-", c, "left"))


def _rows(rng: random.Random) -> Problem:
    w, (a, b), name = _Work(), _factors(rng), rng.choice(NAMES)
    thing = rng.choice(words("trees flowers chairs roses tables beans"))
    total = w.step(f"{a} rows have", a, "*", b, thing)
    if rng.random() < 0.5:
        return w.problem(
            f"{name} has {a} rows of {thing} with {b} {thing} in each row. How many {thing} are there?", total
        )
    c = _below(rng, total)
    return w.problem(
        f"There are {a} rows of {thing}, and each row has {b}. {c} {thing} are red. The others are white. How many "
        f"{thing} are white?",
        w.step("White are", total, "-", c, thing),
    )


def _share(rng: random.Random) -> Problem:
    w, (item, items), (total, divisor, _), name = _Work(), _item(rng), _quotient(rng), rng.choice(NAMES)
    group = rng.choice(("children", "friends", "people"))
    question = rng.choice(
        (
            f"{_count(total, item)} are shared evenly among {divisor} {group}. How many {items} does each one get?",
            f"{name} shares {_count(total, item)} evenly among {divisor} {group}. How many does each one get?",
            f"{divisor} {group} share {_count(total, item)} evenly. How many {items} does each one get?",
        )
    )
    return w.problem(question, w.step("Each one gets", total, "/", divisor, item))


def _pack(rng: random.Random) -> Problem:
    w, (item, _), (total, divisor, _), name = _Work(), _item(rng), _quotient(rng), rng.choice(NAMES)
    box = rng.choice(CONTAINERS)
    boxes = "boxes" if box == "box" else f"{box}s"
    question = rng.choice(
        (
            f"{name} has {_count(total, item)}. Each {box} holds {divisor}. How many {boxes} does {name} need?",
            f"{_count(total, item)} are packed into {boxes} of {divisor}. How many {boxes} are there?",
        )
    )
    return w.problem(question, w.step("There are", total, "/", divisor, boxes))


def _get_and_share(rng: random.Random) -> Problem:
    w, (item, items), (total, divisor, _), (one, two) = _Work(), _item(rng), _quotient(rng), _people(rng, 2)
    a = rng.randint(1, total - 1)
    question = (
        f"{one} has {_count(a, item)} and {two} has {total - a}. They share them evenly among {divisor} friends. "
        f"How many {items} does each friend get?"
    )
    both = w.step("Together they have", a, "+", total - a, item)
    return w.problem(question, w.step("Each friend gets", both, "/", divisor, item))


def _left_over(rng: random.Random) -> Problem:
    w, (item, items), box, (a, b), name = _Work(), _item(rng), rng.choice(CONTAINERS), _factors(rng), rng.choice(NAMES)
    boxes = "boxes" if box == "box" else f"{box}s"
    total = a * b + rng.randint(0, b - 1)
    question = f"{name} has {_count(total, item)} and fills {a} {boxes} with {b} each. How many {items} are left over?"
    packed = w.step(f"The {boxes} hold", a, "*", b, item)
    return w.problem(question, w.step("There are", total, "-", packed, "left over"))


def _buy(rng: random.Random) -> Problem:
    w, name, (one, two) = _Work(), rng.choice(NAMES), rng.sample(_ITEM_PAIRS, 2)
    a, b = rng.randint(1, 40), rng.randint(1, 40)
    question = rng.choice(
        (
            f"{capital(article(one[0]))} costs ${a} and {article(two[0])} costs ${b}. How many dollars do both cost?",
            f"{name} buys {article(one[0])} for ${a} and {article(two[0])} for ${b}. How much does {name} pay in "
            "dollars?",
        )
    )
    return w.problem(question, w.step("Together they cost", a, "+", b, "dollars"))


def _buy_many(rng: random.Random) -> Problem:
    w, name, (one, two), (a, b) = _Work(), rng.choice(NAMES), rng.sample(_ITEM_PAIRS, 2), _factors(rng)
    total = w.step(f"The {one[1]} cost", a, "*", b, "dollars")
    if rng.random() < 0.4:
        question = f"{capital(article(one[0]))} costs ${b}. {name} buys {a}. How many dollars does {name} pay?"
        return w.problem(question, total)
    if rng.random() < 0.5:
        c = rng.randint(1, 40)
        question = f"{name} buys {a} {one[1]} for ${b} each and {article(two[0])} for ${c}. How much does {name} pay?"
        return w.problem(question, w.step(f"{name} pays", total, "+", c, "dollars"))
    paid = rng.choice([bill for bill in (20, 50, 100, 200, 500) if bill >= total][:2])
    question = (
        f"{name} buys {a} {one[1]} for ${b} each and pays with ${paid}. How many dollars does {_HE[name]} get back?"
    )
    return w.problem(question, w.step(f"{name} gets back", paid, "-", total, "dollars"))


def _change(rng: random.Random) -> Problem:
    w, name, (item, _), paid = _Work(), rng.choice(NAMES), _item(rng), rng.choice((5, 10, 20, 50, 100))
    a = rng.randint(1, paid - 1)
    question = rng.choice(
        (
            f"{name} buys {article(item)} for ${a} and pays with ${paid}. How many dollars does {_HE[name]} get back?",
            f"{name} has ${paid} and buys {article(item)} for ${a}. How many dollars does {_HE[name]} have left?",
        )
    )
    if "back" in question:
        return w.problem(question, w.step(f"{name} gets back", paid, "-", a, "dollars"))
    return w.problem(question, w.step(f"{name} has", paid, "-", a, "dollars left"))


def _earn(rng: random.Random) -> Problem:
    w, name, (a, b) = _Work(), rng.choice(NAMES), _factors(rng)
    facts = f"{name} earns ${b} an hour and works for {a} hours."
    total = w.step(f"{name} earns", a, "*", b, "dollars")
    if rng.random() < 0.5:
        return w.problem(f"{facts} How many dollars does {name} earn?", total)
    c = _below(rng, total)
    question = f"{facts} Then {_HE[name]} spends ${c}. How many dollars does {name} have left?"
    return w.problem(question, w.step(f"{name} has", total, "-", c, "dollars left"))


def _ages(rng: random.Random) -> Problem:
    w, (one, two), a, years = _Work(), _people(rng, 2), rng.randint(5, 60), rng.randint(2, 30)
    shape = rng.randrange(4)
    if shape == 0:
        question = f"{one} is {a} years old. How old will {one} be in {years} years?"
        return w.problem(question, w.step(f"{one} will be", a, "+", years, "years old"))
    if shape == 1:
        question = f"{one} is {a} years old. {two} is {years} years older. How old is {two}?"
        return w.problem(question, w.step(f"{two} is", a, "+", years, "years old"))
    if shape == 2:
        years = _below(rng, a)
        question = f"{one} is {a} years old. {two} is {years} years younger. How old is {two}?"
        return w.problem(question, w.step(f"{two} is", a, "-", years, "years old"))
    later = rng.randint(2, 20)
    question = (
        f"{one} is {a} years old. {two} is {years} years older than {one}. How old will {two} be in {later} years?"
    )
    now = w.step(f"{two} is", a, "+", years, "years old")
    return w.problem(question, w.step(f"In {later} years {two} will be", now, "+", later, "years old"))


def _distance(rng: random.Random) -> Problem:
    w, hours, name = _Work(), rng.randint(2, 9), rng.choice(NAMES)
    who, speed = rng.choice(
        (
            (name, rng.randint(2, 12)),
            ("A train", 10 * rng.randint(3, 12)),
            ("A car", 5 * rng.randint(6, 18)),
            ("A boat", rng.randint(5, 30)),
            ("A bird", rng.randint(10, 40)),
        )
    )
    verb = rng.choice(("goes", "moves", "travels"))
    facts = f"{who} {verb} {speed} miles an hour."
    if rng.random() < 0.7 or speed > 50:
        question = rng.choice(
            (
                f"{facts} How many miles does {_HE.get(who, 'it')} go in {hours} hours?",
                f"{who} {verb} at {speed} miles an hour for {hours} hours. How many miles is that?",
            )
        )
        return w.problem(
            question, w.step(f"In {hours} hours {who.replace('A ', 'the ')} {verb}", hours, "*", speed, "miles")
        )
    question = f"{facts} How many hours are {speed * hours} miles?"
    return w.problem(question, w.step("That takes", speed * hours, "/", speed, "hours"))


def _weeks(rng: random.Random) -> Problem:
    w, name = _Work(), rng.choice(NAMES)
    shape = rng.randrange(3)
    if shape == 0:
        weeks, days = rng.randint(1, 12), rng.randint(1, 6)
        plural = f"{weeks} week{'s' * (weeks > 1)} and {days} day{'s' * (days > 1)}"
        total = w.step("The weeks have", weeks, "*", 7, "days")
        return w.problem(f"How many days are {plural}?", w.step("In all there are", total, "+", days, "days"))
    per_day = rng.randint(2, 12)
    activity = rng.choice(("reads {} pages", "runs {} miles", "writes {} lines", "learns {} words", "eats {} nuts"))
    unit = activity.split()[-1]
    if shape == 1:
        question = f"{name} {activity.format(per_day)} a day. How many {unit} is that in a week?"
        return w.problem(question, w.step("A week has 7 days, so that is", 7, "*", per_day, unit))
    days = rng.randint(2, 12)
    question = f"{name} {activity.format(per_day)} every day. How many {unit} is that in {days} days?"
    return w.problem(question, w.step("That is", days, "*", per_day, unit))


def _weekdays(rng: random.Random) -> Problem:
    start, distance, name = rng.randrange(7), rng.randint(1, 6), rng.choice(NAMES)
    days = [DAYS[(start + i) % 7] for i in range(distance + 1)]
    event = rng.choice(("party", "trip", "race", "market", "game", "test", "concert", f"birthday of {name}"))
    question = rng.choice(
        (
            f"Today is {days[0]}. The {event} is on {days[-1]}. In how many days is the {event}?",
            f"It is {days[0]}. How many days are there until the {event} on {days[-1]}?",
        )
    )
    counted = ", ".join(f"{day} {i}" for i, day in enumerate(days[1:], 1))
    return Problem(question, f"After {days[0]}: {counted}.\n#### {distance}")


def _times(rng: random.Random) -> Problem:
    w, (item, items), (one, two), a = _Work(), _item(rng), _people(rng, 2), rng.randint(2, 50)
    word, factor = rng.choice((("twice", 2), ("twice", 2), ("3 times", 3), ("4 times", 4)))
    facts = f"{one} has {_count(a, item)}. {two} has {word} as many."
    many = w.step(f"{two} has", factor, "*", a, item)
    if rng.random() < 0.5:
        return w.problem(f"{facts} How many {items} does {two} have?", many)
    question = f"{facts} How many {items} do they have together?"
    return w.problem(question, w.step("Together they have", a, "+", many, item))


def _half(rng: random.Random) -> Problem:
    w, (item, items), (one, two), a = _Work(), _item(rng), _people(rng, 2), rng.randint(2, 40)
    verb = rng.choice(("gives", "sells", "sends"))
    facts = f"{one} has {_count(2 * a, item)} and {verb} half of them to {two}."
    half = w.step("Half of them are", 2 * a, "/", 2, item)
    if rng.random() < 0.5:
        return w.problem(f"{facts} How many {items} does {two} get?", half)
    b = rng.randint(1, 30)
    question = f"{facts} {two} already had {b}. How many {items} does {two} have now?"
    return w.problem(question, w.step(f"{two} has", half, "+", b, item))


def _three(rng: random.Random) -> Problem:
    w, (item, items), names = _Work(), _item(rng), _people(rng, 3)
    a, b, c = (_amount(rng) % 100 or 5 for _ in range(3))
    question = rng.choice(
        (
            f"{names[0]} has {_count(a, item)}, {names[1]} has {b}, and {names[2]} has {c}. How many {items} do they "
            "have in all?",
            f"{names[0]} finds {_count(a, item)} on Monday, {b} on Tuesday and {c} on Friday. How many is that?",
        )
    )
    two = w.step("First that is", a, "+", b, item)
    return w.problem(question, w.step("In all that is", two, "+", c, item))


def _pages(rng: random.Random) -> Problem:
    w, name, total = _Work(), rng.choice(NAMES), rng.randint(20, 200)
    a = rng.randint(1, total // 2)
    b = rng.randint(1, total // 2)
    first, second = rng.sample(DAYS, 2)
    question = (
        f"A book has {total} pages. {name} reads {a} pages on {first} and {b} pages on {second}. How many pages are "
        "left?"
    )
    read = w.step(f"{name} reads", a, "+", b, "pages")
    return w.problem(question, w.step("There are", total, "-", read, "pages left"))


def _missing(rng: random.Random) -> Problem:
    w, (item, items), box, a, name = _Work(), _item(rng), rng.choice(CONTAINERS), _amount(rng), rng.choice(NAMES)
    b = _below(rng, a)
    if rng.random() < 0.5:
        question = (
            f"There were some {items} in a {box}. {name} put in {b} more. Now there are {a}. How many were there at "
            "first?"
        )
        return w.problem(question, w.step("At first there were", a, "-", b, item))
    if rng.random() < 0.5:
        question = (
            f"{name} had some {items} and gave away {b}. Now {_HE[name]} has {a}. How many did {name} have first?"
        )
        return w.problem(question, w.step(f"{name} first had", a, "+", b, item))
    question = f"{name} needs {_count(a, item)} and has {b}. How many more {items} does {name} need?"
    return w.problem(question, w.step(f"{name} needs", a, "-", b, "more"))


def _bus(rng: random.Random) -> Problem:
    w, a, b = _Work(), rng.randint(5, 60), rng.randint(1, 30)
    c = _below(rng, a)
    where, who = rng.choice((("bus", "people"), ("train", "people"), ("boat", "men"), ("room", "children")))
    question = (
        f"There are {a} {who} on a {where}. {c} get off and {b} get on. How many {who} are on the {where} now?"
        if where != "room"
        else f"There are {a} {who} in a {where}. {c} go out and {b} come in. How many {who} are in the {where} now?"
    )
    rest = w.step("First there are", a, "-", c, who)
    return w.problem(question, w.step("Then there are", rest, "+", b, who))


def _arithmetic(rng: random.Random) -> Problem:
    operation = rng.choice("++--*/")
    if operation == "*":
        a, b = _factors(rng)
    elif operation == "/":
        a, b, _ = _quotient(rng)
    else:
        a = _amount(rng)
        b = _amount(rng) if operation == "+" else _below(rng, a)
    word = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}[operation]
    question = rng.choice(
        (
            f"What is {a} {operation} {b}?",
            f"What is {a} {operation} {b}?",
            f"{a} {operation} {b} = ?",
            f"{a} {word} {b}?",
            f"What is {a} {word} {b}?",
            f"Calculate {a} {operation} {b}.",
        )
    )
    result = _OPERATIONS[operation](a, b)
    return Problem(
        question, "\n".join([*_easier(a, operation, b), f"{a} {operation} {b} = {result}", f"#### {result}"])
    )


def _chain(rng: random.Random) -> Problem:
    a, b = rng.randint(2, 60), rng.randint(2, 60)
    middle = a + b
    c = rng.randint(1, 40)
    operation = "+" if c > middle or rng.random() < 0.5 else "-"
    result = _OPERATIONS[operation](middle, c)
    lines = [f"{a} + {b} = {middle}", *_easier(middle, operation, c), f"{middle} {operation} {c} = {result}"]
    question = rng.choice((f"What is {a} + {b} {operation} {c}?", f"Calculate {a} + {b} {operation} {c}."))
    return Problem(question, "\n".join([*lines, f"#### {result}"]))


PROBLEMS: dict[Callable[[random.Random], Problem], float] = {
    _put_in: 2,
    _take_out: 1.5,
    _in_and_out: 1.5,
    _gets_more: 1.5,
    _gives_away: 1,
    _compare: 1,
    _more_than: 1.5,
    _groups: 1.5,
    _groups_and: 1.5,
    _rows: 1,
    _share: 1,
    _pack: 1,
    _get_and_share: 1,
    _left_over: 1,
    _buy: 1,
    _buy_many: 1.5,
    _change: 1,
    _earn: 1,
    _ages: 1,
    _distance: 1,
    _weeks: 0.6,
    _weekdays: 0.3,
    _times: 1,
    _half: 1,
    _three: 1,
    _pages: 1,
    _missing: 1,
    _bus: 1,
    _arithmetic: 2.5,
    _chain: 0.7,
}
_PROBLEM_KINDS = tuple(PROBLEMS)
_PROBLEM_WEIGHTS = tuple(PROBLEMS.values())


def random_problem(rng: random.Random, split: Split = "train") -> Problem:
    """A problem of a random kind, of one split."""
    while True:
        problem = rng.choices(_PROBLEM_KINDS, _PROBLEM_WEIGHTS)[0](rng)
        if is_held_out(problem.question) == (split == "held_out"):
            return problem


def arithmetic_problem(rng: random.Random) -> Problem:
    """A bare sum, difference, product or quotient, of the training split."""
    while is_held_out((problem := _arithmetic(rng)).question):
        pass
    return problem


def shots(examples: Sequence[Problem], question: str) -> str:
    """A few-shot prompt in GSM8K's form, up to and with the last "Answer:"."""
    solved = "".join(f"Question: {problem.question}\nAnswer: {problem.answer}\n\n" for problem in examples)
    return f"{solved}Question: {question}\nAnswer:"
