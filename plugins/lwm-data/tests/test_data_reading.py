"""Every format gives the documents it holds; everything that is wrong with a file is told in one line."""

from __future__ import annotations

import gzip
import json
import lzma

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lwm_core.errors import ConfigError, DataError
from lwm_core.protocols import FeedRequest
from lwm_data.options import TextOptions
from lwm_data.read import _plain, read_documents

TEXT = "First line.\nSecond line, naïve.\n\nAnother paragraph.\n"


def documents(source, name="it"):
    """What a text source reads, held-out part included."""
    texts = source._read(name)
    return [*texts.train, *texts.held_out]


def text(path, **options):
    return {"it": {"kind": "text", "path": path, "held_out": 0.0, **options}}


@pytest.mark.parametrize(
    ("name", "pack"), [("a.txt", bytes), ("a.txt.xz", lzma.compress), ("a.txt.gz", gzip.compress), ("a.py", bytes)]
)
def test_plain_text_packed_or_not_is_kept_as_it_is(open_source, tmp_path, name, pack):
    (tmp_path / name).write_bytes(pack(TEXT.encode()))
    assert documents(open_source(text(name))) == [TEXT]


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("file", [TEXT]),
        ("line", ["First line.\n", "Second line, naïve.\n", "Another paragraph.\n"]),
        ("blank-line", ["First line.\nSecond line, naïve.\n\n", "Another paragraph.\n"]),
    ],
)
def test_split_says_what_a_document_is(open_source, tmp_path, split, expected):
    (tmp_path / "a.txt").write_text(TEXT)
    assert documents(open_source(text("a.txt", split=split))) == expected


@given(st.text(alphabet="ab \n\r\t"), st.sampled_from(["file", "line", "blank-line"]))
def test_splitting_loses_nothing(content, split):
    assert "".join(_plain(content, split)) == content


@pytest.mark.parametrize(("name", "pack"), [("a.jsonl", bytes), ("a.jsonl.gz", gzip.compress)])
def test_jsonl_gives_a_document_a_line(open_source, tmp_path, name, pack):
    lines = [json.dumps({"text": t, "n": i}) for i, t in enumerate(["one\u2028x", "two\n", ""])]
    (tmp_path / name).write_bytes(pack(("\n".join(lines) + "\n\n").encode()))
    assert documents(open_source(text(name))) == ["one\u2028x", "two\n"]


def test_parquet_gives_a_document_a_row(open_source, tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"text": ["one", None, "two"], "n": [1, 2, 3]}), tmp_path / "a.parquet")
    assert documents(open_source(text("a.parquet"))) == ["one", "two"]


def test_a_folder_and_a_glob_give_their_files_in_order(open_source, tmp_path):
    for name in ("b.txt", "sub/a.txt", "a.txt.xz", "skip.md"):
        file = tmp_path / "books" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        data = f"text of {name}\n".encode()
        file.write_bytes(lzma.compress(data) if name.endswith(".xz") else data)
    folder = documents(open_source(text("books")))
    assert folder == ["text of a.txt.xz\n", "text of b.txt\n", "text of sub/a.txt\n"]
    assert documents(open_source(text("books/*.md"))) == ["text of skip.md\n"]
    assert len(documents(open_source(text("books/**/*")))) == 4


def test_the_shipped_bible_is_whole(open_source):
    texts = open_source({"it": {"kind": "text", "corpus": "kjv"}})._read("it")
    (train,), (held_out,) = texts.train, texts.held_out
    verses = (train + held_out).splitlines()
    assert len(verses) == 31102
    assert verses[0] == "Ge1:1 In the beginning God created the heaven and the earth."
    assert held_out.count("\n") == 3110
    assert held_out.endswith("grace of our Lord Jesus Christ be with you all. Amen.\n")


