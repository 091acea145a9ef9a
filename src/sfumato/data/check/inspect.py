"""From the measurements of every image to findings: which files, what the effect on training is,
and what to do about it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sfumato.data.check import captions as text
from sfumato.data.check.findings import KINDS
from sfumato.data.check.measure import Measurement, measure
from sfumato.data.check.risk import MemorizationRisk, images_at_risk
from sfumato.data.choice import choose_evenly
from sfumato.data.decoding import PixelFormat, quiet
from sfumato.data.duplicates import MIN_SIDE, components, near_pairs
from sfumato.data.frames import unused_frames
from sfumato.data.ledger import Ledger
from sfumato.data.listing import Entry, Listing, Reject, select, values
from sfumato.data.parallel import ordered_map
from sfumato.data.thumbnails import signatures

DARK, BRIGHT, BLURRED, FLAT = 0.36, 0.8, 0.25, 2.0
FLAT_SHARE = 0.1  # of the contrast that the more lively images have, where all have little
WHITE_SHARE = 0.6
ASPECT = 1 / 0.35
UNNAMED = (
    "not named in"  # beginning of the reason why images that metadata do not name are left out
)
MEASURED = 100_000  # images of a set, above which a sample is measured
SAMPLE = 20_000  # images that diversity, clusters and outliers are judged by, spread evenly
EXTRACTOR = "thumbnails-8x8-and-gradients-4x4x8"


@dataclass(frozen=True, kw_only=True)
class IntendedModel:
    """The model that the set is meant for.

    Attributes:
        resolution: of the images.
        parameters: of the model.
        form: what training would decode the images to, in RGB by default.
        remarks: what is known about the set beforehand, a sentence each.
        length: tokens that the model reads of a caption; cuts: whether it cuts one.
    """

    resolution: int
    parameters: int = 0
    form: PixelFormat | None = None
    remarks: tuple[str, ...] = ()
    length: int = text.CLIP_LIMIT
    cuts: Callable[[str], bool] = text.exceeds_clip


@dataclass(kw_only=True)
class Inspection:
    """Everything that was found.

    Attributes:
        entries: as listed; positions below count them.
        form: what they were decoded to, but for the size; in RGB by default.
        measured: positions of readable images, in the order of the arrays.
        issues: positions by kind; names of what was left out are in `reasons`.
        reasons: why files are left out, by kind (`unreadable`, `unnamed`, `left_out`) and name.
        ledger: the account of all that the source holds.
        groups: of duplicates, near-duplicates and look-alikes, each a list of positions.
        clusters: positions of typical images of each kind of image found, and the kind's share.
        risk: the images that are memorized first; None if none can be read.
        learned: readable images that the source does not hold out.
        figures: counts and scores, as data.json has them.
        remarks: plain sentences about the set as a whole.
        share: of the listed images, which was measured; the others are taken to be like these.
    """

    source: str
    entries: Sequence[Entry]
    form: PixelFormat | None = None
    issues: dict[str, list[int]] = field(default_factory=dict)
    reasons: dict[str, dict[str, str]] = field(default_factory=dict)
    ledger: Ledger | None = None
    groups: dict[str, list[list[int]]] = field(default_factory=dict)
    clusters: list[tuple[list[int], float]] = field(default_factory=list)
    risk: MemorizationRisk | None = None
    learned: int = 0
    figures: dict[str, Any] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    share: float = 1.0

    def files(self) -> dict[str, list[str]]:
        """Return names by kind, in the order of the report."""
        named = {
            **{kind: sorted(positions) for kind, positions in self.reasons.items()},
            **{
                kind: [self.entries[i].name for i in positions]
                for kind, positions in self.issues.items()
            },
        }
        return {kind: named[kind] for kind in KINDS if named.get(kind)}

    def reasons_by_name(self) -> dict[str, str]:
        """Return the reason for each name that was left out."""
        return {
            name: reason for reasons in self.reasons.values() for name, reason in reasons.items()
        }

    def memorized_first(self) -> str:
        """Return which images are memorized first, in a sentence; "" without any."""
        return "" if self.risk is None else self.risk.sentence([e.name for e in self.entries])

    def rejects(self) -> dict[str, str]:
        """Return the names that training is better without, and the reasons.

        They are all but one of each group of copies, and what cannot be learned from. Copies under
        another caption or category stay: leaving them out is for a person to decide.
        """
        reasons = dict(self.reasons.get("unreadable", {}))
        for kind in ("low_information",):
            reasons.update(
                {self.entries[i].name: KINDS[kind].title.lower() for i in self.issues.get(kind, [])}
            )
        for kind in ("duplicate", "near_duplicate"):
            for original, *others in self.groups.get(kind, []):
                copies = [
                    i
                    for i in others
                    if _same_label(_label(self.entries[original]), _label(self.entries[i]))
                ]
                reasons.update(
                    {
                        self.entries[i].name: f"{kind} of {self.entries[original].name}"
                        for i in copies
                    }
                )
        return reasons


def inspect_data(
    listing: Listing,
    *,
    source: str,
    plan: IntendedModel,
    on_progress: Callable[[int, int], None] | None = None,
) -> Inspection:
    """Measure every image and collect the findings; the same data give the same findings."""
    entries = select(listing.entries, _sample(listing.entries))
    result = Inspection(
        source=source,
        entries=entries,
        form=plan.form,
        remarks=[*plan.remarks, *_sample_lines(len(entries), len(listing.entries))],
        share=len(entries) / max(1, len(listing.entries)),
    )
    for reject in listing.rejects:
        kind = "unnamed" if reject.reason.startswith(UNNAMED) else "left_out"
        result.reasons.setdefault(kind, {})[reject.name] = reject.reason
    unreadable: list[Reject] = []
    positions: list[int] = []
    measurements: list[Measurement] = []
    with quiet():
        for number, measurement in enumerate(
            ordered_map(lambda entry: measure(entry, plan.form), entries)
        ):
            if isinstance(measurement, str):
                unreadable.append(Reject(entries[number].name, measurement))
            else:
                positions.append(number)
                measurements.append(measurement)
            if on_progress is not None:
                on_progress(number + 1, len(entries))
    if unreadable:
        result.reasons["unreadable"] = {reject.name: reject.reason for reject in unreadable}
    result.ledger = Ledger.of(listing, unreadable, unread=len(listing.entries) - len(entries))
    places = np.array(positions, np.int64)
    result.figures.update(
        images=len(listing.entries),
        measured=len(entries),
        readable=len(measurements),
        unreadable=len(unreadable),
        ledger=result.ledger.plain(),
    )
    if measurements:
        result.remarks += unused_frames([m.frames for m in measurements])
        _image_findings(result, places, measurements, plan)
        groups = _copies(result, places, measurements)
        _risk(result, places, measurements, groups)
        _diversity(result, places, measurements)
    _captions(result, plan)
    _categories(result, listing, set(positions))
    _size(result, plan)
    return result


def _sample(entries: Sequence[Entry]) -> NDArray[np.int64]:
    """Return the positions of at most MEASURED images, as many of each category as its share, spread
    evenly over it.
    """
    if len(entries) <= MEASURED:
        return np.arange(len(entries))
    categories = np.array([name or "" for name in values(entries, "category")])
    return np.sort(choose_evenly(np.argsort(categories, kind="stable"), MEASURED))


def _sample_lines(count: int, total: int) -> list[str]:
    """Say what a sample means for the figures; [] without one."""
    if count == total:
        return []
    # of a share of one half, the widest: normal approximation, without replacement
    half_width = 1.96 * math.sqrt(0.25 / count * (1 - count / total))
    return [
        f"{count:,} of {total:,} images were measured, of each category in proportion: shares have a 95% "
        f"interval of at most {half_width:.1%} to either side, and copies are found among these only."
    ]


def _image_findings(
    result: Inspection,
    places: NDArray[np.int64],
    measurements: list[Measurement],
    plan: IntendedModel,
) -> None:
    """Find what each image shows by itself, or in comparison with the usual one."""

    def column(name: str) -> NDArray[Any]:
        return np.array([getattr(m, name) for m in measurements])

    size = column("size")
    longer, shorter = size.max(1), size.min(1)
    white = column("white")
    colour = column("colourful") > 2
    notes = [set(m.notes) for m in measurements]
    kinds = {
        "dark": column("dark_end") < DARK,
        "bright": (column("bright_end") > BRIGHT)
        | ((white > WHITE_SHARE) & bool(np.median(white) < 0.2)),
        "low_information": column("contrast")
        < min(FLAT, FLAT_SHARE * float(np.quantile(column("contrast"), 0.9))),
        "odd_aspect": _odd_aspect(longer / shorter),
        "odd_size": _odd_size(np.sqrt(longer * shorter)),
        "upscaled": shorter < plan.resolution,
        "grayscale": ~colour if 0.5 < colour.mean() < 1 else np.zeros(len(measurements), bool),
        "transparent": np.array(["transparency_filled" in note for note in notes]),
        "converted": np.array([bool(note - {"transparency_filled"}) for note in notes]),
    }
    sharp = column("sharpness")
    median_sharpness = float(np.median(sharp))
    kinds["blurry"] = (sharp < max(BLURRED, 0.3 * median_sharpness)) & ~kinds["low_information"]
    kinds["bright"] &= ~kinds["low_information"]
    kinds["dark"] &= ~kinds["low_information"]
    result.issues.update(
        {kind: places[mask].tolist() for kind, mask in kinds.items() if mask.any()}
    )
    result.figures.update(
        median_size=[int(v) for v in np.median(size, axis=0)],
        smallest_side=int(shorter.min()),
        largest_side=int(longer.max()),
        median_sharpness=round(median_sharpness, 3),
        resolution=plan.resolution,
        notes=dict(sorted(Counter(note for names in notes for note in names).items())),
    )


def _odd_aspect(ratio: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which ratios of longer to shorter side are above 1/0.35, or over twice the usual."""
    result: NDArray[np.bool_] = (ratio > ASPECT) | (ratio > 2.0001 * np.median(ratio))
    return result


