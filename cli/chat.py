"""Chat with a bundle, turn by turn.

Each line is a turn, at a terminal and from a pipe; lines between two \"\"\" are one turn, and so is what a
terminal pastes. The prompt shows how much of the context is used. Answers go to stdout, everything else to
stderr. Ctrl-C ends the current answer, Ctrl-D the conversation. With `--json`, each answer is one line of
JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gemma_edge.cli.answering_model import answering_model
from gemma_edge.cli.bundle_options import add_words, take_bundle
from gemma_edge.cli.chat_commands import COMMANDS, HELP, forgiving, parse_command, share
from gemma_edge.cli.ctrl_c import ctrl_c_calls
from gemma_edge.cli.device_options import add_device, is_elsewhere
from gemma_edge.cli.run import add_options, generate_options, print_answer, read_utf8
from gemma_edge.cli.tool_files import add_tools, tool_options
from gemma_edge.cli.turn_editor import TurnEditor, read_turn
from gemma_edge.runtime.answers import Completion, Stream
from gemma_edge.runtime.console import tell
from gemma_edge.runtime.conversations.conversation import Conversation
from gemma_edge.runtime.conversations.tool_loop import Approve
from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.prompt.tool_calls import ToolCall


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    add_words(parser)
    add_options(parser)
    parser.add_argument(
        "--session",
        metavar="FILE",
        help="go on with the conversation in this file, if there is one, and keep it there at the end",
    )
    parser.add_argument(
        "--overflow",
        choices=("drop-oldest", "error"),
        default="drop-oldest",
        help="when the context is full: forget the oldest turns (default), or end with an error",
    )
    add_tools(parser, "a .py file whose functions the model may call; asks before it runs one")
    parser.add_argument(
        "--yes",
        action="store_true",
        help="run tools, and export a checkpoint in the bundle's place, without asking",
    )
    add_device(parser)
    # The other end of `chat --device`: see cli/device_chat.py.
    parser.add_argument("--turn-end", help=argparse.SUPPRESS)
    parser.add_argument("--forgiving", action="store_true", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """The verb. Raises what `Model.load` and `Model.generate` raise, or `chat_there`."""
    terminal = sys.stdin is not None and sys.stdin.isatty()
    if is_elsewhere(args):
        from gemma_edge.cli.device_chat import chat_there  # a board needs none of it

        used = [0, 1]
        read = TurnEditor(COMMANDS, lambda: share(*used)).read if terminal else _piped
        return chat_there(args, configure, read, used, interactive=terminal)
    interactive = terminal or args.forgiving
    bundle, _ = take_bundle(args, 0)
    settings: dict[str, Any] = {
        "options": {**generate_options(args), **tool_options(args)},
        "overflow": args.overflow,
        "report": lambda lost: tell(str(lost)),
    }
    with answering_model(args, bundle, settings["options"], defer=bool(args.attach)) as model:
        if args.session and Path(args.session).exists():
            if args.system is not None:
                raise UsageError(f"{args.session} has its system message already: leave out --system")
            conversation = Conversation.load(model, args.session, **settings)
            tell(f"{args.session}: {len(conversation.turns)} turns so far.")
        else:
            conversation = Conversation(model, system=args.system, **settings)
        for file in args.attach:
            conversation.attach(file)
        if interactive:
            tell("Type /help for the commands, Ctrl-D to end.")
        try:
            chat(
                conversation,
                _reader(args, conversation, terminal),
                interactive=interactive,
                as_json=args.json,
                usage=args.usage,
                approve=None if args.yes else approved if terminal else lambda call: False,
            )
        finally:  # an error or Ctrl-C loses none of the turns before
            if args.session:
                conversation.save(args.session)
    return 0


def chat(
    conversation: Conversation,
    read: Callable[[], str | None],
    *,
    interactive: bool = False,
    as_json: bool = False,
    usage: bool = False,
    approve: Approve | None = None,
) -> None:
    """Reads turns until there are no more, and answers each.

    Args:
        read: the next turn, or None at the end.
        interactive: go on after an error and after Ctrl-C at the prompt.
        approve: see `Conversation.run`.

    Raises:
        UsageError, FileError, OSError: a turn does not fit the context, a file cannot be attached or written,
            unless interactive.
    """

    def show(stream: Stream) -> Completion:
        with ctrl_c_calls(stream.cancel):
            completion = print_answer(stream, as_json=as_json, usage=usage)
        if interactive and completion.finish_reason == "length":
            tell(cut_off(conversation))
        return completion

    while True:
        with forgiving(interactive):
            line = read()
            if line is None:
                return
            text = line.strip()
            if command := parse_command(text):
                if command == ("/quit", ""):
                    return
                _command(*command, conversation)
            elif text:
                conversation.run(text, read=show, approve=approve)


def approved(call: ToolCall) -> bool:
    """Asks on the terminal; anything but yes is no."""
    tell(
        f"Run {call.name}({', '.join(f'{name}={value!r}' for name, value in call.arguments.items())})? [y/N]"
    )
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def gauge(conversation: Conversation) -> tuple[int, int]:
    """Tokens that the conversation takes of the context, and those that the context holds."""
    model = conversation.model
    return model.position if conversation.turns else 0, model.decoder.context


def prompt(conversation: Conversation) -> str:
    """What the terminal shows before a turn."""
    return share(*gauge(conversation))


def cut_off(conversation: Conversation) -> str:
    """Why an answer ended at the limit of its length."""
    (position, context), limit = gauge(conversation), conversation.options.get("max_tokens")
    if position >= context - 1:
        return f"[cut off: the context of {context} tokens is full: /reset, or --context]"
    return f"[cut off after {limit} tokens: --max-tokens]"


def _piped() -> str | None:
    return read_turn(lambda: read_utf8(sys.stdin.readline) or None)


def _reader(args: argparse.Namespace, conversation: Conversation, terminal: bool) -> Callable[[], str | None]:
    """Where turns come from: the terminal, a pipe, or the other end of `chat --device`."""
    if args.turn_end is None:
        return TurnEditor(COMMANDS, lambda: prompt(conversation)).read if terminal else _piped

    def read() -> str | None:
        print(args.turn_end, *gauge(conversation), flush=True)
        line = sys.stdin.readline()
        return str(json.loads(line)) if line else None

    return read


def _command(verb: str, path: str, conversation: Conversation) -> None:
    if verb == "/attach" and path:
        conversation.attach(path)
        tell("Attached to your next turn.")
    elif verb == "/save" and path:
        conversation.save(path)
        tell("Saved.")
    elif verb == "/reset":
        conversation.reset()
        tell("Conversation forgotten.")
    elif verb == "/context":
        tell("{} of {} tokens".format(*gauge(conversation)), always=True)
    elif verb == "/help":
        tell(HELP, always=True)
    else:
        tell(f"There is no command {verb}.\n{HELP}", always=True)
