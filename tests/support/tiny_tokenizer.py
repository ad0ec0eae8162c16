"""A SentencePiece tokenizer of 315 ids, in the manner of Gemma's."""

from __future__ import annotations

from pathlib import Path

from sentencepiece import sentencepiece_model_pb2 as pb

from gemma_edge.runtime.prompt.tokenizer import Tokenizer

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
