"""`gemma-edge VERB ...`: imports the verb's module, runs it, and turns errors into exit codes.

A verb is a module with a docstring, `configure(parser)` and `run(args) -> int`. Only the requested
module is imported, so `--help` is quick and the runtime's verbs need none of the export's packages.
Exit codes are those of `gemma_edge.runtime.errors`.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import faulthandler
import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence

from gemma_edge.cli import completion
from gemma_edge.cli.variables import LOG, MODEL, TRACEBACK
from gemma_edge.runtime.console import set_volume
from gemma_edge.runtime.errors import MESSAGE_CHARACTERS, GemmaEdgeError, UsageError, printable
from gemma_edge.runtime.host.huge_pages import restart_with_huge_pages
from gemma_edge.runtime.install_hint import distribution, install_hint

# verb: (module, one line of help)
VERBS: dict[str, tuple[str, str]] = {
    "demo": ("gemma_edge.cli.demo", "export, verify, question and measure a small model"),
    "synth": ("gemma_edge.cli.synth", "write a checkpoint of published shapes with random weights"),
    "plan": ("gemma_edge.cli.plan", "choose slice, recipe and format for a device"),
    "slice": ("gemma_edge.cli.slice", "cut a smaller checkpoint out of one with nested layers"),
    "export": ("gemma_edge.cli.export", "export a checkpoint to a quantized bundle"),
    "inspect": ("gemma_edge.cli.inspect", "show a bundle's parts, sizes and predicted memory"),
    "verify": ("gemma_edge.cli.verify", "compare a bundle with its checkpoint"),
    "run": ("gemma_edge.cli.run", "answer one prompt"),
    "chat": ("gemma_edge.cli.chat", "chat with a bundle, turn by turn"),
    "describe": ("gemma_edge.cli.describe", "describe pictures, recordings or videos"),
    "transcribe": ("gemma_edge.cli.transcribe", "transcribe recordings or videos"),
    "translate": ("gemma_edge.cli.translate", "translate the speech of recordings or videos"),
    "serve": ("gemma_edge.cli.serve", "serve a bundle over HTTP, with a chat page"),
    "eval": ("gemma_edge.cli.evaluate", "score a bundle on questions with one right answer"),
    "bench": ("gemma_edge.cli.bench", "measure speed, memory and latency, here or on a device"),
    "tune": ("gemma_edge.cli.tune", "find the quickest settings of a bundle on a machine"),
    "deploy": ("gemma_edge.cli.deploy", "put a bundle and what runs it on a board"),
    "android": ("gemma_edge.cli.android", "install, feed, ask and measure the app on a phone"),
    "doctor": ("gemma_edge.cli.doctor", "look over a machine: what runs, what is slow or missing"),
    "list": ("gemma_edge.cli.list", "list the bundles in a folder and below it"),
    "recipes": ("gemma_edge.cli.recipes", "show what each recipe stores"),
    "cache": ("gemma_edge.cli.cache", "show, bound or empty the cache of packed weights"),
    "pull": ("gemma_edge.cli.pull", "fetch a published bundle from a model hub"),
    "push": ("gemma_edge.cli.upload", "publish a bundle on a model hub, with a model card"),
    "report": ("gemma_edge.cli.report", "turn results into one HTML page"),
    "completion": ("gemma_edge.cli.completion", "print what makes a shell complete at the Tab key"),
}
# Top-level module of an optional dependency: the extra that installs it.
EXTRAS = {
    "onnx": "export",
    "safetensors": "export",
    "ml_dtypes": "export",
    "tqdm": "export",
    "google": "export",
    "flatbuffers": "export",
    "litert_lm_builder": "export",
    "huggingface_hub": "hub",
    "starlette": "serve",
    "uvicorn": "serve",
    "prometheus_client": "serve",
    "argcomplete": "completion",
}
# Flags of every verb: the long form, and the help.
TALK = {
    "-q": ("--quiet", "print answers and errors alone"),
    "-v": ("--verbose", "log what is done, with times and memory, on stderr"),
}
FLAGS = {*TALK, *(name for name, _ in TALK.values())}
SIGNAL_BASE = 128  # exit code of a command that a signal ended, less the signal's number
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code. Nothing is raised, unless GEMMA_EDGE_TRACEBACK=1 is set."""
    _open_standard_files()
    if argv is None:
        restart_with_huge_pages([*sys.argv[1:], os.environ.get(MODEL, "")])
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character shows "?"
    _report_crashes()
    try:
        with _termination_unwinds():
            code = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except SystemExit as stop:  # argparse: --help is 0, a usage error 2
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BrokenPipeError:
        # The reader has what it wanted. Python would complain when it flushes stdout at its end.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except BaseException as error:
        if os.environ.get(TRACEBACK) == "1":
            raise
        message, code = _explain(error)
        print(f"gemma-edge: {printable(message, MESSAGE_CHARACTERS)}", file=sys.stderr)
        return code
    finally:
        set_volume()


