"""``lwm chat DIR``: ask a run's model, one line a question; what it is shown and earlier turns stay in its cache."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lwm_core.cli.chat_shown import Shown, add_shown, named
from lwm_core.cli.overrides import add_overrides
from lwm_core.cli.sampling import add_sampling, check_sampling, sampling_of, say_aside

if TYPE_CHECKING:
    from types import FrameType

    from lwm_core.protocols import MediaClip
    from lwm_core.run import Model, Reopened
    from lwm_core.run.conversation import Answer, Conversation, Template

PROMPT = "you> "

DETAILS = """
Pictures and video come first, then the document, then the questions, so that each is read once however much is asked.
They are encoded by the run's [encoder]. A line /image FILE or /video FILE shows one more, before the next question.

A line that is /quit, or Ctrl-D, ends the chat. /reset forgets all that came after the start, and reads the start again.
Ctrl-C stops the answer, which stays as far as it came; a second one before the next question ends the chat, and so does
one while a document, a picture or a video is read.

The template lwm frames a question in the words that the needle task trains on, 'You are a helpful assistant. USER: ...
ASSISTANT:'; with a document, that stands first after USER, and 'Don't give information outside the document ...' before
ASSISTANT. plain has no words, for models that continue a text. Each answer's seed is one more than the last one's.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the ``lwm`` command."""
    parser = subparsers.add_parser("chat", help="ask a run's model questions", description=__doc__, epilog=DETAILS)
    parser.add_argument("folder", metavar="DIR", type=Path, help="the run's folder")
    parser.add_argument("--document", metavar="FILE", type=Path, help="read this text first, UTF-8")
    add_shown(parser)
    parser.add_argument("--template", default="lwm", metavar="NAME|TEXT", help="what stands around a question: lwm, "
                        "plain, or a text with {question} in it (lwm)")  # fmt: skip
    parser.add_argument("--system", metavar="TEXT", help="what stands before all else (the template's)")
    add_sampling(parser)
    add_overrides(parser)
    parser.add_argument("--json", action="store_true", help="print {question, text, tokens, tokens_per_second, "
                        "context, kept, read, read_seconds, ended, source} for each answer")  # fmt: skip
    parser.set_defaults(run=run_chat)


def run_chat(args: argparse.Namespace) -> int:
    """Load the model and answer. Of several processes, rank 0 reads and prints, and the others answer along."""
    from lwm_core.run import lead, reopen
    from lwm_core.run.conversation import make_template

    check_sampling(args)
    template = make_template(args.template, args.system)
    document = None if args.document is None else _text(args.document)
    shown = Shown(args)
    clips = [shown.open(*file) for file in args.shown]  # before the model is loaded
    opened = reopen(args.folder, args.overrides)
    with CtrlC.heard(follows=opened.trainer.processes.rank > 0) as ctrl_c:
        lead(opened.trainer, lambda model: Chat(args, opened, model, ctrl_c, shown).run(template, document, clips))
    return 0


def _text(path: Path) -> str:
    from lwm_core.errors import DataError

    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}; convert it first") from None
    if not text.strip():
        raise DataError(f"{path}: is empty; give a text, or leave --document out")
    return text


class CtrlC:
    """Ctrl-C. While a question is awaited it raises KeyboardInterrupt, as ever; else it asks once, and raises then.

    Attributes:
        waiting: whether a question is awaited.
        asked: whether it has come since then.
    """

    def __init__(self) -> None:
        self.waiting = self.asked = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The signal has come."""
        if self.waiting or self.asked:
            raise KeyboardInterrupt
        self.asked = True

    @classmethod
    @contextmanager
    def heard(cls, *, follows: bool) -> Iterator[CtrlC]:
        """Hear it inside the ``with``. A process that follows another one does not: a terminal sends it to all."""
        import signal

        made = cls()
        before = signal.signal(signal.SIGINT, signal.SIG_IGN if follows else made)
        try:
            yield made
        finally:
            signal.signal(signal.SIGINT, before)


