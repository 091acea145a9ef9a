"""Tar files, WebDataset's (`key.jpg key.txt key.json ...`) and any others, read in place and never
unpacked.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, ClassVar, Literal, NamedTuple

from sfumato.data import files
from sfumato.data.entry_table import encode_part, joined
from sfumato.data.file_types import ANNOTATION_FILES, HEAD_BYTES, is_image
from sfumato.data.files import UnsafePath
from sfumato.data.listing import Listing, Reject, Slice, Source, printable_name, read
from sfumato.data.listing_parts import in_parts
from sfumato.data.parallel import forked_map
from sfumato.data.sources.image_folder import ImageFolderReader
from sfumato.data.sources.metadata import is_authoritative, may_be_table
from sfumato.data.split_names import held_out_files
from sfumato.data.tar_headers import plain_member
from sfumato.errors import DataError
from sfumato.storage.atomic import write_text
from sfumato.storage.cache_folder import cache_folder

if TYPE_CHECKING:
    import pyarrow

MAX_MEMBERS, USUAL_MEMBERS = 1_000_000, 1_000  # of one shard
MAX_HEADER_BYTES = 1 << 20  # of one member's extended header
UNIT = "members"
DESCRIPTIONS = ("dataset.json",)  # of images, wherever they lie


class Member(NamedTuple):
    """A regular file inside a tar."""

    name: str
    offset: int
    size: int


class _Part(NamedTuple):
    """A shard's entries as columns, what is left out, its sidecars by kind, and its members."""

    table: pyarrow.Table
    rejects: list[Reject]
    sidecars: Mapping[str, int]
    total: int


