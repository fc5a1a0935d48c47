"""What HunyuanVideo 1.5's image-to-video network is told besides the noisy clip, exactly as by diffusers' pipeline.

pipe = load_encoders("hunyuanvideo-community/HunyuanVideo-1.5-480p_i2v", "cuda", torch.bfloat16)
given = conditions([encode_text(pipe, prompt)], [encode_picture(pipe, picture)], "cuda", torch.bfloat16)
v = flow(transformer, given, x, sigma_i)

A text is kept without its padding, which the network masks; in a batch it is padded to the longest.

# B batch, c = 32 channels, t latent frames, h/w latent rows and columns; n tokens of text, m of glyphs, p of a picture
x_Bcthw, v_Bcthw scaled latents and their flow
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .path import timestep


class Text(NamedTuple):
    """The states of a prompt: Qwen2.5-VL's of its tokens [n, 3584], and ByT5's of what it has in quotes [m, 1472]."""

    states: Tensor
    glyphs: Tensor


class Picture(NamedTuple):
    """The states of a first frame: its scaled latent [32, 1, h, w], and SigLIP's [p, 1152]."""

    latent: Tensor
    states: Tensor


@dataclass(frozen=True)
class Conditions:
    """A batch of texts and pictures, of one size, in the dtype of the network."""

    latent: Tensor  # [B, 32, 1, h, w]
    picture: Tensor  # [B, p, 1152]
    text: Tensor  # [B, n, 3584]
    text_mask: Tensor  # [B, n], 1 for a token, 0 for padding
    glyphs: Tensor  # [B, m, 1472]
    glyph_mask: Tensor  # [B, m]

    def with_texts(self, texts: Sequence[Text]) -> Conditions:
        """The same pictures with other texts, as guidance needs them."""
        return replace(self, **_texts(texts, self.text.device, self.text.dtype))


@torch.no_grad()
def encode_text(pipe: Any, prompt: str) -> Text:
    """The states of a prompt. An empty one is what guidance is relative to."""
    states, mask, glyphs, glyph_mask = pipe.encode_prompt(prompt, pipe.text_encoder.device)
    return Text(states[0, mask[0].bool()], glyphs[0, glyph_mask[0].bool()])


@torch.no_grad()
def encode_picture(pipe: Any, picture_3HW: Tensor) -> Picture:
    """The states of a picture, uint8, that already has the height and width of its bucket."""
    image = Image.fromarray(picture_3HW.permute(1, 2, 0).contiguous().cpu().numpy())
    device = pipe.vae.device
    latent = pipe._get_image_latents(pipe.vae, pipe.video_processor, image, image.height, image.width, device)
    return Picture(latent[0], pipe.encode_image(image, 1, device, pipe.image_encoder.dtype)[0])


def conditions(
    texts: Sequence[Text], pictures: Sequence[Picture], device: str | torch.device, dtype: torch.dtype
) -> Conditions:
    """A batch. Its pictures have one size; its texts are padded to the longest."""
    latent, picture = (torch.stack(parts).to(device, dtype) for parts in zip(*pictures, strict=True))
    return Conditions(latent, picture, **_texts(texts, device, dtype))


def flow(transformer: Any, given: Conditions, x_Bcthw: Tensor, sigma_i: Tensor) -> Tensor:
    """The network's flow v_Bcthw at one noise level, or at one for each sample, in the dtype of the conditions."""
    x = x_Bcthw.to(given.latent.dtype)
    first = torch.zeros_like(x[:, :1])
    first[:, :, 0] = 1
    latent = torch.zeros_like(x)
    latent[:, :, :1] = given.latent
    return transformer(
        torch.cat([x, latent, first], dim=1),
        timestep=timestep(sigma_i, x.dtype).to(x.device).expand(len(x)),
        encoder_hidden_states=given.text,
        encoder_attention_mask=given.text_mask,
        encoder_hidden_states_2=given.glyphs,
        encoder_attention_mask_2=given.glyph_mask,
        image_embeds=given.picture,
        return_dict=False,
    )[0]


def guided(
    transformer: Any, given: Conditions, empty: Conditions, x_Bcthw: Tensor, sigma_i: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The flow, and the flow with classifier-free guidance.

    Args:
        empty: the conditions with empty texts.
        scale: of guidance; 1 has none, and needs one pass only.
    """
    v = flow(transformer, given, x_Bcthw, sigma_i)
    if scale == 1:
        return v, v
    without = flow(transformer, empty, x_Bcthw, sigma_i)
    return v, without + scale * (v - without)


def _texts(texts: Sequence[Text], device: str | torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    text, text_mask = _padded([text.states for text in texts], device, dtype)
    glyphs, glyph_mask = _padded([text.glyphs for text in texts], device, dtype)
    return {"text": text, "text_mask": text_mask, "glyphs": glyphs, "glyph_mask": glyph_mask}


def _padded(parts: list[Tensor], device: str | torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[B, most, width], and its mask, 1 where there are values. Of nothing, one row of padding."""
    masks = [torch.ones(max(1, len(part)), dtype=dtype) * bool(len(part)) for part in parts]
    parts = [
        part.to(device, dtype) if len(part) else part.new_zeros(1, part.shape[1]).to(device, dtype) for part in parts
    ]
    return pad_sequence(parts, batch_first=True), pad_sequence(masks, batch_first=True).to(device)
