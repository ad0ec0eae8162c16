"""A small tokenizer and a decoder that follows a rule, for tests of what is around a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sentencepiece import sentencepiece_model_pb2 as pb

from gemma_edge.runtime.model import Model
from gemma_edge.runtime.prompt.tokenizer import Tokenizer
from gemma_edge.runtime.sampling import Sampling

PAD, EOS, BOS, UNK = range(4)
CONTROL, USER_DEFINED, BYTE, UNKNOWN, NORMAL = 3, 4, 6, 2, 1
USER_PIECES = ("<start_of_turn>", "<end_of_turn>", "<table>", "\n\n")
START_OF_TURN, END_OF_TURN = 4, 5
LETTERS = "▁eationshrdlucmfwygpbvk\n.,<>_xzqj"
MERGES = ("th", "the", "▁the", "in", "he", "▁he")
IMAGE_SOFT_TOKEN = "<image_soft_token>"


def write_tokenizer(path: Path, *, add_dummy_prefix: bool = False) -> Path:
    """A SentencePiece BPE model with byte fallback and special pieces, in the manner of Gemma's."""
    model = pb.ModelProto()
    pieces = [("<pad>", CONTROL), ("<eos>", CONTROL), ("<bos>", CONTROL), ("<unk>", UNKNOWN)]
    pieces += [(piece, USER_DEFINED) for piece in USER_PIECES]
    pieces += [(f"<0x{byte:02X}>", BYTE) for byte in range(256)]
    pieces += [(piece, NORMAL) for piece in (*MERGES, *LETTERS)]
    for rank, (piece, kind) in enumerate(pieces):
        model.pieces.add(piece=piece, score=-float(rank), type=kind)
    model.trainer_spec.model_type = pb.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.pad_id, model.trainer_spec.eos_id = PAD, EOS
    model.trainer_spec.bos_id, model.trainer_spec.unk_id = BOS, UNK
    for name in ("pad", "eos", "bos", "unk"):
        setattr(model.trainer_spec, f"{name}_piece", f"<{name}>")
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = add_dummy_prefix
    model.normalizer_spec.remove_extra_whitespaces = False
    path.write_bytes(model.SerializeToString())
    return path


def tiny_tokenizer(folder: Path) -> Tokenizer:
    """315 ids: the pieces, one without a piece, <image_soft_token>, ten without a piece."""
    path = write_tokenizer(folder / "tokenizer.model")
    size = len(pb.ModelProto.FromString(path.read_bytes()).pieces)
    return Tokenizer(path, {IMAGE_SOFT_TOKEN: size + 1}, vocab_size=size + 12)


class IdTable:
    """Rows that are the ids themselves, so that the decoder can see what it is fed."""

    def lookup(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        return np.asarray(ids, np.float32).reshape(-1, 1)


Rule = Callable[[list[int]], int]


class RuleDecoder:
    """A decoder whose likeliest next token is a function of all the ids it was fed."""

    def __init__(self, rule: Rule, *, context: int = 512, chunk: int = 16, vocab_size: int = 315) -> None:
        self.rule, self.context, self.chunk, self.vocab_size = rule, context, chunk, vocab_size
        self.ids: list[int] = []
        self.calls: list[int] = []  # tokens of each forward call since the last `reset` or `calls.clear()`
        self.broken = False  # answer with NaN

    @property
    def position(self) -> int:
        return len(self.ids)

    def reset(self) -> None:
        self.ids.clear()

    def forward(
        self, embeddings: NDArray[np.float32], per_layer: NDArray[np.float32], n_logits: int = 1
    ) -> NDArray[np.float32]:
        assert embeddings.dtype == np.float32 and np.array_equal(embeddings, per_layer)
        assert 1 <= len(embeddings) <= self.chunk and n_logits in (0, 1)
        self.ids += [int(i) for i in embeddings[:, 0]]
        self.calls.append(len(embeddings))
        assert len(self.ids) <= self.context
        logits = np.zeros((n_logits, self.vocab_size), np.float32)
        logits[:, self.rule(self.ids)] = np.nan if self.broken else 10.0
        return logits


def hash_rule(ids: list[int]) -> int:
    """A token that depends on every id and its place, and is never an end token or a special one."""
    state = 7
    for i in ids:
        state = (state * 31 + i + 1) % 1_000_003
    return 264 + state % 35


def answers(*texts: str, tokenizer: Tokenizer) -> Rule:
    """Answers the n-th model turn of a conversation with the n-th text, then <end_of_turn>."""
    header = tokenizer.encode("<start_of_turn>model\n", bos=False)
    scripts = [[*tokenizer.encode(text, bos=False), END_OF_TURN] for text in texts]

    def rule(ids: list[int]) -> int:
        turns = [n for n in range(len(ids)) if ids[n : n + len(header)] == header]
        at = len(ids) - (turns[-1] + len(header)) if turns else 0
        script = scripts[(len(turns) - 1) % len(scripts)]
        return script[min(at, len(script) - 1)]

    return rule


def tiny_model(
    tokenizer: Tokenizer,
    rule: Rule,
    *,
    context: int = 512,
    chunk: int = 16,
    end_ids: Sequence[int] = (EOS, END_OF_TURN),
) -> Model:
    """A model that follows `rule` greedily."""
    decoder = RuleDecoder(rule, context=context, chunk=chunk)
    return Model(
        decoder, IdTable(), IdTable(), tokenizer, sampling=Sampling(temperature=0.0), end_ids=end_ids
    )
