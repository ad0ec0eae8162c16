"""Trains Pocket, a small Gemma 3n, on the CPU; resumable at any time.

    python pocket/training/train.py RUN --minutes 60           # begin, or go on
    python pocket/training/train.py RUN --finish --steps 500   # a copy learns ever slower, and is written out

First the decoder learns the text tasks while, in a second thread, the encoders learn from helpers what is to
be seen and heard; then all learn together. RUN keeps state.pt, log.jsonl and the cache of clips. `--finish`
leaves state.pt as it is, so that training can go on from there, and writes RUN/checkpoint.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one each for the two threads of the first phase
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads starve each other on a busy machine

import argparse
import json
import math
import signal
import sys
import threading
import time
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import sentencepiece
import torch
from batches import IGNORED
from data import WEIGHTS, Data, held_out_sets
from export_checkpoint import write_checkpoint
from layout import train_tokenizer, write_side_files
from model import Helpers, answer_logits, answer_loss, decoder, hear, new_model, see
from muon import Optimizers
from pictures import QUESTIONS, image_example, scene
from prose import chapters
from speech import COMMANDS, TRANSCRIBE, TRANSLATE
from text_tasks import TEXT_TASKS
from tool_tasks import TOOL_TASKS, rendered, tool_talk
from torch import Tensor

SEED = 2026
LEARNING_RATES = {"text": 3e-3, "encoders": 2e-3}
WARMUP = 60
SEEN, HEARD = 32, 24  # images and clips of a step of the encoders alone
HELPER_SHARE = 0.3  # of the helpers' loss when all learn together
# What the helpers must get right before all learn together, and before the decoder hears.
GOOD_SEEN, GOOD_HEARD = 0.85, 0.6
SHARES = {"text": 0.45, "image": 0.42, "speech": 0.13}  # of steps, when all learn together
EXAMINE_STEPS, TEST_EXAMPLES = 150, 40
SAVE_SECONDS, SHOWN_SECONDS = 120, 30


def texts(seed: int, cache: Path, count: int = 2000) -> list[str]:
    """What the tokenizer is trained on: the text of every task, and prose."""
    random, found = Random(f"tokenizer {seed}"), ["user", "model", TRANSCRIBE, TRANSLATE, *COMMANDS] * 500
    makers = [lambda task=task: TEXT_TASKS[task](random, False) for task in TEXT_TASKS]
    makers += [lambda task=task: image_example(random, False, task) for task in QUESTIONS]
    for make in makers:
        for _ in range(count):
            example = make()
            found += [turn.text for turn in example.turns] + [example.answer]
    found += [rendered(tool_talk(random, False, random.choice(TOOL_TASKS))) for _ in range(count)]
    novels = [chapter.text for chapter in chapters(cache) if not chapter.held_out]
    return found + [paragraph for text in novels for paragraph in text.split("\n\n")]


class Training:
    """The state of a run, and its two phases."""

    def __init__(self, folder: Path, compiled: bool) -> None:
        self.folder, self.state = folder, folder / "state.pt"
        side = folder / "side"
        if not (side / "tokenizer.model").exists():
            write_side_files(side, train_tokenizer(texts(SEED, folder / "cache")))
        model_file = (side / "tokenizer.model").read_bytes()
        self.tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model_file)
        write_side_files(side, model_file)
        self.model = new_model(side, SEED)
        self.helpers = Helpers(self.model.config.text_config.hidden_size)
        named = [(name, weight) for name, weight in self.model.named_parameters() if name != "lm_head.weight"]
        text = [pair for pair in named if ".language_model." in pair[0]]
        encoders = [pair for pair in named if ".language_model." not in pair[0]]
        self.optimizers = {
            "text": Optimizers(text, LEARNING_RATES["text"]),
            "encoders": Optimizers([*encoders, *self.helpers.named_parameters()], LEARNING_RATES["encoders"]),
        }
        self.steps = {"text": 0, "encoders": 0}
        self.together = False
        self.good = {"see": 0.0, "hear": 0.0}  # running means of what the helpers get right
        self.stop = threading.Event()
        self.seconds = 0.0
        self.finish_from: int | None = None
        self.finish_steps = 1
        self.weights = dict(WEIGHTS)
        if self.state.exists():
            self.load()
        self.run = decoder(self.model, compiled)
        # Each sitting draws other examples than the last one.
        self.data = Data(self.tokenizer, folder / "cache", SEED)
        self.data.weights = self.weights
        for part, random in self.data.random.items():
            random.seed(f"{part} {SEED} {self.steps}")
        self.tests = held_out_sets(self.tokenizer, folder / "cache", TEST_EXAMPLES)

    # What is kept between sittings. -----------------------------------------------------------------

    def save(self) -> None:
        temporary = self.state.with_suffix(".partial")
        torch.save(
            {
                "model": {k: v for k, v in self.model.state_dict().items() if k != "lm_head.weight"},
                "helpers": self.helpers.state_dict(),
                "optimizers": {k: [o.state_dict() for o in v.both] for k, v in self.optimizers.items()},
                "steps": self.steps,
                "together": self.together,
                "good": self.good,
                "seconds": self.seconds,
                "weights": self.weights,
            },
            temporary,
        )
        temporary.replace(self.state)

    def load(self) -> None:
        state = torch.load(self.state, weights_only=True)
        self.model.load_state_dict(state["model"], strict=False)
        self.helpers.load_state_dict(state["helpers"])
        for part, saved in state["optimizers"].items():
            for optimizer, values in zip(self.optimizers[part].both, saved, strict=True):
                optimizer.load_state_dict(values)
        self.steps, self.together, self.good = state["steps"], state["together"], state["good"]
        self.seconds, self.weights = state["seconds"], WEIGHTS | state["weights"]

    def log(self, **values: Any) -> None:
        with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"time": round(time.time()), **values}) + "\n")

    # Steps. -----------------------------------------------------------------------------------------

    def factor(self, part: str) -> float:
        """Of the learning rate: it rises, stays, and falls to 0 in the last steps of all."""
        step = self.steps[part]
        factor = min(1.0, (step + 1) / WARMUP)
        if self.finish_from is not None:
            factor *= max(0.0, 1 - (self.steps["text"] - self.finish_from) / self.finish_steps)
        return factor

    def see_step(self) -> Tensor:
        scenes = [scene(self.data.random["see"], False) for _ in range(SEEN)]
        loss, right = self.helpers.image_loss(see(self.model, scenes), scenes)
        self.good["see"] = 0.95 * self.good["see"] + 0.05 * right
        return loss

    def hear_step(self) -> Tensor:
        examples = self.data.random["hear"].sample(self.data.spoken, HEARD)
        clips = [example.turns[0].media for example in examples]
        soft, lengths = hear(self.model, *self.data.heard(clips))
        loss, right = self.helpers.speech_loss(soft, lengths, [clip.said for clip in clips])
        self.good["hear"] = 0.95 * self.good["hear"] + 0.05 * right
        return loss

    def encoders_alone(self) -> None:
        """The second thread of the first phase."""
        torch.set_num_threads(1)
        while not self.stop.is_set():
            kind = "see" if self.steps["encoders"] % 2 else "hear"
            loss = self.see_step() if kind == "see" else self.hear_step()
            loss.backward()
            self.advance("encoders")
            if self.steps["encoders"] % 20 < 2:
                step = self.steps["encoders"]
                self.log(
                    part="encoders",
                    kind=kind,
                    step=step,
                    loss=round(loss.item(), 4),
                    right=round(self.good[kind], 4),
                )

    def text_step(self) -> tuple[Tensor, float]:
        return answer_loss(self.model, self.run, self.data.text(), None)

    def mixed_step(self, kind: str) -> tuple[Tensor, float]:
        """Of an image or a clip; the helpers' loss takes part."""
        if kind == "image":
            batch = self.data.image()
            soft = see(self.model, batch.media)
            helper, right = self.helpers.image_loss(soft, batch.media)
            self.good["see"] = 0.95 * self.good["see"] + 0.05 * right
        else:
            batch = self.data.speech()
            soft, lengths = hear(self.model, *self.data.heard(batch.media))
            helper, right = self.helpers.speech_loss(soft, lengths, [clip.said for clip in batch.media])
            self.good["hear"] = 0.95 * self.good["hear"] + 0.05 * right
        loss, share = answer_loss(self.model, self.run, batch, soft)
        return loss + HELPER_SHARE * helper, share

    def advance(self, part: str) -> None:
        """A step of one part down its gradients."""
        self.optimizers[part].step(self.factor(part))
        self.steps[part] += 1

    def step(self, kind: str) -> tuple[float, float]:
        """One step of the main thread, of a kind in SHARES or "hear"; its loss and share of right tokens."""
        if kind == "hear":
            loss, right = self.hear_step(), self.good["hear"]
        else:
            loss, right = self.text_step() if kind == "text" else self.mixed_step(kind)
        loss.backward()
        if kind != "hear":
            self.advance("text")
        if kind != "text":
            self.advance("encoders")
        return loss.item(), right

    def kind(self, chooser: Random) -> str:
        """What to learn next."""
        if not self.together:
            return "text"
        kind = chooser.choices(list(SHARES), list(SHARES.values()))[0]
        return "hear" if kind == "speech" and self.good["hear"] < GOOD_HEARD else kind

    def train(self, minutes: float, steps: int | None, finish: bool) -> None:
        """Both phases, until the time is over, or after `steps` steps of the decoder."""
        began, last_save, first = time.monotonic(), time.monotonic(), self.steps["text"]
        if finish:
            self.finish_from, self.finish_steps = first, steps or 1
        thread = None
        if not self.together:
            thread = threading.Thread(target=self.encoders_alone, daemon=True)
            thread.start()
        chooser = Random(f"kinds {SEED} {self.steps}")
        shown, examined = time.monotonic(), first
        while not self.stop.is_set():
            if thread and self.good["see"] > GOOD_SEEN:
                self.stop.set()
                thread.join()
                self.stop.clear()
                thread, self.together = None, True
                torch.set_num_threads(2)
                print("what is seen is known: all learn together", file=sys.stderr)
            kind = self.kind(chooser)
            loss, right = self.step(kind)
            step, now = self.steps["text"], time.monotonic()
            self.log(part="decoder", kind=kind, step=step, loss=round(loss, 4), right=round(right, 4))
            if now - shown > SHOWN_SECONDS:
                shown = now
                helpers = "  ".join(f"{name} {value:.3f}" for name, value in self.good.items())
                print(
                    f"step {step}  {kind}  loss {loss:.3f}  right {right:.3f}  helpers: {helpers}",
                    file=sys.stderr,
                    flush=True,
                )
            if step % EXAMINE_STEPS == 0 and step > examined:
                examined = step
                self.examine()
            over = now - began > 60 * minutes or (steps is not None and step - first >= steps)
            if over:
                self.stop.set()
            if (over or now - last_save > SAVE_SECONDS) and not finish:
                self.seconds += now - last_save
                last_save = now
                self.save()
        if thread:
            thread.join()
        if not finish:
            self.save()

    @torch.no_grad()
    def examine(self) -> dict[str, float]:
        """Exact match on the held-out sets, by task; what goes badly is asked more often."""
        self.model.eval()
        right = {}
        for task, test in self.tests.items():
            if test.batch.media and not self.together:
                continue
            soft = None
            if test.features is not None:
                soft = hear(self.model, *test.features)[0]
            elif test.batch.media:
                soft = see(self.model, test.batch.media)
            right[task] = exact_match(self.model, decoder(self.model, False), test.batch, soft)
        for task in self.weights.keys() & right.keys():
            self.weights[task] = WEIGHTS[task] * (0.15 + 1 - right[task])
        self.model.train()
        self.log(
            part="test", step=self.steps["text"], **{task: round(value, 4) for task, value in right.items()}
        )
        shown = "  ".join(f"{task} {value:.2f}" for task, value in right.items())
        print(f"held out, step {self.steps['text']}: {shown}", file=sys.stderr, flush=True)
        return right