def broken_parquet(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"body": ["x"]}), tmp_path / "nocolumn.parquet")
    parquet.write_table(arrow.table({"text": [1]}), tmp_path / "numbers.parquet")


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("missing.txt", None, "missing.txt does not exist"),
        ("none*.txt", None, "does not exist; expected a file, a folder or a glob"),
        ("empty.txt", b"", "hold no text"),
        ("blank.txt", b" \n\n ", "hold no text"),
        ("cut.txt.xz", lzma.compress(b"x" * 1000)[:-20], "damaged or not a .xz file"),
        ("bad.txt.xz", b"not xz", "damaged or not a .xz file"),
        ("cut.txt.gz", gzip.compress(b"x" * 1000, mtime=0)[:-9], "damaged or not a .gz file"),
        ("bad.txt.gz", b"not gz", "damaged or not a .gz file"),
        ("latin.txt", b"abc \xe9", "not UTF-8 text at byte 4"),
        ("bad.jsonl", b'{"text": "a"}\n{"text"\n', "bad.jsonl:2: is not JSON"),
        ("nofield.jsonl", b'{"text": "a"}\n\n{"body": "b"}\n', r"nofield.jsonl:3: .*field 'text', got \['body'\]"),
        ("list.jsonl", b"[1]\n", "list.jsonl:1: .*got list"),
        ("number.jsonl", b'{"text": 5}\n', "number.jsonl:1: expected an object with a string field 'text'"),
        ("bad.parquet", b"not parquet", "cannot be read as parquet"),
        ("nocolumn.parquet", broken_parquet, r"no column 'text', its columns are \['body'\]"),
        ("numbers.parquet", broken_parquet, "'text' holds int64, expected strings"),
    ],
)
def test_what_is_wrong_with_a_file_is_told_in_one_line(open_source, tmp_path, name, data, words):
    if callable(data):
        data(tmp_path)
    elif data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=words) as caught:
        open_source(text(name)).open(FeedRequest(0, 16, 2))
    assert "\n" not in str(caught.value)


def test_a_folder_without_texts_is_refused(open_source, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"has no file that ends in \.txt"):
        open_source(text("empty"))


def test_held_out_is_the_last_documents(open_source, tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"verse {i}\n" for i in range(40)))
    source = open_source(text("a.txt", split="line", held_out=0.1))
    assert list(source.held_out()) == [f"verse {i}\n" for i in range(36, 40)]
    assert list(source._read("it").train) == [f"verse {i}\n" for i in range(36)]


def test_held_out_is_the_last_lines_of_a_few_documents(open_source, tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("".join(f"{name} {i}\n" for i in range(20)))
    assert list(open_source(text("?.txt", held_out=0.1)).held_out()) == ["a 18\na 19\n", "b 18\nb 19\n"]


def test_nothing_is_held_out_where_none_is_asked(open_source, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    assert list(open_source(text("a.txt")).held_out()) == []


@pytest.mark.parametrize(("content", "fraction", "words"), [
    ("one line", 0.1, "cannot be split off 1 document"),
    ("a\nb\n", 0.9, "leaves none to train on"),
])  # fmt: skip
def test_what_cannot_be_held_out_is_refused(open_source, tmp_path, content, fraction, words):
    (tmp_path / "a.txt").write_text(content)
    split = "line" if fraction > 0.5 else "file"
    with pytest.raises(DataError, match=words):
        open_source(text("a.txt", held_out=fraction, split=split)).held_out()


def test_two_sources_may_not_hold_out_different_parts_of_a_file(open_source, tmp_path):
    (tmp_path / "a.txt").write_text("x\n" * 50)
    one = {"kind": "text", "path": "a.txt"}
    open_source({"one": one, "two": {**one, "share": 2.0}})
    for other in ({"held_out": 0.2}, {"split": "line"}, {"path": str(tmp_path)}):
        (tmp_path / "b.txt").write_text("y\n" * 50)
        with pytest.raises(ConfigError, match=r"'one' and 'two' both read .*a\.txt"):
            open_source({"one": one, "two": {**one, **other}})


def test_two_sources_of_one_file_hold_it_out_once(open_source, tmp_path):
    (tmp_path / "a.txt").write_text("x\n" * 50)
    one = {"kind": "text", "path": "a.txt"}
    assert len(open_source({"one": one, "two": one}).held_out()) == 1


def test_text_options_default_to_a_tenth_held_out():
    assert TextOptions(kind="text", corpus="kjv").held_out == 0.1


def test_read_documents_of_a_folder_is_told(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        list(read_documents(tmp_path, "file"))
