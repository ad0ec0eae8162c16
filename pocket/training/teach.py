"""Teaches a published Pocket more: the decoder learns every task and prose, the encoders stay as they are.

    python pocket/training/teach.py RUN --from pocket/checkpoint --minutes 75

Begins with the checkpoint's weights, more pieces in the tokenizer and wider FFNs, or goes on where RUN
stopped. The learning rate falls to 0 in the last part of the minutes, which count over all sittings; then
RUN/checkpoint is written.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads starve others on a busy machine

import argparse
import json
import re
import signal
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import sentencepiece
import torch
from batches import pack
from export_checkpoint import write_checkpoint
from extended_tokenizer import extended
from layout import FFN, FFN_WIDTHS, PIECES, write_side_files
from lessons import Lessons, Prose, lesson_tests
from model import answer_logits, answer_loss, decoder
from muon import Optimizers
from nested import Widths, grown
from prose import chapters
from safetensors.torch import load_file
from tool_tasks import TOOL_TASKS, rendered, tool_talk
from torch.nn import functional
from train import exact_match
from transformers import AutoConfig, Gemma3nForConditionalGeneration
from weight_noise import noisy, rounded

RATE, WARMUP, DECAY = 2e-3, 100, 0.5  # DECAY: the part of the time in which the rate falls to 0
EXAMINE_SECONDS, SAVE_SECONDS, TEST_EXAMPLES = 420, 120, 40
PROSE_ROWS = 48
MERGES_OF_TOOLS = 130
FULL = 0.55  # how often a row has FFNs of the full width
NOISY = 0.5  # how many steps are made with weights as far off as 4 bits put them


class Teaching:
    """The state of a run."""

    def __init__(self, folder: Path, base: Path | None, minutes: float) -> None:
        self.folder, self.state, self.minutes = folder, folder / "state.pt", minutes
        self.chapters = chapters(folder / "cache")
        side = folder / "side"
        if not (side / "tokenizer.model").exists():
            if base is None:
                raise SystemExit(f"{folder} holds no run: name a checkpoint with --from")
            write_side_files(side, self.new_tokenizer(base))
        model_file = (side / "tokenizer.model").read_bytes()
        self.tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model_file)
        write_side_files(side, model_file)
        self.model: Any = Gemma3nForConditionalGeneration(AutoConfig.from_pretrained(side))
        self.steps, self.seconds = 0, 0.0
        if self.state.exists():
            state = torch.load(self.state, weights_only=True)
            self.model.load_state_dict(state["model"], strict=False)
        else:
            assert base is not None
            old = sentencepiece.SentencePieceProcessor(model_file=str(base / "tokenizer.model"))
            weights = load_file(base / "model.safetensors")
            self.model.load_state_dict(grown(weights, old, self.tokenizer, FFN), strict=False)
        self.model.tie_weights()
        self.model.eval()  # no part has dropout, and the encoders keep their statistics
        for name, weight in self.model.named_parameters():
            weight.requires_grad_(".language_model." in name)
        named = [
            (n, w) for n, w in self.model.named_parameters() if w.requires_grad and n != "lm_head.weight"
        ]
        self.rounded = rounded(named)
        self.optimizers = Optimizers(named, RATE)
        if self.state.exists():
            for optimizer, values in zip(self.optimizers.both, state["optimizers"], strict=True):
                optimizer.load_state_dict(values)
            self.steps, self.seconds = state["steps"], state["seconds"]
        self.tests = lesson_tests(self.model, self.tokenizer, folder / "cache", TEST_EXAMPLES)
        unseen = Prose([chapter for chapter in self.chapters if chapter.held_out], self.tokenizer)
        rows = list(unseen.rows())
        self.prose = pack(rows[:: len(rows) // PROSE_ROWS][:PROSE_ROWS], PROSE_ROWS)
        seed = f"lessons {self.steps}"
        self.lessons = Lessons(self.model, self.tokenizer, self.chapters, folder / "cache", seed)
        self.widths = Widths(self.model)
        self.random = Random(seed)
        torch.manual_seed(self.steps)
        self.stop = False

    def new_tokenizer(self, base: Path) -> bytes:
        """The checkpoint's, with merges of what tools are described in, and of prose."""
        random = Random("tokenizer")
        tools = [
            re.sub("<[a-z_]+>", "", rendered(tool_talk(random, False, random.choice(TOOL_TASKS), i % 6 == 0)))
            for i in range(3000)
        ]
        novels = [chapter.text for chapter in self.chapters if not chapter.held_out]
        old = (base / "tokenizer.model").read_bytes()
        count = PIECES - sentencepiece.SentencePieceProcessor(model_proto=old).get_piece_size()
        if not count:
            return old
        return extended(old, [(tools, MERGES_OF_TOOLS), (novels, count - MERGES_OF_TOOLS)])

    def save(self) -> None:
        temporary = self.state.with_suffix(".partial")
        torch.save(
            {
                "model": {k: v for k, v in self.model.state_dict().items() if k != "lm_head.weight"},
                "optimizers": [o.state_dict() for o in self.optimizers.both],
                "steps": self.steps,
                "seconds": self.seconds,
            },
            temporary,
        )
        temporary.replace(self.state)

    def log(self, **values: Any) -> None:
        with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"time": round(time.time()), "step": self.steps, **values}) + "\n")

    def factor(self, seconds: float) -> float:
        """Of the learning rate."""
        left = 1 - seconds / (60 * self.minutes)
        return max(0.0, min(1.0, (self.steps + 1) / WARMUP, left / DECAY))

    def train(self) -> None:
        """Until the minutes are over."""
        run = decoder(self.model, compiled=True)
        before, began = self.seconds, time.monotonic()
        saved = shown = began
        examined = began - EXAMINE_SECONDS if not self.steps else began
        while not self.stop and self.seconds < 60 * self.minutes:
            batch, soft = self.lessons.next()
            count = len(batch.ids)
            self.widths.draw(self.random, count, FULL)
            with noisy(self.rounded if self.random.random() < NOISY else ()):
                loss, right = answer_loss(self.model, run, batch, soft)
                loss.backward()
            self.optimizers.step(self.factor(self.seconds))
            self.steps += 1
            now = time.monotonic()
            self.seconds = before + now - began
            if self.steps % 10 == 0:
                self.log(part="decoder", kind="lesson", loss=round(loss.item(), 4), right=round(right, 4))
            if now - shown > 30:
                shown = now
                print(
                    f"step {self.steps}  {self.seconds / 60:.1f} min  loss {loss.item():.3f}"
                    f"  right {right:.3f}  rate x{self.factor(self.seconds):.2f}",
                    file=sys.stderr,
                    flush=True,
                )
            if now - examined > EXAMINE_SECONDS:
                self.examine()
                examined = time.monotonic()
            if now - saved > SAVE_SECONDS:
                saved = now
                self.save()
        self.save()
        self.examine()
        write_checkpoint(self.model, self.folder / "side", self.folder / "checkpoint")
        print(f"written: {self.folder / 'checkpoint'}", file=sys.stderr)

    @torch.no_grad()
    def examine(self) -> None:
        """Exact match by task, and the prose's nats a token by width; what goes badly comes more often."""
        self.widths.fix(FFN)
        run = decoder(self.model, compiled=False)
        right = {
            task: exact_match(self.model, run, test.batch, soft) for task, (test, soft) in self.tests.items()
        }
        for task in self.lessons.weights.keys() & right.keys():
            self.lessons.weights[task] = self.lessons.base[task] * (0.25 + 2 * (1 - right[task]))
        nats = {}
        for width in FFN_WIDTHS:
            self.widths.fix(width)
            nats[f"prose {width}"] = self.prose_nats(run)
        self.log(part="test", **{task: round(value, 4) for task, value in (right | nats).items()})
        shown = "  ".join(f"{task} {value:.3f}" for task, value in (right | nats).items())
        print(f"held out, step {self.steps}: {shown}", file=sys.stderr, flush=True)

    def prose_nats(self, run: Any) -> float:
        logits, labels = answer_logits(self.model, run, self.prose, None)
        return float(functional.cross_entropy(logits, labels))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of the run, made if it is not there")
    parser.add_argument("--from", dest="base", type=Path, help="the checkpoint to begin with")
    parser.add_argument("--minutes", type=float, default=75, help="of the whole run")
    parser.add_argument("--threads", type=int, default=2, help="1 is faster where other programs compute")
    parser.add_argument("--pid", type=Path, help="write the process id here")
    args = parser.parse_args()
    if args.pid:
        args.pid.write_text(f"{os.getpid()}\n")
    (args.run / "cache").mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    teaching = Teaching(args.run, args.base, args.minutes)

    def stop(*_: object) -> None:
        teaching.stop = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    teaching.train()


if __name__ == "__main__":
    main()