def exact_match(model: Any, run: Any, batch: Any, soft: Tensor | None) -> float:
    """The share of conversations whose last answer is right in every token.

    Fed the right answer, each token is the likeliest one: the same as that greedy decoding gives the answer.
    """
    logits, labels = answer_logits(model, run, batch, soft)
    wrong = torch.zeros(batch.labels.shape, dtype=torch.bool)
    wrong[torch.from_numpy(batch.labels) != IGNORED] = logits.argmax(-1) != labels
    right = total = 0
    for row in range(len(batch.ids)):
        for number in range(1, int(batch.segments[row].max()) + 1):
            place = torch.from_numpy(batch.segments[row] == number)
            learned = torch.from_numpy(batch.labels[row] != IGNORED) & place
            ends = learned.nonzero().flatten().tolist()
            last = [
                end
                for i, end in enumerate(ends)
                if all(e2 - e1 == 1 for e1, e2 in zip(ends[i:], ends[i + 1 :], strict=False))
            ]
            right += not bool(wrong[row, last].any())
            total += 1
    return right / total


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of the run, made if it is not there")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many")
    parser.add_argument("--steps", type=int, help="stop after so many steps of the decoder")
    parser.add_argument(
        "--finish", action="store_true", help="with --steps: of a copy, which is written to RUN/checkpoint"
    )
    parser.add_argument(
        "--compile", action="store_true", help="compile the decoder: minutes at first, faster then"
    )
    parser.add_argument("--pid", type=Path, help="write the process id here")
    args = parser.parse_args()
    if args.pid:
        args.pid.write_text(f"{os.getpid()}\n")
    args.run.mkdir(parents=True, exist_ok=True)
    training = Training(args.run, args.compile)
    signal.signal(signal.SIGTERM, lambda *_: training.stop.set())
    signal.signal(signal.SIGINT, lambda *_: training.stop.set())
    if training.together:
        torch.set_num_threads(2)
    training.train(args.minutes, args.steps, args.finish)
    if args.finish:
        write_checkpoint(training.model, training.folder / "side", training.folder / "checkpoint")
        print(f"written: {training.folder / 'checkpoint'}", file=sys.stderr)


if __name__ == "__main__":
    main()