class Chat:
    """Questions from standard input, answers on standard output, all else on standard error."""

    def __init__(self, args: argparse.Namespace, opened: Reopened, model: Model, ctrl_c: CtrlC, shown: Shown) -> None:
        self._args, self._opened, self._model, self._ctrl_c, self._shown = args, opened, model, ctrl_c, shown
        self._typed = sys.stdin.isatty()
        self._longest = opened.stage.seq_len

    def run(self, template: Template, document: str | None, clips: Sequence[MediaClip] = ()) -> None:
        """Until the questions end."""
        from dataclasses import replace

        from lwm_core.run.conversation import Conversation

        tokenizer = self._opened.pipeline.tokenizer
        sampling = sampling_of(self._args, tokenizer)
        ids = self._shown.ids(clips, self._opened)
        conversation = Conversation(self._model.generator(), tokenizer, template, document, ids)
        files = [*(path for _, path in self._args.shown), *filter(None, [self._args.document])]
        self._read(files, conversation.begin())
        for question in self._questions():
            if question == "/reset":
                self._read(files, conversation.begin())
                continue
            if self._show(question, conversation):
                continue
            answer = conversation.ask(question, sampling, self._args.stop, lambda: not self._ctrl_c.asked)
            sampling = replace(sampling, seed=sampling.seed + 1)
            self._tell(question, answer)

    def _show(self, line: str, conversation: Conversation) -> bool:
        """Read the picture or video that a line names; whether it names one.

        Where somebody types, a wrong line or file is told and no more, and Ctrl-C while it is encoded leaves it out.
        """
        from lwm_core.errors import LwmError

        try:
            file = named(line)
            if file is None:
                return False
            ids = self._shown.ids([self._shown.open(*file)], self._opened)
        except LwmError as error:
            if not self._typed:
                raise
            say_aside(str(error))
            return True
        if self._ctrl_c.asked and self._typed:
            say_aside(f"{file[1]}: left out")
            return True
        self._read([file[1]], conversation.show(ids))
        return True

    def _read(self, files: Sequence[Path], parts: Iterator[tuple[int, int]]) -> None:
        """Read what is no question, if there is anything, and tell how far it is."""
        import time

        from lwm_core.progress import clock

        began, shows = time.perf_counter(), sys.stderr.isatty()
        total = 0
        for done, total in parts:
            seconds = time.perf_counter() - began
            left = clock(seconds / done * (total - done))
            if shows:
                print(f"\r\033[K{done:,} of {total:,} tokens read · {left} left", end="", file=sys.stderr, flush=True)
            if self._ctrl_c.asked:
                print(file=sys.stderr)
                raise KeyboardInterrupt
        if shows and total:
            print("\r\033[K", end="", file=sys.stderr)
        if total and not self._args.json:
            seconds = max(time.perf_counter() - began, 1e-9)
            names = ", ".join(map(str, files))
            say_aside(f"{names}: {total:,} tokens read in {seconds:.1f} s · {total / seconds:,.0f} tok/s")

    def _questions(self) -> Iterator[str]:
        """Each line that is a question, ``/reset`` or names a file, to the end or ``/quit``."""
        while True:
            self._ctrl_c.waiting = True
            try:
                self._ctrl_c.asked = False
                line = self._line()
            except KeyboardInterrupt:
                if not self._typed:
                    raise
                say_aside("\n/quit or Ctrl-D ends the chat")
                continue
            finally:
                self._ctrl_c.waiting = False
            if not line and self._typed:
                print(file=sys.stderr)  # the shell's prompt begins a line
            if not line or line.strip() == "/quit":
                return
            if line.strip():
                yield line.strip()

    def _line(self) -> str:
        """The next line with its end; nothing where there is no more."""
        from lwm_core.errors import DataError

        if not self._typed:
            try:
                return sys.stdin.buffer.readline().decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"standard input: a line is not UTF-8 at byte {error.start}; convert it") from None
        if not sys.stdout.isatty():
            print(PROMPT, end="", file=sys.stderr, flush=True)
            return sys.stdin.readline()
        with suppress(ImportError):
            import readline  # noqa: F401  (lines can be edited from now on)
        try:
            return input(PROMPT) + "\n"
        except EOFError:
            return ""

    def _tell(self, question: str, answer: Answer) -> None:
        """Print the answer as it comes, and what it took."""
        for piece in answer:
            if not self._args.json:
                print(piece, end="", flush=True)
        if self._args.json:
            facts = {
                "question": question, "text": answer.text, "tokens": answer.tokens, "tokens_per_second": answer.speed,
                "context": answer.context, "kept": answer.kept, "read": answer.read,
                "read_seconds": answer.read_seconds, "ended": answer.ended, "source": str(self._opened.source),
            }  # fmt: skip
            print(json.dumps(facts), flush=True)
            return
        print(flush=True)
        say_aside(
            f"{answer.tokens} tokens · {answer.speed:.1f} tok/s · context {answer.context:,}: {answer.kept:,} kept, "
            f"{answer.read:,} read anew in {answer.read_seconds:.1f} s" + " · stopped" * (answer.ended == "interrupt")
        )
        if 0 < self._longest < answer.context:
            say_aside(f"the context is longer now than the {self._longest:,} tokens that the model was trained on")
            self._longest = 0  # once is enough
