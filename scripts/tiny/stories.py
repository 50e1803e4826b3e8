"""Short stories from a grammar, for the training text of the tiny model. Standard library only."""

import dataclasses
import random
from collections.abc import Callable, Sequence


def words(text: str) -> tuple[str, ...]:
    """The words of a text, for long lists."""
    return tuple(text.split())


GIRLS = words("Ada Mia Lily Nora Ella Zoe Anna Ruby Eva Ivy Clara Rosa Lena Maya Tess June Kate Sara Lucy Emma")
BOYS = words("Tom Ben Sam Max Leo Finn Jack Noah Adam Omar Hugo Luke Paul Ravi Nick Owen Carl Dan Theo Ali")
NAMES = GIRLS + BOYS
ANIMALS = words(
    "fox bear rabbit mouse owl cat dog duck frog hen goat horse lion wolf deer crow bee snail turtle squirrel "
    "hedgehog badger otter sheep pig donkey"
)
PEOPLE = ("girl", "boy", "woman", "man", "queen", "king", "farmer", "baker", "sailor", "teacher")
FEMALE = frozenset({"girl", "woman", "queen", "hen"})
MALE = frozenset({"boy", "man", "king"})
THINGS = words(
    "lantern kite bell boat drum map key hat book ball basket flute ring cup blanket mirror wagon lamp clock coat "
    "scarf stone shell feather coin box bottle rope ladder candle flag pillow wheel crown chair pot umbrella "
    "doll whistle spoon"
)
COLORS = words("red blue green yellow white black brown pink purple orange silver gold gray")
LOOKS = words("old new tiny big round shiny soft plain pretty heavy light strange fine wooden bright lovely")
TRAITS = words(
    "brave kind shy clever curious lazy happy quiet proud gentle cheerful careful stubborn patient busy sleepy hungry "
    "funny wise young little lonely"
)
FOODS = ("bread", "soup", "honey", "cheese", "berries", "nuts", "apples", "pancakes", "carrots", "milk", "pie", "plums")
PLACES = {
    "forest": "in",
    "meadow": "in",
    "village": "in",
    "garden": "in",
    "valley": "in",
    "barn": "in",
    "mill": "in",
    "cave": "in",
    "castle": "in",
    "town": "in",
    "river": "by",
    "lake": "by",
    "sea": "by",
    "bridge": "near",
    "harbor": "near",
    "hill": "on",
    "farm": "on",
    "island": "on",
    "mountain": "on",
    "beach": "on",
}
HIDING = (
    "under the bed",
    "behind the door",
    "in the tall grass",
    "under a pile of leaves",
    "behind a big rock",
    "in the hay",
    "on the roof",
    "between two roots",
    "in an empty barrel",
    "under the stairs",
    "inside a hollow tree",
    "next to the well",
    "at the bottom of a sack",
    "beside the stove",
)
WEATHER = (
    "The sun was warm and the sky was blue.",
    "It was a cold day, and the wind was strong.",
    "A soft rain was falling.",
    "White snow lay on everything.",
    "Fog covered the path.",
    "Gray clouds moved slowly over the hills.",
    "The air smelled of flowers.",
    "Leaves danced in the wind.",
    "The moon was round and bright.",
    "It had rained all night, and the ground was wet.",
)
MORALS = (
    "A small kindness can go a long way.",
    "Good friends are worth more than gold.",
    "It is never too late to say sorry.",
    "Those who ask for help often find it.",
    "Being brave does not mean having no fear.",
    "What we share makes us twice as happy.",
    "Slow and careful work is good work.",
    "Sometimes the answer is closer than we think.",
)


@dataclasses.dataclass(frozen=True)
class Character:
    """Who takes part in a story: a name, what it is ("fox"), a trait, and the pronouns."""

    name: str
    being: str
    trait: str
    he: str
    him: str
    his: str


@dataclasses.dataclass(frozen=True)
class Scene:
    """What stays the same all through a story; `thing` is a bare noun, `look` its adjective."""

    hero: Character
    friend: Character
    thing: str
    look: str
    place: str
    far: str

    @property
    def here(self) -> str:
        return f"{PLACES[self.place]} the {self.place}"

    @property
    def there(self) -> str:
        return f"{PLACES[self.far]} the {self.far}"

    @property
    def looked(self) -> str:
        return f"{self.look} {self.thing}"


