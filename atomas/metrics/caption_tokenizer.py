"""The WordPiece tokenizer of caption BLEU and METEOR: SciBERT's, or another one that the report then names.

The vocabulary is read from its folder by the tokenizers library itself and counted: some versions of transformers
ignore a `vocab_file` argument without a word and split texts into characters.
"""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from tokenizers import BertWordPieceTokenizer, Tokenizer

from atomas.errors import AtomasError

SCIBERT = "allenai/scibert_scivocab_uncased"
SCIBERT_VOCABULARY = "cf28af60d3f93fbd0503d74b4fba2ea5adf4e9ba5d272bebd2a9dad1e38d2da4"
"""SHA-256 of its 31,090 tokens, one a line."""
NO_SCIBERT = f"no SciBERT vocabulary here: give the folder of {SCIBERT} with --tokenizer"
MAX_TOKENS = 512  # of MolT5's script; what comes later is cut off
_NOT_COUNTED = {"[PAD]", "[CLS]", "[SEP]"}
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_FILES = ("tokenizer.json", "vocab.txt")


class CaptionTokenizer:
    """Texts to tokens as MolT5's script cuts them. `description` names the tokenizer in a report."""

    def __init__(self, backend: Any, name: str) -> None:
        backend.no_padding()
        backend.enable_truncation(MAX_TOKENS)
        self._backend = backend
        size = backend.get_vocab_size()
        tokens = "\n".join(str(backend.id_to_token(index)) for index in range(size))
        fingerprint = hashlib.sha256(tokens.encode()).hexdigest()
        self.is_scibert = fingerprint == SCIBERT_VOCABULARY
        self.description: dict[str, Any] = {
            "name": SCIBERT if self.is_scibert else name,
            "vocab_size": size,
            "vocabulary_sha256": fingerprint,
            "max_tokens": MAX_TOKENS,
        }

    @staticmethod
    def load(spec: str | Path) -> "CaptionTokenizer":
        """From a folder with `tokenizer.json` or `vocab.txt`, or a name on the Hugging Face hub.

        Raises AtomasError if there is nothing to load, or the files contradict each other.
        """
        folder = Path(spec)
        if not folder.is_dir():
            if not _HUB_NAME.fullmatch(str(spec)):
                raise AtomasError(f"--tokenizer {spec}: there is no such folder")
            folder = _from_hub(str(spec), local_only=False)
        return CaptionTokenizer(_read(folder), folder.name)

    @staticmethod
    def find() -> "CaptionTokenizer | None":
        """SciBERT where it can be had without a download, else None.

        Looked for below `$ATOMAS_SHARED` (default `../shared`) and in the cache of the Hugging Face hub.
        """
        shared = Path(os.environ.get("ATOMAS_SHARED", "../shared")) / "data/tokenizers" / Path(SCIBERT).name
        try:
            folder = shared if shared.is_dir() else _from_hub(SCIBERT, local_only=True)
        except AtomasError:
            return None
        return CaptionTokenizer.load(folder)

    def tokenize(self, text: str) -> list[str]:
        """At most `MAX_TOKENS` tokens, without those that frame a text."""
        tokens = self._backend.encode(text, add_special_tokens=False).tokens
        return [token for token in tokens if token not in _NOT_COUNTED]


def _read(folder: Path) -> Any:
    complete, words = (folder / name for name in _FILES)
    if not complete.is_file() and not words.is_file():
        raise AtomasError(f"{folder} holds no tokenizer: it needs a {' or a '.join(_FILES)}")
    try:
        backend = Tokenizer.from_file(str(complete)) if complete.is_file() else _from_words(words)
    except AtomasError:
        raise
    except Exception as error:  # the tokenizers library raises no class of its own
        raise AtomasError(f"cannot read the tokenizer in {folder}: {error}") from error
    if words.is_file():
        expected = len(words.read_text(encoding="utf-8").rstrip("\n").split("\n"))
        if backend.get_vocab_size() != expected:
            raise AtomasError(
                f"{folder} gives {backend.get_vocab_size()} tokens, but its {words.name} holds {expected}: "
                "the files do not belong together"
            )
    return backend


def _from_words(words: Path) -> BertWordPieceTokenizer:
    settings = words.with_name("tokenizer_config.json")
    lower = True
    if settings.is_file():
        lower = bool(json.loads(settings.read_text(encoding="utf-8")).get("do_lower_case", True))
    known = set(words.read_text(encoding="utf-8").split("\n"))
    if missing := {"[UNK]", "[CLS]", "[SEP]"} - known:
        raise AtomasError(f"{words} is no WordPiece vocabulary: it has no {min(missing)}")
    return BertWordPieceTokenizer(str(words), lowercase=lower)


def _from_hub(name: str, *, local_only: bool) -> Path:
    """The folder of a hub repository's tokenizer files; raises AtomasError if there are none."""
    from transformers.utils.hub import LocalEntryNotFoundError, cached_file

    for file in _FILES:
        try:
            return Path(cached_file(name, file, local_files_only=local_only)).parent
        except (OSError, ValueError) as error:
            unreachable = isinstance(error.__cause__, LocalEntryNotFoundError)
            if unreachable and not local_only:  # the other file will not come either
                break
    raise AtomasError(
        f"--tokenizer {name!r}: no such folder, and no {' or '.join(_FILES)} under that hub name within reach"
    )
