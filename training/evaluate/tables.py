"""The results of an evaluation as tables of text. "figures", "share" and "lost" are keys of the results' JSON."""

from __future__ import annotations

from typing import Any

Table = list[list[str]]  # the first row is the head


def latent_table(result: dict[str, Any]) -> Table:
    """Errors of adapters, cycles and affine maps in latents."""
    rows = [["latents", "MSE", "of variance"]]
    return rows + [
        [name, f"{row['mse']:.4f}", f"{row['share']:.2%}"] for name, row in result["latent"]["figures"].items()
    ]


def pixel_table(result: dict[str, Any]) -> Table:
    """Quality of every decode in pixels."""
    columns = {"psnr": "PSNR dB", "ssim": "SSIM", "flicker": "flicker", "psnr_source": "PSNR source dB"}
    rows = [["pixels", *columns.values()]]
    for name, row in result["pixel"]["figures"].items():
        cells = [f"{row[key]:.4f}" if key == "ssim" else f"{row[key]:.2f}" if key in row else "" for key in columns]
        rows.append([name, *cells])
    return rows


def worst_table(result: dict[str, Any]) -> Table:
    """The clips with the largest errors in latents."""
    rows = [["latents of", "direction", "MSE", "of variance"]]
    for direction, clips in result["latent"]["worst"].items():
        rows += [[clip["clip"], direction, f"{clip['mse']:.4f}", f"{clip['share']:.2%}"] for clip in clips]
    return rows


def lost_table(result: dict[str, Any]) -> Table:
    """The clips whose decode loses most by an adapter."""
    rows = [["pixels of", "PSNR lost by the adapter"]]
    return rows + [[clip["clip"], f"{clip['lost']:.2f} dB"] for clip in result["pixel"]["worst"]]


def markdown(table: Table) -> list[str]:
    """The lines of a table in Markdown."""
    head, *rows = ("| " + " | ".join(row) + " |" for row in table)
    return [head, "|" + "---|" * len(table[0]), *rows]


def plain_text(result: dict[str, Any]) -> str:
    """The errors in latents and the quality in pixels, for a terminal."""
    latent = result["latent"]
    lines = [f"Latents, {latent['pairs']} pairs", f"  {'':<20}{'MSE':>10}{'of variance':>14}"]
    for name, row in latent["figures"].items():
        lines.append(f"  {name:<20}{row['mse']:>10.4f}{row['share']:>13.2%} ")
    if "pixel" in result:
        pixel = result["pixel"]
        lines += [
            "",
            f"Pixels, {pixel['clips']} clips (source: against what the source VAE decodes from the same latent)",
            f"  {'':<20}{'PSNR':>10}{'SSIM':>9}{'flicker':>9}{'PSNR source':>13}",
        ]
        for name, row in pixel["figures"].items():
            source = f"{row['psnr_source']:>13.2f}" if "psnr_source" in row else f"{'':>13}"
            lines.append(f"  {name:<20}{row['psnr']:>10.2f}{row['ssim']:>9.4f}{row['flicker']:>9.2f}{source}".rstrip())
    return "\n".join(lines) + "\n"
