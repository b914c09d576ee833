"""GET /: a page to chat on. It loads nothing else, and its policy lets nothing else run."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_PAGE = Path(__file__).with_name("playground.html")
_POLICY = (
    "default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'"
)


def make_routes() -> list[Route]:
    page = _PAGE.read_bytes()
    policy = _POLICY.format(**{tag: _hash_of(page, tag) for tag in ("script", "style")})
    headers = {"content-security-policy": policy, "x-content-type-options": "nosniff"}

    async def show_playground(request: Request) -> Response:
        return Response(page, media_type="text/html", headers=headers)

    return [Route("/", show_playground)]


def _hash_of(page: bytes, tag: str) -> str:
    """The source of the page's only element of this name, as a policy names it."""
    (text,) = re.findall(rb"<%b>(.*?)</%b>" % (tag.encode(), tag.encode()), page, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'"
