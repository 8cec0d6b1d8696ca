"""The application: routes, and what starts and ends with it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from softprompt.errors import UserError
from softprompt.serving.engine import Engine
from softprompt.serving.http.completions import chat_completions, completions
from softprompt.serving.http.errors import Json, Refusal, error_response
from softprompt.serving.http.guard import Guard
from softprompt.serving.http.metrics import Metrics
from softprompt.serving.http.service import Service, Threads
from softprompt.serving.http.settings import Settings
from softprompt.serving.http.tasks import list_models, load, outcome, predict, show_model, unload

PAGE = Path(__file__).with_name("page.html")
POLICY = (  # the page loads nothing else and connects only to this server
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def make_app(engine: Engine, settings: Settings, *, chat_template: str = "") -> Guard:
    """The server's application.

    Args:
        engine: that runs rows; the application closes it at its end.
        settings: of the server.
        chat_template: of the model; "" refuses chats.
    """
    metrics = Metrics(engine)
    service = Service(engine, settings, metrics, Threads(4), Threads(1), chat_template)
    app = Starlette(
        routes=[
            Route("/", page),
            Route("/health", health),
            Route("/ready", ready),
            Route("/metrics", show_metrics),
            Route("/v1/models", list_models),
            Route("/v1/models/{name:path}", show_model),
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/chat/completions", chat_completions, methods=["POST"]),
            Route("/v1/tasks/{name}/predict", predict, methods=["POST"]),
            Route("/v1/tasks/{name}", load, methods=["PUT"]),
            Route("/v1/tasks/{name}", unload, methods=["DELETE"]),
            Route("/v1/outcomes", outcome, methods=["POST"]),
        ],
        exception_handlers={UserError: _refuse, HTTPException: _refuse_route, Exception: _refuse},
        lifespan=_lifespan,
    )
    app.router.redirect_slashes = False  # a redirect's URL is built from the Host header
    app.state.service = service
    return Guard(app, settings, metrics)


@contextlib.asynccontextmanager
async def _lifespan(app: Starlette) -> AsyncIterator[None]:
    """Measures the event loop while the server runs, and closes the engine after it."""
    service: Service = app.state.service
    watching = asyncio.create_task(service.metrics.watch_loop())
    yield
    watching.cancel()
    service.threads.close()
    service.loading.close()
    await asyncio.to_thread(service.engine.close)


async def _refuse(http: HttpRequest, error: Exception) -> Response:
    """The answer to an error; an unexpected one is logged by the server."""
    return error_response(error)


async def _refuse_route(http: HttpRequest, error: Exception) -> Response:
    """The answer to an unknown path or method."""
    assert isinstance(error, HTTPException)
    return error_response(Refusal(f"{error.detail}: no such path or method", error.status_code))


async def page(http: HttpRequest) -> Response:
    """The page on which two tasks answer side by side."""
    headers = {"content-security-policy": POLICY, "x-content-type-options": "nosniff"}
    return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=headers)


async def health(http: HttpRequest) -> Response:
    """The process is alive."""
    return Json({"alive": True})


async def ready(http: HttpRequest) -> Response:
    """The engine's thread runs.

    Its pools were compiled when their tasks were loaded; `predict` compiles at its first request.
    """
    is_ready = http.app.state.service.engine.ready()
    return Json({"ready": is_ready}, 200 if is_ready else 503)


async def show_metrics(http: HttpRequest) -> Response:
    """Prometheus' metrics."""
    text = generate_latest(http.app.state.service.metrics.registry)
    return Response(text, headers={"content-type": CONTENT_TYPE_LATEST})
