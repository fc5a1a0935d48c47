"""Video-Free LoRA: a LoRA for HunyuanVideo 1.5 image-to-video that keeps a character's identity, from still images."""
