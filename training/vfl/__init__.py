"""LoRAs for HunyuanVideo 1.5 image-to-video, trained on still images; needs requirements-vfl.txt."""
