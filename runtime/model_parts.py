"""The parts of a `Model`, each read from its bundle by one function.

Every function raises BundleError (the tokenizer's, TokenizerError) for a part that is damaged, missing, or of
another model.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from gemma_edge.runtime.answer_log import log as log_event
from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.artifacts.manifest import is_token_id
from gemma_edge.runtime.artifacts.ple_table import PleTable
from gemma_edge.runtime.artifacts.row_table import RowTable
from gemma_edge.runtime.artifacts.token_rows import TokenRows
from gemma_edge.runtime.engines.cores import physical_cores
from gemma_edge.runtime.engines.decoder import Decoder
from gemma_edge.runtime.engines.deferred_decoder import DeferredDecoder
from gemma_edge.runtime.engines.engine_registry import engine_of, load_decoder
from gemma_edge.runtime.errors import BundleError, UsageError
from gemma_edge.runtime.generation_config import GENERATION_CONFIG, read_generation_config
from gemma_edge.runtime.host.cpu_fingerprint import cpu_fingerprint
from gemma_edge.runtime.media.encoded_files import EncodedFiles
from gemma_edge.runtime.media.encoder_pool import Encoders, load_encoder
from gemma_edge.runtime.prompt.chat_template import ChatTemplate
from gemma_edge.runtime.prompt.prompt_builder import expansion
from gemma_edge.runtime.prompt.tokenizer import Tokenizer
from gemma_edge.runtime.reuse.prefix_files import PrefixFiles
from gemma_edge.runtime.reuse.snapshot_pool import SNAPSHOTS
from gemma_edge.runtime.sampling import Sampling
from gemma_edge.runtime.speculation.cost_curve import CostFile, MachineCosts
from gemma_edge.runtime.tuned_settings import tuned_for_another_machine, tuned_settings
from gemma_edge.runtime.units import as_bytes
from gemma_edge.runtime.version import __version__

CHAT_TEMPLATE = "chat_template.jinja"


def with_settings(bundle: Bundle, threads: int | None, chunk: int | None) -> tuple[Bundle, int | None]:
    """The bundle with the chunk to load it with, and the threads: as given, or tuned for this machine.

    Raises:
        UsageError: `chunk` is larger than the bundle's, for which its memory was planned.
    """
    if chunk is not None and not 1 <= chunk <= bundle.chunk:
        raise UsageError(
            f"chunk must be 1 to {bundle.chunk}, for which this bundle was exported, not {chunk}"
        )
    if threads is None or chunk is None:
        if found := tuned_settings(bundle.identity):
            used = {} if threads is not None else {"threads": found.threads}
            used |= {} if chunk is not None else {"chunk": min(found.chunk, bundle.chunk)}
            log_event("tuned", {"bundle": str(bundle.path), **used, "measured": found.time})
            threads, chunk = used.get("threads", threads), used.get("chunk", chunk)
        elif tuned_for_another_machine(bundle.identity):
            told = "tuned for another CPU or number of cores: not used"
            log_event("tuned", {"bundle": str(bundle.path), "settings": told})
    return (bundle if chunk in (None, bundle.chunk) else replace(bundle, chunk=chunk)), threads


def bundle_tokenizer(bundle: Bundle) -> Tokenizer:
    """The tokenizer; it has the tokens of every modality."""
    added = bundle.manifest.get("added_tokens", {})
    if not isinstance(added, dict) or not all(map(is_token_id, added.values())):
        raise BundleError(bundle.container.manifest_path, "added_tokens", "ids by text", repr(added)[:80])
    tokenizer = Tokenizer(bundle.file("tokenizer.model"), added, bundle.config.vocab_size)
    for modality in bundle.modalities.values():
        expansion(modality, tokenizer)  # raises unless the tokenizer has its tokens
    return tokenizer


def bundle_template(bundle: Bundle) -> ChatTemplate:
    """The chat template; its family's for a bundle without one."""
    if CHAT_TEMPLATE not in bundle.files:
        return ChatTemplate(bundle.family.chat_template)
    return ChatTemplate(bundle.text(CHAT_TEMPLATE), bundle.file(CHAT_TEMPLATE))


def bundle_sampling(bundle: Bundle) -> tuple[Sampling, tuple[int, ...]]:
    """Sampling defaults and end ids."""
    end_ids = bundle.config.eos_token_ids
    if GENERATION_CONFIG not in bundle.files:
        return Sampling(), end_ids
    return read_generation_config(bundle.file(GENERATION_CONFIG), end_ids)


