"""What can be asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any

from phi4mm_jax.mistralrs.absent import refuse

Message = Mapping[str, Any]

_ABSENT = ("dry_multiplier", "dry_base", "dry_allowed_length", "dry_sequence_breakers", "adapter")
_NOT_IN_CHAT = (
    *("web_search_options", "enable_thinking", "max_tool_rounds", "tool_dispatch_url", "enable_code_execution"),
    *("enable_shell", "shell_skills", "agent_permission", "agent_approval_callback", "code_execution_permission"),
    *("session_id", "files", "input_files"),
)


def _refuse(request: ChatCompletionRequest | CompletionRequest, *names: str, **others: Any) -> None:
    settings = {name: getattr(request, name) for name in (*names, *_ABSENT)}
    refuse(type(request).__name__, **settings, **others)


class ToolChoice(Enum):
    """Whether tools may be called."""

    NoTools = "None"
    Auto = "Auto"


@dataclasses.dataclass(frozen=True)
class ChatCompletionRequest:
    """A conversation to continue. The fields are mistral.rs', and so are their defaults.

    Raises:
      NotImplementedError: for what mistral.rs has and this project has not.
    """

    messages: Sequence[Message] | str
    """As for `Phi4MM.generate`; a string is a user's message."""
    model: str
    """Is not looked at; the runner's methods take a `model_id`."""
    logprobs: bool = False
    n_choices: int = 1
    logit_bias: Mapping[int, float] | None = None
    top_logprobs: int | None = None
    """Alternatives per token if `logprobs`; None for 1."""
    max_tokens: int | None = None
    """None for 1024, or what the context leaves."""
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    stop_seqs: Sequence[str] | None = None
    temperature: float | None = None
    """None for 1; 0 takes the likeliest token."""
    top_p: float | None = None
    top_k: int | None = None
    stream: bool = False
    grammar: str | None = None
    """What the answer must match."""
    grammar_type: str | None = None
    """What it is: "regex", "lark", "json_schema" or "llguidance"."""
    min_p: float | None = None
    tool_schemas: Sequence[str] | None = None
    """Tools as in the OpenAI API, each as JSON."""
    tool_choice: ToolChoice | None = None
    dry_multiplier: float | None = None
    dry_base: float | None = None
    dry_allowed_length: int | None = None
    dry_sequence_breakers: Sequence[str] | None = None
    web_search_options: Any = None
    enable_thinking: bool | None = None
    truncate_sequence: bool = False
    """Leave out the beginning of a prompt that is too long, rather than refuse it."""
    reasoning_effort: str | None = None
    max_tool_rounds: int | None = None
    tool_dispatch_url: str | None = None
    enable_code_execution: bool = False
    enable_shell: bool = False
    shell_skills: Sequence[Any] | None = None
    agent_permission: Any = None
    agent_approval_callback: Callable[[Any], Any] | None = None
    code_execution_permission: Any = None
    session_id: str | None = None
    files: Sequence[Any] | None = None
    input_files: Sequence[Any] | None = None
    ignore_eos: bool = False
    adapter: Any = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.tool_choice, ToolChoice | None):
            raise TypeError(f"tool_choice = {self.tool_choice!r}: expected a ToolChoice")
        effort = self.reasoning_effort
        thinks = effort is not None and effort.strip().lower() not in ("off", "none")
        _refuse(self, *_NOT_IN_CHAT, reasoning_effort=effort if thinks else None)


@dataclasses.dataclass(frozen=True)
class CompletionRequest:
    """A raw prompt to continue. The fields are mistral.rs', and so are their defaults.

    Raises:
      NotImplementedError: for what mistral.rs has and this project has not.
    """

    prompt: str
    """Control tokens included."""
    model: str
    """Is not looked at; the runner's methods take a `model_id`."""
    best_of: int | None = 1
    """Keep so many of the `n_choices`, the likeliest first; None for all, as they were drawn."""
    echo_prompt: bool = False
    """Begin the text with the prompt."""
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = None
    max_tokens: int | None = None
    """None for 1024, or what the context leaves."""
    n_choices: int = 1
    stop_seqs: Sequence[str] | None = None
    temperature: float | None = None
    """None for 1; 0 takes the likeliest token."""
    top_p: float | None = None
    suffix: str | None = None
    """Ends the text; the model does not see it."""
    top_k: int | None = None
    grammar: str | None = None
    """What the answer must match."""
    grammar_type: str | None = None
    """What it is: "regex", "lark", "json_schema" or "llguidance"."""
    min_p: float | None = None
    tool_schemas: Sequence[str] | None = None
    tool_choice: ToolChoice | None = None
    dry_multiplier: float | None = None
    dry_base: float | None = None
    dry_allowed_length: int | None = None
    dry_sequence_breakers: Sequence[str] | None = None
    truncate_sequence: bool = False
    """Leave out the beginning of a prompt that is too long, rather than refuse it."""
    ignore_eos: bool = False
    adapter: Any = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        _refuse(self, "tool_schemas", "tool_choice")
