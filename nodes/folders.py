"""Where the nodes write."""

from pathlib import Path

import folder_paths

from ..svdq_core.errors import SVDQuantError


def models_folder() -> str:
    """``models/diffusion_models``; the host lists its older name, ``unet``, before it."""
    folders = folder_paths.get_folder_paths("diffusion_models")
    return next((folder for folder in folders if Path(folder).name == "diffusion_models"), folders[0])


def output_path(folder: str, file_name: str) -> Path:
    """The file a user names, inside ``folder`` whatever the name says.

    Raises:
        SVDQuantError: the name is empty or leads out of the folder.
    """
    name = file_name.strip().removesuffix(".safetensors")
    root = Path(folder).resolve()
    path = root if not name or "\0" in name else (root / f"{name}.safetensors").resolve()
    if path == root or not path.is_relative_to(root):
        raise SVDQuantError(f"file_name {file_name!r} does not name a file inside {folder}")
    return path
