"""Runs bundles: the light runtime.

    from gemma_edge.runtime import Model

    model = Model.load("out/")
    for piece in model.generate("Why is the sky blue?", stream=True):
        print(piece, end="", flush=True)

Importing this package loads none of its modules; a name does when it is first used. It switches the telemetry
of engines off (`host.offline`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gemma_edge.runtime.host.offline import silence_telemetry
from gemma_edge.runtime.lazy import lazy_names

if TYPE_CHECKING:
    from gemma_edge.runtime.answers import Completion, Stream
    from gemma_edge.runtime.artifacts.bundle import Bundle
    from gemma_edge.runtime.async_answers import AsyncAnswer
    from gemma_edge.runtime.batches.batch import BatchRequest, generate_batch
    from gemma_edge.runtime.batches.batch_run import run_batch
    from gemma_edge.runtime.conversations.conversation import Conversation
    from gemma_edge.runtime.errors import BusyError, GemmaEdgeError
    from gemma_edge.runtime.families.gemma3n_config import Gemma3nConfig
    from gemma_edge.runtime.model import Model
    from gemma_edge.runtime.prompt.chat_template import ChatTemplate
    from gemma_edge.runtime.prompt.tokenizer import Tokenizer
    from gemma_edge.runtime.prompt.tool_calls import ToolCall
    from gemma_edge.runtime.request_queue import RequestQueue
    from gemma_edge.runtime.sampling import Sampling
    from gemma_edge.runtime.usage import Usage
    from gemma_edge.runtime.version import __version__
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "AsyncAnswer": "async_answers",
            "BatchRequest": "batches.batch",
            "Bundle": "artifacts.bundle",
            "BusyError": "errors",
            "ChatTemplate": "prompt.chat_template",
            "Completion": "answers",
            "Conversation": "conversations.conversation",
            "Gemma3nConfig": "families.gemma3n_config",
            "GemmaEdgeError": "errors",
            "Model": "model",
            "RequestQueue": "request_queue",
            "Sampling": "sampling",
            "Stream": "answers",
            "Tokenizer": "prompt.tokenizer",
            "ToolCall": "prompt.tool_calls",
            "Usage": "usage",
            "generate_batch": "batches.batch",
            "run_batch": "batches.batch_run",
            "__version__": "version",
        },
    )

silence_telemetry()  # before any module can load an engine

__all__ = [
    "AsyncAnswer",
    "BatchRequest",
    "Bundle",
    "BusyError",
    "ChatTemplate",
    "Completion",
    "Conversation",
    "Gemma3nConfig",
    "GemmaEdgeError",
    "Model",
    "RequestQueue",
    "Sampling",
    "Stream",
    "Tokenizer",
    "ToolCall",
    "Usage",
    "__version__",
    "generate_batch",
    "run_batch",
]
