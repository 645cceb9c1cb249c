"""The command line: `tlinformer COMMAND`; one module a command, which `app` puts together.

Exit codes: 0 done, 1 failed at run time or found a problem, 2 wrong usage or input,
130 interrupted.
"""

from __future__ import annotations

import os
import sys
from typing import Any


def complain(message: str) -> None:
    """Prints a message as one line on the standard error stream."""
    line = " ".join(message.split())
    if sys.stderr.isatty() and "NO_COLOR" not in os.environ:
        line = f"\x1b[31m{line}\x1b[0m"
    print(line, file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    # GNU OpenMP reads this when torch loads it. By default a thread that waits spins for
    # milliseconds, and on a busy machine takes them from the thread that it waits for.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"] or ["--help"]  # welcome at any place
    try:
        from .app import app  # here, so that what goes wrong from now on is answered in words
        from .bench import SUITES, run_suite

        if arguments[0] == "bench" and arguments[1:2] and arguments[1] in SUITES:
            return run_suite(arguments[1:])
        return app(arguments, prog_name="tlinformer", standalone_mode=False) or 0
    except (Exception, KeyboardInterrupt) as error:
        for cause in (error, error.__cause__):
            if isinstance(cause, KeyboardInterrupt):
                complain(str(cause) or "interrupted")
                return 130
        message, code = _explain(error)
        if debug and not hasattr(error, "format_message"):
            raise
        complain(f"error: {message}")
        return code


def _explain(error: BaseException) -> tuple[str, int]:
    """What to say of an error, and the exit code."""
    if hasattr(error, "format_message"):  # a usage error of the command-line parser
        wrong: list[Any] = getattr(error.__cause__, "errors", list)()  # of pydantic
        given = "".join(f"; got {detail['input']!r}" for detail in wrong)
        command = getattr(getattr(error, "ctx", None), "command_path", "tlinformer")
        return f"{error.format_message()}{given} (see {command} --help)", 2
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = {"yaml": "pyyaml"}.get(error.name, error.name.replace("_", "-"))
        return f"the package {package} is missing: pip install {package}", 1
    if isinstance(error, (ValueError, FileNotFoundError, FileExistsError)):
        return str(error), 2
    if isinstance(error, (RuntimeError, ImportError)):  # worded for people where they are raised
        return str(error), 1
    return f"{type(error).__name__}: {error} (--debug shows where)", 1
