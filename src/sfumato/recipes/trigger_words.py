"""Words that captions share, such as the trigger word of a fine-tuning, as a tokenizer sees them."""

from __future__ import annotations

import string
from collections import Counter

from sfumato.conditioners import CompositeConditioner
from sfumato.contexts import Text, part_of
from sfumato.data import Dataset

FEW_PIECES = 4  # that a word of a language has at most, as a rule
NAMED = 3


def split_words(dataset: Dataset, conditioner: CompositeConditioner) -> list[str]:
    """Return warnings of words in most training captions that are split into many pieces.

    Each piece means something else to an encoder that is not trained along, so such a word is
    learned slowly, and parts of it appear in images.
    """
    part = part_of(conditioner, Text)
    if part is None:
        return []
    captions = {text for texts in dataset.captions(dataset.training) for text in texts}
    counts = Counter(word for text in captions for word in set(_words(text)))
    pieces = {
        word: found
        for word, count in sorted(counts.items())
        if 2 * count > len(captions) and len(found := part.pieces(word)) > FEW_PIECES
    }
    lines = [
        f"warning: the word {word!r} of the captions is {len(found)} pieces to the tokenizer: "
        f"{' '.join(found)}; a name of 1 to {FEW_PIECES} pieces is learned faster"
        for word, found in list(pieces.items())[:NAMED]
    ]
    more = len(pieces) - NAMED
    return [*lines, *([f"warning: and {more} more words like these"] if more > 0 else [])]


def _words(text: str) -> list[str]:
    return [word for part in text.split() if (word := part.strip(string.punctuation))]
