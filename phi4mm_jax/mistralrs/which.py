"""Which model to run."""

from __future__ import annotations

import dataclasses
from enum import Enum

from phi4mm_jax.mistralrs.absent import Absent, refuse

Architecture = Enum(
    "Architecture",
    "Mistral Gemma Mixtral Llama Phi2 Phi3 Qwen2 Gemma2 Starcoder2 Phi3_5MoE DeepseekV2 DeepseekV3 Qwen3 GLM4 GLM4Moe "
    "GLM4MoeLite Qwen3Moe SmolLm3 GraniteMoeHybrid GptOss Qwen3Next Lfm2 Lfm2Moe HunYuanDenseV1 HunYuanMoEV1",
    module=__name__,
)
"""Text models. Phi-4-multimodal is none of them."""

MultimodalArchitecture = Enum(
    "MultimodalArchitecture",
    "Phi3V Idefics2 LLaVANext LLaVA Lfm2Vl VLlama Qwen2VL Idefics3 MiniCpmO Phi4MM Qwen2_5VL Gemma3 Mistral3 Llama4 "
    "Gemma3n Qwen3VL Qwen3VLMoE Qwen3_5 Qwen3_5Moe Qwen4Exp Voxtral Gemma4 MuseGlimmer DiffusionGemma",
    module=__name__,
)
"""Multimodal models, of which Phi4MM is here."""

VisionArchitecture = MultimodalArchitecture
"""Its name in older scripts."""


class IsqOrganization(Enum):
    """What in-situ quantization takes."""

    Default = "default"
    MoQE = "moqe"


class ModelDType(Enum):
    """Number format of the weights that are not quantized."""

    Auto = None
    BF16 = "bfloat16"
    F16 = "float16"
    F32 = "float32"


class Which:
    """The ways to name a model: `Which.MultimodalPlain(...)`."""

    @dataclasses.dataclass(frozen=True)
    class Plain:
        """A checkpoint, for text; pictures and recordings are understood all the same."""

        model_id: str
        """A hub id, a directory, or "nano"."""
        arch: Architecture | None = None
        tokenizer_json: str | None = None
        topology: str | None = None
        organization: IsqOrganization | None = None
        write_uqff: str | None = None
        from_uqff: str | list[str] | None = None
        dtype: ModelDType = ModelDType.Auto
        imatrix: str | None = None
        calibration_file: str | None = None
        hf_cache_path: str | None = None
        matformer_config_path: str | None = None
        matformer_slice_name: str | None = None

        def __post_init__(self) -> None:
            _check("Which.Plain", self, arch=None)

    @dataclasses.dataclass(frozen=True)
    class MultimodalPlain:
        """A checkpoint."""

        model_id: str
        """A hub id, a directory, or "nano"."""
        arch: MultimodalArchitecture | None = None
        tokenizer_json: str | None = None
        topology: str | None = None
        write_uqff: str | None = None
        from_uqff: str | list[str] | None = None
        dtype: ModelDType = ModelDType.Auto
        max_edge: int | None = None
        calibration_file: str | None = None
        imatrix: str | None = None
        hf_cache_path: str | None = None
        matformer_config_path: str | None = None
        matformer_slice_name: str | None = None
        organization: IsqOrganization | None = None
        encoder_cache_memory_bytes: int | None = None

        def __post_init__(self) -> None:
            _check("Which.MultimodalPlain", self, arch=MultimodalArchitecture.Phi4MM)

    VisionPlain = MultimodalPlain
    """Its name in older scripts."""


_ABSENT = "Embedding XLora Lora GGUF XLoraGGUF LoraGGUF GGML XLoraGGML LoraGGML DiffusionPlain Speech".split()
for _name in _ABSENT:
    setattr(Which, _name, Absent(f"Which.{_name}", (), {}))


def _check(name: str, which: Which.Plain | Which.MultimodalPlain, **neutral: Enum | None) -> None:
    """Refuses everything but a checkpoint's name and dtype and what is `neutral`."""
    neutral |= {"model_id": which.model_id, "dtype": which.dtype, "organization": IsqOrganization.Default}
    settings = dataclasses.asdict(which)
    refuse(name, **{key: value for key, value in settings.items() if value != neutral.get(key)})
    if not isinstance(which.dtype, ModelDType):
        raise TypeError(f"{name}(dtype={which.dtype!r}): expected a ModelDType")
