"""Every answer that is not a success: `{"error": {message, type, param, code}}`, from whatever part it comes.

`type` is a word of the convention, `code` says exactly what happened, `param` names the field. Permanent errors carry
`x-should-retry: false`; those that pass carry `Retry-After`.
"""

from __future__ import annotations

import logging
import math
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import OperationalError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from magicid.errors import StorageError
from serve.catalog import UnknownModel
from serve.jobs import NotFound, QueueFull, QuotaExceeded
from serve.logs import describe

_log = logging.getLogger("magicid.serve")

# What may succeed when it is sent again; every other status of 400 to 499 is permanent.
_PASSING = frozenset({HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS})
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_CODES = {404: "not_found", 405: "method_not_allowed"}
_BUSY_RETRY_S = 2.0


class ApiError(Exception):
    """An answer other than success.

    Args:
        message: what is wrong and what to do; it goes to the client, so it names no path and quotes no prompt.
        param: the field that is wrong.
        retry_after_s: seconds after which the same request may succeed.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(status, code)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.headers = dict(headers or {})
        if retry_after_s is not None:
            self.headers["Retry-After"] = str(max(1, math.ceil(retry_after_s)))
        if 400 <= status < 500 and status not in _PASSING:
            self.headers["x-should-retry"] = "false"

    def response(self) -> JSONResponse:
        """The answer."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        body = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return JSONResponse({"error": body}, self.status, self.headers)


def no_such_video() -> ApiError:
    """The one answer for an unknown, deleted or expired video and for another tenant's."""
    return ApiError(
        404,
        "video_not_found",
        "no such video: check the id; videos that were deleted or have expired are gone",
        param="video_id",
    )


def unauthorized() -> ApiError:
    """No key, or one that is not known."""
    return ApiError(
        401,
        "invalid_api_key",
        "this needs a valid key: send it as `Authorization: Bearer KEY`",
        headers={"WWW-Authenticate": "Bearer"},
    )


def from_exception(error: BaseException) -> ApiError:
    """The answer to an error of any part; what is not foreseen becomes a 500 that tells nothing of the inside."""
    match error:
        case ApiError():
            return error
        case NotFound():
            return no_such_video()
        case UnknownModel():
            return ApiError(404, "model_not_found", str(error), param="model")
        case QueueFull() | QuotaExceeded():
            code = "queue_full" if isinstance(error, QueueFull) else "quota_exceeded"
            return ApiError(429, code, str(error), retry_after_s=error.retry_after_s)
        case RequestValidationError():
            return _invalid(error)
        case HTTPException():
            return _http(error)
        case StorageError() | OperationalError():
            return ApiError(503, "unavailable", "storage cannot be reached: try again", retry_after_s=_BUSY_RETRY_S)
        case _:
            return ApiError(500, "internal_error", "the endpoint failed; its log has the reason under this request id")


def report(error: BaseException, request_id: str) -> None:
    """Log an unforeseen error by its type and place only: its message may quote a prompt or a secret."""
    told = describe(error)
    text = "%s failed: %s %s\n%s"
    _log.error(text, request_id, *told.values(), extra={"request_id": request_id, "error": told})


def install(app: FastAPI) -> None:
    """Give the app these answers for all errors that its routes raise on purpose; the guard answers the others."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        return from_exception(error).response()

    for kind in (ApiError, NotFound, UnknownModel, QueueFull, QuotaExceeded, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, answer)


def _invalid(error: RequestValidationError) -> ApiError:
    return field_error(error.errors()[0])


def field_error(found: Any) -> ApiError:
    """The answer to the first problem that pydantic found, naming its field."""
    where = [str(part) for part in found["loc"] if part not in ("body", "query", "path", "header")]
    param = ".".join(where)
    message = found["msg"].removeprefix("Value error, ")
    code = "missing_required_parameter" if found["type"] == "missing" else "invalid_value"
    return ApiError(400, code, f"{param or 'the request'}: {message}", param=param or None)


def _http(error: HTTPException) -> ApiError:
    status = error.status_code
    messages = {404: "there is nothing at this address; /openapi.json lists what there is"}
    message = messages.get(status, str(error.detail))
    return ApiError(status, _CODES.get(status, "invalid_request"), message, headers=dict(error.headers or {}))
