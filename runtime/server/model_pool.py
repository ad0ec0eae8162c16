"""`ModelPool`: models by name, loaded when they are asked for, within one budget of memory."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.errors import printable
from gemma_edge.runtime.model import Model
from gemma_edge.runtime.server.api_error import ApiError, too_many
from gemma_edge.runtime.units import format_size

LOG = logging.getLogger("gemma_edge.server")
KINDS = {"vision": "image", "audio": "audio"}


@dataclass
class ServedModel:
    """A bundle with a name, and its model while that is loaded.

    Attributes:
        context: tokens.
        modalities: what a prompt may hold: "text", and perhaps "image" and "audio".
        need: bytes that its plan predicts.
    """

    name: str
    path: Path
    context: int
    modalities: tuple[str, ...]
    need: int
    created: int
    model: Model | None = None
    users: int = 0
    last_used: float = field(default_factory=time.monotonic)

    @classmethod
    def of(cls, name: str, path: Path, context: int | None = None) -> ServedModel:
        """Checks a bundle, which is not loaded. Raises BundleError."""
        bundle = Bundle.open(path)
        kinds = ("text", *(KINDS[modality] for modality in bundle.modalities))
        created = int((path if path.is_file() else path / "manifest.json").stat().st_mtime)
        return cls(name, path, context or bundle.context, kinds, planned_bytes(bundle), created)


def planned_bytes(bundle: Bundle) -> int:
    """Memory that a bundle takes by its plan; by the size of its files if it has none."""
    plan = bundle.manifest.get("plan")
    if isinstance(plan, dict):
        sizes = [plan.get(name) for name in ("peak_bytes", "beside_bytes")]
        known = [size for size in sizes if isinstance(size, int) and size > 0]
        if known:
            return max(known)
    return sum(record.bytes for record in bundle.files.values())


class ModelPool:
    """See the module. All methods are for the event loop's thread.

    Requests for a model that is not loaded wait in one line; a model that nobody uses makes room.

    Args:
        models: by name; the first is the default.
        load: loads the bundle of a model; called in another thread.
        budget: bytes that the loaded models may take by their plans; None for no limit.
        most_waiting: requests that wait for a model to be loaded; further ones get 429.
    """

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        load: Callable[[Path], Model],
        *,
        budget: int | None = None,
        most_waiting: int = 16,
    ) -> None:
        self.models, self.budget = dict(models), budget
        self._load, self._most_waiting = load, max(1, most_waiting)
        self._line: deque[tuple[ServedModel, asyncio.Future[Model]]] = deque()
        self._loading: asyncio.Task[None] | None = None
        self._coming: ServedModel | None = None  # what is loaded by that
        self._reloading: asyncio.Future[None] | None = None  # done as soon as nobody uses a model

    @property
    def default(self) -> ServedModel:
        return next(iter(self.models.values()))

    @property
    def loaded(self) -> list[ServedModel]:
        return [served for served in self.models.values() if served.model is not None]

    @property
    def need(self) -> int:
        """Bytes by the plans of the models that are loaded, and of the one that is being loaded."""
        return sum(served.need for served in self.models.values() if served.model or served is self._coming)

    def find(self, name: str | None) -> ServedModel:
        """The model of that name; the default without one.

        Raises:
            ApiError: there is none.
        """
        if name is None:
            return self.default
        if served := self.models.get(name):
            return served
        names = ", ".join(list(self.models)[:20])
        text = f"there is no model {printable(name, 80)!r}; the models are {names}"
        raise ApiError(404, text, param="model", code="model_not_found")

    @asynccontextmanager
    async def use(self, served: ServedModel) -> AsyncIterator[Model]:
        """The model, loaded; it stays so within the block.

        Raises:
            ApiError: it cannot be loaded, or too many wait for that.
        """
        model = await self._enter(served)
        try:
            yield model
        finally:
            self._leave(served)

    async def _enter(self, served: ServedModel) -> Model:
        if served.model is not None and not self._line and self._reloading is None:
            served.users += 1
            return served.model
        if len(self._line) >= self._most_waiting:
            raise too_many("too many requests wait for a model to be loaded", "queue_full", 5)
        turn: asyncio.Future[Model] = asyncio.get_running_loop().create_future()
        self._line.append((served, turn))
        self._advance()
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self._leave(served)  # it was let in just before
            raise

    def _leave(self, served: ServedModel) -> None:
        served.users -= 1
        served.last_used = time.monotonic()
        self._advance()

    def _advance(self) -> None:
        """Lets in whom it can: first those whose model is there, then the first of the line loads its own."""
        if self._reloading is not None:
            used = self._loading or any(served.users for served in self.models.values())
            if not used and not self._reloading.done():
                self._reloading.set_result(None)
            return
        if self._loading is not None:
            return
        while self._line and self._line[0][1].done():  # its client left
            self._line.popleft()
        if not self._line:
            return
        served = self._line[0][0]
        if served.model is not None:
            self._let_in(served)
            self._advance()
            return
        try:
            if self._make_room(served):
                self._loading = asyncio.ensure_future(self._bring(served))
        except ApiError as error:
            self._turn_away(served, error)
            self._advance()

    def _let_in(self, served: ServedModel) -> None:
        """Everybody in the line who waits for this model."""
        assert served.model is not None
        for turn in self._taken_from_line(served):
            served.users += 1
            turn.set_result(served.model)

    def _turn_away(self, served: ServedModel, error: ApiError) -> None:
        for turn in self._taken_from_line(served):
            turn.set_exception(error)

    def _taken_from_line(self, served: ServedModel) -> list[asyncio.Future[Model]]:
        turns = [turn for each, turn in self._line if each is served and not turn.done()]
        self._line = deque((each, turn) for each, turn in self._line if each is not served)
        return turns

    async def _bring(self, served: ServedModel) -> None:
        """Loads a model. It goes on if the clients leave: others may want it."""
        started = time.perf_counter()
        self._coming = served
        try:
            served.model = await asyncio.to_thread(self._load, served.path)
            LOG.info("model %s loaded in %.2f s", served.name, time.perf_counter() - started)
        except Exception as error:
            LOG.error("model %s cannot be loaded: %s", served.name, error)
            text = f"model {served.name} cannot be loaded; the server's log says why"
            self._turn_away(served, ApiError(503, text, code="model_unavailable"))
        finally:
            self._loading = self._coming = None
            self._advance()

    def _make_room(self, served: ServedModel) -> bool:
        """Releases models until this one fits; False if one that is in use is in the way.

        Raises:
            ApiError: it never fits.
        """
        if self.budget is None:
            return True
        if served.need > self.budget:
            text = f"model {served.name} needs {format_size(served.need)} of {format_size(self.budget)}"
            raise ApiError(503, text, code="model_too_large")
        others = sorted(self.loaded, key=lambda other: other.last_used)
        while served.need + sum(other.need for other in others) > self.budget:
            idle = next((other for other in others if not other.users), None)
            if idle is None:
                return False
            others.remove(idle)
            self._release(idle)
        return True

    def _release(self, served: ServedModel) -> None:
        model, served.model = served.model, None
        if model is not None:
            model.close()
            LOG.info("model %s released", served.name)

    async def preload(self) -> None:
        """Loads the default model. Raises ApiError."""
        async with self.use(self.default):
            pass

    async def reload(self, models: Mapping[str, ServedModel]) -> None:
        """Takes the bundles as they are now: what runs ends with the old ones, what comes waits for the new.

        Args:
            models: checked, not loaded.
        """
        self._reloading = asyncio.get_running_loop().create_future()
        self._advance()
        await self._reloading
        again = [served.name for served in self.loaded if served.name in models]
        for served in self.loaded:
            self._release(served)
        self.models = dict(models)
        self._line = deque((self.models.get(each.name, each), turn) for each, turn in self._line)
        self._reloading = None
        self._advance()
        for name in again:
            async with self.use(self.models[name]):
                pass

    async def close(self) -> None:
        """Releases every model."""
        for served in self.loaded:
            self._release(served)
