"""A private ComfyUI server on loopback, and a queue of prompts for it. Standard library only."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

START_SECONDS = 240
RUN_SECONDS = 300


class Server:
    """ComfyUI with the given base directory, as a context manager. It signals only its own process.

    Args:
        device: the option that chooses the device: --cpu, or --lowvram, --novram … on a GPU; empty: ComfyUI's choice.
    """

    def __init__(self, comfyui: Path, base: Path, device: str = "--cpu"):
        self.comfyui, self.base, self.device = comfyui, base, device
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    def __enter__(self) -> Server:
        command = [sys.executable, str(self.comfyui / "main.py"), *self.device.split(), "--listen", "127.0.0.1"]
        command += ["--port", str(self.port), "--base-directory", str(self.base)]
        command += ["--temp-directory", str(self.base), "--user-directory", str(self.base / "user")]
        command += ["--database-url", f"sqlite:///{self.base / 'user' / 'comfyui.db'}"]
        command += ["--disable-auto-launch", "--disable-api-nodes"]
        env = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        self.log = (self.base / "server.log").open("wb")
        self.process = subprocess.Popen(command, cwd=self.base, env=env, stdout=self.log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                self.get("/system_stats")
                return self
            except OSError:
                time.sleep(0.5)
        self.__exit__()
        raise RuntimeError(f"the server did not start:\n{self.log_text()[-3000:]}")

    def __exit__(self, *_) -> None:
        for stop in (signal.SIGINT, signal.SIGKILL):
            if self.process.poll() is None:
                self.process.send_signal(stop)
                try:
                    self.process.wait(15)
                except subprocess.TimeoutExpired:
                    continue
        self.log.close()

    def get(self, path: str):
        """JSON answer to a GET."""
        return self._send(urllib.request.Request(self._url(path)))

    def content(self, path: str) -> bytes:
        """Body of the answer to a GET."""
        with self._open(urllib.request.Request(self._url(path))) as answer:
            return answer.read()

    def post(self, path: str, data: dict):
        """JSON answer to a POST, also if the status is 400."""
        request = urllib.request.Request(self._url(path), json.dumps(data).encode())
        request.add_header("Content-Type", "application/json")
        try:
            return self._send(request)
        except urllib.error.HTTPError as error:
            return json.loads(error.read())

    def start(self, prompt: dict) -> str:
        """Queue a prompt in API format; returns its id.

        Raises:
            AssertionError: the server refuses the prompt or a part of it.
        """
        answer = self.post("/prompt", {"prompt": prompt})
        assert "prompt_id" in answer and not answer["node_errors"], json.dumps(answer, indent=1)
        return answer["prompt_id"]

    def wait(self, prompt_id: str) -> dict:
        """Wait for a prompt to end; returns its history, with `status` and `outputs`."""
        deadline = time.monotonic() + RUN_SECONDS
        while time.monotonic() < deadline:
            history = self.get(f"/history/{prompt_id}")
            if prompt_id in history and history[prompt_id]["status"]:
                return history[prompt_id]
            time.sleep(0.3)
        raise AssertionError(f"no end after {RUN_SECONDS} s:\n{self.log_text()[-3000:]}")

    def log_text(self) -> str:
        """The log of the server."""
        return (self.base / "server.log").read_text(errors="replace")

    def _url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def _open(self, request: urllib.request.Request):
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        return opener.open(request, timeout=60)

    def _send(self, request: urllib.request.Request):
        with self._open(request) as answer:
            body = answer.read()
        return json.loads(body) if body else None
