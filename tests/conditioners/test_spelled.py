"""What spelled words buy: a slip in a prompt is read as the word that was meant."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sfumato import randomness
from sfumato.conditioners import CompositeConditioner, LearnedTextConfig

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "brown", "white")
NOUNS = (
    "apple",
    "banana",
    "cherry",
    "lemon",
    "tomato",
    "potato",
    "carrot",
    "horse",
    "rabbit",
    "tiger",
    "lion",
    "eagle",
    "falcon",
    "sparrow",
    "turtle",
    "bicycle",
    "airplane",
    "guitar",
    "trumpet",
    "violin",
    "piano",
    "umbrella",
    "hammer",
    "pencil",
    "bottle",
    "window",
    "ladder",
    "castle",
    "bridge",
)


def slips(word: str) -> list[str]:
    """The word with two letters swapped, or one left out; its first letter stays."""
    places = range(1, len(word) - 1)
    swapped = [word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in places]
    return [
        slip
        for slip in dict.fromkeys([*swapped, *(word[:i] + word[i + 1 :] for i in places)])
        if slip not in NOUNS
    ]


def trained(spelled: float) -> nn.Module:
    """Captions "red apple" and the like as points: each word adds one of its own."""
    torch.manual_seed(0)
    captions = [(colour, noun) for colour in COLOURS for noun in NOUNS]
    meanings = {word: torch.randn(64) for word in (*COLOURS, *NOUNS)}
    points = torch.stack([meanings[colour] + meanings[noun] for colour, noun in captions])
    texts = [" ".join(caption) for caption in captions]
    config = LearnedTextConfig(size=48, layers=1, heads=4, length=16, spelled=spelled)
    joint, head = (
        CompositeConditioner({"text": config.build(config.words(texts), None)}),
        nn.Linear(48, 64),
    )
    optimizer = torch.optim.AdamW([*joint.parameters(), *head.parameters()], lr=4e-3)
    for step in range(1500):
        chosen = torch.randint(len(texts), (32,))
        draws = randomness.uniform(0, "condition dropout", first=32 * step, count=32)
        read = head(joint({"text": [texts[i] for i in chosen]}, 32, draws=draws).vector)
        loss = (read - points[chosen])[draws[:, 0] >= config.dropout].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return joint


@pytest.mark.slow
@torch.no_grad()
def test_a_slip_in_a_known_word_is_read_as_that_word() -> None:
    """Measured on 30 nouns: 79 % of slips are nearest to the word that was meant; without spelled
    words 3 %, which is chance.
    """
    with torch.enable_grad():
        joint = trained(0.02)
    known = joint({"text": [f"red {noun}" for noun in NOUNS]}, len(NOUNS)).vector
    hits = []
    for number, noun in enumerate(NOUNS):
        read = joint({"text": [f"red {slip}" for slip in slips(noun)]}, len(slips(noun))).vector
        hits += (torch.cdist(read, known).argmin(1) == number).tolist()
    assert sum(hits) / len(hits) > 0.4
