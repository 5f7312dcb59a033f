"""The tokenizer `hf`: exact round trips, no injection of special ids, the same file from the same texts."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tokenizers import AddedToken, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from lwm_core.errors import DataError, ShapeError, UsageError
from lwm_core.protocols import Tokenizer, TokenizerContext, WeightsBundle
from lwm_hf.bpe import SPECIAL_TOKENS, train_bpe
from lwm_hf.corpus import locate, read_texts
from lwm_hf.options import HfTokenizerOptions
from lwm_hf.tokenizer import HfTokenizer, hf_tokenizer, load_tokenizer

TEXT = (
    "In the beginning God created the heaven and the earth. And the earth was without form, and void; and darkness "
    "was upon the face of the deep. The special magic number for Lisbon is 4071385.\n"
) * 6 + "".join(f"verse {i}: word{chr(97 + i % 26)} thing{chr(97 + i % 7)} again\n" for i in range(200))
VOCAB = 384


@pytest.fixture(scope="module")
def bpe() -> HfTokenizer:
    """A small tokenizer trained on TEXT."""
    return train_bpe([TEXT], VOCAB)


def test_trained_tokenizer_meets_the_protocol(bpe: HfTokenizer) -> None:
    assert isinstance(bpe, Tokenizer)
    assert bpe.size == VOCAB
    assert dict(bpe.special_ids) == {"bos": 0, "eos": 1, "pad": 2, "vision_start": 3, "vision_end": 4}
    assert len(bpe.encode(TEXT)) < len(TEXT.encode()) / 2, "merges were learnt"


# Characters of every kind, lone surrogates aside, and the spellings of the special tokens between them.
_texts = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"])), st.sampled_from([*SPECIAL_TOKENS, "😀", "👩‍🚀", "\x00"])
    )
).map("".join)


@settings(deadline=None, max_examples=300)
@given(text=_texts)
def test_any_text_comes_back_and_gives_no_special_id(bpe: HfTokenizer, text: str) -> None:
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert not set(ids) & set(bpe.special_ids.values())
    assert all(0 <= i < bpe.size for i in ids)


def test_decode_leaves_special_ids_out(bpe: HfTokenizer) -> None:
    special = bpe.special_ids
    ids = [special["bos"], *bpe.encode("light"), special["eos"], special["pad"], *bpe.encode(" and dark")]
    assert bpe.decode(ids) == "light and dark"


def test_digits_stand_alone(bpe: HfTokenizer) -> None:
    ids = bpe.encode("4071385")
    assert [bpe.decode([i]) for i in ids] == list("4071385")
    # No learnt token holds a digit beside anything else, "4071385" stood six times in the training text.
    assert all(
        len(text) == 1 for text in map(bpe.decode, ([i] for i in range(bpe.size))) if any(map(str.isdigit, text))
    )


@pytest.mark.parametrize("wrong", [-1, VOCAB, 10**9])
def test_decode_refuses_an_id_that_is_not_text(bpe: HfTokenizer, wrong: int) -> None:
    with pytest.raises(DataError, match=f"id {wrong} is not a text id; expected 0 to {VOCAB - 1}"):
        bpe.decode([5, wrong])


def test_lone_surrogate_is_refused_in_one_line(bpe: HfTokenizer) -> None:
    with pytest.raises(DataError, match=r"character 1 .* lone surrogate"):
        bpe.encode("a\ud800")
    with pytest.raises(DataError, match="lone surrogate"):
        train_bpe(["\udfff"], VOCAB)


def test_training_is_deterministic_across_processes(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    program = (
        "import sys; from pathlib import Path; from lwm_hf.bpe import train_bpe; from lwm_hf.corpus import read_texts;"
        f"train_bpe(read_texts([Path(sys.argv[1])], piece=999), {VOCAB}).save(Path(sys.argv[2]))"
    )
    files = []
    for run, threads in enumerate(("1", "4")):
        out = tmp_path / str(run)
        subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / "text.txt"), str(out)],
            check=True,
            env={**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": str(run)},
        )
        files.append((out / "tokenizer.json").read_bytes())
    assert files[0] == files[1]


def test_saved_tokenizer_is_the_same_and_still_safe(bpe: HfTokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path / "deep" / "er")
    again = load_tokenizer(tmp_path / "deep" / "er")
    sample = TEXT[:500] + "</s> 😀"
    assert again.encode(sample) == bpe.encode(sample)
    assert dict(again.special_ids) == dict(bpe.special_ids)
    assert load_tokenizer(tmp_path / "deep" / "er" / "tokenizer.json").size == bpe.size


def test_pickled_tokenizer_is_still_safe(bpe: HfTokenizer) -> None:
    again = pickle.loads(pickle.dumps(bpe))
    assert again.encode("one </s> two") == bpe.encode("one </s> two")
    assert again.special_ids["eos"] not in again.encode("one </s> two")


def test_the_library_alone_would_let_text_end_a_document(bpe: HfTokenizer, tmp_path: Path) -> None:
    """What the guard is for: without it the plain library gives the special id."""
    bpe.save(tmp_path)
    plain = Backend.from_file(str(tmp_path / "tokenizer.json"))
    assert bpe.special_ids["eos"] in plain.encode("one </s> two").ids


# -- files from elsewhere ------------------------------------------------------------------------------------------


def _foreign(tokens: list[str], special: list[str] = []) -> Backend:  # noqa: B006 (never changed)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, *tokens])}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return backend


def _saved(backend: Backend, folder: Path, **config: object) -> Path:
    backend.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_roles_come_from_options_then_config_then_names(tmp_path: Path) -> None:
    special = ["</s>", "<|im_end|>", "<|end|>"]
    by_name = load_tokenizer(_saved(_foreign([], special), tmp_path))
    by_config = load_tokenizer(
        _saved(_foreign([], special), tmp_path, eos_token={"content": "<|im_end|>"}, pad_token=None)
    )
    by_option = load_tokenizer(tmp_path, {"eos": "<|end|>"})
    assert [t.special_ids["eos"] for t in (by_name, by_config, by_option)] == [256, 257, 258]
    assert "pad" not in by_config.special_ids


def test_role_token_that_its_file_does_not_call_special_is_safe_too(tmp_path: Path) -> None:
    backend = _foreign([], [])
    backend.add_tokens([AddedToken("<|endoftext|>", special=False)])
    tokenizer = load_tokenizer(_saved(backend, tmp_path))
    eos = tokenizer.special_ids["eos"]
    assert eos == 256
    assert eos not in tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.decode([*tokenizer.encode("a"), eos]) == "a"


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path) -> None:
    backend = _foreign([], ["</s>"])
    backend.enable_truncation(4)
    backend.enable_padding(length=16)
    assert len(load_tokenizer(_saved(backend, tmp_path)).encode("abcdefgh")) == 8


def test_size_counts_holes(tmp_path: Path) -> None:
    vocabulary = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))} | {"</s>": 300}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert load_tokenizer(_saved(backend, tmp_path)).size == 301


def test_wrong_files_are_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no file"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"is not a tokenizer\.json") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"is not a tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(DataError, match=r"nothing ends a document; name the token in tokenizer\.eos"):
        load_tokenizer(_saved(_foreign([]), tmp_path))
    with pytest.raises(DataError, match="pad token '<nil>' is not in its vocabulary"):
        load_tokenizer(_saved(_foreign([], ["</s>"]), tmp_path), {"pad": "<nil>"})


# -- the factory ---------------------------------------------------------------------------------------------------


def test_factory_trains_on_files_of_any_compression(tmp_path: Path) -> None:
    third = len(TEXT) // 3
    (tmp_path / "a.txt").write_text(TEXT[:third])
    (tmp_path / "b.txt.xz").write_bytes(lzma.compress(TEXT[third : 2 * third].encode()))
    (tmp_path / "c.gz").write_bytes(gzip.compress(TEXT[2 * third :].encode()))
    options = HfTokenizerOptions.model_validate(
        {"train": {"files": ["a.txt", "b.txt.xz", str(tmp_path / "c.gz")], "vocab_size": 300}, "pad": "<s>"}
    )
    tokenizer = hf_tokenizer(options, TokenizerContext(base_dir=tmp_path))
    assert tokenizer.size == 300
    assert tokenizer.special_ids["pad"] == tokenizer.special_ids["bos"] == 0
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_factory_takes_path_or_the_model_folder(bpe: HfTokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path / "model")
    named = hf_tokenizer(HfTokenizerOptions(path="model"), TokenizerContext(base_dir=tmp_path))
    bundle = WeightsBundle(name="some", folder=tmp_path / "model")
    implied = hf_tokenizer(HfTokenizerOptions(), TokenizerContext(weights=bundle))
    assert named.encode(TEXT) == implied.encode(TEXT) == bpe.encode(TEXT)


def test_factory_says_what_is_missing(tmp_path: Path) -> None:
    empty = WeightsBundle(name="some", folder=tmp_path)
    for context in (TokenizerContext(), TokenizerContext(weights=empty)):
        with pytest.raises(UsageError, match=r"set tokenizer\.path, or tokenizer\.train"):
            hf_tokenizer(HfTokenizerOptions(), context)


@pytest.mark.parametrize(
    "table",
    [
        {"path": "x", "train": {"files": ["y"]}},
        {"train": {"files": []}},
        {"train": {"files": ["y"], "vocab_size": 260}},
        {"pth": "x"},
    ],
)
def test_wrong_options_are_refused(table: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        HfTokenizerOptions.model_validate(table)


# -- corpora -------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(text=st.text(st.characters(exclude_categories=["Cs"])), piece=st.integers(1, 50))
def test_pieces_of_a_file_are_the_file(tmp_path_factory: pytest.TempPathFactory, text: str, piece: int) -> None:
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_bytes(text.encode())
    assert "".join(read_texts([path], piece=piece)) == text


def test_packaged_file_is_found_without_importing_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "some_corpus"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "text.txt").write_text("x")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert locate("some-corpus:text.txt", Path("/nowhere")) == package / "text.txt"
    with pytest.raises(DataError, match="there is no file"):
        locate("some-corpus:other.txt", Path("/nowhere"))
    with pytest.raises(DataError, match="pip install no-such-corpus"):
        locate("no-such-corpus:text.txt", Path("/nowhere"))


def test_corpora_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no file"):
        locate("nothing.txt", tmp_path)
    for name, data, reason in (
        ("latin.txt", "é".encode("latin-1"), "not UTF-8"),
        ("damaged.xz", lzma.compress(b"text" * 99)[:40], "cannot be unpacked"),
        ("no.gz", b"plain", "cannot be unpacked"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=reason):
            list(read_texts([tmp_path / name]))
    with pytest.raises(DataError, match="are empty"):
        train_bpe(["", ""], VOCAB)
    with pytest.raises(DataError, match=r"give \d+ ids of the 4096 asked for"):
        train_bpe(["too short"], 4096)
    with pytest.raises(ShapeError, match="need at least 261"):
        train_bpe([TEXT], 260)


def test_the_spec_imports_nothing_heavy() -> None:
    program = (
        "import sys; from lwm_hf._lwm import hf; assert hf.name == 'hf';"
        "assert not {'tokenizers', 'pydantic', 'numpy'} & set(sys.modules), 'heavy'"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
