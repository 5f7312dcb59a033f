"""``lwm chat`` from outside: questions through a pipe and a terminal, Ctrl-C in the middle, wrong use, its words."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from lwm_core import needles
from lwm_core.builtins.byte_tokens import BytesTokenizer
from lwm_core.cli.chat_shown import named
from lwm_core.errors import DataError, UsageError
from lwm_core.protocols import SamplingSpec
from lwm_core.run.conversation import PART, Conversation, make_template

Write = Callable[..., Path]
BYTES = BytesTokenizer()
BOS, EOS = BYTES.special_ids["bos"], BYTES.special_ids["eos"]
SHORT = ("--max-new-tokens", "12", "--seed", "5")


class Parrot:
    """A generator whose every session answers with the next of some texts; an ``eos`` in it ends the answer."""

    def __init__(self, *answers: Sequence[int]) -> None:
        self._answers = list(answers)
        self.sessions: list[Parrot] = []
        self.tokens: list[int] = []
        self.reads: list[int] = []
        self.closed = False

    def session(self) -> Parrot:
        self.sessions.append(Parrot(*self._answers))
        return self.sessions[-1]

    def read(self, tokens: Sequence[int]) -> None:
        assert tokens
        self.reads.append(len(tokens))
        self.tokens += tokens

    def stream(self, sampling: SamplingSpec) -> Iterator[int]:
        for token in self._answers.pop(0)[: sampling.max_new_tokens]:
            if token in sampling.stop_ids:
                return
            self.tokens.append(token)
            yield token

    def close(self) -> None:
        self.closed = True


def said(text: str) -> list[int]:
    return [*BYTES.encode(text), EOS]


def talk(parrot: Parrot, document: str | None = None, template: str = "lwm", system: str | None = None) -> Any:
    made = Conversation(parrot, BYTES, make_template(template, system), document)  # type: ignore[arg-type]
    list(made.begin())
    return made


SAMPLING = SamplingSpec(50, stop_ids=(EOS,))


def test_a_document_and_its_first_question_are_the_needle_tasks_prompt() -> None:
    """To the id: a model that has learnt the one answers the other."""
    needle = needles.Needle("Oslo", "1234567")
    document = "It was late.\n" + needle.text + "They went home."
    parrot = Parrot(said(" 1234567"))
    answer = talk(parrot, document).ask("What is the special magic Oslo number?", SAMPLING)
    prompt = needles.build_prompt(BYTES.encode(document), [], [needle], BYTES.encode, frozenset(), BOS)
    [session] = parrot.sessions
    assert session.tokens == prompt
    assert "".join(answer) == " 1234567" and answer.ended == "eos"
    assert session.tokens == [*prompt, *BYTES.encode(" 1234567")]
    assert answer.kept + answer.read == len(prompt) and answer.read < 200 and answer.context == len(session.tokens)


def test_without_a_document_there_are_questions_and_answers() -> None:
    """What the model ended with is read with the next question, for it is not in the session."""
    parrot = Parrot(said(" Yes."), BYTES.encode(" No"), said(""), said(" So."))
    chat = talk(parrot)
    for question in ("A?", "B?", "C?", "D?"):
        list(chat.ask(question, SAMPLING))
    turns = [
        [BOS, *BYTES.encode("You are a helpful assistant. USER: A? ASSISTANT:"), *said(" Yes.")],
        [*BYTES.encode(" USER: B? ASSISTANT: No"), EOS],  # the parrot stopped by itself: as if by a stop id
        [*BYTES.encode(" USER: C? ASSISTANT:"), EOS, *BYTES.encode(" USER: D? ASSISTANT: So.")],
    ]
    assert parrot.sessions[0].tokens == [token for turn in turns for token in turn]


def test_other_templates() -> None:
    for template, system, document, expected in (
        ("plain", None, None, "A?B?"),
        ("plain", "Hush. ", "Text. ", "Hush. Text. A?B?"),
        ("\nQ: {question}\nA:", None, "Text.", "Text.\nQ: A?\nA:\nQ: B?\nA:"),
        ("lwm", "", None, " USER: A? ASSISTANT: USER: B? ASSISTANT:"),
    ):
        parrot = Parrot([], [])
        chat = talk(parrot, document, template, system)
        for question in ("A?", "B?"):
            list(chat.ask(question, SamplingSpec(0)))
        assert parrot.sessions[0].tokens == [BOS, *BYTES.encode(expected)]
    for wrong in ("lwn", "{question}{question}", ""):
        with pytest.raises(UsageError, match=r"expected lwm, plain, or a text with \{question\} in it once"):
            make_template(wrong)


def test_what_is_shown_stands_before_the_questions_and_is_read_once() -> None:
    """And before a document; a reset reads it again."""
    ids, document = [300, 301, 302], "Text."
    lwm = "You are a helpful assistant. USER: "
    for template, told, expected in (
        ("lwm", None, [BOS, *BYTES.encode(lwm), *ids, *BYTES.encode("\nA? ASSISTANT: USER: B? ASSISTANT:")]),
        ("plain", None, [BOS, *ids, *BYTES.encode("A?B?")]),
        ("\nQ: {question}\nA:", None, [BOS, *ids, *BYTES.encode("\nQ: A?\nA:\nQ: B?\nA:")]),
        ("plain", document, [BOS, *ids, *BYTES.encode("Text.A?B?")]),
        ("lwm", document, [BOS, *BYTES.encode(lwm), *ids, *BYTES.encode(f"Text. A?{needles.PROMPT_END} USER: B?"),
                           *BYTES.encode(needles.PROMPT_END)]),
    ):  # fmt: skip
        parrot = Parrot([], [], [])
        chat = Conversation(parrot, BYTES, make_template(template), told, ids)  # type: ignore[arg-type]
        for number in range(2):
            list(chat.begin())
            for question in ("A?", "B?"):
                list(chat.ask(question, SamplingSpec(0)))
            assert parrot.sessions[number].tokens == expected
            assert len(parrot.sessions[number].reads) == 3


def test_what_is_shown_between_questions_begins_the_next_turn() -> None:
    """As what is shown first does; several stand side by side, and after a document before its question."""
    first, more, last = [300], [301, 302], [303]
    lwm, end = "You are a helpful assistant. USER: ", needles.PROMPT_END
    for template, told, expected in (
        ("lwm", None, [BOS, *BYTES.encode(lwm), *first, *more, *BYTES.encode("\nA? ASSISTANT:a"), EOS,
                       *BYTES.encode(" USER: "), *last, *more, *BYTES.encode("\nB? ASSISTANT: USER: C? ASSISTANT:")]),
        ("plain", None, [BOS, *first, *more, *BYTES.encode("A?a"), EOS, *last, *more, *BYTES.encode("B?C?")]),
        ("Q: {question} A:", None, [BOS, *first, *more, *BYTES.encode("Q: A? A:a"), EOS, *last, *more,
                                    *BYTES.encode("Q: B? A:Q: C? A:")]),
        ("lwm", "Text.", [BOS, *BYTES.encode(f"{lwm}Text."), *first, *more, *BYTES.encode(f" A?{end}a"), EOS,
                          *BYTES.encode(" USER: "), *last, *more, *BYTES.encode(f"\nB?{end} USER: C?{end}")]),
    ):  # fmt: skip
        parrot = Parrot(said("a"), [], [])
        chat = talk(parrot, told, template)
        for ids in (first, more):
            list(chat.show(ids))
        list(chat.ask("A?", SAMPLING))
        for ids in (last, more):
            assert list(chat.show(ids))[-1] == (parrot.sessions[0].reads[-1],) * 2
        for question in ("B?", "C?"):
            list(chat.ask(question, SamplingSpec(0)))
        assert parrot.sessions[0].tokens == expected, template
        list(chat.begin())
        assert parrot.sessions[1].tokens == ([BOS, *BYTES.encode(f"{lwm}Text.")] if told else []), "a reset forgets it"


def test_lines_that_name_a_file() -> None:
    assert named("/image a b.png") == ("image", Path("a b.png")) and named("/video\tc.mp4") == ("video", Path("c.mp4"))
    assert named("/image ~/a.png") == ("image", Path.home() / "a.png")
    assert not any(map(named, ("/imagea.png", "image a.png", "/picture a.png", "What is /image a.png?")))
    for line in ("/image", "/video "):
        with pytest.raises(UsageError, match=f"{line.strip()} names no file; write {line.strip()} FILE"):
            named(line)


def test_how_an_answer_ends_is_told() -> None:
    parrot = Parrot(said("12345"), said("12345"), said("12345"), said("12345"), said("later"))
    chat = talk(parrot)
    ends = []
    heard: list[bool] = []
    for words in ((SAMPLING,), (SamplingSpec(3, stop_ids=(EOS,)),), (SAMPLING, ("34",))):
        answer = chat.ask("?", *words)
        ends.append(("".join(answer), answer.ended, answer.tokens))
    answer = chat.ask("?", SAMPLING, (), lambda: not heard.append(True) and len(heard) < 3)
    ends.append(("".join(answer), answer.ended, answer.tokens))
    assert ends == [("12345", "eos", 5), ("123", "length", 3), ("12", "stop", 4), ("12", "interrupt", 2)]
    assert bytes(parrot.sessions[0].tokens[-2:]) == b"12", "what was written before the interrupt is kept"
    assert "".join(chat.ask("?", SAMPLING)) == "later"


def test_a_long_document_is_read_in_parts_once_and_again_after_a_reset() -> None:
    document = "All work and no play. " * (PART // 10)
    parrot = Parrot(said("a"), said("b"))
    chat = Conversation(parrot, BYTES, make_template("lwm"), document)  # type: ignore[arg-type]
    told = list(chat.begin())
    first, total = parrot.sessions[0], told[-1][1]
    assert first.reads == [PART, PART, total - 2 * PART] and [done for done, _ in told] == [PART, 2 * PART, total]
    for _ in range(2):
        list(chat.ask("And now?", SAMPLING))
    assert sum(first.reads[3:]) < 400
    list(chat.begin())
    second = parrot.sessions[1]
    assert first.closed and second.tokens == first.tokens[:total]
    list(chat.ask("And now?", SAMPLING))
    assert second.tokens == first.tokens[: len(second.tokens)], "nothing of the first conversation is left"
    with pytest.raises(DataError, match="gives no token"):
        Conversation(parrot, BYTES, make_template("lwm"), "")  # type: ignore[arg-type]


# -- the command -------------------------------------------------------------------------------------------------


@pytest.fixture
def ran(lwm: Any, small: Write) -> Path:
    """A finished run in ``r``, whose model takes a moment for each token."""
    done = lwm("run", str(small(trainer="token_seconds = 0.01")), "--out", "r")
    assert done.returncode == 0, done.stderr
    return lwm.cwd / "r"


def piped(lwm: Any, given: bytes, *words: str) -> tuple[int, str, str]:
    process = subprocess.run(
        lwm.arguments("chat", "r", *words), cwd=lwm.cwd, env=lwm.env, input=given, capture_output=True, timeout=60,
        check=False,
    )  # fmt: skip
    return process.returncode, process.stdout.decode(), process.stderr.decode()


def test_questions_through_a_pipe(lwm: Any, ran: Path) -> None:
    """Answers on standard output, no prompts; each is what ``lwm generate`` writes; the counts show what was kept."""
    document = "In the beginning God created the heaven and the earth.\n"
    (lwm.cwd / "genesis.txt").write_text(document)
    words = (*SHORT, "--document", "genesis.txt")
    code, out, err = piped(lwm, "And God\n\n  \nDer Himmel über uns\n".encode(), *words, "--json")
    assert (code, err) == (0, "")
    first, second = (json.loads(line) for line in out.splitlines())
    assert (first["question"], second["question"]) == ("And God", "Der Himmel über uns")
    assert first["source"] == "r/model" and first["ended"] in ("length", "eos")
    start = 1 + len(f"You are a helpful assistant. USER: {document}")
    assert first["kept"] == start and first["read"] == len(f" And God{needles.PROMPT_END}")
    assert second["kept"] == first["context"] == first["kept"] + first["read"] + first["tokens"]
    asked = f" USER: Der Himmel über uns{needles.PROMPT_END}".encode()
    assert second["read"] == len(asked) + (first["ended"] == "eos")
    same = lwm("generate", "r", "text", "--prompt", needles.PROMPT_END, *SHORT, "--json")
    assert json.loads(same.stdout)["text"] == first["text"]

    code, out, err = piped(lwm, b"And God\n/reset\nAnd God", *words)
    told, numbers = err.splitlines(), r"\d+ tokens · [\d.]+ tok/s · context \d+: \d+ kept, \d+ read anew in 0.0 s"
    assert code == 0 and out.startswith(first["text"] + "\n") and "you>" not in out + err
    read = f"genesis.txt: {start} tokens read in "
    assert [line.startswith(read) for line in told] == [True, False, False, True, False], told
    assert re.fullmatch(numbers, told[1]) and f"{start} kept" in told[4]
    assert told[2] == "the context is longer now than the 64 tokens that the model was trained on"
    assert piped(lwm, b"/quit\nAnd God\n") == (0, "", "")


def test_each_answer_draws_anew_and_the_chat_is_seeded(lwm: Any, ran: Path) -> None:
    words = ("--template", "plain", *SHORT, "--json")
    texts = [[json.loads(line)["text"] for line in piped(lwm, b"aa\naa\n", *words)[1].splitlines()] for _ in range(2)]
    assert texts[0] == texts[1] and texts[0][0] != texts[0][1]


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        (("--document", "gone.txt"), 1, "gone.txt: cannot be read: No such file"),
        (("--document", "."), 1, ".: cannot be read: Is a directory"),
        (("--document", "empty.txt"), 1, "empty.txt: is empty"),
        (("--document", "latin.txt"), 1, "latin.txt: not UTF-8 at byte 2"),
        (("--template", "Q:"), 2, "--template is 'Q:'; expected lwm, plain, or a text with {question}"),
        (("--top-p", "0"), 2, "--top-p is 0.0; expected above 0"),
        (("--max-new-tokens", "0"), 2, "--max-new-tokens is 0; expected at least 1"),
        (("--stop", ""), 2, "--stop is ['']; expected a text"),
    ],
)
def test_wrong_use_is_one_line_before_anything_is_loaded(
    lwm: Any, words: tuple[str, ...], code: int, part: str
) -> None:
    """There is no run at all, and that is not what is told."""
    (lwm.cwd / "empty.txt").write_text(" \n")
    (lwm.cwd / "latin.txt").write_bytes("grün".encode("latin-1"))
    ended, out, err = piped(lwm, b"And God\n", *words)
    assert (ended, out, len(err.splitlines())) == (code, "", 1) and part in err


def test_a_run_that_is_missing_and_a_question_that_is_no_text(lwm: Any, small: Write) -> None:
    code, out, err = piped(lwm, b"And God\n")
    assert (code, out) == (2, "") and "no such folder" in err
    assert lwm("run", str(small()), "--out", "r").returncode == 0
    code, out, err = piped(lwm, b"And God\ngr\xfcn\n", *SHORT)
    assert code == 1 and out and "error: standard input: a line is not UTF-8 at byte 2" in err


def slow(lwm: Any, *words: str, **more: Any) -> subprocess.Popen[bytes]:
    """A chat whose answers take a minute."""
    given = ("chat", "r", "--max-new-tokens", "6000", "--template", "plain", *words)
    return subprocess.Popen(
        lwm.arguments(*given), cwd=lwm.cwd, env=lwm.env, **{
            "stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more,
        },
    )  # fmt: skip


def test_ctrl_c_stops_the_answer_and_not_the_chat(lwm: Any, ran: Path) -> None:
    """What was written before it stays; while a question is awaited from a pipe it ends the chat."""
    process = slow(lwm)
    assert process.stdin and process.stdout and process.stderr
    try:
        told = []
        for question in (b"And God\n", b"said\n"):
            process.stdin.write(question)
            process.stdin.flush()
            assert os.read(process.stdout.fileno(), 1)  # it has begun
            process.send_signal(signal.SIGINT)
            lines = (line.decode() for line in process.stderr)
            told.append(next(line for line in lines if "is longer now" not in line))  # a long answer is told of too
            assert told[-1].endswith(" stopped\n")
            while select.select([process.stdout], [], [], 0)[0]:
                assert os.read(process.stdout.fileno(), 65_536)
        facts = [[int(number) for number in re.findall(r"(\d+)(?= tokens|: | kept)", one)] for one in told]
        assert 0 < facts[0][0] < 1000 and facts[1][2] == facts[0][1] > facts[0][0]
        while process.poll() is None:
            process.send_signal(signal.SIGINT)
            time.sleep(0.2)
        assert (process.returncode, process.stderr.read()) == (130, b"interrupted\n")
    finally:
        process.kill()
        process.communicate()


def test_in_a_terminal(lwm: Any, ran: Path) -> None:
    """A prompt, an answer as it comes, a dim line, Ctrl-C at the prompt and in an answer, Ctrl-D."""
    leader, follower = pty.openpty()
    process = slow(lwm, "--system", "", stdin=follower, stdout=follower, stderr=follower)
    os.close(follower)
    shown = b""

    def ctrl_c() -> None:
        os.kill(process.pid, signal.SIGINT)

    def until(part: bytes, each_second: Callable[[], None] = lambda: None) -> bytes:
        nonlocal shown
        end = time.monotonic() + 30
        while part not in shown and time.monotonic() < end:
            if not select.select([leader], [], [], 1.0)[0]:
                each_second()
                continue
            try:
                shown += os.read(leader, 4096)
            except OSError:  # it has ended
                break
        assert part in shown, shown
        before, _, shown = shown.partition(part)
        return before

    try:
        until(b"you> ")
        until(b"Ctrl-D ends the chat", ctrl_c)  # readline does not hear one that comes right after its prompt
        until(b"you> ")
        os.write(leader, b"/image gone.png\n")
        until(b"names no [encoder]")
        until(b"you> ")
        os.write(leader, b"And God\n")
        until(b"And God\r\n")
        time.sleep(0.5)
        assert os.read(leader, 4096), "the answer comes before it is whole"
        ctrl_c()
        line = until(b"you> ")
        assert b"\x1b[2m" in line and b" kept, 8 read anew in" in line and b"stopped" in line
        os.write(leader, b"\x04")
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        os.close(leader)


def test_generate_tells_its_speed_in_a_terminal(lwm: Any, ran: Path) -> None:
    leader, follower = pty.openpty()
    words = lwm.arguments("generate", "r", "text", "--prompt", "And", *SHORT)
    done = subprocess.run(words, cwd=lwm.cwd, env=lwm.env, stdout=follower, stderr=subprocess.PIPE, timeout=60)
    os.close(follower)
    os.close(leader)
    assert re.fullmatch(rb"12 tokens \xc2\xb7 [\d.]+ tok/s\n", done.stderr), done.stderr
    assert lwm("generate", "r", "text", "--prompt", "And", *SHORT).stderr == ""
