"""Tool calls in a text that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence

from gemma_edge.runtime.prompt.tool_calls import ToolCall, call_start, find_calls
from gemma_edge.runtime.prompt.tool_schemas import Tool


class CallFinder:
    """Lets text through, and holds back what may be a call until that is known.

    The result does not depend on how the text is cut.

    Args:
        tools: those that were offered; without any, all text passes.
        first_id: see `find_calls`.
    """

    def __init__(self, tools: Sequence[Tool], first_id: int = 0) -> None:
        self.tools, self.first_id = tools, first_id
        self.calls: tuple[ToolCall, ...] = ()
        self._names = [tool.name for tool in tools]
        self._text, self._passed = "", 0

    def push(self, text: str) -> str:
        """The text that is now known not to belong to a call."""
        if not self.tools:
            return text
        self._text += text
        start = call_start(self._text, self._names, self._passed)
        known = self._text if start is None else self._text[:start]
        # The space before a call belongs to it.
        end = max(self._passed, len(known.rstrip()))
        passed, self._passed = self._text[self._passed : end], end
        return passed

    def flush(self, *, find: bool = True) -> str:
        """The rest of the text, when no more comes; `find`: without its calls, which are in `calls` then."""
        if not find or not self.tools:
            return self._text[self._passed :]
        found = find_calls(self._text, self.tools, first_id=self.first_id, start=self._passed)
        self.calls = found.calls
        return found.text
