"""The manifest of a checkpoint: size and SHA-256 of every file, and their verification."""

from __future__ import annotations

import hashlib
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gspo_megatron import __version__
from gspo_megatron.base.errors import CheckpointError
from gspo_megatron.base.files import read_regular, sync
from gspo_megatron.checkpoint.names import position_of

MANIFEST = "manifest.json"


FORMAT = 2
"""2: the tokens and columns of a step are tensors; in 1 they were text in run.json."""
READABLE = (1, 2)


CHUNK_BYTES = 4 << 20


THREADS = min(8, os.cpu_count() or 1)
"""Files are hashed in parallel: hashlib releases the GIL."""


def verify(path: Path) -> None:
    """Reads every byte of a checkpoint and checks it against the manifest.

    Raises:
        CheckpointError: names the first wrong file and what is wrong with it: missing, not in the manifest, wrong size,
            wrong contents, unreadable; or the manifest itself.
    """
    files = _verify_listing(path)["files"]
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda name: _verify_contents(path, name, files[name]["sha256"]), files))


def _sizes(path: Path) -> dict[str, int]:
    """Size of everything under `path` by relative name, except directories and the manifest.

    Raises:
        OSError: something there is neither a file nor a directory.
    """
    files = [p for p in path.rglob("*") if not p.is_dir()]
    if others := [p.name for p in files if p.exists() and not p.is_file()]:
        raise OSError(f"{others[0]} is not a regular file")
    found = {p.relative_to(path).as_posix(): p.lstat().st_size for p in files}
    return {name: found[name] for name in sorted(found) if name != MANIFEST}


def seal(path: Path, number: int) -> None:
    """Writes the manifest of a checkpoint's files and waits until everything is on the disk."""
    sizes = _sizes(path)
    with ThreadPoolExecutor(THREADS) as pool:
        digests = list(pool.map(_sha256, [path / name for name in sizes]))
        list(pool.map(sync, [path / name for name in sizes]))
    files = {name: {"bytes": sizes[name], "sha256": digest} for name, digest in zip(sizes, digests, strict=True)}
    write_synced(
        path / MANIFEST,
        _render({"format": FORMAT, "written_by": __version__, "name": path.stem, "number": number, "files": files}),
    )
    for directory in [*(p for p in path.rglob("*") if p.is_dir()), path]:
        sync(directory)


def _render(manifest: dict[str, Any]) -> bytes:
    """The manifest's canonical text, with the SHA-256 of the content among its keys."""
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**manifest, "sha256": digest}, indent=1, sort_keys=True) + "\n").encode()


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a checkpoint: the directory does not exist")
    try:
        text = read_regular(path / MANIFEST)
        manifest = json.loads(text)
        del manifest["sha256"]
        whole = _render(manifest) == text
    except FileNotFoundError:
        raise CheckpointError(f"{path}: {MANIFEST} is missing, so the checkpoint is incomplete or not one") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {MANIFEST} cannot be read ({error})") from error
    except (ValueError, TypeError, KeyError):
        whole = False
    if not whole:
        raise CheckpointError(f"{path}: {MANIFEST} is damaged or was edited")
    if manifest["format"] not in READABLE:
        raise CheckpointError(
            f"{path}: {MANIFEST} has format {manifest['format']}, written by gspo_megatron "
            f"{manifest.get('written_by', 'of another version')}; version {__version__} reads formats "
            f"{' and '.join(map(str, READABLE))}. Use the version that wrote it"
        )
    return manifest


def _verify_listing(path: Path) -> dict[str, Any]:
    """The manifest, once names and sizes have been checked against it.

    Raises:
        CheckpointError: as in `verify`.
    """
    manifest = _read_manifest(path)
    # A copy may have any name except that of another position.
    if position_of(path.stem) and path.stem != manifest["name"]:
        raise CheckpointError(f"{path}: {MANIFEST} belongs to {manifest['name']}")
    try:
        files, found = manifest["files"], _sizes(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from error
    for name in sorted({*files, *found}):
        if name not in found:
            raise CheckpointError(f"{path}: {name} is missing")
        if name not in files:
            raise CheckpointError(f"{path}: {name} does not belong here: it is not in {MANIFEST}")
        if found[name] != files[name]["bytes"]:
            raise CheckpointError(f"{path}: {name} has {found[name]} bytes, but {files[name]['bytes']} were written")
    return manifest


def _verify_contents(path: Path, name: str, written: str) -> None:
    try:
        found = _sha256(path / name)
    except OSError as error:
        raise CheckpointError(f"{path}: {name} cannot be read ({error})") from error
    if found != written:
        raise CheckpointError(
            f"{path}: {name} is damaged: its contents changed (SHA-256 {found[:12]}..., not {written[:12]}...)"
        )


def looks_intact(path: Path) -> bool:
    try:
        return bool(_verify_listing(path))
    except CheckpointError:
        return False


def number_of(path: Path) -> float:
    try:
        return float(_read_manifest(path)["number"])
    except CheckpointError:
        return math.inf


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def write_synced(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    sync(path)
