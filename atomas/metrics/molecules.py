"""Generated molecules against their references, by the protocol of MolT5's evaluation scripts.

`bleu`           corpus BLEU-4 over characters of the SMILES as written
`exact`          share of rows whose InChI are equal (also where there is none on both sides, as for wildcard atoms;
                 the report counts these as `exact_without_inchi`)
`levenshtein`    mean edit distance of the SMILES as written
`validity_*`     share of outputs that RDKit parses (`_transl`: and whose reference it parses as well)
`maccs` `rdk` `morgan`  mean Tanimoto similarity over the rows whose molecules both parse
`fcd`            Fréchet ChemNet Distance of the sets of molecules, lower is better
`validity`       ours: RDKit parses it, and it has an atom and no white space

RDKit reads an empty string as a molecule without atoms: the scripts count an empty output as valid, with similarity
0 to everything, and so do `validity_transl` and `validity_fp`. `validity` counts it as the failure that it is.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import Levenshtein
from rdkit import Chem, DataStructs, rdBase
from rdkit.Chem import rdFingerprintGenerator, rdMolDescriptors

from atomas.data.molecules import is_molecule
from atomas.data.parallel import chunked, ordered_map
from atomas.data.progress import Progress
from atomas.metrics.bleu import bleu_counts, bleu_statistic
from atomas.metrics.chemnet import fcd_is_installed, fcd_score
from atomas.metrics.resampling import Bootstrap, mean_over
from atomas.metrics.scores import Score, Scores, measure, versions

METRICS = (
    "bleu", "exact", "levenshtein", "validity_transl", "validity_fp", "maccs", "rdk", "morgan", "fcd", "validity",
)  # fmt: skip
MORGAN_RADIUS = 2
_CHUNK = 64


class _Row(NamedTuple):
    bleu: list[int]
    levenshtein: int
    reference_parses: bool
    output_parses: bool
    valid: bool
    exact: bool
    has_inchi: bool
    similarities: tuple[float, float, float]
    reference_canonical: str
    output_canonical: str


def score_molecules(
    references: Sequence[str],
    outputs: Sequence[str],
    *,
    bootstrap: Bootstrap | None = None,
    workers: int = 1,
) -> Scores:
    """All molecule metrics of SMILES `outputs`, one for each of `references`, as written.

    Args:
        references, outputs: equally many, at least one; a missing output is "".
        bootstrap: how intervals are found (default: 1,000 resamples, 95 %, seed 0).
        workers: processes to fork; leave it at 1 in a process that uses CUDA.

    Raises:
        ValueError: not equally many, or none.
    """
    if len(references) != len(outputs) or not references:
        raise ValueError(f"{len(references)} references and {len(outputs)} outputs: equally many are wanted")
    rows = _score_rows(references, outputs, workers)
    parses = _column(rows, "output_parses") > 0
    both = parses & (_column(rows, "reference_parses") > 0)
    counts = np.array([row.bleu for row in rows], dtype=np.float64)
    similarities = np.array([row.similarities for row in rows])
    statistics = {
        "bleu": bleu_statistic(counts, 4),
        "exact": mean_over(_column(rows, "exact")),
        "levenshtein": mean_over(_column(rows, "levenshtein")),
        "validity_transl": mean_over(both.astype(np.float64)),
        "validity_fp": mean_over(parses.astype(np.float64)),
        "validity": mean_over(_column(rows, "valid")),
    }
    others = {"fcd": _fcd(rows)}
    for number, name in enumerate(("maccs", "rdk", "morgan")):
        if both.any():
            statistics[name] = mean_over(similarities[:, number], where=both)
        else:
            others[name] = Score(value=None, reason="no row whose output and reference RDKit parses")
    return measure(
        statistics,
        bootstrap or Bootstrap(),
        rows=len(rows),
        order=METRICS,
        others=others,
        details=_details(rows, outputs),
    )


def _score_rows(references: Sequence[str], outputs: Sequence[str], workers: int) -> list[_Row]:
    rows: list[_Row] = []
    pairs = chunked(zip(references, outputs, strict=True), _CHUNK)
    with Progress("scoring molecules", len(references), unit="rows") as progress:
        for part in ordered_map(_score_chunk, ((chunk,) for chunk in pairs), workers=workers):
            rows += part
            progress.update(len(part))
    return rows


def _score_chunk(pairs: Sequence[tuple[str, str]]) -> list[_Row]:
    with rdBase.BlockLogs():
        return [_score_row(reference, output) for reference, output in pairs]


def _score_row(reference: str, output: str) -> _Row:
    reference_mol, output_mol = Chem.MolFromSmiles(reference), Chem.MolFromSmiles(output)
    both = reference_mol is not None and output_mol is not None
    inchi = Chem.MolToInchi(reference_mol) if both else ""
    return _Row(
        bleu=bleu_counts(list(reference), list(output)),
        levenshtein=Levenshtein.distance(reference, output),
        reference_parses=reference_mol is not None,
        output_parses=output_mol is not None,
        valid=output_mol is not None and is_molecule(output),
        exact=both and Chem.MolToInchi(output_mol) == inchi,
        has_inchi=bool(inchi),
        similarities=_similarities(reference_mol, output_mol) if both else (0.0, 0.0, 0.0),
        reference_canonical="" if reference_mol is None else Chem.MolToSmiles(reference_mol),
        output_canonical="" if output_mol is None else Chem.MolToSmiles(output_mol),
    )


def _similarities(first: Chem.Mol, second: Chem.Mol) -> tuple[float, float, float]:
    """Tanimoto of MACCS keys, of RDKit's path fingerprint, and of Morgan counts (ECFP4)."""
    morgan = rdFingerprintGenerator.GetMorganGenerator(radius=MORGAN_RADIUS)
    fingerprints = (
        rdMolDescriptors.GetMACCSKeysFingerprint,
        Chem.RDKFingerprint,
        morgan.GetSparseCountFingerprint,
    )
    maccs, rdk, counts = (
        float(DataStructs.TanimotoSimilarity(fingerprint(first), fingerprint(second)))
        for fingerprint in fingerprints
    )
    return maccs, rdk, counts


def _fcd(rows: Sequence[_Row]) -> Score:
    return fcd_score(
        [row.reference_canonical for row in rows if row.reference_canonical],
        [row.output_canonical for row in rows if row.output_canonical],
    )


def _details(rows: Sequence[_Row], outputs: Sequence[str]) -> dict[str, Any]:
    packages = ["rdkit", "nltk", "rapidfuzz", "numpy", *(["fcd"] if fcd_is_installed() else [])]
    return {
        "empty_outputs": sum(not output for output in outputs),
        "invalid_references": sum(not row.reference_parses for row in rows),
        "exact_without_inchi": sum(row.exact and not row.has_inchi for row in rows),
        "versions": versions(packages),
    }


def _column(rows: Sequence[_Row], name: str) -> NDArray[np.float64]:
    return np.array([getattr(row, name) for row in rows], dtype=np.float64)
