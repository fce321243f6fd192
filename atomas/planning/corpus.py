"""Token lengths of a corpus, as a run with the same configuration would measure them."""

import tempfile
from pathlib import Path

import numpy as np

from atomas.config import Config
from atomas.data.lengths import LONGEST, TokenLengths
from atomas.data.shards import Corpus
from atomas.data.tokenizer import resolve_tokenizer
from atomas.data.tokens import open_tokens, token_lengths
from atomas.planning.workload import PairLengths


def measured_lengths(directory: str, config: Config) -> PairLengths:
    """Lengths of all usable pairs of the training split, long texts cut.

    Raises AtomasError if corpus or tokenizer cannot be read, or nothing is usable.
    """
    corpus, split = Corpus.open(directory, config.storage), config.data.train_split
    with tempfile.TemporaryDirectory() as cache:
        tokenizer = resolve_tokenizer(config.tokenizer, corpus, Path(cache), split=split)
        tokens = open_tokens(corpus, tokenizer) if config.data.tokens == "use" else None
        if tokens is not None:
            lengths = token_lengths(tokens, split)
        else:
            lengths = TokenLengths.measure(corpus.split(split), tokenizer)
    return usable_lengths(lengths, config)


def usable_lengths(lengths: TokenLengths, config: Config) -> PairLengths:
    """What the model sees of measured lengths: too long SMILES are left out, too long texts cut."""
    data = config.data
    usable = lengths.smiles <= data.max_smiles_tokens
    return PairLengths(
        text=np.minimum(lengths.text[usable], min(data.max_text_tokens, LONGEST)).astype(np.int64),
        smiles=lengths.smiles[usable].astype(np.int64),
    )