def _open_standard_files() -> None:
    """Gives a process that was started without stdin, stdout or stderr the null device in their place.

    Otherwise the next file that is opened gets such a number, and what a library prints goes into it.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            if os.open(os.devnull, os.O_RDWR) == number:  # the lowest that is free
                setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))


def _report_crashes() -> None:
    """Makes SIGBUS, SIGILL, SIGSEGV, SIGFPE and SIGABRT say so before they end the process."""
    if not faulthandler.is_enabled():
        with contextlib.suppress(OSError):  # no stderr
            # Not descriptor 2 itself: what engines log while a model loads goes elsewhere.
            faulthandler.enable(os.dup(2), all_threads=False)


@contextlib.contextmanager
def _termination_unwinds() -> Iterator[None]:
    """Makes SIGTERM and SIGHUP clean up as Ctrl-C does; those that are ignored, as below nohup, stay so."""

    def end(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second one must not interrupt the cleaning up
        raise SystemExit(SIGNAL_BASE + number)

    changed = []
    if threading.current_thread() is threading.main_thread():
        changed = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is signal.SIG_DFL]
    for number in changed:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, signal.SIG_DFL)


def _dispatch(argv: list[str]) -> int:
    if completion.VARIABLE in os.environ:
        completion.complete(VERBS)
    talk = []  # -q and -v may stand before the verb, too
    while argv and argv[0] in FLAGS:
        talk.append(argv.pop(0))
    if not argv:
        print(_help(), file=sys.stderr)
        return UsageError.exit_code
    verb, *rest = argv
    if verb in ("-h", "--help", "help"):
        if not rest:
            print(_help())
            return 0
        verb, *rest = (*rest, "--help")
    if verb in ("-V", "--version", "version"):
        from gemma_edge.runtime.version import __version__

        print(f"gemma-edge {__version__}")
        return 0
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the verbs are {', '.join(VERBS)}."
        raise UsageError(f"there is no verb {verb!r}: {hint}")
    module = importlib.import_module(VERBS[verb][0])
    parser = argparse.ArgumentParser(
        prog=f"gemma-edge {verb}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.configure(parser)
    volume = parser.add_mutually_exclusive_group()
    for flag, (name, text) in TALK.items():
        volume.add_argument(flag, name, action="store_true", help=text)
    # `run out/ -a photo.jpg "What is this?"`; but after "--" a word is none of the options.
    parse = parser.parse_args if "--" in rest else parser.parse_intermixed_args
    args = parse([*talk, *rest])
    verbose = args.verbose or (os.environ.get(LOG) == "1" and not args.quiet)
    set_volume(quiet=args.quiet, verbose=verbose)
    if not verbose:
        return int(module.run(args))
    with _logged(verb):
        return int(module.run(args))


@contextlib.contextmanager
def _logged(verb: str) -> Iterator[None]:
    """Logs the versions at work, and what the verb took."""
    import logging
    import platform
    import resource

    from gemma_edge.runtime.version import __version__

    log, started = logging.getLogger("gemma_edge.cli"), time.perf_counter()
    versions = f"gemma-edge {__version__}, Python {platform.python_version()}, {platform.platform()}"
    log.info("%s: %s", verb, versions)
    try:
        yield
    finally:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        log.info("%s: %.2f s, at most %d MiB resident", verb, time.perf_counter() - started, peak // 1024)


def _help() -> str:
    width = max(map(len, VERBS))
    return "\n".join(
        [
            "usage: gemma-edge VERB ...",
            "",
            "Export, verify, run and measure Gemma 3n on small devices.",
            "",
            *(f"  {verb:<{width}}  {text}" for verb, (_, text) in VERBS.items()),
            "",
            "`gemma-edge help VERB` explains a verb, `gemma-edge version` prints the version.",
            "With -q, only answers and errors are printed; with -v, what is done, with times and memory.",
            f"{LOG}=1 logs as -v does, {TRACEBACK}=1 prints the traceback of an error.",
        ]
    )


def _explain(error: BaseException) -> tuple[str, int]:
    """An error as a message for the user and an exit code."""
    if isinstance(error, GemmaEdgeError):
        return f"error: {error}", error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", INTERRUPTED
    if isinstance(error, ImportError) and (package := (error.name or "").split(".")[0]) in EXTRAS:
        remedy = install_hint(EXTRAS[package])
        return f"error: this needs {distribution(package)}: {remedy}", UsageError.exit_code
    if isinstance(error, MemoryError):
        return "error: not enough memory", GemmaEdgeError.exit_code
    if isinstance(error, OSError):
        where = "" if error.filename is None else f": {error.filename}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = "Free some space, or write elsewhere."
            return f"error: the disk is full{where}. {remedy}", GemmaEdgeError.exit_code
        if isinstance(error, PermissionError):
            return f"error: no permission{where}", GemmaEdgeError.exit_code
        return f"error: {error.strerror or error}{where}", GemmaEdgeError.exit_code
    text = f"internal error: {type(error).__name__}: {error}. {TRACEBACK}=1 prints the traceback."
    return text, GemmaEdgeError.exit_code


if __name__ == "__main__":
    raise SystemExit(main())
