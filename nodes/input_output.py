"""Paths in ComfyUI's input, output and temp folders: latent files to read, and the next file to write."""

from __future__ import annotations

import os

import folder_paths
from comfy_api.latest import io, ui

from ..kvae import WeightsError
from ..kvae.paths import file_errors

MOST_NAME = 200  # bytes of a name: with a number and an ending it stays within the 255 of file systems


def latent_path(file: object) -> str:
    """The path of a latent file in ComfyUI's input, output or temp folder.

    Raises:
        WeightsError: there is no such file there. The message does not tell whether it exists elsewhere.
    """
    missing = f"{str(file)[:200]}: no such latent file. Put it into ComfyUI's input folder and press R."
    if not isinstance(file, str):
        raise WeightsError(missing)
    name, folder = folder_paths.annotated_filepath(file)
    folder = os.path.realpath(folder or folder_paths.get_input_directory())
    try:
        path = os.path.realpath(os.path.join(folder, name))
        inside = os.path.commonpath([os.path.normcase(folder), os.path.normcase(path)]) == os.path.normcase(folder)
        if inside and os.path.isfile(path):
            return path
    except ValueError:  # a NUL in the name, or another drive
        pass
    raise WeightsError(missing)


def has_latent(name: str) -> bool:
    """Whether `latent_path` finds the file."""
    try:
        latent_path(name)
    except WeightsError:
        return False
    return True


def output_path(prefix: object, ending: str, width: int = 0, height: int = 0) -> tuple[str, str, str]:
    """(path, file, subfolder) of the next file with that prefix in ComfyUI's output folder.

    Args:
        width, height: in pixels, for %width% and %height% in the prefix.

    Raises:
        WeightsError: the prefix does not make a file name, or its folder cannot be made.
    """
    if not isinstance(prefix, str):
        raise WeightsError(f"filename_prefix is a {type(prefix).__name__}; expected text")
    with file_errors(prefix):
        if any(len(os.fsencode(part)) > MOST_NAME for part in prefix.replace("\\", "/").split("/")):
            raise WeightsError(
                f"filename_prefix: {prefix[:40]}… has a part of over {MOST_NAME} bytes; choose a shorter one"
            )
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            prefix, folder_paths.get_output_directory(), width, height
        )
    file = f"{name}_{counter:05}_{ending}"
    return os.path.join(folder, file), file, subfolder


def saved_result(path: str) -> ui.SavedResult:
    """A file in ComfyUI's output folder, for the page."""
    folder, file = os.path.split(os.path.relpath(path, folder_paths.get_output_directory()))
    return ui.SavedResult(file, folder, io.FolderType.output)