@dataclass(frozen=True)
class WebDataset(Source):
    """A .tar, or a folder of them: WebDataset's shards, or folders that somebody packed. Read as
    the folder that they hold together.

    Attributes:
        path, metadata, unnamed: as of a folder.
    """

    is_of_files: ClassVar[bool] = True

    kind: ClassVar[str] = "webdataset"

    path: str
    metadata: Literal["auto", "off"] = "auto"
    unnamed: Literal["leave_out", "use"] = "leave_out"

    def listing(self) -> Listing:
        """List the samples of all shards, as if they were one folder.

        Raises:
            DataError: if there is no tar, one is compressed or unreadable, or there are no images.
        """
        shards, rejects = self._shards()
        held = (
            {}
            if shards == [self.path]
            else held_out_files([self._below(shard) for shard in shards])
        )
        parts = in_parts(lambda shard: self._part(shard, held), shards)
        if parts is not None:
            return _joined(parts, rejects)
        indexed = forked_map(index_members, shards, chunk=1, images=USUAL_MEMBERS)
        members, refused = self._members(dict(zip(shards, indexed, strict=True)))
        return self._tree(members, [*rejects, *refused], held).listing()

    def _part(self, shard: str, held: Mapping[str, str]) -> _Part | None:
        """List a shard whose images depend on no other one; None if they might."""
        failed = files.failed_reads()
        indexed = index_members(shard)
        if not all(map(_is_plain, (member.name for member in indexed[0]))):
            return None
        members, rejects = self._members({shard: indexed})
        try:
            listing = self._tree(members, rejects, held).listing()
        except DataError:  # it holds no image
            return None
        # such as a guess of the encoding of all texts; or an error of reading that may pass
        if listing.remarks or files.failed_reads() != failed:
            return None
        try:
            table = encode_part(listing.entries)
        except UnicodeEncodeError:  # in the shard's path
            return None
        return _Part(table, listing.rejects, listing.sidecars, listing.total)

    def _members(
        self, indexed: Mapping[str, tuple[list[Member], list[Reject]]]
    ) -> tuple[dict[str, tuple[str, Member]], list[Reject]]:
        """Return the members of shards by their shard and name, and what is left out."""
        members: dict[str, tuple[str, Member]] = {}
        rejects: list[Reject] = []
        for shard, (shard_members, refused) in indexed.items():
            prefix = "" if shard == self.path else f"{self._below(shard)}/"
            display = _display_name(prefix)
            rejects += [
                Reject(display(prefix + reject.name), reject.reason, reject.part)
                for reject in refused
            ]
            for member in shard_members:
                if prefix + member.name in members:
                    rejects.append(
                        Reject(
                            display(prefix + member.name),
                            "appears twice in the tar: the first one is used",
                        )
                    )
                else:
                    members[prefix + member.name] = (shard, member)
        for name in _further_images(members):
            prefix = name[: len(name) - len(members[name][1].name)]
            rejects.append(Reject(_display_name(prefix)(name), "another image of the same sample"))
            del members[name]
        return members, rejects

    def _tree(
        self,
        members: dict[str, tuple[str, Member]],
        rejects: list[Reject],
        held: Mapping[str, str],
    ) -> ImageFolderReader:
        prefixes = {
            name: name[: len(name) - len(member.name)] for name, (_, member) in members.items()
        }

        def blob(name: str) -> Slice:
            shard, member = members[name]
            return Slice(shard, member.offset, member.size)

        def head(name: str) -> bytes:
            shard, member = members[name]
            return read(shard, member.offset, min(HEAD_BYTES, member.size))

        return ImageFolderReader(
            where=self.path,
            names=list(members),
            blob=blob,
            head=head,
            metadata=self.metadata,
            unnamed=self.unnamed,
            rejects=rejects,
            inside=lambda name: members[name][1].name,
            display_name=lambda name: _display_name(prefixes.get(name, ""))(name),
            holdout=lambda name: held.get(prefixes[name].rstrip("/")),
            unit=UNIT,
        )

    def _below(self, shard: str) -> str:
        """Return a shard's path relative to the folder."""
        return shard[len(self.path.rstrip("/")) + 1 :]

    def _shards(self) -> tuple[list[str], list[Reject]]:
        """Return the tars, and rejects for whatever else lies in their folder."""
        if not files.exists(self.path):
            raise DataError(
                "no such file or folder",
                where=self.path,
                hint="check the path; it is relative to where you run sfumato",
            )
        root = self.path.rstrip("/")
        walked = files.explore(root) if files.is_folder(self.path) else files.Walk([], [])
        paths = [f"{root}/{name}" for name in walked.names] or [self.path]
        packed = [
            name
            for name in paths
            if name.lower().endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst"))
        ]
        if packed:
            raise DataError(
                "is a compressed tar: no random access",
                where=packed[0],
                hint="unpack it to .tar; images are compressed already",
            )
        shards = [name for name in paths if name.lower().endswith(".tar")]
        if not shards:
            raise DataError(
                "holds no .tar shards",
                where=self.path,
                hint="name a .tar file or the folder that holds them",
            )
        others = [self._below(name) for name in paths if name not in set(shards)]
        rejects = [Reject(printable_name(name), "a file next to the shards") for name in others]
        return shards, [
            *rejects,
            *(Reject(printable_name(name), reason) for name, reason in walked.passed_over),
        ]


def _is_plain(name: str) -> bool:
    """Return whether a member says nothing of images in other shards: it is in no folder, and no
    table.
    """
    describes = may_be_table(name) or is_authoritative(name) or name in DESCRIPTIONS
    return "/" not in name and not describes


def _joined(parts: Sequence[_Part], rejects: Sequence[Reject]) -> Listing:
    """Return the listing of shards that were listed one by one.

    Args:
        rejects: files beside the shards.
    """
    sidecars: Counter[str] = Counter()
    for part in parts:
        sidecars.update(part.sidecars)
    return Listing(
        entries=joined([part.table for part in parts]),
        rejects=[*rejects, *(reject for part in parts for reject in part.rejects)],
        sidecars=dict(sorted(sidecars.items())),
        unit=UNIT,
        total=sum(part.total for part in parts) + sum(not reject.part for reject in rejects),
    )


def _display_name(prefix: str) -> Callable[[str], str]:
    """Return a function from a member's name to its name for people: `shard.tar:cats/0.png`."""
    return lambda name: (
        f"{printable_name(prefix[:-1])}:{printable_name(name[len(prefix) :])}"
        if prefix
        else printable_name(name)
    )


def _further_images(members: dict[str, tuple[str, Member]]) -> list[str]:
    """Return images such as `0.seg.png` of a WebDataset sample `0` whose image is `0.jpg`.

    Annotations that models read are not among them.
    """
    plain = {
        _key(name) for name in members if is_image(name) and "." not in name[len(_key(name)) + 1 :]
    }
    return [
        name
        for name in members
        if is_image(name)
        and "." in (fields := name[len(_key(name)) + 1 :])
        and fields.partition(".")[0].lower() not in ANNOTATION_FILES
        and _key(name) in plain
    ]


