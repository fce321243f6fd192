"""Unigram vocabularies: read from a SentencePiece model, trained on texts, completed so that nothing is lost.

A vocabulary is a list of (piece, log probability); the index is the token id. Ids 0, 1, 2 are <pad>, </s>,
<unk> as in T5. U+2581 marks the start of a word.
"""

import math
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from atomas.errors import AtomasError

Vocabulary = list[tuple[str, float]]

SPECIAL_PIECES = ("<pad>", "</s>", "<unk>")
WORD_START = "\u2581"
PRINTABLE_ASCII = tuple(chr(code) for code in range(33, 127))
BYTE_PIECES = tuple(f"<0x{byte:02X}>" for byte in range(256))
MINIMUM_SIZE = len(SPECIAL_PIECES) + 1 + len(PRINTABLE_ASCII) + len(BYTE_PIECES)

SENTINELS = tuple(f"<extra_id_{number}>" for number in reversed(range(100)))
# A piece of a SMILES is at most as long as a bracket atom, [C@@H]: level 0 stays near single atoms.
_MAX_WORD_PIECE = 16
_MAX_OTHER_PIECE = 6
_SEED_FACTOR = 3
_KEEP_PER_ROUND = 0.75


def complete_vocabulary(vocabulary: Vocabulary, special: Iterable[str]) -> Vocabulary:
    """Append every printable ASCII character and all 256 bytes that are missing; ids of present pieces stay.

    Bytes stand for characters without a piece. Bytes and `special` pieces get a score so low that the literal
    text "<0x41>" or "</s>" is spelled by its characters instead.
    """
    ordinary = [score for piece, score in vocabulary if piece not in special and piece not in BYTE_PIECES]
    rare = min(ordinary, default=-10.0)
    never = (rare - 1.0) * 2 * max(len(piece) for piece in (*special, *BYTE_PIECES))
    present = {piece for piece, _ in vocabulary}
    spelled = {*special, *BYTE_PIECES}
    return [
        *((piece, never if piece in spelled else score) for piece, score in vocabulary),
        *((piece, rare) for piece in (WORD_START, *PRINTABLE_ASCII) if piece not in present),
        *((piece, never) for piece in BYTE_PIECES if piece not in present),
    ]


def read_sentencepiece(path: Path) -> tuple[Vocabulary, bytes]:
    """Pieces and the normaliser's compiled character map of a SentencePiece Unigram model.

    <pad>, </s>, <unk> come first, the ordinary pieces keep their order, and T5's 100 sentinels <extra_id_99>
    ... <extra_id_0> end the list: for T5's own model the ids are those of its `tokenizer.json`. Fields as in
    sentencepiece_model.proto. Raises AtomasError if `path` is no such model.
    """
    try:
        model = _parse_message(path.read_bytes())
        trainer = _parse_message(model[2][0])
        normalizer = _parse_message(model[3][0])
        pieces = [_parse_message(piece) for piece in model[1]]
        ordinary = [
            (piece[1][0].decode(), piece[2][0]) for piece in pieces if piece.get(3, [1])[0] in _ORDINARY_TYPES
        ]
    except OSError as error:
        raise AtomasError(f"cannot read {path}: {error.strerror or error}") from error
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        raise AtomasError(f"{path} is not a SentencePiece model: give a spiece.model file") from error
    if trainer.get(3, [1])[0] != 1:
        raise AtomasError(f"{path} is not a Unigram model (BPE, word or character): give a T5 tokenizer")
    specials = [(piece, 0.0) for piece in (*SPECIAL_PIECES, *SENTINELS)]
    split = len(SPECIAL_PIECES)
    charsmap = normalizer.get(2, [b""])[0]
    return [*specials[:split], *ordinary, *specials[split:]], charsmap


