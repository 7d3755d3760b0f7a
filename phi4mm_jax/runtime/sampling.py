"""Sampling: per row, as data, so that no setting compiles anything.

A row's draw depends on its own seed and on how many tokens it has drawn, never on its neighbours. Thresholds (top-k,
top-p) are found by bisection over the bits of a float instead of a sort of the vocabulary: 32 passes of compare and
sum, exact, and cheap to compile on every target.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import reprlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

MAX_STOP_IDS = 8
MAX_LOGPROBS = 20
DEFAULT_MAX_TOKENS = 1024

SamplingKind = Literal["greedy", "full"]
"""Static choice of a compiled step: `greedy` is an argmax; `full` does everything that any row may ask for."""


class SamplingError(ValueError):
    """A sampling setting is out of range; the message names it and what is accepted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one answer is drawn."""

    temperature: float = 0.0
    """0 takes the likeliest token; larger is more random."""
    top_k: int = 0
    """Draw from the k likeliest tokens; 0 for all."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together hold this probability."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the likeliest."""
    presence_penalty: float = 0.0
    """Taken off the logit of every token that the answer already holds; -2 to 2."""
    frequency_penalty: float = 0.0
    """Taken off once per occurrence in the answer; -2 to 2."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt or answer; 1 for none."""
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    """Token id -> amount added to its logit; -100 to 100."""
    seed: int | None = None
    """Makes the draw reproducible; None takes a fresh one."""
    stop: str | Sequence[str] | None = ()
    """Strings that end the answer; they are not part of it."""
    max_tokens: int | None = None
    """Most tokens of the answer; None for 1024 or what the context leaves, if that is less."""
    min_tokens: int = 0
    """No stop token before this many."""
    logprobs: int | None = None
    """Report log-probabilities with this many alternatives per token, 0 to 20; None for no report."""
    ignore_eos: bool = False
    """Go on past stop tokens."""

    def __post_init__(self) -> None:
        """Checks every value.

        Raises:
          SamplingError: naming the field and what is accepted.
        """
        stop = (self.stop,) if isinstance(self.stop, str) else () if self.stop is None else self.stop
        if not isinstance(stop, Sequence) or not all(isinstance(s, str) and s for s in stop):
            raise SamplingError(f"stop = {reprlib.repr(self.stop)}: expected a non-empty string, or a list of them")
        object.__setattr__(self, "stop", tuple(stop))
        _number(self, "temperature", 0.0, 100.0)
        _integer(self, "top_k", 0)
        _number(self, "top_p", 0.0, 1.0, exclude_low=True)
        _number(self, "min_p", 0.0, 1.0)
        _number(self, "presence_penalty", -2.0, 2.0)
        _number(self, "frequency_penalty", -2.0, 2.0)
        _number(self, "repetition_penalty", 0.0, 100.0, exclude_low=True)
        _integer(self, "min_tokens", 0)
        if self.max_tokens is not None:
            _integer(self, "max_tokens", 1)
            if self.min_tokens > self.max_tokens:
                raise SamplingError(f"min_tokens = {self.min_tokens}: must not exceed max_tokens {self.max_tokens}")
        if self.logprobs is not None:
            _integer(self, "logprobs", 0, MAX_LOGPROBS)
        if self.seed is not None:
            _integer(self, "seed", -(2**63), 2**64 - 1)
        if not isinstance(self.ignore_eos, bool):
            raise SamplingError(f"ignore_eos = {reprlib.repr(self.ignore_eos)}: expected true or false")
        if not isinstance(self.logit_bias, Mapping):
            given = reprlib.repr(self.logit_bias)
            raise SamplingError(f"logit_bias = {given}: expected a mapping from token id to -100 to 100")
        for token, bias in self.logit_bias.items():
            whole = isinstance(token, numbers.Integral) and not isinstance(token, bool)
            number = isinstance(bias, numbers.Real) and not isinstance(bias, bool)
            if not whole or not number or not -100 <= bias <= 100:
                raise SamplingError(f"logit_bias = {reprlib.repr({token: bias})}: expected token id -> -100 to 100")

    @property
    def kind(self) -> SamplingKind:
        """The cheapest compiled step that can serve this."""
        plain = self.temperature == 0 and self.logprobs is None and not self.logit_bias
        penalised = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1
        return "greedy" if plain and not penalised else "full"


def _number(params: SamplingParams, name: str, low: float, high: float, exclude_low: bool = False) -> None:
    value = getattr(params, name)
    number = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value > high or value < low or (exclude_low and value == low):
        bound = f"more than {low:g}" if exclude_low else f"at least {low:g}"
        raise SamplingError(f"{name} = {reprlib.repr(value)}: expected a number of {bound} and at most {high:g}")
    object.__setattr__(params, name, float(value))


