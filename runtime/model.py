"""`Model`: a bundle loaded, and text from it.

model = Model.load("out/")
print(model.generate("Why is the sky blue?").text)
for piece in model.generate("What is this?", attach=["photo.jpg"], stream=True):
    print(piece, end="")
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, Unpack, overload
from weakref import WeakSet

from gemma_edge.runtime.answer_log import AnswerLog
from gemma_edge.runtime.answer_log import log as log_event
from gemma_edge.runtime.answers import Cancellation, Completion, StopStrings, Stream, TokenSource
from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.closed_model import CLOSED
from gemma_edge.runtime.engines.decoder import Decoder
from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.generate import Table, TokenGenerator
from gemma_edge.runtime.generate_options import GenerateOptions, check_names, sampling_from
from gemma_edge.runtime.guards import GuardedAnswer, guards_of, said_in
from gemma_edge.runtime.logprobs import LogprobRecorder, bias_by_id
from gemma_edge.runtime.media.attachments import MODALITY, Attachable, Attachment, Part, Reader
from gemma_edge.runtime.model_parts import (
    bundle_costs,
    bundle_decoder,
    bundle_encoders,
    bundle_prefixes,
    bundle_sampling,
    bundle_snapshots,
    bundle_tables,
    bundle_template,
    bundle_tokenizer,
    with_settings,
)
from gemma_edge.runtime.prompt.answer_form import AnswerForm, answer_form
from gemma_edge.runtime.prompt.call_finder import CallFinder
from gemma_edge.runtime.prompt.chat_template import ChatTemplate, Message, normalize_messages
from gemma_edge.runtime.prompt.grammar_constraint import Grammars
from gemma_edge.runtime.prompt.prompt_builder import (
    Prompt,
    attached,
    build,
    open_messages,
    placeholder,
)
from gemma_edge.runtime.prompt.tokenizer import StreamDecoder, Tokenizer
from gemma_edge.runtime.prompt.tool_calls import Convention, count_calls
from gemma_edge.runtime.prompt.tool_schemas import Tool, ToolSource, normal_tools
from gemma_edge.runtime.prompt.truncation import Side, check_side, longest_prompt, text_to_cut, truncated
from gemma_edge.runtime.request_queue import DEFAULT_LIMIT, RequestQueue
from gemma_edge.runtime.residency import AttachmentEncoder, Residency
from gemma_edge.runtime.reuse.prompt_cache import PromptCache
from gemma_edge.runtime.reuse.snapshot_pool import SNAPSHOTS, SnapshotPool
from gemma_edge.runtime.sampling import Sampler, Sampling
from gemma_edge.runtime.speculation.cost_curve import MachineCosts
from gemma_edge.runtime.units import as_bytes
from gemma_edge.runtime.usage import GenerationProgress

if TYPE_CHECKING:
    from types import TracebackType

    import numpy as np
    from numpy.typing import NDArray

    from gemma_edge.runtime.async_answers import AsyncAnswer

Question = str | Sequence[Message]


class Model:
    """A decoder with its tables, tokenizer and chat template.

    It has one KV cache: one answer at a time; requests of other threads wait for their turn. A prompt that
    begins as an earlier one did is not computed anew: the KV cache still holds its beginning, or a snapshot
    of it lies in memory or on disk. So many conversations can share a model; each is told from the others by
    what it says. `close`, or leaving a `with` block, gives the model's memory back.

    Args:
        decoder, embeddings, per_layer: see `TokenGenerator`.
        tokenizer: the checkpoint's.
        template: None for Gemma 3's.
        sampling: what `generate` falls back to.
        end_ids: ids that end an answer; default: the tokenizer's eos.
        reader, encoders: of attachments; None for a model that takes text alone.
        bundle: what the model was loaded from, if from one.
        queue: most requests of other threads that wait while one is answered, 0 to refuse them; or a
            `RequestQueue`, to limit each client, too.
        snapshots, prefix_cache: as in `load`.
        costs: see `TokenGenerator`.
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
        encoders: AttachmentEncoder | None = None,
        bundle: Bundle | None = None,
        queue: int | RequestQueue = DEFAULT_LIMIT,
        snapshots: int | str = SNAPSHOTS,
        prefix_cache: int | str | None = None,
        costs: MachineCosts | None = None,
    ) -> None:
        self.decoder, self.embeddings, self.per_layer = decoder, embeddings, per_layer
        self.tokenizer = tokenizer
        self.template = template or ChatTemplate()
        self.sampling = sampling or Sampling()
        eos = tokenizer.eos_id
        self.end_ids = frozenset(end_ids if end_ids is not None else () if eos is None else (eos,))
        self.reader = reader or Reader({}, context=decoder.context)
        self.encoders, self.bundle = encoders, bundle
        self.residency = Residency(decoder, encoders)
        self.queue = RequestQueue(queue) if isinstance(queue, int) else queue
        self.grammars = Grammars(tokenizer, self.end_ids)
        prefixes = bundle_prefixes(bundle, prefix_cache) if bundle else None
        self.prompts = PromptCache(decoder, SnapshotPool(as_bytes(snapshots)), prefixes)
        self._generator = TokenGenerator(
            self.residency, embeddings, per_layer, self.queue, self.prompts, costs
        )
        self._streams: WeakSet[Stream] = WeakSet()

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        threads: int | None = None,
        context: int | None = None,
        chunk: int | None = None,
        defer_decoder: bool = False,
        keep_encoders: bool = False,
        video_tokens: int | None = None,
        queue: int | RequestQueue = DEFAULT_LIMIT,
        snapshots: int | str | None = None,
        prefix_cache: int | str | None = None,
        attachment_cache: int | str | None = None,
        log: Callable[[str], None] = lambda text: None,
    ) -> Self:
        """Loads the bundle in folder `path`.

        Args:
            threads: worker threads; None for what `gemma-edge tune` found here, or one a physical core.
            context: tokens of KV cache; None for what the bundle was planned for.
            chunk: tokens of one prefill call, at most the bundle's; None for what `gemma-edge tune` found
                here, or the bundle's.
            defer_decoder: load the decoder with the first prompt, once the attachments of that are encoded
                and their encoders released: what both need does not add up. Later, it is released for the
                time that takes, if there is not enough memory for both.
            keep_encoders: leave encoders in memory once a prompt needed them.
            video_tokens: see `Reader`.
            queue: see `Model`.
            snapshots: memory for KV snapshots of other conversations and of prefixes, such as "256MiB"; the
                least recently used go. Taken only while it is free; 0 for none. Default: what the bundle's
                plan counts for them, or 128 MiB.
            prefix_cache: disk space for KV snapshots of prefixes, such as "1GiB", in the cache folder; the
                next process begins there. None for none: they tell what the prompts said.
            attachment_cache: disk space for encoded images and clips, such as "256MiB", in the cache folder;
                the same file is not encoded again. None for none: they tell what the files show.
            log: is told which attachments were encoded, and what is left out of a video.

        Raises:
            BundleError, TokenizerError: the bundle is damaged.
            UsageError: `threads`, `context`, `chunk`, `video_tokens`, `snapshots` or `prefix_cache` is out of
                range.
        """
        for name, value in (("threads", threads), ("context", context)):
            if value is not None and value < 1:
                raise UsageError(f"{name} must be 1 or more, not {value}")
        started = time.perf_counter()
        bundle, threads = with_settings(Bundle.open(path), threads, chunk)
        tokenizer, template = bundle_tokenizer(bundle), bundle_template(bundle)
        sampling, end_ids = bundle_sampling(bundle)
        embeddings, per_layer = bundle_tables(bundle)
        decoder = bundle_decoder(bundle, threads=threads, context=context, defer=defer_decoder)
        reader = Reader(
            bundle.modalities,
            context=decoder.context,
            bundle=bundle.path,
            video_tokens=video_tokens,
            note=log,
        )
        model = cls(
            decoder,
            embeddings,
            per_layer,
            tokenizer,
            template=template,
            sampling=sampling,
            end_ids=end_ids,
            reader=reader,
            encoders=bundle_encoders(
                bundle, threads=threads, keep=keep_encoders, log=log, cache=attachment_cache
            ),
            bundle=bundle,
            queue=queue,
            snapshots=bundle_snapshots(bundle) if snapshots is None else snapshots,
            prefix_cache=prefix_cache,
            costs=bundle_costs(bundle, threads),
        )
        seconds = round(time.perf_counter() - started, 6)
        log_event("load", {"bundle": str(path), "context": decoder.context, "load_s": seconds})
        return model

    def close(self) -> None:
        """Ends the streams that run and gives back decoder, encoders and files. Any later use says so."""
        for stream in list(self._streams):
            stream.cancel()
        self.decoder = self.embeddings = self.per_layer = self.encoders = CLOSED
        self.prompts = self._generator = CLOSED
        self.residency.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def position(self) -> int:
        """Tokens that the KV cache holds."""
        return self.decoder.position

    def prompt(
        self,
        prompt: Question,
        *,
        system: str | None = None,
        attach: Attachable | Sequence[Attachable] | None = None,
        raw: bool = False,
        truncate: Side | None = None,
        max_tokens: int | None = None,
        tools: Sequence[ToolSource | Tool] | None = None,
        tool_convention: Convention | None = None,
    ) -> Prompt:
        """What `generate` feeds: the chat template's text, or with `raw` the prompt's, after one bos.

        Attachments are read, and take their places among the ids. With `truncate`, a prompt that is too long
        for an answer of `max_tokens` is cut.

        Raises:
            UsageError: malformed messages, or a system message where there can be none.
            MediaError: an attachment cannot be used.
            BundleError: the bundle has no encoder for one.
        """
        parts = self.reader.attached(attach)
        if isinstance(prompt, str) and not prompt and not parts:
            raise UsageError("the prompt is empty")
        check_side(truncate)
        most = longest_prompt(self.decoder.context, max_tokens)
        if raw:
            make_raw = partial(self._raw_prompt, system=system, parts=parts)
            if truncate is None or not isinstance(prompt, str):
                return make_raw(prompt)
            return truncated(prompt, make_raw, most, truncate, self.tokenizer)
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

        described = normal_tools(tools)

        def make(messages: list[dict[str, Any]]) -> Prompt:
            text = self.template.render(
                messages, bos_token=bos, eos_token=eos, tools=described, convention=tool_convention
            )
            return replace(self._build(text, attachments), messages=tuple(messages))

        if truncate is None:
            return make(messages)
        said, put = text_to_cut(messages)
        return truncated(said, lambda cut: make(put(cut)), most, truncate, self.tokenizer)

    def prompt_for(self, prompt: Question, **options: Unpack[GenerateOptions]) -> Prompt:
        """As `prompt`, from the options of `generate`."""
        check_names(options)
        return self._prompt(prompt, options, answer_form(options, lambda: self.template.default_convention))

    def _prompt(self, prompt: Question, options: GenerateOptions, form: AnswerForm) -> Prompt:
        return self.prompt(
            prompt,
            system=options.get("system"),
            attach=options.get("attach"),
            raw=options.get("raw") or False,
            truncate=options.get("truncate"),
            max_tokens=options.get("max_tokens"),
            tools=form.tools,
            tool_convention=form.convention,
        )

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
        with self.queue.turn():
            self.residency.make_room(attachments, self.prompts.pool.clear)
            self.residency.encode(attachments)

    def agenerate(self, prompt: Question, **options: Unpack[GenerateOptions]) -> AsyncAnswer:
        """`generate` for asyncio: await the `Completion`, or iterate over the pieces with `async for`.

        The work is done in a thread of its own. Errors are raised where the answer is awaited.
        """
        from gemma_edge.runtime.async_answers import AsyncAnswer  # asyncio takes long to import

        return AsyncAnswer(lambda: self.generate(prompt, stream=True, **options), self.queue)

    def reset(self) -> None:
        """Empties the KV cache and forgets the snapshots in memory."""
        with self.queue.turn():
            self._generator.reset()

    def stream_tokens(
        self,
        prompt: Sequence[int] | Prompt,
        *,
        sampling: Sampling | None = None,
        max_tokens: int | None = None,
        end_ids: Collection[int] = (),
        progress: GenerationProgress | None = None,
        observe: Callable[[NDArray[np.float32], int], None] | None = None,
        speculate: bool = False,
    ) -> Iterator[int]:
        """Token ids that continue ids, without a tokenizer; greedy, and one by one, unless told.

        See `TokenGenerator` and, for `observe`, `Sampler`.
        """
        sampler = Sampler(sampling or Sampling(temperature=0.0), observe=observe)
        return self._generator.stream_tokens(
            prompt, sampler, max_tokens=max_tokens, end_ids=end_ids, progress=progress, speculate=speculate
        )

    def _source(
        self,
        prompt: Prompt,
        sampler: Sampler,
        options: GenerateOptions,
        cancelled: Cancellation,
        progress: GenerationProgress,
    ) -> TokenSource:
        """Where the tokens of an answer come from. Raises as `TokenGenerator.stream_tokens`."""
        speculate = options.get("speculate")
        predicted = self.tokenizer.encode(speculate, bos=False) if isinstance(speculate, str) else []
        tokens = self._generator.stream_tokens(
            prompt,
            sampler,
            max_tokens=options.get("max_tokens"),
            end_ids=self.end_ids,
            cancelled=cancelled.is_set,
            progress=progress,
            client=options.get("client") or "",
            speculate=speculate is True or bool(predicted),
            predicted=predicted,
        )
        return TokenSource(tokens, StreamDecoder(self.tokenizer), self.end_ids)

    @overload
    def generate(
        self,
        prompt: Question,
        *,
        stream: Literal[True],
        prepared: Prompt | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Stream: ...

    @overload
    def generate(
        self,
        prompt: Question,
        *,
        stream: Literal[False] = False,
        prepared: Prompt | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Completion: ...

    def generate(
        self,
        prompt: Question,
        *,
        stream: bool = False,
        prepared: Prompt | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Completion | Stream:
        """Answers a prompt.

        Args:
            prompt: one user turn, or messages, each with a text or with parts as `transformers` has them:
                {"type": "text", "text": ...}, {"type": "image", "path": ...}, "audio" and "video"; see
                `Reader.part`.
            stream: return a `Stream` of pieces of text instead of the `Completion`.
            prepared: what `prompt_for` made of the prompt and these options, if it did.
            options: see `GenerateOptions`.

        Raises:
            UsageError: an option is out of range, or the prompt does not fit the context.
            BusyError: too many requests wait already, or this thread has not finished another stream.
            MediaError: an attachment cannot be used.
            BundleError: the bundle has no encoder for one.
        """
        check_names(options)
        form = answer_form(options, lambda: self.template.default_convention)
        count = options.get("logprobs")
        recorder = None if count is None else LogprobRecorder(self.tokenizer, count)
        bias = bias_by_id(options.get("logit_bias") or {}, self.tokenizer)
        sampler = Sampler(
            sampling_from(options, self.sampling),
            bias=bias,
            observe=recorder,
            constraint=None if form.grammar is None else self.grammars.constraint(form.grammar),
        )
        stop = options.get("stop")
        stops = StopStrings([stop] if isinstance(stop, str) else list(stop or ()))
        cancelled = Cancellation(options.get("timeout"))
        started = time.perf_counter()
        made = prepared or self._prompt(prompt, options, form)
        if made.left_out:
            self.reader.note(f"the prompt is too long: {made.left_out} tokens of its text are left out")
        progress = GenerationProgress(tokenize_s=time.perf_counter() - started)
        source = self._source(made, sampler, options, cancelled, progress)
        answer = Stream(
            source.tokens,
            source.text,
            stops,
            source.end_ids,
            progress,
            cancelled,
            logprobs=None if recorder is None else recorder.tokens,
            guarded=GuardedAnswer(guards_of(options.get("guard")), said_in(prompt)),
            prompt=made,
            log=AnswerLog(made, progress, options.get("client") or ""),
            calls=CallFinder(form.callable, count_calls(prompt)),
        )
        if stream:
            self._streams.add(answer)
            return answer
        for _ in answer:
            pass
        return answer.completion
