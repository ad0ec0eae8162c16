"""`Application`: the server as an ASGI application: routes, errors, and the record of each request."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any
from urllib.parse import parse_qs

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gemma_edge.runtime.server.alerts import AlertRules, Alerts
from gemma_edge.runtime.server.answer_format import AnswerFormat
from gemma_edge.runtime.server.answer_response import DRAINED, AnswerResponse, Running, send_json
from gemma_edge.runtime.server.api_error import ApiError, as_api_error
from gemma_edge.runtime.server.asked import Asked
from gemma_edge.runtime.server.chat_answer import ChatAnswer
from gemma_edge.runtime.server.chat_request import chat_request
from gemma_edge.runtime.server.completion_answer import CompletionAnswer
from gemma_edge.runtime.server.completion_request import completion_request
from gemma_edge.runtime.server.exchange import AccessLog, Exchange
from gemma_edge.runtime.server.gate import COOKIE, Gate, address
from gemma_edge.runtime.server.keyring import SESSION_S, Keyring
from gemma_edge.runtime.server.model_pool import ModelPool, ServedModel
from gemma_edge.runtime.server.page_files import page_names, page_response, sign_in_form
from gemma_edge.runtime.server.request_fields import RequestFields, is_quick, read_body, read_object
from gemma_edge.runtime.server.responses_answer import ResponsesAnswer
from gemma_edge.runtime.server.responses_request import responses_request
from gemma_edge.runtime.server.server_health import ServerHealth
from gemma_edge.runtime.server.server_metrics import ServerMetrics
from gemma_edge.runtime.server.server_options import Limits, ServerOptions
from gemma_edge.runtime.server.speech_response import SpeechResponse, speech_request
from gemma_edge.runtime.transcription import TRANSCRIBE, TRANSLATE
from gemma_edge.runtime.version import __version__

LOG = logging.getLogger("gemma_edge.server")
MODELS = "/v1/models/"
LOGIN = "/login"
LOGIN_LIMITS = Limits(body_bytes=4096, body_seconds=10)
ALWAYS = {
    "x-content-type-options": "nosniff",
    # Not "no-referrer": with it a browser sends the sign-in form with `Origin: null`, which the gate refuses.
    "referrer-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}

Endpoint = Callable[[Request], Awaitable[ASGIApp]]
ReadRequest = Callable[[RequestFields, Limits, int], Asked]
MakeForm = Callable[[str, Asked], AnswerFormat]


class Application:
    """See the module.

    Args:
        pool: the models.
        keyring: the keys that are let in; an empty one lets everybody in.
    """

    def __init__(
        self,
        pool: ModelPool,
        options: ServerOptions,
        *,
        keyring: Keyring | None = None,
        access_log: AccessLog | None = None,
        alerts: AlertRules | None = None,
    ) -> None:
        self.pool, self.options, self.keyring = pool, options, keyring or Keyring([])
        self.running = Running()
        self.health = ServerHealth(options, pool)
        self.metrics = ServerMetrics(self._waiting)
        self._log = access_log
        self._alerts = Alerts(alerts, self.metrics) if alerts else None
        self._gate = Gate(self._route, options, self.keyring, public=(LOGIN,))
        self._routes: Mapping[str, Mapping[str, Endpoint]] = {
            "/v1/chat/completions": {"POST": partial(self._answer, chat_request, ChatAnswer)},
            "/v1/completions": {"POST": partial(self._answer, completion_request, CompletionAnswer)},
            "/v1/responses": {"POST": partial(self._answer, responses_request, ResponsesAnswer)},
            "/v1/audio/transcriptions": {"POST": partial(self._speech, TRANSCRIBE, "transcribe")},
            "/v1/audio/translations": {
                "POST": partial(self._speech, TRANSLATE.format(language="English"), "translate")
            },
            "/v1/models": {"GET": self._models},
            "/health": {"GET": self._health},
            "/ready": {"GET": self._ready},
            "/metrics": {"GET": self._metrics},
            "/page.json": {"GET": self._page_facts},
            LOGIN: {"POST": self._login},
            "/logout": {"POST": self._logout},
            "/": {"GET": self._page("index.html")},
            **{f"/{name}": {"GET": self._page(name)} for name in page_names()},
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "http":
            await self._exchange(scope, receive, send)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        watching = asyncio.ensure_future(self._alerts.watch()) if self._alerts else None
        while (message := await receive())["type"] != "lifespan.shutdown":
            await send({"type": f"{message['type']}.complete"})
        if watching:
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching
        await self.pool.close()
        await send({"type": "lifespan.shutdown.complete"})

    async def _exchange(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, its errors, and its lines in log and metrics."""
        exchange = Exchange()
        scope["exchange"], scope["response_headers"] = exchange, dict(ALWAYS)
        begun = False

        async def sending(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                exchange.status = message["status"]
                extra = scope["response_headers"].items()
                more = [(name.encode(), value.encode("latin-1")) for name, value in extra]
                message = {**message, "headers": [*message.get("headers", []), *more]}
            await send(message)

        try:
            await self._gate(scope, receive, sending)
        except Exception as error:
            failed = as_api_error(error)
            exchange.code = failed.code
            if failed is DRAINED:
                exchange.outcome = "draining"
            if failed.status == 500:
                LOG.error("a request to %s failed", exchange.route, exc_info=error)
            if begun:
                exchange.outcome = "error"
            else:
                await self._refuse(failed, scope, receive, sending)
        finally:
            exchange.end()
            self.metrics.ended(exchange)
            self.health.ended(exchange)
            if self._log:
                self._log.write(exchange)

    async def _refuse(self, failed: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        accepts = Request(scope).headers.get("accept", "")
        if (
            failed.status == 401
            and (scope["method"], scope["path"]) == ("GET", "/")
            and "text/html" in accepts
        ):
            await sign_in_form()(scope, receive, send)
        else:
            await send_json(send, failed.body, failed.status, failed.headers)

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, method = scope["path"], "GET" if scope["method"] == "HEAD" else scope["method"]
        methods = self._routes.get(path)
        if methods is None and path.startswith(MODELS):
            path, methods = MODELS, {"GET": self._model}
        exchange: Exchange = scope["exchange"]
        if methods is None:
            raise ApiError(404, f"there is no {path}", code="not_found")
        exchange.route = path
        endpoint = methods.get(method)
        if endpoint is None:
            allowed = ", ".join(methods)
            raise ApiError(
                405, f"{path} takes {allowed}", code="method_not_allowed", headers={"Allow": allowed}
            )
        response = await endpoint(Request(scope, receive))
        await response(scope, receive, send)

    # Answers. -----------------------------------------------------------------------------------------

    def _limits(self, request: Request) -> Limits:
        key, limits = request.scope["key"], self.options.limits
        return replace(limits, max_tokens=key.max_tokens) if key and key.max_tokens else limits

    async def _answer(self, read: ReadRequest, make: MakeForm, request: Request) -> ASGIApp:
        exchange: Exchange = request.scope["exchange"]
        limits = self._limits(request)
        fields = RequestFields(await read_object(request, limits))
        served = self.pool.find(fields.text("model"))

        def read_fields() -> Asked:
            asked = read(fields, limits, served.context)
            exchange.hash_prompt(asked.prompt)
            return asked

        asked = read_fields() if is_quick(request) else await asyncio.to_thread(read_fields)
        exchange.model = served.name
        return AnswerResponse(
            self.pool,
            served,
            asked,
            make(served.name, asked),
            exchange,
            options=self.options,
            metrics=self.metrics,
            running=self.running,
        )

    async def _speech(self, prompt: str, task: str, request: Request) -> ASGIApp:
        exchange: Exchange = request.scope["exchange"]

        async def respond(scope: Scope, receive: Receive, send: Send) -> None:
            async with speech_request(request, self._limits(request)) as asked:
                served = self.pool.find(asked.model)
                exchange.model = served.name
                response = SpeechResponse(
                    self.pool,
                    served,
                    asked,
                    exchange,
                    prompt=prompt,
                    task=task,
                    options=self.options,
                    metrics=self.metrics,
                    running=self.running,
                )
                await response(scope, receive, send)

        return respond

    # What the server says of itself. --------------------------------------------------------------------

    async def _models(self, request: Request) -> Response:
        data = [_model_json(served) for served in self.pool.models.values()]
        return JSONResponse({"object": "list", "data": data})

    async def _model(self, request: Request) -> Response:
        return JSONResponse(_model_json(self.pool.find(request.url.path.removeprefix(MODELS))))

    async def _health(self, request: Request) -> Response:
        report = self.health.report(requests=self.metrics.total, errors=self.metrics.errors)
        if self._alerts:
            report["alerts"] = [self._alerts.describe(name) for name in self._alerts.crossed]
        return JSONResponse(report, 503 if report["status"] == "unhealthy" else 200)

    async def _ready(self, request: Request) -> Response:
        ready = self.health.ready
        return JSONResponse({"ready": ready}, 200 if ready else 503)

    async def _metrics(self, request: Request) -> Response:
        text, kind = self.metrics.render()
        return Response(text, headers={"Content-Type": kind})

    def _waiting(self) -> int:
        return sum(served.model.queue.waiting for served in self.pool.loaded if served.model is not None)

    # The page. ----------------------------------------------------------------------------------------

    def _page(self, name: str) -> Endpoint:
        async def endpoint(request: Request) -> Response:
            request.scope["exchange"].route = "page"
            return page_response(request, name)

        return endpoint

    async def _page_facts(self, request: Request) -> Response:
        limits = self._limits(request)
        models = [
            {
                "id": served.name,
                "context": served.context,
                "modalities": served.modalities,
                "tools": True,
                "ceiling_bytes": self.health.ceiling,
                "loaded": served.model is not None,
            }
            for served in self.pool.models.values()
        ]
        return JSONResponse(
            {
                "version": __version__,
                "signed_in": bool(self.keyring),
                "models": models,
                "limits": {
                    "messages": limits.messages,
                    "parts": limits.parts,
                    "body_bytes": limits.body_bytes,
                    "image_pixels": limits.image_pixels,
                    "audio_seconds": limits.audio_seconds,
                    "max_tokens": limits.max_tokens,
                },
            }
        )

    async def _login(self, request: Request) -> Response:
        """Gives the page a cookie for a key; the key itself is not kept in the browser."""
        body = await read_body(request, LOGIN_LIMITS)
        given = parse_qs(body.decode("utf-8", "replace"), max_num_fields=4).get("key", [""])[0]
        key = self.keyring.find(given.encode())
        if key is None:
            self._gate.wrong_key(address(request.scope))
            return sign_in_form(wrong=True)
        response = Response(status_code=303, headers={"Location": "./", "Cache-Control": "no-store"})
        self._set_cookie(request, response, self.keyring.cookie(key), SESSION_S)
        return response

    async def _logout(self, request: Request) -> Response:
        response = Response(status_code=204)
        self._set_cookie(request, response, "", 0)
        return response

    def _set_cookie(self, request: Request, response: Response, value: str, seconds: int) -> None:
        secure = request.url.scheme == "https"
        response.set_cookie(COOKIE, value, max_age=seconds, httponly=True, samesite="strict", secure=secure)


def _model_json(served: ServedModel) -> dict[str, Any]:
    head = {"id": served.name, "object": "model", "created": served.created, "owned_by": "gemma-edge"}
    return {**head, "context": served.context, "modalities": served.modalities}