def train_unigram(words: Mapping[str, int], vocab_size: int) -> Vocabulary:
    """At most `vocab_size` Unigram pieces for `words` (each beginning with U+2581) with their counts.

    Seeds come from byte-pair merges, are weighted by expectation maximisation over best segmentations, and
    the least used are dropped round by round (after Kudo 2018, "Subword Regularization", section 3.2).
    Counts are integers and ties are broken by code points, so the result depends on `words` alone. Raises
    AtomasError for a `vocab_size` that cannot hold the obligatory pieces.
    """
    if vocab_size < MINIMUM_SIZE:
        raise AtomasError(
            f"tokenizer.vocab_size = {vocab_size}: must be at least {MINIMUM_SIZE} "
            "(printable ASCII, 256 bytes and the special tokens)"
        )
    wanted = vocab_size - len(SPECIAL_PIECES) - len(BYTE_PIECES)
    kept = {WORD_START, *PRINTABLE_ASCII}
    pieces = Counter(dict.fromkeys(sorted(_seed_pieces(words, _SEED_FACTOR * vocab_size) | kept), 1))
    while True:
        for _ in range(2):
            pieces = _segmentation_counts(words, pieces)
            pieces.update(dict.fromkeys(kept - pieces.keys(), 1))
        if len(pieces) <= wanted:
            break
        size = max(wanted, int(_KEEP_PER_ROUND * len(pieces)))
        ranked = sorted(pieces.items(), key=lambda item: (item[0] not in kept, -item[1], item[0]))
        pieces = Counter(dict(ranked[:size]))
    ordered = sorted(_scores(pieces), key=lambda item: (-item[1], item[0]))
    return complete_vocabulary([*((piece, 0.0) for piece in SPECIAL_PIECES), *ordered], SPECIAL_PIECES)


def _seed_pieces(words: Mapping[str, int], size: int) -> set[str]:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=size, max_token_length=_MAX_WORD_PIECE, show_progress=False)
    repeated = (" ".join([word] * count) for word, count in sorted(words.items()))
    bpe.train_from_iterator(repeated, trainer)
    bare = ((piece, piece.removeprefix(WORD_START)) for piece in bpe.get_vocab())
    seeds = {piece for piece, rest in bare if rest.isalpha() or len(rest) <= _MAX_OTHER_PIECE}
    return seeds - {*SPECIAL_PIECES, *BYTE_PIECES}


def _segmentation_counts(words: Mapping[str, int], pieces: Counter[str]) -> Counter[str]:
    vocabulary = [("<unk>", 0.0), *_scores(pieces)]
    unigram = Tokenizer(models.Unigram(vocabulary, 0, False))
    counts: Counter[str] = Counter()
    for encoding, count in zip(unigram.encode_batch_fast(list(words)), words.values(), strict=True):
        for number in encoding.ids:
            counts[vocabulary[number][0]] += count
    del counts["<unk>"]
    return counts


def _scores(pieces: Counter[str]) -> Vocabulary:
    total = sum(pieces.values())
    return [(piece, math.log(count / total)) for piece, count in sorted(pieces.items())]


_ORDINARY_TYPES = (1, 4)  # NORMAL and USER_DEFINED; the others are unknown, control, unused and byte pieces


def _parse_message(data: bytes) -> dict[int, list[Any]]:
    """Fields of a protocol buffer message by number: varints as int, 4 bytes as float, the rest as bytes."""
    fields: dict[int, list[Any]] = {}
    for number, value in _fields(data):
        fields.setdefault(number, []).append(value)
    return fields


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        value: Any
        match key & 7:
            case 0:
                value, position = _varint(data, position)
            case 1:
                value, position = data[position : position + 8], position + 8
            case 2:
                size, position = _varint(data, position)
                value, position = data[position : position + size], position + size
            case 5:
                (value,) = struct.unpack_from("<f", data, position)
                position += 4
            case kind:
                raise ValueError(f"wire type {kind}")
        if position > len(data):
            raise ValueError("cut short")
        yield key >> 3, value


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position += 1
        if byte < 0x80:
            return value, position
        shift += 7
