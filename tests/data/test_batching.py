"""Ragged batches: nothing lost, nothing padded; groups of like length are the best under their budget."""

import hashlib
import pickle
from collections.abc import Sequence

import torch
from hypothesis import given
from hypothesis import strategies as st

from atomas.data.batching import RaggedTokens, collate, split_groups, stable_id


class CharacterTokenizer:
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [[*map(ord, text), 1] for text in texts]


RECORDS = [
    {"smiles": "CCO", "text": "an alcohol", "inchikey": "LFQSCWFLJHTTHZ-UHFFFAOYSA-N"},
    {"smiles": "OCC", "text": "ethanol", "inchikey": "LFQSCWFLJHTTHZ-UHFFFAOYSA-N"},
    {"smiles": "C", "text": "an alcohol", "inchikey": "VNWKTOKETHGBQD-UHFFFAOYSA-N"},
]


def rows(tokens: RaggedTokens) -> list[list[int]]:
    return [row.tolist() for row in tokens.ids.split(tokens.lengths.tolist())]


def test_a_batch_holds_the_records_tokens() -> None:
    batch = collate(RECORDS, CharacterTokenizer(), sample_ids=[7, 8, 9])
    assert rows(batch.smiles) == [[67, 67, 79, 1], [79, 67, 67, 1], [67, 1]]
    assert rows(batch.text) == CharacterTokenizer().encode_batch([record["text"] for record in RECORDS])
    assert batch.sample_id.tolist() == [7, 8, 9]
    assert {tensor.dtype for tensor in (batch.text.ids, batch.text.lengths, batch.text_id)} == {torch.int64}
    assert len(batch) == 3


def test_equal_molecules_and_texts_have_equal_ids() -> None:
    batch = collate(RECORDS, CharacterTokenizer())
    first, second, third = batch.molecule_id.tolist()
    assert first == second != third
    first, second, third = batch.text_id.tolist()
    assert first == third != second


def test_only_a_text_is_cut_and_keeps_its_end() -> None:
    batch = collate(RECORDS, CharacterTokenizer(), max_text_tokens=3)
    assert rows(batch.text) == [[97, 110, 1], [101, 116, 1], [97, 110, 1]]
    assert batch.smiles.lengths.tolist() == [4, 4, 2]


def test_an_id_is_the_first_63_bits_of_sha256() -> None:
    digest = hashlib.sha256("Stickstoff \u03b1".encode()).hexdigest()
    assert stable_id("Stickstoff \u03b1") == int(digest[:16], 16) // 2 < 2**63


def test_moving_a_batch_moves_every_tensor() -> None:
    batch = collate(RECORDS, CharacterTokenizer()).to("meta")
    tensors = [batch.text.ids, batch.text.lengths, batch.smiles.ids, batch.smiles.lengths]
    tensors += [batch.molecule_id, batch.text_id, batch.sample_id]
    assert all(tensor.device.type == "meta" for tensor in tensors)


@given(st.lists(st.integers(1, 8), min_size=1, max_size=6), st.integers(1, 12))
def test_groups_are_split_until_there_are_enough(sizes: list[int], count: int) -> None:
    groups = list(torch.arange(sum(sizes)).split(sizes))
    parts = split_groups(groups, min(count, sum(sizes)))
    assert len(parts) == max(len(groups), min(count, sum(sizes)))
    assert torch.cat(parts).tolist() == list(range(sum(sizes)))
    assert all(len(part) > 0 for part in parts)


def test_a_batch_between_processes_is_the_same() -> None:
    batch = collate(RECORDS, CharacterTokenizer(), sample_ids=[7, 8, 2**40])
    copy = pickle.loads(pickle.dumps(batch))
    for one, other in (
        (batch.text.ids, copy.text.ids), (batch.text.lengths, copy.text.lengths),
        (batch.smiles.ids, copy.smiles.ids), (batch.smiles.lengths, copy.smiles.lengths),
        (batch.molecule_id, copy.molecule_id), (batch.text_id, copy.text_id), (batch.sample_id, copy.sample_id),
    ):  # fmt: skip
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    assert len(pickle.dumps(collate(RECORDS * 500, CharacterTokenizer()))) < 1500 * (2 * 12 + 2 * 4 + 40)
