"""Every compiled program. This is the only file with `jax.jit`.

A program takes the flat leaves of one tower (a tuple dispatches several times faster than a module), merges them
back inside, and is compiled once per combination of bucketed shapes. Axes: B rows of the batch, R prompts of one
prefill call, T tokens of a chunk, D width, V vocabulary, M media tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from pallas_kernels.observed import Observed
from pallas_kernels.partition import over
from pallas_kernels.products import einsum
from pallas_kernels.quantized import quantize
from phi4mm_jax.config import ModelConfig, RuntimeConfig
from phi4mm_jax.models.lora import RowAdapters
from phi4mm_jax.models.phi4mm import Phi4MMModel
from phi4mm_jax.runtime.kv_cache import (
    LayerCache,
    cache_shapes,
    copy_row,
    decode_attend,
    prefill_attend,
    resize,
    take_rows,
)
from phi4mm_jax.runtime.mesh import RULES, replicated, sharding
from phi4mm_jax.runtime.sampling import Logprobs, SamplingKind, SamplingState, sample
from phi4mm_jax.runtime.speculation import guess

Leaves = tuple[jax.Array, ...]

# XLA:CPU widens a bfloat16 gather to float32 and then moves that conversion out of the decode loop, where it becomes a
# float32 copy of the whole embedding, made anew by every dispatch.
_COMPILER_OPTIONS = {"cpu": {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}}

quantize_weight = jax.jit(quantize, static_argnames="form")
"""`quantize`, compiled once for each shape and format."""


class Weights(NamedTuple):
    """The placed weights of each tower, flat, in the order of `Steps.abstract`."""

    text: Leaves
    vision: Leaves
    audio: Leaves


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class DecodeState:
    """Everything that decoding carries from step to step, on device; donated to each program and returned."""

    caches: list[LayerCache]
    tokens: jax.Array  # [B] int32: drawn but not yet in the cache
    lengths: jax.Array  # [B] int32: positions in the cache
    use_long: jax.Array  # [B] bool: rope regime
    active: jax.Array  # [B] bool: rows that want more tokens
    sampling: SamplingState
    history: jax.Array | None  # [B, S] int32: tokens by position, where steps guess at the next ones


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Drawn:
    """Tokens drawn by one dispatch, in order: some columns for each step, -1 where a row drew none."""

    tokens: jax.Array  # [B, columns] int32
    logprobs: Logprobs | None  # [B, columns, ...]


class Steps:
    """The programs of one model under one runtime configuration."""

    def __init__(self, model: ModelConfig, runtime: RuntimeConfig, mesh: Mesh):
        """Declares the programs; nothing is compiled or allocated before the first call.

        Args:
          model: the architecture.
          runtime: dtypes and shapes.
          mesh: where arrays live.
        """
        self.model, self.runtime, self.mesh = model, runtime, mesh
        self.activation_dtype = jnp.dtype(runtime.dtypes.activations)
        module = nnx.eval_shape(lambda: Phi4MMModel(model, jnp.dtype(runtime.dtypes.params)))
        self._towers = {name: _Tower(getattr(module, name)) for name in Weights._fields}
        compile_step = partial(self._compile, donate=())
        self.encode_images = compile_step(self._encode_images)
        self.encode_audio = compile_step(self._encode_audio)
        self.place_media = self._compile(self._place_media, donate=(0,))
        self.prefill = self._compile(self._prefill, donate=(1,))
        self.prefill_observed = self._compile(self._prefill_observed, donate=(1,), static=("paths",))
        self.logits = compile_step(self._logits)
        self.install = self._compile(self._install, donate=(0,))
        self.begin = self._compile(self._begin, donate=(1,), static=("kind",))
        self.decode = self._compile(self._decode, donate=(1,), static=("kind",))
        self.copy_row = self._compile(self._copy_row, donate=(0,))
        self.resize = compile_step(self._resize, static=("batch", "length"))
        self._zeros = jax.jit(self._zeros_like, static_argnames=("batch", "length"))

    def _compile(self, step: Any, donate: tuple[int, ...], static: tuple[str, ...] = ()) -> Any:
        precision = self.runtime.dtypes.matmul_precision

        def traced(*args: Any, **kwargs: Any) -> Any:
            with jax.default_matmul_precision(precision), over(self.mesh, RULES):
                return step(*args, **kwargs)

        traced.__name__ = step.__name__.strip("_")
        platform = self.mesh.devices.flat[0].platform
        options = _COMPILER_OPTIONS.get(platform)
        return jax.jit(traced, donate_argnums=donate, static_argnames=static, compiler_options=options)

    # --- weights ---------------------------------------------------------------------------------------------

    def abstract(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Every leaf by its dotted path, with shape, dtype and sharding, before any quantization."""
        leaves = {}
        for name, tower in self._towers.items():
            for path, leaf, axes in zip(tower.paths, tower.leaves, tower.axes, strict=True):
                placed = sharding(self.mesh, leaf.shape, axes)
                leaves[f"{name}.{path}"] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed)
        return leaves

    def pack(self, arrays: Mapping[str, jax.Array]) -> Weights:
        """Orders placed leaves for the programs."""
        return Weights(*(tuple(arrays[f"{n}.{p}"] for p in t.paths) for n, t in self._towers.items()))

    def unpack(self, weights: Weights) -> dict[str, jax.Array]:
        """The leaves by their dotted paths: the inverse of `pack`."""
        return {
            f"{n}.{p}": leaf
            for (n, t), tower in zip(self._towers.items(), weights, strict=True)
            for p, leaf in zip(t.paths, tower, strict=True)
        }

    # --- state -----------------------------------------------------------------------------------------------

    def state_shapes(self, batch: int, length: int) -> DecodeState:
        """Shapes and shardings of the state of `batch` rows with `length` cache positions."""
        integer, flag = (jax.ShapeDtypeStruct((batch,), d) for d in (jnp.int32, jnp.bool_))
        rows = DecodeState(
            caches=[],
            tokens=integer,
            lengths=integer,
            use_long=flag,
            active=flag,
            sampling=SamplingState.shapes(batch, self.model.text.vocab_size),
            history=jax.ShapeDtypeStruct((batch, length), jnp.int32) if self.runtime.engine.guessed_tokens else None,
        )
        whole = replicated(self.mesh)
        rows = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=whole), rows)
        caches = cache_shapes(self.model.text, self.runtime.dtypes, self.mesh, batch, length)
        return dataclasses.replace(rows, caches=caches)

    def new_state(self, batch: int, length: int) -> DecodeState:
        """Allocates an empty state."""
        return self._zeros(batch=batch, length=length)

    def _zeros_like(self, batch: int, length: int) -> DecodeState:
        shapes = self.state_shapes(batch, length)
        return jax.tree.map(lambda s: jax.lax.with_sharding_constraint(jnp.zeros(s.shape, s.dtype), s.sharding), shapes)

    def _copy_row(
        self, caches: list[LayerCache], source: jax.Array, target: jax.Array, length: jax.Array
    ) -> list[LayerCache]:
        """Copies the first `length` positions of cache row `source` to row `target`."""
        return [(copy_row(k, source, target, length), copy_row(v, source, target, length)) for k, v in caches]

    def _resize(self, state: DecodeState, rows: jax.Array, batch: int, length: int) -> DecodeState:
        """The rows [batch] int32 of a state, -1 for an empty one, with `length` cache positions."""
        caches = [(resize(k, rows, length), resize(v, rows, length)) for k, v in state.caches]
        others = jax.tree.map(lambda a: take_rows(a, rows), dataclasses.replace(state, caches=[], history=None))
        history = None if state.history is None else resize(state.history[:, None], rows, length)[:, 0]
        shapes = self.state_shapes(batch, length)
        resized = dataclasses.replace(others, caches=caches, history=history)
        return jax.tree.map(lambda a, s: jax.lax.with_sharding_constraint(a, s.sharding), resized, shapes)

    # --- encoders --------------------------------------------------------------------------------------------

    def _encode_images(self, leaves: Leaves, crops: jax.Array, mask: jax.Array, position_ids: jax.Array) -> jax.Array:
        """Crops [C, 3, S, S] -> [C * tokens_per_crop + 2, D]: all tokens, then the two separators."""
        vision = self._towers["vision"].merge(leaves)
        return vision(crops.astype(self.activation_dtype), mask, position_ids)

    def _encode_audio(
        self,
        leaves: Leaves,
        features: jax.Array,
        continues: jax.Array,
        frames: jax.Array,
        num_keys: jax.Array,
        with_image: jax.Array,
    ) -> jax.Array:
        """Log-mel windows [W, LEAD + T, mel] -> [W * T/8, D]."""
        audio = self._towers["audio"].merge(leaves)
        tokens = audio(features.astype(self.activation_dtype), continues, frames, num_keys, with_image)
        return tokens.reshape(-1, tokens.shape[-1])

    def _place_media(self, media: jax.Array, embeddings: jax.Array, index: jax.Array) -> jax.Array:
        """Fills media [R, T, D] with embeddings [M, D] where index [R, T] is not negative."""
        return jnp.where((index >= 0)[..., None], embeddings[jnp.maximum(index, 0)].astype(media.dtype), media)

    def empty_media(self, rows: int, length: int) -> jax.Array:
        """A blank [R, T, D] for `place_media`."""
        shape = (rows, length, self.model.text.hidden_size)
        return jax.device_put(np.zeros(shape, self.activation_dtype), replicated(self.mesh))

    # --- decoder ---------------------------------------------------------------------------------------------

    @property
    def _attention_scale(self) -> float:
        return self.model.text.head_dim**-0.5

    def _prefill(
        self,
        leaves: Leaves,
        caches: list[LayerCache],
        tokens: jax.Array,  # [R, T] int32, right-padded
        media: jax.Array | None,  # [R, M, D] with M >= T, read where `is_media`
        is_media: jax.Array | None,  # [R, T] bool
        slots: jax.Array,  # [R] int32: cache row of each prompt
        starts: jax.Array,  # [R] int32: position of the chunk's first token
        wanted: jax.Array | None,  # [R] int32: index of the token in the chunk whose hidden state is returned
        use_long: jax.Array,  # [R] bool
        adapters: RowAdapters,
    ) -> tuple[list[LayerCache], jax.Array]:
        """Appends a chunk of R prompts to their rows; returns the caches and hidden states [R, 1, D], or all [R, T, D].

        One token instead of all saves most of the last layer: of the others it needs no more than keys and values.
        """
        text = self._towers["text"].merge(leaves)
        x = text.embed.encode(tokens, self.activation_dtype)
        if media is not None:
            x = jnp.where(is_media[..., None], media[:, : tokens.shape[1]], x)
        positions = starts[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
        attend = prefill_attend(
            slots, starts, scale=self._attention_scale, block_size=self.runtime.engine.prefill_block
        )
        hidden, caches = text(x, positions, use_long, adapters, attend, caches, wanted)
        return caches, hidden

    def _prefill_observed(
        self, leaves: Leaves, caches: list[LayerCache], *arguments: Any, valid: jax.Array, paths: frozenset[str]
    ) -> tuple[list[LayerCache], dict[str, jax.Array]]:
        """Prefills, and sums x x^T over the inputs x of some weights.

        Args:
          leaves: of the decoder.
          caches: as in `_prefill`.
          *arguments: the others of `_prefill`, all tokens wanted.
          valid: [R, T] bool, the positions that count.
          paths: weights, dotted, the tower left out.

        Returns:
          The caches, and path to float32 [K, K].
        """
        moments: dict[str, jax.Array] = {}

        def observed(path: str, leaf: jax.Array) -> jax.Array | Observed:
            def see(x: jax.Array) -> None:
                seen = jnp.where(valid[..., None], x, 0).reshape(-1, x.shape[-1])
                moments[path] = einsum("tj,tk->jk", seen, seen)

            return Observed(leaf, see) if path in paths else leaf

        watched = tuple(map(observed, self._towers["text"].paths, leaves))
        caches, _ = self._prefill(watched, caches, *arguments)
        return caches, moments

    def _logits(self, leaves: Leaves, hidden: jax.Array) -> jax.Array:
        """Hidden states [R, T, D] -> float32 [R, T, V]."""
        return self._towers["text"].merge(leaves).embed.attend(hidden)

    def _install(self, state: DecodeState, slot: jax.Array, row: SamplingState) -> DecodeState:
        """Gives row `slot` the settings of a new request."""
        sampling = jax.tree.map(lambda rows, new: rows.at[slot].set(new), state.sampling, row)
        return dataclasses.replace(state, sampling=sampling)

    def _begin(
        self,
        leaves: Leaves,
        state: DecodeState,
        slots: jax.Array,  # [R] int32; rows that only fill the call have slots beyond the batch
        hidden: jax.Array,  # [R, 1, D] of each prompt's last token
        lengths: jax.Array,  # [R] int32: prompt length
        use_long: jax.Array,  # [R] bool
        kind: SamplingKind,
        allowed: jax.Array | None = None,  # [R, V / 32] uint32: as in `sample`
        history: jax.Array | None = None,  # [R, S] int32: the prompts, where steps guess
    ) -> tuple[DecodeState, Drawn]:
        """Draws the token after a prefill and lets the rows decode."""
        logits = self._towers["text"].merge(leaves).embed.attend(hidden[:, 0])
        rows = jax.tree.map(lambda a: a[slots], state.sampling)
        tokens, goes_on, logprobs, rows = sample(logits, rows, jnp.ones(slots.shape, jnp.bool_), kind, allowed)

        def put(target: jax.Array, new: jax.Array) -> jax.Array:
            return target.at[slots].set(new, mode="drop")

        state = dataclasses.replace(
            state,
            tokens=put(state.tokens, tokens),
            lengths=put(state.lengths, lengths),
            use_long=put(state.use_long, use_long),
            active=put(state.active, goes_on),
            sampling=jax.tree.map(put, state.sampling, rows),
            history=None
            if history is None
            else put(state.history, history.at[jnp.arange(slots.shape[0]), lengths].set(tokens)),
        )
        return state, Drawn(tokens[:, None], jax.tree.map(lambda a: a[:, None], logprobs))

    def _decode(
        self,
        leaves: Leaves,
        state: DecodeState,
        keep: jax.Array,  # [B] bool: rows that the host has not ended
        steps: jax.Array,  # [B] int32: at most this many steps now
        adapters: RowAdapters,
        kind: SamplingKind,
        allowed: jax.Array | None = None,  # [B, V / 32] uint32: as in `sample`
    ) -> tuple[DecodeState, Drawn]:
        """Takes up to `steps` steps of every active row, or until no row can go on.

        A step draws a token, and one more for each guess in a row that turns out right. A row under the short rope
        factors that has filled their range sits out until the host has rebuilt it under the long ones. With tokens
        that are not allowed nothing is guessed, and rows with such take one step: the next ones depend on its token.
        """
        text, engine = self._towers["text"].merge(leaves), self.runtime.engine
        short_range = self.model.text.original_max_position_embeddings
        state = dataclasses.replace(state, active=state.active & keep)
        batch, guessed = state.tokens.shape[0], 0 if allowed is not None else engine.guessed_tokens
        columns = 1 + guessed
        limits = jnp.minimum(steps, max(engine.decode_steps, engine.stream_steps))

        def can_go_on(state: DecodeState) -> jax.Array:
            return state.active & (state.use_long | (state.lengths < short_range))

        def go_on(carry: tuple[jax.Array, DecodeState, Drawn]) -> jax.Array:
            step, state, _ = carry
            return jnp.any(can_go_on(state) & (step < limits))

        def advance(carry: tuple[jax.Array, DecodeState, Drawn]) -> tuple[jax.Array, DecodeState, Drawn]:
            step, state, drawn = carry
            runs = can_go_on(state) & (step < limits)
            tokens = state.tokens[:, None]
            if guessed:
                guesses = guess(state.history, state.lengths, guessed)
                tokens = jnp.concatenate([tokens, jnp.maximum(guesses, 0)], axis=1)
            x = text.embed.encode(tokens, self.activation_dtype)
            positions = state.lengths[:, None] + jnp.arange(columns, dtype=jnp.int32)[None, :]
            attend = decode_attend(state.lengths, runs, scale=self._attention_scale, block_size=engine.prefill_block)
            hidden, caches = text(x, positions, state.use_long, adapters, attend, state.caches)
            logits = text.embed.attend(hidden.reshape(batch * columns, -1)).reshape(batch, columns, -1)
            state = dataclasses.replace(state, caches=caches)
            for column in range(columns):
                tokens, goes_on, logprobs, sampling = sample(logits[:, column], state.sampling, runs, kind, allowed)
                new = Drawn(jnp.where(runs, tokens, -1), logprobs)
                drawn = jax.tree.map(partial(_put_column, at=step * columns + column), drawn, new)
                state = dataclasses.replace(
                    state,
                    tokens=jnp.where(runs, tokens, state.tokens),
                    lengths=state.lengths + runs.astype(jnp.int32),
                    active=jnp.where(runs, goes_on, state.active),
                    sampling=sampling,
                )
                if state.history is not None:
                    last = jnp.where(runs, state.lengths, state.history.shape[1] - 1)  # scratch, as in the cache
                    history = state.history.at[jnp.arange(batch), last].set(tokens)
                    state = dataclasses.replace(state, history=history)
                if column < guessed:
                    runs = runs & can_go_on(state) & (guesses[:, column] == tokens)
            return step + 1, state, drawn

        width = max(engine.decode_steps, engine.stream_steps) * columns
        logprobs = Logprobs.zeros(batch, width) if kind == "full" else None
        drawn = Drawn(jnp.full((batch, width), -1, jnp.int32), logprobs)
        _, state, drawn = jax.lax.while_loop(go_on, advance, (jnp.zeros((), jnp.int32), state, drawn))
        return state, drawn


def _put_column(columns: jax.Array, new: jax.Array, at: jax.Array) -> jax.Array:
    """Stores new [B, ...] as one of columns [B, N, ...]."""
    return jax.lax.dynamic_update_slice_in_dim(columns, new[:, None], at, axis=1)


class _Tower:
    """One tower's structure: how to turn flat leaves back into the module."""

    def __init__(self, module: nnx.Module):
        self._graph, state = nnx.split(module)
        self._structure = jax.tree.structure(state)
        flat, _ = jax.tree.flatten_with_path(state, is_leaf=lambda node: isinstance(node, nnx.Variable))
        self.paths = [".".join(str(entry.key) for entry in path) for path, _ in flat]
        self.leaves = [variable.get_value() for _, variable in flat]
        self.axes = [variable.get_metadata()["axes"] for _, variable in flat]

    def merge(self, leaves: Leaves) -> Any:
        """The module around (traced) leaves."""
        return nnx.merge(self._graph, jax.tree.unflatten(self._structure, leaves))
