"""Caption metrics: the published scripts' values, hand-counted texts, the tokenizer, and what is null."""

import json
import os
from pathlib import Path

import pytest
from nltk.corpus import wordnet
from tokenizers import BertWordPieceTokenizer

from atomas.errors import AtomasError
from atomas.metrics.caption_tokenizer import MAX_TOKENS, SCIBERT, CaptionTokenizer
from atomas.metrics.captions import METRICS, score_captions, wordnet_is_there
from atomas.metrics.resampling import Bootstrap
from atomas.metrics.scores import Scores
from atomas.tasks.prediction_file import read_predictions

FAST = Bootstrap(resamples=20)
SCIBERT_FOLDER = "tokenizers/scibert_scivocab_uncased"


def score_file(shared_data: Path, name: str, tokenizer: CaptionTokenizer) -> tuple[Scores, dict[str, float]]:
    rows = read_predictions(shared_data / "predictions" / name, "caption").rows
    scores = score_captions(
        [row.reference for row in rows], [row.output for row in rows], tokenizer=tokenizer, workers=2
    )
    wanted = json.loads((shared_data / "predictions" / "reference_values.json").read_text())[name]
    return scores, wanted


def only_words(shared_data: Path, folder: Path) -> CaptionTokenizer:
    """SciBERT as its owners publish it: without a tokenizer.json."""
    words = (shared_data / SCIBERT_FOLDER / "vocab.txt").read_text(encoding="utf-8")
    (folder / "vocab.txt").write_text(words, encoding="utf-8")
    return CaptionTokenizer.load(folder)


def test_published_values(shared_data: Path, tmp_path: Path) -> None:
    complete = CaptionTokenizer.load(shared_data / SCIBERT_FOLDER)
    for tokenizer in (complete, only_words(shared_data, tmp_path)):
        scores, wanted = score_file(shared_data, "smiles2caption_example.txt", tokenizer)
        metrics = scores.as_json()["metrics"]
        assert {name: metrics[name] for name in wanted} == pytest.approx(wanted, abs=1e-3)
        assert scores.details["tokenizer"]["name"] == SCIBERT
        assert scores.details["tokenizer"]["vocab_size"] == 31090


@pytest.mark.slow
def test_published_values_of_a_whole_split(shared_data: Path) -> None:
    tokenizer = CaptionTokenizer.load(shared_data / SCIBERT_FOLDER)
    scores, wanted = score_file(shared_data, "molt5-small-smiles2caption.txt", tokenizer)
    metrics = scores.as_json()["metrics"]
    assert {name: metrics[name] for name in wanted} == pytest.approx(wanted, abs=1e-3)


def test_another_tokenizer_moves_bleu_and_is_named(shared_data: Path) -> None:
    tokenizer = CaptionTokenizer.load(shared_data / "tokenizers/t5")
    scores, wanted = score_file(shared_data, "smiles2caption_example.txt", tokenizer)
    bleu = scores.metrics["bleu2"]
    assert bleu.value is not None
    assert abs(bleu.value - wanted["bleu2"]) > 5e-3
    assert "not SciBERT" in bleu.reason
    assert scores.metrics["rouge1"].value == pytest.approx(wanted["rouge1"], abs=1e-3)


def test_known_texts(vocabulary: Path, without_wordnet: None) -> None:
    scores = score_captions(
        ["The molecule is an acid.", "A carboxylic ester"],
        ["the molecule is a ring.", "[CLS] a carboxylic ester"],
        tokenizer=CaptionTokenizer.load(vocabulary),
        bootstrap=FAST,
    )
    # of 10 tokens 8 match (two of the six of the first text do not), of 8 pairs 5
    assert scores.metrics["bleu2"].value == pytest.approx((8 / 10 * 5 / 8) ** 0.5)
    assert scores.metrics["rouge1"].value == pytest.approx((3 / 5 + 1) / 2)
    assert scores.metrics["rougeL"].value == pytest.approx((3 / 5 + 1) / 2)
    assert tuple(scores.metrics) == METRICS


def test_without_a_tokenizer_bleu_is_null_with_a_reason(without_wordnet: None) -> None:
    scores = score_captions(["an acid"], ["an acid"], tokenizer=None, bootstrap=FAST)
    for name in ("bleu2", "bleu4", "meteor"):
        assert scores.metrics[name].value is None
        assert scores.metrics[name].interval is None
    assert SCIBERT in scores.metrics["bleu4"].reason
    assert scores.metrics["rouge1"].value == 1.0
    report = scores.as_json()
    assert report["metrics"]["bleu2"] is None
    assert set(report["reasons"]) == {"bleu2", "bleu4", "meteor"}
    assert report["tokenizer"] is None


