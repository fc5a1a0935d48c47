"""The two published adapters, between HunyuanVideo and KVAE-3D-1.0: their names, directions, hashes and addresses.

They have no metadata, so the name tells the direction. They are for trying a pipeline, not for pictures: see REACHED.
"""

from __future__ import annotations

PUBLISHED_FILES = {  # name: (source space, target space)
    "adapter_hunyuan_to_kvae3d.safetensors": ("hunyuan_video", "kvae_3d_1.0"),
    "adapter_kvae3d_to_hunyuan.safetensors": ("kvae_3d_1.0", "hunyuan_video"),
}
SIZE = 11_736  # bytes of either
SHA256 = {
    "adapter_hunyuan_to_kvae3d.safetensors": "64e140d5ac868bb6882a0d4fe60e378a8eb27e56307d1c782f1ec5d6417ac707",
    "adapter_kvae3d_to_hunyuan.safetensors": "9873837aed9f6bde461e6f1348a5994cfb7129439708d83d8b7960e4f2afbe4f",
}
# PSNR in dB on UCF101's validation clips, 33 frames of 240x320, as published
REACHED = {"adapter_hunyuan_to_kvae3d.safetensors": 18.9, "adapter_kvae3d_to_hunyuan.safetensors": 20.5}
VAES_REACH = "31 to 32"  # the two VAEs alone, on the same clips
COMMIT = "f41078324489c63f2b42beb97dd23c0e9a246804"
FOLDER = f"https://raw.githubusercontent.com/ferrex-aurakvena/kvae_to_hvae_2025/{COMMIT}"


def published_address(name: str) -> str:
    """The address from which a browser downloads a published adapter."""
    return f"{FOLDER}/{name}"
