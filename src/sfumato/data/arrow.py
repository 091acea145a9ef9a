"""Arrow tables. The only module that imports pyarrow, which takes its time, so that small sets do
without it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow


def arrow() -> Any:
    """Import pyarrow."""
    import pyarrow
    import pyarrow.parquet

    return pyarrow


def write_table(table: pyarrow.Table, path: Path) -> None:
    """Write a table as an Arrow file of one batch, which can be memory-mapped."""
    pa = arrow()
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table.combine_chunks(), max_chunksize=max(1, table.num_rows))


def open_table(path: Path) -> pyarrow.Table:
    """Memory-map a table; nothing of it is read before it is used.

    Raises:
        OSError: if it is missing, or not a whole Arrow file.
    """
    pa = arrow()
    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except pa.ArrowException as error:
        raise OSError(f"{path}: {str(error)[:200]}") from None
