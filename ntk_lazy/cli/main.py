"""Read the arguments, run one command, and turn errors into one line and an exit code."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import NoReturn, final

from typing_extensions import override

from ntk_lazy.cli import model_commands, study_commands
from ntk_lazy.errors import ArgumentError, NTKLazyError
from ntk_lazy.records import versions
from ntk_lazy.study.pipe import abandon

_INTERRUPTED = 130  # what a shell reports for a process that Ctrl-C has ended
_CLOSED_PIPE = 141  # and for one that has lost the reader of its output
_WRONG_INPUT = 2
_FAILED = 1
_EPILOG = """\
Each command has its own --help with a worked example. Exit code: 0 for success, 1 if the work failed or was done in
part, 2 if the input was wrong (nothing is written then), 130 after Ctrl-C.
"""


@final
class _Parser(argparse.ArgumentParser):
    """A parser whose errors take one line."""

    @override
    def error(self, message: str) -> NoReturn:
        self.exit(_WRONG_INPUT, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands."""
    parser = _Parser(
        prog="ntk-lazy",
        description="Spectra of the empirical neural tangent kernel, without ever writing it down.",
        epilog=_EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"ntk-lazy {versions().get('ntk-lazy', 'unknown')}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    study_commands.add_to(commands)
    model_commands.add_to(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        0; 1 if the work failed, was done in part or could not be written; 2 if the input was wrong; 130 if it was
        interrupted; 141 if nobody reads its output any more. Errors are one line on standard error.
    """
    try:
        try:
            return _run(argv)
        finally:
            # Here, and not when the interpreter ends: it could only complain then.
            sys.stdout.flush()
    except BrokenPipeError:
        abandon(sys.stdout)
        return _CLOSED_PIPE
    except OSError as error:  # the files are written, the words are not
        abandon(sys.stdout)
        sys.stderr.write(f"ntk-lazy: error: cannot write to standard output: {error.strerror or error}\n")
        return _FAILED


def _run(argv: Sequence[str] | None) -> int:
    logging.basicConfig(level=logging.ERROR)
    arguments = build_parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except SystemExit as error:  # of the user's model: a silent 0 would pass for success
        code = "" if error.code is None else repr(error.code)
        sys.stderr.write(f"ntk-lazy: error: the model called sys.exit({code})\n")
        return _FAILED
    except NTKLazyError as error:
        message = " ".join(str(error).split())
        sys.stderr.write(f"ntk-lazy: error: {message}\n")
        return _WRONG_INPUT if isinstance(error, ArgumentError) else _FAILED
    except KeyboardInterrupt:
        sys.stderr.write("ntk-lazy: interrupted\n")
        return _INTERRUPTED
