"""The front door of processing: conversations, raw prompts and their media to a `Prompt`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from phi4mm_jax.config import ModelConfig
from phi4mm_jax.processing.audio import AUDIO_SOURCES, AudioSource, audio_features, load_audio
from phi4mm_jax.processing.chat import TAG, Kind, Medium, render, tag_kind
from phi4mm_jax.processing.images import IMAGE_SOURCES, ImageSource, image_features, load_image
from phi4mm_jax.processing.media import MediaLimits
from phi4mm_jax.processing.prompt import (
    AudioFeatures,
    ChatError,
    ImageFeatures,
    MediaError,
    Prompt,
    PromptError,
    TooLongError,
)
from phi4mm_jax.processing.tokenizer import Control, Tokenizer
from phi4mm_jax.processing.video import load_video

_FRAME_S = 0.01
"""Between two frames of audio features."""


class Processor:
    """Turns what a user hands in into what the model takes; nothing in it changes, so threads may share it."""

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: Tokenizer,
        limits: MediaLimits | None = None,
        max_tokens: int | None = None,
    ) -> None:
        """Builds the processor of one checkpoint.

        Args:
          config: of the model.
          tokenizer: of the model.
          limits: on media.
          max_tokens: most tokens of a prompt; what has more is refused as early as this can be told. None for any
            number.

        Raises:
          PromptError: the tokenizer lacks a placeholder token of the model.
        """
        self.config = config
        self.tokenizer = tokenizer
        self.limits, self.max_tokens = limits or MediaLimits(), max_tokens
        if max_tokens is not None:
            longest = min(self.limits.max_audio_seconds, max_tokens * config.audio.time_reduction * _FRAME_S)
            self.limits = dataclasses.replace(self.limits, max_audio_seconds=longest)
        self._placeholders: dict[str, Control] = {}
        for kind, token_id in (("image", config.tokens.image), ("audio", config.tokens.audio)):
            name = tokenizer.token_name(token_id)
            if name not in tokenizer.control_ids:
                raise PromptError(f"the tokenizer has no control token {token_id}, which is the model's {kind} token")
            self._placeholders[kind] = Control(name)

    @classmethod
    def from_checkpoint(cls, directory: str | Path, config: ModelConfig, limits: MediaLimits | None = None) -> Self:
        """Builds the processor with the tokenizer of a checkpoint directory."""
        return cls(config, Tokenizer.from_checkpoint(directory), limits)

    def conversation(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: str | Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        images: Sequence[ImageSource] | None = None,
        audios: Sequence[AudioSource] | None = None,
    ) -> Prompt:
        """Builds the prompt of an OpenAI-style conversation.

        Args:
          messages: see `chat.render`, as for `tools` and `add_generation_prompt`.
          tools: tools of the whole conversation.
          add_generation_prompt: end with the opening of the assistant's answer.
          images: pictures for the tags, such as `<|image_1|>`, of user messages that have no image parts; in order.
          audios: the same for recordings.

        Raises:
          ChatError: the conversation is malformed.
          MediaError: a picture, recording or video cannot be used.
          PromptError: text cannot be encoded.
          TooLongError: there are more than `max_tokens`.
        """
        rendered = render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            media=_media("image", images) + _media("audio", audios),
            limits=self.limits,
        )
        ids = self.tokenizer.encode_parts(map(self._without_tag, rendered.parts), self.max_tokens)
        media = [*rendered.images, *rendered.audios]
        if len(media) > self.limits.max_media:
            raise ChatError(f"messages: {len(media)} media; at most {self.limits.max_media} are accepted")
        features = self._features(media)
        images, audios = features[: len(rendered.images)], features[len(rendered.images) :]
        frames = sum(len(f) for f, medium in zip(images, rendered.images, strict=True) if medium.kind == "video")
        return dataclasses.replace(self._expanded(ids, images, audios), video_frames=frames)

    def raw(
        self,
        prompt: str | Sequence[int] | np.ndarray,
        images: Sequence[ImageSource] | None = None,
        audios: Sequence[AudioSource] | None = None,
    ) -> Prompt:
        """Builds a prompt without a chat template.

        Args:
          prompt: text in which control tokens are live and tags such as `<|image_1|>` are the places of media; or ids,
            used as they are, in which each image and audio token stands as a placeholder.
          images: pictures, in the order of their places.
          audios: recordings, in the order of their places.

        Raises:
          MediaError: a picture or a recording cannot be used.
          PromptError: placeholders and media do not fit, or an id is outside the vocabulary.
          TooLongError: there are more than `max_tokens`.
        """
        features = self._features(_media("image", images)), self._features(_media("audio", audios))
        if isinstance(prompt, str):
            text = TAG.sub(lambda tag: self._placeholders[tag_kind(tag[0])], prompt)
            return self._expanded(self.tokenizer.encode(text, allow_special=True, most=self.max_tokens), *features)
        return self._checked(prompt, *map(_joined, features))

    def _without_tag(self, part: str) -> str:
        """Returns the placeholder token for the place of a medium, and any other part as it is."""
        is_tag = isinstance(part, Control) and TAG.fullmatch(part)
        return self._placeholders[tag_kind(part)] if is_tag else part

    def _features(self, media: Sequence[Medium]) -> list[list[Any]]:
        """Reads media; an error says where in the input it lies."""
        features, tokens, begun = [], 0, time.monotonic()
        for medium in media:
            if time.monotonic() - begun > self.limits.total_s:
                raise MediaError(f"{medium.where}: the media before took the limit of {self.limits.total_s:g} s")
            try:
                features.append(self._features_of(medium))
            except MediaError as error:
                raise MediaError(f"{medium.where}: {error}") from error
            tokens += sum(f.num_tokens for f in features[-1])
            if self.max_tokens is not None and tokens > self.max_tokens:
                raise TooLongError(
                    f"{medium.where}: the media up to here take {tokens} tokens; there may be {self.max_tokens}"
                )
        return features

    def _features_of(self, medium: Medium) -> list[ImageFeatures] | list[AudioFeatures]:
        """Reads one medium; the frames of a video are pictures."""
        if medium.kind == "audio":
            return [audio_features(*load_audio(medium.source, self.limits), self.config.audio)]
        is_video = medium.kind == "video"
        pictures = load_video(medium.source, self.limits) if is_video else [load_image(medium.source, self.limits)]
        return [image_features(picture, self.config.vision) for picture in pictures]

    def _expanded(self, ids: list[int], images: list[list[ImageFeatures]], audios: list[list[AudioFeatures]]) -> Prompt:
        """Repeats each placeholder as often as its medium has tokens."""
        token_ids = np.asarray(ids, np.int32)
        repeats = np.ones(len(ids), np.intp)
        for kind, media in (("image", images), ("audio", audios)):
            places = token_ids == getattr(self.config.tokens, kind)
            if places.sum() != len(media):
                raise PromptError(f"the prompt has {places.sum()} {kind} placeholders for {len(media)} {kind}s")
            repeats[places] = [sum(f.num_tokens for f in features) for features in media]
        return self._checked(np.repeat(token_ids, repeats), _joined(images), _joined(audios))

    def _checked(
        self, ids: Sequence[int] | np.ndarray, images: list[ImageFeatures], audios: list[AudioFeatures]
    ) -> Prompt:
        try:
            token_ids = np.asarray(ids)
        except ValueError:
            raise PromptError("token ids: expected one flat list") from None
        if token_ids.ndim != 1 or not token_ids.size:
            raise PromptError("the prompt is empty" if not token_ids.size else "token ids: expected one flat list")
        if not np.issubdtype(token_ids.dtype, np.integer):
            raise PromptError(f"token ids: expected integers, got {token_ids.dtype}")
        vocabulary = self.config.text.vocab_size
        if token_ids.min() < 0 or token_ids.max() >= vocabulary:
            odd = token_ids[(token_ids < 0) | (token_ids >= vocabulary)][0]
            raise PromptError(f"token id {odd} is outside the vocabulary of 0 to {vocabulary - 1}")
        for kind, media in (("image", images), ("audio", audios)):
            found = int((token_ids == getattr(self.config.tokens, kind)).sum())
            expected = sum(medium.num_tokens for medium in media)
            if found != expected:
                raise PromptError(f"the prompt has {found} {kind} tokens, its {len(media)} {kind}s have {expected}")
        return Prompt(token_ids.astype(np.int32), tuple(images), tuple(audios))


def _joined(features: list[list[Any]]) -> list[Any]:
    return [f for of_medium in features for f in of_medium]


def _media(kind: Kind, sources: Sequence[Any] | None) -> list[Medium]:
    if sources is None:
        return []
    if not isinstance(sources, (list, tuple)):
        accepted = IMAGE_SOURCES if kind == "image" else AUDIO_SOURCES
        raise MediaError(f"{kind}s: expected a list, got {type(sources).__name__}; each of it is {accepted}")
    return [Medium(kind, source, f"{kind}s[{i}]") for i, source in enumerate(sources)]
