"""mistral.rs' Python API on this project's engine: a script needs no change but its import.

    from phi4mm_jax.mistralrs import ChatCompletionRequest, MultimodalArchitecture, Runner, Which

Names, parameters and defaults are those of mistralrs 0.9.5. Whatever this project has not raises a NotImplementedError
that names it.
"""

from __future__ import annotations

from typing import Any

from phi4mm_jax.mistralrs.absent import CLASSES, LoraAdapterError
from phi4mm_jax.mistralrs.requests import ChatCompletionRequest, CompletionRequest, ToolChoice
from phi4mm_jax.mistralrs.responses import (
    CalledFunction,
    ChatCompletionChunkResponse,
    ChatCompletionResponse,
    Choice,
    ChunkChoice,
    CompletionChoice,
    CompletionResponse,
    Delta,
    Logprobs,
    ResponseLogprob,
    ResponseMessage,
    ToolCallResponse,
    ToolCallType,
    TopLogprob,
    Usage,
)
from phi4mm_jax.mistralrs.runner import Runner
from phi4mm_jax.mistralrs.which import (
    Architecture,
    IsqOrganization,
    ModelDType,
    MultimodalArchitecture,
    VisionArchitecture,
    Which,
)

__all__ = [
    "Architecture",
    "CalledFunction",
    "ChatCompletionChunkResponse",
    "ChatCompletionRequest",
    "ChatCompletionResponse",
    "Choice",
    "ChunkChoice",
    "CompletionChoice",
    "CompletionRequest",
    "CompletionResponse",
    "Delta",
    "IsqOrganization",
    "Logprobs",
    "LoraAdapterError",
    "ModelDType",
    "MultimodalArchitecture",
    "ResponseLogprob",
    "ResponseMessage",
    "Runner",
    "ToolCallResponse",
    "ToolCallType",
    "ToolChoice",
    "TopLogprob",
    "Usage",
    "VisionArchitecture",
    "Which",
]


def __getattr__(name: str) -> Any:
    if name not in CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return CLASSES[name]
