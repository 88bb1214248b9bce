"""Data sets of the Hugging Face hub, or of a folder, through the package `datasets`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gspo_megatron.base.errors import DataError, shortened
from gspo_megatron.data.cache import Cache
from gspo_megatron.data.optional import needed
from gspo_megatron.data.rows import Record

SPLITS = {"train": "train", "eval": "test"}
"""The split that is read where none is named."""


class HubRows:
    """`NAME`, `NAME:CONFIG` or `NAME:CONFIG:SPLIT`; CONFIG may be empty. NAME is a repository of the hub, a folder
    that `save_to_disk` wrote, or any folder that `load_dataset` takes.

    Processes of a node load one after the other: `datasets` prepares files in its own cache, once.

    Raises:
        ConfigError: `datasets` is not installed.
        DataError: there is no such data set, config or split.
    """

    def __init__(self, spec: str, split: str, cache: Cache) -> None:
        datasets = needed("datasets", "a data set of the Hugging Face hub")
        self.spec = spec
        name, _, rest = spec.partition(":")
        config, _, asked = rest.partition(":")
        try:
            with cache.locked(f"hub-{Path(name).name}"):
                self._rows = _loaded(datasets, name, config or None, asked or SPLITS[split])
        except DataError:
            raise
        except Exception as error:  # of the package, of what it calls, and of the network
            raise DataError(
                f"hf:{spec} cannot be loaded ({type(error).__name__}: {shortened(str(error))}); expected "
                "hf:NAME[:CONFIG[:SPLIT]], the name of a data set on the hub or a folder. A node without network "
                "needs it in the cache of `datasets`: load it once where there is one"
            ) from error
        self.identity: dict[str, Any] = {"fingerprint": self._rows._fingerprint}
        self.num_bytes = int(self._rows.data.nbytes)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record | None:
        return dict(self._rows[index])

    def place(self, index: int) -> str:
        return f"hf:{self.spec}, row {index + 1}"


def _loaded(datasets: Any, name: str, config: str | None, split: str) -> Any:
    folder = Path(name).expanduser()
    if not any((folder / file).is_file() for file in ("state.json", "dataset_dict.json")):
        return datasets.load_dataset(str(folder) if folder.is_dir() else name, config, split=split)
    found = datasets.load_from_disk(str(folder))
    if isinstance(found, datasets.Dataset):
        return found
    if split not in found:
        raise DataError(f"hf:{name} has no split {split!r}; it has {', '.join(found)}: write hf:{name}::SPLIT")
    return found[split]
