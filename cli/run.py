"""Answer one prompt with a bundle.

The answer streams to stdout. `-a` attaches images, recordings and videos. The prompt comes from the
command line; without one, or where `-` stands for it, from stdin. `run out/ "Summarize:" - < notes.txt`
takes both, with an empty line between them. `--json` prints one object with text, finish_reason and usage
instead.

`--batch prompts.jsonl -o answers.jsonl` answers many prompts. Each line is a text, or an object with
`prompt` or `messages`, and options:

    {"prompt": "Why is the sky blue?", "id": "sky", "max_tokens": 40}

An interrupted batch goes on where it stopped when the command is given again. A prompt that cannot be
answered becomes a line with an error, and is tried again the next time.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any, TextIO, get_args

from gemma_edge.cli.answering_model import answering_model
from gemma_edge.cli.bundle_options import (
    add_attachments,
    add_loading,
    add_prefix_cache,
    add_words,
    take_bundle,
)
from gemma_edge.cli.device_options import add_device, is_elsewhere, is_native
from gemma_edge.cli.exported_once import add_yes, ready_bundle
from gemma_edge.cli.run_batch import add_batch, run_batch_verb
from gemma_edge.cli.tool_files import add_forms, add_tools, form_options, tool_options
from gemma_edge.runtime.answers import Completion, Stream
from gemma_edge.runtime.console import for_stdout, tell, without_controls
from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.media.attachments import kind_of
from gemma_edge.runtime.prompt.truncation import Side
from gemma_edge.runtime.usage import Usage

STDIN = "-"
WHERE_THE_BUNDLE_IS = "--batch runs where the bundle is: log in there, and leave --device out"
# Options of `Model.generate` that the verbs take, with their types and help.
OPTIONS: dict[str, tuple[type, str]] = {
    "temperature": (float, "sampling temperature; 0 always takes the likeliest token"),
    "top_k": (int, "sample from the K likeliest tokens; 0 for all"),
    "top_p": (float, "sample from the likeliest tokens that together reach this probability"),
    "min_p": (float, "drop tokens whose probability is below this fraction of the likeliest token's"),
    "repetition_penalty": (float, "values above 1 make tokens that already occurred less likely"),
    "seed": (int, "seed of the sampling; the same seed gives the same answer"),
    "max_tokens": (int, "most tokens of the answer (default: the room left in the context)"),
    "logprobs": (int, "with --json: report each token's log-probability, and N of the likeliest, 0 to 20"),
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    add_words(parser, "[PROMPT] [-]", "then the prompt; - reads stdin")
    add_options(parser)
    add_tools(
        parser, "print the calls of these tools as JSON: a .json file of schemas, or a .py file of functions"
    )
    add_forms(parser)
    parser.add_argument("--raw", action="store_true", help="complete the prompt without the chat template")
    parser.add_argument(
        "--truncate",
        choices=get_args(Side),
        help="leave out this part of a prompt that is too long (default: that is an error)",
    )
    parser.add_argument(
        "--show-prompt", action="store_true", help="print the prompt as the model gets it, on stderr"
    )
    add_batch(parser)
    add_yes(parser)
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    """The verb. Raises what `Model.load` and `Model.generate` raise, or `answer_there`."""
    if is_elsewhere(args):
        return _run_there(args)
    bundle, words = take_bundle(args)
    options = {**generate_options(args), **tool_options(args), **form_options(args)}
    options |= {"raw": args.raw, "truncate": args.truncate}
    if args.batch is not None:
        if is_native(args):
            raise UsageError(WHERE_THE_BUNDLE_IS)
        return run_batch_verb(args, ready_bundle(bundle, args.yes), words, options)
    if args.output is not None:
        raise UsageError("-o is the file of a batch's answers: it goes with --batch")
    prompt = _prompt(args, words)
    with answering_model(args, bundle, options, defer=bool(args.attach)) as model:
        stream = model.generate(prompt, stream=True, system=args.system, attach=args.attach, **options)
        if args.show_prompt and stream.prompt is not None:
            tell(without_controls(stream.prompt.text))
        print_answer(stream, as_json=args.json, usage=args.usage)
    return 0


def _prompt(args: argparse.Namespace, words: list[str]) -> str:
    """The prompt, from the command line and stdin; the kinds of the attachments are checked.

    Raises:
        UsageError, FileError: there is none, there are several, or an attachment is no such file.
    """
    told = [word for word in words if word != STDIN]
    if len(told) > 1 or len(words) > len(told) + 1:
        raise UsageError(f"expected one prompt, got {len(words)}: put it in quotes")
    # With a prompt, stdin is somebody else's: a loop's that calls this, or a pipe that stays open.
    piped = piped_text(sys.stdin, typed=STDIN in words) if STDIN in words or not told else None
    # A question may be spoken.
    prompt = "" if args.attach and not words and not piped else join_prompt("".join(told), piped)
    for file in args.attach:
        kind_of(file)  # before anything is loaded
    return prompt


def _run_there(args: argparse.Namespace) -> int:
    from gemma_edge.cli.device_answers import answer_there, local_bundle  # a board needs none of it

    if args.batch is not None or args.output is not None:
        raise UsageError(WHERE_THE_BUNDLE_IS)
    bundle, words = local_bundle(args)
    prompt = _prompt(args, words)
    stdin = prompt.encode("utf-8", "surrogateescape") if prompt else None
    return answer_there(args, "run", configure, [STDIN] if prompt else [], bundle=bundle, stdin=stdin)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that `run` and `chat` share."""
    parser.add_argument("-s", "--system", metavar="TEXT", help="a system message")
    for name, (kind, text) in OPTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N", help=text)
    parser.add_argument(
        "--stop", action="append", metavar="TEXT", help="end the answer before this text; repeatable"
    )
    parser.add_argument(
        "--logit-bias",
        action="append",
        metavar="TOKEN=N",
        help="add -100 to 100 to the logit of a token, a text or id:NUMBER; repeatable",
    )
    parser.add_argument(
        "--speculate",
        action="store_true",
        help="verify guesses from the prompt and the answer several at once: quicker where text is repeated",
    )
    parser.add_argument("-u", "--usage", action="store_true", help="report tokens and speed on stderr")
    parser.add_argument("--json", action="store_true", help="print each answer as one JSON object")
    add_attachments(parser)
    add_loading(parser)
    add_prefix_cache(parser)


