"""Does a prompt lie within the captions? Seen, never together, unseen words; and what captions tell
about themselves.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.data.check.captions import (
    Vocabulary,
    is_damaged,
    is_placeholder,
    templates,
    tokens,
    words,
)

CAPTIONS = [
    "a red fox in the snow",
    "a red apple on a table",
    "an arctic fox, sleeping",
    "three green apples",
    "a snowy mountain at dawn",
    "foxes playing in a field",
]


@pytest.fixture
def known() -> Vocabulary:
    return Vocabulary(CAPTIONS)


# --- the verdict ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "verdict"),
    [
        ("a red fox", "seen"),
        ("A RED FOX!", "seen"),
        ("fox", "seen"),
        ("the foxes", "seen"),  # plural endings do not count
        ("a green fox", "never together"),
        ("red apples in the snow", "never together"),
        ("a red hedgehog", "unseen words"),
        ("hedgehog", "unseen words"),
        ("", "unseen words"),
        ("the of and", "unseen words"),
    ],
)
def test_the_verdict(known: Vocabulary, prompt: str, verdict: str) -> None:
    assert known.coverage(prompt).verdict == verdict


def test_the_counts_say_how_often_each_word_and_each_pair_stands_in_a_caption(
    known: Vocabulary,
) -> None:
    found = known.coverage("a red apple and a fox")
    assert found.counts == {"red": 2, "apple": 2, "fox": 3}
    assert found.together == {("red", "apple"): 1, ("red", "fox"): 1, ("apple", "fox"): 0}
    assert found.with_all_words == 0
    assert known.coverage("red fox").with_all_words == 1


def test_pairs_that_stand_together_do_not_make_a_whole() -> None:
    found = Vocabulary(["red fox", "fox hat", "red hat"]).coverage("red fox hat")
    assert min(found.together.values()) == 1
    assert (found.with_all_words, found.verdict) == (0, "never together")


def test_a_word_said_twice_counts_once(known: Vocabulary) -> None:
    assert Vocabulary(["fox fox fox"]).coverage("fox").counts == {"fox": 1}
    assert known.coverage("fox, fox and foxes").counts == {"fox": 3}


def test_unseen_words_come_with_words_spelt_like_them(known: Vocabulary) -> None:
    found = known.coverage("a mountian of snow")
    assert found.similar == {"mountian": ["mountain"]}
    assert known.coverage("snow").similar == {}
    assert Vocabulary(["a firefighter"]).coverage("fighter").similar == {"fighter": ["firefighter"]}


# --- the nearest captions -------------------------------------------------------------------------


def test_the_caption_itself_is_nearest_with_likeness_one(known: Vocabulary) -> None:
    for number, caption in enumerate(CAPTIONS):
        assert known.coverage(caption).nearest[0] == (number, 1.0)


def test_captions_that_share_nothing_are_not_near(known: Vocabulary) -> None:
    assert [number for number, _ in known.coverage("red").nearest] == [0, 1]
    assert known.coverage("hedgehog").nearest == []


def test_a_rare_word_counts_more_than_a_common_one() -> None:
    vocabulary = Vocabulary(["photo unicorn", *(f"photo thing{number}" for number in range(20))])
    assert vocabulary.coverage("unicorn photo gallery").nearest[0][0] == 0
    near = dict(vocabulary.coverage("unicorn photo gallery", nearest=30).nearest)
    assert near[0] > 2 * near[1]


def test_no_more_are_named_than_asked_for_and_ties_keep_the_order_of_the_set() -> None:
    vocabulary = Vocabulary(["same words"] * 500)
    assert vocabulary.coverage("same words", nearest=3).nearest == [(0, 1.0), (1, 1.0), (2, 1.0)]
    assert len(vocabulary.coverage("same words").nearest) == 8


texts = st.lists(st.text(max_size=40) | st.sampled_from(CAPTIONS), max_size=8)


@settings(max_examples=150, deadline=None)
@given(captions=texts, prompt=st.text(max_size=60) | st.sampled_from(CAPTIONS))
def test_whatever_is_said_the_answer_is_consistent(captions: list[str], prompt: str) -> None:
    found = Vocabulary(captions).coverage(prompt)
    held = [set(words(caption)) for caption in captions]
    asked = set(words(prompt))
    assert found.counts == {word: sum(word in caption for caption in held) for word in asked}
    assert found.with_all_words == (sum(asked <= caption for caption in held) if asked else 0)
    expected = (
        "unseen words"
        if not asked or 0 in found.counts.values()
        else "seen"
        if found.with_all_words
        else "never together"
    )
    assert found.verdict == expected
    assert all(0 < likeness <= 1 for _, likeness in found.nearest)
    assert all(asked & held[number] for number, _ in found.nearest)
    assert [likeness for _, likeness in found.nearest] == sorted(
        (likeness for _, likeness in found.nearest), reverse=True
    )


# --- odd texts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("caption", "prompt"),
    [
        ("ein schöner Fuchs", "SCHÖNER fuchs"),
        ("рыжая лиса", "Рыжая Лиса"),
        ("una niña", "una nin\u0303a"),  # composed or not
        ("ﬁne ﬂowers", "fine flowers"),  # ligatures
        ("the cat’s eye", "the cat's eye"),
        ("赤い 狐", "赤い 狐"),
        ("Ⅳ kings", "IV kings"),
        ("a १२३ sign", "१२३"),
    ],
)
def test_the_same_words_in_other_letters_are_seen(caption: str, prompt: str) -> None:
    assert Vocabulary([caption]).coverage(prompt).verdict == "seen"


@pytest.mark.parametrize(
    ("caption", "prompt", "counts"),
    [
        ("一个红色的圆形放在桌子上", "红圆", {"红": 1, "圆": 1}),
        ("ねこがいる", "ねこ", {"ね": 1, "こ": 1}),
        ("एक लाल फूल", "लाल", {"लाल": 1}),
        ("แมวสีแดง", "แดง", {"แ": 1, "ด": 1, "ง": 1}),
        ("l’été d'un chat", "l'e\u0301te\u0301", {"l'été": 1}),
    ],
)
def test_words_are_found_in_scripts_without_spaces_and_with_marks(
    caption: str, prompt: str, counts: dict[str, int]
) -> None:
    assert Vocabulary([caption]).coverage(prompt).counts == counts


@pytest.mark.parametrize("prompt", ["🦊", "!!!", "\x00\x1b[", "   \n\t", "\u202e\u200b", "_ _ _"])
def test_prompts_without_any_word_say_that_nothing_teaches_them(
    known: Vocabulary, prompt: str
) -> None:
    found = known.coverage(prompt)
    assert (found.verdict, found.counts, found.nearest, found.with_all_words) == (
        "unseen words",
        {},
        [],
        0,
    )


@pytest.mark.parametrize("captions", [[], [""], ["", "  ", "!"]])
def test_without_captions_every_word_is_unseen(captions: list[str]) -> None:
    found = Vocabulary(captions).coverage("a red fox")
    assert found.verdict == "unseen words"
    assert found.counts == {"red": 0, "fox": 0}
    assert found.nearest == []
    assert Vocabulary(captions).coverage("").verdict == "unseen words"


def test_a_caption_of_a_hundred_thousand_characters_is_read() -> None:
    long = "fox " * 25_000
    other = " ".join(f"word{number}" for number in range(12_000))
    vocabulary = Vocabulary([long, other, "a red fox"])
    assert vocabulary.coverage("red fox").verdict == "seen"
    assert vocabulary.coverage("fox word11999").verdict == "never together"
    assert vocabulary.coverage("fox").nearest[0] == (0, 1.0)


def test_a_prompt_of_a_hundred_thousand_characters_is_answered(known: Vocabulary) -> None:
    for prompt in ("x" * 100_000, "red fox " * 12_500, "!" * 100_000):
        assert known.coverage(prompt).verdict in ("seen", "unseen words")


def test_a_prompt_of_many_different_words_is_answered() -> None:
    prompt = " ".join(f"word{number}" for number in range(11_000))
    assert len(prompt) > 98_000
    found = Vocabulary([" ".join(f"other{number}" for number in range(5_000))]).coverage(prompt)
    assert found.verdict == "unseen words"
    assert len(found.counts) == 11_000


# --- what captions tell about themselves ----------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "stem"),
    [
        ("cats", "cat"),
        ("cities", "city"),
        ("boxes", "box"),
        ("churches", "church"),
        ("glasses", "glass"),
        ("glass", "glass"),
        ("cactus", "cactus"),
        ("bus", "bus"),
        ("dog's", "dog"),
        ("tennis", "tennis"),
    ],
)
def test_plural_endings_are_removed_and_others_kept(word: str, stem: str) -> None:
    assert words(word) == [stem]


def test_tokens_are_counted_about_as_clip_counts_them() -> None:
    """CLIP's own counts of these: 2, 7, 5 and 11, start and end included."""
    assert tokens("") == 2
    assert tokens("a photo of a cat") == 7
    assert tokens("a cat.") == 5
    assert abs(tokens("a photograph of an astronaut riding a horse") - 10) <= 3
    assert tokens("狐" * 30) == 32


