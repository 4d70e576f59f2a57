r"""Patterns of words: Python's, which know all letters, in the dialect of ONNX Runtime's tokenizer, which is RE2.

RE2's `\w`, `\d`, `\s` and `\b` know ASCII alone, and the tokenizer takes the longest of alternatives where Python
takes the first. A pattern is translated where that is exact, and refused where not.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from penstock.converters.errors import UnsupportedModelError

_SPACE = r"\t-\r\x1c-\x20\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}"
_CLASSES = {"w": r"\p{L}\p{N}_", "d": r"\p{Nd}", "s": _SPACE}
"""What Python's classes hold, to be written between brackets."""

# Greedy runs of word characters begin and end at borders of words anyway.
_RUN = re.compile(r"\\b((?:\\w)*\\w(?:\+|\{\d+,\}))\\b")
_TOKEN = re.compile(r"\\(?P<escape>.)|(?P<open>\[\^?\]?)|(?P<close>\])|(?P<group>\(\?:)|(?P<other>.)", re.DOTALL)
_LAZY = re.compile(r"(?<!\\)(?:[*+?]|\{[\d,]+\})[?+]|\{,")


_SEPARATORS = (" ", "  ", ", ", "-", ".", "\u00a0", "\n", "!")
_STRANGE = ("señor", "naïve", "ÉCOLE", "日本語", "x²", "☂", "don't")


def words_of(vectorizer: Any) -> tuple[str, ...]:  # noqa: ANN401 scikit-learn publishes no types
    """The words to draw documents from: the vocabulary, and words that are left out of it."""
    left_out = sorted(vectorizer.get_stop_words() or ())
    return (*sorted(vectorizer.vocabulary_), *left_out[: len(vectorizer.vocabulary_)])


def draw_document(random: np.random.Generator, words: Sequence[str]) -> str:
    """Words as they are, in capitals, with letters beyond ASCII beside them, and words that nobody knows."""
    pieces = []
    for _ in range(6):
        word = words[int(random.integers(len(words)))]
        forms = (word, word, _capitals(word), f"ñ{word}", f"{word}é", str(random.choice(_STRANGE)))
        pieces += [forms[int(random.integers(len(forms)))], str(random.choice(_SEPARATORS))]
    return "".join(pieces)


def _capitals(word: str) -> str:
    """Only where lower-casing letter by letter gives the word again; a final sigma's capital has two small ones."""
    capitals = word.upper()
    return capitals if "".join(letter.lower() for letter in capitals) == capitals.lower() else word


def tokenizer_pattern(pattern: str) -> str:
    """A token pattern for RE2. Raises `UnsupportedModelError` if RE2 would find other words with it."""
    body = pattern.removeprefix("(?u)")
    if run := _RUN.fullmatch(body):
        body = run[1]
    if _LAZY.search(body):
        raise _untranslatable(pattern, "a quantifier that is not greedy")
    return "".join(_translated(body, pattern))


def text_options(vectorizer: Any) -> dict[str, Any]:  # noqa: ANN401 scikit-learn publishes no types
    """skl2onnx's options for a vectorizer. Raises `UnsupportedModelError`."""
    name = type(vectorizer).__qualname__
    for parameter in ("preprocessor", "tokenizer", "strip_accents"):
        if getattr(vectorizer, parameter) is not None:
            raise UnsupportedModelError(
                f"{name}({parameter}={getattr(vectorizer, parameter)!r}) does not convert: ONNX has no such step. "
                f"Leave {parameter} at None and prepare the texts before they are sent."
            )
    if vectorizer.analyzer != "word":
        raise UnsupportedModelError(
            f"{name}(analyzer={vectorizer.analyzer!r}) does not convert: ONNX Runtime's tokenizer finds words. Fit it "
            "with analyzer='word'."
        )
    if vectorizer.ngram_range[1] > 1 and vectorizer.get_stop_words():
        raise UnsupportedModelError(
            f"{name}(ngram_range={vectorizer.ngram_range}) with stop words does not convert: ONNX Runtime leaves no "
            "words out, so that others follow each other. Fit it without stop words, or with single words."
        )
    return {"tokenexp": tokenizer_pattern(vectorizer.token_pattern)}


def _translated(body: str, pattern: str) -> list[str]:
    """Token by token; what is not known to mean the same is refused."""
    found, inside = [], False
    for token in _TOKEN.finditer(body):
        text = token[0]
        if token["escape"]:
            text = _escape(token["escape"], pattern, inside=inside)
        elif token["open"] and not inside:
            inside = True
        elif token["close"] and inside:
            inside = False
        elif not inside and text in {"|", "(", "^", "$"}:
            raise _untranslatable(pattern, f"{text!r}")
        elif inside and text == "[":
            text = r"\["
        found.append(text)
    return found


def _escape(letter: str, pattern: str, *, inside: bool) -> str:
    if letter in _CLASSES:
        return _CLASSES[letter] if inside else f"[{_CLASSES[letter]}]"
    if letter.lower() in _CLASSES and not inside:
        return f"[^{_CLASSES[letter.lower()]}]"
    if letter.isalnum() and letter not in "fnrtv":
        raise _untranslatable(pattern, rf"'\{letter}'")
    return f"\\{letter}"


def _untranslatable(pattern: str, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"The token pattern {pattern!r} has {what}, which ONNX Runtime's tokenizer reads otherwise than Python. Fit "
        r"the vectorizer with a pattern of classes and greedy quantifiers alone, such as (?u)\b\w\w+\b or [a-z]+."
    )
