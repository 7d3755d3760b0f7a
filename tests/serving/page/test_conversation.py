"""Asking, reading on, changing one's mind."""

import json
import re

import pytest

from phi4mm_jax.demo import read_cases

expect = pytest.importorskip("playwright.sync_api").expect

SUM = read_cases()[0]


def test_a_question_is_answered(chat):
    expect(chat.status).to_have_text("nano")
    chat.ask(SUM.prompt)
    chat.expect_answer(SUM.expected)
    expect(chat.page.locator(".question .text")).to_have_text(SUM.prompt)
    figures = chat.answer.locator(".figures")
    expect(figures).to_have_text(re.compile(r"^4 tokens( · [\d.,]+ tokens/s)? · 13 in the prompt$"))
    expect(chat.page.locator("#spoken")).to_have_text(SUM.expected)  # what screen readers are told
    expect(chat.message).to_have_value("")
    messages = [{"role": "user", "content": SUM.prompt}]
    streaming = {"stream": True, "stream_options": {"include_usage": True}}
    assert chat.bodies == [{"model": "nano", "messages": messages, **streaming}]


def test_it_goes_on_with_what_was_said(chat):
    chat.ask("Repeat after me: small door what train one")
    chat.expect_answer("small door what train one")
    chat.ask("Say that again.")
    expect(chat.turns).to_have_count(4)
    chat.expect_answer("small door what train one")
    assert [message["role"] for message in chat.bodies[1]["messages"]] == ["user", "assistant", "user"]


def test_settings_go_along_and_survive_a_reload(chat):
    given = {"temperature": 0.5, "top_p": 0.9, "top_k": 4, "max_tokens": 2, "seed": 7}
    chat.set(**given, system="Be brief.", key="secret")
    chat.page.reload()
    expect(chat.field("key")).to_have_value("secret")
    chat.ask("Say: forty seven eighty one fifty nine four")
    expect(chat.answer.locator(".figures")).to_contain_text("cut off at the limit of tokens · 2 tokens")
    assert chat.bodies[0].items() >= given.items()
    assert chat.bodies[0]["messages"][0] == {"role": "system", "content": "Be brief."}


def test_settings_are_forgotten_with_the_tab(chat):
    chat.set(key="secret")
    chat.page.close()
    assert "secret" not in json.dumps(chat.page.context.storage_state())


def test_the_last_message_can_be_changed(chat):
    chat.ask("What is 17 plus 53?")
    chat.expect_answer("70")
    chat.message.fill("half a thought")
    chat.press("Edit")
    expect(chat.message).to_have_value("What is 17 plus 53?")
    chat.page.keyboard.press("Escape")
    expect(chat.message).to_have_value("half a thought")
    chat.press("Edit")
    chat.ask(SUM.prompt)
    chat.expect_answer(SUM.expected)
    expect(chat.turns).to_have_count(2)
    assert len(chat.bodies[1]["messages"]) == 1


def test_an_answer_can_be_made_again(chat):
    chat.ask(SUM.prompt)
    chat.expect_answer(SUM.expected)
    with chat.page.expect_response("**/chat/completions"):
        chat.press("Regenerate")
    chat.expect_answer(SUM.expected)
    expect(chat.turns).to_have_count(2)
    assert chat.bodies[0] == chat.bodies[1]


def test_a_new_conversation_can_be_undone(chat):
    chat.ask(SUM.prompt)
    chat.expect_answer(SUM.expected)
    chat.press("New conversation")
    expect(chat.turns).to_have_count(0)
    expect(chat.page.locator("#welcome")).to_be_visible()
    chat.press("Undo")
    chat.expect_answer(SUM.expected)
    chat.press("New conversation")
    chat.ask("Add 18 and 18.")
    chat.expect_answer("36")
    assert len(chat.bodies[1]["messages"]) == 1


def test_a_reload_warns_if_there_is_a_conversation(chat):
    asked = []
    chat.page.on("dialog", lambda dialog: (asked.append(dialog.type), dialog.accept()))
    chat.page.reload()
    assert not asked
    chat.ask(SUM.prompt)
    chat.expect_answer(SUM.expected)
    chat.page.reload()
    assert asked == ["beforeunload"]
    expect(chat.turns).to_have_count(0)


@pytest.mark.parametrize("way", ["Stop", "Escape"])
def test_a_long_answer_streams_and_can_be_stopped(chat, way):
    def lengthen(route):
        route.continue_(post_data=json.dumps(json.loads(route.request.post_data) | {"ignore_eos": True}))

    chat.route(lengthen)
    chat.ask(SUM.prompt)
    expect(chat.answer.locator(".text")).to_contain_text(SUM.expected)
    expect(chat.answer).to_have_attribute("aria-busy", "true")
    if way == "Stop":
        chat.press("Stop")
    else:
        chat.page.keyboard.press(way)
    expect(chat.answer).to_have_attribute("aria-busy", "false")
    expect(chat.answer.locator(".figures")).to_have_text("stopped")
    expect(chat.answer.locator(".text")).to_contain_text(SUM.expected)
    expect(chat.page.get_by_role("button", name="Send")).to_be_visible()
    expect(chat.message).to_be_focused()
    chat.page.wait_for_function("async () => (await (await fetch('ready')).json()).running === 0", timeout=2000)
