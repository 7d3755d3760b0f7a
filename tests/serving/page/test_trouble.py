"""What the page says when something is wrong, and how to go on."""

import pytest

from phi4mm_jax.demo import read_cases

expect = pytest.importorskip("playwright.sync_api").expect

SUM = read_cases()[0]


def test_an_error_is_told_and_can_be_tried_again(visit):
    chat = visit(may_fail=True)
    chat.set(max_tokens=1_000_000)
    chat.ask(SUM.prompt)
    expect(chat.problem).to_contain_text("max_tokens")
    chat.set(max_tokens="")
    chat.press("Try again")
    chat.expect_answer(SUM.expected)
    expect(chat.problem).to_have_count(0)
    expect(chat.turns).to_have_count(2)


def test_a_lost_server_is_told_and_found_again(visit):
    chat = visit(may_fail=True)
    expect(chat.status).to_have_text("nano")
    chat.page.context.set_offline(True)
    chat.ask(SUM.prompt)
    expect(chat.problem).to_have_text("The server cannot be reached.")
    expect(chat.status).to_have_text("The server cannot be reached")
    chat.page.context.set_offline(False)
    expect(chat.status).to_have_text("nano")
    chat.press("Try again")
    chat.expect_answer(SUM.expected)


@pytest.mark.parametrize(
    ("end", "problem"),
    [("", "The connection ended before the answer was complete."), ('data: {"error": {"message": "no!"}}\n\n', "no!")],
)
def test_a_broken_answer_is_kept_and_told(chat, end, problem):
    chat.fake("half ", "an answer", end=end)
    chat.ask(SUM.prompt)
    chat.expect_answer("half an answer")
    expect(chat.problem).to_have_text(problem)


def test_the_key_is_asked_for(visit, start):
    with start(api_key="open sesame") as other:
        chat = visit(other.url, may_fail=True)
        expect(chat.status).to_have_text("An API key is needed")
        chat.ask(SUM.prompt)
        expect(chat.page.locator(".problem")).to_contain_text("API key")
        expect(chat.field("key")).to_be_focused()
        chat.page.keyboard.type("open sesame")
        chat.page.keyboard.press("Escape")
        expect(chat.status).to_have_text("nano")
        chat.press("Try again")
        chat.expect_answer(SUM.expected)


def test_a_warm_up_is_shown(visit):
    chat = visit(may_fail=True)
    chat.page.route("**/ready", lambda route: route.fulfill(status=503, body="{}"))
    chat.page.reload()
    expect(chat.status).to_have_text("The model is warming up")
    chat.page.unroute("**/ready")
    expect(chat.status).to_have_text("nano")
