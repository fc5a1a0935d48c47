"""P×K batches for the trainer of the identity head: K pictures of each of P identities."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice

import numpy as np

from ..errors import UserError
from .draws import Draws
from .index import Index, Read, Sample
from .pictures import PictureError, read_picture


class Batches:
    """Batches of an index. An identity takes part if it has K pictures.

    Args:
        identities: P.
        pictures: K.
        near: from the number of an identity to those that are hard to tell from it. Half of a batch is then drawn from
            those of its first identity.

    Raises:
        UserError: fewer than P identities have K pictures.
    """

    def __init__(
        self, index: Index, identities: int, pictures: int, near: Callable[[int], Sequence[int]] | None = None
    ):
        self.index, self.identities, self.pictures, self.near = index, identities, pictures, near
        self.eligible = np.flatnonzero(index.counts >= pictures)
        if len(self.eligible) < identities:
            raise UserError(
                f"{len(self.eligible)} of the {len(index.counts)} identities have {pictures} pictures or more; "
                f"expected {identities}: ask for fewer identities or pictures in a batch"
            )

    def batch(self, seed: int, step: int, read: Read = read_picture) -> list[Sample]:
        """The P·K samples of a step, identity after identity: a pure function of the seed and the step.

        Identities are drawn uniformly, and so are the pictures of each; none comes twice.

        Raises:
            UserError: fewer than K pictures of an identity can be read.
            WeightsError: a shard cannot be read.
        """
        draws = Draws(seed, "batch", step)
        chosen = self._chosen(draws)
        return [sample for i in chosen for sample in self.index.pictures(i, draws, self.pictures, read)]

    def _chosen(self, draws: Draws) -> list[int]:
        order = (int(self.eligible[i]) for i in draws.shuffled(len(self.eligible)))
        chosen = [next(order)]
        if self.near:
            allowed = [i for i in self.near(chosen[0]) if i != chosen[0] and self.index.counts[i] >= self.pictures]
            chosen += [allowed[i] for i in islice(draws.shuffled(len(allowed)), self.identities // 2 - 1)]
        taken = set(chosen)
        return [*chosen, *islice((i for i in order if i not in taken), self.identities - len(chosen))]

    def sweep(self, read: Read = read_picture) -> Iterator[list[Sample]]:
        """Yield batches for validation, always the same, that show each picture at most once.

        An identity is shown K pictures at a time, while it has K more, and without those K of which one cannot be read.
        Batches have P identities at most, and two at least.

        Raises:
            WeightsError: a shard cannot be read.
        """
        skipped: list[str] = []
        for first in range(0, int(self.index.counts.max()), self.pictures):
            left = self.eligible[self.index.counts[self.eligible] >= first + self.pictures]
            for part in np.array_split(left, max(1, -(-len(left) // self.identities))):
                groups = [group for i in part.tolist() if (group := self._group(i, first, read, skipped))]
                if len(groups) > 1:
                    groups[0][0] = replace(groups[0][0], skipped=tuple(skipped))
                    skipped.clear()
                    yield [sample for group in groups for sample in group]

    def _group(self, identity: int, first: int, read: Read, skipped: list[str]) -> list[Sample]:
        """K pictures of an identity in the order in which they were packed; none if one of them cannot be read."""
        try:
            return [self.index.at(identity, first + i, read) for i in range(self.pictures)]
        except PictureError as error:
            skipped.append(str(error))
            return []
