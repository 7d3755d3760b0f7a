"""The chat page."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse

DIRECTORY = Path(__file__).parents[1] / "static"

router = APIRouter(include_in_schema=False)


@router.get("/")
async def page() -> FileResponse:
    """Shows the page, with which anyone can try the model."""
    return FileResponse(DIRECTORY / "index.html")