@pytest.mark.parametrize("damaged", ["cafÃ©", "itâ€™s", "naÃ¯ve", "a \ufffd sign", "Â© 2020"])
def test_wrongly_decoded_letters_are_found(damaged: str) -> None:
    assert is_damaged(damaged)


@pytest.mark.parametrize(
    "whole", ["café", "it’s", "naïve", "Âme", "ÃO", "© 2020", "日本", "", "São Paulo", "ÂNGELA"]
)
def test_rightly_decoded_letters_are_left_alone(whole: str) -> None:
    assert not is_damaged(whole)


@pytest.mark.parametrize(
    "text",
    ["image", "IMG_1234", "untitled", "photo 12", "12", "", "DSC-0001.", "n/a", "None", "  "],
)
def test_captions_that_say_nothing(text: str) -> None:
    assert is_placeholder(text)


@pytest.mark.parametrize(
    "text", ["image of a cat", "a photo", "scan of page 3", "Bild", "12 monkeys"]
)
def test_captions_that_say_something(text: str) -> None:
    assert not is_placeholder(text)


def test_openings_that_many_captions_share() -> None:
    captions = [
        *(f"a photo of {thing}" for thing in ("cats", "dogs", "birds")),
        "something else is here",
    ]
    assert templates(captions) == [("a photo of", 0.75)]
    assert templates([]) == []
    assert templates(["one two three"] * 3) == []  # the whole caption is no opening