def _integer(params: SamplingParams, name: str, low: int, high: int | None = None) -> None:
    value = getattr(params, name)
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or value < low or (high is not None and value > high):
        limit = "" if high is None else f" and at most {high}"
        raise SamplingError(f"{name} = {reprlib.repr(value)}: expected an integer of at least {low}{limit}")
    object.__setattr__(params, name, int(value))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class SamplingState:
    """The settings and history of all rows, on device. B rows, V vocabulary."""

    temperature: jax.Array  # [B] float32
    top_k: jax.Array  # [B] int32
    top_p: jax.Array  # [B] float32
    min_p: jax.Array  # [B] float32
    presence: jax.Array  # [B] float32
    frequency: jax.Array  # [B] float32
    repetition: jax.Array  # [B] float32
    bias: jax.Array  # [B, V] float32
    seed: jax.Array  # [B, 2] uint32
    stop_ids: jax.Array  # [B, MAX_STOP_IDS] int32, -1 where unused
    min_tokens: jax.Array  # [B] int32
    max_tokens: jax.Array  # [B] int32
    in_prompt: jax.Array  # [B, V] bool
    counts: jax.Array  # [B, V] int32: occurrences in the answer
    drawn: jax.Array  # [B] int32: tokens drawn so far

    @classmethod
    def shapes(cls, batch: int, vocab_size: int) -> SamplingState:
        """The state's shapes for `batch` rows."""
        wide = {"bias": np.float32, "in_prompt": np.bool_, "counts": np.int32}
        integers = {"top_k", "min_tokens", "max_tokens", "drawn"}
        fields = {f.name: ((batch,), np.int32 if f.name in integers else np.float32) for f in dataclasses.fields(cls)}
        fields |= {name: ((batch, vocab_size), dtype) for name, dtype in wide.items()}
        fields |= {"seed": ((batch, 2), np.uint32), "stop_ids": ((batch, MAX_STOP_IDS), np.int32)}
        return cls(**{name: jax.ShapeDtypeStruct(*spec) for name, spec in fields.items()})

    @classmethod
    def row(
        cls, params: SamplingParams, prompt: np.ndarray, max_tokens: int, stop_ids: Sequence[int], vocab_size: int
    ) -> SamplingState:
        """One row's state, numpy, without the leading axis."""
        bias, in_prompt = np.zeros(vocab_size, np.float32), np.zeros(vocab_size, np.bool_)
        for token, amount in params.logit_bias.items():
            bias[token] = amount
        in_prompt[prompt] = True
        seed = secrets.randbits(64) if params.seed is None else params.seed % 2**64
        ids = np.full(MAX_STOP_IDS, -1, np.int32)
        ids[: len(stop_ids)] = stop_ids
        return cls(
            temperature=np.float32(params.temperature),
            top_k=np.int32(min(params.top_k, vocab_size)),
            top_p=np.float32(params.top_p),
            min_p=np.float32(params.min_p),
            presence=np.float32(params.presence_penalty),
            frequency=np.float32(params.frequency_penalty),
            repetition=np.float32(params.repetition_penalty),
            bias=bias,
            seed=np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32),
            stop_ids=ids,
            min_tokens=np.int32(params.min_tokens),
            max_tokens=np.int32(max_tokens),
            in_prompt=in_prompt,
            counts=np.zeros(vocab_size, np.int32),
            drawn=np.int32(0),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Logprobs:
    """Natural-log probabilities under the unmodified model distribution."""

    chosen: Any  # [...] float32
    top_ids: Any  # [..., MAX_LOGPROBS] int32
    top: Any  # [..., MAX_LOGPROBS] float32

    @classmethod
    def zeros(cls, batch: int, steps: int) -> Logprobs:
        """Room for `steps` tokens of `batch` rows."""
        wide = (batch, steps, MAX_LOGPROBS)
        return cls(jnp.zeros(wide[:2], jnp.float32), jnp.zeros(wide, jnp.int32), jnp.zeros(wide, jnp.float32))


