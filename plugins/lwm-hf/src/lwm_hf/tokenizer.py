"""The tokenizer ``hf``: the library's tokenizer under LWM's protocol, where text is only ever text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from lwm_core.errors import DataError, UsageError
from lwm_core.protocols import TokenizerContext
from lwm_hf.bpe import encodable, train_bpe
from lwm_hf.corpus import locate, read_texts
from lwm_hf.options import HfTokenizerOptions

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"

# Role → the names that Llama-class tokenizers give it, the first that exists counts. A Llama-3 or Qwen tokenizer
# ends *documents* with the name listed here; the end of a chat turn is the chat format's business.
_NAMES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "bos": ("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>"),
        "eos": ("</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>"),
        "pad": ("<pad>", "[PAD]", "<|finetune_right_pad_id|>"),
        "vision_start": ("<vision>",),
        "vision_end": ("</vision>",),
    }
)


class HfTokenizer:
    """A ``tokenizers.Tokenizer`` as :class:`lwm_core.protocols.Tokenizer` has it.

    Args:
        backend: the library's tokenizer; a copy is kept.
        roles: role (``bos``, ``eos``, ``pad``, ``vision_start``, ``vision_end``) → token; what is not given is found
            by the names that Llama-class tokenizers use.

    Raises:
        DataError: a role's token is not in the vocabulary, or nothing ends a document.
    """

    def __init__(self, backend: Backend, roles: Mapping[str, str] | None = None) -> None:
        self._set(Backend.from_str(backend.to_str()), roles or {})

    def _set(self, backend: Backend, roles: Mapping[str, str]) -> None:
        vocabulary = backend.get_vocab(with_added_tokens=True)
        found = {role: next((name for name in names if name in vocabulary), None) for role, names in _NAMES.items()}
        self._roles = {role: name for role, name in {**found, **roles}.items() if name is not None}
        for role, name in self._roles.items():
            if name not in vocabulary:
                raise DataError(f"tokenizer 'hf': {role} token {name!r} is not in its vocabulary; name one that is")
        if "eos" not in self._roles:
            raise DataError("tokenizer 'hf': nothing ends a document; name the token in tokenizer.eos")
        # A role's token is special even where its file forgot to say so: the text that spells it must not give its id.
        backend.add_special_tokens(
            [AddedToken(name, special=True, normalized=False) for name in dict.fromkeys(self._roles.values())]
        )
        backend.no_truncation()
        backend.no_padding()
        # Not part of tokenizer.json, hence set on every tokenizer anew.
        backend.encode_special_tokens = True
        self._backend = backend
        # Ids may have holes, so the number of tokens would be too small.
        self._size = max(vocabulary.values()) + 1
        self._special_ids = MappingProxyType({role: vocabulary[name] for role, name in self._roles.items()})

    @property
    def size(self) -> int:
        """Number of text ids: the highest and one more."""
        return self._size

    @property
    def special_ids(self) -> Mapping[str, int]:
        """Ids by role: ``eos``, and ``bos``, ``pad``, ``vision_start``, ``vision_end`` where it has them."""
        return self._special_ids

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``: no special ids added, and none for a text that spells one.

        Raises:
            DataError: ``text`` holds a lone surrogate.
        """
        return list(self._backend.encode(encodable(text), add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, special ids left out; bytes that are not UTF-8 become U+FFFD.

        Raises:
            DataError: an id is not one of this tokenizer's.
        """
        plain = [int(i) for i in ids]
        wrong = next((i for i in plain if not 0 <= i < self._size), None)
        if wrong is not None:
            raise DataError(f"tokenizer 'hf': id {wrong} is not a text id; expected 0 to {self._size - 1}")
        return str(self._backend.decode(plain, skip_special_tokens=True))

    def save(self, folder: Path) -> None:
        """Write ``tokenizer.json``, and the roles to ``tokenizer_config.json`` as ``transformers`` reads them."""
        folder.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(folder / TOKENIZER_FILE))
        names = {f"{role}_token": self._roles[role] for role in ("bos", "eos", "pad") if role in self._roles}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def __getstate__(self) -> dict[str, Any]:
        return {"tokenizer": self._backend.to_str(), "roles": self._roles}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # The library's own pickling forgets encode_special_tokens; a feed's worker would read "</s>" as the end.
        self._set(Backend.from_str(state["tokenizer"]), state["roles"])


def load_tokenizer(path: Path, roles: Mapping[str, str] | None = None) -> HfTokenizer:
    """The tokenizer in ``path``, a ``tokenizer.json`` or a folder with one.

    Args:
        path: file or folder; a ``tokenizer_config.json`` beside the file names the roles.
        roles: role → token, above what the file says.

    Raises:
        UsageError: there is no such file.
        DataError: the file is no tokenizer, or a role's token is not in it.
    """
    file = path / TOKENIZER_FILE if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"tokenizer 'hf': there is no file {file}; give a tokenizer.json or a folder that holds one")
    try:
        backend = Backend.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises plain Exception for every malformed file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"tokenizer 'hf': {file} is not a tokenizer.json: {reason}") from error
    return HfTokenizer(backend, {**_configured_roles(file.with_name(CONFIG_FILE)), **(roles or {})})


def _configured_roles(file: Path) -> dict[str, str]:
    """Roles in ``tokenizer_config.json``: a token is a text or a table with ``content``; null is none."""
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"tokenizer 'hf': {file} is not JSON: {error}") from error
    roles = {}
    for role in ("bos", "eos", "pad"):
        token = config.get(f"{role}_token")
        name = token.get("content") if isinstance(token, dict) else token
        if isinstance(name, str):
            roles[role] = name
    return roles


def hf_tokenizer(options: HfTokenizerOptions, context: TokenizerContext) -> HfTokenizer:
    """The factory of ``lwm.tokenizer.v1``: loaded, trained, or the one of the model that the run starts from.

    Raises:
        UsageError: nothing says which tokenizer, or its file is missing.
        DataError: a file or a corpus cannot be used.
    """
    roles = {role: name for role in ("bos", "eos", "pad") if (name := getattr(options, role)) is not None}
    if options.train is not None:
        files = [locate(name, context.base_dir) for name in options.train.files]
        tokenizer = train_bpe(read_texts(files), options.train.vocab_size, min_frequency=options.train.min_frequency)
        return HfTokenizer(tokenizer._backend, roles) if roles else tokenizer
    if options.path is not None:
        return load_tokenizer(context.base_dir / Path(options.path).expanduser(), roles)
    if context.weights is not None and (context.weights.folder / TOKENIZER_FILE).is_file():
        return load_tokenizer(context.weights.folder, roles)
    raise UsageError(
        "tokenizer 'hf': no tokenizer given; set tokenizer.path, or tokenizer.train = {files = [...]}, or start from "
        "a model with a tokenizer.json (init)"
    )
