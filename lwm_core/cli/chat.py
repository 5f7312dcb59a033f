"""``lwm chat DIR``: ask a run's model, one line a question; what it is shown and earlier turns stay in its cache."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lwm_core.cli.overrides import add_overrides
from lwm_core.cli.sampling import add_sampling, check_sampling, sampling_of, say_aside

if TYPE_CHECKING:
    from types import FrameType

    from lwm_core.protocols import MediaClip
    from lwm_core.run import Model, Reopened
    from lwm_core.run.conversation import Answer, Template

PROMPT = "you> "
FRAMES = 8  # of a video, as LWM's vision chat takes

DETAILS = """
Pictures and video come first, then the document, then the questions, so that each is read once however much is asked.
They are encoded by the run's [encoder].

A line that is /quit, or Ctrl-D, ends the chat. /reset forgets the questions and answers so far; what came first is
read again. Ctrl-C stops the answer, which stays as far as it came; a second one before the next question ends the chat.

The template lwm frames a question in the words that the needle task trains on, 'You are a helpful assistant. USER: ...
ASSISTANT:'; with a document, that stands first after USER, and 'Don't give information outside the document ...' before
ASSISTANT. plain has no words, for models that continue a text. Each answer's seed is one more than the last one's.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the ``lwm`` command."""
    parser = subparsers.add_parser("chat", help="ask a run's model questions", description=__doc__, epilog=DETAILS)
    parser.add_argument("folder", metavar="DIR", type=Path, help="the run's folder")
    parser.add_argument("--document", metavar="FILE", type=Path, help="read this text first, UTF-8")
    parser.add_argument("--image", dest="shown", action="append", default=[], type=_image, metavar="FILE",
                        help="show this picture first; repeatable")  # fmt: skip
    parser.add_argument("--video", dest="shown", action="append", type=_video, metavar="FILE",
                        help="show frames of this video first; repeatable")  # fmt: skip
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--frames", type=int, metavar="N", help=f"at most N frames a video, evenly spaced ({FRAMES})")
    which.add_argument("--fps", type=float, metavar="N", help="N frames a second of it instead")
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
    document = None if args.document is None else _read(args.document)
    clips = _clips(args)
    opened = reopen(args.folder, args.overrides)
    with CtrlC.heard(follows=opened.trainer.processes.rank > 0) as ctrl_c:
        lead(opened.trainer, lambda model: Chat(args, opened, model, ctrl_c).run(template, document, clips))
    return 0


def _image(text: str) -> tuple[str, Path]:
    return "image", Path(text)


def _video(text: str) -> tuple[str, Path]:
    return "video", Path(text)


def _clips(args: argparse.Namespace) -> list[MediaClip]:
    """What is shown, looked through but not decoded yet: before the model is loaded."""
    from lwm_core.cli.pictures import make_media
    from lwm_core.cli.sampling import check_options
    from lwm_core.errors import UsageError

    given = args.frames is not None or args.fps is not None
    if given and "video" not in [kind for kind, _ in args.shown]:
        raise UsageError(
            "--frames and --fps say which frames of a --video are taken, but there is none; leave them out"
        )
    rows = [("frames", args.frames is None or args.frames > 0, "at least 1"),
            ("fps", args.fps is None or 0 < args.fps < float("inf"), "a number above 0")]  # fmt: skip
    check_options(args, rows)
    if not args.shown:
        return []
    media, clips = make_media(args), []
    frames = FRAMES if not given else args.frames
    for kind, path in args.shown:
        clip = media.open(path, frames=frames, fps=args.fps) if kind == "video" else media.open(path)
        if clip.still != (kind == "image"):
            is_one = "picture; name it with --image" if clip.still else "video; name it with --video"
            raise UsageError(f"{path}: is a {is_one}")
        clips.append(clip)
    return clips


def _read(path: Path) -> str:
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

    def __init__(self, args: argparse.Namespace, opened: Reopened, model: Model, ctrl_c: CtrlC) -> None:
        self._args, self._opened, self._model, self._ctrl_c = args, opened, model, ctrl_c
        self._typed = sys.stdin.isatty()
        self._longest = opened.stage.seq_len

    def run(self, template: Template, document: str | None, clips: Sequence[MediaClip] = ()) -> None:
        """Until the questions end."""
        from dataclasses import replace

        from lwm_core.run.conversation import Conversation

        tokenizer = self._opened.pipeline.tokenizer
        sampling = sampling_of(self._args, tokenizer)
        shown = self._shown(clips) if clips else ()
        conversation = Conversation(self._model.generator(), tokenizer, template, document, shown)
        self._begin(conversation.begin())
        for question in self._questions():
            if question == "/reset":
                self._begin(conversation.begin())
                continue
            answer = conversation.ask(question, sampling, self._args.stop, lambda: not self._ctrl_c.asked)
            sampling = replace(sampling, seed=sampling.seed + 1)
            self._tell(question, answer)

    def _shown(self, clips: Sequence[MediaClip]) -> list[int]:
        """Ids of pictures and videos."""
        import time

        from lwm_core.cli.pictures import encoded, make_encoder
        from lwm_core.run.vision import vision_block

        pipeline, encoder, ids = self._opened.pipeline, make_encoder(self._opened), []
        for clip in clips:
            began = time.perf_counter()
            codes = encoded(clip, encoder)
            seconds = max(time.perf_counter() - began, 1e-9)
            ids += vision_block(codes, pipeline.model.vocabulary, pipeline.tokenizer)
            if not self._args.json:
                frames = f"{len(codes)} frame{'' if len(codes) == 1 else 's'}"
                say_aside(f"{clip.path}: {frames} encoded in {seconds:.1f} s · {len(codes) / seconds:,.1f} frames/s")
        return ids

    def _begin(self, parts: Iterator[tuple[int, int]]) -> None:
        """Read what comes before the questions, if anything does, and tell how far it is."""
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
            files = [*(path for _, path in self._args.shown), *filter(None, [self._args.document])]
            names = ", ".join(map(str, files))
            say_aside(f"{names}: {total:,} tokens read in {seconds:.1f} s · {total / seconds:,.0f} tok/s")

    def _questions(self) -> Iterator[str]:
        """Each line that is a question or ``/reset``, to the end or ``/quit``."""
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
