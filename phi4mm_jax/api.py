"""The Python face: load a checkpoint, then generate, stream, or read logits."""

from __future__ import annotations

import dataclasses
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from phi4mm_jax.answer import Output, Piece, Usage
from phi4mm_jax.config import ConfigError, ModelConfig, RuntimeConfig, quantization_settings
from phi4mm_jax.processing.conversations import read_conversations
from phi4mm_jax.processing.processor import Processor
from phi4mm_jax.processing.prompt import ChatError, Prompt
from phi4mm_jax.runtime.calibration import calibrate
from phi4mm_jax.runtime.compilation import set_up_compilation
from phi4mm_jax.runtime.limits import answer_limit
from phi4mm_jax.runtime.memory import available_memory, plan_memory, return_freed_memory
from phi4mm_jax.runtime.mesh import create_mesh
from phi4mm_jax.runtime.placement import place, placed_shape
from phi4mm_jax.runtime.sampling import SamplingError, SamplingParams
from phi4mm_jax.runtime.scoring import score
from phi4mm_jax.runtime.steps import Steps, Weights
from phi4mm_jax.service import Request, Service
from phi4mm_jax.weights.hub import resolve
from phi4mm_jax.weights.loader import load
from phi4mm_jax.weights.saved import Manifest, Storage, restore, save

logger = logging.getLogger(__name__)

__all__ = ["Output", "Phi4MM", "Piece", "Usage"]

Message = Mapping[str, Any]
Input = str | Sequence[int] | Sequence[Message]
"""A raw prompt (control tokens live), token ids (placeholders expanded), or a conversation."""


