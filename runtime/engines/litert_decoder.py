"""The decoder on LiteRT (XNNPACK on CPU): fixed-shape signatures over buffers that are bound once.

The graph reads the KV cache where it lies and returns the keys and values of its own tokens only
(`export.emit.tflite`, layout "windowed"); this module puts them into the cache and says in the masks which of
its places are visible. A sliding layer's cache is a ring: a token lies at its position modulo the ring's
length. The rows of a verified draft wait for the next call: what the ring overwrites is still there when a
part of the draft is taken back. In the layout "litertlm" the graph returns the whole cache, into the buffers
it came from: the engine then writes the new rows alone, where it would copy 300 MB of cache a token into
others.

XNNPACK repacks the weights into a file, which is mapped from then on. Without it they would be anonymous
memory.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from ai_edge_litert.compiled_model import CompiledModel, TensorBuffer
from numpy.typing import NDArray

from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.artifacts.checked_graph import CheckedGraph
from gemma_edge.runtime.artifacts.decoder_signatures import DecoderSignatures
from gemma_edge.runtime.engines.buffered_decoder import BufferedDecoder
from gemma_edge.runtime.engines.cores import physical_cores, release_free_memory
from gemma_edge.runtime.engines.decoder import check_room
from gemma_edge.runtime.engines.kv_cache import int8_layers
from gemma_edge.runtime.engines.kv_snapshot import EveryPosition, KvBuffers, KvSnapshot, Ring
from gemma_edge.runtime.engines.litert_model import (
    Buffer,
    engine_errors,
    load_model,
    run_first,
    run_signature,
)
from gemma_edge.runtime.engines.litert_version import litert_version
from gemma_edge.runtime.engines.rope import rotary_tables
from gemma_edge.runtime.errors import BundleError, UsageError
from gemma_edge.runtime.families.config_fields import FULL, SLIDING

Array = NDArray[np.float32]

DECODER = "decoder.tflite"
MASKED = np.float32(-1e9)
KINDS = {FULL: "full", SLIDING: "sliding"}
# A call of a larger signature with a few rows unused is cheaper than several calls of smaller ones.
WORTH_PADDING = 0.8


class LitertDecoder(BufferedDecoder):
    """See `Decoder`. Not thread-safe: it has one cache."""

    def __init__(self, bundle: Bundle, *, threads: int | None = None, context: int | None = None) -> None:
        self.config = bundle.config
        self.context = bundle.context if context is None else context
        self.chunk = bundle.chunk
        if not 1 <= self.context <= bundle.context:
            raise UsageError(
                f"context must be 1 to {bundle.context}, for which this bundle was exported, not "
                f"{self.context}; `gemma-edge export --context` makes one for more"
            )
        self.path = path = bundle.file(DECODER)
        # Engines follow what a file says, over its end too: it is checked before one sees it.
        graph = CheckedGraph(path, self.config)
        file = graph.decoder()
        self.windowed = file.layout == "windowed"
        self.capacity = self._capacities(bundle.context)
        self._check_caches(file, bundle.kv_cache)
        self.model = self._load(path, bundle.files[DECODER].sha256, threads or physical_cores())
        graph.keep(file)  # packing its weights made the file's hash known
        self.started = False
        with engine_errors(path):
            self._allocate_cache(file.transposed, file.int8)
            # By number of tokens; decode takes one.
            self.calls = {1: _Call(self, "decode", 1)}
            self.verifying = self.calls | {n: _Call(self, f"verify_{n}", n) for n in file.verify}
            self.calls |= {n: _Call(self, f"prefill_{n}", n) for n in file.prefill}
        self.verify_rows: Sequence[int] = [size for size in file.verify if 1 < size <= self.chunk]
        self.waiting: _Call | None = None  # its rows are not in the rings yet; it began at `settled`
        self.settled = 0
        self.reset()

    def _load(self, path: Path, recorded: str, threads: int) -> CompiledModel:
        return load_model(path, recorded, threads)

    def _capacities(self, context: int) -> dict[str, int]:
        """Positions that the caches of each kind of layer hold, by the manifest."""
        window = min(self.config.sliding_window, context) if self.windowed else context
        return {kind: window if kind == SLIDING else context for kind in sorted(set(self.config.layer_types))}

    def _check_caches(self, file: DecoderSignatures, precision: str) -> None:
        """Raises BundleError if a cache of the graph is not of the manifest's length and precision."""
        int8 = int8_layers(self.config, precision, rings=self.windowed)
        for layer, length in file.lengths.items():
            positions = self.capacity[self.config.layer_types[layer]]
            expected, got = (
                f"{size} positions of {'int8' if layer in layers else 'fp32'}"
                for size, layers in ((positions, int8), (length, file.int8))
            )
            if got != expected:
                field, remedy = f"KV cache of layer {layer}", "Export the checkpoint again."
                raise BundleError(self.path, field, f"{expected}, by the manifest", got, remedy)

    def _allocate_cache(self, transposed: Collection[int], int8: Collection[int]) -> None:
        """Buffers of every layer that owns KV; `transposed` names those with values (head_dim, positions)."""
        c = self.config
        self.caches: dict[str, Buffer] = {}
        self.buffers = KvBuffers(f"ai-edge-litert {litert_version()}")
        for i in c.kv_layers:
            kind = c.layer_types[i]
            shape = (1, c.num_key_value_heads, self.capacity[kind], c.head_dim)
            values = (*shape[:2], shape[3], shape[2]) if i in transposed else shape
            kept = Ring(shape[2]) if self.windowed and kind == SLIDING else EveryPosition()
            values_axis = 3 if i in transposed else 2
            for name, size, axis in (
                (f"kv_cache_k_{i}", shape, 2),
                (f"kv_cache_v_{i}", values, values_axis),
            ):
                dtype = np.int8 if i in int8 else np.float32
                buffer = Buffer(self.model.create_input_buffer_by_name("decode", name), size, dtype)
                self.caches[name] = buffer
                self.buffers.add(name, buffer.array, kept, axis)

    def forward(self, embeddings: Array, per_layer: Array, n_logits: int = 1) -> Array:
        tokens = len(embeddings)
        check_room(self, tokens, n_logits)
        done, silent = 0, tokens - n_logits
        while done < silent:
            size = self._next_size(silent - done)
            count = min(size, silent - done)
            rows = slice(done, done + count)
            self._run(self.calls[size], embeddings[rows], per_layer[rows])
            done += count
        logits = np.empty((n_logits, self.config.vocab_size), np.float32)
        while done < tokens:
            call = self.verifying[self._verify_size(tokens - done)]
            count = min(call.tokens, tokens - done)
            rows = slice(done, done + count)
            self._run(call, embeddings[rows], per_layer[rows])
            logits[done - silent : done - silent + count] = call.outputs["logits"].array[0, :count]
            done += count
        if silent:
            release_free_memory()
        return logits

    def _verify_size(self, left: int) -> int:
        """The signature for the next of `left` tokens whose logits are wanted: the least that has room."""
        sizes = [size for size in self.verifying if self._fits(size)]
        return next((size for size in sizes if size >= left), sizes[-1])

    def _fits(self, size: int) -> bool:
        """Whether a padded call of this size fits: the graph itself writes its padding into whole caches."""
        return self.windowed or self.position + size <= max(self.capacity.values())

    def can_verify(self, rows: int) -> bool:
        return self.position + rows <= self.context and self._fits(rows)

    def _next_size(self, left: int) -> int:
        """The signature for the next of `left` tokens: the largest that they fill, or nearly fill."""
        prefill = [size for size in self.calls if size > 1 and self._fits(size)]
        nearly = [size for size in prefill if size * WORTH_PADDING <= left <= size]
        filled = [size for size in prefill if size <= left]
        return nearly[0] if nearly else filled[-1] if filled else prefill[0] if prefill else 1

    def _run(self, call: _Call, embeddings: Array, per_layer: Array) -> None:
        self._settle()
        call.run(embeddings, per_layer)
        self.waiting, self.settled = call, self.position
        self.position += len(embeddings)
        if call.tokens not in self.verify_rows:
            self._settle()

    def _settle(self) -> None:
        """Puts the rows of the last call into the rings, those that were not taken back."""
        if self.windowed and self.waiting and self.position > self.settled:
            self.waiting.append(self.settled, self.position - self.settled)
        self.waiting = None

    def earliest_at(self, position: int) -> int:
        waits = self.waiting and position == self.position
        return self.buffers.earliest_at(min(self.settled, position) if waits else position)

    def reset(self) -> None:
        self.waiting = None
        super().reset()

    def snapshot(self) -> KvSnapshot:
        self._settle()
        return super().snapshot()

    def restore(self, snapshot: KvSnapshot) -> None:
        super().restore(snapshot)
        self.waiting = None


