"""Analysis of captions: their words, lengths, repetitions and damage, and whether a prompt lies
within them.
"""

from __future__ import annotations

import difflib
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from sfumato import unicode_scripts

CLIP_LIMIT = 77
# words of a prompt that are looked at in pairs, or replaced by others: more than a person reads
COMPARED = 40
STOP_WORDS = frozenset(
    [
        *(
            "a",
            "an",
            "and",
            "are",
            "as",
            "at",
            "be",
            "by",
            "for",
            "from",
            "in",
            "into",
            "is",
            "it",
            "its",
            "of",
            "on",
            "or",
        ),
        *("over", "that", "the", "this", "to", "under", "with"),
    ]
)
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*", re.UNICODE)
_WORD_OF_KINDS = re.compile(r"w[wm]*(?:'w[wm]*)*|om*")  # the same, of `unicode_scripts.kinds`
_PIECE = re.compile(r"[^\W_]+|[^\w\s]", re.UNICODE)
# UTF-8 read as Western European: an accented capital followed by what its second byte looks like;
# and the replacement character.
_MOJIBAKE = re.compile(
    "[ÂÃâÐÑ][\u0080-\u00bf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2013-\u2122]|\ufffd"
)
_PLACEHOLDER = re.compile(
    r"^(image|picture|photo|photograph|img|untitled|unknown|none|null|n/?a|caption|text|dsc|scan)?[\s_\-.\d]*$",
    re.IGNORECASE,
)


def tokens(text: str) -> int:
    """Estimate the number of tokens that CLIP's byte-pair encoding makes of a text.

    The start and end tokens are included. Common words are one token; longer ones are counted as
    one for each seven letters, other scripts as one per letter. The vocabulary is not needed.
    """
    count = 2
    for piece in _PIECE.findall(text):
        count += -(-len(piece) // 7) if piece.isascii() else len(piece)
    return count


def exceeds_clip(text: str) -> bool:
    """Return whether a text has more tokens than CLIP reads, by the estimate of `tokens`."""
    return tokens(text) > CLIP_LIMIT


def words(text: str) -> list[str]:
    """Return the words of a text that carry meaning, in lower case and without plural endings.

    In scripts without spaces, they are single letters.
    """
    plain = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).lower()).replace(
        "’", "'"
    )
    if plain.isascii():
        matches = _WORD.findall(plain)
    else:
        matches = [
            plain[first:last] for first, last in unicode_scripts.spans(plain, _WORD_OF_KINDS)
        ]
    return [_stem(word) for word in matches if word not in STOP_WORDS]


def _stem(word: str) -> str:
    word = word.removesuffix("'s")
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith(("ches", "shes", "sses", "xes")):
        return word[:-2]
    return (
        word[:-1]
        if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is"))
        else word
    )


def is_damaged(text: str) -> bool:
    """Return whether a text was decoded with the wrong encoding somewhere on its way."""
    return _MOJIBAKE.search(text) is not None


def is_placeholder(text: str) -> bool:
    """Return whether a text says nothing: "image 12", "untitled", a number."""
    return _PLACEHOLDER.match(text.strip()) is not None


def templates(texts: Sequence[str], *, size: int = 3, top: int = 5) -> list[tuple[str, float]]:
    """Return common openings of `size` words, with the share of captions that begin with each.

    At most `top` of them are returned, each shared by at least a twentieth of the captions.
    """
    openings = Counter(
        " ".join(spaced[:size]) for text in texts if len(spaced := text.lower().split()) > size
    )
    return [
        (opening, count / len(texts))
        for opening, count in openings.most_common(top)
        if count >= max(2, len(texts) / 20)
    ]


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """How a prompt relates to the captions of a set.

    Attributes:
        verdict: "seen", "never together" or "unseen words".
        counts: captions that hold each word of the prompt.
        together: for each pair of its first 40 words, captions that hold both.
        with_all_words: captions that hold all of its words.
        similar: for the first 40 words that no caption holds, words that they do hold and that
            contain it or are spelt alike.
        nearest: positions of the captions most like the prompt, best first, with their likeness
            from 0 to 1.
    """

    prompt: str
    verdict: str
    counts: dict[str, int]
    together: dict[tuple[str, str], int]
    with_all_words: int
    similar: dict[str, list[str]]
    nearest: list[tuple[int, float]]


class Vocabulary:
    """The words of captions, and which captions hold them."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts
        self.places: dict[str, set[int]] = {}
        for number, text in enumerate(texts):
            for word in set(words(text)):
                self.places.setdefault(word, set()).add(number)
        self._weights = {
            word: math.log(1 + len(texts) / len(where)) for word, where in self.places.items()
        }

    def coverage(self, prompt: str, *, nearest: int = 8) -> Coverage:
        """Return whether the captions hold the prompt's words, and whether any holds all of them.

        Args:
            nearest: the number of captions most like the prompt to return.
        """
        prompt_words = list(dict.fromkeys(words(prompt)))
        counts = {word: len(self.places.get(word, ())) for word in prompt_words}
        pairs = combinations(prompt_words[:COMPARED], 2)
        together = {
            (a, b): len(self.places.get(a, set()) & self.places.get(b, set())) for a, b in pairs
        }
        with_all = (
            len(set.intersection(*(self.places.get(word, set()) for word in prompt_words)))
            if prompt_words
            else 0
        )
        unseen = [word for word, count in counts.items() if not count]
        similar = {word: self._similar(word) for word in unseen[:COMPARED]}
        verdict = (
            "unseen words"
            if not prompt_words or 0 in counts.values()
            else "seen"
            if with_all
            else "never together"
        )
        return Coverage(
            prompt=prompt,
            verdict=verdict,
            counts=counts,
            together=together,
            with_all_words=with_all,
            similar=similar,
            nearest=self._nearest(prompt_words, nearest),
        )

    def _similar(self, word: str) -> list[str]:
        containing = [other for other in self.places if len(word) > 3 and word in other]
        containing.sort(key=lambda other: (-len(self.places[other]), other))
        return list(
            dict.fromkeys(
                [*containing, *difflib.get_close_matches(word, self.places, n=3, cutoff=0.8)]
            )
        )[:4]

    def _nearest(self, prompt_words: Sequence[str], count: int) -> list[tuple[int, float]]:
        """Rank captions by weighted Jaccard similarity of their words with a prompt's.

        Rare words weigh more.
        """
        scores: dict[int, float] = {}
        for word in prompt_words:
            for number in self.places.get(word, ()):
                scores[number] = scores.get(number, 0.0) + self._weights[word]
        unknown = math.log(1 + len(self.texts))
        total = sum(self._weights.get(word, unknown) for word in prompt_words)

        def likeness(number: int, shared: float) -> float:
            return shared / (
                total + sum(self._weights[word] for word in set(words(self.texts[number]))) - shared
            )

        best = _best(scores, 50 * count)
        ranked = sorted(
            ((number, likeness(number, shared)) for number, shared in best),
            key=lambda pair: (-pair[1], pair[0]),
        )
        return [(number, round(score, 3)) for number, score in ranked[:count]]


def _best(scores: dict[int, float], count: int) -> list[tuple[int, float]]:
    """Return the `count` best positions and scores; ties are in the order of the set."""
    return sorted(scores.items(), key=lambda pair: (-pair[1], pair[0]))[:count]
