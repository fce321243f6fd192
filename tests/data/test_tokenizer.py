"""The tokenizer: no character of real data is lost, old ids stay, files are read by others as by us."""

import csv
import json
import os
import pickle
import subprocess
import sys
import unicodedata
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from atomas.config import TokenizerConfig
from atomas.data.shard_index import write_index
from atomas.data.shard_writer import ShardWriter
from atomas.data.shards import Corpus
from atomas.data.tokenizer import EOS_ID, UNK_ID, AtomasTokenizer, resolve_tokenizer
from atomas.data.vocabulary import MINIMUM_SIZE
from atomas.errors import AtomasError

MOLECULES = ["CCO", "CC(=O)Oc1ccccc1C(=O)O", "C[C@H](N)C(=O)O", "[Na+].[Cl-]", "c1ccc2ccccc2c1"]
SENTENCES = ["A ring with two hydroxy groups.", "It has a carboxylic acid and a ring.", "Two rings, no acid."]
HOSTILE = [
    "",
    "   ",
    " leading, trailing  and   inner  spaces ",
    "tab\tnew\nline\r\nend",
    r"F/C=C\F {a} ~ <b> ^ `c`",
    r"\ \\ a\ \b",
    "</s> <pad> <unk> <extra_id_7> <0x41>",
    "4\u00ce\u00b1 \u03b1-D \u00bd \ufb01 \u2033 \u00b0C",
    "\u2581a\u2581\u2581 b",
    "e\u0301 \u0308x \U0001f9ea \u5316\u5b66",
]


@pytest.fixture(scope="session")
def t5(shared_data: Path) -> AtomasTokenizer:
    return AtomasTokenizer.load(shared_data / "tokenizers" / "t5")


@pytest.fixture(scope="session")
def trained() -> AtomasTokenizer:
    return AtomasTokenizer.train(MOLECULES * 3 + SENTENCES * 3, 420)


def pair_file(path: Path) -> Iterator[tuple[str, str]]:
    lines = path.read_text(encoding="utf-8").split("\n")
    for line in lines[1:]:
        if line:
            _, smiles, text = line.split("\t")
            yield smiles, text


def l_and_m_24(shared_data: Path) -> Iterator[tuple[str, str]]:
    with zipfile.ZipFile(shared_data / "lpm24" / "additional_data.zip") as archive:
        for line in archive.open("train_props.txt"):
            smiles, text = line.decode().rstrip("\n").split("\t")
            yield smiles, text


