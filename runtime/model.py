"""`Model`: a bundle loaded, and text from it.

model = Model.load("out/")
print(model.generate("Why is the sky blue?").text)
for piece in model.generate("What is this?", attach=["photo.jpg"], stream=True):
    print(piece, end="")
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.available_memory import available_memory
from gemma_edge.runtime.engines.deferred_decoder import DeferredDecoder
from gemma_edge.runtime.errors import BundleError, UsageError
from gemma_edge.runtime.families.config_fields import MAX_SIZE
from gemma_edge.runtime.generate import Completion, Progress, StopStrings, Stream, Table, TokenGenerator
from gemma_edge.runtime.media.attachments import MODALITY, Attachment, Part, Reader
from gemma_edge.runtime.prompt.chat_template import ChatTemplate, Message, normalize_messages
from gemma_edge.runtime.prompt.prompt_builder import (
    Prompt,
    attached,
    build,
    expansion,
    open_messages,
    placeholder,
)
from gemma_edge.runtime.prompt.tokenizer import StreamDecoder, Tokenizer
from gemma_edge.runtime.sampling import Sampler, Sampling
from gemma_edge.runtime.text_files import read_json, read_text

if TYPE_CHECKING:
    from gemma_edge.runtime.engines.decoder import Decoder
    from gemma_edge.runtime.media.encoder_pool import Encoders

Question = str | Sequence[Message]

SPARE_BYTES = 64 << 20  # left free beside an encoder and the decoder: rows, and file pages of a step


class Model:
    """A decoder with its tables, tokenizer and chat template.

    It has one KV cache: one answer at a time. Conversations are cheap when each prompt continues the last
    one, since what the cache holds is not computed again.

    Args:
        decoder, embeddings, per_layer: see `TokenGenerator`.
        tokenizer: the checkpoint's.
        template: None for Gemma 3's.
        sampling: what `generate` falls back to.
        end_ids: ids that end an answer; default: the tokenizer's eos.
        reader, encoders: of attachments; None for a model that takes text alone.
        bundle: what the model was loaded from, if from one.
    """

    def __init__(
        self,
        decoder: Decoder,
        embeddings: Table,
        per_layer: Table,
        tokenizer: Tokenizer,
        *,
        template: ChatTemplate | None = None,
        sampling: Sampling | None = None,
        end_ids: Collection[int] | None = None,
        reader: Reader | None = None,
        encoders: Encoders | None = None,
        bundle: Bundle | None = None,
    ) -> None:
        self.decoder, self.embeddings, self.per_layer = decoder, embeddings, per_layer
        self.tokenizer = tokenizer
        self.template = template or ChatTemplate()
        self.sampling = sampling or Sampling()
        eos = tokenizer.eos_id
        self.end_ids = frozenset(end_ids if end_ids is not None else () if eos is None else (eos,))
        self.reader = reader or Reader({}, context=decoder.context)
        self.encoders, self.bundle = encoders, bundle
        self._generator = TokenGenerator(
            decoder,
            embeddings,
            per_layer,
            encode=None if encoders is None else encoders.encode,
            make_room=self._make_room,
            ready=self._load_decoder,
        )

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        threads: int | None = None,
        context: int | None = None,
        defer_decoder: bool = False,
        keep_encoders: bool = False,
        video_tokens: int | None = None,
        log: Callable[[str], None] = lambda text: None,
    ) -> Model:
        """Loads the bundle in folder `path`.

        Args:
            threads: worker threads; None for one a physical core.
            context: tokens of KV cache; None for what the bundle was planned for.
            defer_decoder: load the decoder with the first prompt, once the attachments of that are encoded
                and their encoders released: what both need does not add up. Later, it is released for the
                time that takes, if there is not enough memory for both.
            keep_encoders: leave encoders in memory once a prompt needed them.
            video_tokens: see `Reader`.
            log: is told which attachments were encoded, and what is left out of a video.

        Raises:
            BundleError, TokenizerError: the bundle is damaged.
            UsageError: `threads`, `context` or `video_tokens` is out of range.
        """
        from gemma_edge.runtime.artifacts.ple_table import PleTable
        from gemma_edge.runtime.artifacts.row_table import RowTable
        from gemma_edge.runtime.artifacts.token_rows import TokenRows
        from gemma_edge.runtime.engines.engine_registry import engine_of, load_decoder

        for name, value in (("threads", threads), ("context", context)):
            if value is not None and value < 1:
                raise UsageError(f"{name} must be 1 or more, not {value}")
        bundle = Bundle.open(path)
        manifest = bundle.path / "manifest.json"
        tables = bundle.member("tables", dict)
        for name in ("embedding", "per_layer"):
            layout = tables.get(name)
            if not isinstance(layout, dict) or not isinstance(layout.get("file"), str):
                raise BundleError(manifest, f"tables.{name}", "a layout that names its file", repr(layout))
        embedding, per_layer = tables["embedding"], tables["per_layer"]
        added = bundle.manifest.get("added_tokens", {})
        if not isinstance(added, dict) or not all(_is_token_id(i) for i in added.values()):
            raise BundleError(manifest, "added_tokens", "ids by text", repr(added)[:80])
        tokenizer = Tokenizer(bundle.file("tokenizer.model"), added, bundle.config.vocab_size)
        template = None
        if (name := "chat_template.jinja") in bundle.files:
            template = ChatTemplate(read_text(bundle.file(name), BundleError), bundle.file(name))
        sampling, end_ids = Sampling(), bundle.config.eos_token_ids
        if (name := "generation_config.json") in bundle.files:
            sampling, end_ids = read_generation_config(bundle.file(name), end_ids)
        config = bundle.config
        embeddings = RowTable(bundle.file(embedding["file"]), embedding)
        for field, expected, got in (
            ("rows", config.vocab_size, embeddings.rows),
            ("columns", config.hidden_size, embeddings.columns),
            ("scale", config.embed_scale, embeddings.layout.scale),
        ):
            if not math.isclose(expected, got, rel_tol=1e-6):
                raise BundleError(manifest, f"tables.embedding.{field}", expected, got)
        for modality in bundle.modalities.values():
            expansion(modality, tokenizer)  # raises unless the tokenizer has its tokens
        decoder: Decoder
        if defer_decoder or bundle.modalities:
            if context is not None and context > (most := engine_of(bundle.format).largest_context(bundle)):
                raise UsageError(f"context must be 1 to {most}, not {context}")
            decoder = DeferredDecoder(
                lambda: load_decoder(bundle, threads=threads, context=context),
                context=context or bundle.context,
                chunk=bundle.chunk,
            )
            if not defer_decoder:
                decoder.load()
        else:
            decoder = load_decoder(bundle, threads=threads, context=context)
        reader = Reader(
            bundle.modalities,
            context=decoder.context,
            bundle=bundle.path,
            video_tokens=video_tokens,
            note=log,
        )
        encoders = None
        if bundle.modalities:
            from gemma_edge.runtime.media.encoder_pool import Encoders, load_encoder

            encoders = Encoders(
                bundle.modalities,
                partial(load_encoder, bundle, threads=threads),
                keep=keep_encoders,
                report=lambda done: log(str(done)),
            )
        return cls(
            decoder,
            TokenRows(embeddings, list(bundle.modalities.values())),
            PleTable(bundle.file(per_layer["file"]), per_layer, bundle.config),
            tokenizer,
            template=template,
            sampling=sampling,
            end_ids=end_ids,
            reader=reader,
            encoders=encoders,
            bundle=bundle,
        )

    def _make_room(self, attachments: Sequence[Attachment]) -> None:
        """Releases the decoder if the encoders of these need more memory than there is beside it."""
        if not isinstance(self.decoder, DeferredDecoder) or not self.decoder.loaded:
            return
        if self.encoders is not None:
            attachments = self.encoders.missing(attachments)
        found = [self.reader.modalities[MODALITY[item.kind]] for item in attachments]
        need = max((modality.resident + modality.activations for modality in found), default=0)
        room = available_memory() if need else None
        if room is not None and room < need + SPARE_BYTES:
            self.decoder.release()

    def _load_decoder(self) -> None:
        if isinstance(self.decoder, DeferredDecoder):
            self.decoder.load()

    def prompt(
        self,
        prompt: Question,
        *,
        system: str | None = None,
        attach: Sequence[str | Path | Attachment] = (),
        raw: bool = False,
    ) -> Prompt:
        """What `generate` feeds: the chat template's text, or with `raw` the prompt's, after one bos.

        Attachments are read, and take their places among the ids.

        Raises:
            UsageError: malformed messages, or a system message where there can be none.
            MediaError: an attachment cannot be used.
            BundleError: the bundle has no encoder for one.
        """
        parts: list[Part] = []
        for item in attach:
            parts += [item] if isinstance(item, Attachment) else self.reader.file(item)
        if raw:
            return self._raw_prompt(prompt, system, parts)
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        opened, attachments = open_messages(attached(prompt, parts), self.reader)
        messages = normalize_messages(opened)
        if system is not None:
            if messages[0]["role"] == "system":
                raise UsageError("system is given twice: as an option and as the first message")
            messages = [{"role": "system", "content": system}, *messages]
        ends = (self.tokenizer.bos_id, self.tokenizer.eos_id)
        bos, eos = ("" if i is None else self.tokenizer.token_text(i) for i in ends)
        text = self.template.render(messages, bos_token=bos, eos_token=eos)
        return self._build(text, attachments)

    def prompt_ids(self, prompt: Question, **options: Any) -> list[int]:
        """The ids of `prompt`, whose options these are."""
        return self.prompt(prompt, **options).ids

    def _raw_prompt(self, prompt: Question, system: str | None, parts: Sequence[Part]) -> Prompt:
        """A text as it is; attachments go where it has their placeholders, or before it."""
        if not isinstance(prompt, str):
            raise UsageError("raw=True completes a text: the prompt must be a str, not messages")
        if system is not None:
            raise UsageError("raw=True completes a text as it is: it has no place for a system message")
        places = {
            kind: placeholder(self.reader.modalities[name], self.tokenizer)
            for kind, name in MODALITY.items()
            if name in self.reader.modalities
        }
        if parts and not any(text in prompt for text in places.values()):
            prompt = "".join(p if isinstance(p, str) else places[p.kind] for p in parts) + prompt
        return self._build(prompt, [part for part in parts if isinstance(part, Attachment)])

    def _build(self, text: str, attachments: Sequence[Attachment]) -> Prompt:
        return build(text, attachments, self.reader.modalities, self.tokenizer, template=self.template.path)

    def encode(self, attachments: Sequence[Attachment]) -> None:
        """Encodes attachments of prompts to come, so that their encoder is loaded once for all of them.

        The latest 32 MB of encoded attachments are kept: 16 images at the published sizes.
        """
        if self.encoders is not None and attachments:
            self._make_room(attachments)
            self.encoders.encode(attachments)

    def reset(self) -> None:
        """Empties the KV cache."""
        self._generator.reset()

    def stream_tokens(
        self,
        prompt: Sequence[int] | Prompt,
        *,
        sampling: Sampling | None = None,
        max_tokens: int | None = None,
        end_ids: Collection[int] = (),
        progress: Progress | None = None,
    ) -> Iterator[int]:
        """Token ids that continue ids, without a tokenizer; greedy unless told. See `TokenGenerator`."""
        sampler = Sampler(sampling or Sampling(temperature=0.0))
        return self._generator.stream_tokens(
            prompt, sampler, max_tokens=max_tokens, end_ids=end_ids, progress=progress
        )

    @overload
    def generate(self, prompt: Question, *, stream: Literal[True], **options: Any) -> Stream: ...

    @overload
    def generate(self, prompt: Question, *, stream: Literal[False] = False, **options: Any) -> Completion: ...

    # The overloads tell the result's type; what the options are is said once, here.
    def generate(  # type: ignore[misc]
        self,
        prompt: Question,
        *,
        system: str | None = None,
        stream: bool = False,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        stop: Sequence[str] | str | None = None,
        attach: Sequence[str | Path | Attachment] = (),
        raw: bool = False,
    ) -> Completion | Stream:
        """Answers a prompt.

        Args:
            prompt: one user turn, or messages, each with a text or with parts as `transformers` has them:
                {"type": "text", "text": ...}, {"type": "image", "path": ...}, "audio" and "video"; see
                `Reader.part`.
            system: a system message before them.
            stream: return a `Stream` of pieces of text instead of the `Completion`.
            max_tokens: None for as many as the context has room for.
            temperature, top_k, top_p, min_p, repetition_penalty, seed: see `Sampling`; None for the bundle's.
            stop: text that ends the answer and is not part of it; one or several.
            attach: files that go before the text of the last message: images, recordings, videos.
            raw: complete the prompt as it is, without the chat template.

        Raises:
            UsageError: an option is out of range, or the prompt does not fit the context.
            MediaError: an attachment cannot be used.
            BundleError: the bundle has no encoder for one.
        """
        options: dict[str, Any] = {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "seed": seed,
        }
        sampling = replace(self.sampling, **{k: v for k, v in options.items() if v is not None})
        stops = StopStrings([stop] if isinstance(stop, str) else list(stop or ()))
        started = time.perf_counter()
        made = self.prompt(prompt, system=system, attach=attach, raw=raw)
        progress = Progress(tokenize_s=time.perf_counter() - started)
        cancelled = threading.Event()
        tokens = self._generator.stream_tokens(
            made,
            Sampler(sampling),
            max_tokens=max_tokens,
            end_ids=self.end_ids,
            cancelled=cancelled.is_set,
            progress=progress,
        )
        answer = Stream(tokens, StreamDecoder(self.tokenizer), stops, self.end_ids, progress, cancelled)
        if stream:
            return answer
        for _ in answer:
            pass
        return answer.completion


def read_generation_config(path: Path, end_ids: Collection[int] = ()) -> tuple[Sampling, tuple[int, ...]]:
    """Sampling defaults and end ids of a generation_config.json.

    Args:
        end_ids: what holds where the file has no eos_token_id.

    Raises:
        BundleError: not JSON, or a value that is out of range.
    """
    data = read_json(path, BundleError)
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    values = {name: data[name] for name in names if data.get(name) is not None}
    if data.get("do_sample") is False:
        values["temperature"] = 0.0
    try:
        sampling = Sampling(**values)
    except UsageError as error:
        raise BundleError(path, "sampling", "values in range", error) from None
    eos = data.get("eos_token_id")
    ids = tuple(end_ids) if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
    if not all(_is_token_id(i) for i in ids):
        raise BundleError(path, "eos_token_id", "a token id or a list of them", repr(eos))
    return sampling, ids


def _is_token_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_SIZE
