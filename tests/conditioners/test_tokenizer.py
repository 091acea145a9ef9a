"""The tokenizer that is fitted to captions."""

from __future__ import annotations

import unicodedata
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato import unicode_scripts
from sfumato.conditioners import (
    CompositeConditioner,
    LearnedTextConditioner,
    LearnedTextConfig,
    WordTokenizer,
)
from sfumato.conditioners.tokenizer import (
    _WORD,
    BYTES,
    EMPTY,
    FIRST_WORD,
    PAD,
    START,
    ByRuns,
    ByScript,
)
from sfumato.errors import ConfigError

CAPTIONS = ["a red heart", "a red cat", "Cat, asleep", "a dog"]
WORDS = WordTokenizer.fit(CAPTIONS, most=100)


def test_frequent_words_come_first_and_rare_ones_are_left_out_when_there_is_no_room() -> None:
    assert WORDS.vocabulary[:3] == ("a", "cat", "red")
    assert WordTokenizer.fit(CAPTIONS, most=2).vocabulary == ("a", "cat")
    assert set(WORDS.vocabulary) == {"a", "red", "heart", "cat", ",", "asleep", "dog"}


def test_known_words_are_one_number_and_others_are_spelled() -> None:
    numbers = WORDS.encode("a CAT ok", length=10)
    assert numbers[:5] == [START, FIRST_WORD, FIRST_WORD + 1, BYTES + ord("o"), BYTES + ord("k")]
    assert numbers[5:] == [PAD] * 5


@pytest.mark.parametrize("text", ["", " \n\t ", "\u3000"])
def test_an_empty_text_is_nothing(text: str) -> None:
    assert WORDS.encode(text, length=4) == [EMPTY, PAD, PAD, PAD]


@given(st.text(max_size=200), st.integers(2, 40))
def test_any_text_has_numbers_in_range(text: str, length: int) -> None:
    numbers = WORDS.encode(text, length=length)
    assert len(numbers) == length
    assert all(0 <= number < len(WORDS) for number in numbers)
    first = numbers.index(PAD) if PAD in numbers else length
    assert set(numbers[first:]) <= {PAD}


@given(
    st.lists(st.sampled_from(["a", "red", "cat", "zebra", "\u732b", ","]), max_size=30),
    st.integers(2, 20),
)
def test_what_is_read_is_what_is_encoded(pieces: list[str], length: int) -> None:
    text = " ".join(pieces)
    read = [
        number
        for number in WORDS.encode(WORDS.truncate(text, length=length), length=500)
        if number not in (PAD, EMPTY)
    ]
    assert WORDS.encode(text, length=length)[: len(read)] == read
    more = [piece for piece in pieces if piece.strip()]
    assert WORDS.truncate(text, length=500) == text
    assert (
        len(read) > length - 6
        or len(read) == 0
        or WORDS.truncate(text, length=length) == " ".join(more)
    )


def test_a_hundred_thousand_characters_take_no_time() -> None:
    long = "cat zebra " * 10_000
    assert len(WORDS.encode(long, length=24)) == 24
    assert WORDS.truncate(long, length=24).startswith("cat zebra cat")
    assert len(WORDS.truncate(long, length=24)) < 50


def test_a_word_changes_the_condition_and_case_does_not() -> None:
    torch.manual_seed(0)
    conditioner = LearnedTextConditioner(LearnedTextConfig(size=16, heads=2, length=8), words=WORDS)
    conditions = conditioner({"text": ["a red cat", "A Red CAT", "a red dog", "cat red a"]}, 4)
    assert torch.equal(conditions.vector[0], conditions.vector[1])
    assert not torch.allclose(conditions.vector[0], conditions.vector[2])
    # the order of words counts
    assert not torch.allclose(conditions.vector[0], conditions.vector[3])
    assert conditions.token_mask.sum(1).tolist() == [4, 4, 4, 4]


@pytest.mark.parametrize(
    "wrong", [{"size": 10, "heads": 4}, {"length": 1}, {"layers": 0}, {"vocabulary": -1}]
)
def test_impossible_settings_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="hint"):
        LearnedTextConfig(**wrong)


# --- every script ---------------------------------------------------------------------------------


