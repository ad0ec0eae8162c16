"""What is measured: llama-bench's parameters, and its flags for them."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from gemma_edge.runtime.errors import UsageError


@dataclass(frozen=True)
class KernelOptions:
    """llama-bench's parameters and defaults, but for the short tg64 and the context."""

    n_prompt: int = 512
    n_gen: int = 64
    reps: int = 5
    threads: int = 2
    context: int = 4096

    def check(self) -> None:
        """Raises UsageError for what cannot be measured."""
        if min(self.n_prompt, self.n_gen) < 0 or self.n_prompt + self.n_gen == 0:
            raise UsageError("-p and -n: expected numbers of tokens, at least one of them above 0")
        if min(self.reps, self.threads, self.context) < 1:
            raise UsageError("-r, -t and --context: expected at least 1")
        longest = max(self.n_prompt, self.n_gen)
        if longest > self.context:
            raise UsageError(f"{longest} tokens do not fit a context of {self.context}: raise --context")


def add_kernel_options(parser: argparse.ArgumentParser, defaults: KernelOptions) -> None:
    """The bundle and llama-bench's own flags."""
    parser.add_argument("bundle", type=Path, help="what `gemma-edge export` made")
    add_size_options(parser, defaults)


def add_size_options(parser: argparse.ArgumentParser, defaults: KernelOptions) -> None:
    """llama-bench's own flags."""
    for flags, default, text in (
        (("-p", "--n-prompt"), defaults.n_prompt, "tokens to prefill; 0 for no such test"),
        (("-n", "--n-gen"), defaults.n_gen, "tokens to decode; 0 for no such test"),
        (("-r", "--reps"), defaults.reps, "repetitions of each test"),
        (("-t", "--threads"), defaults.threads, "threads of both sides"),
        (("--context",), defaults.context, "capacity of the KV cache in tokens"),
    ):
        parser.add_argument(
            *flags, type=int, default=default, metavar="N", help=f"{text} (default: {default})"
        )


def kernel_options(args: argparse.Namespace) -> KernelOptions:
    return KernelOptions(args.n_prompt, args.n_gen, args.reps, args.threads, args.context)