class Phi4MM:
    """A loaded model."""

    def __init__(
        self,
        name: str,
        directory: Path,
        processor: Processor,
        steps: Steps,
        weights: Weights,
        progress: bool = False,
    ):
        """Joins the parts; `from_pretrained` is the usual way to get them.

        Args:
          name: what the model was asked for as.
          directory: where it was found.
          processor: makes prompts.
          steps: its programs.
          weights: what they run on.
          progress: print memory plans and how far saving is.
        """
        self.name, self.directory = name, directory
        self.processor, self.steps, self.weights = processor, steps, weights
        self._progress = progress
        self.service = self._new_service()

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        config: str | Path | RuntimeConfig = "auto",
        dtype: jax.typing.DTypeLike | None = None,
        quantize: str | int | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        progress: bool = True,
        **sections: Mapping[str, Any],
    ) -> Self:
        """Loads a checkpoint, in the hub's or transformers' layout, or what `save_pretrained` wrote.

        Args:
          name: a directory, or a hub id such as "microsoft/Phi-4-multimodal-instruct".
          revision: branch, tag or commit on the hub.
          config: "auto" (by device), a preset's name, a TOML file, or a `RuntimeConfig`.
          dtype: of the weights: "bfloat16", "float16" or "float32"; with "float32" activations, cache and products
            are float32 as well.
          quantize: hold the weights in few bits: "int8", "w8a8", "fp8", "int4", or a name of mistral.rs ("Q4K", 8) for
            the nearest of these; section `quantization` of the configuration says it in more detail.
          token: hub token; the environment's by default, none if False.
          local_files_only: never go to the network.
          progress: show progress while loading, and print the memory plan of each new batch shape (standard error).
          **sections: overrides of the configuration: `engine={"max_batch": 4}`.

        Raises:
          ConfigError: a setting or the checkpoint's config.json is wrong.
          HubError: the hub cannot be reached or has no such model.
          CheckpointError: tensors are missing, unknown or mis-shaped, or a saved model is damaged.
          MemoryPlanError: the weights and one row do not fit the device.
        """
        runtime = runtime_config(config, dtype, quantize, **sections)
        directory = resolve(str(name), revision=revision, token=token, local_files_only=local_files_only)
        saved = Manifest.read(directory)
        if saved:
            if (quantize or "quantization" in sections) and runtime.quantization != saved.quantization:
                raise ConfigError(f"{name}: was saved as {saved.quantization}; to quantize it anew load {saved.source}")
            runtime = dataclasses.replace(runtime, quantization=saved.quantization)
        model = ModelConfig.from_checkpoint(directory)
        processor = Processor.from_checkpoint(directory, model)
        mesh = create_mesh(runtime.mesh)
        set_up_compilation()
        steps = Steps(model, runtime, mesh)
        abstract = steps.abstract()
        smallest = plan_memory(steps, 1, runtime.engine.cache_buckets[0])
        smallest.check(available_memory(mesh.devices.flat[0]))
        if saved:
            shapes = {path: placed_shape(path, leaf, runtime.quantization) for path, leaf in abstract.items()}
            arrays = restore(directory, saved, shapes, progress=progress)
        else:
            arrays, _ = load(
                directory,
                model,
                abstract,
                lambda path, value: place(path, value, abstract[path], runtime.quantization),
                progress=progress,
            )
        return_freed_memory()
        return cls(str(name), directory, processor, steps, steps.pack(arrays), progress)

    def quantize(
        self,
        calibration: str | Path | Sequence[Sequence[Message]],
        form: str | int = "int4",
        **settings: Any,
    ) -> None:
        """Quantizes the model, in place, by what it computes on conversations: with less error than while loading.

        The decoder's projections are rounded by GPTQ, from the first layer to the last, everything else as
        `from_pretrained(quantize=...)` does it.

        Args:
          calibration: conversations with their answers, like those that the model is for, or a JSONL file of them, a
            line each: `{"messages": [...]}`. A hundred or two will do.
          form: as `quantize` of `from_pretrained`.
          **settings: of section `quantization`.

        Raises:
          ConfigError: a setting is wrong, or the model is quantized already.
          ChatError, MediaError, PromptError, RequestError: a conversation is wrong.
        """
        if self.steps.runtime.quantization.quantizes:
            raise ConfigError("quantize: the model is quantized already; load it without")
        runtime = runtime_config(self.steps.runtime, None, form, quantization=settings)
        conversations = read_conversations(calibration) if isinstance(calibration, (str, Path)) else calibration
        prompts = []
        for i, messages in enumerate(conversations):
            try:
                prompts.append(self.processor.conversation(messages, add_generation_prompt=False))
            except ValueError as error:
                raise type(error)(f"calibration[{i}]: {error}") from error
        self.service.release()
        leaves = self.steps.unpack(self.weights)
        self.service = self.weights = None  # what has been quantized is not kept
        try:
            calibrate(self.steps, leaves, prompts, runtime.quantization, self._progress)
            self.steps = Steps(self.steps.model, runtime, self.steps.mesh)
        finally:
            self.weights = self.steps.pack(leaves)
            self.service = self._new_service()

    def save_pretrained(self, path: str | Path, *, storage: Storage = "orbax") -> None:
        """Saves the model as it lies in memory, quantized or not; `from_pretrained(path)` only has to read it.

        Args:
          path: the directory to write, which must not exist or must be empty.
          storage: "orbax", or "safetensors", which other programs read too.

        Raises:
          CheckpointError: there is something at `path`.
        """
        save(
            Path(path),
            self.steps.unpack(self.weights),
            name=self.name,
            source=self.directory,
            quantization=self.steps.runtime.quantization,
            storage=storage,
            progress=self._progress,
        )

    def generate(
        self,
        inputs: Input | Sequence[Input],
        *,
        images: Sequence[Any] | None = None,
        audios: Sequence[Any] | None = None,
        tools: str | Sequence[Mapping[str, Any]] | None = None,
        **sampling: Any,
    ) -> Output | list[Output]:
        """Answers one input, or a list of inputs together.

        Args:
          inputs: a conversation (OpenAI-style messages), a raw prompt string, token ids, or a list of these. Rows of
            a list may mix text, images and speech; more than `engine.max_batch` take turns.
          images: pictures, in the order of the prompt's placeholders, or of the tags in messages without pictures of
            their own; for a list of inputs, one list per input.
          audios: recordings, likewise.
          tools: tools of a conversation, as in the OpenAI API.
          **sampling: fields of `SamplingParams`; for a list of inputs each may be a list with one value per input
            (for `stop`: a list of lists; a flat list of strings is shared).

        Returns:
          An `Output`, or a list of them in the order of the inputs.

        Raises:
          SamplingError, ChatError, MediaError, PromptError, RequestError, MemoryPlanError: before anything is run.
        """
        called = time.perf_counter()
        batched = _is_batch(inputs)
        rows = list(inputs) if batched else [inputs]
        columns = [_media_per_row(m, n, len(rows), batched) for m, n in ((images, "images"), (audios, "audios"))]
        asked = []
        for i, (row, *media) in enumerate(zip(rows, *columns, strict=True)):
            try:
                params = SamplingParams(**_row_of(sampling, i, len(rows), batched))
                asked.append(self._request(self._prompt(row, *media, tools), params, called))
            except ValueError as error:
                if not batched:
                    raise
                raise type(error)(f"inputs[{i}]: {error}") from error
        outputs = self.service.outputs(asked)
        return outputs if batched else outputs[0]

    def stream(
        self,
        inputs: Input,
        *,
        images: Sequence[Any] | None = None,
        audios: Sequence[Any] | None = None,
        tools: str | Sequence[Mapping[str, Any]] | None = None,
        **sampling: Any,
    ) -> Iterator[Piece]:
        """Answers one input piece by piece. Arguments and errors are those of `generate`.

        The model is first run when the iterator is advanced, where a MemoryPlanError may arise too. Closing the
        iterator early ends the request.
        """
        called = time.perf_counter()
        params = SamplingParams(**_known(sampling))
        asked = self._request(self._prompt(inputs, images, audios, tools), params, called, streaming=True)
        return (piece for _, piece in self.service.pieces([asked]))

    def logits(
        self,
        prompt: str | Sequence[int],
        *,
        images: Sequence[Any] | None = None,
        audios: Sequence[Any] | None = None,
    ) -> np.ndarray:
        """Logits of every position of a raw prompt or of token ids.

        Args:
          prompt: text with live control tokens and media tags, or ids with placeholders expanded.
          images: pictures, in placeholder order.
          audios: recordings, in placeholder order.

        Returns:
          float32 [T, V].

        Raises:
          MediaError, PromptError, RequestError, MemoryPlanError: before anything is run.
        """
        row = self.processor.raw(prompt, images=images or (), audios=audios or ())
        self.service.release()  # its cache makes room
        return score(self.steps, self.weights, row)

    # --- parts -----------------------------------------------------------------------------------------------

    def _prompt(self, inputs: Input, images: Sequence[Any] | None, audios: Sequence[Any] | None, tools: Any) -> Prompt:
        images, audios = (() if media is None else media for media in (images, audios))
        if _is_conversation(inputs):
            return self.processor.conversation(inputs, tools=tools, images=images, audios=audios)
        if tools is not None:
            raise ChatError("tools: go with a conversation; a raw prompt holds them itself")
        return self.processor.raw(inputs, images=images, audios=audios)

    def _request(self, prompt: Prompt, params: SamplingParams, called: float, streaming: bool = False) -> Request:
        """What is asked, once it is known to fit the context."""
        answer_limit(self.steps, prompt, params)
        return Request(prompt=prompt, params=params, streaming=streaming, called=called)

    def _new_service(self) -> Service:
        report = partial(print, "Memory plan:", file=sys.stderr) if self._progress else None
        return Service(self.steps, self.weights, self.processor.tokenizer, report=report)


