"""The files of the page, with the headers that keep it from loading or running anything else."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from gemma_edge.runtime.server.api_error import ApiError

FOLDER = Path(__file__).parent / "page"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/vnd.microsoft.icon",
    ".woff2": "font/woff2",
    ".webmanifest": "application/manifest+json",
    ".json": "application/json",
    ".txt": "text/plain; charset=utf-8",
}
FRAMES = "base-uri 'none'; frame-ancestors 'none'"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "media-src 'self' data: blob:; connect-src 'self'; font-src 'self'; worker-src 'self'; "
    f"manifest-src 'self'; form-action 'self'; {FRAMES}"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Permissions-Policy": "microphone=(self), camera=(self), geolocation=()",
    "Cross-Origin-Opener-Policy": "same-origin",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-cache",
}
STYLE = """
:root { color-scheme: light dark; font: 16px/1.6 system-ui, sans-serif }
body { margin: 0; min-height: 100vh; display: grid; place-items: center;
  background: light-dark(#faf9f6, #161816); color: light-dark(#1d1f1c, #ecefea) }
form { box-sizing: border-box; width: min(22rem, 92vw); display: grid; gap: .6rem; padding: 1.75rem;
  border-radius: 18px; border: 1px solid light-dark(#e2e0d8, #343934); background: light-dark(#fff, #1f221f) }
h1 { margin: 0; font-size: 1.25rem; font-weight: 650; letter-spacing: -.01em }
label { font-size: .9rem; font-weight: 550 }
input, button { font: inherit; padding: .55rem .75rem; border-radius: 10px;
  border: 1px solid light-dark(#8d8b83, #7e857e) }
input { background: none; color: inherit }
button { margin-top: .5rem; border-color: transparent; background: light-dark(#0c6b5a, #6fd3bd);
  color: light-dark(#fff, #06231d); font-weight: 600; cursor: pointer }
:focus-visible { outline: 2px solid light-dark(#0c6b5a, #6fd3bd); outline-offset: 2px }
[role=alert] { margin: 0; color: light-dark(#a8271b, #ff9c8f); font-size: .9rem }
"""
FORM = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>gemma-edge: sign in</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}</style></head>
<body><main><form method="post" action="login"><h1>gemma-edge</h1>{problem}
<label for="key">API key</label>
<input id="key" name="key" type="password" autocomplete="current-password" required autofocus>
<button>Sign in</button></form></main></body></html>
"""
WRONG = '<p role="alert">This key is not known.</p>'


@cache
def page_file(name: str) -> tuple[bytes, str, str]:
    """A file's bytes, its type and its ETag. Raises KeyError for what is no file of the page."""
    path = FOLDER / name
    if "/" in name or "\\" in name or name.startswith(".") or path.suffix not in TYPES or not path.is_file():
        raise KeyError(name)
    data = path.read_bytes()
    return data, TYPES[path.suffix], f'"{hashlib.sha256(data).hexdigest()[:32]}"'


def page_names() -> list[str]:
    """The names of the page's files."""
    return sorted(path.name for path in FOLDER.glob("*") if path.suffix in TYPES) if FOLDER.is_dir() else []


def page_response(request: Request, name: str) -> Response:
    """A file of the page; 304 for one that the browser has."""
    try:
        data, kind, tag = page_file(name)
    except KeyError:
        raise ApiError(404, f"there is no {request.url.path}", code="not_found") from None
    headers = {**HEADERS, "ETag": tag}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(data, media_type=kind, headers=headers)


def sign_in_form(*, wrong: bool = False) -> Response:
    """The form that asks for a key; it holds nothing else."""
    style = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{style}'; form-action 'self'; {FRAMES}"
    text = FORM.format(style=STYLE, problem=WRONG if wrong else "")
    headers = {**HEADERS, "Content-Security-Policy": policy, "Cache-Control": "no-store"}
    return Response(text, 401, headers=headers, media_type="text/html")
