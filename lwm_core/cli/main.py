"""Parsing, calling a verb, and turning errors into one line and an exit code.

Exit codes: 0 done, 1 failed, 2 wrong use; 130 and 143 stopped by Ctrl-C and SIGTERM.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import lwm_core
from lwm_core.errors import EndedElsewhereError, LwmError

VERBS = (
    "run", "resume", "evaluate", "generate", "chat", "report", "aot", "launch", "recipes", "config", "plugins",
    "doctor",
)  # fmt: skip
"""The modules beside this one, each with an ``add_parser``, in the order in which help shows them."""

EXIT_FAILED, EXIT_INTERRUPTED = 1, 130

_DISK = frozenset({errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOSPC, errno.EROFS})
"""What a disk says, whatever file it is about."""


class _Parser(argparse.ArgumentParser):
    """The top parser: its help ends with the verbs that plugins bring, told from metadata alone."""

    def format_help(self) -> str:
        """The usual help and the plugins' verbs."""
        text = super().format_help()
        verbs = _plugin_verbs()
        if verbs:
            text += "\nfrom plugins:\n" + "".join(f"  {name:<12}{origin}\n" for name, origin in verbs.items())
        return text


def make_parser() -> tuple[argparse.ArgumentParser, argparse._SubParsersAction[argparse.ArgumentParser]]:
    """The parser with the core's own verbs, and where a plugin's verb is added."""
    parser = _Parser(
        prog="lwm",
        description="Train, extend and evaluate million-token world models.",
        epilog="Start here: lwm run quickstart. LWM_DEBUG=1 or --debug shows tracebacks.",
    )
    parser.add_argument("--version", action="version", version=f"lwm {lwm_core.__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(title="verbs", metavar="VERB", dest="verb", parser_class=argparse.ArgumentParser)
    for name in VERBS:
        import_module(f"lwm_core.cli.{name}").add_parser(subparsers)
    return parser, subparsers


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given or os.environ.get("LWM_DEBUG") == "1"
    try:
        parser, subparsers = make_parser()
        verb = next((one for one in given if not one.startswith("-")), None)
        if verb is not None and verb not in subparsers.choices:
            _add_plugin_verb(verb, subparsers)
        args = parser.parse_args(given)
        if args.verb is None:
            parser.print_help()
            return 0
        function: Callable[[argparse.Namespace], int] = args.run
        _show_warnings_in_one_line()
        code = function(args)
        sys.stdout.flush()  # here, where a full disk can still be told
        return code
    except EndedElsewhereError as error:
        return error.exit_code  # the process that it began in has told why
    except LwmError as error:
        _tell(error, debug)
        return error.exit_code
    except KeyboardInterrupt:
        if _rank() in (None, "0"):
            print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has closed it (lwm ... | head); nothing more can be said there.
        _let_go_of_stdout()
        return EXIT_FAILED
    except OSError as error:
        if error.filename is None and error.errno not in _DISK:
            raise
        _tell(LwmError(f"{'' if error.filename is None else f'{error.filename}: '}{error.strerror or error}"), False)
        if debug:
            raise
        try:
            sys.stdout.flush()
        except OSError:
            _let_go_of_stdout()
        return EXIT_FAILED
    except BaseException as error:
        stopped = _stopped(error)
        if stopped is None:
            raise
        print(stopped[0], file=sys.stderr)
        return stopped[1]


def _let_go_of_stdout() -> None:
    """What was printed and cannot be written is forgotten; else the interpreter would complain of it at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _stopped(error: BaseException) -> tuple[str, int] | None:
    """Line and exit code of a run that was asked to stop; None for anything else, which is a bug of ours."""
    # Looked up, not imported: where the run loop was never loaded, nothing can have been stopped by it.
    module: Any = sys.modules.get("lwm_core.run.stopping")
    if module is None or not isinstance(error, module.StoppedError):
        return None
    return str(error) or "stopped", error.exit_code


def _rank() -> str | None:
    """The rank of this process as its launcher wrote it (see ``lwm_core.launched``); None where it has no siblings."""
    world = os.environ.get("WORLD_SIZE")
    return None if world in (None, "", "1") else os.environ.get("RANK") or None


def _tell(error: LwmError, debug: bool) -> None:
    rank = _rank()
    prefix = f"rank {rank}: " if rank else ""
    for line in str(error).splitlines() or [type(error).__name__]:
        print(f"{prefix}error: {line}", file=sys.stderr)
    if debug:
        import traceback

        traceback.print_exception(error)
        if error.details:
            print(error.details, file=sys.stderr)


def _show_warnings_in_one_line() -> None:
    """What a plugin did wrong is a line for people, not a place in our source."""
    import warnings

    usual = warnings.formatwarning

    def line(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> str:
        if category.__name__ == "PluginWarning":
            return f"warning: {message}\n" if _rank() in (None, "0") else ""
        return usual(message, category, *place, **more)

    warnings.formatwarning = line


def _plugin_verbs() -> dict[str, str]:
    """Verb → who brings it, from entry-point metadata; no plugin code runs."""
    from lwm_core.registry import Registry

    try:
        candidates = Registry.from_environment().candidates("cli")
    except LwmError:
        return {}
    return {c.name: c.origin for c in candidates if c.state == "available"}


def _add_plugin_verb(verb: str, subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Load the plugin that brings ``verb``, if one does; else argparse says that there is no such verb."""
    from lwm_core.registry import Registry

    registry = Registry.from_environment()
    if any(candidate.name == verb for candidate in registry.candidates("cli")):
        add_parser: Any = registry.load("cli", verb)
        add_parser(subparsers)
