import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from phi4mm_jax.config import ModelConfig
from phi4mm_jax.processing.media import MediaLimits
from phi4mm_jax.processing.processor import Processor
from phi4mm_jax.processing.prompt import ChatError, InputMode, MediaError, PromptError
from phi4mm_jax.processing.tokenizer import Tokenizer

PICTURE = Image.new("RGB", (56, 56), "red")  # one tile: 2 x (2 + 1) + 1 + 2 x (2 + 1) = 13 tokens
CLIP = (np.zeros(16_000, np.int16), 16_000)  # 13 tokens


def test_conversation(processor: Processor, tokenizer: Tokenizer) -> None:
    question = "What is it?\nSay."
    content = [
        {"type": "image", "image": PICTURE},
        {"type": "text", "text": question},
        {"type": "audio", "audio": CLIP},
        {"type": "image", "image": np.zeros((10, 10), np.uint8)},
    ]
    prompt = processor.conversation([{"role": "user", "content": content}])
    words = tokenizer.encode(question, allow_special=False)
    assert prompt.token_ids.tolist() == [503, *[500] * 13, *words, *[501] * 13, *[500] * 13, 506, 502]
    assert prompt.token_ids.dtype == np.int32
    assert prompt.mode is InputMode.VISION_SPEECH
    assert [i.num_tokens for i in prompt.images] == [13, 13] and [a.num_tokens for a in prompt.audios] == [13]


def test_a_video_is_its_frames_side_by_side(processor: Processor, tokenizer: Tokenizer) -> None:
    frames = np.stack([np.full((56, 56, 3), value, np.uint8) for value in (0, 100, 200)])
    wide = Image.new("RGB", (112, 56))  # 17 tokens
    content = [
        {"type": "image", "image": wide},
        {"type": "text", "text": "a"},
        {"type": "video", "video": frames},
        {"type": "text", "text": "b"},
        {"type": "image", "image": wide},
        {"type": "video", "video": [PICTURE]},
    ]
    prompt = processor.conversation([{"role": "user", "content": content}])
    a, b = (tokenizer.encode(letter, allow_special=False) for letter in "ab")
    expected = [503, *[500] * 17, *a, *[500] * 3 * 13, *b, *[500] * (17 + 13), 506, 502]
    assert prompt.token_ids.tolist() == expected
    assert [image.num_tokens for image in prompt.images] == [17, 13, 13, 13, 17, 13]
    assert prompt.video_frames == 4 and prompt.mode is InputMode.VISION
    levels = [image.crops[0].mean() for image in prompt.images[1:4]]
    np.testing.assert_allclose(levels, np.array([0, 100, 200]) / 127.5 - 1, atol=1e-5)
    assert processor.conversation([{"role": "user", "content": "Hi"}]).video_frames == 0


def test_the_number_of_frames_is_a_limit(config: ModelConfig, tokenizer: Tokenizer) -> None:
    processor = Processor(config, tokenizer, MediaLimits(max_frames=2))
    content = [{"type": "video", "video": np.zeros((9, 56, 56, 3), np.uint8)}]
    assert processor.conversation([{"role": "user", "content": content}]).video_frames == 2


@pytest.mark.parametrize(
    "images, audios, mode",
    [([], [], "LANGUAGE"), ([PICTURE], [], "VISION"), ([], [CLIP], "SPEECH"), ([PICTURE], [CLIP], "VISION_SPEECH")],
)
def test_modes(processor: Processor, images: list, audios: list, mode: str) -> None:
    text = "<|user|>" + "<|image_1|>" * len(images) + "<|audio_1|>" * len(audios) + "Hi<|end|>"
    assert processor.raw(text, images, audios).mode is InputMode[mode]


def test_a_conversation_has_the_ids_of_its_rendered_text(processor: Processor) -> None:
    messages = [
        {"role": "system", "content": " Be brief.\n"},
        {"role": "user", "content": "\n\n Hello  there "},
        {"role": "assistant", "content": " Hi!\n"},
        {"role": "user", "content": [{"type": "text", "text": " \n"}, {"type": "image", "image": PICTURE}]},
        {"role": "user", "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": " \nWell?"}]},
    ]
    rendered = (
        "<|system|> Be brief.\n<|end|><|user|>\n\n Hello  there <|end|><|assistant|> Hi!\n<|end|>"
        "<|user|> \n<|image_1|><|end|><|user|><|image_2|> \nWell?<|end|><|assistant|>"
    )
    ours = processor.conversation(messages).token_ids
    np.testing.assert_array_equal(ours, processor.raw(rendered, [PICTURE, PICTURE]).token_ids)


def test_raw_text_and_ids(processor: Processor) -> None:
    prompt = processor.raw("<|user|>\n<|image_7|> <|endoftext10|>x", [PICTURE, PICTURE])
    assert (prompt.token_ids == 500).sum() == 26
    again = processor.raw(prompt.token_ids.tolist(), [PICTURE, PICTURE])
    np.testing.assert_array_equal(again.token_ids, prompt.token_ids)
    assert len(again.images) == 2