def runtime_config(
    config: str | Path | RuntimeConfig,
    dtype: jax.typing.DTypeLike | None,
    quantize: str | int | None = None,
    **sections: Mapping[str, Any],
) -> RuntimeConfig:
    """The runtime configuration that `from_pretrained`'s arguments mean, for the devices at hand."""
    if isinstance(config, RuntimeConfig):
        runtime = config
    elif not isinstance(config, (str, Path)):
        raise ConfigError(f"config = {config!r}: expected 'auto', a preset's name, a TOML file or a RuntimeConfig")
    else:
        runtime = RuntimeConfig.load(config)
    if quantize is not None:
        settings, form = quantization_settings(quantize)
        if str(quantize) != form:
            logger.warning("quantize = %r: taken as %s, the nearest format there is", quantize, form)
        runtime = runtime.override(quantization=settings)
    runtime = runtime.override(**sections)
    if dtype is None:
        return runtime
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        raise ConfigError(f"dtype = {dtype!r}: expected bfloat16, float16 or float32") from None
    everything = {"activations": name, "kv_cache": name, "matmul_precision": "highest"} if name == "float32" else {}
    return runtime.override(dtypes={"params": name, **everything})


def _is_conversation(inputs: Any) -> bool:
    """Whether an input is a list of messages.

    Raises:
      ChatError: it is no input at all.
    """
    if not isinstance(inputs, (str, Sequence, np.ndarray)) or (isinstance(inputs, np.ndarray) and inputs.ndim == 0):
        raise ChatError(
            f"expected a conversation (a list of messages), a string or token ids, got {type(inputs).__name__}"
        )
    return not isinstance(inputs, str) and len(inputs) > 0 and isinstance(inputs[0], Mapping)


def _is_batch(inputs: Any) -> bool:
    """Whether this is a list of inputs: its members are strings, conversations or id lists, not messages or ids."""
    if not isinstance(inputs, (list, tuple)):
        return False
    return len(inputs) > 0 and not isinstance(inputs[0], (Mapping, int, np.integer))


def _known(sampling: dict[str, Any]) -> dict[str, Any]:
    names = [f.name for f in dataclasses.fields(SamplingParams)]
    for name in sampling:
        if name not in names:
            raise SamplingError(f"{name}: no such sampling setting; there are {', '.join(names)}")
    return sampling


def _row_of(sampling: dict[str, Any], i: int, rows: int, batched: bool) -> dict[str, Any]:
    """The settings of row `i`; in a batch, a list gives each row its own value."""
    settings = {}
    for name, value in _known(sampling).items():
        own = batched and isinstance(value, (list, tuple))
        if name == "stop" and own:  # a flat list of strings is shared by all rows
            own = not all(isinstance(v, str) for v in value)
        if own and len(value) != rows:
            raise SamplingError(f"{name}: has {len(value)} values for {rows} inputs")
        settings[name] = value[i] if own else value
    return settings


def _media_per_row(media: Sequence[Any] | None, name: str, rows: int, batched: bool) -> Sequence[Any]:
    """The media argument of each row."""
    if media is None or not batched:
        return [media] * rows
    if not isinstance(media, (list, tuple)) or not all(m is None or isinstance(m, (list, tuple)) for m in media):
        raise ChatError(f"{name}: expected one list per input")
    if len(media) != rows:
        raise ChatError(f"{name}: has {len(media)} lists for {rows} inputs; expected one list per input")
    return media
