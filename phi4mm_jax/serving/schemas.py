"""What the endpoints take: types and names. Ranges are checked where the values are used, conversations by `chat`."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from fastapi import UploadFile
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from phi4mm_jax.runtime.sampling import SamplingParams
from phi4mm_jax.serving.errors import refuse

MAX_FIELDS = 100
"""Most fields of one object; each that is not known costs an error."""
MAX_MESSAGES = 4096
"""Most messages of a conversation."""
MAX_BIASES = 1024
"""Most tokens of a `logit_bias`."""

Ignored = Any
"""The type of fields that clients send and that change nothing about an answer."""


class Fields(BaseModel):
    """A request's fields: of exactly these types, no others; null means that a field is not there."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        if len(fields) > MAX_FIELDS:
            raise ValueError(f"an object of {len(fields)} fields; at most {MAX_FIELDS} are accepted")
        return {k: v for k, v in fields.items() if v is not None}


class StreamOptions(Fields):
    """How an answer is streamed."""

    include_usage: bool = Field(False, description="End with a chunk without choices that holds the usage.")
    include_obfuscation: Ignored = None


class GrammarFields(Fields):
    """What an answer must follow, as mistral.rs has it."""

    type: Literal["regex", "lark", "json_schema"]
    value: str | dict[str, Any] = Field(description="A schema for json_schema, else text.")


class SchemaFields(Fields):
    """A JSON schema with a name."""

    name: str = ""
    description: Ignored = None
    definition: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool = Field(False, description="Refuse what a grammar cannot express, instead of leaving it out.")


class FormatFields(Fields):
    """Free text, any JSON object, or JSON that is valid under a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaFields | None = None


StopString = Annotated[str, Field(max_length=1000)]  # every token is compared with it
Texts = Annotated[list[str], Field(fail_fast=True)]
TokenIds = Annotated[list[int], Field(fail_fast=True)]


class AnswerFields(Fields):
    """What chat and plain completions have in common."""

    model: str | None = None
    n: int = Field(1, ge=1, le=128, description="Answers to each prompt.")
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float = Field(0.0, description="0, the default, takes the likeliest token.")
    top_p: float = 1.0
    top_k: int = Field(0, description="Draw from the k likeliest tokens; 0 for all.")
    min_p: float = Field(0.0, description="Drop tokens less likely than this share of the likeliest.")
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = Field(1.0, description="Divides the logits of tokens in prompt or answer.")
    logit_bias: dict[str, float] = Field(
        default_factory=dict, max_length=MAX_BIASES, description="Token id to -100 to 100."
    )
    seed: int | None = Field(None, description="Makes draws reproducible; choice i takes seed + i.")
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] = Field(default_factory=list)
    max_tokens: int | None = None
    min_tokens: int = Field(0, description="No end before this many tokens.")
    ignore_eos: bool = Field(False, description="Go on past the end of the answer.")
    grammar: GrammarFields | None = None
    user: Ignored = None

    @model_validator(mode="after")
    def _consistent(self) -> AnswerFields:
        if self.stream_options and not self.stream:
            raise refuse("stream_options", "goes with stream=true")
        return self

    def params(self, *, max_tokens: int | None, logprobs: int | None) -> list[SamplingParams]:
        """How each of the `n` answers is drawn.

        Raises:
          ApiError, SamplingError: a value is out of range.
        """
        if not all(re.fullmatch(r"[0-9]{1,9}", key) for key in self.logit_bias):
            raise refuse("logit_bias", "expected token ids as keys")
        common = {name: getattr(self, name) for name in _SAMPLING}
        common |= {"logit_bias": {int(token): bias for token, bias in self.logit_bias.items()}}
        first = SamplingParams(**common, seed=self.seed, max_tokens=max_tokens, logprobs=logprobs)
        if self.seed is None:
            return [first] * self.n
        seeds = [(self.seed + i) % 2**63 if i else self.seed for i in range(self.n)]
        return [SamplingParams(**common, seed=s, max_tokens=max_tokens, logprobs=logprobs) for s in seeds]


_SAMPLING = (
    *("temperature", "top_k", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"),
    *("stop", "min_tokens", "ignore_eos"),
)


def _known_role(message: Any) -> Any:
    """What OpenAI's newer models call developer is a system message."""
    is_developer = isinstance(message, dict) and message.get("role") == "developer"
    return {**message, "role": "system"} if is_developer else message


