"""P×K batches for the trainer of the identity head: K pictures of each of P identities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
                f"expected {identities}: ask for fewer by --identities or --pictures"
            )

    def batch(self, seed: int, step: int, read: Read = read_picture, share: slice = slice(None)) -> list[Sample]:
        """The P·K samples of a step, identity after identity: a pure function of the seed and the step.

        Identities are drawn uniformly, and so are the pictures of each; none comes twice.

        Args:
            share: of the identities, those whose pictures are read, and returned.

        Raises:
            UserError: fewer than K pictures of an identity can be read.
            WeightsError: a shard cannot be read.
        """
        return [
            sample
            for i in self.chosen(seed, step)[share]
            for sample in self.index.pictures(i, Draws(seed, "batch", step, i), self.pictures, read)
        ]

    def chosen(self, seed: int, step: int) -> list[int]:
        """The P identities of a step."""
        return self._chosen(Draws(seed, "batch", step))

    def _chosen(self, draws: Draws) -> list[int]:
        order = (int(self.eligible[i]) for i in draws.shuffled(len(self.eligible)))
        chosen = [next(order)]
        if self.near:
            allowed = [i for i in self.near(chosen[0]) if i != chosen[0] and self.index.counts[i] >= self.pictures]
            chosen += [allowed[i] for i in islice(draws.shuffled(len(allowed)), self.identities // 2 - 1)]
        taken = set(chosen)
        return [*chosen, *islice((i for i in order if i not in taken), self.identities - len(chosen))]

    def sweeps(self) -> list[tuple[int, list[int]]]:
        """The batches of a validation, always the same, which show each picture at most once.

        Returns:
            for each batch a number n, and identities, two to P: their pictures n to n + K − 1 are in it.
        """
        found = []
        for first in range(0, int(self.index.counts.max()) - self.pictures + 1, self.pictures):
            left = self.eligible[self.index.counts[self.eligible] >= first + self.pictures]
            parts = np.array_split(left, max(1, -(-len(left) // self.identities)))
            found += [(first, part.tolist()) for part in parts if len(part) > 1]
        return found

    def swept(self, batch: tuple[int, list[int]], read: Read = read_picture) -> tuple[list[Sample], list[str]]:
        """The samples of one of `sweeps`, identity after identity, and the pictures that cannot be read.

        An identity is left out if one of its K pictures cannot be read.

        Raises:
            WeightsError: a shard cannot be read.
        """
        skipped: list[str] = []
        first, identities = batch
        return [sample for i in identities for sample in self._group(i, first, read, skipped)], skipped

    def _group(self, identity: int, first: int, read: Read, skipped: list[str]) -> list[Sample]:
        """K pictures of an identity in the order in which they were packed; none if one of them cannot be read."""
        try:
            return [self.index.at(identity, first + i, read) for i in range(self.pictures)]
        except PictureError as error:
            skipped.append(str(error))
            return []
