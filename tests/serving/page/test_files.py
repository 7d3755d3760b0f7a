"""The files of the page, without a browser."""

import re
from importlib.resources import files
from urllib.parse import urljoin

import httpx
import pytest

STATIC = files("phi4mm_jax.serving") / "static"
SCRIPTS = sorted(path.name for path in STATIC.iterdir() if path.name.endswith(".js"))
TYPES = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}


def test_everything_that_the_page_names_is_served(server):
    page = httpx.get(server)
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    names = set(re.findall(r'(?:href|src)="([^#"]+)"', page.text))
    names |= {f"static/{name}" for name in SCRIPTS}
    assert {"static/chat.js", "static/style.css", "static/icon.svg"} <= names
    for name in names:
        response = httpx.get(urljoin(f"{server}/", name)).raise_for_status()
        assert response.headers["content-type"].partition(";")[0] == TYPES[name.rpartition(".")[2]]


@pytest.mark.parametrize("name", SCRIPTS)
def test_modules_import_each_other_by_names_that_are_there(name):
    source = (STATIC / name).read_text(encoding="utf-8")
    assert {*re.findall(r'from "\./(.*?)"', source)} <= {*SCRIPTS}


def test_nothing_is_asked_of_other_hosts():
    named = {url for path in STATIC.iterdir() for url in re.findall(r"https?://[^\s\"']*", path.read_text("utf-8"))}
    assert named <= {"http://www.w3.org/2000/svg"}