def test_without_wordnet_meteor_is_null_with_a_reason(vocabulary: Path, without_wordnet: None) -> None:
    tokenizer = CaptionTokenizer.load(vocabulary)
    scores = score_captions(["an acid"], ["an acid"], tokenizer=tokenizer, bootstrap=FAST)
    assert scores.metrics["bleu2"].value == 1.0
    assert scores.metrics["meteor"].value is None
    assert "WordNet" in scores.metrics["meteor"].reason


@pytest.mark.parametrize("workers", [1, 2])
def test_meteor_knows_stems_and_synonyms(vocabulary: Path, tiny_wordnet: None, workers: int) -> None:
    tokenizer = CaptionTokenizer.load(vocabulary)
    scores = score_captions(
        ["the auto", "the ester"],
        ["the car", "the acid"],
        tokenizer=tokenizer,
        bootstrap=FAST,
        workers=workers,
    )
    # both words in one chunk: 1 - 0.5 (1/2)^3; one word: its share of output and reference, and one chunk of one
    assert scores.metrics["meteor"].value == pytest.approx(((1 - 0.5 / 8) + 0.5 * (1 - 0.5)) / 2)


def test_forked_workers_share_no_position_in_a_file(tiny_wordnet: None) -> None:
    assert wordnet_is_there()
    wordnet.synsets("car")
    assert open_data_files()
    assert wordnet_is_there()
    assert not open_data_files()
    assert wordnet.synsets("auto")[0].lemma_names() == ["car", "auto"]


def open_data_files() -> list[str]:
    """WordNet's, of this process, as Linux tells."""
    files = [os.readlink(entry.path) for entry in os.scandir("/proc/self/fd") if os.path.lexists(entry.path)]
    return [file for file in files if "/wordnet/data." in file]


def test_an_empty_output_scores_nothing(vocabulary: Path, tiny_wordnet: None) -> None:
    scores = score_captions(["an acid"], [""], tokenizer=CaptionTokenizer.load(vocabulary), bootstrap=FAST)
    assert {score.value for score in scores.metrics.values()} == {0.0}
    assert scores.details["empty_outputs"] == 1


def test_texts_are_cut_where_the_published_script_cuts(vocabulary: Path) -> None:
    tokens = CaptionTokenizer.load(vocabulary).tokenize("acid " * (MAX_TOKENS + 9))
    assert tokens == ["acid"] * MAX_TOKENS


def test_words_in_brackets_do_not_count(vocabulary: Path) -> None:
    tokenizer = CaptionTokenizer.load(vocabulary)
    assert tokenizer.tokenize("[CLS] The rings [SEP] zzz [PAD]") == ["the", "ring", "##s", "[UNK]"]


def test_upper_case_is_kept_where_the_folder_says_so(vocabulary: Path) -> None:
    (vocabulary / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert CaptionTokenizer.load(vocabulary).tokenize("The acid") == ["[UNK]", "acid"]


def test_files_that_contradict_each_other_are_refused(vocabulary: Path) -> None:
    """What a tokenizer that silently ignored its vocabulary would look like."""
    BertWordPieceTokenizer().save(str(vocabulary / "tokenizer.json"))
    with pytest.raises(AtomasError, match=r"gives 0 tokens, but its vocab\.txt holds 21"):
        CaptionTokenizer.load(vocabulary)


def test_a_folder_without_or_with_a_broken_tokenizer_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(AtomasError, match="holds no tokenizer"):
        CaptionTokenizer.load(tmp_path)
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(AtomasError, match=r"it has no \[CLS\]"):
        CaptionTokenizer.load(tmp_path)
    (tmp_path / "vocab.txt").unlink()
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(AtomasError, match="cannot read the tokenizer"):
        CaptionTokenizer.load(tmp_path)


@pytest.mark.parametrize("spec", ["/no/such/folder", "../nothing", "a/b/c"])
def test_what_can_only_be_a_folder_is_not_asked_for_elsewhere(spec: str) -> None:
    with pytest.raises(AtomasError, match=r"no such folder$"):
        CaptionTokenizer.load(spec)


def test_scibert_is_found_below_the_shared_folder(monkeypatch: pytest.MonkeyPatch, shared_data: Path) -> None:
    monkeypatch.setenv("ATOMAS_SHARED", str(shared_data.parent))
    found = CaptionTokenizer.find()
    assert found is not None
    assert found.is_scibert
