"""Pictures and sound, however they come."""

import base64
import io

import numpy as np
import pytest
import soundfile
from PIL import Image

from phi4mm_jax.demo import read_cases

expect = pytest.importorskip("playwright.sync_api").expect

_, SPEECH, WORD, FIGURE, SPOKEN = read_cases()


@pytest.mark.parametrize("case", [SPEECH, WORD, FIGURE, SPOKEN], ids=lambda case: case.title)
def test_it_sees_and_hears(chat, case):
    chat.attach(*case.audios, *case.images)
    chat.ask(case.prompt)
    chat.expect_answer(case.expected)
    question = chat.page.locator(".question")
    expect(question.locator("img")).to_have_count(len(case.images))
    expect(question.locator("audio")).to_have_count(len(case.audios))
    expect(chat.tray).to_have_count(0)


def read_sound(part):
    assert part["type"] == "input_audio" and part["input_audio"]["format"] == "wav"
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(part["input_audio"]["data"])), always_2d=True)
    assert rate == 16_000 and samples.shape[1] == 1
    return samples[:, 0]


def test_sound_is_sent_as_one_channel_of_16_khz(chat, tmp_path):
    tone = np.sin(2 * np.pi * 1000 * np.arange(2 * 44_100) / 44_100)
    soundfile.write(tmp_path / "tone.wav", np.stack([0.5 * tone, 0 * tone], axis=1), 44_100)
    chat.fake("heard")
    chat.attach(tmp_path / "tone.wav")
    expect(chat.tray.locator(".name")).to_have_text("tone.wav, 0:02")
    chat.ask(SPEECH.prompt)
    chat.wait()
    part, words = chat.bodies[0]["messages"][0]["content"]
    assert words == {"type": "text", "text": SPEECH.prompt}
    samples = read_sound(part)
    wanted = 0.25 * np.sin(2 * np.pi * 1000 * np.arange(32_000) / 16_000)  # the mean of the channels
    assert samples.shape == wanted.shape
    assert np.abs(samples - wanted)[1000:-1000].max() < 0.01


def test_the_microphone_records(chat):
    chat.fake("heard")
    clock = chat.page.locator("#clock")
    chat.press("Record speech")
    expect(clock).to_have_text("0:01")
    chat.press("Discard")
    expect(clock).to_be_hidden()
    chat.press("Record speech")
    expect(clock).to_have_text("0:01")
    chat.press("Finish recording")
    expect(chat.tray.locator("audio")).to_be_visible()
    chat.press("Record speech")
    expect(clock).to_have_text("0:01")
    chat.press("Send")  # ends the second recording
    chat.wait()
    parts = chat.bodies[0]["messages"][0]["content"]
    assert len(parts) == 2
    for samples in map(read_sound, parts):
        assert 0.5 < len(samples) / 16_000 < 10
        assert np.abs(samples).max() > 0.01


def test_large_pictures_are_scaled_down(chat, tmp_path):
    for name in ("large.png", "large.jpg"):
        Image.new("RGB", (3000, 1500), "teal").save(tmp_path / name)
    chat.fake("seen")
    chat.attach(tmp_path / "large.png", tmp_path / "large.jpg", *WORD.images)
    chat.press("Send")
    chat.wait()
    urls = [part["image_url"]["url"] for part in chat.bodies[0]["messages"][0]["content"]]
    files = [base64.b64decode(url.partition(",")[2]) for url in urls]
    large = [Image.open(io.BytesIO(file)) for file in files[:2]]
    assert [(image.size, image.format) for image in large] == [((2048, 1024), "PNG"), ((2048, 1024), "JPEG")]
    assert files[2] == WORD.images[0].read_bytes()


BRING = """([event, data]) => {
  const transfer = new DataTransfer();
  const bytes = Uint8Array.from(atob(data), (sign) => sign.charCodeAt(0));
  transfer.items.add(new File([bytes], "figure.png", { type: "image/png" }));
  const options = { bubbles: true, cancelable: true };
  document.getElementById("text").dispatchEvent(event === "paste"
    ? new ClipboardEvent(event, { ...options, clipboardData: transfer })
    : new DragEvent(event, { ...options, dataTransfer: transfer }));
}"""


@pytest.mark.parametrize("event", ["paste", "drop"])
def test_pictures_come_by_paste_and_drop(chat, event):
    chat.page.evaluate(BRING, [event, base64.b64encode(FIGURE.images[0].read_bytes()).decode()])
    expect(chat.page.get_by_alt_text("figure.png")).to_be_visible()
    chat.ask(FIGURE.prompt)
    chat.expect_answer(FIGURE.expected)


def test_what_is_attached_can_be_taken_back(chat):
    chat.attach(*FIGURE.images, *WORD.images, *SPEECH.audios)
    chat.press(f"Remove {FIGURE.images[0].name}")
    chat.press(f"Remove {SPEECH.audios[0].name}")
    chat.ask(WORD.prompt)
    chat.expect_answer(WORD.expected)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("notes.txt", "notes.txt is neither a picture nor a recording."),
        ("broken.png", "broken.png is not a picture that this browser can read."),
        ("broken.wav", "broken.wav is not a recording that this browser can read."),
    ],
)
def test_files_of_no_use_are_refused(chat, tmp_path, name, problem):
    (tmp_path / name).write_text("hello")
    chat.page.locator("#files").set_input_files(tmp_path / name)
    expect(chat.page.locator("#notice")).to_have_text(problem)
    expect(chat.tray).to_have_count(0)
