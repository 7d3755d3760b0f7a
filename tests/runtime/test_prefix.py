"""What a prompt can begin with of what the rows of the cache hold."""

import numpy as np
import pytest

from phi4mm_jax.processing.prompt import AudioFeatures, ImageFeatures, Prompt
from phi4mm_jax.runtime.encoding import Medium
from phi4mm_jax.runtime.prefix import NOTHING, WORTH_COPYING, Choice, Contents, choose_slot, prompt_keys

BASE = (None, False)


def contents(*keys, kind=BASE):
    return Contents(np.array(keys, np.int64), kind)


def counting(length, changed_at=None):
    keys = np.arange(length)
    if changed_at is not None:
        keys[changed_at:] += 1000
    return Contents(keys, BASE)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (contents(1, 2, 3), contents(1, 2, 3), 3),
        (contents(1, 2, 3), contents(1, 2, 4, 3), 2),
        (contents(1, 2), contents(1, 2, 3), 2),
        (contents(4, 2), contents(1, 2), 0),
        (NOTHING, contents(1), 0),
        (contents(1, 2, kind=("vision", False)), contents(1, 2, kind=("speech", False)), 0),
        (contents(1, 2, kind=(None, True)), contents(1, 2), 0),
    ],
)
def test_shared(one, other, expected):
    assert one.shared(other) == other.shared(one) == expected


def image(seed):
    crops = np.random.default_rng(seed).random((1, 3, 4, 4), np.float32)
    return ImageFeatures(crops, np.ones((1, 2, 2), bool), np.zeros((1, 4), np.int32), np.arange(3, dtype=np.int32))


def test_keys_tell_media_apart():
    tokens = np.array([5, 9, 9, 9, 6], np.int32)
    where = np.arange(1, 4)

    def keys(features, context=None):
        return prompt_keys(Prompt(tokens), [Medium(features, where, context)])

    first = keys(image(0))
    np.testing.assert_array_equal(first[[0, 4]], [5, 6])
    assert np.all(first[1:4] < 0)
    np.testing.assert_array_equal(first, keys(image(0)))
    assert not np.any(np.isin(first[1:4], keys(image(1))))
    clip = AudioFeatures(np.ones((24, 80), np.float32), 3)
    alone, beside_a_picture = keys(clip, (False, True, 24)), keys(clip, (True, True, 24))
    assert not np.any(np.isin(alone[1:4], beside_a_picture))


def test_prompts_without_media_are_their_tokens():
    np.testing.assert_array_equal(prompt_keys(Prompt(np.array([3, 1, 4], np.int32)), []), [3, 1, 4])


LONG = WORTH_COPYING + 10


@pytest.mark.parametrize(
    ("held", "free", "expected"),
    [
        ([NOTHING, NOTHING], [0, 1], Choice(1, 1, 0)),
        # An earlier turn is gone on with.
        ([NOTHING, counting(LONG)], [0, 1], Choice(1, 1, LONG)),
        # The last token is computed even if all is there.
        ([counting(200), NOTHING], [0, 1], Choice(0, 0, 199)),
        # Of a row in use, or one that holds much more, the beginning is copied.
        ([counting(LONG), NOTHING], [1], Choice(1, 0, LONG)),
        ([counting(300, LONG), NOTHING], [0, 1], Choice(1, 0, LONG)),
        ([counting(300, LONG), counting(9, 0)], [0, 1], Choice(1, 0, LONG)),
        # Unless that loses more than going on in place.
        ([counting(200, 190), counting(300, 0)], [0, 1], Choice(0, 0, 190)),
        # What is little is computed again, in a row that is worth less.
        ([counting(300, 20), NOTHING], [0, 1], Choice(1, 1, 0)),
        # Only where there is no other row it is gone on with.
        ([counting(300, 20), counting(300, 0)], [0], Choice(0, 0, 20)),
        # The row idle for longest gives way.
        ([counting(300, 0), counting(300, 0), counting(300, 0)], [2, 1], Choice(2, 2, 0)),
    ],
)
def test_choice(held, free, expected):
    wanted = counting(200)
    assert choose_slot(wanted, held, free, last_used=[7, 6, 5][: len(held)]) == expected
