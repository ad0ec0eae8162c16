"""Nested FFNs, as MatFormer has them: the first columns of each FFN are an FFN too."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from statistics import NormalDist
from types import MethodType
from typing import Any

import sentencepiece
import torch
from layout import AUDIO_IDS, FFN, FFN_WIDTHS, IMAGE_IDS
from torch import Tensor
from torch.nn import functional


class Widths:
    """Makes every FFN of a model use as many columns as are drawn for each row of a batch."""

    def __init__(self, model: Any) -> None:
        self.mlps = [layer.mlp for layer in model.model.language_model.layers]
        self.masks: dict[int, Tensor] = {}
        for mlp in self.mlps:
            sparsity = mlp.activation_sparsity
            mlp.deviations = NormalDist().inv_cdf(sparsity) if sparsity > 0 else 0.0
            mlp.forward = MethodType(_forward, mlp)
        self.fix(FFN)

    def draw(self, random: Random, rows: int, full: float) -> None:
        """A width for each row: all columns with probability `full`, else one of the others."""
        mask = self.masks.setdefault(rows, torch.ones(rows, 1, FFN))
        for row in mask:
            width = FFN if random.random() < full else random.choice(FFN_WIDTHS[:-1])
            row[0, :width], row[0, width:] = 1.0, 0.0
        self._use(mask)

    def fix(self, width: int) -> None:
        """One width for all rows."""
        self._use((torch.arange(FFN) < width).float()[None, None])

    def _use(self, mask: Tensor) -> None:
        for mlp in self.mlps:
            mlp.column_mask = mask


def _forward(self: Any, hidden: Tensor) -> Tensor:
    """`Gemma3nTextMLP.forward` of the columns in `column_mask`: statistics of sparsity are of these alone."""
    mask, gate = self.column_mask, self.gate_proj(hidden)
    if self.activation_sparsity > 0:
        count = mask.sum(-1, keepdim=True)
        mean = (gate * mask).sum(-1, keepdim=True) / count
        spread = (((gate - mean).square() * mask).sum(-1, keepdim=True) / count).sqrt()
        gate = functional.relu(gate - (mean + spread * self.deviations))
    out: Tensor = self.down_proj(self.act_fn(gate) * self.up_proj(hidden) * mask)
    return out


def grown(
    weights: Mapping[str, Tensor],
    old: sentencepiece.SentencePieceProcessor,
    new: sentencepiece.SentencePieceProcessor,
    ffn: int,
) -> dict[str, Tensor]:
    """A checkpoint's weights for a larger tokenizer and wider FFNs, in fp32.

    A new piece begins as the mean of the old pieces that spell it; columns of an FFN are put in the order of
    their weights' size, and new ones behind them add nothing yet.
    """
    out = {name: weight.float() for name, weight in weights.items()}
    spelled = [_spelling(new.id_to_piece(i), new, i, old) for i in range(new.get_piece_size())]
    for name, weight in out.items():
        if name.endswith("embed_tokens_per_layer.weight"):
            out[name] = torch.stack([weight[ids].mean(0) for ids in spelled])
        elif name.endswith("language_model.embed_tokens.weight"):
            soft = [[old.get_piece_size() + i] for i in range(IMAGE_IDS + AUDIO_IDS)]
            out[name] = torch.stack([weight[ids].mean(0) for ids in [*spelled, *soft]])
    for prefix in {name.rpartition("mlp.")[0] + "mlp." for name in out if ".mlp." in name}:
        if f"{prefix}gate_proj.weight" in out and ".language_model." in prefix:
            _widen(out, prefix, ffn)
    return out


def _spelling(
    piece: str,
    new: sentencepiece.SentencePieceProcessor,
    number: int,
    old: sentencepiece.SentencePieceProcessor,
) -> list[int]:
    """Old ids of a piece, or of what spells it."""
    if (found := old.piece_to_id(piece)) != old.unk_id() or number == new.unk_id():
        return [found]
    return old.encode(piece.replace("▁", " "))  # type: ignore[no-any-return]


def _widen(weights: dict[str, Tensor], prefix: str, ffn: int) -> None:
    gate, up, down = (weights[f"{prefix}{name}_proj.weight"] for name in ("gate", "up", "down"))
    order = (gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)).argsort(descending=True)
    gate, up, down = gate[order], up[order], down[:, order]
    more = ffn - len(gate)
    random = torch.Generator().manual_seed(len(prefix) + int(sum(map(ord, prefix))))
    for name, weight in (("gate", gate), ("up", up)):
        rows = torch.randn(more, weight.shape[1], generator=random) * float(weight.square().mean().sqrt())
        weights[f"{prefix}{name}_proj.weight"] = torch.cat([weight, rows])
    weights[f"{prefix}down_proj.weight"] = torch.cat([down, torch.zeros(len(down), more)], dim=1)