Message = Annotated[dict[str, Any], BeforeValidator(_known_role)]


class ChatFields(AnswerFields):
    """A chat completion."""

    messages: list[Message] = Field(
        min_length=1,
        max_length=MAX_MESSAGES,
        description="Messages of role system (or developer), user, assistant, tool. A user's content is a string, or a "
        "list of parts of type text, image_url, input_audio, audio_url, video_url.",
        examples=[[{"role": "user", "content": "What is 21 plus 84?"}]],
    )
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    response_format: FormatFields | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = Field(None, description="none, auto, required, or one function.")
    parallel_tool_calls: bool = True
    modalities: list[Literal["text"]] = Field(default_factory=list)
    store: Ignored = None
    metadata: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None
    prediction: Ignored = None

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives that are reported with each token; None without a report."""
        if self.top_logprobs is not None and not self.logprobs:
            raise refuse("top_logprobs", "goes with logprobs=true")
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= 20:
            raise refuse("top_logprobs", "expected 0 to 20")
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def limit(self) -> int | None:
        """Most tokens of the answer."""
        given = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(given) > 1:
            raise refuse("max_completion_tokens", "differs from max_tokens, its older name; give one of them")
        return next(iter(given), None)


class CompletionFields(AnswerFields):
    """A plain completion."""

    prompt: str | Texts | TokenIds | Annotated[list[TokenIds], Field(fail_fast=True)] = Field(
        description="Text in which control tokens are live, or token ids; or a list of these.",
        examples=["<|user|>What is 21 plus 84?<|end|><|assistant|>"],
    )
    max_tokens: int | None = 16
    echo: bool = Field(False, description="Begin the answer with the prompt.")
    logprobs: int | None = Field(None, description="Report this many alternatives with each token.")
    best_of: int | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """All prompts."""
        several = isinstance(self.prompt, list) and self.prompt and not isinstance(self.prompt[0], int)
        return self.prompt if several else [self.prompt]

    @model_validator(mode="after")
    def _possible(self) -> CompletionFields:
        if self.best_of not in (None, self.n):
            raise refuse("best_of", "is not supported; n answers may be asked for")
        if self.echo and self.logprobs is not None:
            raise refuse("echo", "does not go with logprobs: those of a prompt are not computed")
        if self.prompt == []:
            raise refuse("prompt", "the list is empty")
        return self


class AudioFields(BaseModel):
    """A recording to translate; the fields of a form are text, so that their types are not strict."""

    model_config = ConfigDict(extra="forbid")

    file: UploadFile = Field(description="A recording: WAV, FLAC, MP3, Ogg Vorbis, Opus, AIFF.")
    model: str | None = None
    prompt: str = Field("", description="Follows the instruction to the model.")
    temperature: float = 0.0
    response_format: Literal["json", "text", "verbose_json", "srt", "vtt"] = "json"


class TranscriptionFields(AudioFields):
    """A recording to write down."""

    language: str = Field("", description="ISO 639-1; the model finds out where it is not given.")
    stream: bool = False
    granularities: list[Literal["segment"]] = Field(default_factory=list, alias="timestamp_granularities[]")
    chunking_strategy: Literal["auto"] = "auto"


class TokenizeFields(Fields):
    """Text, or a conversation, to token ids."""

    model: str | None = None
    prompt: str | None = Field(None, description="Text in which control tokens are live.")
    messages: list[Message] | None = Field(None, max_length=MAX_MESSAGES, description="As for chat completions.")
    tools: list[dict[str, Any]] | None = None
    return_token_strs: bool = False


class DetokenizeFields(Fields):
    """Token ids to text."""

    model: str | None = None
    tokens: TokenIds
