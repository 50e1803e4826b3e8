"""Words that several parts of the tiny model's training text draw from, and names, numbers and places made up."""

import random

import tiny.stories
from tiny.stories import ANIMALS, COLORS, NAMES, THINGS, words

ITEMS = {
    **{noun: f"{noun}s" for noun in words(
        "apple orange lemon pear banana egg cookie cake nut plum carrot potato tomato pencil pen book card coin stamp "
        "shell stone marble ball kite doll sticker button bead balloon flower rose candle cup plate spoon key ticket "
        "map letter hat sock shirt ring bell toy block star leaf fish"
    )},
    "leaf": "leaves",
    "fish": "fish",
    "potato": "potatoes",
    "tomato": "tomatoes",
    "berry": "berries",
    "peach": "peaches",
    "brush": "brushes",
}  # fmt: skip
"""Things that can be counted, with their plurals."""

DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")

CITIES = words(
    "Oslo Paris Rome Cairo Lima Tokyo Berlin Madrid London Delhi Athens Dublin Vienna Prague Lisbon Boston Geneva "
    "Quito Havana Nairobi Sydney Toronto Seoul Milan Hanoi Bern Riga Kiev Accra Dakar"
)
_SYLLABLES = words(
    "ba be bi bo da de do fa fi ga go ka ke ki ko la le li lo lu ma me mi mo na ne ni no pa po ra re ri ro sa se si so "
    "ta te ti to va ve vi vo za ze zi zo"
)
NOUNS = tuple(dict.fromkeys((*THINGS, *ANIMALS, *ITEMS, *tiny.stories.PLACES, *words(
    "amber tiger sugar water summer winter silver corn iron salt glass paper wool snow storm cloud fire smoke ocean "
    "desert window door table roof tower street market church school wall floor pepper sand grass root thunder night"
))))  # fmt: skip


def invented(rng: random.Random) -> str:
    """A name that nobody has heard of."""
    return "".join(rng.choices(_SYLLABLES, k=rng.choice((2, 2, 3)))).capitalize()


def person(rng: random.Random) -> str:
    """A first name, often an invented one."""
    return invented(rng) if rng.random() < 0.4 else rng.choice(NAMES)


def digits(rng: random.Random) -> str:
    """A number of two to six digits."""
    length = rng.choice((2, 3, 4, 4, 4, 5, 6))
    return str(rng.randint(10 ** (length - 1), 10**length - 1))


def two_words(rng: random.Random) -> str:
    """A thing with a quality, such as "red lamp"."""
    return f"{rng.choice(COLORS + tiny.stories.LOOKS)} {rng.choice(NOUNS)}"


def city(rng: random.Random) -> str:
    """A city, often an invented one."""
    return rng.choice(CITIES) if rng.random() < 0.7 else invented(rng)
