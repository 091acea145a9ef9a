"""The program, run in this process as a shell would run it."""

import contextlib
import io
from typing import NamedTuple
from unittest import mock

from sfumato.cli.main import main


class Result(NamedTuple):
    """Exit code, standard output, standard error."""

    code: int
    out: str
    err: str


def sfumato(*arguments: object) -> Result:
    """`sfumato ARGUMENTS`, without a terminal; an exception that the program lets through is
    raised.
    """
    out, err, code = io.StringIO(), io.StringIO(), 0
    command = mock.patch("sys.argv", ["sfumato", *map(str, arguments)])
    environment = mock.patch.dict("os.environ", {"NO_COLOR": "1", "COLUMNS": "160"})
    with command, environment, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    return Result(code, out.getvalue(), err.getvalue())
