"""A folder of safetensors files: the usual form of a model on the Hugging Face Hub."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxq.errors import BadInputError
from mlxq.files import FileState, states_of
from mlxq.headers import StoredTensor, read_file_header, read_json
from mlxq.sources.belongings import LINK, OPENED, TEMPLATES, check_stays, left_behind, stays, travels
from mlxq.sources.card import SourceCard, card_in
from mlxq.sources.config_shape import check_config
from mlxq.sources.quantization import Quantization, believed, stated_quantization
from mlxq.sources.unchanged import files_of
from mlxq.tensors import TensorSpec

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from mlxq.sources.remote import HubModel, Scratch


def pread_exactly(descriptor: int, nbytes: int, offset: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Read ``nbytes`` at ``offset`` into a fresh buffer; short reads are retried, an early end is an error."""
    import numpy as np

    buffer = np.empty(nbytes, dtype=np.uint8)
    view = memoryview(buffer.data)
    done = 0
    while done < nbytes:
        # A single read is capped near 2 GiB by the kernel.
        count = os.preadv(descriptor, [view[done : done + (1 << 30)]], offset + done)
        if count == 0:
            raise BadInputError("a weight file became shorter while it was being read")
        done += count
    return buffer


_NUMPY_DTYPES = {
    "BOOL": "uint8",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "uint8",
    "F8_E4M3": "uint8",
    "F8_E8M0": "uint8",
    "U16": "uint16",
    "I16": "int16",
    "F16": "float16",
    "BF16": "uint16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
}


