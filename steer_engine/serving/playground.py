"""`/playground`: one static page that compares plain and steered answers. It needs no key; what it asks for may."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from fastapi import APIRouter
from starlette.responses import Response

router = APIRouter(include_in_schema=False)

_TYPES = {"html": "text/html; charset=utf-8", "css": "text/css", "js": "text/javascript"}

HEADERS = {
    # Nothing from elsewhere, nothing inline: what a model writes can never run here.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@router.get("/playground")
async def page() -> Response:
    return _file("html")


@router.get("/playground.css")
async def style() -> Response:
    return _file("css")


@router.get("/playground.js")
async def script() -> Response:
    return _file("js")


def _file(kind: str) -> Response:
    return Response(_content(kind), media_type=_TYPES[kind], headers=HEADERS)


@cache
def _content(kind: str) -> bytes:
    return files("steer_engine.serving").joinpath("static", f"playground.{kind}").read_bytes()