class _Call:
    """One signature: its inputs and outputs, bound."""

    def __init__(self, decoder: LitertDecoder, name: str, tokens: int) -> None:
        self.decoder, self.tokens = decoder, tokens
        model = decoder.model
        self.index = model.get_signature_index(name)
        signature = model.get_signature_by_index(self.index)
        self.input_names: list[str] = signature["inputs"]
        self.output_names: list[str] = signature["outputs"]
        details = model.get_input_tensor_details(name)
        self.inputs = {
            key: Buffer(
                model.create_input_buffer_by_name(name, key),
                tuple(details[key]["shape"]),
                np.int32 if key == "input_pos" else np.float32,
            )
            for key in self.input_names
            if key not in decoder.caches
        }
        details = model.get_output_tensor_details(name)
        self.outputs = {
            key: Buffer(
                model.create_output_buffer_by_name(name, key),
                tuple(details[key]["shape"]),
                decoder.caches[key].array.dtype.type if key in decoder.caches else np.float32,
            )
            for key in self.output_names
            if key not in decoder.caches or decoder.windowed
        }

    def run(self, embeddings: Array, per_layer: Array) -> None:
        """Computes the tokens, at most as many as the signature has; the rest is padding."""
        decoder, count = self.decoder, len(embeddings)
        self.inputs["embeddings"].array[0, :count] = embeddings
        rows = self.inputs["per_layer_embeddings"].array
        rows[0, :count] = per_layer.reshape(count, *rows.shape[2:])
        if decoder.windowed:
            self._describe_window()
        else:
            self._describe_cache()
        inputs = [self.inputs.get(key) or decoder.caches[key] for key in self.input_names]
        outputs = [self.outputs.get(key) or decoder.caches[key] for key in self.output_names]
        for buffer in inputs:
            buffer.push()
        if decoder.started:
            run_signature(decoder.path, decoder.model, self.index, _tensors(inputs), _tensors(outputs))
        else:
            run_first(decoder.path, decoder.model, self.index, _tensors(inputs), _tensors(outputs))
            decoder.started = True
        for buffer in outputs:
            buffer.pull()

    def _describe_window(self) -> None:
        """Rotary tables of the tokens' positions; what each token sees of the cache, and of the tokens."""
        decoder, config = self.decoder, self.decoder.config
        first = decoder.position
        positions = np.arange(first, first + self.tokens)
        for kind, capacity in decoder.capacity.items():
            name = KINDS[kind]
            cos, sin = rotary_tables(config, kind, positions)
            self.inputs[f"cos_{name}"].array[...] = cos
            self.inputs[f"sin_{name}"].array[...] = sin
            # The last position before `first` that lies at each place of the ring; negative for none.
            places = np.arange(capacity)
            stored = first - 1 - (first - 1 - places) % capacity
            window = (
                config.sliding_window if kind == SLIDING else config.max_position_embeddings + self.tokens
            )
            mask = self.inputs[f"mask_{name}"].array[0, 0]
            seen = (stored >= 0)[None, :] & (positions[:, None] - stored[None, :] < window)
            mask[:, :capacity] = np.where(seen, np.float32(0), MASKED)
            distance = np.arange(self.tokens)[:, None] - np.arange(self.tokens)[None, :]
            mask[:, capacity:] = np.where((distance >= 0) & (distance < window), np.float32(0), MASKED)

    def _describe_cache(self) -> None:
        first = self.decoder.position
        positions = np.arange(first, first + self.tokens)
        self.inputs["input_pos"].array[...] = positions
        mask = self.inputs["mask"].array[0, 0]
        mask[...] = np.where(np.arange(mask.shape[1])[None] <= positions[:, None], np.float32(0), MASKED)

    def append(self, first: int, count: int) -> None:
        """Copies keys and values of the first `count` tokens to the places of positions `first` and on."""
        decoder = self.decoder
        places = {}
        for kind, capacity in decoder.capacity.items():
            skipped = max(0, count - capacity)
            places[kind] = (slice(skipped, count), np.arange(first + skipped, first + count) % capacity)
        for i in decoder.config.kv_layers:
            rows, place = places[decoder.config.layer_types[i]]
            for key in (f"kv_cache_k_{i}", f"kv_cache_v_{i}"):
                by_place = decoder.buffers.by_place(key, decoder.caches[key].array)
                by_place[place] = np.moveaxis(self.outputs[key].array[0][:, rows], 1, 0)


def _tensors(buffers: list[Buffer]) -> list[TensorBuffer]:
    return [buffer.tensor for buffer in buffers]
