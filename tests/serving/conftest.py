from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from phi4mm_jax.processing.tokenizer import Tokenizer
from phi4mm_jax.serving.grammar import Grammar, Grammars

VOCAB_SIZE = 1024
"""Of the bundled model; more than its tokenizer has."""


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """The bundled model's."""
    return Tokenizer.from_checkpoint(Path(str(files("phi4mm_jax") / "assets" / "nano")))


@pytest.fixture(scope="session")
def eos(tokenizer: Tokenizer) -> list[int]:
    return [tokenizer.control_ids[name] for name in ("<|end|>", "<|endoftext|>")]


@pytest.fixture(scope="session")
def grammars(tokenizer: Tokenizer, eos: list[int]) -> Grammars:
    return Grammars(tokenizer, VOCAB_SIZE, eos)


@pytest.fixture(scope="session")
def draw(tokenizer: Tokenizer, eos: list[int]) -> Callable[[Grammar, int], list[int]]:
    """Draws an answer by random logits, which come to favour the end, so that there is one."""
    closing = [
        *eos,
        *(i for i in range(VOCAB_SIZE) if tokenizer.token_bytes(i) in (b'"', b"}", b"]", b"<|/tool_call|>")),
    ]

    def answer(grammar: Grammar, seed: int) -> list[int]:
        generator = np.random.default_rng(seed)
        constraint, drawn = grammar.constraint(), []
        for step in range(2000):
            mask = constraint.mask()
            assert mask.dtype == np.uint32 and mask.shape == (VOCAB_SIZE // 32,)
            allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
            logits = generator.gumbel(size=VOCAB_SIZE)
            logits[closing] += max(step - 60, 0) / 10
            token = int(allowed[np.argmax(logits[allowed])])
            constraint.accept(token)
            if token in eos:
                return drawn
            drawn.append(token)
        raise AssertionError(f"no end: {tokenizer.decode(drawn)[:500]!r}")

    return answer
