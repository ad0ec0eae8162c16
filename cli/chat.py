"""Chat with a bundle, turn by turn.

Each line is a turn, at a terminal and from a pipe. Answers go to stdout, everything else to stderr.
Ctrl-C ends the current answer, Ctrl-D the conversation. With `--json`, each answer is one line of
JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from gemma_edge.cli.bundle_options import add_words, loading, take_bundle
from gemma_edge.cli.run import add_options, generate_options, print_answer, read_utf8
from gemma_edge.cli.tool_files import add_tools, tool_options
from gemma_edge.runtime.answers import Completion, Stream
from gemma_edge.runtime.console import tell
from gemma_edge.runtime.conversation import Conversation
from gemma_edge.runtime.errors import FileError, UsageError
from gemma_edge.runtime.model import Model
from gemma_edge.runtime.prompt.tool_calls import ToolCall
from gemma_edge.runtime.tool_loop import Approve

HELP = """\
/attach FILE  attach an image, a recording or a video to the next turn
/save FILE  keep the conversation in a file, for --session
/reset  forget the conversation
/help   show this list
/quit   end (as does Ctrl-D)
Ctrl-C  end the current answer"""


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
    parser.add_argument("--yes", action="store_true", help="run tools without asking")


def run(args: argparse.Namespace) -> int:
    """The verb. Raises what `Model.load` and `Model.generate` raise."""
    interactive = sys.stdin is not None and sys.stdin.isatty()
    bundle, _ = take_bundle(args, 0)
    model = Model.load(bundle, defer_decoder=bool(args.attach), **loading(args))
    settings: dict[str, Any] = {
        "options": {**generate_options(args), **tool_options(args)},
        "overflow": args.overflow,
    }
    settings["report"] = lambda lost: tell(str(lost))
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
            _ask if interactive else lambda: read_utf8(sys.stdin.readline) or None,
            interactive=interactive,
            as_json=args.json,
            usage=args.usage,
            approve=None if args.yes else approved if interactive else lambda call: False,
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
        read: the next line, or None at the end.
        interactive: go on after an error and after Ctrl-C at the prompt.
        approve: see `Conversation.run`.

    Raises:
        UsageError, FileError, OSError: a turn does not fit the context, a file cannot be attached or written,
            unless interactive.
    """

    def show(stream: Stream) -> Completion:
        with ctrl_c_cancels(stream):
            return print_answer(stream, as_json=as_json, usage=usage)

    while True:
        try:
            line = read()
            if line is None:
                return
            text = line.strip()
            if re.fullmatch(r"/[a-z]*|/(attach|save)\s.*", text):
                if text == "/quit":
                    return
                _command(text, conversation)
            elif text:
                conversation.run(text, read=show, approve=approve)
        except (UsageError, FileError, OSError) as error:
            if not interactive:
                raise
            tell(f"error: {error}", always=True)
        except KeyboardInterrupt:
            if not interactive:
                raise
            tell("\nType /quit or Ctrl-D to end.")


def approved(call: ToolCall) -> bool:
    """Asks on the terminal; anything but yes is no."""
    tell(
        f"Run {call.name}({', '.join(f'{name}={value!r}' for name, value in call.arguments.items())})? [y/N]"
    )
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _command(name: str, conversation: Conversation) -> None:
    verb, _, file = name.partition(" ")
    if verb == "/attach" and file.strip():
        conversation.attach(file.strip().strip("'\""))  # a terminal quotes a file that is dropped on it
        tell("Attached to your next turn.")
    elif verb == "/save" and file.strip():
        conversation.save(file.strip().strip("'\""))
        tell("Saved.")
    elif name == "/reset":
        conversation.reset()
        tell("Conversation forgotten.")
    elif name == "/help":
        tell(HELP, always=True)
    else:
        tell(f"There is no command {name}.\n{HELP}", always=True)


@contextlib.contextmanager
def ctrl_c_cancels(stream: Stream) -> Iterator[None]:
    """Within it, the first Ctrl-C cancels the stream; a second one interrupts as usual."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's business
        return
    previous = signal.getsignal(signal.SIGINT)

    def cancel(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, previous)
        stream.cancel()

    signal.signal(signal.SIGINT, cancel)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _ask() -> str | None:
    """A line from the terminal, with editing and history where Python has readline; None at Ctrl-D."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (importing it is what gives `input` its editing)
    sys.stdout.flush()
    try:
        if sys.stdout.isatty():
            return input("> ")
        print("> ", end="", file=sys.stderr, flush=True)  # stdout is a file, for answers only
        return sys.stdin.readline() or None
    except EOFError:
        tell("")
        return None
