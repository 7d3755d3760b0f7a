"""mistral.rs' `Runner` on this project's engine."""

from __future__ import annotations

import functools
import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from phi4mm_jax.api import Phi4MM, runtime_config
from phi4mm_jax.config import ConfigError, quantization_settings
from phi4mm_jax.mistralrs.absent import AbsentMethods, refuse
from phi4mm_jax.mistralrs.answering import chat_chunks, chat_response, completion_response
from phi4mm_jax.mistralrs.asking import at_least, conversation, how_to_draw, to_answer
from phi4mm_jax.mistralrs.loading import check_layers, read_token
from phi4mm_jax.mistralrs.requests import ChatCompletionRequest, CompletionRequest, ToolChoice
from phi4mm_jax.mistralrs.responses import ChatCompletionChunkResponse, ChatCompletionResponse, CompletionResponse
from phi4mm_jax.mistralrs.structure import read_grammar, read_tool_schemas
from phi4mm_jax.mistralrs.which import Which
from phi4mm_jax.runtime.limits import check_length

if TYPE_CHECKING:
    from phi4mm_jax.serving.grammar import Grammars  # needs llguidance


class Runner(AbsentMethods):
    """A model that answers requests of any number of threads, which are batched together."""

    def __init__(
        self,
        which: Which.Plain | Which.MultimodalPlain,
        max_seqs: int = 32,
        no_kv_cache: bool = False,
        prefix_cache_n: int = 16,
        token_source: str = "cache",
        mtp_model: str | None = None,
        mtp_n_predict: int | None = None,
        chat_template: str | None = None,
        jinja_explicit: str | None = None,
        num_device_layers: list[str] | None = None,
        in_situ_quant: str | None = None,
        anymoe_config: Any = None,
        memory_goal: str | float | None = None,
        pa_blk_size: int | None = None,
        pa_cache_type: Any = None,
        no_paged_attn: bool = False,
        paged_attn: bool = False,
        seed: int | None = None,
        enable_search: bool = False,
        search_embedding_model: str | None = None,
        search_callback: Callable[[str], list[dict[str, str]]] | None = None,
        tool_callbacks: Mapping[str, Callable[[str, dict], str]] | None = None,
        mcp_client_config: Any = None,
        code_execution_config: Any = None,
        shell_config: Any = None,
    ) -> None:
        """Loads a model.

        Args:
          which: the model.
          max_seqs: most requests that are answered at a time; the device's preset may say less.
          no_kv_cache: not here.
          prefix_cache_n: 0 uses nothing of past requests; otherwise those whose rows of the cache are free are kept.
          token_source: where the hub's token is: "literal:TOKEN", "env:NAME", "path:FILE", "cache" or "none".
          mtp_model: not here, nor are the others that are not described.
          mtp_n_predict: see there.
          chat_template: see there; the model's own is built in.
          jinja_explicit: likewise.
          num_device_layers: one entry, "NUM" or "0:NUM" of at least all layers, is how the model runs anyway.
          in_situ_quant: holds the weights in few bits: "4", "8", "Q4K", ...; the nearest format that is here is taken.
          anymoe_config: see `mtp_model`.
          memory_goal: likewise; memory is taken as requests need it.
          pa_blk_size: likewise.
          pa_cache_type: likewise.
          no_paged_attn: attention is not paged anyway.
          paged_attn: see `mtp_model`.
          seed: makes what is drawn reproducible, for the same requests in the same order.
          enable_search: see `mtp_model`.
          search_embedding_model: likewise.
          search_callback: likewise.
          tool_callbacks: likewise.
          mcp_client_config: likewise.
          code_execution_config: likewise.
          shell_config: likewise.

        Raises:
          NotImplementedError: something that mistral.rs has and this project has not.
          ConfigError: a setting is wrong.
          HubError, CheckpointError, MemoryPlanError: as `Phi4MM.from_pretrained`.
        """
        refuse(
            "Runner",
            no_kv_cache=no_kv_cache,
            mtp_model=mtp_model,
            mtp_n_predict=mtp_n_predict,
            chat_template=chat_template,
            jinja_explicit=jinja_explicit,
            anymoe_config=anymoe_config,
            memory_goal=memory_goal,
            pa_blk_size=pa_blk_size,
            pa_cache_type=pa_cache_type,
            paged_attn=paged_attn,
            enable_search=enable_search,
            search_embedding_model=search_embedding_model,
            search_callback=search_callback,
            tool_callbacks=tool_callbacks,
            mcp_client_config=mcp_client_config,
            code_execution_config=code_execution_config,
            shell_config=shell_config,
        )
        if not isinstance(which, (Which.Plain, Which.MultimodalPlain)):
            raise TypeError(f"which = {which!r}: expected Which.MultimodalPlain(...) or Which.Plain(...)")
        self._which, self._token = which, read_token(token_source)
        self._quantize = in_situ_quant
        self._max_seqs = at_least(1, "max_seqs", max_seqs)
        self._prefix_cache = at_least(0, "prefix_cache_n", prefix_cache_n) > 0
        if num_device_layers is not None:
            check_layers(which.model_id, self._token, num_device_layers)
        self._seeds = None if seed is None else random.Random(seed)
        self._ids = itertools.count()
        self._lock = threading.Lock()
        self._model: Phi4MM | None = self._load()

    # --- requests --------------------------------------------------------------------------------------------

    def send_chat_completion_request(
        self, request: ChatCompletionRequest, model_id: str | None = None
    ) -> ChatCompletionResponse | Iterator[ChatCompletionChunkResponse]:
        """Answers a conversation.

        Args:
          request: the conversation, and how to answer it.
          model_id: the model, if given.

        Returns:
          The answers; with `request.stream`, an iterator over their parts, which begins when it is advanced, and ends
          the request when it is closed.

        Raises:
          ValueError: something is wrong with the request; it says what.
          MemoryPlanError: it needs more memory than there is.
        """
        logprobs = (1 if request.top_logprobs is None else request.top_logprobs) if request.logprobs else None
        choices = how_to_draw(request, logprobs, self._seeds)
        schemas, tools = read_tool_schemas(request.tool_schemas)
        if request.tool_choice is ToolChoice.NoTools:
            tools = ()
        model = self._get(model_id)
        grammar = read_grammar(request, lambda: self._grammars)
        prompt = model.processor.conversation(conversation(request.messages), tools=schemas)
        asked = to_answer(model, prompt, request, choices, grammar)
        if request.stream:
            return chat_chunks(model, asked, tools, self._head())
        return chat_response(model, model.service.outputs(asked), tools, self._head())

    def send_completion_request(self, request: CompletionRequest, model_id: str | None = None) -> CompletionResponse:
        """Continues a raw prompt. Arguments and errors are those of `send_chat_completion_request`."""
        kept = None if request.best_of is None else at_least(1, "best_of", request.best_of)
        choices = how_to_draw(request, None if kept is None or request.n_choices == 1 else 0, self._seeds)
        model = self._get(model_id)
        grammar = read_grammar(request, lambda: self._grammars)
        asked = to_answer(model, model.processor.raw(request.prompt), request, choices, grammar)
        return completion_response(request, model.service.outputs(asked), kept, self._head())

    def send_chat_completion_request_to_model(
        self, request: ChatCompletionRequest, model_id: str
    ) -> ChatCompletionResponse | Iterator[ChatCompletionChunkResponse]:
        return self.send_chat_completion_request(request, model_id)

    def send_completion_request_to_model(self, request: CompletionRequest, model_id: str) -> CompletionResponse:
        return self.send_completion_request(request, model_id)

    # --- text ------------------------------------------------------------------------------------------------

    def tokenize_text(
        self, text: str, add_special_tokens: bool, enable_thinking: bool | None, model_id: str | None = None
    ) -> list[int]:
        """Ids of a raw text, whose control tokens are live.

        Args:
          text: the text.
          add_special_tokens: makes no difference: this tokenizer has none to add.
          enable_thinking: makes none either.
          model_id: the model, if given.
        """
        return self._get(model_id).processor.tokenizer.encode(text, allow_special=True)

    def detokenize_text(self, tokens: Sequence[int], skip_special_tokens: bool, model_id: str | None = None) -> str:
        """The text of ids, with or without control tokens."""
        return self._get(model_id).processor.tokenizer.decode(tokens, skip_special=skip_special_tokens)

    def max_sequence_length(self, model_id: str | None = None) -> int:
        """Most tokens of prompt and answer together."""
        return check_length(self._get(model_id).steps, 1)

    # --- the model -------------------------------------------------------------------------------------------

    def list_models(self) -> list[str]:
        """The model's id, which is what it was asked for as."""
        return [self._which.model_id]

    def get_default_model_id(self) -> str:
        """The model's id."""
        return self._which.model_id

    def set_default_model_id(self, model_id: str) -> None:
        """Does nothing, as there is one model; any other id is an error."""
        self._check_id(model_id)

    def is_model_loaded(self, model_id: str) -> bool:
        """Whether this is the model, and loaded."""
        return self.get_model_status(model_id) == "loaded"

    def get_model_status(self, model_id: str) -> str | None:
        """One of "loaded" and "unloaded"; None if there is no such model."""
        return dict(self.list_models_with_status()).get(model_id)

    def list_models_with_status(self) -> list[tuple[str, str]]:
        """The model's id with "loaded" or "unloaded"."""
        return [(self._which.model_id, "loaded" if self._model else "unloaded")]

    def list_unloaded_models(self) -> list[str]:
        """The model's id, if it is not loaded."""
        return [model_id for model_id, status in self.list_models_with_status() if status == "unloaded"]

    def unload_model(self, model_id: str) -> None:
        """Frees the model's memory once everything has been answered; the next request loads it again."""
        self._check_id(model_id)
        with self._lock:
            if self._model:
                self._model.service.release()
            self._model = None

    def reload_model(self, model_id: str) -> None:
        """Loads the model if it is not loaded."""
        self._get(model_id)

    def remove_model(self, model_id: str) -> None:
        """Raises a ValueError: there is no other model."""
        self._check_id(model_id)
        raise ValueError(f"model_id = {model_id!r}: is the last model and cannot be removed; unload_model frees it")

    def send_re_isq(self, dtype: str, model_id: str | None = None) -> None:
        """Loads the model again, in another format; only if it was loaded with `in_situ_quant`."""
        quantization_settings(dtype)
        if self._quantize is None:
            raise ConfigError(f"dtype = {dtype!r}: the model was loaded without in_situ_quant")
        self.unload_model(self._which.model_id if model_id is None else model_id)
        self._quantize = dtype
        self._get(model_id)

    # --- parts -----------------------------------------------------------------------------------------------

    def _load(self) -> Phi4MM:
        runtime = runtime_config("auto", self._which.dtype.value, self._quantize)
        rows = min(self._max_seqs, runtime.engine.max_batch)
        runtime = runtime.override(engine={"max_batch": rows, "prefix_cache": self._prefix_cache})
        return Phi4MM.from_pretrained(self._which.model_id, config=runtime, token=self._token, progress=False)

    def _get(self, model_id: str | None) -> Phi4MM:
        if model_id is not None:
            self._check_id(model_id)
        with self._lock:
            self._model = self._model or self._load()
            return self._model

    @functools.cached_property
    def _grammars(self) -> Grammars:
        try:
            from phi4mm_jax.serving.grammar import Grammars
        except ImportError as error:
            raise ImportError(f"grammar: needs the extra serve, pip install 'phi4mm-jax[serve]' ({error})") from error
        model = self._get(None)
        return Grammars(model.processor.tokenizer, model.steps.model.text.vocab_size, model.steps.model.tokens.eos)

    def _check_id(self, model_id: str) -> None:
        if model_id != self._which.model_id:
            raise ValueError(f"model_id = {model_id!r}: no such model; there is {self._which.model_id!r}")

    def _head(self) -> dict[str, Any]:
        """What a response begins with."""
        return {
            "id": str(next(self._ids)),
            "created": int(time.time()),
            "model": self._which.model_id,
            "system_fingerprint": "local",
        }