def generate_options(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `Model.generate` from those of `add_options`.

    Raises:
        UsageError: an option is malformed.
    """
    if args.logprobs is not None and not (args.json or getattr(args, "batch", None)):
        raise UsageError("--logprobs reports within --json: give both")
    return {
        **{name: getattr(args, name) for name in OPTIONS},
        "stop": args.stop,
        **({"speculate": True} if args.speculate else {}),
        "logit_bias": dict(map(_bias, args.logit_bias or ())),
    }


def _bias(text: str) -> tuple[str, float]:
    token, _, number = text.rpartition("=")
    try:
        return token, float(number)
    except ValueError:
        raise UsageError(f"--logit-bias must be TOKEN=N, such as yes=5, not {text!r}") from None


def piped_text(stdin: TextIO | None, *, typed: bool = False) -> str | None:
    """The text of stdin; None if it is only white space, or at a terminal unless it may be `typed`."""
    if stdin is None or stdin.closed or (stdin.isatty() and not typed):
        return None
    text = read_utf8(stdin.read)
    return text if text.strip() else None


def read_utf8(read: Any) -> str:
    """`read()`, its bytes refused as a user's error when they are not text."""
    try:
        return str(read())
    except UnicodeDecodeError as error:
        raise UsageError(
            f"stdin is not {error.encoding} text: {error.reason} at byte {error.start}"
        ) from None


def join_prompt(prompt: str | None, piped: str | None) -> str:
    """The prompt, then what was piped, with an empty line between them.

    Raises:
        UsageError: there is neither.
    """
    parts = [part for part in (prompt, piped) if part]
    if not parts:
        raise UsageError("no prompt: pass it as an argument, or pipe it into stdin")
    return "\n\n".join(parts)


def print_answer(stream: Stream, *, as_json: bool = False, usage: bool = False) -> Completion:
    """Prints an answer on stdout as it comes, or as JSON when complete; its usage, if wanted, on stderr.

    A terminal gets no control characters but newlines and tabs, so that no answer moves its cursor or sets
    its title. A pipe gets every character.
    """
    for piece in stream:
        if not as_json:
            print(for_stdout(piece), end="", flush=True)
    completion = stream.completion
    if as_json:
        print(json.dumps(completion.to_dict(), ensure_ascii=False), flush=True)
    else:
        if not completion.text.endswith("\n") and (completion.text or not completion.tool_calls):
            print(flush=True)
        for call in completion.tool_calls:
            print(for_stdout(json.dumps(call.to_dict(), ensure_ascii=False)), flush=True)
    if usage:
        print(usage_line(completion.usage, completion.finish_reason), file=sys.stderr)
    return completion


def drafts_line(usage: Usage) -> str:
    """For people: "43 of 46 drafted tokens accepted, 1.56x"."""
    return f"{usage.accepted_tokens} of {usage.drafted_tokens} drafted tokens accepted, {usage.speedup:.2f}x"


def usage_line(usage: Usage, finish_reason: str) -> str:
    """For people: "prompt 12 tokens (8 cached), 85.0 tok/s; first token 0.31 s; answer 20 tokens; stop".

    With attachments, "524 soft tokens encoded in 9.3 s" comes first.
    """

    def rate(value: float | None) -> str:
        return "" if value is None else f", {value:.1f} tok/s"

    first = usage.time_to_first_token_s
    where = {"memory": ", in memory", "disk": ", on disk"}.get(usage.restored_from or "", "")
    encoded, form = usage.encode_s, usage.mask_s_per_token
    return "; ".join(
        [
            *([] if encoded is None else [f"{usage.soft_tokens} soft tokens encoded in {encoded:.1f} s"]),
            f"prompt {usage.prompt_tokens} tokens ({usage.cached_tokens} cached{where})"
            + rate(usage.prefill_tokens_per_s),
            *([] if first is None else [f"first token {first:.2f} s"]),
            f"answer {usage.completion_tokens} tokens{rate(usage.decode_tokens_per_s)}",
            *([] if usage.speedup is None else [drafts_line(usage)]),
            *([] if form is None else [f"form {form * 1e3:.2f} ms a token"]),
            finish_reason,
        ]
    )
