"""Pocket's architecture, tokenizer and side files: the checkpoint without its weights.

Every mechanism of Gemma 3n at small widths. The layout is that of a published multimodal checkpoint, which
`transformers` loads as it is.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece

from gemma_edge.export.checkpoint.sentencepiece_model import (
    ASCII,
    BYTE_PIECES,
    SPACE,
    Piece,
    PieceKind,
    build_model,
)
from gemma_edge.export.synth.synth_towers import audio_json, preprocessor_json, vision_json
from gemma_edge.runtime.families.config_fields import FULL, SLIDING

Json = dict[str, Any]

PIECES = 1280  # of the tokenizer; ids from here up are soft tokens, which have no row in the PLE table
IMAGE_IDS, AUDIO_IDS = 4, 4
END_OF_IMAGE, IMAGE = PIECES, PIECES + 1
END_OF_AUDIO, AUDIO = PIECES + IMAGE_IDS, PIECES + IMAGE_IDS + 1
VOCABULARY = PIECES + IMAGE_IDS + AUDIO_IDS
END_OF_TURN, START_OF_IMAGE, START_OF_AUDIO = 106, PIECES - 2, PIECES - 1

IMAGE_SIZE, IMAGE_GRID = 64, 4
AUDIO_TOKENS, TOKEN_SECONDS = 16, 0.16
WINDOW = 64
FFN, FFN_WIDTHS = 384, (128, 192, 256, 384)  # a prefix of each of these widths is trained to work alone

TEXT: Json = {
    # Two sliding layers, then a global one; the last three read the caches of layers 4 and 5.
    "activation_sparsity_pattern": [0.9] * 3 + [0.0] * 6,
    "altup_active_idx": 0,
    "altup_coef_clip": 120.0,
    "altup_correct_scale": True,
    "altup_num_inputs": 4,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "final_logit_softcapping": 30.0,
    "head_dim": 32,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 128,
    "hidden_size_per_layer_input": 32,
    "initializer_range": 0.02,
    "intermediate_size": [FFN] * 9,
    "laurel_rank": 32,
    "layer_types": [SLIDING, SLIDING, FULL] * 3,
    "max_position_embeddings": 2048,
    "model_type": "gemma3n_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 9,
    "num_key_value_heads": 2,
    "num_kv_shared_layers": 3,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {
        FULL: {"rope_type": "default", "rope_theta": 10_000.0},
        SLIDING: {"rope_type": "default", "rope_theta": 1_000.0},
    },
    "sliding_window": WINDOW,
    "use_cache": True,
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": PIECES,
}
VISION = {"channel_multiplier": 0.02, "msfa_output_resolution": IMAGE_GRID}
AUDIO_TOWER: Json = {
    "conf_num_hidden_layers": 3,
    "conf_num_attention_heads": 4,
    "hidden_size": 96,
    "sscp_conv_channel_size": [24, 16],
}


def config_json() -> Json:
    """config.json, of Gemma3nForConditionalGeneration."""
    return {
        "architectures": ["Gemma3nForConditionalGeneration"],
        "model_type": "gemma3n",
        "dtype": "bfloat16",
        "eos_token_id": [1, END_OF_TURN],
        "initializer_range": 0.02,
        "boi_token_id": START_OF_IMAGE,
        "eoi_token_id": END_OF_IMAGE,
        "image_token_id": IMAGE,
        "boa_token_id": START_OF_AUDIO,
        "eoa_token_id": END_OF_AUDIO,
        "audio_token_id": AUDIO,
        "audio_soft_tokens_per_image": AUDIO_TOKENS,
        "vision_soft_tokens_per_image": IMAGE_GRID**2,
        "tie_word_embeddings": True,
        "text_config": TEXT,
        "vision_config": vision_json(True, END_OF_IMAGE, IMAGE_IDS) | {"model_args": VISION},
        "audio_config": audio_json(True, END_OF_AUDIO, AUDIO_IDS) | AUDIO_TOWER,
    }


def processor_json() -> Json:
    """preprocessor_config.json: pictures of 64 x 64 as 16 tokens; sound as published, 16 tokens at most."""
    return preprocessor_json(True) | {
        "audio_seq_length": AUDIO_TOKENS,
        "image_seq_length": IMAGE_GRID**2,
        "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    }


def special_tokens() -> dict[str, int]:
    """Text and id of the tokens that are never made of characters.

    Soft tokens that nothing uses have names too: `transformers` would give their ids to the next ones.
    """
    named = {
        **{name: index for index, name in enumerate(("<pad>", "<eos>", "<bos>", "<unk>", "<mask>"))},
        "<start_of_turn>": END_OF_TURN - 1,
        "<end_of_turn>": END_OF_TURN,
        "<start_of_image>": START_OF_IMAGE,
        "<start_of_audio>": START_OF_AUDIO,
        "<end_of_image>": END_OF_IMAGE,
        "<image_soft_token>": IMAGE,
        "<end_of_audio>": END_OF_AUDIO,
        "<audio_soft_token>": AUDIO,
    }
    unused = {f"<soft{index}>": index for index in range(PIECES, VOCABULARY) if index not in named.values()}
    return dict(sorted((named | unused).items(), key=lambda item: item[1]))


def tokenizer_json() -> Json:
    """tokenizer_config.json."""
    return {
        "tokenizer_class": "GemmaTokenizer",
        "processor_class": "Gemma3nProcessor",
        "add_bos_token": True,
        "add_eos_token": False,
        **{f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk", "mask")},
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
        "boa_token": "<start_of_audio>",
        "eoa_token": "<end_of_audio>",
        "audio_token": "<audio_soft_token>",
        "added_tokens_decoder": {
            str(index): {"content": text, "special": True} for text, index in special_tokens().items()
        },
    }


def train_tokenizer(texts: Iterable[str]) -> bytes:
    """A SentencePiece BPE model of Gemma's form, with merges learned from `texts`.

    Digits are pieces of their own; ids of special and unused pieces are Gemma's up to <end_of_turn>.
    """
    head = [
        Piece("<pad>", PieceKind.CONTROL),
        Piece("<eos>", PieceKind.CONTROL),
        Piece("<bos>", PieceKind.CONTROL),
    ]
    head += [Piece("<unk>", PieceKind.UNKNOWN), *_symbols("<mask>", "[multimodal]")]
    head += _symbols(*(f"<unused{i}>" for i in range(99)), "<start_of_turn>", "<end_of_turn>")
    head += _symbols("\n", "\n\n", "\n\n\n", SPACE * 2, SPACE * 4)
    head += [Piece(text, PieceKind.BYTE) for text in BYTE_PIECES]
    tail = _symbols("<start_of_image>", "<start_of_audio>")
    singles = [SPACE, *ASCII]
    room = PIECES - len(head) - len(singles) - len(tail)
    merges = [Piece(text, PieceKind.NORMAL, -float(rank)) for rank, text in enumerate(_merges(texts, room))]
    letters = [Piece(text, PieceKind.NORMAL, -float(room + rank)) for rank, text in enumerate(singles)]
    return build_model([*head, *merges, *letters, *tail])


def _symbols(*texts: str) -> list[Piece]:
    return [Piece(text, PieceKind.USER_DEFINED) for text in texts]


def _merges(texts: Iterable[str], count: int) -> list[str]:
    """The `count` first merges of byte-pair encoding, most frequent first."""
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=file,
        model_type="bpe",
        vocab_size=count + 140,  # letters come on top of the merges
        hard_vocab_limit=False,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_digits=True,
        num_threads=1,
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_proto=file.getvalue())
    pieces = [model.id_to_piece(i) for i in range(model.get_piece_size()) if not model.is_control(i)]
    merged = [piece for piece in pieces if len(piece) > 1 and not model.is_unknown(model.piece_to_id(piece))]
    if len(merged) < count:
        raise ValueError(f"the texts give {len(merged)} merges only, not {count}")
    return merged[:count]


def write_side_files(folder: Path, tokenizer_model: bytes) -> None:
    """Everything but the weights."""
    generation: Json = {
        "bos_token_id": 2,
        "do_sample": False,
        "eos_token_id": [1, END_OF_TURN],
        "pad_token_id": 0,
    }
    documents = {
        "config.json": config_json(),
        "tokenizer_config.json": tokenizer_json(),
        "preprocessor_config.json": processor_json(),
        "processor_config.json": {
            "processor_class": "Gemma3nProcessor",
            "audio_seq_length": AUDIO_TOKENS,
            "image_seq_length": IMAGE_GRID**2,
        },
        "generation_config.json": generation,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in documents.items():
        (folder / name).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    (folder / "tokenizer.model").write_bytes(tokenizer_model)
    shutil.copyfile(Path(__file__).with_name("chat_template.jinja"), folder / "chat_template.jinja")
