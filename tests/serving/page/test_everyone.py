"""The page for those who type, who listen, who have a phone; and safe for all of them."""

import pytest

from phi4mm_jax.demo import read_cases

expect = pytest.importorskip("playwright.sync_api").expect

SUM, SPEECH, WORD, FIGURE, _ = read_cases()

FOCUSED = """() => {
  const { activeElement: node } = document;
  if (node === document.body) return ["the browser's own controls", true];
  const seen = node.id === "text" ? node.closest(".card") : node; // the writer's card shows the focus
  return [node.ariaLabel ?? node.innerText.trim(), getComputedStyle(seen).outlineStyle !== "none"];
}"""

NAMELESS = """() => [...document.querySelectorAll("button, input:not([hidden]), select, textarea, audio, img, dialog")]
  .filter((node) => !node.ariaLabel && !node.innerText?.trim() && !node.labels?.length)
  .filter((node) => !node.hasAttribute("alt") && !node.hasAttribute("aria-labelledby"))
  .map((node) => node.outerHTML)"""

INTRUDE = """() => {
  document.body.append(Object.assign(document.createElement("script"), { text: "window.ran = true" }));
  return new Promise((resolve) => {
    document.body.append(Object.assign(new Image(), { src: "http://127.0.0.1:9/elsewhere.png", onerror: resolve }));
  }).then(() => true);
}"""


def test_the_keyboard_is_enough(chat):
    keyboard = chat.page.keyboard
    expect(chat.message).to_be_focused()
    keyboard.type("What is 17")
    keyboard.press("Shift+Enter")
    keyboard.type("plus 53?")
    expect(chat.message).to_have_value("What is 17\nplus 53?")
    keyboard.press("Control+A")
    keyboard.type(SUM.prompt)
    keyboard.press("Enter")
    chat.expect_answer(SUM.expected)
    expect(chat.message).to_be_focused()
    keyboard.press("ArrowUp")
    expect(chat.message).to_have_value(SUM.prompt)
    reached = {}
    for _ in range(13):
        keyboard.press("Tab")
        name, visible = chat.page.evaluate(FOCUSED)
        reached[name] = visible
    wanted = {"Conversation", "New conversation", "Settings", "Edit", "Copy", "Regenerate", "Cancel", "Send"}
    assert reached.keys() >= wanted | {"Attach pictures or recordings", "Record speech"}
    assert all(reached.values()), "the focus cannot be seen"
    chat.page.get_by_role("button", name="Settings", exact=True).focus()
    keyboard.press("Enter")
    expect(chat.page.get_by_role("dialog")).to_be_visible()
    keyboard.press("Escape")
    expect(chat.page.get_by_role("button", name="Settings", exact=True)).to_be_focused()


def test_everything_has_a_name(chat):
    chat.fake("So:\n```\ncode\n```")
    chat.attach(*WORD.images, *SPEECH.audios)
    chat.press("Send")
    chat.wait()
    chat.attach(*FIGURE.images, *SPEECH.audios)
    chat.press("Settings")
    assert not chat.page.evaluate(NAMELESS)


def test_it_fits_a_phone(visit):
    chat = visit(viewport={"width": 360, "height": 640}, is_mobile=True, has_touch=True)

    def check():
        assert chat.page.evaluate("[innerWidth, document.documentElement.scrollWidth]") == [360, 360]
        assert chat.page.evaluate("document.getElementById('scroller').scrollWidth") == 360
        box = chat.page.locator(".card").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360
        assert box["y"] >= 0 and box["y"] + box["height"] <= chat.page.viewport_size["height"]

    check()
    chat.attach(*WORD.images, *FIGURE.images, *SPEECH.audios)
    check()
    chat.message.fill("line\n" * 40)
    check()
    chat.fake("A " + "very" * 100 + " long word\n\n```python\n" + "x = 1  # wide " * 20 + "\n```")
    chat.page.get_by_role("button", name="Send").tap()
    chat.wait()
    check()
    chat.page.set_viewport_size({"width": 360, "height": 320})  # what the keyboard leaves
    check()
    chat.press("Settings")
    sizes = "[...document.querySelectorAll('input, textarea, select')].map((node) => getComputedStyle(node).fontSize)"
    assert set(chat.page.evaluate(sizes)) == {"16px"}  # phones zoom into smaller ones


@pytest.mark.parametrize(
    ("options", "look"),
    [
        ({"color_scheme": "light"}, ["rgb(250, 249, 247)", "slide"]),
        ({"color_scheme": "dark", "reduced_motion": "reduce"}, ["rgb(25, 26, 26)", "none"]),
    ],
)
def test_it_follows_the_system(visit, options, look):
    chat = visit(**options)
    chat.press("Settings")
    style = "getComputedStyle(document.querySelector('{}')).{}"
    body, dialog = style.format("body", "backgroundColor"), style.format("dialog", "animationName")
    assert chat.page.evaluate(f"[{body}, {dialog}]") == look


def test_the_policy_lets_nothing_else_in(visit, browser, server):
    policy = visit().page.reload().headers["content-security-policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
    page = browser.new_page()
    refused = []
    page.on("console", lambda message: refused.append(message.text.partition(" violates")[0]))
    page.goto(server)
    page.evaluate(INTRUDE)
    assert not page.evaluate("window.ran")
    assert refused == ["Executing inline script", "Loading the image 'http://127.0.0.1:9/elsewhere.png'"]
    page.close()