@dataclass(frozen=True)
class SafetensorsFolder:
    """A model folder, satisfying ``ModelSource``.

    ``scratch`` keeps a temporary ``folder`` of mlxq's own links in place; ``not_taken`` is what of its repository is
    not in it, and why.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    stored: Mapping[str, StoredTensor]
    base_model: str | None = None
    revision: str | None = None
    trusted: bool = False
    kind: str = "safetensors"
    remote: HubModel | None = None
    scratch: Scratch | None = None
    as_opened: Mapping[Path, FileState] = field(default_factory=dict)
    not_taken: Mapping[str, str] = field(default_factory=dict)

    @property
    def weights_folder(self) -> Path:
        """``mlx_lm`` opens the folder as it stands."""
        return self.folder

    @property
    def tensors(self) -> dict[str, TensorSpec]:
        """Every tensor by its checkpoint name."""
        return {name: tensor.spec for name, tensor in self.stored.items()}

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """The files that hold the weights, sorted."""
        return tuple(sorted({tensor.file for tensor in self.stored.values()}))

    def file_of(self, name: str) -> Path:
        """The weight file that holds tensor ``name``."""
        return self.stored[name].file

    @property
    def stored_bytes(self) -> int:
        """Bytes the weights take as stored."""
        return sum(tensor.spec.nbytes for tensor in self.stored.values())

    @property
    def stored_types(self) -> dict[str, tuple[str, int]]:
        """Each tensor's dtype and bytes."""
        return {name: (tensor.spec.dtype, tensor.spec.nbytes) for name, tensor in self.stored.items()}

    @property
    def quantization(self) -> Quantization | None:
        """How the folder says that it is quantized, or None."""
        return stated_quantization(self.config, self.folder)

    @property
    def sidecars(self) -> dict[str, Path | bytes]:
        """The files of the folder that travel with the weights."""
        return {
            name: self.folder / name
            for name in _files_of(self.folder)
            if travels(name, trusted=self.trusted) and self._is_own(name)
        }

    @property
    def left_behind(self) -> dict[str, str]:
        """Files of the folder that do not travel, and what of its repository was not taken."""
        names = _files_of(self.folder)
        weights = [file.name for file in self.weight_files]
        return {
            **self.not_taken,
            **left_behind(names, weights, trusted=self.trusted),
            **{name: LINK for name in names if not name.startswith(".") and not self._is_own(name)},
        }

    @property
    def card(self) -> SourceCard:
        """What the folder's ``README.md`` gives a new card; nothing where that is a link out of the folder."""
        return card_in(self.folder) if self._is_own("README.md") else SourceCard({})

    @property
    def own_recipe(self) -> None:
        """Safetensors hold no blocks to follow."""
        return

    def _is_own(self, name: str) -> bool:
        # The links of a scratch folder are mlxq's own, and lead into the cache.
        return self.scratch is not None or stays(self.folder / name, self.folder)

    def read_rows(self, name: str, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows ``start:stop`` of tensor ``name``; see ``ModelSource.read_rows``."""
        import numpy as np

        assert self.remote is None, "the weights are still on the Hub"
        tensor = self.stored[name]
        spec = tensor.spec
        row_bytes = spec.nbytes // max(spec.rows, 1)
        descriptor = os.open(tensor.file, os.O_RDONLY)
        try:
            raw = pread_exactly(descriptor, (stop - start) * row_bytes, tensor.offset + start * row_bytes)
        finally:
            os.close(descriptor)
        columns = spec.shape[-1] if spec.shape else 1
        return raw.view(np.dtype(_NUMPY_DTYPES[spec.dtype])).reshape(stop - start, columns)

    def repack_format(self, name: str) -> None:
        """Safetensors hold no foreign blocks to repack."""
        return

    def read_repacked(self, name: str, start: int, stop: int) -> dict[str, npt.NDArray[Any]]:
        """Never called: ``repack_format`` is None for every tensor."""
        raise AssertionError(f"{name} has no blocks to repack")


def _files_of(folder: Path) -> list[str]:
    """The files at the top of a model's folder and its further chat templates, by their path in it, sorted."""
    found = (*folder.iterdir(), *(folder / TEMPLATES).glob("*.jinja"))
    return sorted(file.relative_to(folder).as_posix() for file in found if file.is_file())


def open_folder(folder: Path, name: str, *, trusted: bool = False, scratch: Scratch | None = None) -> SafetensorsFolder:
    """Open a model folder by its headers; ``trusted`` where its own Python files may run.

    Reads the files ``mlx_lm`` would read (``model*.safetensors``). ``scratch`` is given where the folder is a temporary
    one of mlxq's own links. Raises BadInputError where the folder is not a model, where the index names files that are
    not there, or where what is read is a link out of the folder.
    """
    config_file = folder / "config.json"
    if not config_file.exists():
        hint = "Name a folder with config.json and model*.safetensors, a .gguf file, or a Hub id such as org/name."
        if any(folder.glob("*.gguf")):
            hint = f"It holds GGUF files; name one of them, such as {next(iter(sorted(folder.glob('*.gguf'))))}."
        raise BadInputError(f"{folder} is not a model folder: it has no config.json", hint)
    before = states_of(file for pattern in ("*", "*/*") for file in folder.glob(pattern))
    files = sorted(folder.glob("model*.safetensors"))
    if scratch is None:
        check_stays([*(folder / file for file in (*OPENED, "generation_config.json")), *files], folder)
    config = read_json(config_file)
    if not files:
        others = [p.name for p in folder.glob("*") if p.suffix in {".bin", ".pt", ".pth", ".safetensors"}]
        raise BadInputError(
            f"{folder} has no model*.safetensors",
            f"It has {', '.join(sorted(others)[:3])}; save the model as model*.safetensors first." if others else None,
        )
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise BadInputError(f"{index} has no weight_map")
        missing = sorted(set(map(str, weight_map.values())) - {p.name for p in files})
        if missing:
            raise BadInputError(
                f"{folder} is incomplete: {missing[0]} is missing"
                + (f" and {len(missing) - 1} more" if missing[1:] else ""),
                "Download the missing files; the index lists them.",
            )
    stored: dict[str, StoredTensor] = {}
    for file in files:
        for tensor in read_file_header(file):
            if tensor.spec.name in stored:
                raise BadInputError(
                    f"tensor {tensor.spec.name!r} is in both {stored[tensor.spec.name].file.name} and {file.name}",
                    "Remove the weights that do not belong to the model.",
                )
            stored[tensor.spec.name] = tensor
    if not stored:
        raise BadInputError(f"{folder} holds no tensors")
    check_config(config, len(stored), str(config_file))
    source = SafetensorsFolder(name, folder, believed(config, stored), stored, trusted=trusted, scratch=scratch)
    return replace(source, as_opened={file: before[file] for file in files_of(source) if file in before})