def article(noun: str) -> str:
    """The noun with "a" or "an"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def capital(text: str) -> str:
    return text[0].upper() + text[1:]


def character(rng: random.Random, being: str | None = None, *, other_than: Character | None = None) -> Character:
    """A random character, of another name and being than the one given."""
    taken = {other_than.being, other_than.name} if other_than else set()
    while being is None or being in taken:
        being = rng.choice(ANIMALS if rng.random() < 0.7 else PEOPLE)
    female = being in FEMALE or (being not in MALE and rng.random() < 0.5)
    name = rng.choice([name for name in (GIRLS if female else BOYS) if name not in taken])
    pronouns = ("she", "her", "her") if female else ("he", "him", "his")
    return Character(name, being, rng.choice(TRAITS), *pronouns)


def scene(rng: random.Random, being: str | None = None, thing: str | None = None) -> Scene:
    """A random scene, around the being and the thing if they are given."""
    hero = character(rng, being)
    place, far = rng.sample(tuple(PLACES), 2)
    return Scene(
        hero, character(rng, other_than=hero), thing or rng.choice(THINGS), rng.choice(COLORS + LOOKS), place, far
    )


def _opening(rng: random.Random, s: Scene) -> list[str]:
    h = s.hero
    intro = rng.choice(
        (
            f"Once upon a time, there was {article(h.trait)} {h.being} named {h.name}. {capital(h.he)} lived {s.here}.",
            f"Once upon a time, {article(h.trait)} {h.being} lived {s.here}. {capital(h.his)} name was {h.name}.",
            f"Once upon a time, {s.here}, there lived {article(h.being)} called {h.name}. "
            f"{capital(h.he)} was very {h.trait}.",
            f"{h.name} was {article(h.trait)} {h.being} who lived {s.here}.",
            f"Long ago, {article(h.being)} named {h.name} had a small house {s.here}. Everyone said that {h.he} was "
            f"{h.trait}.",
            f"There once was {article(h.trait)} {h.being}. {capital(h.his)} name was {h.name}, and {h.his} home was "
            f"{s.here}.",
        )
    )
    food = rng.choice(FOODS)
    detail = rng.choice(
        (
            f"{capital(h.he)} liked {food} more than anything.",
            f"Every morning {h.he} ate {food} and sang a song.",
            f"{capital(h.he)} had many dreams but few friends.",
            f"Every evening {h.he} looked at the stars and counted them.",
            f"{capital(h.he)} knew every path and every tree.",
            f"The others often came to see {h.him}.",
            f"{capital(h.he)} slept in a bed that was much too small.",
            f"On most days {h.he} worked hard and went to bed early.",
        )
    )
    return [intro, detail] if rng.random() < 0.6 else [intro]


def _day(rng: random.Random) -> str:
    return rng.choice(
        (
            "One day",
            "One morning",
            "One evening",
            "One summer day",
            "One winter morning",
            "One night",
            "On a Sunday",
            "Early one morning",
            "One spring day",
            "Late one afternoon",
        )
    )


def _meeting(rng: random.Random, s: Scene) -> str:
    h, f = s.hero, s.friend
    return rng.choice(
        (
            f"On the way {h.he} met {article(f.being)} named {f.name}.",
            f"Just then {article(f.trait)} {f.being} came along. It was {f.name}.",
            f"{capital(h.he)} went to see {h.his} friend {f.name}, the {f.being}.",
            f"{f.name} the {f.being} was sitting under a tree.",
            f"Soon {h.he} saw {f.name}, {article(f.trait)} {f.being} from the {s.far}.",
            f'"Hello!" said a voice. It was {f.name} the {f.being}.',
        )
    )


def _sad(rng: random.Random, h: Character) -> str:
    return rng.choice(
        (
            f"{h.name} was very sad.",
            f"{capital(h.he)} sat down and began to cry.",
            f'"Oh no!" said {h.name}.',
            f"{h.name} did not know what to do.",
            f"{capital(h.he)} felt cold and alone.",
            f'"What shall I do now?" said {h.name}.',
            f"{capital(h.his)} heart was heavy.",
        )
    )


def _offer(rng: random.Random, s: Scene) -> str:
    h, f = s.hero, s.friend
    return rng.choice(
        (
            f'"Why are you sad?" asked {f.name}. {h.name} told {f.him} everything. "I will help you," said {f.name}.',
            f'"What is wrong?" asked {f.name}. "I need help," said {h.name}. "I have time," said {f.name}.',
            f'"Can you help me?" asked {h.name}. "Of course I can," said {f.name}.',
            f'{f.name} listened to the whole story. "Do not worry," {f.he} said. "Two are better than one."',
            f'"Please help me," said {h.name}. {f.name} smiled and said yes.',
        )
    )


def _ending(rng: random.Random, s: Scene) -> str:
    h, f = s.hero, s.friend
    food = rng.choice(FOODS)
    return rng.choice(
        (
            f"From that day on, {h.name} and {f.name} were best friends.",
            f"That night {h.name} fell asleep with a smile.",
            f"Then they went home and ate {food} together.",
            f"And they lived happily {s.here} for many years.",
            f'"Thank you, {f.name}," said {h.name}. "You are a true friend."',
            f"{h.name} and {f.name} danced until the moon came up.",
            f"And whenever {h.name} saw the {s.thing}, {h.he} thought of {f.name}.",
            f"{h.name} never forgot that day.",
            f"They told the story to everyone {s.there}, and everyone laughed.",
        )
    )


def _search(rng: random.Random, h: Character) -> str:
    first, second = rng.sample(HIDING, 2)
    return rng.choice(
        (
            f"{capital(h.he)} looked {first}. Nothing. {capital(h.he)} looked {second}. Nothing.",
            f"It was not {first}, and it was not {second}.",
            f"First {h.he} looked {first}. Then {h.he} looked {second}. It was not there.",
            f"{capital(h.he)} searched {first} and {second}, but found only dust.",
        )
    )


def _lost(rng: random.Random, s: Scene) -> list[str]:
    h, f, spot = s.hero, s.friend, rng.choice(HIDING)
    return [
        rng.choice(
            (
                f"{h.name} had {article(s.looked)}. {_day(rng)}, the {s.thing} was gone.",
                f"{_day(rng)}, {h.name} could not find {h.his} {s.looked}.",
                f"{_day(rng)}, {h.name} woke up and saw that {h.his} {s.looked} was gone.",
            )
        ),
        _search(rng, h),
        _sad(rng, h),
        _meeting(rng, s),
        _offer(rng, s),
        rng.choice(
            (
                f'"Where did you have the {s.thing} last?" asked {f.name}. {h.name} thought for a while. "I had it '
                f'{s.there}," {h.he} said. So they went there.',
                f"They walked and walked, until they came to the {s.far}. There they looked again.",
                f'"I saw something {s.look} {s.there}," said {f.name}. They ran as fast as they could.',
            )
        ),
        rng.choice(
            (
                f"And there, {spot}, lay the {s.thing}!",
                f"{f.name} looked {spot} and pulled out the {s.thing}.",
                f'"Here it is!" cried {f.name}. The {s.thing} was {spot}.',
            )
        ),
        rng.choice(
            (
                f"{h.name} held the {s.thing} close.",
                f"{h.name} jumped for joy.",
                f"{capital(h.he)} hugged {f.name} and laughed.",
            )
        ),
    ]


def _wish(rng: random.Random, s: Scene) -> list[str]:
    h, f = s.hero, s.friend
    job = rng.choice(
        ("carry water", "pick berries", "sweep the floor", "feed the hens", "paint the fence", "chop wood", "mend nets")
    )
    days = rng.choice(("three", "five", "six", "seven", "ten"))
    return [
        rng.choice(
            (
                f"More than anything, {h.name} wanted {article(s.looked)}.",
                f"{_day(rng)}, {h.name} saw {article(s.looked)} in a shop and wished for it with all {h.his} heart.",
                f"{h.name} had one wish: {article(s.looked)}.",
            )
        ),
        rng.choice(
            (
                f"But {h.he} had no money at all.",
                f'"It costs too much," {h.he} thought.',
                f"But nobody would give {h.him} one.",
            )
        ),
        _meeting(rng, s),
        f'"I would like to have {article(s.thing)}," said {h.name}.',
        rng.choice(
            (
                f'"Then help me to {job}," said {f.name}, "and you shall have it."',
                f'{f.name} said, "I have one. If you {job} for me, I will give it to you."',
                f'"Nothing is free," said {f.name}. "But I need someone to {job}."',
            )
        ),
        rng.choice(
            (
                f"So {h.name} worked for {days} days. {capital(h.his)} back hurt, but {h.he} did not stop.",
                f"{h.name} began at once. After {days} days the work was done.",
                f"It took {days} long days to {job}. {h.name} was tired, but {h.he} was happy too.",
            )
        ),
        rng.choice(
            (
                f'"You did well," said {f.name}, and gave {h.him} the {s.looked}.',
                f"Then {f.name} brought the {s.thing} from {f.his} house. It was even more beautiful than before.",
                f'{f.name} kept {f.his} word. "The {s.thing} is yours," {f.he} said.',
            )
        ),
        rng.choice(
            (
                f"{h.name} showed the {s.thing} to everyone.",
                f"{h.name} took the {s.thing} home and put it by the window.",
                f"{h.name} let every child {s.here} hold it once.",
            )
        ),
    ]


def _broken(rng: random.Random, s: Scene) -> list[str]:
    h, f = s.hero, s.friend
    tool = rng.choice(("a needle and thread", "a pot of glue", "a hammer", "some string", "a piece of wire", "wax"))
    return [
        rng.choice(
            (
                f"{capital(h.his)} grandmother had given {h.him} {article(s.looked)}.",
                f"{capital(h.he)} was proud of {h.his} {s.looked}.",
                f"On {h.his} birthday {h.he} got {article(s.looked)}.",
            )
        ),
        rng.choice(
            (
                f"{_day(rng)}, it fell to the ground and broke.",
                f"{_day(rng)}, the wind took it and threw it against a wall. It was broken.",
                f"{_day(rng)}, {h.name} ran too fast, fell over a stone, and broke the {s.thing}.",
            )
        ),
        _sad(rng, h),
        rng.choice(
            (
                f"{capital(h.he)} tried to mend it, but it broke again.",
                f"{capital(h.he)} tried once. {capital(h.he)} tried twice. It did not work.",
                f'"I can do it alone," said {h.name}. But {h.he} could not.',
            )
        ),
        _meeting(rng, s),
        _offer(rng, s),
        rng.choice(
            (
                f"{f.name} went home and came back with {tool}.",
                f'"We need {tool}," said {f.name}. Luckily {f.he} had just that.',
                f"In {f.his} bag {f.name} had {tool}.",
            )
        ),
        rng.choice(
            (
                f"{h.name} held the {s.thing}, and {f.name} mended it.",
                f"They worked side by side until it was dark. Then the {s.thing} was whole again.",
                f"With slow and careful hands they mended the {s.thing}.",
            )
        ),
        rng.choice(
            (
                f'"It looks better than before!" said {h.name}.',
                f"One could still see the crack, but {h.name} liked the {s.thing} even more.",
                f"The {s.thing} was as good as new.",
            )
        ),
    ]


def _gift(rng: random.Random, s: Scene) -> list[str]:
    h, f = s.hero, s.friend
    trouble = rng.choice(
        (
            "But then it began to rain, and the path turned to mud.",
            "But a strong wind almost blew it away.",
            "But the bridge was gone, and the water was deep.",
            f"But on the way {h.he} got lost in the fog.",
            f"But {h.he} was so tired that {h.he} fell asleep on the way.",
        )
    )
    return [
        rng.choice(
            (
                f"{h.name} had a good friend, {article(f.being)} named {f.name}.",
                f"{capital(h.his)} best friend was {f.name}, {article(f.trait)} {f.being}.",
            )
        ),
        rng.choice(
            (
                f"{_day(rng)}, {h.he} heard that {f.name} was ill.",
                f"Soon it would be the birthday of {f.name}.",
                f"{_day(rng)}, {f.name} moved to a new house {s.there}.",
            )
        ),
        rng.choice(
            (
                f'"I will make {f.him} {article(s.thing)}," thought {h.name}.',
                f"{h.name} wanted to bring {f.him} {article(s.looked)}.",
                f'"What would make {f.him} happy?" thought {h.name}. "I know! {capital(article(s.looked))}!"',
            )
        ),
        rng.choice(
            (
                f"{capital(h.he)} worked on it all day and half the night.",
                f"{capital(h.he)} looked for a long time until {h.he} found the right one.",
                f"{capital(h.he)} made it as well as {h.he} could and put a ribbon around it.",
            )
        ),
        f"Then {h.he} set out with the {s.thing}. {trouble}",
        rng.choice(
            (
                f'"I will not give up," said {h.name}.',
                f"{h.name} waited a little and then went on.",
                f"{h.name} took a deep breath and tried another way.",
            )
        ),
        rng.choice(
            (
                f"At last {h.he} stood in front of the house of {f.name} and knocked.",
                f"When {h.he} came to {f.name}, it was already late.",
            )
        ),
        rng.choice(
            (
                f'"For me?" asked {f.name}. {capital(f.his)} eyes were bright.',
                f'"This is the best {s.thing} in the world," said {f.name}.',
                f"{f.name} was so happy that {f.he} could not speak.",
            )
        ),
    ]


def _quarrel(rng: random.Random, s: Scene) -> list[str]:
    h, f = s.hero, s.friend
    return [
        rng.choice(
            (
                f"{_day(rng)}, {h.name} and {f.name} the {f.being} found {article(s.looked)} {s.there}.",
                f"{_day(rng)}, {h.name} went for a walk with {f.name}, {article(f.being)}. {capital(s.there)} they saw "
                f"{article(s.looked)}.",
            )
        ),
        rng.choice(
            (
                f'"I saw it first!" said {h.name}. "No, I did!" said {f.name}.',
                f'"It is mine," said {h.name}. "It is not," said {f.name}.',
                f"Both wanted to have the {s.thing}, and nobody wanted to let go.",
            )
        ),
        rng.choice(
            (
                f"They pulled and pulled, until the {s.thing} fell into the water.",
                f"They shouted so loudly that all the birds flew away. Then the {s.thing} rolled down into a hole.",
                f"While they were fighting, a crow took the {s.thing} and dropped it into a tall tree.",
            )
        ),
        rng.choice(
            (
                "Now nobody had it.",
                f"{h.name} looked at {f.name}, and {f.name} looked at {h.name}.",
                "For a while nobody said a word.",
            )
        ),
        rng.choice(
            (
                f'"I am sorry," said {h.name}. "I am sorry too," said {f.name}.',
                f'"That was silly," said {f.name}. "Yes, it was," said {h.name}.',
            )
        ),
        rng.choice(
            (
                f"Together they found a long stick and got the {s.thing} back.",
                f"{f.name} climbed on the back of {h.name}, and so they could reach it.",
                f"They made a rope from grass and pulled the {s.thing} out.",
            )
        ),
        rng.choice(
            (
                f"Now {h.name} has the {s.thing} on one day, and {f.name} has it on the next.",
                f"They put the {s.thing} {rng.choice(HIDING)}, where both could find it.",
                f'"Let us share it," said {h.name}. And so they did.',
            )
        ),
    ]


def _rescue(rng: random.Random, s: Scene) -> list[str]:
    h, f = s.hero, s.friend
    trap = rng.choice(("in the mud", "in a deep hole", "in a net", "high up in a tree", "on a rock in the water"))
    return [
        rng.choice(
            (
                f"{_day(rng)}, {h.name} was walking {s.there}.",
                f"{_day(rng)}, {h.name} went out to look for {rng.choice(FOODS)}.",
            )
        ),
        rng.choice(WEATHER),
        rng.choice(
            (
                'Suddenly there was a cry. "Help! Help!"',
                f"Then {h.he} heard someone call for help.",
                f"Then {h.he} heard a strange sound, like a small voice.",
            )
        ),
        f"It was {f.name}, {article(f.trait)} {f.being}, who was stuck {trap}.",
        rng.choice(
            (
                f'"Hold on!" called {h.name}. "I am coming!"',
                f"{h.name} was afraid, but {h.he} went closer.",
                f'"How did you get there?" asked {h.name}. "I was not careful," said {f.name}.',
            )
        ),
        rng.choice(
            (
                f"{capital(h.he)} reached out a hand, but it was too far. Then {h.he} found a long branch.",
                f"{capital(h.he)} pulled with all {h.his} might. Nothing moved. {capital(h.he)} pulled once more.",
                f"{capital(h.he)} ran to the village and came back with a rope.",
            )
        ),
        rng.choice((f"At last {f.name} was free.", f"Slowly, very slowly, {f.name} came out.")),
        rng.choice(
            (
                f'"You saved me," said {f.name}, and gave {h.him} {article(s.looked)}.',
                f'The next day {f.name} came to {h.his} house with {article(s.looked)}. "For you," {f.he} said.',
                f'"I have nothing but {article(s.thing)}," said {f.name}. "Please take it."',
            )
        ),
        rng.choice(
            (
                f"{h.name} still has the {s.thing} today.",
                f"{h.name} liked the {s.thing}, but {h.he} liked {h.his} new friend even more.",
                f'"Thank you," said {h.name}. "I will take good care of the {s.thing}."',
            )
        ),
    ]


def _fear(rng: random.Random, s: Scene) -> list[str]:
    h, f = s.hero, s.friend
    fear, dark = rng.choice(
        (
            ("the dark", "an old cellar, where it was as dark as night"),
            ("high places", "the top of a tall tower"),
            ("deep water", "the other side of the deep water"),
            ("thunder", "the far end of the field, and a storm was coming"),
            ("ghosts", "an empty house where nobody had lived for years"),
        )
    )
    return [
        rng.choice(
            (f"{h.name} was afraid of {fear}.", f"Nobody knew it, but {h.name} was very much afraid of {fear}.")
        ),
        f"{_day(rng)}, {h.his} {s.looked} was carried off to {dark}.",
        _sad(rng, h),
        _meeting(rng, s),
        rng.choice(
            (
                f'"Are you afraid?" asked {f.name}. "Yes," said {h.name}. "So am I," said {f.name}. "Let us go."',
                f'"I am too afraid to go," said {h.name}. "Then count your steps," said {f.name}.',
                f'{f.name} said, "Hold my hand, and do not look back."',
            )
        ),
        rng.choice(
            (
                f"One step, two steps, three steps. {h.name} did not stop.",
                f"{capital(h.his)} knees were shaking, but {h.he} went on.",
                f"{h.name} sang a little song, and {h.his} fear became smaller.",
            )
        ),
        rng.choice(
            (
                f"Then {h.he} saw the {s.thing} and took it.",
                f"And there was the {s.thing}, just waiting for {h.him}.",
            )
        ),
        rng.choice(
            (
                f'"I did it!" cried {h.name}.',
                f'"You are braver than you think," said {f.name}.',
                f"After that, {fear} did not seem so bad.",
            )
        ),
    ]


def _sound(rng: random.Random, s: Scene) -> list[str]:
    h, f = s.hero, s.friend
    noise = rng.choice(("knocking", "ringing", "scratching", "humming", "whispering", "tapping"))
    return [
        rng.choice(
            (
                f"{_day(rng)}, {h.name} heard a strange {noise} outside.",
                f"For three nights {h.name} could not sleep. There was {article(noise)} outside the window.",
            )
        ),
        rng.choice(
            (
                f'"Who is there?" asked {h.name}. Nobody answered.',
                f'"It is only the wind," thought {h.name}. But it was not the wind.',
            )
        ),
        rng.choice(
            (
                f"{capital(h.he)} put on {h.his} shoes and went out.",
                f"{capital(h.he)} opened the door just a little.",
                f"{capital(h.he)} took a candle and followed the sound.",
            )
        ),
        _search(rng, h),
        rng.choice(
            (
                f"Then {h.he} saw {article(f.being)} with {article(s.looked)}.",
                f"Behind the house stood {article(f.trait)} {f.being} with {article(s.looked)}.",
            )
        ),
        rng.choice(
            (
                f'"I am {f.name}," said the {f.being}. "I only wanted to give back your {s.thing}."',
                f'"My name is {f.name}," said the {f.being}. "I found this {s.thing}. Is it yours?"',
                f'"Do not be angry," said the {f.being}. "My name is {f.name}, and I am looking for a friend. I even '
                f'brought you {article(s.thing)}."',
            )
        ),
        rng.choice(
            (
                f'{h.name} laughed. "And I was so afraid!"',
                f'"Come in," said {h.name}. "It is cold outside."',
                f'"You could have knocked at the door," said {h.name}.',
            )
        ),
        f"They drank tea, and the {s.thing} stood on the table between them.",
    ]


def _journey(rng: random.Random, s: Scene) -> list[str]:
    h, f = s.hero, s.friend
    elder = rng.choice(("grandmother", "grandfather", "aunt", "uncle", "old teacher"))
    return [
        rng.choice(
            (
                f'{_day(rng)}, {h.his} {elder} sent a letter. "Please bring me the {s.looked}," it said.',
                f"{_day(rng)}, {h.name} had to bring {article(s.looked)} to {h.his} {elder}, who lived {s.there}.",
            )
        ),
        f"{capital(h.he)} packed some {rng.choice(FOODS)} and the {s.thing} and set off.",
        rng.choice(WEATHER),
        rng.choice(
            (
                "Soon the path split in two, and there was no sign.",
                "After an hour a big tree lay across the path.",
                "Then the path ended at a wide stream.",
                "Soon it was so dark that one could not see the path.",
            )
        ),
        _meeting(rng, s),
        rng.choice(
            (
                f'"I know the way to the {s.far}," said {f.name}. "Follow me."',
                f'"Let us go together," said {f.name}. "I will show you the way to the {s.far}."',
                f'"I am going to the {s.far} too," said {f.name}. "Two of us will find a way."',
            )
        ),
        rng.choice(
            (
                f"They took turns to carry the {s.thing}.",
                f"{f.name} told jokes, and the way seemed short.",
                f"When they were hungry, they shared the food that {h.name} had packed.",
            )
        ),
        rng.choice(
            (
                f"In the evening they saw the {s.far} at last.",
                f"At noon on the next day they came to the {s.far}.",
            )
        ),
        rng.choice(
            (
                f'The {elder} took the {s.thing} and kissed {h.name}. "You came all this way for me!"',
                f'"My {s.thing}!" cried the {elder}. "Now everything will be well."',
            )
        ),
    ]


PLOTS: tuple[Callable[[random.Random, Scene], list[str]], ...] = (
    _lost,
    _wish,
    _broken,
    _gift,
    _quarrel,
    _rescue,
    _fear,
    _sound,
    _journey,
)


def story(rng: random.Random, being: str | None = None, thing: str | None = None) -> str:
    """A story in one to four paragraphs, 80 to 300 tokens, about the being and the thing if they are given."""
    s = scene(rng, being, thing)
    return _paragraphs(rng, [*_opening(rng, s), *_episode(rng, s), *_close(rng, s)])


def chapters(rng: random.Random, count: int) -> str:
    """A story in chapters: the same two characters, who know each other from the first, and a new thing in each."""
    s = scene(rng)
    parts = []
    for number, plot in enumerate(rng.sample(PLOTS, count), 1):
        things = [thing for thing in THINGS if thing != s.thing]
        s = dataclasses.replace(s, thing=rng.choice(things), look=rng.choice(COLORS + LOOKS))
        start = _opening(rng, s) if number == 1 else []
        end = _close(rng, s) if number == count else []
        title = f"Chapter {number}: {capital(s.hero.name)} and the {capital(s.thing)}"
        parts.append(f"{title}\n{_paragraphs(rng, [*start, *plot(rng, s), *end])}")
    return "\n\n".join(parts)


def sentence(rng: random.Random) -> str:
    """A sentence or two out of some story, to stand between things that matter."""
    s = scene(rng)
    return rng.choice((*_opening(rng, s), *rng.choice(PLOTS)(rng, s), _ending(rng, s)))


def _episode(rng: random.Random, s: Scene) -> list[str]:
    beats = rng.choice(PLOTS)(rng, s)
    if rng.random() < 0.3:
        beats.insert(1, rng.choice(WEATHER))
    return beats


def _close(rng: random.Random, s: Scene) -> list[str]:
    return [_ending(rng, s), *([rng.choice(MORALS)] if rng.random() < 0.2 else [])]


def _paragraphs(rng: random.Random, beats: Sequence[str]) -> str:
    """Joins the beats by spaces, with a new line here and there."""
    if rng.random() < 0.5:
        return " ".join(beats)
    return "".join(beat + ("\n" if rng.random() < 0.25 else " ") for beat in beats[:-1]) + beats[-1]
