"""Errors of requests, and JSON answers."""

import json
from typing import Any

from starlette.responses import JSONResponse, Response

from softprompt.errors import UserError
from softprompt.serving.folders import NoTask
from softprompt.serving.requests import Busy, Stopped

KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
BUSY = 429


class Refusal(UserError):
    """A request that is refused.

    Args:
        message: one line: the field, its value and what is allowed.
        status: of HTTP.
        field: the field of the request's body, "" for none.
        retry: False tells OpenAI's clients not to send the request again, as they do after a 5xx.
    """

    def __init__(
        self, message: str, status: int = 400, field: str = "", *, retry: bool = True
    ) -> None:
        super().__init__(message)
        self.status, self.field, self.retry = status, field, retry


class Json(JSONResponse):
    """A JSON answer in ASCII, so that lone surrogates of a request cannot make it unprintable."""

    def render(self, content: Any) -> bytes:
        """The bytes of an answer."""
        return dump(content).encode()


def dump(content: Any) -> str:
    """JSON in one line of ASCII."""
    return json.dumps(content, allow_nan=False, separators=(",", ":"))


def status_of(error: Exception) -> int:
    """The status that answers an error."""
    if isinstance(error, Refusal):
        return error.status
    known = {Busy: BUSY, NoTask: 404, Stopped: 503, UserError: 400}  # subclasses before UserError
    return next((status for kind, status in known.items() if isinstance(error, kind)), 500)


def error_body(error: Exception) -> dict[str, Any]:
    """The body that answers an error, as OpenAI's clients read it."""
    status = status_of(error)
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    kind = "rate_limit_error" if status == BUSY else kind
    message = " ".join(str(error).split()) if isinstance(error, UserError) else "internal error"
    field = getattr(error, "field", "") or None
    return {"error": {"message": message, "type": kind, "param": field, "code": None}}


def error_response(error: Exception) -> Response:
    """The answer to an error.

    The connection is closed if the request's body may be unread. If the queue is full or the server
    stops, a header says when to retry.
    """
    status = status_of(error)
    headers = {"connection": "close"} if status in (401, 408, 413, 421) else {}
    headers |= {"www-authenticate": "Bearer"} if status == 401 else {}
    if not getattr(error, "retry", True):
        headers["x-should-retry"] = "false"
    elif status in (BUSY, 503):
        headers["retry-after"] = "1"
    return Json(error_body(error), status, headers)
