"""The page at `/`: three files of this package and nothing from elsewhere."""

from __future__ import annotations

from importlib import resources

from fastapi import APIRouter
from starlette.responses import Response

# No inline script or style, nothing of other origins; clips are fetched with the key and shown as blobs.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' blob:; "
    "media-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {"Content-Security-Policy": _POLICY, "Cache-Control": "no-cache"}
_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/page/style.css": ("style.css", "text/css; charset=utf-8"),
    "/page/icon.svg": ("icon.svg", "image/svg+xml"),
}

router = APIRouter(include_in_schema=False)


def _add(path: str, name: str, media_type: str) -> None:
    data = (resources.files(__name__) / name).read_bytes()

    async def file() -> Response:
        return Response(data, media_type=media_type, headers=_HEADERS)

    router.add_api_route(path, file, methods=["GET"])


for _path, (_name, _media_type) in _FILES.items():
    _add(_path, _name, _media_type)
