"""A world of moving sprites in which it is known what a Video-Free LoRA should learn."""
