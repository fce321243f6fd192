"""The alignment check tells real pairs from shuffled ones, for every kind of text."""

import random
from pathlib import Path

import pytest

from atomas.data.alignment_check import Alignment, check_alignment
from atomas.data.molecules import InvalidMoleculeError, to_mol, unescape_smiles
from atomas.data.sources import Columns, PairFile
from atomas.data.texts import clean_text

HEALTHY = ("chebi20/validation.txt", "pubchem324k/validation.txt", "iupac/train.txt", "pcdes/validation.txt")
PHRASES = "lpm24/additional_data.zip:train_props.txt"


def read_distinct(folder: Path, name: str, count: int, *, start: int = 0) -> tuple[list[str], list[str]]:
    """`count` rows from row `start` on, valid, no molecule and no text twice."""
    header = ("smiles", "text") if name == PHRASES else None
    smiles: list[str] = []
    texts: list[str] = []
    for number, row in enumerate(PairFile.parse(f"{folder}/{name}").rows(Columns(header=header))):
        if number < start or row.smiles in smiles or clean_text(row.text).text in texts:
            continue
        try:
            to_mol(unescape_smiles(row.smiles))
        except InvalidMoleculeError:
            continue
        smiles.append(unescape_smiles(row.smiles))
        texts.append(clean_text(row.text).text)
        if len(smiles) == count:
            break
    return smiles, texts


def shuffled(texts: list[str], seed: int) -> list[str]:
    return random.Random(seed).sample(texts, len(texts))


@pytest.mark.parametrize("name", HEALTHY)
@pytest.mark.parametrize("start", [0, 500])
def test_healthy_corpora_of_200_rows_pass_and_shuffled_ones_do_not(
    shared_data: Path, name: str, start: int
) -> None:
    smiles, texts = read_distinct(shared_data, name, 200, start=start)
    healthy = check_alignment(smiles, texts)
    assert healthy.verdict == "aligned"
    assert healthy.auc > 0.8
    for seed in range(3):
        broken = check_alignment(smiles, shuffled(texts, seed))
        assert broken.verdict == "misaligned"
        assert abs(broken.z) < 4


def test_sets_of_phrases_pass_though_weakly_linked(shared_data: Path) -> None:
    smiles, texts = read_distinct(shared_data, PHRASES, 300)
    healthy = check_alignment(smiles, texts)
    assert healthy.verdict == "aligned"
    assert 0.58 < healthy.auc < 0.8
    assert check_alignment(smiles, shuffled(texts, 0)).verdict == "misaligned"


def test_the_misaligned_corpus_is_noticed(shared_data: Path) -> None:
    for start in (0, 2000, 5000):
        result = check_alignment(*read_distinct(shared_data, "pcdes/misaligned.txt", 400, start=start))
        assert result.verdict == "misaligned"


@pytest.mark.parametrize("name", ["chebi20/validation.txt", "pcdes/validation.txt"])
def test_one_lost_line_is_noticed_and_located(shared_data: Path, name: str) -> None:
    smiles, texts = read_distinct(shared_data, name, 801)
    assert check_alignment(smiles[:-1], texts[1:]).verdict == "misaligned"
    halfway = check_alignment(smiles[:-1], texts[:400] + texts[401:])
    assert halfway.verdict == "partly misaligned"
    assert halfway.suspect_segments == (4, 5, 6, 7)
    assert check_alignment(smiles[:-1], texts[:-1]).verdict == "aligned"


def test_too_few_rows_accuse_nobody(shared_data: Path) -> None:
    smiles, texts = read_distinct(shared_data, "pcdes/misaligned.txt", 90)
    assert check_alignment(smiles[:20], texts[:20]).verdict == "undecided"
    assert check_alignment(smiles, texts).verdict == "undecided"
    assert check_alignment([], []) == Alignment(verdict="undecided", rows=0, auc=0.5, z=0.0)


def test_texts_without_letters() -> None:
    smiles = ["C" * (i + 1) for i in range(120)]
    assert check_alignment(smiles, [str(i) for i in range(120)]).verdict == "misaligned"
