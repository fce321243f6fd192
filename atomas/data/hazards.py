"""What can be wrong with a pair of real data, under the names that the index counts it by."""

import re

LONG_SMILES = 512
"""Characters; about as many T5 tokens, and the length at which published models cut."""

LONG_TEXT = 2048
"""Characters; about 512 T5 tokens of English."""

SHORT_SMILES = 3
"""Characters; a SMILES below it has fewer tokens than the k = 3 of the density estimate."""

NOT_IN_T5 = frozenset("\\{}~<^`")
"""Characters that T5's vocabulary lacks: `\\` carries half of the double-bond stereo."""

OUTSIDE_T5 = re.compile(f"[{re.escape(''.join(sorted(NOT_IN_T5)))}]")
"""Finds the first of them."""

HAZARDS = {
    # rows that are left out
    "malformed_row": "left out: wrong number of fields, bad JSON, not UTF-8",
    "missing_value": "left out: no SMILES or no text",
    "invalid_molecule": "left out: RDKit refuses the molecule",
    "leakage": "left out: molecule of an excluded corpus",
    "deduplicated": "left out: molecule, text or pair of an earlier row (--deduplicate)",
    # rows that were repaired
    "doubled_backslash": r"SMILES with \\ for \ (unescaped)",
    "mojibake": "text held UTF-8 read as Latin-1 or Windows-1252 (repaired)",
    "phrase_set": "text is a Python set of phrases (joined by '; ')",
    # rows that are kept as they are
    "skeleton_leakage": "same skeleton as an excluded molecule, other stereo, isotopes or protonation",
    "duplicate_molecule": "molecule occurs in more than one row of its split",
    "duplicate_text": "text occurs in more than one row of its split",
    "duplicate_pair": "same molecule and same text as another row of its split",
    "not_canonical": "SMILES is not RDKit's canonical form",
    "multi_component": "more than one component",
    "wildcard_atom": "holds the wildcard atom *",
    "no_heavy_atom": "no atom heavier than hydrogen",
    "single_atom": "exactly one heavy atom",
    "no_inchikey": "no InChIKey; a hash of the canonical SMILES stands for it",
    "short_smiles": f"SMILES of fewer than {SHORT_SMILES} characters",
    "long_smiles": f"SMILES of more than {LONG_SMILES} characters",
    "long_text": f"text of more than {LONG_TEXT} characters",
    "smiles_outside_t5": "SMILES with a character that T5's vocabulary lacks",
    "text_outside_t5": "text with a character that T5's vocabulary lacks",
    "odd_quotes": 'text with an odd number of "',
    "non_ascii_text": "text with characters beyond ASCII",
    "lost_character": "text with U+FFFD or a control character (the original is lost)",
    "markup": "text with an HTML entity or tag",
}
"""Name -> what it means, in the order of reports. Counts are rows."""
