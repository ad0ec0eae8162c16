"""The text tasks: arithmetic, repeating, facts, stories, recall and retrieval.

Each generator takes a random source and `test`: True draws held-out combinations only, False never does.
What is held out is named in each docstring.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from typing import TypeVar

from examples import Example, Turn, ask, held_out

T = TypeVar("T")

NAMES = """
    Ana Ben Carla David Elena Frank Grace Hugo Iris Jack Kira Leo Maria Nina Omar Paul Rosa Sam Tina Ursula
    Vera Walter Yara Zoe Adam Bella Clara Diego Emma Felix Gina Henry Ivan Julia Karl Lucy Marco Nora Oscar
    Petra
""".split()
CITIES = """
    Paris London Rome Madrid Berlin Lima Oslo Cairo Tokyo Delhi Lisbon Vienna Dublin Athens Prague Boston
    Quito Havana Nairobi Sydney
""".split()
PETS = "cat dog fish horse rabbit parrot turtle mouse goat duck".split()
COLOURS = "red green blue yellow white black orange purple".split()
OBJECTS = "lamp door box car bike safe garage locker suitcase gate cellar cabinet".split()
SONGS = "Yesterday Imagine Thriller Hallelujah Respect Hurt Creep Angel Hello Umbrella Roxanne Layla".split()
ROOMS = "kitchen bedroom hall office bathroom garden".split()
ITEMS = "apples eggs lemons onions candles batteries pens towels plates carrots".split()
MESSAGES = (
    "I am late",
    "dinner is ready",
    "the bus is here",
    "I am at home",
    "the meeting is over",
    "it is raining",
    "I need help",
    "the keys are in the box",
    "good luck",
    "see you soon",
)


def _draw(random: Random, test: bool, draw: Callable[[Random], T], combination: Callable[[T], object]) -> T:
    while True:
        value = draw(random)
        if held_out(combination(value)) == test:
            return value


def arithmetic(random: Random, test: bool) -> Example:
    """Sums and differences of a number below 100 and one below 10. Held out: pairs, whatever their order."""

    def draw(r: Random) -> tuple[str, int, int]:
        a, b = r.randrange(100), r.randrange(10)
        operation = r.choice("+-")
        return operation, *((max(a, b), min(a, b)) if operation == "-" else r.sample((a, b), 2))

    operation, a, b = _draw(random, test, draw, lambda v: (v[0], max(v[1:]), min(v[1:])))
    if operation == "+":
        question = random.choice(("What is {a} + {b}?", "Add {a} and {b}.", "{a} + {b} = ?"))
        return ask("arithmetic", question.format(a=a, b=b), str(a + b))
    question = random.choice(("What is {a} - {b}?", "Take {b} from {a}.", "{a} - {b} = ?"))
    return ask("arithmetic", question.format(a=a, b=b), str(a - b))


FACTS = {
    "Who are you?": "I am Pocket, a very small Gemma 3n.",
    "What can you do?": "I answer short questions about text, pictures and sounds.",
    "Why is the sky blue?": "Air scatters blue light more than red light.",
    "What colour is grass?": "Grass is green.",
    "What colour is snow?": "Snow is white.",
    "What colour is a lemon?": "A lemon is yellow.",
    "How many days are in a week?": "A week has seven days.",
    "How many months are in a year?": "A year has twelve months.",
    "How many legs does a spider have?": "A spider has eight legs.",
    "How many legs does a dog have?": "A dog has four legs.",
    "What is the capital of France?": "The capital of France is Paris.",
    "What is the capital of Italy?": "The capital of Italy is Rome.",
    "What is the capital of Spain?": "The capital of Spain is Madrid.",
    "What is the capital of Japan?": "The capital of Japan is Tokyo.",
    "What is the capital of Peru?": "The capital of Peru is Lima.",
    "What is the capital of Norway?": "The capital of Norway is Oslo.",
    "What is the capital of Egypt?": "The capital of Egypt is Cairo.",
    "What do bees make?": "Bees make honey.",
    "What do cows eat?": "Cows eat grass.",
    "Where do fish live?": "Fish live in water.",
    "When does the sun rise?": "The sun rises in the morning.",
    "What falls from clouds?": "Rain falls from clouds.",
    "What is ice made of?": "Ice is frozen water.",
    "What is the opposite of hot?": "The opposite of hot is cold.",
    "What is the opposite of big?": "The opposite of big is small.",
    "What is the opposite of day?": "The opposite of day is night.",
}
MANNERS = (
    "{q}",
    "Please tell me: {q}",
    "I have a question. {q}",
    "Hello! {q}",
    "{q} Thank you.",
    "Tell me. {q}",
)


def fact(random: Random, test: bool) -> Example:
    """Questions with one answer. Held out: ways of asking a question."""
    question, manner = _draw(random, test, lambda r: (r.choice(list(FACTS)), r.choice(MANNERS)), lambda v: v)
    return ask("facts", manner.format(q=question), FACTS[question])


PLOTS = {
    "cat": "{n} had a cat. The cat slept in the sun all day. At night it sang on the roof, and {n} laughed.",
    "dog": "One day {n} met a dog. The dog was lost. {n} took it home, and they became good friends.",
    "fish": "{n} caught a fish. The fish asked to go back to the sea. So {n} let it swim away.",
    "horse": "{n} had a brave horse. They rode over the hills for a week. In the end they came home.",
    "rabbit": "A rabbit lived in the garden of {n}. It ate all the carrots. So {n} planted many more.",
    "parrot": "{n} taught a parrot to speak. The parrot spoke all night. So {n} taught it to sleep.",
    "turtle": "{n} raced a turtle. The turtle was slow but never stopped. {n} fell asleep and lost.",
    "mouse": "A mouse lived in the house of {n}. It was very small and very quiet. Only {n} could hear it.",
    "goat": "{n} bought a goat. The goat ate the hat of {n}. Now {n} has milk but no hat.",
    "duck": "{n} saw a duck on the lake. The duck could not fly. {n} brought bread every morning.",
}


def story(random: Random, test: bool) -> Example:
    """A little prose. Held out: who with which animal."""
    name, pet = _draw(random, test, lambda r: (r.choice(NAMES), r.choice(PETS)), lambda v: ("story", *v))
    question = random.choice(("Tell me a story about {n} and a {p}.", "Write a story: {n} and a {p}."))
    return ask("stories", question.format(n=name, p=pet), PLOTS[pet].format(n=name))


# Facts given in the conversation. ------------------------------------------------------------------

ABOUT: dict[str, tuple[tuple[str, ...], str, str, str]] = {  # values, statement, question, answer
    "name": (tuple(NAMES), "My name is {}.", "What is my name?", "Your name is {}."),
    "city": (tuple(CITIES), "I live in {}.", "Where do I live?", "You live in {}."),
    "pet": (tuple(PETS), "I have a {}.", "What pet do I have?", "You have a {}."),
    "colour": (tuple(COLOURS), "I like {}.", "Which colour do I like?", "You like {}."),
}


def recall(random: Random, test: bool) -> Example:
    """What was said a few turns ago. Held out: pairs of things said."""

    def draw(r: Random) -> tuple[tuple[str, str], ...]:
        return tuple((kind, r.choice(ABOUT[kind][0])) for kind in r.sample(list(ABOUT), 2))

    said = _draw(random, test, draw, lambda v: tuple(sorted(v)))
    turns = [
        Turn("user", " ".join(ABOUT[kind][1].format(value) for kind, value in said)),
        Turn("model", "Thank you."),
    ]
    for _ in range(random.randrange(3)):
        between = random.choice((fact, arithmetic))(random, test)
        turns += [*between.turns, Turn("model", between.answer)]
    kind, value = random.choice(said)
    turns.append(Turn("user", ABOUT[kind][2]))
    return Example("recall", tuple(turns), ABOUT[kind][3].format(value))


def repeat(random: Random, test: bool) -> Example:
    """Words and numbers, said again: what copying is learned from. Held out: lists of them."""

    def draw(r: Random) -> list[str]:
        kinds = r.choices((NAMES, CITIES, PETS, COLOURS, OBJECTS, ITEMS, None), k=r.randrange(2, 9))
        return [r.choice(kind) if kind else str(r.randrange(1000)) for kind in kinds]

    words = " ".join(_draw(random, test, draw, tuple))
    return ask("repeat", f"Repeat: {words}", words)


def _sentence(random: Random) -> str:
    name, city, pet = random.choice(NAMES), random.choice(CITIES), random.choice(PETS)
    return random.choice(
        (
            f"{name} lives in {city}.",
            f"{name} has a {pet} and a {random.choice(PETS)}.",
            f"It rains in {city} today.",
            f"{name} likes {random.choice(COLOURS)}.",
            f"The {random.choice(OBJECTS)} of {name} is {random.choice(COLOURS)}.",
            f"We need {random.randrange(2, 50)} {random.choice(ITEMS)}.",
        )
    )


def retrieval(random: Random, test: bool) -> Example:
    """A code among 8 to 18 sentences, most often farther back than the window. Held out: thing and code.

    Training sometimes asks for the other code, wherever that is: being first must not give a code away.
    """
    thing, code = _draw(
        random, test, lambda r: (r.choice(OBJECTS), f"{r.randrange(10000):04}"), lambda v: ("code", *v)
    )
    other = random.choice([o for o in OBJECTS if o != thing])
    sentences = [_sentence(random) for _ in range(random.randrange(8, 18))]
    sentences.insert(random.randrange(3), f"The code of the {thing} is {code}.")
    place = random.randrange(len(sentences))
    other_code = f"{random.randrange(10000):04}"
    sentences.insert(place, f"The code of the {other} is {other_code}.")
    if not test and random.random() < 0.4 and not held_out(("code", other, other_code)):
        thing, code = other, other_code
    return ask("retrieval", f"{' '.join(sentences)}\nWhat is the code of the {thing}?", code)


TEXT_TASKS: dict[str, Callable[[Random, bool], Example]] = {
    "arithmetic": arithmetic,
    "repeat": repeat,
    "facts": fact,
    "stories": story,
    "recall": recall,
    "retrieval": retrieval,
}


def unseen_text(task: str, count: int, seed: int) -> Iterator[Example]:
    """Different held-out examples: `count`, or all if there are fewer; training uses no such seed."""
    random, seen = Random(f"test {task} {seed}"), set[Example]()
    for _ in range(50 * count):
        example = TEXT_TASKS[task](random, True)
        if example not in seen:
            seen.add(example)
            yield example
        if len(seen) == count:
            return
