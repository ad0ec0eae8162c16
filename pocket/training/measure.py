"""What a checkpoint's nested FFNs answer, and how well they know prose: a line a width, as markdown.

    python pocket/training/measure.py pocket/checkpoint RUN/cache --each 100

Questions are held out, of the seed of `held_out.py`; RUN/cache keeps recordings, which need espeak-ng. Prose
is pocket/questions/prose.txt, in pieces as `gemma-edge eval --text` takes them.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import sentencepiece
import torch
from curve import group_tasks
from held_out import SEED
from layout import FFN_WIDTHS
from lessons import lesson_tests
from model import decoder
from nested import Widths
from torch.nn import functional
from train import exact_match
from transformers import Gemma3nForConditionalGeneration

from gemma_edge.benchmarks.measure.recipe_quality import text_pieces
from gemma_edge.runtime.prompt.tokenizer import Tokenizer

PROSE = Path(__file__).parents[1] / "questions" / "prose.txt"


def load(checkpoint: Path) -> tuple[Any, Tokenizer]:
    """The model in fp32, and the tokenizer."""
    model: Any = Gemma3nForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    return model.eval(), Tokenizer(checkpoint / "tokenizer.model")


@torch.no_grad()
def prose_nats(model: Any, tokenizer: Tokenizer, text: str) -> tuple[float, float]:
    """Nats a token, and nats a byte, over the pieces of a text."""
    total = tokens = size = 0.0
    for ids in text_pieces(tokenizer, text):
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
        total += float(functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum"))
        tokens += len(ids) - 1
        size += len(tokenizer.decode(ids[1:]).encode())
    return total / tokens, total / size


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--each", type=int, default=100, help="questions of every task")
    parser.add_argument("--prose", action="store_true", help="prose alone, of a checkpoint of any size")
    args = parser.parse_args()
    model, tokenizer = load(args.checkpoint)
    text = PROSE.read_text(encoding="utf-8")
    if args.prose:
        token, byte = prose_nats(model, tokenizer, text)
        print(f"perplexity {math.exp(token):.2f} a token, {byte / math.log(2):.3f} bits a byte")
        return
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(args.checkpoint / "tokenizer.model"))
    tests = lesson_tests(model, pieces, args.cache, args.each, SEED)
    groups, widths = group_tasks(tests), Widths(model)
    print(f"| width of the FFNs | {' | '.join(groups)} | prose: perplexity a token | bits a byte |")
    print("|---" * (len(groups) + 3) + "|")
    for width in reversed(FFN_WIDTHS):
        widths.fix(width)
        run = decoder(model, False)
        right = {t: exact_match(model, run, test.batch, soft) for t, (test, soft) in tests.items()}
        print(width, {task: round(share, 3) for task, share in right.items()}, file=sys.stderr)
        cells = []
        for tasks in groups.values():
            counts = [len(tests[task][0].examples) for task in tasks]
            share = sum(n * right[task] for n, task in zip(counts, tasks, strict=True)) / sum(counts)
            cells.append(f"{share:.1%}")
        token, byte = prose_nats(model, tokenizer, text)
        cells += [f"{math.exp(token):.2f}", f"{byte / math.log(2):.3f}"]
        print(f"| {width} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