def _key(name: str) -> str:
    """Return the path up to the first dot of the file's name."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def index_members(shard: str) -> tuple[list[Member], list[Reject]]:
    """Return the regular members of a tar, from the cache if this very file was indexed before.

    Raises:
        DataError: if it is missing or not a tar.
    """
    try:
        path = files.local(shard)
        identity = f"{path.resolve()} {files.version_of_local(shard)} 3"
        # paths need not be valid UTF-8
        name = hashlib.sha256(identity.encode(errors="surrogatepass")).hexdigest()
        index_file = cache_folder() / "tar-index" / f"{name}.json"
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # not there, or damaged
            stored = json.loads(index_file.read_text())
            return [Member(*member) for member in stored["members"]], [
                Reject(*reject) for reject in stored["rejects"]
            ]
        members, rejects = _index(path)
    except (tarfile.TarError, OSError, ValueError, KeyError, RecursionError) as error:
        raise DataError(
            f"is not a complete tar: {error}", where=shard, hint="download or recreate it"
        ) from None
    _write_to_cache(
        index_file,
        json.dumps(
            {
                "members": members,
                "rejects": [[reject.name, reject.reason, reject.part] for reject in rejects],
            }
        ),
    )
    return members, rejects


def _write_to_cache(target: Path, text: str) -> None:
    """Write to the cache if that is possible; if it is not, only time is lost."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text(target, text)
    except OSError:
        return


class _Headers:
    """A tar file that refuses to read more at once than any header needs, since sizes in it are
    only claims.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)


def _index(path: Path) -> tuple[list[Member], list[Reject]]:
    members: list[Member] = []
    rejects: list[Reject] = []
    size = path.stat().st_size
    with path.open("rb") as file, tarfile.TarFile(fileobj=_Headers(file)) as tar:  # type: ignore[arg-type]
        for info in _headers(tar, file.fileno(), size, path.name, rejects):
            # as Windows, and `tar c .`, write them
            plain = info.name.replace("\\", "/").removeprefix("./")
            name = printable_name(plain)
            parts = plain.split("/")
            if (
                info.isdir()
                or files.is_hidden(parts)
                or any(part.startswith("__") for part in parts)
            ):
                continue
            try:
                if not info.isreg() or info.issparse():
                    raise UnsafePath("is a link, a device or sparse")
                files.check_relative(plain)
                if info.size < 0 or info.offset_data + info.size > size:
                    raise UnsafePath("is cut short")
            except UnsafePath as reason:
                rejects.append(Reject(name[:200], str(reason)))
            else:
                members.append(Member(plain, info.offset_data, info.size))
        file.seek(min(max(0, tar.offset), size))
        if any(file.read(tarfile.BLOCKSIZE)):  # a whole tar ends in zeros
            lost = f"damaged after {len(members)} members: what follows cannot be read"
            rejects.append(Reject(printable_name(path.name), lost, part=True))
    return members, rejects


def _headers(
    tar: tarfile.TarFile, file: int, size: int, name: str, rejects: list[Reject]
) -> Iterator[tarfile.TarInfo]:
    for number in range(MAX_MEMBERS + 1):
        before = tar.offset
        # the first is read already, and records for all members may change any of them
        try:
            plain = plain_member(file, before, size) if number and not tar.pax_headers else None
            if plain is not None:
                tar.offset = plain[1]
                yield plain[0]
                continue
            info = tar.next()
            if info is not None and tar.offset <= before and number:
                raise tarfile.ReadError("a member of negative size")
        except (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError) as error:
            if files.may_pass(error):
                raise
            rejects.append(
                Reject(printable_name(name), f"damaged after {number} members: {error}", part=True)
            )
            return
        tar.members.clear()  # type: ignore[attr-defined]  # it would keep every header
        if info is None:
            return
        yield info
    rejects.append(
        Reject(
            printable_name(name),
            f"more than {MAX_MEMBERS} members: the rest is not read",
            part=True,
        )
    )
