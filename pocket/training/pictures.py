"""Drawn shapes: scenes of one to four of them, questions about colour, kind, number and place.

A scene has four places. What is held out are combinations of colour, kind and place: no training picture has
one of them, every test picture has one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from random import Random

from examples import Example, Turn, ask, held_out
from PIL import Image, ImageDraw

from gemma_edge.runtime.description import QUESTIONS as DESCRIBE

SIZE = 64
COLOURS = {
    "red": (214, 40, 40),
    "green": (42, 157, 72),
    "blue": (38, 84, 210),
    "yellow": (244, 200, 40),
    "purple": (130, 60, 170),
    "black": (25, 25, 25),
}
KINDS = ("circle", "square", "triangle", "cross")
PLACES = ("top left", "top right", "bottom left", "bottom right")
NUMBERS = ("zero", "one", "two", "three", "four")


@dataclass(frozen=True)
class Shape:
    """A coloured shape in one of the four places; `size` and `shift` in pixels."""

    colour: str
    kind: str
    place: int
    size: int
    shift: tuple[int, int]

    @property
    def name(self) -> str:
        return f"{self.colour} {self.kind}"

    @property
    def held_out(self) -> bool:
        return held_out(self.colour, self.kind, PLACES[self.place])


@dataclass(frozen=True)
class Scene:
    """Shapes on a light ground, whose grey is `ground`."""

    shapes: tuple[Shape, ...]
    ground: int

    def draw(self) -> Image.Image:
        """The picture, RGB, 64 x 64."""
        picture = Image.new("RGB", (SIZE, SIZE), (self.ground,) * 3)
        pen = ImageDraw.Draw(picture)
        for shape in self.shapes:
            x = 16 + 32 * (shape.place % 2) + shape.shift[0]
            y = 16 + 32 * (shape.place // 2) + shape.shift[1]
            _draw(pen, shape, x, y, shape.size)
        return picture


def _draw(pen: ImageDraw.ImageDraw, shape: Shape, x: int, y: int, r: int) -> None:
    fill = COLOURS[shape.colour]
    if shape.kind == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill)
    elif shape.kind == "square":
        pen.rectangle((x - r, y - r, x + r, y + r), fill)
    elif shape.kind == "triangle":
        pen.polygon(((x, y - r), (x - r, y + r), (x + r, y + r)), fill)
    else:
        width = max(2, r // 3)
        pen.rectangle((x - r, y - width, x + r, y + width), fill)
        pen.rectangle((x - width, y - r, x + width, y + r), fill)


def scene(random: Random, test: bool) -> Scene:
    """One to four shapes in different places; `test`: at least one of them held out, else none."""
    while True:
        shapes = tuple(
            Shape(
                random.choice(list(COLOURS)),
                random.choice(KINDS),
                place,
                random.randrange(8, 13),
                (random.randrange(-3, 4), random.randrange(-3, 4)),
            )
            for place in sorted(random.sample(range(4), random.randrange(1, 5)))
        )
        if any(shape.held_out for shape in shapes) == test:
            return Scene(shapes, random.randrange(220, 256))


def what(random: Random, picture: Scene) -> Example:
    """What is in a place; in a picture of one shape, also what there is."""
    if len(picture.shapes) == 1 and random.random() < 0.5:
        return ask("image what", "What is in the picture?", f"a {picture.shapes[0].name}", picture)
    place = random.randrange(4)
    there = [shape.name for shape in picture.shapes if shape.place == place]
    return ask(
        "image what", f"What is in the {PLACES[place]}?", f"a {there[0]}" if there else "nothing", picture
    )


def where(random: Random, picture: Scene) -> Example | None:
    """Where a shape is, if there is only one of its name."""
    names = [shape.name for shape in picture.shapes]
    shape = random.choice(picture.shapes)
    if names.count(shape.name) > 1:
        return None
    return ask("image where", f"Where is the {shape.name}?", PLACES[shape.place], picture)


def colour(random: Random, picture: Scene) -> Example | None:
    """The colour of the only shape of a kind."""
    kinds = [shape.kind for shape in picture.shapes]
    shape = random.choice(picture.shapes)
    if kinds.count(shape.kind) > 1:
        return None
    return ask("image colour", f"What colour is the {shape.kind}?", shape.colour, picture)


def count(random: Random, picture: Scene) -> Example:
    """How many shapes there are: all, of a kind, or of a colour."""
    topic = random.randrange(3)
    if topic == 0:
        number, name = len(picture.shapes), "shapes"
    elif topic == 1:
        kind = random.choice((*KINDS, *(shape.kind for shape in picture.shapes)))
        number = sum(shape.kind == kind for shape in picture.shapes)
        name = f"{kind}es" if kind == "cross" else f"{kind}s"
    else:
        hue = random.choice((*COLOURS, *(shape.colour for shape in picture.shapes)))
        number, name = sum(shape.colour == hue for shape in picture.shapes), f"{hue} shapes"
    return ask("image count", f"How many {name} are there?", NUMBERS[number], picture)


def describe(random: Random, picture: Scene) -> Example:
    """All shapes with their places, as the verb `describe` asks for them."""
    parts = [f"a {shape.name} in the {PLACES[shape.place]}" for shape in picture.shapes]
    listed = " and ".join(part for part in (", ".join(parts[:-1]), parts[-1]) if part)
    return ask("image describe", DESCRIBE["image"], f"{listed.capitalize()}.", picture)


QUESTIONS = {
    "image what": what,
    "image where": where,
    "image colour": colour,
    "image count": count,
    "image describe": describe,
}


def image_example(random: Random, test: bool, task: str) -> Example:
    """A question of `task` about a new picture."""
    while True:
        if example := QUESTIONS[task](random, scene(random, test)):
            return example


def image_talk(
    random: Random, weights: Mapping[str, float], questions: int = 4, picture: Scene | None = None
) -> Example:
    """Questions about one training picture, in turns: seeing it costs more than being asked.

    Args:
        weights: how often each of QUESTIONS is asked.
        picture: a new one by default.
    """
    picture, asked = picture or scene(random, False), list[Example]()
    while len(asked) < questions:
        task = random.choices(list(QUESTIONS), [weights[name] for name in QUESTIONS])[0]
        if example := QUESTIONS[task](random, picture):
            asked.append(example)
    turns = [Turn("user", asked[0].turns[0].text, picture)]
    for before, example in pairwise(asked):
        turns += [Turn("model", before.answer), Turn("user", example.turns[0].text)]
    return Example("image talk", tuple(turns), asked[-1].answer)


def unseen_images(task: str, count: int, seed: int) -> Iterator[Example]:
    """`count` held-out examples of one of QUESTIONS."""
    random = Random(f"test {task} {seed}")
    for _ in range(count):
        yield image_example(random, True, task)
