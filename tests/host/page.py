"""What a page sees of a prompt that it queues: the messages of the server's socket."""

from __future__ import annotations

import asyncio
import io
import json
import struct
from collections.abc import Callable
from uuid import uuid4

from PIL import Image

from kvae_comfyui.benchmarks.comfy_server import RUN_SECONDS, Server

TEXT, PICTURE = 3, 4  # kinds of binary messages


class Page:
    """Queue a prompt as a page does, and watch it to its end.

    Args:
        cancel_when: asked after each message; when it is true, Cancel is pressed.

    Attributes:
        bar: (node, value, most) of each step of a progress bar.
        pictures: (node, picture) of each preview.
        texts: (node, text) of each text on a node.
        executed: the outputs of each node that was executed.
        history: what the server keeps of the prompt.
    """

    def __init__(self, server: Server, prompt: dict, cancel_when: Callable[[Page], bool] = lambda page: False):
        self.bar: list[tuple[str, float, float]] = []
        self.pictures: list[tuple[str, Image.Image]] = []
        self.texts: list[tuple[str, str]] = []
        self.executed: dict[str, dict] = {}
        self.cancel_when = cancel_when
        self.history = asyncio.run(asyncio.wait_for(self._watch(server, prompt), RUN_SECONDS))

    @property
    def kinds(self) -> list[str]:
        """The kinds of the events of the prompt, such as execution_interrupted."""
        return [kind for kind, _ in self.history["status"]["messages"]]

    async def _watch(self, server: Server, prompt: dict) -> dict:
        import aiohttp  # ComfyUI's; without a ComfyUI this file must be importable all the same

        client, cancelled = uuid4().hex, False
        address = f"ws://127.0.0.1:{server.port}/ws?clientId={client}"
        async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as socket:
            await socket.send_json({"type": "feature_flags", "data": {"supports_preview_metadata": True}})
            queued = server.post("/prompt", {"prompt": prompt, "client_id": client})
            assert "prompt_id" in queued, queued
            async for message in socket:
                kind = self._take(message.data)
                if not cancelled and self.cancel_when(self):
                    cancelled = True
                    server.post("/interrupt", {})
                if kind in ("execution_success", "execution_error", "execution_interrupted"):
                    break
        return await asyncio.to_thread(server.wait, queued["prompt_id"])

    def _take(self, data: str | bytes) -> str:
        """Note what a message tells; return the kind of its event."""
        if isinstance(data, bytes):
            (kind, length), rest = struct.unpack(">II", data[:8]), data[8:]
            if kind == TEXT:
                self.texts.append((rest[:length].decode(), rest[length:].decode()))
            elif kind == PICTURE:
                picture = Image.open(io.BytesIO(rest[length:]))
                self.pictures.append((json.loads(rest[:length])["node_id"], picture))
            return ""
        event = json.loads(data)
        if event["type"] == "progress":
            self.bar.append(tuple(event["data"][key] for key in ("node", "value", "max")))
        if event["type"] == "executed":
            self.executed[event["data"]["node"]] = event["data"]["output"]
        return event["type"]
