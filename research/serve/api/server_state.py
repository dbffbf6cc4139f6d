"""The state that all routes of a server share."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from starlette.requests import Request as HttpRequest

from research.core.errors import UserError
from research.engine.adapter_names import LoadedAdapter
from research.engine.requests import Constraint, Piece, Request
from research.serve.api.answer_shapes import AnswerPart
from research.serve.api.api_errors import ApiError, bad_request, stopping
from research.serve.api.guard import read_limited
from research.serve.api.prometheus_text import ServerMetrics
from research.serve.api.request_types import read_body
from research.serve.engine_thread import AnswerGroup, EngineThread
from research.serve.served_models import Deployment, ModelNames, NamedModel

if TYPE_CHECKING:
    from research.engine.constraints import Grammars

T = TypeVar("T")
Body = TypeVar("Body", bound=msgspec.Struct)
LONGEST_BODY = 8 << 20  # bytes
EXCHANGE = 0.01  # seconds between two looks at a name that gets another adapter
RETRY_LOADING = 2.0  # seconds after which a client may ask a server again that loads


class ServerState:
    """One server.

    Attributes:
      metrics: counters of this server.
      is_stopping: no new request is taken.
    """

    def __init__(self, engine_thread: EngineThread):
        self.metrics = ServerMetrics()
        self.is_stopping = False
        self._thread = engine_thread
        self._groups: set[AnswerGroup] = set()
        # Tokenising a long text takes long, and the loop must not wait.
        self._texts = ThreadPoolExecutor(2, "texts")
        self._admin = ThreadPoolExecutor(1, "admin")
        self._grammars: dict[str, Grammars] = {}
        self._lock = threading.Lock()

    @property
    def deployment(self) -> Deployment:
        """The models and their engine. Raises ApiError: they cannot answer yet."""
        if self._thread.error:
            raise ApiError(503, "the engine has failed; see the server's output")
        if self._thread.deployment is None:
            raise ApiError(503, "the model is loading", None, "loading", RETRY_LOADING)
        return self._thread.deployment

    @property
    def models(self) -> ModelNames:
        """The models by name. Raises ApiError: see `deployment`."""
        return self.deployment.models

    async def read(self, http: HttpRequest, kind: type[Body]) -> tuple[Body, list[str]]:
        """The body of a request, and the names of its unknown fields.

        Raises:
          ApiError: it cannot be read, or the server is loading or stopping.
        """
        body = await read_limited(http, LONGEST_BODY)
        if self.is_stopping:
            raise stopping()
        _ = self.deployment
        return await self.in_text_thread(read_body, body, kind)

    async def in_text_thread(self, function: Callable[..., T], *args: Any) -> T:
        """The result of a function that handles texts."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._texts, function, *args)

    async def in_admin_thread(self, function: Callable[..., T], *args: Any) -> T:
        """The result of a change of the models; one is made at a time."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._admin, function, *args)

    @contextlib.asynccontextmanager
    async def held(
        self, name: str | None
    ) -> AsyncIterator[tuple[NamedModel, LoadedAdapter]]:
        """The model of a name, and its adapter, which stays what it is in the block.

        Raises:
          ApiError, UserError: there is none.
        """
        names = self.deployment.engine.names
        while True:
            model = self.models.find(name)
            adapter = names.use(model.adapter)
            if adapter.identity == (model.served.identity if model.adapter else ""):
                break
            names.release(adapter)
            await asyncio.sleep(EXCHANGE)
        try:
            yield model, adapter
        finally:
            names.release(adapter)

    def submit(
        self, requests: Sequence[Request], model: str, adapter: LoadedAdapter
    ) -> AnswerGroup:
        """Gives requests to the engine. Raises UserError: see `AnswerGroup`."""
        group = AnswerGroup(self.deployment, requests, self.metrics, model, adapter)
        self._groups.add(group)
        return group

    def close(
        self, group: AnswerGroup, model: str, parts: Sequence[AnswerPart]
    ) -> None:
        """Gives up what has not come of an answer, and counts what has."""
        group.cancel()
        self._groups.discard(group)
        for part in parts:
            if part.ids:
                label = {"model_name": model}
                self.metrics.prompt.add(len(part.prompt), **label)
                self.metrics.prompt_sizes.add(len(part.prompt), **label)
                self.metrics.answer_sizes.add(len(part.ids), **label)

    @property
    def open_answers(self) -> int:
        """How many requests are being answered."""
        return len(self._groups)

    def end_all(self, piece: Piece) -> None:
        """Ends every answer with `piece`."""
        for group in [*self._groups]:
            group.end(piece)

    def constraints(
        self, model: NamedModel, written: Mapping[str, Any] | None
    ) -> Callable[[], Constraint | None]:
        """Makes the constraint of each answer from a `response_format`.

        Raises:
          ApiError: there is no such format, or llguidance is not installed.
        """
        kind = written.get("type", "") if written else "text"
        if kind == "text":
            return lambda: None
        if kind == "json_object":
            return self._make(model, lambda grammars: grammars.json_object())
        found = written.get("json_schema") if kind == "json_schema" else None
        schema = found.get("schema") if isinstance(found, dict) else None
        if not isinstance(schema, dict):
            raise bad_request(
                "response_format must be {type: text}, {type: json_object} or {type: "
                "json_schema, json_schema: {name: ..., schema: {...}}}",
                "response_format",
            )
        return self._make(model, lambda grammars: grammars.json_schema(schema))

    def _make(
        self, model: NamedModel, grammar: Callable[["Grammars"], Constraint]
    ) -> Callable[[], Constraint]:
        def make() -> Constraint:
            try:
                return grammar(self._grammars_of(model))
            except UserError as error:
                raise bad_request(str(error), "response_format") from error

        return make

    def _grammars_of(self, model: NamedModel) -> "Grammars":
        from research.engine.constraints import Grammars

        key = model.tokenizer.fingerprint
        with self._lock:  # Making them takes seconds for a large vocabulary.
            if key not in self._grammars:
                size = self.deployment.vocabulary
                ends = model.served.prompts.stop_ids
                self._grammars[key] = Grammars(model.tokenizer, size, ends)
            return self._grammars[key]

    def update_gauges(self) -> None:
        """Reads the engine's own counts."""
        deployment = self._thread.deployment
        if deployment is None:
            return
        stats, metrics = deployment.engine.stats(), self.metrics
        metrics.running.set(stats.running)
        metrics.waiting.set(stats.waiting)
        metrics.cache.set(stats.cache_tokens / max(stats.cache_capacity, 1))
        metrics.prefix_queries.set(stats.prompt_tokens)
        metrics.prefix_hits.set(stats.prefix_hits)
        metrics.adapters.clear()
        names = ",".join(m.name for m in deployment.models.all() if m.adapter)
        metrics.adapters.set(
            1,
            max_lora=str(deployment.adapter_rows),
            running_lora_adapters=names,
        )