def bundle_tables(bundle: Bundle) -> tuple[TokenRows, PleTable]:
    """The token embeddings, those of modalities among them, and the per-layer embeddings."""
    embedding, per_layer = (_layout(bundle, name) for name in ("embedding", "per_layer"))
    config, rows = bundle.config, RowTable(bundle.file(embedding["file"]), embedding)
    for field, expected, got in (
        ("rows", config.vocab_size, rows.rows),
        ("columns", config.hidden_size, rows.columns),
        ("scale", config.embed_scale, rows.layout.scale),
    ):
        if not math.isclose(expected, got, rel_tol=1e-6):
            raise BundleError(bundle.container.manifest_path, f"tables.embedding.{field}", expected, got)
    return (
        TokenRows(rows, list(bundle.modalities.values())),
        PleTable(bundle.file(per_layer["file"]), per_layer, config),
    )


def _layout(bundle: Bundle, name: str) -> dict[str, Any]:
    layout = bundle.member("tables", dict).get(name)
    if not isinstance(layout, dict) or not isinstance(layout.get("file"), str):
        where = bundle.container.manifest_path
        raise BundleError(where, f"tables.{name}", "a layout that names its file", repr(layout))
    return layout


def bundle_decoder(bundle: Bundle, *, threads: int | None, context: int | None, defer: bool) -> Decoder:
    """The decoder; a `DeferredDecoder` if it may have to make room for encoders.

    Args:
        defer: leave it to be loaded when it is first fed.

    Raises:
        UsageError: the bundle cannot have this `context`.
    """
    if not (defer or bundle.modalities):
        return load_decoder(bundle, threads=threads, context=context)
    if context is not None and context > (most := engine_of(bundle.format).largest_context(bundle)):
        raise UsageError(f"context must be 1 to {most}, not {context}")
    decoder = DeferredDecoder(
        lambda: load_decoder(bundle, threads=threads, context=context),
        context=context or bundle.context,
        chunk=bundle.chunk,
    )
    if not defer:
        decoder.load()
    return decoder


def bundle_snapshots(bundle: Bundle) -> int:
    """Bytes for KV snapshots in memory that its plan counts; `SNAPSHOTS` if it counts none."""
    plan = bundle.manifest.get("plan")
    planned = plan.get("snapshot_bytes") if isinstance(plan, dict) else None
    return planned if isinstance(planned, int) and planned > 0 else SNAPSHOTS


def bundle_prefixes(bundle: Bundle, limit: int | str | None) -> PrefixFiles | None:
    """Its prefixes in the cache folder, those of this version of its engine; None without a `limit`.

    Raises:
        UsageError: `limit` is no size.
    """
    if not (size := as_bytes(limit or 0)):
        return None
    engine = engine_of(bundle.format)
    of = f"{bundle.identity} {engine.distribution} {engine.version}"
    return PrefixFiles(hashlib.sha256(of.encode()).hexdigest(), size)


def bundle_costs(bundle: Bundle, threads: int | None) -> MachineCosts:
    """What calls of several rows cost: of this bundle, on this machine, with this version of its engine."""
    engine, count = engine_of(bundle.format), threads or physical_cores()
    of = hashlib.sha256(f"{bundle.identity} {cpu_fingerprint()} {count}".encode()).hexdigest()
    return MachineCosts(CostFile(f"{of[:32]}-{engine.version}"))


def bundle_encoders(
    bundle: Bundle,
    *,
    threads: int | None,
    keep: bool,
    log: Callable[[str], None],
    cache: int | str | None = None,
) -> Encoders | None:
    """The encoders, none of them loaded; None for a bundle that takes text alone.

    Args:
        cache: disk space for what they encoded, as `attachment_cache` of `Model.load`.
        log: is told of every attachment that was encoded.
    """
    if not bundle.modalities:
        return None
    load = partial(load_encoder, bundle, threads=threads)
    files = EncodedFiles(_made_by(bundle), size) if (size := as_bytes(cache or 0)) else None
    return Encoders(bundle.modalities, load, keep=keep, report=lambda done: log(str(done)), files=files)


def _made_by(bundle: Bundle) -> str:
    """A SHA-256 of everything but the attachment that its rows follow from."""
    engine = engine_of(bundle.format)
    of = (bundle.identity, engine.distribution, engine.version, cpu_fingerprint(), __version__)
    return hashlib.sha256(" ".join(of).encode()).hexdigest()
