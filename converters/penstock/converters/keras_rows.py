"""Random rows that a model can answer: of the categories and words that its layers know, and of some they do not."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

Layer = Any  # Keras publishes no types

_STRANGE_WORDS = ("", "Unseen", "naïve", "東京")
_STRANGE_INTEGERS = (-5, 0, 10**6)
_BETWEEN_WORDS = (" ", ", ", "  ", "!\t", ".\n", "'")


def random_row_values(
    dtype: str, shape: Sequence[int], readers: Sequence[Layer], random: np.random.Generator
) -> NDArray[Any]:
    """Standard normal numbers; integers that every embedding has; the words of a vocabulary, or texts of them.

    `readers` are the layers that may read the input, the one that knows its values first.
    """
    if dtype.startswith("float"):
        return random.standard_normal(shape).astype(dtype)
    if dtype == "bool":
        return random.integers(0, 2, shape).astype(dtype)
    if dtype == "string":
        return _texts(shape, readers, random)
    lookup = next((layer for layer in readers if _takes(layer, keras.layers.IntegerLookup)), None)
    known = _known_integers(readers) if lookup is None else _entries(lookup, _STRANGE_INTEGERS)
    return random.choice(np.asarray(known), shape).astype(dtype)


def _texts(shape: Sequence[int], readers: Sequence[Layer], random: np.random.Generator) -> NDArray[Any]:
    kinds = (keras.layers.StringLookup, keras.layers.TextVectorization)
    lookup = next((layer for layer in readers if _takes(layer, *kinds)), None)
    words = list(_STRANGE_WORDS) if lookup is None else _entries(lookup, _STRANGE_WORDS)
    if not isinstance(lookup, keras.layers.TextVectorization):
        return random.choice(np.array(words, dtype=object), shape)
    texts = [_text(words, random) for _ in range(int(np.prod(shape)))]
    return np.array(texts, dtype=object).reshape(shape)


def _entries(layer: Layer, strange: Sequence[Any]) -> list[Any]:
    """What is in a vocabulary, and what is not, unless the layer fails on it."""
    entries = list(layer.get_vocabulary(include_special_tokens=False))
    return entries if getattr(layer, "num_oov_indices", 1) == 0 else [*entries, *strange]


def _takes(layer: Layer, *kinds: type) -> bool:
    """An inverted lookup takes the indices of its vocabulary, not what is in it."""
    return isinstance(layer, kinds) and not getattr(layer, "invert", False)


def _known_integers(readers: Sequence[Layer]) -> range:
    """All that each of the layers takes."""
    bounds = []
    for layer in readers:
        if isinstance(layer, keras.layers.Embedding):
            bounds.append(layer.input_dim)
        elif isinstance(layer, keras.layers.CategoryEncoding):
            bounds.append(layer.num_tokens)
        elif getattr(layer, "invert", False) and hasattr(layer, "vocabulary_size"):
            bounds.append(layer.vocabulary_size())
    return range(min(bounds, default=2))


def _text(words: Sequence[str], random: np.random.Generator) -> str:
    """Up to six words in their own and in other letters, with white space and punctuation between them."""
    parts = []
    for word in random.choice(np.array(words, dtype=object), random.integers(0, 7)):
        parts += [word.upper() if random.random() < 0.3 else word, random.choice(_BETWEEN_WORDS)]
    return "".join(parts)
