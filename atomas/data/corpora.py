"""The corpora that a run reads together, and the weights by which they are mixed."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from atomas.config import Config
from atomas.data.shards import Corpus, ShardedSplit


@dataclass(frozen=True, kw_only=True)
class Corpora:
    """One corpus or several, in the order of the configuration."""

    members: tuple[Corpus, ...]
    shares: tuple[float, ...] | None = None
    """Of the positions of the stream, up to a factor; None: see `mixing_weights`"""

    @staticmethod
    def open(config: Config) -> "Corpora":
        """Open what `data.corpus` names; AtomasError where one cannot be read."""
        given = config.data.corpora
        members = tuple(Corpus.open(location, config.storage) for location in given)
        shares = tuple(share for share in given.values() if share is not None)
        return Corpora(members=members, shares=shares or None)

    @staticmethod
    def of(corpus: Corpus) -> "Corpora":
        """One corpus."""
        return Corpora(members=(corpus,))

    @property
    def fingerprint(self) -> str:
        """Equal means equal records in equal order, mixed by equal weights."""
        if len(self.members) == 1:
            return self.members[0].fingerprint
        weights = self.mixing_weights([1] * len(self.members))
        parts = [
            f"{member.fingerprint} {weight}" for member, weight in zip(self.members, weights, strict=True)
        ]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def mixing_weights(self, num_usable: Sequence[int]) -> list[float]:
        """How often each corpus is drawn, up to a factor: by its share, or else by its usable pairs.

        Without shares a pair comes as often as every other: once an epoch. Where the build gave the files of a corpus
        weights, its pairs come so many times as often, on average over its files.
        """
        if self.shares is not None:
            return list(self.shares)
        return [
            count * _weight_of_pairs(member) for count, member in zip(num_usable, self.members, strict=True)
        ]

    def parts(self, name: str) -> list[ShardedSplit]:
        """The split called `name` of every corpus; AtomasError where one lacks it."""
        return [member.split(name) for member in self.members]

    def first_with(self, name: str) -> ShardedSplit:
        """The split called `name` of the first corpus that has one."""
        for member in self.members:
            if name in member.splits:
                return member.split(name)
        return self.members[0].split(name)


def _weight_of_pairs(corpus: Corpus) -> float:
    """The mean of what the build wrote down for its files, by the pairs of each."""
    known = [
        (
            float(source["weight"]),
            source.get("rows", 1)
            - sum(source.get(gone, 0) for gone in ("rejected", "excluded", "deduplicated")),
        )
        for source in corpus.index.get("sources", [])
        if source.get("weight") is not None
    ]
    pairs = sum(count for _, count in known)
    return sum(weight * count for weight, count in known) / pairs if pairs > 0 else 1.0
