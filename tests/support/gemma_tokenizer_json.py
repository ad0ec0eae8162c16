"""A tokenizer.json in Gemma's form, made by the library `tokenizers`."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gemma_edge.export.checkpoint.sentencepiece_model import BYTE_PIECES

tokenizers = pytest.importorskip("tokenizers")

TEXT = (
    "The gentle gardener gathered the golden grain and then the great green gate was gently opened. "
    "Banana bandana, the man ran; anna and nana and the canal. Été à la plage, où l'été était beau. "
    "1234 12 3412 34. aaa aaaa aa aaaaaaa. def f(x):  return x + 1"
)
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
USER = ["\n", "\n\n", "\n\n\n", "▁▁", "▁▁▁", "\t\t", "<b>", "</b>"]
SOFT = "<image_soft_token>"
Json = dict[str, Any]


def gemma_json() -> Json:
    """A tokenizer.json in Gemma's form, trained on TEXT."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Split("▁", "merged_with_next")
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=260, show_progress=False)
    trained.train_from_iterator([TEXT], trainer)
    pieces = sorted(trained.get_vocab(), key=trained.get_vocab().__getitem__)
    merged = [piece for piece in pieces if len(piece) > 1 and piece not in USER]
    singles = [piece for piece in pieces if len(piece) == 1]
    assert len(merged) > 100
    vocab = {text: i for i, text in enumerate([*SPECIAL, *USER, *BYTE_PIECES, *merged, *singles])}
    known = set(merged + singles)
    # Gemma's form: every split of a piece is a merge, better pieces first.
    merges = [
        (piece[:i], piece[i:])
        for piece in merged
        for i in range(1, len(piece))
        if piece[:i] in known and piece[i:] in known
    ]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(t, normalized=False, special=True) for t in [*SPECIAL, SOFT]]
    )
    tokenizer.add_tokens([tokenizers.AddedToken(t, normalized=True, special=False) for t in USER])
    data: Json = json.loads(tokenizer.to_str())
    return data