def molecule_net(shared_data: Path) -> Iterator[str]:
    for path in sorted((shared_data / "moleculenet").glob("*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        column = next(name for name in ("smiles", "mol") if name in rows[0])
        yield from (row[column].strip() for row in rows)  # ESOL has a blank behind some


PAIR_FILES = [
    "chebi20/validation",
    "pubchem324k/validation",
    "iupac/train",
    "pcdes/validation",
    "pcdes/misaligned",
]


def assert_lossless(tokenizer: AtomasTokenizer, strings: list[str], *, exact: bool) -> None:
    assert len(strings) > 100
    for string, ids in zip(strings, tokenizer.encode_batch(strings), strict=True):
        assert ids[-1] == EOS_ID
        assert EOS_ID not in ids[:-1]
        assert UNK_ID not in ids
        assert tokenizer.decode(ids) == (string if exact else tokenizer.normalize(string))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("t5", name) for name in PAIR_FILES),
        ("trained", "chebi20/validation"),
        ("trained", "iupac/validation"),
    ],
)
def test_real_pairs_round_trip(
    kind: str, name: str, shared_data: Path, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(kind)
    smiles, texts = zip(*pair_file(shared_data / f"{name}.txt"), strict=True)
    assert_lossless(tokenizer, list(smiles), exact=True)
    assert_lossless(tokenizer, list(texts), exact=False)


def test_molecule_net_and_some_of_l_and_m_24_round_trip(t5: AtomasTokenizer, shared_data: Path) -> None:
    assert_lossless(t5, list(molecule_net(shared_data)), exact=True)
    smiles, texts = zip(*islice(l_and_m_24(shared_data), 2000), strict=True)
    assert_lossless(t5, list(smiles), exact=True)
    assert_lossless(t5, list(texts), exact=False)


@pytest.mark.slow
def test_all_of_l_and_m_24_round_trips(t5: AtomasTokenizer, shared_data: Path) -> None:
    smiles, texts = zip(*l_and_m_24(shared_data), strict=True)
    assert_lossless(t5, list(smiles), exact=True)
    assert_lossless(t5, list(texts), exact=False)


def test_normalizing_is_nfkc_and_single_spaces(t5: AtomasTokenizer, shared_data: Path) -> None:
    texts = [text for name in PAIR_FILES for _, text in pair_file(shared_data / f"{name}.txt")]
    # SentencePiece's nmt_nfkc makes a space of U+FFFD, which NFKC keeps.
    printable = [text for text in texts if text.isprintable() and "\ufffd" not in text]
    assert sum(not text.isascii() for text in printable) > 20
    for text in printable:
        assert t5.normalize(text) == " ".join(unicodedata.normalize("NFKC", text).split())


@pytest.mark.parametrize("kind", ["t5", "trained"])
@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_strings_round_trip(kind: str, text: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    (ids,) = tokenizer.encode_batch([text])
    assert tokenizer.decode(ids) == tokenizer.normalize(text)
    assert ids.count(EOS_ID) == 1


@pytest.mark.parametrize("kind", ["t5", "trained"])
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=40) | st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40))
def test_any_string_round_trips(kind: str, text: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    (ids,) = tokenizer.encode_batch([text])
    assert tokenizer.decode(ids) == tokenizer.normalize(text)
    assert tokenizer.encode_with_offsets(text)[0] == ids, "words looked up are words encoded in place"


def test_ids_of_t5_stay_where_t5_has_pieces(t5: AtomasTokenizer, shared_data: Path) -> None:
    plain = Tokenizer.from_file(str(shared_data / "tokenizers" / "t5" / "tokenizer.json"))
    texts = [string for pair in pair_file(shared_data / "chebi20" / "validation.txt") for string in pair]
    known = [
        (text, e.ids) for text, e in zip(texts, plain.encode_batch(texts), strict=True) if UNK_ID not in e.ids
    ]
    assert 0.9 * len(texts) < len(known) < len(texts)
    assert t5.encode_batch([text for text, _ in known]) == [ids for _, ids in known]


def test_a_sentencepiece_model_gives_the_ids_of_its_json(t5: AtomasTokenizer, shared_data: Path) -> None:
    model = AtomasTokenizer.load(shared_data / "tokenizers" / "t5" / "spiece.model")
    assert model.vocab_size == t5.vocab_size == 32100 + 7 + 256
    texts = [*HOSTILE, *(s for pair in pair_file(shared_data / "pcdes" / "validation.txt") for s in pair)]
    assert model.encode_batch(texts) == t5.encode_batch(texts)
    assert model.fingerprint == t5.fingerprint


def test_a_foreign_sentencepiece_model_gets_the_layout_of_t5(shared_data: Path) -> None:
    tokenizer = AtomasTokenizer.load(shared_data / "tokenizers" / "sentencepiece_test.model")
    smiles, texts = zip(*pair_file(shared_data / "pubchem324k" / "validation.txt"), strict=True)
    assert_lossless(tokenizer, list(smiles), exact=True)
    assert_lossless(tokenizer, list(texts), exact=False)


def test_offsets_point_at_the_characters_of_each_token(t5: AtomasTokenizer, trained: AtomasTokenizer) -> None:
    for tokenizer in (t5, trained):
        for smiles in [*MOLECULES, r"F/C=C\F"]:
            ids, offsets = tokenizer.encode_with_offsets(smiles)
            assert len(ids) == len(offsets)
            assert "".join(smiles[start:end] for start, end in offsets) == smiles
            for number, (start, end) in zip(ids, offsets, strict=True):
                assert tokenizer.decode([number]).strip() == smiles[start:end]


def test_offsets_refer_to_the_string_before_folding(trained: AtomasTokenizer) -> None:
    text = "  A\t \u03b1-ring \ufb01t"
    _, offsets = trained.encode_with_offsets(text)
    covered = {place for start, end in offsets for place in range(start, end)}
    assert covered == {place for place, character in enumerate(text) if not character.isspace()}


@pytest.mark.parametrize("kind", ["t5", "trained"])
def test_a_saved_folder_is_read_alike_by_us_and_by_transformers(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    from transformers import AutoTokenizer, T5Config, T5Tokenizer

    tokenizer = request.getfixturevalue(kind)
    tokenizer.save(tmp_path)
    again = AtomasTokenizer.load(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    assert again.vocab_size == tokenizer.vocab_size
    texts = [text for text in HOSTILE if "</s>" not in text] + MOLECULES + SENTENCES
    expected = tokenizer.encode_batch(texts)
    assert again.encode_batch(texts) == expected
    for with_model_config in (False, True):
        if with_model_config:
            T5Config(vocab_size=tokenizer.vocab_size).save_pretrained(tmp_path)
        theirs = AutoTokenizer.from_pretrained(tmp_path)
        assert len(theirs) == tokenizer.vocab_size
        assert theirs(texts).input_ids == expected
        assert (theirs.pad_token_id, theirs.eos_token_id, theirs.unk_token_id) == (0, EOS_ID, UNK_ID)
        decoded = [theirs.decode(ids, skip_special_tokens=True) for ids in expected]
        assert decoded == [tokenizer.normalize(text) for text in texts]
    t5_class = T5Tokenizer.from_pretrained(tmp_path)
    assert len(t5_class) == tokenizer.vocab_size
    assert t5_class(MOLECULES).input_ids == tokenizer.encode_batch(MOLECULES)


def test_a_tokenizer_travels_to_other_processes(trained: AtomasTokenizer) -> None:
    copy = pickle.loads(pickle.dumps(trained))
    assert copy.encode_batch(HOSTILE) == trained.encode_batch(HOSTILE)
    assert copy.fingerprint == trained.fingerprint


def test_training_depends_on_the_texts_alone(trained: AtomasTokenizer) -> None:
    script = (
        "from atomas.data.tokenizer import AtomasTokenizer;"
        f"print(AtomasTokenizer.train({(SENTENCES * 3 + MOLECULES * 3)!r}, 420).fingerprint)"
    )
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "TOKENIZERS_PARALLELISM": "true"}
        result = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True
        )
        assert result.stdout.strip() == trained.fingerprint, result.stderr


def test_training_learns_words_and_keeps_smiles_pieces_short(shared_data: Path) -> None:
    pairs = list(islice(pair_file(shared_data / "chebi20" / "validation.txt"), 800))
    tokenizer = AtomasTokenizer.train([string for pair in pairs for string in pair], 2048)
    assert tokenizer.vocab_size == 2048
    smiles, texts = zip(*pair_file(shared_data / "pubchem324k" / "validation.txt"), strict=True)
    for strings, characters_per_token in ((smiles, 2.5), (texts, 2.5)):
        tokens = sum(map(len, tokenizer.encode_batch(list(strings))))
        assert sum(map(len, strings)) / tokens > characters_per_token
    assert len(tokenizer.encode_batch(["molecule"])[0]) == 2
    longest = max(end - start for start, end in tokenizer.encode_with_offsets("[C@@H](C(=O)O)" * 8)[1])
    assert longest <= len("[C@@H]")


def test_a_vocabulary_too_small_for_single_characters_is_refused() -> None:
    with pytest.raises(AtomasError, match=f"vocab_size = 300: must be at least {MINIMUM_SIZE}"):
        AtomasTokenizer.train(MOLECULES, 300)
    tokenizer = AtomasTokenizer.train(MOLECULES, MINIMUM_SIZE)
    assert tokenizer.vocab_size == MINIMUM_SIZE


def test_texts_that_spell_special_pieces_can_be_trained_on() -> None:
    texts = ["</s> <unk> <0x41> <pad>"] * 9
    tokenizer = AtomasTokenizer.train(texts, 420)
    assert tokenizer.decode(tokenizer.encode_batch(texts)[0]) == texts[0]


def test_what_is_no_t5_tokenizer_is_refused(
    tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AtomasError, match="WordPiece tokenizer"):
        AtomasTokenizer.load(shared_data / "tokenizers" / "scibert_scivocab_uncased")
    with pytest.raises(AtomasError, match="holds no tokenizer"):
        AtomasTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(AtomasError, match=r"tokenizer\.json is not a tokenizer\.json"):
        AtomasTokenizer.load(tmp_path)
    model = (shared_data / "tokenizers" / "sentencepiece_test.model").read_bytes()
    for name, damaged in (("cut", model[: len(model) // 2]), ("empty", b""), ("text", b"spiece")):
        (tmp_path / f"{name}.model").write_bytes(damaged)
        with pytest.raises(AtomasError, match=f"{name}.model is not a SentencePiece model"):
            AtomasTokenizer.load(tmp_path / f"{name}.model")
    with pytest.raises(AtomasError, match="no such folder here"):
        AtomasTokenizer.load("./no/such/folder")


def test_a_json_with_another_layout_is_refused(tmp_path: Path, trained: AtomasTokenizer) -> None:
    trained.save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["vocab"][0][0] = "<s>"
    content["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(AtomasError, match="ids 0, 1, 2 must be <pad>, </s>, <unk>"):
        AtomasTokenizer.load(tmp_path)


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    with ShardWriter(tmp_path / "corpus", "learn", block_size=4) as writer:
        for number in range(30):
            smiles, text = MOLECULES[number % 5], SENTENCES[number % 3]
            writer.write({"smiles": smiles, "text": text, "inchikey": smiles})
    write_index(tmp_path / "corpus", {"learn": writer.index()}, counts={}, hazards={}, sources=[], options={})
    return Corpus.open(tmp_path / "corpus")


def test_a_corpus_tokenizer_is_trained_once_by_however_many(corpus: Corpus, tmp_path: Path) -> None:
    config = TokenizerConfig(vocab_size=420)
    cache = tmp_path / "run"
    with ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(resolve_tokenizer, config, corpus, cache, split="learn") for _ in range(3)]
    assert len({job.result().fingerprint for job in jobs}) == 1
    (folder,) = cache.iterdir()
    written = (folder / "tokenizer.json").stat().st_mtime_ns
    again = resolve_tokenizer(config, corpus, cache, split="learn")
    assert again.fingerprint == jobs[0].result().fingerprint
    assert (folder / "tokenizer.json").stat().st_mtime_ns == written
    other = resolve_tokenizer(TokenizerConfig(vocab_size=400), corpus, cache, split="learn")
    assert other.vocab_size <= 400


def test_a_given_tokenizer_is_loaded_from_where_it_is(
    corpus: Corpus, trained: AtomasTokenizer, tmp_path: Path
) -> None:
    trained.save(tmp_path / "given")
    config = TokenizerConfig(source=str(tmp_path / "given"))
    assert resolve_tokenizer(config, corpus, tmp_path / "run").fingerprint == trained.fingerprint
    assert not (tmp_path / "run").exists()
