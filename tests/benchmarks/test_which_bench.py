"""The bench of Inspect Latent's guesses gives latents the statistics that it says, and counts errors as it says."""

import torch

from kvae_comfyui.benchmarks import which
from kvae_comfyui.serving.likely_space import candidates


def test_stand_ins_have_the_statistics_of_what_they_stand_for():
    latents = {
        kind: torch.randn(8, 16, 3, 6, 8) * torch.linspace(0.5, 3, 16).view(-1, 1, 1, 1) for kind in ("clips", "crops")
    }
    cases = {(case.truth, case.kind): case.z_BCthw for case in which.stand_ins("any", latents)}
    assert {truth for truth, _ in cases} == {str(each) for each in candidates(16)}
    for each in candidates(16):
        z = cases[str(each), "clips"]
        if each.mean:
            torch.testing.assert_close(z.mean((0, 2, 3, 4)), torch.tensor(each.mean), atol=1e-4, rtol=0)
            torch.testing.assert_close(z.std((0, 2, 3, 4)), torch.tensor(each.std), atol=1e-4, rtol=1e-4)
        elif each.level:
            torch.testing.assert_close(z.square().mean().sqrt().item(), each.level)
        else:
            assert torch.equal(z, latents["clips"])


def test_errors_are_counted_by_the_odds_that_were_stated():
    known, other = (which.Case(truth, "clips", "any", torch.zeros(2)) for truth in ("raw Wan 2.1", "another VAE"))
    guesses = [
        (known, ["raw Wan 2.1", "raw Mochi"], torch.tensor([0.97, 0.96])),
        (other, ["raw Mochi"], torch.tensor([0.3])),
    ]
    *_, first, _, _, _, _, _, row, _ = which._by_odds(guesses)
    assert row == "| 95 to 99 % | 2 | 50.0 % | 0 |  |"
    assert first == "| 0 to 50 % | 0 |  | 1 | 100.0 % |"
