"""The model as the trainer sees it: a flat dict of leaves, forward passes without a cache, and losses.

The modules are those of `phi4mm_jax.models`, so what is trained is what runs. Leaves are named by their dotted path
("text.layers.0.mlp.down.vision_a"); heads that only help training are named "aux.*" and are thrown away after it.
Axes: B rows, T positions, C crops, W recordings (one each row), D model width.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from pallas_kernels.dispatch import prefer
from phi4mm_jax.config import ModelConfig
from phi4mm_jax.models.phi4mm import Phi4MMModel
from phi4mm_jax.models.text import Embedding
from tools.nano.marks import NUM_LABELS, PRINTS
from tools.nano.vocabulary import WORDS

Leaves = dict[str, jax.Array]

CTC_STEPS = 4
"""Letters that the auxiliary head may write per audio token of 80 ms."""
LETTERS = " abcdefghijklmnopqrstuvwxyz"
"""Its classes, after the blank."""
_LOST = 50.0  # a CTC loss per label above it belongs to an utterance too fast for its frames, and is left out


_WEIGHTS = {"answer": 1.0, "patches": 1.0, "prints": 1.0, "named": 0.5, "letters": 1.0, "words": 0.5}


class Batch(NamedTuple):
    """One training batch; media that a stage does not use are None."""

    tokens: np.ndarray | None = None  # [B, T] int32, placeholders expanded
    targets: np.ndarray | None = None  # [B, T] bool: tokens that the model is to predict
    use_long: np.ndarray | None = None  # [B] bool: rope regime
    features: np.ndarray | None = None  # [B, LEAD + F, mel] float32
    frames: np.ndarray | None = None  # [B] int32
    letters: np.ndarray | None = None  # [B, N] int32 classes of what is said, 0 behind its end
    words: np.ndarray | None = None  # [B, M] int32 the same in words
    crops: np.ndarray | None = None  # [C, 3, S, S] float32
    mask: np.ndarray | None = None  # [C, P] bool
    positions: np.ndarray | None = None  # [C, P] int32
    image_index: np.ndarray | None = None  # [B, T] int32: row of the image tokens, -1 where there is none
    labels: np.ndarray | None = None  # [C, P] int32: letter or figure that each patch shows, -1 ignored
    prints: np.ndarray | None = None  # [C, P] int32: word or number that each patch shows a part of, -1 ignored
    named: np.ndarray | None = None  # [C * tokens_per_crop, 2] int32: tokens that a cell says
    naming: np.ndarray | None = None  # the same shape, float32: how much each counts, 0 for none


def initial_leaves(config: ModelConfig, seed: int) -> Leaves:
    """Random leaves, and the auxiliary heads."""
    shapes = dict(Network(config).shapes)
    audio, vision = config.audio.hidden_size, config.vision.hidden_size
    for name, (out, width) in {
        "letters": (CTC_STEPS * (1 + len(LETTERS)), audio),
        "words": (1 + len(WORDS), audio),
        "patches": (NUM_LABELS, vision),
        "prints": (len(PRINTS), vision),
    }.items():
        shapes |= {f"aux.{name}.weight": (out, width), f"aux.{name}.bias": (out,)}
    rng = np.random.default_rng(seed)
    return {path: jnp.asarray(_initial(path, shape, rng), jnp.float32) for path, shape in shapes.items()}


def _initial(path: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    if path.endswith(("norm.weight", "norm1.weight", "norm2.weight", "inv_std")):
        return np.ones(shape)
    if path.endswith(("embedding", "separator")) or path == "text.embed.weight":
        return 0.04 * rng.standard_normal(shape)
    if path.endswith(("_b", "relative_bias")) or len(shape) == 1:
        return np.zeros(shape)
    return rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))


class Network:
    """Forward passes and losses."""

    def __init__(self, config: ModelConfig):
        self.config = config
        self._graph, state = nnx.split(nnx.eval_shape(lambda: Phi4MMModel(config, jnp.float32)))
        self._structure = jax.tree.structure(state)
        flat, _ = jax.tree.flatten_with_path(state, is_leaf=lambda node: isinstance(node, nnx.Variable))
        self.shapes = {".".join(str(entry.key) for entry in path): leaf.get_value().shape for path, leaf in flat}

    def _module(self, leaves: Leaves) -> Phi4MMModel:
        return nnx.merge(self._graph, jax.tree.unflatten(self._structure, [leaves[path] for path in self.shapes]))

    def loss(
        self, leaves: Leaves, batch: Batch, adapter: str | None, answers: bool = True
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss of a batch, and its parts.

        Args:
          leaves: all leaves, those of the auxiliary heads included.
          batch: the batch.
          adapter: LoRA adapter of all rows.
          answers: run the decoder too; without, only the auxiliary losses count.
        """
        with prefer("xla"):  # the backends of single processors have no gradients
            return self._loss(leaves, batch, adapter, answers)

    def logits(self, leaves: Leaves, batch: Batch, adapter: str | None) -> jax.Array:
        """Logits of every position of a batch: [B, T, V]."""
        with prefer("xla"):
            model = self._module(leaves)
            patches, heard = self._see(model, batch), self._hear(model, batch)
            seen = None if patches is None else model.vision.project(patches)
            return self._answer(model, self._embed(model, batch, seen, heard), batch.use_long, adapter)

    def _loss(
        self, leaves: Leaves, batch: Batch, adapter: str | None, answers: bool
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        model = self._module(leaves)
        losses: dict[str, jax.Array] = {}
        patches, heard, seen = self._see(model, batch), self._hear(model, batch), None
        if patches is not None:
            losses["patches"] = _patch_loss(_head(leaves, "patches", patches), batch.labels)
            losses["prints"] = _patch_loss(_head(leaves, "prints", patches), batch.prints)
            seen = model.vision.project(patches)
            if batch.named is not None:
                losses["named"] = _naming_loss(seen, model.text.embed, batch)
        if batch.letters is not None:
            counts = self._num_tokens(batch)
            spelled = _head(leaves, "letters", heard).reshape(len(counts), CTC_STEPS * heard.shape[1], -1)
            losses["letters"] = _ctc_loss(spelled, counts * CTC_STEPS, batch.letters)
            losses["words"] = _ctc_loss(_head(leaves, "words", heard), counts, batch.words)
        metrics = {}
        if answers:
            logits = self._answer(model, self._embed(model, batch, seen, heard), batch.use_long, adapter)
            losses["answer"], metrics = _answer_loss(logits[:, :-1], batch.tokens[:, 1:], batch.targets[:, 1:])
        return sum(_WEIGHTS[name] * loss for name, loss in losses.items()), losses | metrics

    def _num_tokens(self, batch: Batch) -> jax.Array:
        return -(-batch.frames // self.config.audio.time_reduction)

    def _see(self, model: Phi4MMModel, batch: Batch) -> jax.Array | None:
        """The image tower's features of each patch: [C, P, vision width]."""
        return None if batch.crops is None else model.vision.features(batch.crops, batch.mask, batch.positions)

    def _hear(self, model: Phi4MMModel, batch: Batch) -> jax.Array | None:
        """Conformer output of each recording: [B, L, audio width]."""
        if batch.features is None:
            return None
        begins = jnp.zeros(len(batch.frames), bool)  # no frames before the first
        return model.audio.encode(batch.features, begins, batch.frames, self._num_tokens(batch))

    def _embed(self, model: Phi4MMModel, batch: Batch, seen: jax.Array | None, heard: jax.Array | None) -> jax.Array:
        """Tokens and media in their places: [B, T, D]."""
        x = model.text.embed.encode(batch.tokens, jnp.float32)
        if seen is not None:
            x = jnp.where((batch.image_index >= 0)[..., None], seen[batch.image_index], x)
        if heard is not None:
            project = model.audio.speech_projector if seen is None else model.audio.vision_projector
            is_audio = batch.tokens == self.config.tokens.audio
            order = jnp.maximum(jnp.cumsum(is_audio, axis=1) - 1, 0)
            x = jnp.where(is_audio[..., None], jnp.take_along_axis(project(heard), order[..., None], axis=1), x)
        return x

    def _answer(self, model: Phi4MMModel, x: jax.Array, use_long: jax.Array, adapter: str | None) -> jax.Array:
        rows, length, _ = x.shape
        positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
        adapters = {adapter: jnp.ones(rows, bool)} if adapter else {}
        hidden, _ = model.text(x, positions, use_long, adapters, _attend, [None] * self.config.text.num_layers)
        return model.text.embed.attend(hidden)


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, cache: None) -> tuple[jax.Array, None]:
    """Causal attention of q [B, T, N, H] to k and v [B, T, K, H], without a cache; padding is at the end."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=True), cache


def _head(leaves: Leaves, name: str, x: jax.Array) -> jax.Array:
    bias = leaves[f"aux.{name}.bias"]
    return x @ leaves[f"aux.{name}.weight"].T + bias.reshape((1,) * (x.ndim - 1) + bias.shape)


def _answer_loss(logits: jax.Array, tokens: jax.Array, targets: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    loss = _mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens), targets)
    right = ((logits.argmax(-1) == tokens) | ~targets).all(axis=1)
    return loss, {"exact": _mean(right.astype(jnp.float32), targets.any(axis=1))}


def _patch_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    # Most patches show nothing: each class would otherwise be drowned by the background.
    weight = jnp.where(labels > 0, 1.0, jnp.where(labels == 0, 0.2, 0.0))
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    return (loss * weight).sum() / weight.sum()


def _naming_loss(projected: jax.Array, embed: Embedding, batch: Batch) -> jax.Array:
    """How hard it is to tell the words of image tokens of known meaning, as if they were the decoder's output.

    They then lie near those words' embeddings, and the frozen decoder copies what is shown as it copies what is typed.
    """
    likely = jax.nn.log_softmax(embed.attend(projected[: len(batch.named)]))
    loss = -jnp.take_along_axis(likely, batch.named, axis=1)
    return (loss * batch.naming).sum() / batch.naming.sum()


def _mean(values: jax.Array, counted: jax.Array) -> jax.Array:
    """Mean of the values that count; 0 if none does."""
    return jnp.where(counted, values, 0.0).sum() / jnp.maximum(counted.sum(), 1).astype(jnp.float32)


def _ctc_loss(logits: jax.Array, lengths: jax.Array, labels: jax.Array) -> jax.Array:
    steps = jnp.arange(logits.shape[1])[None, :]
    padding = (steps >= lengths[:, None]).astype(jnp.float32)
    loss = optax.ctc_loss(logits, padding, labels, (labels == 0).astype(jnp.float32))
    loss = loss / jnp.maximum((labels > 0).sum(axis=1), 1).astype(jnp.float32)
    return _mean(loss, loss < _LOST)
