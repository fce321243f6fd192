"""The one tokenizer of texts and SMILES: a T5 Unigram vocabulary that loses no character.

T5's vocabulary has no backslash, braces, tilde, `<`, caret and backtick, so that SMILES lose their Z/E
stereo. What is missing is appended as pieces of the Unigram model itself; "added tokens" of the tokenizers
library would cut the string before the model sees it and put a space behind every cut. Characters beyond
printable ASCII without a piece are spelled as bytes.
"""

import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from atomas.config import TokenizerConfig
from atomas.data.bad_samples import BlockError
from atomas.data.corpora import Corpora
from atomas.data.shards import Corpus
from atomas.data.vocabulary import (
    BYTE_PIECES,
    PRINTABLE_ASCII,
    SENTINELS,
    SPECIAL_PIECES,
    WORD_START,
    Vocabulary,
    complete_vocabulary,
    read_sentencepiece,
    train_unigram,
)
from atomas.errors import AtomasError

PAD_ID, EOS_ID, UNK_ID = 0, 1, 2

# Loader workers are forked and are the parallelism; the library's own threads would be in their way.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

_CACHED_WORDS = 2**16
_CACHED_WORD_LENGTH = 32
_TRAINING_RECORDS = 20_000


class AtomasTokenizer:
    """Text and SMILES to ids and back: pad 0, </s> 1, <unk> 2 (never produced).

    Decoding what was encoded gives `normalize(x)` for every string x; for a SMILES that is x itself. Equal
    content gives equal ids and an equal `fingerprint` in every process. Picklable.
    """

    def __init__(self, backend: Tokenizer) -> None:
        backend.encode_special_tokens = True  # "</s>" inside a text is text
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._words: dict[str, list[int]] = {}

    @staticmethod
    def load(spec: str | Path) -> "AtomasTokenizer":
        """From a folder with `tokenizer.json` or `spiece.model`, such a file itself, or a hub name.

        Ids of an existing vocabulary stay as they are. Raises AtomasError if there is nothing to load or if
        it is no T5-type Unigram tokenizer.
        """
        file = _find_file(spec)
        if file.suffix == ".json":
            return AtomasTokenizer(_from_json(file))
        vocabulary, charsmap = read_sentencepiece(file)
        normalizer = normalizers.Precompiled(charsmap) if charsmap else None
        return AtomasTokenizer(_assemble(vocabulary, (*SPECIAL_PIECES, *SENTINELS), normalizer))

    @staticmethod
    def train(texts: Iterable[str], vocab_size: int) -> "AtomasTokenizer":
        """A Unigram tokenizer of at most `vocab_size` tokens for texts and SMILES like `texts`.

        The result depends on the multiset of texts alone. Raises AtomasError if `vocab_size` is too small.
        """
        normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC()])
        words: Counter[str] = Counter()
        for text in texts:
            words.update(WORD_START + word for word in _words(text, normalizer))
        vocabulary = train_unigram(dict(sorted(words.items())), vocab_size)
        return AtomasTokenizer(_assemble(vocabulary, SPECIAL_PIECES, normalizer))

    def save(self, directory: Path) -> None:
        """Write a folder that `load` and the AutoTokenizer of transformers read alike.

        The T5Tokenizer of transformers reads it too, but makes <unk> of what is spelled as bytes.
        """
        directory.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(directory / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": "<pad>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "clean_up_tokenization_spaces": False,
            "extra_ids": sum(self._backend.token_to_id(piece) is not None for piece in SENTINELS),
        }
        (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, ending with </s>."""
        units = [_units(text) for text in texts]
        known = self._words
        new = [unit for unit in dict.fromkeys(chain.from_iterable(units)) if unit not in known]
        encodings = self._backend.encode_batch_fast(new, add_special_tokens=False)
        fresh = {unit: encoding.ids for unit, encoding in zip(new, encodings, strict=True)}
        ids = [
            [*chain.from_iterable(known[unit] if unit in known else fresh[unit] for unit in row), EOS_ID]
            for row in units
        ]
        if len(known) < _CACHED_WORDS:
            known.update((unit, ids) for unit, ids in fresh.items() if len(unit) <= _CACHED_WORD_LENGTH)
        return ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of `text`, and for each the characters [start, end) of `text` that it stands for.

        </s> and a word start on its own stand for none: (i, i).
        """
        encoding = self._backend.encode(text)
        bare = {EOS_ID, self._backend.token_to_id(WORD_START)}
        offsets = [
            (start, start if number in bare else end)
            for number, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
        ]
        return encoding.ids, offsets

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` without special tokens."""
        return str(self._backend.decode(list(ids)))

    def normalize(self, text: str) -> str:
        """What `text` is after encoding and decoding: Unicode folded, white space collapsed and stripped."""
        return " ".join(_words(text, self._backend.normalizer))

    @property
    def vocab_size(self) -> int:
        """Number of tokens, with those that were appended."""
        return int(self._backend.get_vocab_size())

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what decides the ids: not of fields that other versions of the library add, empty."""
        content = _without_empty(json.loads(self._backend.to_str()))
        del content["version"]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle, (self._backend.to_str(),)


def resolve_tokenizer(
    config: TokenizerConfig,
    corpus: Corpus | Corpora,
    cache_dir: Path,
    *,
    split: str = "train",
    skip_bad_blocks: bool = False,
) -> AtomasTokenizer:
    """The tokenizer that `config.source` names; `corpus` trains one on `split`, once, and keeps it.

    A block that cannot be read raises BlockError, or is left out. The tokenizer is kept in `cache_dir`. Processes that
    call this at the same time do the same work; one result stays.
    """
    if config.source != "corpus":
        return AtomasTokenizer.load(config.source)
    folder = cache_dir / f"corpus-{corpus.fingerprint[:16]}-{split}-{config.vocab_size}"
    if not folder.exists():
        tokenizer = AtomasTokenizer.train(_training_texts(corpus, split, skip_bad_blocks), config.vocab_size)
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir, prefix=".tokenizer-") as partial:
            tokenizer.save(Path(partial) / folder.name)
            try:
                (Path(partial) / folder.name).rename(folder)
            except OSError:
                if not folder.exists():
                    raise
    return AtomasTokenizer.load(folder)


def _training_texts(corpus: Corpus | Corpora, name: str, skip_bad_blocks: bool) -> Iterator[str]:
    splits = corpus.parts(name)
    stride = max(1, -(-sum(split.num_records for split in splits) // _TRAINING_RECORDS))
    for split in splits:
        for block in range(0, len(split.blocks), stride):
            try:
                records = split.read_block(block)
            except BlockError:
                if not skip_bad_blocks:
                    raise
                continue
            for record in records:
                yield record["text"]
                yield record["smiles"]


def _units(text: str) -> list[str]:
    """Parts of `text` that are encoded independently of each other, to be looked up when they come again.

    Folding may reach across a space where there are combining characters, so only plain text is taken apart.
    """
    return text.split() if text.isascii() and text.isprintable() else [text]


def _words(text: str, normalizer: Any) -> list[str]:
    if not (text.isascii() and text.isprintable()):
        text = normalizer.normalize_str(text)
    return text.replace(WORD_START, " ").split()


def _find_file(spec: str | Path) -> Path:
    path = Path(spec)
    if path.is_file():
        return path
    names = ("tokenizer.json", "spiece.model")
    if path.is_dir():
        for name in names:
            if (path / name).is_file():
                return path / name
        raise AtomasError(f"{path} holds no tokenizer: it needs a tokenizer.json or a spiece.model")
    return _download(str(spec), names)


def _download(name: str, files: Sequence[str]) -> Path:
    from transformers.utils.hub import LocalEntryNotFoundError, cached_file

    for file in files:
        try:
            return Path(cached_file(name, file))
        except (OSError, ValueError) as error:
            if isinstance(
                error.__cause__, LocalEntryNotFoundError
            ):  # offline; other files will not come either
                break
    raise AtomasError(
        f"tokenizer {name!r}: no such folder here, and no {' or '.join(files)} under that hub name; "
        "give a folder with a T5 tokenizer, or `corpus`"
    )


def _from_json(file: Path) -> Tokenizer:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        backend = Tokenizer.from_str(json.dumps(content))
        kind = content["model"]["type"]
    except OSError as error:
        raise AtomasError(f"cannot read {file}: {error.strerror or error}") from error
    except Exception as error:  # the library raises bare Exception
        raise AtomasError(f"{file} is not a tokenizer.json of the tokenizers library: {error}") from error
    if kind != "Unigram":
        raise AtomasError(f"{file} holds a {kind} tokenizer: only T5-type Unigram tokenizers are supported")
    vocabulary: Vocabulary = [(piece, score) for piece, score in content["model"]["vocab"]]
    added = sorted(content["added_tokens"], key=lambda token: token["id"])
    vocabulary += [(token["content"], 0.0) for token in added if token["id"] >= len(vocabulary)]
    if tuple(piece for piece, _ in vocabulary[:3]) != SPECIAL_PIECES:
        raise AtomasError(f"{file}: ids 0, 1, 2 must be {', '.join(SPECIAL_PIECES)} as in T5")
    present = {piece for piece, _ in vocabulary}
    if content["model"].get("byte_fallback") and present.issuperset((*PRINTABLE_ASCII, *BYTE_PIECES)):
        return backend
    return _assemble(vocabulary, [token["content"] for token in added], backend.normalizer)


def _assemble(vocabulary: Vocabulary, special: Sequence[str], normalizer: Any) -> Tokenizer:
    pieces = complete_vocabulary(vocabulary, special)
    backend = Tokenizer(models.Unigram(pieces, UNK_ID, True))
    marks = normalizers.Replace(WORD_START, " ")
    backend.normalizer = normalizers.Sequence([normalizer, marks] if normalizer else [marks])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(WORD_START, prepend_scheme="always")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(WORD_START, prepend_scheme="always")]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", EOS_ID)]
    )
    backend.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special])
    if backend.get_vocab_size() != len(pieces):
        raise AtomasError("the tokenizer's vocabulary holds a piece twice: its file is damaged")
    # The library reads a score back with an error in the last bit, but what it has read once stays as it is.
    return Tokenizer.from_str(backend.to_str())


def _without_empty(value: Any) -> Any:
    """JSON without the keys that say null."""
    if isinstance(value, dict):
        return {key: _without_empty(item) for key, item in value.items() if item is not None}
    return [_without_empty(item) for item in value] if isinstance(value, list) else value


def _unpickle(content: str) -> AtomasTokenizer:
    return AtomasTokenizer(Tokenizer.from_str(content))
