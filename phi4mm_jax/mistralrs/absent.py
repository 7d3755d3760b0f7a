"""What mistral.rs has and this project has not: all of it is here by name and says so when it is used."""

from __future__ import annotations

import reprlib
from os import PathLike
from typing import Any, NoReturn


def absent(what: str) -> NotImplementedError:
    """The error that names something that is not here."""
    return NotImplementedError(f"{what}: mistral.rs has this, phi4mm_jax has not")


def refuse(owner: str, **settings: Any) -> None:
    """Refuses every setting of something absent that asks for it.

    Args:
      owner: whose settings they are.
      **settings: values, None and False of which ask for nothing.

    Raises:
      NotImplementedError: naming the setting and its value.
    """
    for name, value in settings.items():
        if value is not None and value is not False:
            raise absent(f"{owner}({name}={reprlib.repr(value)})")


class Absent(type):
    """The type of classes that can be imported and compared with, and nothing more."""

    def __call__(cls, *_: Any, **__: Any) -> NoReturn:
        raise absent(cls.__qualname__)

    def __getattr__(cls, name: str) -> NoReturn:
        if name.startswith("__"):  # Python's own questions
            raise AttributeError(name)
        raise absent(f"{cls.__qualname__}.{name}")


class LoraAdapterError(ValueError):
    """Is never raised; an `except` clause may name it."""


CLASSES = {
    name: Absent(name, (), {})
    for name in """
    AgentPermission AgentToolApproval AgentToolApprovalDecision AgentToolApprovalDecisionKind AgentToolKind
    AgentToolMetadata AgentToolSource AgenticToolCallRecord AnyMoeConfig AnyMoeExpertType ApproximateUserLocation
    CalibrationStatus CodeExecutionConfig CodeExecutionPermission DiffusionArchitecture EmbeddingArchitecture
    EmbeddingRequest File FileSource ImageChoice ImageGenerationResponse ImageGenerationResponseFormat InputFile
    LoraAdapter LoraAdapterGeneration LoraAdapterInfo LoraResidentGenerationInfo LoraRuntimeStatus
    McpClientConfigPy McpServerConfigPy McpServerSourcePy NetworkMode PagedCacheType RequestedFile SandboxPolicy
    SearchContextSize ShellConfig ShellSkillMount SpeechGenerationResponse SpeechLoaderType WebSearchOptions
    WebSearchUserLocation
    """.split()
}
"""The classes that are absent."""


class AbsentMethods:
    """The methods of mistral.rs' `Runner` that are absent."""

    def send_embedding_request(self, request: Any, model_id: str | None = None) -> list[list[float]]:
        raise absent("Runner.send_embedding_request")

    def generate_image(
        self,
        prompt: str,
        response_format: Any,
        height: int = 720,
        width: int = 1280,
        model_id: str | None = None,
        save_file: str | None = None,
    ) -> Any:
        raise absent("Runner.generate_image")

    def generate_audio(self, prompt: str, model_id: str | None = None) -> Any:
        raise absent("Runner.generate_audio")

    def begin_calibration(self, model_id: str | None = None) -> Any:
        raise absent("Runner.begin_calibration")

    def calibration_status(self, model_id: str | None = None) -> Any:
        raise absent("Runner.calibration_status")

    def apply_calibration(self, save_cimatrix: str | None = None, model_id: str | None = None) -> Any:
        raise absent("Runner.apply_calibration")

    def load_lora_adapter(
        self,
        alias: str,
        adapter_dir: str | PathLike[str],
        model_id: str | None = None,
        load_inplace: bool = False,
        expected_generation: str | None = None,
    ) -> Any:
        raise absent("Runner.load_lora_adapter")

    def unload_lora_adapter(
        self, alias: str, model_id: str | None = None, expected_generation: str | None = None
    ) -> Any:
        raise absent("Runner.unload_lora_adapter")

    def list_lora_adapters(self, model_id: str | None = None) -> list[Any]:
        raise absent("Runner.list_lora_adapters")

    def lora_adapter_status(self, model_id: str | None = None) -> Any:
        raise absent("Runner.lora_adapter_status")

    def export_session(self, session_id: str, model_id: str | None = None) -> str | None:
        raise absent("Runner.export_session")

    def import_session(self, session_id: str, session_json: str, model_id: str | None = None) -> None:
        raise absent("Runner.import_session")

    def delete_session(self, session_id: str, model_id: str | None = None) -> bool:
        raise absent("Runner.delete_session")

    def list_session_ids(self, model_id: str | None = None) -> list[str]:
        raise absent("Runner.list_session_ids")

    def find_file(self, file_id: str) -> Any:
        raise absent("Runner.find_file")