SPLIT = {
    "红色的圆形": ["红", "色", "的", "圆", "形"],
    "𠮷野家": ["𠮷", "野", "家"],
    "ねこカフェ": ["ね", "こ", "カ", "フ", "ェ"],
    "ｶﾞｽ": ["ガ", "ス"],
    "ยิ้ม": ["ยิ้", "ม"],
    "ປີ": ["ປີ"],
    "ខ្មែរ": ["ខ្", "មែ", "រ"],
    "မြန်": ["မြ", "န်"],
    "नमस्ते दुनिया": ["नमस्ते", "दुनिया"],
    "한국어 고양이": ["한국어", "고양이"],
    "כֶּלֶב": ["כֶּלֶב"],
    "T恤 3只猫": ["t", "恤", "3", "只", "猫"],
    "snake_case don't": ["snake_case", "don", "'", "t"],
    "👩‍🚒!": ["👩", "\u200d", "🚒", "!"],
}


@pytest.mark.parametrize("text", SPLIT)
def test_letters_are_words_where_a_script_has_no_spaces_and_marks_stay_with_their_letter(
    text: str,
) -> None:
    assert ByScript().pieces(text) == [
        unicodedata.normalize("NFKC", piece) for piece in SPLIT[text]
    ]


UNSPACED = {
    "Han": "一龥㐀𠀀",
    "Hiragana": "あん",
    "Katakana": "アン",
    "Thai": "กฮ",
    "Lao": "ກຮ",
    "Khmer": "កឣ",
    "Myanmar": "ကအ",
}


@given(
    st.sampled_from(sorted(UNSPACED)).flatmap(
        lambda script: st.text(UNSPACED[script], min_size=1, max_size=20)
    )
)
def test_a_new_order_of_known_letters_is_read_without_bytes(text: str) -> None:
    words = WordTokenizer.fit(["".join(UNSPACED.values())], most=100)
    numbers = words.encode(text, length=30)
    assert sum(number >= FIRST_WORD for number in numbers) == len(text)
    assert words.count(text) == len(text) + 1


@given(st.text(max_size=60))
def test_composed_and_decomposed_texts_have_the_same_numbers(text: str) -> None:
    forms = [unicodedata.normalize(form, text) for form in ("NFC", "NFD")]
    words = WordTokenizer.fit(forms[:1], most=100)
    assert words.encode(forms[0], length=80) == words.encode(forms[1], length=80)


@given(st.text(max_size=60))
def test_a_known_text_comes_back_from_its_numbers(text: str) -> None:
    words = WordTokenizer.fit([text], most=1000)
    found = [
        number for number in words.encode(text, length=1000) if number not in (PAD, START, EMPTY)
    ]
    assert [words.vocabulary[number - FIRST_WORD] for number in found] == words.splitting.pieces(
        text
    )


@given(st.text(max_size=60))
def test_nothing_of_a_text_is_lost_but_its_spaces(text: str) -> None:
    plain = ByScript().normalize(text)
    assert "".join(ByScript().pieces(text)) == "".join(
        letter for letter in plain if not letter.isspace()
    )


@given(st.text(st.characters(max_codepoint=127), max_size=60))
def test_plain_texts_are_read_as_they_were(text: str) -> None:
    assert ByScript().pieces(text) == ByRuns().pieces(text)
    plain = text.lower()
    # by the slow way too
    assert list(unicode_scripts.spans(plain, _WORD)) == list(ByRuns().spans(plain))


@pytest.mark.parametrize(
    "hostile", ["猫", "\u0301", "e\u0301", "'", "_\u0301", "ก็", "a猫", "\U0010ffff"]
)
def test_long_hostile_texts_are_read_in_one_pass(hostile: str) -> None:
    """A rule that looks back would not end within the patience of a test."""
    assert "".join(ByScript().pieces(hostile * 50_000)) == ByScript().normalize(hostile * 50_000)