def _odd_size(size: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which sizes lie far outside the quartiles, on a log scale.

    Far is more than 1.5 times the interquartile range, or a factor of 1.2 if that is more.
    """
    log = np.log(size)
    low, high = np.quantile(log, [0.25, 0.75])
    room = max(1.5 * (high - low), np.log(1.2))
    result: NDArray[np.bool_] = (log < low - room) | (log > high + room)
    return result


def _copies(
    result: Inspection, places: NDArray[np.int64], measurements: list[Measurement]
) -> NDArray[np.int64]:
    """Find groups of equal and of nearly equal images; return the group of each image, (n,).

    Look-alikes under different names are kept apart from copies.
    """
    same: dict[str, list[int]] = {}
    for number, measurement in enumerate(measurements):
        same.setdefault(measurement.id, []).append(number)
    groups = [group for group in same.values() if min(measurements[group[0]].size) >= MIN_SIDE]
    labels = [_label(result.entries[place]) for place in places]
    near: list[tuple[int, int]] = []
    alike: list[tuple[int, int]] = []
    for one, other in near_pairs(np.array([measurements[group[0]].thumbnail for group in groups])):
        # Of equal images under several names, those count that are called like the other.
        matches = [
            pair
            for pair in product(groups[one], groups[other])
            if _same_label(labels[pair[0]], labels[pair[1]])
        ]
        near += matches
        alike += [] if matches else [(groups[one][0], groups[other][0])]
    area = np.array([m.size[0] * m.size[1] for m in measurements])
    copies = {
        "duplicate": [group for group in same.values() if len(group) > 1],
        "near_duplicate": _groups(near, area),
        "look_alike": _groups(alike, area),
    }
    for kind, members in copies.items():
        if members:
            result.groups[kind] = [[int(places[i]) for i in group] for group in members]
            result.issues[kind] = sorted(i for group in result.groups[kind] for i in group)
    links = [
        (group[0], other)
        for kind in ("duplicate", "near_duplicate")
        for group in copies[kind]
        for other in group[1:]
    ]
    same_image = components(len(measurements), np.array(links, np.int64).reshape(-1, 2))
    distinct = len(np.unique(same_image))
    result.figures.update(copies=len(measurements) - distinct, distinct=distinct)
    return same_image


def _risk(
    result: Inspection,
    places: NDArray[np.int64],
    measurements: list[Measurement],
    groups: NDArray[np.int64],
) -> None:
    """Find the images that are memorized first, among those that the source does not hold out."""
    learned = [i for i, place in enumerate(places) if result.entries[place].holdout is None]
    result.learned = round(len(learned) / result.share)
    if not learned:
        return
    result.risk = images_at_risk(
        np.stack([measurements[i].thumbnail for i in learned]), groups[learned], places[learned]
    )
    result.figures["memorized_first"] = result.risk.plain([e.name for e in result.entries])


def _label(entry: Entry) -> tuple[str | None, frozenset[str]]:
    return entry.category, frozenset(entry.captions)


def _same_label(
    first: tuple[str | None, frozenset[str]], second: tuple[str | None, frozenset[str]]
) -> bool:
    """Return whether two images have the same category and captions, where both have them."""
    return all(not (a and b) or a == b for a, b in zip(first, second, strict=True))


def _groups(pairs: Sequence[tuple[int, int]], area: NDArray[np.int64]) -> list[list[int]]:
    """Return the connected groups of more than one image, each with its largest image first."""
    members: dict[int, list[int]] = {}
    for number, group in enumerate(
        components(len(area), np.array(pairs, np.int64).reshape(-1, 2)).tolist()
    ):
        members.setdefault(group, []).append(number)
    return [
        sorted(group, key=lambda i: (-area[i], i)) for group in members.values() if len(group) > 1
    ]


def vendi(features: NDArray[np.floating]) -> float:
    """Return the Vendi score, the effective number of different images.

    It is the exponential of the entropy of the eigenvalues of the cosine similarities over n.

    Source: Friedman & Dieng 2023 (arXiv:2210.02410), eq. 2; computed from the smaller of the two
    Gram matrices, whose eigenvalues agree.
    """
    rows = features.astype(np.float64)
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    gram = rows.T @ rows if rows.shape[1] < len(rows) else rows @ rows.T
    values = np.linalg.eigvalsh(gram / len(rows))
    values = values[values > 1e-12]
    return float(np.exp(-(values * np.log(values)).sum()))


def _diversity(
    result: Inspection, places: NDArray[np.int64], measurements: list[Measurement]
) -> None:
    """Compute Vendi scores, kinds of images, and outliers far from all others.

    They are judged by hand-made features of a sample, spread evenly over the set.
    """
    chosen = np.unique(
        np.linspace(0, len(measurements) - 1, min(len(measurements), SAMPLE)).round().astype(int)
    )
    small = signatures(np.stack([measurements[i].thumbnail for i in chosen]))
    small /= np.sqrt(small.shape[1])
    features = np.concatenate(
        [small, np.stack([measurements[i].gradients for i in chosen]).astype(np.float32)], axis=1
    )
    by_category: dict[str, list[int]] = {}
    for row, i in enumerate(chosen):
        category = result.entries[places[i]].category
        if category:
            by_category.setdefault(category, []).append(row)
    scores = {
        name: round(vendi(features[rows]), 2)
        for name, rows in sorted(by_category.items())
        if len(rows) > 1
    }
    result.figures["vendi"] = {
        "extractor": EXTRACTOR,
        "n": len(chosen),
        "overall": round(vendi(features), 2),
        "by_category": scores,
    }
    _clusters(result, places[chosen], features)


def _clusters(result: Inspection, places: NDArray[np.int64], features: NDArray[np.float32]) -> None:
    from scipy.spatial import cKDTree
    from sklearn.cluster import MiniBatchKMeans

    centred = features - features.mean(0)
    axes = np.linalg.eigh(centred.T @ centred)[1][:, -16:]
    points = centred @ axes
    count = int(min(12, len(points) // 20))
    if count >= 2:
        means = MiniBatchKMeans(count, random_state=0, n_init=3, batch_size=2048).fit(points)
        distance = np.linalg.norm(points - means.cluster_centers_[means.labels_], axis=1)
        for label, size in sorted(
            Counter(means.labels_.tolist()).items(), key=lambda pair: (-pair[1], pair[0])
        ):
            inside = np.flatnonzero(means.labels_ == label)
            typical = inside[np.argsort(distance[inside], kind="stable")[:8]]
            result.clusters.append((places[typical].tolist(), size / len(points)))
    if len(points) >= 50:
        away = cKDTree(points).query(points, k=6, workers=-1)[0][:, 5]
        middle = np.median(away)
        limit = middle + 8 * max(np.median(np.abs(away - middle)), 1e-6)
        far = np.flatnonzero(away > limit)
        if len(far):
            result.issues["outlier"] = places[
                far[np.argsort(-away[far], kind="stable")[:200]]
            ].tolist()


def _captions(result: Inspection, plan: IntendedModel) -> None:
    """Find captions that are missing, shared, too long or damaged, and summarize their words.

    Captions are missing only if some images have one.
    """
    entries = result.entries
    captioned = [i for i, entry in enumerate(entries) if entry.captions]
    if not captioned:
        return
    everyone = [caption for i in captioned for caption in entries[i].captions]
    shared = {
        caption
        for caption, times in Counter(entries[i].captions[0] for i in captioned).items()
        if times > 1
    }

    def having(test: Callable[[str], bool]) -> list[int]:
        return [i for i in captioned if any(test(caption) for caption in entries[i].captions)]

    findings = {
        "caption_missing": [i for i, entry in enumerate(entries) if not entry.captions],
        "caption_duplicate": [i for i in captioned if entries[i].captions[0] in shared],
        "caption_truncated": having(plan.cuts),
        "caption_damaged": having(text.is_damaged),
        "caption_placeholder": having(text.is_placeholder),
    }
    result.issues.update({kind: positions for kind, positions in findings.items() if positions})
    lengths = np.array([text.tokens(caption) for caption in everyone])
    common = Counter(word for caption in everyone for word in set(text.words(caption)))
    openings = text.templates(everyone)
    over = {f"over_{limit}_tokens": int((lengths > limit).sum()) for limit in (77, 256, 512)}
    result.figures["captions"] = {
        "images": len(entries),
        "captioned": len(captioned),
        "captions": len(everyone),
        "distinct": len(set(everyone)),
        "tokens_estimated": {f"p{q}": int(np.quantile(lengths, q / 100)) for q in (5, 50, 95, 100)},
        **over,
        "tokens_read": plan.length,
        "words": len(common),
        "common_words": common.most_common(30),
        "openings": [[opening, round(share, 3)] for opening, share in openings],
    }
    if openings and openings[0][1] > 0.5:
        result.remarks.append(
            f"{openings[0][1]:.0%} of the captions begin “{openings[0][0]} …”: the model will "
            "expect that opening in every prompt."
        )
    if lengths.size and np.quantile(lengths, 0.95) < 12:
        result.remarks.append(
            "All captions are short: a mix of short and long ones teaches a model to follow "
            "prompts far better."
        )


def _categories(result: Inspection, listing: Listing, readable: set[int]) -> None:
    """Count the readable images of each category; of a set of which a sample was measured, the listed
    ones.
    """
    if result.share < 1:
        counts = Counter(name for name in values(listing.entries, "category") if name)
    else:
        counts = Counter(
            e.category for i, e in enumerate(result.entries) if e.category and i in readable
        )
    if not counts:
        return
    shares = np.array(list(counts.values())) / sum(counts.values())
    effective = float(np.exp(-(shares * np.log(shares)).sum()))
    result.figures["categories"] = {
        "counts": dict(sorted(counts.items())),
        "effective_number": round(effective, 2),
    }
    name, least = min(counts.items(), key=lambda pair: (pair[1], pair[0]))
    if effective < 0.7 * len(counts):
        result.remarks.append(
            f"The categories are imbalanced: the effective number of categories is {effective:.1f} "
            f"of {len(counts)}; “{name}” ({least} image(s)) will be generated worst."
        )
    if least < 20:
        result.remarks.append(
            f"“{name}” has only {least} image(s): too few to learn this category; expect memorized "
            "samples."
        )


def _size(result: Inspection, plan: IntendedModel) -> None:
    """Remark on whether there are enough images for the model that would be trained."""
    distinct = result.figures.get("distinct", 0)
    if not distinct:
        result.remarks.append("No image can be read: there is nothing to learn from.")
        return
    if distinct < 100:
        result.remarks.append(
            f"{distinct} different images: enough to fine-tune a trained model, not to train one."
        )
    channels = 3 if plan.form is None else plan.form.channels
    numbers = round(distinct / result.share) * plan.resolution**2 * channels
    result.figures["model"] = {
        "resolution": plan.resolution,
        "parameters": plan.parameters,
        "values_in_images": numbers,
    }
    if plan.parameters > numbers:
        result.remarks.append(
            f"The model meant for this set has {plan.parameters / 1e6:.1f}M parameters, more "
            f"than the {numbers / 1e6:.1f}M values in all "
            "images: it could memorize them; the verdict while training says when."
        )
