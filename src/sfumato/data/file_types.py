"""Detection of what a file is by its name or its first bytes: an image that can be read, one that
has to be converted, or something else.
"""

from __future__ import annotations

NUMPY = b"\x93NUMPY"
HEAD_BYTES = 32
SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".png",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".npy",
    ".jfif",
    ".jpe",
    ".jfi",
)
POINT_CLOUD_SUFFIXES = (".npy", ".ply", ".xyz", ".csv")
MAPS = ("doodle", "mask")  # annotations that are images, laid over the image
# The files that annotate an image, by the field of `Entry` that holds them: their suffixes, as of
# `cat.mask.png`.
ANNOTATION_FILES = {**dict.fromkeys(MAPS, SUFFIXES), "points": POINT_CLOUD_SUFFIXES}
ARCHIVES = (
    ".zip",
    ".tar",
    ".npz",
    ".parquet",
    ".arrow",
    ".tar.gz",
    ".tgz",
    ".tar.bz2",
    ".tar.xz",
    ".tar.zst",
    ".7z",
    ".rar",
    ".gz",
)
SYSTEM = frozenset({"thumbs.db", "desktop.ini", "ehthumbs.db", "icon\r"})
_SIGNATURES = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG", "png"),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
    (b"II*\0", "tif"),
    (b"MM\0*", "tif"),
    (NUMPY, "npy"),
    (b"ply", "ply"),
)
_WITH_MAGICK = "convert it to JPEG or PNG, for example with ImageMagick: magick FILE FILE.png"
_CONVERT = {
    "HEIC": (
        (".heic", ".heif", ".hif"),
        "convert it to JPEG, for example with heif-convert, or export it as JPEG on the phone",
    ),
    "AVIF": ((".avif",), _WITH_MAGICK),
    "JPEG XL": ((".jxl",), "convert it to PNG, for example with djxl"),
    "JPEG 2000": ((".jp2", ".j2k", ".jpx"), _WITH_MAGICK),
    "Photoshop": ((".psd", ".psb"), "export it as PNG"),
    "SVG": ((".svg",), "render it as PNG, for example with rsvg-convert"),
    "EPS or PDF": ((".eps", ".ps", ".pdf", ".ai"), "render it as PNG, for example with pdftoppm"),
    "camera raw": (
        (".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"),
        "develop it to TIFF or JPEG, for example with dcraw",
    ),
    "DICOM": (
        (".dcm", ".dicom"),
        "save its pixels as .npy or TIFF, for example with pydicom and numpy.save",
    ),
    "NIfTI": (
        (".nii", ".nii.gz"),
        "save its slices as .npy or TIFF, for example with nibabel and numpy.save",
    ),
    "a microscope's own format": (
        (".czi", ".lif", ".nd2", ".oib", ".vsi"),
        "export it as TIFF, for example with Fiji",
    ),
    "OpenEXR or HDR": ((".exr", ".hdr"), "save its pixels as .npy or as 32-bit TIFF"),
    "Targa, PCX or PPM": (
        (".tga", ".pcx", ".ppm", ".pgm", ".pbm", ".pnm", ".ico", ".icns", ".dds"),
        _WITH_MAGICK,
    ),
    "a video": (
        (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg"),
        "save its frames as images, for example with ffmpeg",
    ),
}


def is_image(name: str) -> bool:
    """Return whether a name has the ending of an image format that can be read."""
    return name.lower().endswith(SUFFIXES)


def suffix_of(data: bytes) -> str:
    """Return the usual ending of a file, such as "png", from its first bytes; "bin" if unknown."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((suffix for signature, suffix in _SIGNATURES if data.startswith(signature)), "bin")


def looks_like_image(data: bytes) -> bool:
    """Return whether the first bytes are those of an image format that can be read."""
    return suffix_of(data) not in ("bin", "ply")


def why_left_out(name: str) -> str:
    """Return why a file that is neither an image nor beside one is left out.

    Where the file can be converted, the reason says how.
    """
    lowered = name.lower()
    for kind, (suffixes, advice) in _CONVERT.items():
        if lowered.endswith(suffixes):
            return f"{kind} is not supported: {advice}"
    if lowered.endswith(ARCHIVES):
        return "an archive or table next to images: give its own path to train on its contents"
    if lowered.endswith((".txt", ".caption", ".captions", ".cap", ".prompt", ".json", ".cls")):
        return "a text file that matches no image"
    return "not an image"


def has_known_ending(name: str) -> bool:
    """Return whether the ending alone tells what a file is, so that its bytes need not be read."""
    lowered = name.lower().rpartition("/")[2]
    return lowered in SYSTEM or lowered.endswith(_KNOWN)


_OTHER = (
    ".txt",
    ".caption",
    ".captions",
    ".cap",
    ".prompt",
    ".json",
    ".jsonl",
    ".csv",
    ".tsv",
    ".cls",
    ".md",
    ".rst",
    ".html",
    ".xml",
    ".yaml",
    ".yml",
    ".toml",
    ".log",
    ".py",
    ".ipynb",
    ".sh",
    ".m",
    ".r",
    ".xls",
    ".xlsx",
    ".doc",
    ".docx",
    ".ply",
    ".xyz",
    ".pt",
    ".pth",
    ".ckpt",
    ".safetensors",
    ".pkl",
    ".h5",
    ".hdf5",
    ".mat",
    ".db",
    ".sqlite",
    ".lnk",
    ".url",
    ".wav",
    ".mp3",
    ".flac",
)


_KNOWN = (
    *SUFFIXES,
    *ARCHIVES,
    *(suffix for suffixes, _ in _CONVERT.values() for suffix in suffixes),
    *_OTHER,
)


def stem_of(name: str) -> str:
    """Return a name without its ending."""
    ending = ending_of(name)
    return name[: -len(ending)] if ending else name


def ending_of(name: str) -> str:
    """Return the ending with its dot in lower case; "" if there is none."""
    base = name.rpartition("/")[2]
    stem, dot, ending = base.rpartition(".")
    return f".{ending.lower()}" if dot and stem else ""
