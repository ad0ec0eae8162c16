"""Conversations with tools: calls in both conventions, answers without a call, results told in words.

The prompt's text is the library's own: `ChatTemplate` renders a conversation, most often through Pocket's
template, sometimes with the section that the library writes for templates which know no tools. Names of tools
and of their parameters vary, so they must be read. What is held out are a request's words together with its
arguments, and sets of tools.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from random import Random
from typing import Any

from examples import Example, held_out
from text_tasks import CITIES, ITEMS, MANNERS, MESSAGES, NAMES, ROOMS, SONGS, arithmetic, fact

from gemma_edge.runtime.prompt.chat_template import ChatTemplate
from gemma_edge.runtime.prompt.tool_calls import CONVENTIONS
from gemma_edge.runtime.prompt.tool_schemas import Tool, normal_tools

TEMPLATE = Path(__file__).parent / "chat_template.jinja"
Values = tuple[str | int, ...]


@dataclass(frozen=True)
class Kind:
    """What a tool is for.

    Attributes:
        names, descriptions: of which a conversation has one each.
        parameters: the names of each, of which a conversation has one.
        types: their JSON types.
        requests: ways of asking, with a place for each argument.
        values: draws arguments.
        result: draws what the tool returns.
        said: the result in words, from the arguments and the result's values by name; by the result's first
            key, if there are several.
    """

    names: tuple[str, ...]
    descriptions: tuple[str, ...]
    parameters: tuple[tuple[str, ...], ...]
    types: tuple[str, ...]
    requests: tuple[str, ...]
    values: Callable[[Random], Values]
    result: Callable[[Random], dict[str, str | int | float]]
    said: str | Mapping[str, str]


DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()


def clock(random: Random) -> str:
    return f"{random.randrange(24):02}:{random.randrange(12) * 5:02}"


def _weather(random: Random) -> dict[str, str | int | float]:
    if random.random() < 0.5:
        return {"temperature": random.randrange(1, 40) + random.choice((0, 0, 0.0, 0.5))}
    return {"sky": random.choice(("sunny", "cloudy", "raining", "windy")), "degrees": random.randrange(1, 40)}


def _done(random: Random) -> dict[str, str | int | float]:
    return {"status": "ok"}


KINDS: dict[str, Kind] = {
    "weather": Kind(
        ("get_weather", "weather"),
        ("Get the weather in a city.", "Tells the weather."),
        (("city", "place"),),
        ("string",),
        (
            "What is the weather in {0}?",
            "Will it rain in {0}?",
            "Is it cold in {0}?",
            "How is the weather in {0}?",
        ),
        lambda r: (r.choice(CITIES),),
        _weather,
        {
            "sky": "In {0} it is {sky}, with {degrees} degrees.",
            "temperature": "In {0} it is {temperature} degrees.",
        },
    ),
    "timer": Kind(
        ("set_timer", "start_timer"),
        ("Set a timer.", "Starts a timer that rings."),
        (("minutes",),),
        ("integer",),
        ("Set a timer for {0} minutes.", "Wake me in {0} minutes.", "Start a timer of {0} minutes."),
        lambda r: (r.randrange(2, 100),),
        _done,
        "The timer is set for {0} minutes.",
    ),
    "message": Kind(
        ("send_message", "write_message"),
        ("Send a message to a person.", "Writes to somebody."),
        (("to", "person"), ("text", "message")),
        ("string", "string"),
        ("Tell {0}: {1}.", "Send {0} a message: {1}.", "Write to {0}: {1}."),
        lambda r: (r.choice(NAMES), r.choice(MESSAGES)),
        _done,
        "The message to {0} is sent.",
    ),
    "music": Kind(
        ("play_music", "play_song"),
        ("Play a song.", "Plays music."),
        (("song", "title"),),
        ("string",),
        ("Play {0}.", "I want to hear {0}.", "Please play {0}."),
        lambda r: (r.choice(SONGS),),
        _done,
        "Now you hear {0}.",
    ),
    "light": Kind(
        ("set_light", "dim_light"),
        ("Set the light in a room.", "Makes a light brighter or darker."),
        (("room",), ("percent", "level")),
        ("string", "integer"),
        (
            "Set the light in the {0} to {1} percent.",
            "Light in the {0}: {1} percent.",
            "I want {1} percent light in the {0}.",
        ),
        lambda r: (r.choice(ROOMS), r.randrange(10, 100)),
        _done,
        "The light in the {0} is at {1} percent.",
    ),
    "call": Kind(
        ("call", "phone"),
        ("Call a person.", "Calls somebody on the phone."),
        (("name", "person"),),
        ("string",),
        ("Call {0}.", "I want to talk to {0}.", "Ring {0}."),
        lambda r: (r.choice(NAMES),),
        _done,
        "{0} is on the phone.",
    ),
    "list": Kind(
        ("add_item", "add_to_list"),
        ("Add things to the shopping list.", "Puts something on the list."),
        (("item", "thing"), ("count", "number")),
        ("string", "integer"),
        ("Add {1} {0} to the list.", "Put {1} {0} on the list.", "We need {1} {0}."),
        lambda r: (r.choice(ITEMS), r.randrange(2, 50)),
        _done,
        "The list now has {1} {0}.",
    ),
    "time": Kind(
        ("get_time", "time_in"),
        ("Get the time in a city.", "Tells how late it is."),
        (("city", "place"),),
        ("string",),
        ("What time is it in {0}?", "How late is it in {0}?", "Tell me the time in {0}."),
        lambda r: (r.choice(CITIES),),
        lambda r: {"time": clock(r)},
        "In {0} it is {time}.",
    ),
    "price": Kind(
        ("get_price", "price_of"),
        ("Get the price of a thing.", "Tells what things cost."),
        (("item", "thing"),),
        ("string",),
        ("What do {0} cost?", "How much are {0}?", "Tell me the price of {0}."),
        lambda r: (r.choice(ITEMS),),
        lambda r: {"price": r.randrange(2, 100)},
        "The price of {0} is {price}.",
    ),
    "alarm": Kind(
        ("set_alarm", "wake_up"),
        ("Set an alarm.", "Wakes you at a time."),
        (("time",),),
        ("string",),
        ("Wake me at {0}.", "Set an alarm for {0}.", "Alarm at {0}, please."),
        lambda r: (clock(r),),
        _done,
        "The alarm is set for {0}.",
    ),
    "date": Kind(
        ("get_date", "today"),
        ("Get the date.", "Tells which day it is."),
        (),
        (),
        tuple(
            manner.format(q=question)
            for question in (
                "What day is today?",
                "Which day is it?",
                "What is the date?",
                "Which day is today?",
            )
            for manner in MANNERS
        ),
        lambda r: (),
        lambda r: {"day": r.choice(DAYS)},
        "Today is {day}.",
    ),
}
SYSTEMS = ("Be brief.", "You are a helpful assistant.", "Answer in one sentence.", "You help at home.")
EXTRAS = ("days", "volume", "urgent", "unit", "repeat")  # optional parameters that nothing asks for
# No description must be needed, nor lead astray.
OTHER_DESCRIPTIONS = ("A tool.", "Does what it says.", "Use it when asked.", "Of the house.")
ERRORS = ("no network", "not found", "not allowed", "too late")
SEVERAL_RESULTS = {False: 0.6, True: 0.2}  # of the questions about results, by whether they are held out
COUNTS = {False: (2, 2, 3), True: (2, 2, 2, 2, 3)}  # of several calls
AGAIN = 0.12  # how often training asks for an earlier call once more: held-out questions have few arguments


@dataclass(frozen=True)
class Offer:
    """A tool as one conversation has it: which of the names of its kind; `extra` is an optional parameter."""

    kind: str
    name: str
    description: str
    parameters: tuple[str, ...]
    extra: str = ""

    def schema(self) -> dict[str, Any]:
        types = KINDS[self.kind].types
        properties = {name: {"type": type} for name, type in zip(self.parameters, types, strict=True)}
        if self.extra:
            properties[self.extra] = {"type": "integer"}
        parameters = {"type": "object", "properties": properties, "required": list(self.parameters)}
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}


@dataclass(frozen=True)
class Call:
    """A request and the call that it asks for."""

    offer: Offer
    request: str
    values: Values

    @property
    def held_out(self) -> bool:
        return held_out(self.offer.kind, self.request, self.values)

    @property
    def asked(self) -> str:
        return self.request.format(*self.values)

    def to_dict(self) -> dict[str, Any]:
        arguments = dict(zip(self.offer.parameters, self.values, strict=True))
        return {"type": "function", "function": {"name": self.offer.name, "arguments": arguments}}


def offers(random: Random, test: bool, count: int) -> list[Offer]:
    """So many tools of different kinds; a set of two or three is held out if `test`, else not."""
    while True:
        kinds = random.sample(list(KINDS), count)
        if count == 1 or held_out("offered", *sorted(kinds)) == test:
            return [
                Offer(
                    name,
                    random.choice(KINDS[name].names),
                    random.choice((*KINDS[name].descriptions, "", random.choice(OTHER_DESCRIPTIONS))),
                    tuple(random.choice(names) for names in KINDS[name].parameters),
                    random.choice(EXTRAS) if random.random() < 0.1 else "",
                )
                for name in kinds
            ]


def call(random: Random, test: bool, offer: Offer) -> Call:
    """A request for a tool; its words with its arguments are held out if `test`, else not."""
    kind = KINDS[offer.kind]
    while True:
        made = Call(offer, random.choice(kind.requests), kind.values(random))
        if made.held_out == test:
            return made


@dataclass(frozen=True)
class ToolTalk(Example):
    """A conversation with tools.

    Attributes:
        tools: JSON schemas, as JSON.
        convention: how calls are written, of CONVENTIONS.
        plain: whether the library writes the tools' section, not Pocket's template.
        messages: all, the answer last, as JSON.
    """

    tools: str = "[]"
    convention: str = "python"
    plain: bool = False
    messages: str = "[]"


def tool_talk(random: Random, test: bool, task: str, plain: bool | None = None) -> ToolTalk:
    """A conversation of a task in TOOL_TASKS.

    Args:
        plain: see `ToolTalk`; None: in every tenth.
    """
    topic, convention = task.split()[1:]
    offered = offers(random, test, random.choice((1, 2, 2, 3, 3)))
    messages: list[dict[str, Any]] = []
    if random.random() < 0.08:
        messages.append({"role": "system", "content": random.choice(SYSTEMS)})
    if topic == "text":
        _ask_for_text(messages, random, test)
    else:
        several = topic == "several" or (topic == "result" and random.random() < SEVERAL_RESULTS[test])
        calls: list[Call] = []
        for _ in range(random.choice(COUNTS[test]) if several else 1):
            again = not test and calls and random.random() < AGAIN
            calls.append(random.choice(calls) if again else call(random, test, random.choice(offered)))
        asked = random.choice((" ", " ", " Then: ", "\n")).join(one.asked for one in calls)
        messages.append({"role": "user", "content": asked})
        messages.append({"role": "assistant", "content": "", "tool_calls": [one.to_dict() for one in calls]})
        if topic == "result":
            said = []
            for one in calls:
                result, words = _result(random, one)
                messages.append({"role": "tool", "content": result})
                said.append(words)
            messages.append({"role": "assistant", "content": " ".join(said)})
    if not test and random.random() < 0.25 and "tool_calls" not in messages[-1]:
        if random.random() < 0.5:
            _ask_for_text(messages, random, test)
        else:
            one = call(random, test, random.choice(offered))
            messages.append({"role": "user", "content": one.asked})
            messages.append({"role": "assistant", "content": "", "tool_calls": [one.to_dict()]})
    if plain is None:
        plain = random.random() < 0.1
    return ToolTalk(
        task,
        (),
        "",
        json.dumps([offer.schema() for offer in offered]),
        convention,
        plain,
        json.dumps(messages),
    )


def _ask_for_text(messages: list[dict[str, Any]], random: Random, test: bool) -> None:
    """A question that needs no tool."""
    example = random.choice((fact, fact, arithmetic))(random, test)
    messages.append({"role": "user", "content": example.turns[0].text})
    messages.append({"role": "assistant", "content": example.answer})


def _result(random: Random, one: Call) -> tuple[str, str]:
    """What the tool returns, and that in words."""
    if random.random() < 0.12:
        error = random.choice(ERRORS)
        return json.dumps({"error": error}), f"That did not work: {error}."
    kind = KINDS[one.offer.kind]
    result = kind.result(random)
    only = next(iter(result.values())) if len(result) == 1 else None
    form = random.random()
    text = json.dumps(result)
    if only is not None and form < 0.4:
        text = str(only) if form < 0.2 else json.dumps(only)
    said = kind.said if isinstance(kind.said, str) else kind.said[next(iter(result))]
    return text, said.format(*one.values, **result)


@cache
def _template(plain: bool) -> ChatTemplate:
    """Pocket's template, or Gemma 3n's, which writes no tools: the library does."""
    return ChatTemplate(None if plain else TEMPLATE.read_text(encoding="utf-8"))


@lru_cache(256)
def _normal(tools: str) -> list[Tool]:
    return normal_tools(json.loads(tools))


def rendered(talk: ToolTalk, answered: bool = True) -> str:
    """The prompt's text, with the answer or up to it."""
    messages = json.loads(talk.messages)
    convention: Any = talk.convention
    return _template(talk.plain).render(
        messages if answered else messages[:-1],
        add_generation_prompt=not answered,
        tools=_normal(talk.tools),
        convention=convention,
    )


def unseen_tools(task: str, count: int, seed: int) -> Iterator[ToolTalk]:
    """Different held-out conversations; the tools' section is that of Pocket's template."""
    random, seen = Random(f"test {task} {seed}"), set[ToolTalk]()
    while len(seen) < count:
        talk = tool_talk(random, True, task, plain=False)
        if talk not in seen:
            seen.add(talk)
            yield talk


TOOL_TASKS = [
    f"tools {topic} {convention}"
    for topic in ("call", "several", "text", "result")
    for convention in CONVENTIONS
]
SHARES: Mapping[str, float] = {"call": 0.24, "several": 0.34, "text": 0.1, "result": 0.32}
