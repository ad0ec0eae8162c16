"""The decoder on ONNX Runtime (CPU), with KV buffers that are bound once and updated in place.

Past and present of a layer are the same buffer, so a step copies no cache. The inputs of a decode step are
buffers that stay bound: a step only writes a token's rows into them and runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.artifacts.onnx_check import check_windows
from gemma_edge.runtime.artifacts.onnx_files import DECODER
from gemma_edge.runtime.engines.buffered_decoder import BufferedDecoder
from gemma_edge.runtime.engines.cores import release_free_memory
from gemma_edge.runtime.engines.decoder import check_room
from gemma_edge.runtime.engines.kv_cache import cache_layouts
from gemma_edge.runtime.engines.kv_snapshot import EveryPosition, Evicting, KvBuffers
from gemma_edge.runtime.engines.onnx_session import open_session, session_options
from gemma_edge.runtime.engines.packed_graph import packed_session
from gemma_edge.runtime.engines.rope import rotary_tables
from gemma_edge.runtime.errors import BundleError, UsageError
from gemma_edge.runtime.families.config_fields import FULL, SLIDING

Array = NDArray[np.float32]
CHECK = "`gemma-edge inspect --check` finds damage; export the checkpoint again."
KV_TYPES = {"fp32": np.float32, "int8": np.int8}
KV_GRAPH_TYPES = {"fp32": "tensor(float)", "int8": "tensor(int8)"}
KIND = {FULL: "full", SLIDING: "sliding"}
MOST_VERIFIED = 16  # rows of a call; beyond, a row costs about as much as a step of its own


class OnnxDecoder(BufferedDecoder):
    """See `Decoder`. Not thread-safe: it has one cache."""

    def __init__(self, bundle: Bundle, *, threads: int | None = None, context: int | None = None) -> None:
        self.config = bundle.config
        self.context = bundle.context if context is None else context
        self.chunk = bundle.chunk
        self.position = 0
        self.verify_rows: Sequence[int] = range(2, min(MOST_VERIFIED, self.chunk) + 1)
        maximum = self.config.max_position_embeddings
        if not 1 <= self.context <= maximum:
            raise UsageError(f"context must be 1 to {maximum} (max_position_embeddings), not {self.context}")
        self.path = path = bundle.file(DECODER)
        try:
            self.session = self._load(bundle, threads)
        except BundleError:
            raise
        except Exception as error:  # onnxruntime raises many types of its own
            raise BundleError(path, "graph", "a decoder that ONNX Runtime loads", str(error)) from None
        self.split = self.config.first_shared_layer * self.config.hidden_size_per_layer_input
        self._check_graph(path, bundle.kv_cache)
        self.binding = self.session.io_binding()
        self._bind_cache(bundle.kv_cache)
        self._bind_inputs()
        release_free_memory()  # packing weights leaves holes

    def _load(self, bundle: Bundle, threads: int | None) -> ort.InferenceSession:
        packed = packed_session(bundle, lambda: self._options(threads))
        return packed or open_session(bundle.file(DECODER), self._options(threads))

    def _options(self, threads: int | None) -> ort.SessionOptions:
        return session_options(threads)

    def _check_graph(self, path: Path, precision: str) -> None:
        """Raises BundleError unless the graph is one of this config: binding would not tell."""
        c = self.config
        f32, i32 = "tensor(float)", "tensor(int32)"
        expected: dict[str, tuple[str, tuple[int | None, ...]]] = {
            "inputs_embeds": (f32, (1, None, c.hidden_size)),
            "ple_low": (f32, (1, None, self.split)),
            "num_logits": ("tensor(int64)", (1,)),
            "seqlens_k": (i32, (1,)),
            "total_sequence_length": (i32, ()),
            "logits": (f32, (1, None, c.vocab_size)),
        }
        if c.num_kv_shared_layers:
            expected["ple_high"] = (f32, (1, None, c.ple_row_size - self.split))
        for layer_type in set(c.layer_types):
            for table in ("cos", "sin"):
                expected[f"{table}_{KIND[layer_type]}"] = (f32, (None, c.head_dim // 2))
        for layer, layout in cache_layouts(c, precision).items():
            cache = (KV_GRAPH_TYPES[layout.precision], (1, c.num_key_value_heads, None, c.head_dim))
            expected |= {f"past_{part}.{layer}": cache for part in ("key", "value")}
        values = [*self.session.get_inputs(), *self.session.get_outputs()[:1]]
        found = {v.name: (v.type, tuple(n if isinstance(n, int) else None for n in v.shape)) for v in values}
        for name in sorted({*expected, *found}):
            if expected.get(name) != found.get(name):
                raise BundleError(path, name, expected.get(name, "nothing"), found.get(name, "nothing"))
        check_windows(path, c)

    def _bind_cache(self, precision: str) -> None:
        config = self.config
        self.caches: list[ort.OrtValue] = []
        self.buffers = KvBuffers(f"onnxruntime {ort.__version__}")
        outputs = {output.name for output in self.session.get_outputs()}
        for layer, layout in cache_layouts(config, precision).items():
            shape = (1, config.num_key_value_heads, layout.capacity(self.context), config.head_dim)
            kept = Evicting(shape[2], config.sliding_window) if layout.windowed else EveryPosition()
            for part in ("key", "value"):
                array = np.zeros(shape, KV_TYPES[layout.precision])
                self.buffers.add(f"{part}.{layer}", array, kept)
                buffer = ort.OrtValue.ortvalue_from_numpy(array)  # over the same memory
                self.binding.bind_ortvalue_input(f"past_{part}.{layer}", buffer)
                self.binding.bind_ortvalue_output(f"present_{part}.{layer}", buffer)
                self.caches.append(buffer)
                for reader, owner in enumerate(config.kv_owner):
                    if owner == layer and (name := f"shared_{part}.{reader}") in outputs:
                        self.binding.bind_ortvalue_output(name, buffer)

    def _bind_inputs(self) -> None:
        config = self.config
        # An OrtValue made from an array borrows its memory, so all of these are kept.
        self.arrays: dict[str, NDArray[np.generic]] = {}
        for layer_type in sorted(set(config.layer_types)):
            cos, sin = rotary_tables(config, layer_type, self.context)
            self._bind(f"cos_{KIND[layer_type]}", cos)
            self._bind(f"sin_{KIND[layer_type]}", sin)
        self.seqlens = self._bind("seqlens_k", np.zeros(1, np.int32))
        self.total = self._bind("total_sequence_length", np.zeros((), np.int32))
        self.wanted = self._bind("num_logits", np.ones(1, np.int64))
        self.bound_shape = (0, 0)
        self.rows = np.empty((0, self.config.vocab_size), np.float32)

    def _bind(self, name: str, array: NDArray[np.generic]) -> NDArray[np.generic]:
        self.arrays[name] = array = np.ascontiguousarray(array).reshape(array.shape)
        self.binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        return array

    def _shape_inputs(self, tokens: int, n_logits: int) -> bool:
        """Binds buffers for T tokens and n logits; False if those of the last call have these sizes."""
        if self.bound_shape == (tokens, n_logits):
            return False
        config = self.config
        self.embeddings = self._bind("inputs_embeds", np.empty((1, tokens, config.hidden_size), np.float32))
        self.ple_low = self._bind("ple_low", np.empty((1, tokens, self.split), np.float32))
        if config.num_kv_shared_layers:
            high = config.ple_row_size - self.split
            self.ple_high = self._bind("ple_high", np.empty((1, n_logits, high), np.float32))
        self.logits = self._rows(n_logits)[None]
        self.logits_value = ort.OrtValue.ortvalue_from_numpy(self.logits)
        self.binding.bind_ortvalue_output("logits", self.logits_value)
        self.bound_shape = (tokens, n_logits)
        return True

    def _rows(self, count: int) -> Array:
        """f32 (count, vocab) for logits; small ones share a buffer, which steps of several sizes reuse."""
        if count > MOST_VERIFIED:
            return np.empty((count, self.config.vocab_size), np.float32)
        if count > len(self.rows):
            self.rows = np.empty((count, self.config.vocab_size), np.float32)
        return self.rows[:count]

    def forward(self, embeddings: Array, per_layer: Array, n_logits: int = 1) -> Array:
        tokens = len(embeddings)
        check_room(self, tokens, n_logits)
        rows = max(1, n_logits)  # the graph computes one at least
        reshaped = self._shape_inputs(tokens, rows)
        total = self.position + tokens
        self.embeddings[0] = embeddings
        self.ple_low[0] = per_layer[:, : self.split]
        if self.config.num_kv_shared_layers:
            self.ple_high[0] = per_layer[-rows:, self.split :]
        self.seqlens[0] = total - 1
        self.total[...] = total
        self.wanted[0] = rows
        try:
            self.session.run_with_iobinding(self.binding)
        except Exception as error:  # onnxruntime raises many types of its own
            raise BundleError(self.path, "graph", "a decoder that fits the manifest", error, CHECK) from None
        self.position = total
        if tokens > MOST_VERIFIED or (reshaped and tokens > 1 and n_logits < tokens):
            release_free_memory()
        return self.logits[0, rows - n_logits :].copy()
