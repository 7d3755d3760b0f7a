"""The chat page in a real browser, on a real server with the bundled model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, Request, Route

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-component-update"),
    *("--disable-background-networking", "--disable-sync"),
    *("--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"),  # a microphone that beeps
]


class Chat:
    """The page, as its user has it."""

    def __init__(self, page: Page):
        from playwright.sync_api import expect

        self.page, self._expect = page, expect
        self.message = page.get_by_role("textbox", name="Message", exact=True)
        self.status, self.tray = page.locator("#status"), page.locator("#tray li")
        self.turns, self.answer = page.locator(".turn"), page.locator(".answer").last
        self.problem = self.answer.get_by_role("alert")
        self.bodies: list[dict[str, Any]] = []
        """Of the completions that were asked for."""
        page.on("request", self._note)

    def _note(self, request: Request) -> None:
        if request.url.endswith("/chat/completions"):
            self.bodies.append(json.loads(request.post_data))

    def press(self, button: str) -> None:
        self.page.get_by_role("button", name=button, exact=True).click()

    def ask(self, words: str) -> None:
        self.message.fill(words)
        self.message.press("Enter")

    def attach(self, *paths: Path) -> None:
        before = self.tray.count()
        with self.page.expect_file_chooser() as chooser:
            self.press("Attach pictures or recordings")
        chooser.value.set_files(paths)
        self._expect(self.tray).to_have_count(before + len(paths))

    def set(self, **settings: Any) -> None:
        """Fills in the settings."""
        self.press("Settings")
        for name, value in settings.items():
            self.field(name).fill(str(value))
        self.page.keyboard.press("Escape")

    def field(self, name: str) -> Locator:
        return self.page.locator(f"#settings [name={name}]")

    def wait(self) -> None:
        """Until the answer has ended."""
        self._expect(self.answer).to_have_attribute("aria-busy", "false", timeout=60_000)

    def expect_answer(self, text: str) -> None:
        self.wait()
        self._expect(self.answer.locator(".text")).to_have_text(text)

    def fake(self, *answers: str, end: str = "data: [DONE]\n\n") -> None:
        """Answers in place of the server."""
        chunks = [{"choices": [{"delta": {"content": text}, "finish_reason": None}]} for text in answers]
        body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + end
        self.route(lambda route: route.fulfill(content_type="text/event-stream", body=body))

    def route(self, handler: Callable[[Route], None]) -> None:
        """Puts something between the page and the server's completions."""
        self.page.route("**/chat/completions", handler)


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """A Chromium, closed with the package: its event loop would be in the way of other tests."""
    sync_api = pytest.importorskip("playwright.sync_api")
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)}")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Browser, server: str) -> Iterator[Callable[..., Chat]]:
    """Opens the page as somebody else; in the end nobody's browser may have had anything to complain about."""
    contexts, complaints = [], []

    def open_page(url: str = server, may_fail: bool = False, **options: Any) -> Chat:
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()

        def hear(message: ConsoleMessage) -> None:
            # The browser itself notes every request that fails, as some are meant to.
            if not (may_fail and "Failed to load resource" in message.text):
                complaints.append(message.text)

        def watch(request: Request) -> None:
            if not request.url.startswith((f"{url}/", "data:")):
                complaints.append(f"went to {request.url}")

        page.on("console", hear)
        page.on("request", watch)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(url)
        return Chat(page)

    yield open_page
    for context in contexts:
        context.close()
    assert not complaints


@pytest.fixture
def chat(visit: Callable[..., Chat]) -> Chat:
    return visit()
