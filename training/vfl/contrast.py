"""The loss that an identity head learns by, and the figures that say how well it tells identities apart.

# N pictures, f_NE their embeddings, unit vectors; who [N] numbers of their identities
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def supcon(f_NE: Tensor, who: Tensor, temperature: float) -> Tensor:
    """Supervised contrastive loss (https://arxiv.org/abs/2004.11362, L_out), a scalar.

        ℓ_i = −1/|P(i)| Σ_{p∈P(i)} [ s_ip − log Σ_{a≠i} exp s_ia ],  s_ij = f_i·f_j/τ

    P(i) are the other pictures of i's identity. The mean is over the pictures that have any. Both sides of s_ij get
    gradients.
    """
    scores = f_NE @ f_NE.T / temperature
    itself = torch.eye(len(who), dtype=torch.bool, device=who.device)
    positive = (who[:, None] == who) & ~itself
    log_share = scores - scores.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)
    count = positive.sum(1)
    losses = -log_share.masked_fill(~positive, 0).sum(1)[count > 0] / count[count > 0]
    return losses.mean()


@dataclass(frozen=True)
class Compared:
    """The pictures of one batch, compared with each other.

    Attributes:
        same, other: float32, cosines of every pair of pictures of one identity and of two.
        hits: for each picture, whether the nearest other picture is of its identity.
        loss: of the batch.
    """

    same: Tensor
    other: Tensor
    hits: Tensor
    loss: float


@torch.no_grad()
def compare(f_NE: Tensor, who: Tensor, temperature: float) -> Compared:
    """Compare the pictures of a batch, on the CPU."""
    f_NE, who = f_NE.float().cpu(), who.cpu()
    cosines = (f_NE @ f_NE.T).clamp(-1, 1)
    equal = who[:, None] == who
    upper = torch.ones_like(equal).triu(1)
    nearest = cosines.clone().fill_diagonal_(-2).argmax(1)
    loss = supcon(f_NE, who, temperature).item()
    return Compared(cosines[equal & upper], cosines[~equal & upper], who[nearest] == who, loss)


def figures(parts: Sequence[Compared]) -> dict[str, float]:
    """The figures of a validation; every picture counts once.

    Returns:
        loss; same, same_median, other, other_median: cosines; gap: same − other; retrieval: share of the pictures whose
        nearest other picture in the batch is of the same identity; threshold: the cosine at which as large a share of
        the same is below as of the others above; error: that share.
    """
    same, other = torch.cat([part.same for part in parts]), torch.cat([part.other for part in parts])
    hits = torch.cat([part.hits for part in parts])
    loss = sum(part.loss * len(part.hits) for part in parts) / len(hits)
    threshold, error = equal_error(same, other)
    means = same.double().mean().item(), other.double().mean().item()
    return {
        "loss": loss,
        "same": means[0],
        "same_median": same.median().item(),
        "other": means[1],
        "other_median": other.median().item(),
        "gap": means[0] - means[1],
        "retrieval": hits.float().mean().item(),
        "threshold": threshold,
        "error": error,
    }


def equal_error(same: Tensor, other: Tensor) -> tuple[float, float]:
    """The threshold of cosines at which both kinds of error are equally frequent, and how frequent they are."""
    levels = torch.cat([same, other]).sort().values
    missed = torch.searchsorted(same.sort().values, levels) / len(same)
    taken = 1 - torch.searchsorted(other.sort().values, levels) / len(other)
    at = int((missed - taken).abs().argmin())
    return levels[at].item(), (missed[at] + taken[at]).item() / 2
