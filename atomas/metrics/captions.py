"""Generated captions against their references, by the protocol of MolT5's evaluation scripts.

`bleu2` `bleu4`             corpus BLEU over SciBERT tokens, at most 512 of a text
`rouge1` `rouge2` `rougeL`  mean F1 of rouge-score, with its own words
`meteor`                    mean METEOR of nltk over the same tokens as BLEU
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from nltk.corpus import wordnet
from nltk.translate.meteor_score import meteor_score
from rouge_score.rouge_scorer import RougeScorer

from atomas.data.parallel import chunked, ordered_map
from atomas.data.progress import Progress
from atomas.metrics.bleu import bleu_counts, bleu_statistic
from atomas.metrics.caption_tokenizer import NO_SCIBERT, CaptionTokenizer
from atomas.metrics.resampling import Bootstrap, mean_over
from atomas.metrics.scores import Score, Scores, measure, versions

METRICS = ("bleu2", "bleu4", "rouge1", "rouge2", "rougeL", "meteor")
NO_WORDNET = "no WordNet data for nltk: `python -m nltk.downloader wordnet` fetches it"
_ROUGE = ("rouge1", "rouge2", "rougeL")
_START = "[CLS] "  # of outputs that were decoded by a BERT tokenizer
_CHUNK = 64


class _Pair(NamedTuple):
    """The tokens are None without a tokenizer."""

    reference: str
    output: str
    reference_tokens: list[str] | None
    output_tokens: list[str] | None


class _Row(NamedTuple):
    rouge: list[float]
    bleu: list[int] | None
    meteor: float | None


def score_captions(
    references: Sequence[str],
    outputs: Sequence[str],
    *,
    tokenizer: CaptionTokenizer | None,
    bootstrap: Bootstrap | None = None,
    workers: int = 1,
) -> Scores:
    """All caption metrics of `outputs`, one for each of `references`.

    Args:
        references, outputs: equally many, at least one; a missing output is "".
        tokenizer: of BLEU and METEOR, which are null without one.
        bootstrap: how intervals are found (default: 1,000 resamples, 95 %, seed 0).
        workers: processes to fork; leave it at 1 in a process that uses CUDA.

    Raises:
        ValueError: not equally many, or none.
    """
    if len(references) != len(outputs) or not references:
        raise ValueError(f"{len(references)} references and {len(outputs)} outputs: equally many are wanted")
    has_wordnet = wordnet_is_there()
    rows = _score_rows(references, outputs, tokenizer, meteor=has_wordnet, workers=workers)
    rouge = np.array([row.rouge for row in rows])
    statistics = {name: mean_over(rouge[:, number]) for number, name in enumerate(_ROUGE)}
    missing = {}
    if tokenizer is None:
        missing = dict.fromkeys(("bleu2", "bleu4", "meteor"), NO_SCIBERT)
    else:
        counts = np.array([row.bleu for row in rows], dtype=np.float64)
        statistics |= {"bleu2": bleu_statistic(counts, 2), "bleu4": bleu_statistic(counts, 4)}
        if has_wordnet:
            statistics["meteor"] = mean_over(np.array([row.meteor for row in rows], dtype=np.float64))
    if not has_wordnet:
        missing["meteor"] = NO_WORDNET
    return measure(
        statistics,
        bootstrap or Bootstrap(),
        rows=len(rows),
        order=METRICS,
        others={name: Score(value=None, reason=reason) for name, reason in missing.items()},
        reasons=_reasons(tokenizer),
        details={
            "empty_outputs": sum(not output for output in outputs),
            "tokenizer": None if tokenizer is None else tokenizer.description,
            "versions": versions(["rdkit", "nltk", "rouge-score", "tokenizers", "numpy"]),
        },
    )


def wordnet_is_there() -> bool:
    """Whether nltk finds WordNet's data; loads the indices, so that forked workers share them.

    nltk reads synsets from files that it keeps open. They are closed, for each worker to open its own: forked
    ones share one position in a file, and read each other's lines.
    """
    try:
        wordnet.ensure_loaded()
    except LookupError:
        return False
    while wordnet._data_file_map:
        wordnet._data_file_map.popitem()[1].close()
    return True


def _score_rows(
    references: Sequence[str],
    outputs: Sequence[str],
    tokenizer: CaptionTokenizer | None,
    *,
    meteor: bool,
    workers: int,
) -> list[_Row]:
    rows: list[_Row] = []
    # Tokens are made here: the tokenizer is no small thing to send to a worker.
    pairs = (_pair(*texts, tokenizer) for texts in zip(references, outputs, strict=True))
    with Progress("scoring captions", len(references), unit="rows") as progress:
        jobs = ((chunk, meteor) for chunk in chunked(pairs, _CHUNK))
        for part in ordered_map(_score_chunk, jobs, workers=workers):
            rows += part
            progress.update(len(part))
    return rows


def _pair(reference: str, output: str, tokenizer: CaptionTokenizer | None) -> _Pair:
    output = output.removeprefix(_START)
    if tokenizer is None:
        return _Pair(reference, output, None, None)
    return _Pair(reference, output, tokenizer.tokenize(reference), tokenizer.tokenize(output))


def _score_chunk(pairs: Sequence[_Pair], meteor: bool) -> list[_Row]:
    return [_score_pair(pair, meteor) for pair in pairs]


def _score_pair(pair: _Pair, meteor: bool) -> _Row:
    scores = _rouge_scorer().score(pair.reference, pair.output)
    rouge = [float(scores[name].fmeasure) for name in _ROUGE]
    if pair.reference_tokens is None or pair.output_tokens is None:
        return _Row(rouge, None, None)
    return _Row(
        rouge,
        bleu_counts(pair.reference_tokens, pair.output_tokens),
        float(meteor_score([pair.reference_tokens], pair.output_tokens)) if meteor else None,
    )


def _reasons(tokenizer: CaptionTokenizer | None) -> dict[str, str]:
    if tokenizer is None or tokenizer.is_scibert:
        return {}
    note = f"tokens of {tokenizer.description['name']}, not SciBERT: not comparable with published values"
    return dict.fromkeys(("bleu2", "bleu4", "meteor"), note)


@lru_cache(maxsize=1)
def _rouge_scorer() -> Any:
    return RougeScorer(list(_ROUGE))