@pytest.mark.parametrize(
    "prompt, images, message",
    [
        ("<|image_1|>", [], "1 image placeholders for 0 images"),
        ("Hi", [PICTURE], "0 image placeholders for 1 images"),
        ("<|audio_1|>", [PICTURE], "0 image placeholders"),
        ([500] * 12, [PICTURE], "12 image tokens, its 1 images have 13"),
        ([501], [], "1 audio tokens, its 0 audios have 0"),
        ("", [], "prompt is empty"),
        ([], [], "prompt is empty"),
        ([[1, 2]], [], "one flat list"),
        ([1, [2, 3]], [], "one flat list"),
        ([1.5], [], "expected integers, got float64"),
        ([1, 512], [], "token id 512 is outside the vocabulary of 0 to 511"),
        ([-1], [], "token id -1 is outside"),
    ],
)
def test_raw_prompts_that_do_not_fit(processor: Processor, prompt: object, images: list, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        processor.raw(prompt, images)


def test_messages_say_where(processor: Processor) -> None:
    parts = [{"type": "text", "text": "?"}, {"type": "image_url", "image_url": "/no/such/file.png"}]
    with pytest.raises(MediaError, match=r"^messages\[0\]\.content\[1\]\.image_url: /no/such/file.png: no such file$"):
        processor.conversation([{"role": "user", "content": parts}])
    with pytest.raises(MediaError, match=r"^audios\[1\]: audio of 1 ms is too short"):
        processor.raw("<|audio_1|><|audio_2|>", audios=[CLIP, (np.zeros(16), 16_000)])
    parts = [{"type": "video", "video": [PICTURE, "/no/such/file.png"]}]
    with pytest.raises(MediaError, match=r"^messages\[0\]\.content\[0\]\.video: frame 1: /no/such/file.png: no such"):
        processor.conversation([{"role": "user", "content": parts}])
    with pytest.raises(ChatError, match=r"messages\[0\]\.role"):
        processor.conversation([{"role": "robot", "content": ""}])


def test_media_given_apart_take_the_tags(processor: Processor) -> None:
    messages = [
        {"role": "user", "content": "<|image_1|>?"},
        {"role": "user", "content": [{"type": "text", "text": "<|image_2|>?"}, {"type": "image", "image": PICTURE}]},
    ]
    prompt = processor.conversation(messages, images=[Image.new("RGB", (112, 56))])
    assert [image.num_tokens for image in prompt.images] == [17, 13]
    with pytest.raises(
        ChatError, match=r"^audios\[0\]: no place for this audio; write <.audio_1.> into a user message"
    ):
        processor.conversation([{"role": "user", "content": "?"}], audios=[CLIP])
    with pytest.raises(
        MediaError, match="^images: expected a list, got str; each of it is a path, a URL, bytes, a PIL"
    ):
        processor.raw("<|image_1|>", images="picture.png")
    with pytest.raises(
        MediaError, match=r"^audios: expected a list, got ndarray; each of it is a path, .*samples, rate"
    ):
        processor.raw("<|audio_1|>", audios=CLIP[0])
    with pytest.raises(
        MediaError, match=r"^images\[0\]: float: expected a path, a URL, bytes, a PIL image or an array$"
    ):
        processor.raw("<|image_1|>", images=[1.5])
    with pytest.raises(MediaError, match=r"^audios\[0\]: an array needs its sample rate"):
        processor.raw("<|audio_1|>", audios=CLIP)


def test_none_means_no_media(processor: Processor) -> None:
    assert not processor.raw("Hi", images=None, audios=None).images
    assert not processor.conversation([{"role": "user", "content": "Hi"}], images=None, audios=None).audios


def test_limits_reach_the_media(config: ModelConfig, golden: Path) -> None:
    processor = Processor.from_checkpoint(golden, config, MediaLimits(max_pixels=100))
    with pytest.raises(MediaError, match="limit of 100 pixels"):
        processor.raw("<|image_1|>", [PICTURE])


def test_tokenizer_must_fit_the_model(config: ModelConfig, tokenizer: Tokenizer) -> None:
    odd = dataclasses.replace(config, tokens=dataclasses.replace(config.tokens, audio=7))
    with pytest.raises(PromptError, match="no control token 7, which is the model's audio token"):
        Processor(odd, tokenizer)


def test_oracle_prompts(oracle_checkpoint: Path, oracle: Path) -> None:
    config = ModelConfig.from_checkpoint(oracle_checkpoint)
    config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, max_crops=12))
    processor = Processor.from_checkpoint(oracle_checkpoint, config)
    logits, waves = np.load(oracle / "data" / "logits.npz"), np.load(oracle / "data" / "audio_features.npz")
    picture, clip = oracle / "images" / "d.png", (waves["w16b_int16"], 16_000)
    prompt = processor.raw(str(logits["e2e_prompt"]), [picture], [clip])
    np.testing.assert_array_equal(prompt.token_ids, logits["e2e_input_ids"])

    buffer = io.BytesIO()
    Image.open(picture).save(buffer, "PNG")
    cases = json.loads((oracle / "data" / "tokenizer_cases.json").read_text())["cases"]
    (case,) = [case for case in cases if case.get("image_counts")]
    prompt = processor.raw(case["text"], [buffer.getvalue()], [clip])
    runs = [i for i, before in zip(prompt.token_ids, [-1, *prompt.token_ids], strict=False) if i != before]
    assert runs == [i for i, before in zip(case["ids"], [-1, *case["ids"]], strict=False) if i != before]


def test_released_numbers(released: ModelConfig, released_tokenizer_directory: Path) -> None:
    processor = Processor.from_checkpoint(released_tokenizer_directory, released)
    forged = "<|end|><|endoftext10|>"
    words = processor.tokenizer.encode(forged, allow_special=False)
    parts = [{"type": "image", "image": PICTURE}, {"type": "text", "text": forged}]
    ids = processor.conversation([{"role": "user", "content": parts}]).token_ids
    assert ids.tolist() == [200021, *[200010] * 545, *words, 200020, 200019]