# Made by the code before there was a choice: fitted to these captions, with room for 20 words and
# 14 numbers.
THEN = [
    "a red heart, Don't stop",
    "红色的圆形 和 a ＲＥＤ cat",
    "กินข้าว",
    "नमस्ते दुनिया",
    "é e\u0301 x",
    "Straße ﬁne İstanbul",
    "👩‍🚒 ❤️",
]
VOCABULARY = (
    *(
        "a",
        "red",
        "é",
        "'",
        ",",
        "cat",
        "don",
        "fine",
        "heart",
        "i",
        "stanbul",
        "stop",
        "strasse",
        "t",
        "x",
        "\u0307",
    ),
    *("त", "द", "न", "नमस"),
)
NUMBERS = {
    "a red zebra, don't": [1, 259, 260, 125, 104, 101, 117, 100, 263, 265, 262, 272, 0, 0],
    "红色的圆形": [1, 234, 189, 165, 235, 140, 181, 234, 157, 135, 232, 159, 137, 232],
    "กินข้าว": [1, 227, 187, 132, 227, 187, 183, 227, 187, 156, 227, 187, 133, 227],
    "नमस्ते": [1, 278, 227, 168, 144, 275, 227, 168, 138, 0, 0, 0, 0, 0],
    "e\u0301 é": [1, 261, 261, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    "STRASSE fine": [1, 271, 266, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    "👩‍🚒 ok": [1, 243, 162, 148, 172, 229, 131, 144, 243, 162, 157, 149, 114, 110],
    " \t": [2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    "\ud800 x": [1, 66, 273, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
}


def test_runs_made_before_read_as_they_did() -> None:
    words = WordTokenizer.fit(THEN, most=20, splitting=ByRuns())
    assert words.vocabulary == VOCABULARY
    assert {text: words.encode(text, length=14) for text in NUMBERS} == NUMBERS


# --- words spelled in training, and unknown ones --------------------------------------------------


def test_a_spelled_word_is_its_bytes_where_the_text_still_fits() -> None:
    plain, spelled = (
        WORDS.encode("a red cat", length=6),
        WORDS.encode("a red cat", length=6, spelled=1),
    )
    assert spelled == [*plain[:2], *(BYTES + ord(letter) for letter in "red"), plain[3]]
    assert WORDS.encode("a red cat", length=5, spelled=1) == WORDS.encode("a red cat", length=5)
    assert WORDS.encode("a red cat", length=6, spelled=3) == plain
    assert WORDS.encode("", length=6, spelled=0) == WORDS.encode("", length=6)


def test_each_word_is_spelled_as_often_as_is_set_in_training_only() -> None:
    """Even draws: the fraction is exact."""
    config = LearnedTextConfig(size=16, heads=2, length=30, dropout=0.2, spelled=0.05)
    joint = CompositeConditioner({"text": config.build(WORDS.vocabulary, None)})
    (part,) = joint._parts
    draws = (torch.arange(8000, dtype=torch.float64) + 0.5) / 8000
    told = part.augmented({"text": ["a red cat"] * 8000}, draws)
    counts = Counter(told["spelled"])
    assert counts[None] == 1600  # hidden
    assert [counts[word] for word in range(3)] == [320] * 3  # 5 % of what is shown

    seen: list[list[int]] = []
    joint.parts["text"].embedding.register_forward_hook(
        lambda module, given, result: seen.append(given[0].tolist())
    )
    context, some = {"text": ["a red cat"] * 2}, torch.tensor([[0.205], [0.9]], dtype=torch.float64)
    joint(context, 2)
    joint(context, 2, draws=some)
    plain, varied = seen[0], seen[1]  # what is told, before what stands for nothing
    assert plain[0] == plain[1] == varied[1]
    assert varied[0] == WORDS.encode("a red cat", length=30, spelled=0)
    assert context == {"text": ["a red cat"] * 2}


def test_without_spelled_words_training_is_told_the_captions_as_they_are() -> None:
    part = LearnedTextConfig(size=16, heads=2, spelled=0.0).build(WORDS.vocabulary, None)
    context = {"text": ["a red cat"]}
    assert part.augmented(context, torch.tensor([0.5])) is context
    assert not part.learns_bytes


def test_unknown_words_are_named_once_and_punctuation_is_not() -> None:
    part = LearnedTextConfig(size=16, heads=2, vocabulary=2).build(WORDS.vocabulary, None)
    assert part.unknown_words("A red Guitar; and a guitar: 猫狗!") == ["guitar", "and", "猫", "狗"]
    assert part.unknown_words("a dog asleep") == []  # beyond the vocabulary, and yet in captions
    assert part.learns_bytes


@settings(max_examples=30)
@given(st.text(max_size=40), st.integers(2, 12))
def test_a_text_is_cut_exactly_if_a_longer_reading_says_more(text: str, length: int) -> None:
    part = LearnedTextConfig(size=2, heads=1, length=length).build(WORDS.vocabulary, None)
    whole = [number for number in WORDS.encode(text, length=1000) if number != PAD]
    assert part.is_truncated(text) == (len(whole) > length)
    assert list(part.token_ids(text)) == WORDS.encode(text, length=length)
    assert part.truncate(text) == text or part.is_truncated(text)


@pytest.mark.parametrize("spelled", [-0.1, 1.5, float("nan")])
def test_an_impossible_fraction_is_refused(spelled: float) -> None:
    with pytest.raises(ConfigError, match=r"conditioner\.text\.spelled"):
        LearnedTextConfig(spelled=spelled)
