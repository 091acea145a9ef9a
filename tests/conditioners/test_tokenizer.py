"""The tokenizer that is fitted to captions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sfumato.conditioners import Words, WordsConditioner, WordsConfig
from sfumato.conditioners.words import BYTES, FIRST_WORD, NOTHING, PAD, START
from sfumato.errors import ConfigError

CAPTIONS = ["a red heart", "a red cat", "Cat, asleep", "a dog"]
WORDS = Words.fitted(CAPTIONS, most=100)


def test_frequent_words_come_first_and_rare_ones_are_left_out_when_there_is_no_room() -> None:
    assert WORDS.vocabulary[:3] == ("a", "cat", "red")
    assert Words.fitted(CAPTIONS, most=2).vocabulary == ("a", "cat")
    assert set(WORDS.vocabulary) == {"a", "red", "heart", "cat", ",", "asleep", "dog"}


def test_known_words_are_one_number_and_others_are_spelled() -> None:
    numbers = WORDS.encode("a CAT ok", length=10)
    assert numbers[:5] == [START, FIRST_WORD, FIRST_WORD + 1, BYTES + ord("o"), BYTES + ord("k")]
    assert numbers[5:] == [PAD] * 5


@pytest.mark.parametrize("text", ["", " \n\t ", "\u3000"])
def test_an_empty_text_is_nothing(text: str) -> None:
    assert WORDS.encode(text, length=4) == [NOTHING, PAD, PAD, PAD]


@given(st.text(max_size=200), st.integers(2, 40))
def test_any_text_has_numbers_in_range(text: str, length: int) -> None:
    numbers = WORDS.encode(text, length=length)
    assert len(numbers) == length
    assert all(0 <= number < len(WORDS) for number in numbers)
    first = numbers.index(PAD) if PAD in numbers else length
    assert set(numbers[first:]) <= {PAD}


@given(st.lists(st.sampled_from(["a", "red", "cat", "zebra", "\u732b", ","]), max_size=30), st.integers(2, 20))
def test_what_is_read_is_what_is_encoded(pieces: list[str], length: int) -> None:
    text = " ".join(pieces)
    read = [number for number in WORDS.encode(WORDS.read(text, length=length), length=500) if number not in (PAD, NOTHING)]
    assert WORDS.encode(text, length=length)[: len(read)] == read
    more = [piece for piece in pieces if piece.strip()]
    assert WORDS.read(text, length=500) == text
    assert len(read) > length - 6 or len(read) == 0 or WORDS.read(text, length=length) == " ".join(more)


def test_a_hundred_thousand_characters_take_no_time() -> None:
    long = "cat zebra " * 10_000
    assert len(WORDS.encode(long, length=24)) == 24
    assert WORDS.read(long, length=24).startswith("cat zebra cat")
    assert len(WORDS.read(long, length=24)) < 50


def test_a_word_changes_the_condition_and_case_does_not() -> None:
    torch.manual_seed(0)
    conditioner = WordsConditioner(WordsConfig(size=16, heads=2, length=8), words=WORDS)
    conditions = conditioner({"text": ["a red cat", "A Red CAT", "a red dog", "cat red a"]}, 4)
    assert torch.equal(conditions.vector[0], conditions.vector[1])
    assert not torch.allclose(conditions.vector[0], conditions.vector[2])
    assert not torch.allclose(conditions.vector[0], conditions.vector[3])  # the order of words counts
    assert conditions.token_mask.sum(1).tolist() == [4, 4, 4, 4]


@pytest.mark.parametrize("wrong", [{"size": 10, "heads": 4}, {"length": 1}, {"layers": 0}, {"vocabulary": -1}])
def test_impossible_settings_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="mend"):
        WordsConfig(**wrong)
