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
from types import FrameType

from gemma_edge.cli.bundle_options import add_words, loading, take_bundle
from gemma_edge.cli.run import add_options, generate_options, print_answer, read_utf8
from gemma_edge.runtime.answers import Stream
from gemma_edge.runtime.console import tell
from gemma_edge.runtime.conversation import Conversation
from gemma_edge.runtime.errors import FileError, UsageError
from gemma_edge.runtime.model import Model

HELP = """\
/attach FILE  attach an image, a recording or a video to the next turn
/reset  forget the conversation
/help   show this list
/quit   end (as does Ctrl-D)
Ctrl-C  end the current answer"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    add_words(parser)
    add_options(parser)


def run(args: argparse.Namespace) -> int:
    """The verb. Raises what `Model.load` and `Model.generate` raise."""
    interactive = sys.stdin is not None and sys.stdin.isatty()
    bundle, _ = take_bundle(args, 0)
    model = Model.load(bundle, defer_decoder=bool(args.attach), **loading(args))
    conversation = Conversation(model, system=args.system, options=generate_options(args))
    for file in args.attach:
        conversation.attach(file)
    if interactive:
        tell("Type /help for the commands, Ctrl-D to end.")
    chat(
        conversation,
        _ask if interactive else lambda: read_utf8(sys.stdin.readline) or None,
        interactive=interactive,
        as_json=args.json,
        usage=args.usage,
    )
    return 0


def chat(
    conversation: Conversation,
    read: Callable[[], str | None],
    *,
    interactive: bool = False,
    as_json: bool = False,
    usage: bool = False,
) -> None:
    """Reads turns until there are no more, and answers each.

    Args:
        read: the next line, or None at the end.
        interactive: go on after an error and after Ctrl-C at the prompt.

    Raises:
        UsageError, FileError: a turn does not fit the context, or a file cannot be attached, unless
            interactive.
    """
    while True:
        try:
            line = read()
            if line is None:
                return
            text = line.strip()
            if re.fullmatch(r"/[a-z]*|/attach\s.*", text):
                if text == "/quit":
                    return
                _command(text, conversation)
            elif text:
                stream = conversation.ask(text)
                with ctrl_c_cancels(stream):
                    completion = print_answer(stream, as_json=as_json, usage=usage)
                conversation.note(completion.text)
        except (UsageError, FileError) as error:
            if not interactive:
                raise
            tell(f"error: {error}")
        except KeyboardInterrupt:
            if not interactive:
                raise
            tell("\nType /quit or Ctrl-D to end.")


def _command(name: str, conversation: Conversation) -> None:
    verb, _, file = name.partition(" ")
    if verb == "/attach" and file.strip():
        conversation.attach(file.strip().strip("'\""))  # a terminal quotes a file that is dropped on it
        tell("Attached to your next turn.")
    elif name == "/reset":
        conversation.reset()
        tell("Conversation forgotten.")
    elif name == "/help":
        tell(HELP)
    else:
        tell(f"There is no command {name}.\n{HELP}")


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
