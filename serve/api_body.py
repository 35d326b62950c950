"""The body of POST /v1/videos, multipart or JSON, as one typed model. Nothing of it is written anywhere."""

from __future__ import annotations

import json
import re
from typing import Any

from fastapi import Request
from pydantic import ValidationError
from starlette.datastructures import UploadFile

from serve.api_errors import ApiError, field_error
from serve.api_models import CreateVideo

MAX_FIELDS = 40
MULTIPART, JSON = "multipart/form-data", "application/json"
_NESTED = re.compile(r"([a-z_]+)\[([a-z_]+)\]")

SCHEMA: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {kind: {"schema": {"$ref": "#/components/schemas/CreateVideo"}} for kind in (MULTIPART, JSON)},
    }
}


async def read_body(request: Request) -> CreateVideo:
    """The body, checked as far as it can be without knowing the base model.

    Raises:
        ApiError: 400 naming the field, 413, 415.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind == MULTIPART:
        fields = await _multipart(request)
    elif kind == JSON:
        fields = _json(await request.body())
    else:
        raise ApiError(415, "unsupported_media_type", f"send {MULTIPART} or {JSON}, not {kind[:60] or 'nothing'}")
    try:
        return CreateVideo.model_validate(fields)
    except ValidationError as error:
        # One at a time, and never with pydantic's own text: it quotes the input.
        raise field_error(error.errors(include_url=False, include_input=False)[0]) from None


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):  # also bytes that are not UTF-8
        raise ApiError(400, "invalid_json", "the body is not valid JSON in UTF-8") from None


async def _multipart(request: Request) -> dict[str, Any]:
    """Text parts by name; `name[key]` becomes an object. A file may begin to arrive only to be refused by its name."""
    form = await request.form(max_files=1, max_fields=MAX_FIELDS)
    fields: dict[str, Any] = {}
    try:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                raise _bad(name, "files are not taken; send text")
            nested = _NESTED.fullmatch(name)
            owner, key = (nested[1], nested[2]) if nested else (name, None)
            if key is None:
                place = fields
            else:
                place = fields.setdefault(owner, {})
                if not isinstance(place, dict):
                    raise _bad(owner, f"send either {owner} or {owner}[...], not both")
            if (key or owner) in place:
                raise _bad(name, "was sent twice")
            place[key or owner] = value
    finally:
        await form.close()
    return fields


def _bad(name: str, message: str) -> ApiError:
    return ApiError(400, "invalid_value", f"{name[:60]}: {message}", param=name[:60])
