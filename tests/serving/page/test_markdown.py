"""What the page makes of the Markdown that models write."""

import pytest

from phi4mm_jax.demo import read_cases

expect = pytest.importorskip("playwright.sync_api").expect

SUM = read_cases()[0]

RENDER = """async (text) => {
  const { render } = await import("/static/markdown.js");
  const parent = document.createElement("div");
  render(parent, text);
  return parent.innerHTML;
}"""

GROW = """async () => {
  const { render } = await import("/static/markdown.js");
  const parent = document.createElement("div");
  render(parent, "one\\n\\ntw");
  const before = [...parent.children];
  render(parent, "one\\n\\ntwo\\n\\n- three");
  const same = [...parent.children].map((node, i) => node === before[i]);
  return [same, parent.innerHTML];
}"""

CASES = {
    "<img src=x onerror=alert(1)>": "<p>&lt;img src=x onerror=alert(1)&gt;</p>",
    "one\ntwo\n\nthree": "<p>one\ntwo</p><p>three</p>",
    "a **b *c*** `d **e**`": "<p>a <strong>b <em>c</em></strong> <code>d **e**</code></p>",
    "2 * 3 * 4, a_b_c, **": "<p>2 * 3 * 4, a_b_c, **</p>",
    r"\*no\* __yes__ _it_": "<p>*no* <strong>yes</strong> <em>it</em></p>",
    "# Top\ntext\n---": "<h3>Top</h3><p>text</p><hr>",
    "- a\n- b\n  1. c\n  2. d\n\n- e": "<ul><li>a</li><li>b<ol start='1'><li>c</li><li>d</li></ol></li><li>e</li></ul>",
    "3) x\n4) y\nend": "<ol start='3'><li>x</li><li>y\nend</li></ol>",
    "* a\n\ntext": "<ul><li>a</li></ul><p>text</p>",
    "[a](javascript:alert(1))": "<p>[a](javascript:alert(1))</p>",
}


@pytest.fixture(scope="module")
def page(browser, server):
    page = browser.new_page()
    page.goto(server)
    yield page
    page.close()


@pytest.mark.parametrize(("text", "html"), CASES.items())
def test_text_becomes_elements(page, text, html):
    assert page.evaluate(RENDER, text) == html.replace("'", '"')


def test_finished_blocks_stay_as_text_grows(page):
    same, html = page.evaluate(GROW)
    assert same == [True, False, False]
    assert html == "<p>one</p><p>two</p><ul><li>three</li></ul>"


def test_code_is_shown_as_it_is_and_copied(chat):
    chat.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    code = "if a < b:\n\n    print('**x**')\n# not a heading"
    chat.fake("So:\n```py", f"thon\n{code}\n```\nDone")
    chat.ask(SUM.prompt)
    figure = chat.page.get_by_role("figure")
    expect(figure.locator("figcaption > span")).to_have_text("python")
    assert figure.locator("code").text_content() == code
    figure.get_by_role("button", name="Copy").click()
    expect(figure.get_by_role("button")).to_have_text("Copied")
    assert chat.page.evaluate("navigator.clipboard.readText()") == code
    expect(chat.answer.locator(".text > p").last).to_have_text("Done")
