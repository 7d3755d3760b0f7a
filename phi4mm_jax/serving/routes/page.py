"""The chat page."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse

DIRECTORY = Path(__file__).parents[1] / "static"

_HEADERS = {
    # The page's own files and what it attaches to a message; nothing from elsewhere, nothing inline.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "media-src data:; connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}

router = APIRouter(include_in_schema=False)


@router.get("/")
async def page() -> FileResponse:
    """Shows the page, with which anyone can try the model."""
    return FileResponse(DIRECTORY / "index.html", headers=_HEADERS)
