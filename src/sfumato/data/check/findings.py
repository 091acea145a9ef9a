"""The kinds of findings, and what each means for training."""

from __future__ import annotations

from typing import NamedTuple


class Kind(NamedTuple):
    """What a finding means: its title, its effect on training, advice, and whether files are
    rejected.
    """

    title: str
    effect: str
    advice: str
    reject: bool = False


KINDS = {
    "unreadable": Kind(
        "Unreadable",
        "They cannot be learned from.",
        "Repair or remove them; training leaves them out.",
        True,
    ),
    "unnamed": Kind(
        "Not named in the metadata",
        "Skipped in training because the metadata does not list them.",
        "Name them in the metadata, or set data.source.unnamed=use to train them without a "
        "caption.",
    ),
    "left_out": Kind(
        "Not used",
        "These files are neither images nor texts that belong to one; training does not read them.",
        "The reason for each is below, with how to include it.",
    ),
    "duplicate": Kind(
        "Exact duplicates",
        "An image that appears k times gets k times the weight, and is memorized first.",
        "Keep one of each; the reject list contains the duplicates with the same label "
        "and caption.",
        True,
    ),
    "near_duplicate": Kind(
        "Near-duplicates",
        "They count almost like exact ones, and would leak from training into validation; splits "
        "keep them together.",
        "Keep the best of each group; the reject list contains the duplicates with the same label "
        "and caption.",
        True,
    ),
    "look_alike": Kind(
        "Similar images with different labels",
        "Nearly the same image under different captions or categories: the model cannot learn "
        "the difference.",
        "Check the labels and captions; raise the resolution if the difference is small.",
    ),
    "dark": Kind(
        "Dark",
        "Samples will come out dark about as often as these are in the set.",
        "Brighten or remove those that are not night scenes.",
    ),
    "bright": Kind(
        "Bright",
        "Washed-out images teach washed-out samples.",
        "Check the exposure; remove scans of empty pages.",
    ),
    "blurry": Kind(
        "Blurred",
        "The model learns blur as a style and mixes it into sharp subjects.",
        "Remove them, or caption them as blurred.",
    ),
    "low_information": Kind("Empty", "They contain almost no information.", "Remove them.", True),
    "odd_aspect": Kind(
        "Odd aspect ratio",
        "A centre crop keeps only a small part of them, often not the subject.",
        "Crop them by hand, or train with data.buckets.",
    ),
    "odd_size": Kind(
        "Odd size",
        "Their detail and noise differ from those of the others, and the model may learn that.",
        "Check where they come from.",
    ),
    "upscaled": Kind(
        "Smaller than the training resolution",
        "They are enlarged, and teach soft images.",
        "Lower data.resolution, or find larger originals.",
    ),
    "outlier": Kind(
        "Outliers",
        "Rare kinds of images are learned poorly or memorized.",
        "Check whether they belong; if so, add more like them.",
    ),
    "grayscale": Kind(
        "Gray in a colour set",
        "Some samples will come out gray.",
        "Colour sets are better without them; or train with data.channels=1.",
    ),
    "transparent": Kind(
        "Transparent",
        "Transparent pixels are filled with data.background.",
        "Choose the colour; keep it with data.channels=4.",
    ),
    "converted": Kind(
        "Converted",
        "Decoded with a change: turned by EXIF; from CMYK, a palette, 16 bits or another "
        "profile; the first frame of several.",
        "Nothing to do if they look right here.",
    ),
    "caption_missing": Kind(
        "Caption missing", "They are trained unconditionally.", "Caption them."
    ),
    "caption_duplicate": Kind(
        "Caption shared",
        "One text for different images: what distinguishes them cannot be prompted.",
        "Say what is particular to each image.",
    ),
    "caption_truncated": Kind(
        "Caption too long",
        "The model does not read the rest.",
        "Put what matters first, or raise conditioner.text.length.",
    ),
    "caption_damaged": Kind(
        "Caption with encoding errors (mojibake)",
        "The text was decoded with the wrong encoding; such words cannot be prompted.",
        "Save the captions as UTF-8.",
    ),
    "caption_placeholder": Kind(
        "Placeholder caption",
        "Placeholder captions carry no information for text conditioning.",
        "Describe the image.",
    ),
}