def sample(
    logits: jax.Array,  # [B, V] float32
    state: SamplingState,
    running: jax.Array,  # [B] bool: rows whose history advances
    kind: SamplingKind,
    allowed: jax.Array | None = None,  # [B, V / 32] uint32: bit i of word w allows token 32 w + i; None for all
) -> tuple[jax.Array, jax.Array, Logprobs | None, SamplingState]:
    """Draws one token per row.

    Returns:
      Tokens [B] int32; whether each row may go on [B] bool (no stop token, below its limit); log-probabilities under
      kind `full`; and the state with the history advanced.
    """
    early = state.drawn < state.min_tokens
    logprobs = None
    unconstrained = logits
    if allowed is not None:
        logits = jnp.where(_unpacked(allowed, logits.shape[-1]), logits, -jnp.inf)
    if kind == "greedy":
        tokens = jnp.argmax(_without_stops(logits, state, early), axis=-1).astype(jnp.int32)
    else:
        normalised = jax.nn.log_softmax(unconstrained, axis=-1)
        top, top_ids = jax.lax.top_k(normalised, MAX_LOGPROBS)
        shaped = _without_stops(_penalise(logits, state), state, early)
        greedy = jnp.argmax(shaped, axis=-1)
        warm = _truncate(shaped / jnp.where(state.temperature > 0, state.temperature, 1.0)[:, None], state)
        drawn = jnp.argmax(warm + _gumbel(state, logits.shape[-1]), axis=-1)
        tokens = jnp.where(state.temperature > 0, drawn, greedy).astype(jnp.int32)
        chosen = jnp.take_along_axis(normalised, tokens[:, None], axis=-1)[:, 0]
        logprobs = Logprobs(chosen=chosen, top_ids=top_ids.astype(jnp.int32), top=top)
        rows = jnp.arange(tokens.shape[0])
        state = dataclasses.replace(state, counts=state.counts.at[rows, tokens].add(running.astype(jnp.int32)))
    state = dataclasses.replace(state, drawn=state.drawn + running.astype(jnp.int32))
    stopped = jnp.any(tokens[:, None] == state.stop_ids, axis=-1)
    return tokens, ~stopped & (state.drawn < state.max_tokens), logprobs, state


def _unpacked(bits: jax.Array, size: int) -> jax.Array:
    """The first `size` bits [B, size] bool of words [B, W] uint32, lowest first."""
    flags = bits[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[None, None, :] & 1
    return flags.reshape(bits.shape[0], -1)[:, :size] != 0


def _without_stops(logits: jax.Array, state: SamplingState, early: jax.Array) -> jax.Array:
    """Rules out stop tokens in rows that have not reached min_tokens."""
    rows = jnp.arange(logits.shape[0])[:, None]
    columns = jnp.where(state.stop_ids >= 0, state.stop_ids, logits.shape[-1])  # unused ones fall outside
    return logits.at[rows, columns].add(jnp.where(early, -jnp.inf, 0.0)[:, None], mode="drop")


def _penalise(logits: jax.Array, state: SamplingState) -> jax.Array:
    """Adds the bias, then the penalties for tokens already seen."""
    logits = logits + state.bias
    said = state.counts > 0
    seen = said | state.in_prompt
    repetition = state.repetition[:, None]
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(seen, repeated, logits)
    logits = logits - state.frequency[:, None] * state.counts.astype(jnp.float32)
    return logits - state.presence[:, None] * said.astype(jnp.float32)


def _truncate(logits: jax.Array, state: SamplingState) -> jax.Array:
    """Keeps the tokens that top-k, then top-p, then min-p allow; the rest become -inf."""
    vocab = logits.shape[-1]
    k = jnp.where(state.top_k > 0, state.top_k, vocab)
    floor = _highest_threshold(logits, lambda keep: jnp.sum(keep, axis=-1) >= k)
    logits = jnp.where(logits >= floor[:, None], logits, -jnp.inf)
    probabilities = jax.nn.softmax(logits, axis=-1)
    # At least the likeliest token stays, whatever rounding does to the sum.
    mass = jnp.minimum(state.top_p, jnp.sum(probabilities, axis=-1))

    def held(keep: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(keep, probabilities, 0.0), axis=-1) >= mass

    floor = jnp.where(state.top_p < 1, _highest_threshold(probabilities, held), 0.0)
    floor = jnp.maximum(floor, state.min_p * jnp.max(probabilities, axis=-1))
    return jnp.where(probabilities >= floor[:, None], logits, -jnp.inf)


def _highest_threshold(x: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The largest t [B] for which `enough(x >= t)` holds; x [B, V] float32, `enough` monotone in the kept set.

    Floats are ordered as integers once the lower half is flipped, so t is built bit by bit from the top.
    """
    ordered = _ordered_bits(x)

    def try_bit(i: jax.Array, threshold: jax.Array) -> jax.Array:
        candidate = threshold | (jnp.uint32(1) << (jnp.uint32(31) - i.astype(jnp.uint32)))
        return jnp.where(enough(ordered >= candidate[:, None]), candidate, threshold)

    threshold = jax.lax.fori_loop(0, 32, try_bit, jnp.zeros(x.shape[0], jnp.uint32))
    return _from_ordered_bits(threshold)


_SIGN = np.uint32(0x80000000)


def _ordered_bits(x: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits & _SIGN != 0, ~bits, bits | _SIGN)


def _from_ordered_bits(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(jnp.where(bits & _SIGN != 0, bits & ~_SIGN, ~bits), jnp.float32)


def _gumbel(state: SamplingState, vocab_size: int) -> jax.Array:
    """Gumbel noise [B, V] from each row's own seed and draw number."""

    def noise(seed: jax.Array, drawn: jax.Array) -> jax.Array:
        key = jax.random.wrap_key_data(seed, impl="threefry2x32")
        return jax.random.gumbel(jax.random.fold_in(key, drawn), (vocab_size,), jnp.float32)

    return jax.vmap(noise)(state.seed, state.drawn)
