"""Reads and checks a checkpoint's tokenizer and template files, before any weight."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_edge.export.checkpoint.checkpoint import Checkpoint
from gemma_edge.export.checkpoint.tokenizer_files import TokenizerFiles, tokenizer_files
from gemma_edge.export.model.tower import Tower
from gemma_edge.runtime.artifacts.modalities import Kind
from gemma_edge.runtime.errors import BundleError, CheckpointError, TokenizerError
from gemma_edge.runtime.files.abandoned import temporary_folder
from gemma_edge.runtime.files.text_files import read_text
from gemma_edge.runtime.generation_config import read_generation_config
from gemma_edge.runtime.prompt.chat_template import ChatTemplate
from gemma_edge.runtime.prompt.tokenizer import Tokenizer
from gemma_edge.runtime.sampling import Sampling

SAMPLES = "samples/questions.jsonl"  # questions that the model answers well, as `gemma-edge eval` takes them
LONGEST_EXAMPLE = 200
LICENSE = re.compile(r"^license:\s*[\"']?([\w.+-]+)[\"']?\s*$", re.MULTILINE)  # in a card's metadata
MAX_CARD_BYTES = 1 << 20


@dataclass(frozen=True)
class SideFiles:
    """What a checkpoint says of text, prompts and sampling.

    generation: generation_config.json, or {}.
    sampling, stop_ids: what that file and config.json say of sampling and of the ids that end an answer.
    tokenizer: the tokenizer, loaded as the runtime loads it.
    """

    tokenizer_files: TokenizerFiles
    chat_template: str | None
    generation: dict[str, Any]
    sampling: Sampling
    stop_ids: tuple[int, ...]
    tokenizer: Tokenizer


def read_side_files(checkpoint: Checkpoint) -> SideFiles:
    """Reads and checks the side files of a checkpoint; reads no weight.

    Raises:
        TokenizerError: the tokenizer is missing, malformed, or lacks a token of an encoder.
        CheckpointError: the chat template or generation_config.json is malformed.
    """
    files = tokenizer_files(checkpoint)
    template = checkpoint.chat_template()
    sampling, stop_ids = Sampling(), checkpoint.config.eos_token_ids
    try:
        ChatTemplate(template, _template_file(checkpoint)).check()
        if path := checkpoint.files().get("generation_config.json"):
            sampling, stop_ids = read_generation_config(path, stop_ids)
    except BundleError as error:
        raise CheckpointError(error.path, error.field, error.expected, error.got, error.remedy) from None
    tokenizer = _load(files, checkpoint.path / files.source, checkpoint.config.vocab_size)
    _check_towers(tokenizer, checkpoint.path / files.source, checkpoint.towers)
    return SideFiles(files, template, checkpoint.generation_config(), sampling, stop_ids, tokenizer)


def example_prompt(checkpoint: Path) -> str | None:
    """The first question of a text alone in `SAMPLES`; None if there is no such file, or no such question."""
    try:
        lines = read_text(checkpoint / SAMPLES, CheckpointError).splitlines()
        turns = [message["content"] for line in lines for message in json.loads(line)["messages"][:1]]
    except (CheckpointError, ValueError, TypeError, KeyError, RecursionError):
        return None
    shown = [text for text in turns if isinstance(text, str) and text.isprintable()]
    return next((text for text in shown if 0 < len(text) <= LONGEST_EXAMPLE), None)


def stated_license(folder: Path) -> str | None:
    """The licence that the model card of a checkpoint states; None without a card, or if it states none."""
    try:
        card = read_text(folder / "README.md", CheckpointError, limit=MAX_CARD_BYTES)
    except CheckpointError:
        return None
    head = card.split("---")[1] if card.startswith("---") else ""
    found = LICENSE.search(head)
    return found[1] if found else None


def _template_file(checkpoint: Checkpoint) -> Path:
    """The file that an error in the chat template names."""
    names = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
    files = checkpoint.files()
    return next((files[name] for name in names if name in files), checkpoint.path)


def _load(files: TokenizerFiles, source: Path, vocab_size: int) -> Tokenizer:
    with temporary_folder() as folder:
        path = folder / "tokenizer.model"
        path.write_bytes(files.model)
        try:
            return Tokenizer(path, files.added_tokens, vocab_size)
        except TokenizerError as error:
            remedy = "Take the tokenizer of the original checkpoint."
            raise TokenizerError(source, error.field, error.expected, error.got, remedy) from None


def _check_towers(tokenizer: Tokenizer, source: Path, towers: Mapping[Kind, Tower]) -> None:
    """Every token around and in the place of an image or a clip must have a text of its own."""
    for kind, tower in towers.items():
        for name in ("begin_id", "soft_id", "end_id"):
            token = getattr(tower, name)
            text = tokenizer.token_text(token)
            if not text or tokenizer.encode(text, bos=False) != [token]:
                raise TokenizerError(
                    source,
                    f"{kind} token {token}",
                    f"a text that is encoded to {token}",
                    repr(text),
                    "Add tokenizer_config.json of the original checkpoint, or export without this modality.",
                )
