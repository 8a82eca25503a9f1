"""What every kind of source offers: a config, a table of tensors, sidecar files, and rows on demand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mlxq.files import FileState
from mlxq.methods.formats import Format
from mlxq.tensors import TensorSpec

if TYPE_CHECKING:
    import numpy.typing as npt

    from mlxq.sources.card import SourceCard
    from mlxq.sources.quantization import Quantization
    from mlxq.sources.remote import HubModel


class ModelSource(Protocol):
    """A model known by its headers, here or on the Hub. Building one reads no weights."""

    @property
    def name(self) -> str:
        """The model as the person named it: a folder, ``org/name``, a file, ``sample``."""

    @property
    def kind(self) -> str:
        """``safetensors`` or ``gguf``."""

    @property
    def base_model(self) -> str | None:
        """Hub id of the model this is, where known."""

    @property
    def revision(self) -> str | None:
        """Commit the files came from, where known."""

    @property
    def trusted(self) -> bool:
        """Whether Python files that come with it may run: only a person at the command line can say so."""

    @property
    def remote(self) -> HubModel | None:
        """Where on the Hub the weights still are; None where they are here."""

    @property
    def weights_folder(self) -> Path | None:
        """Folder that ``mlx_lm`` can open as it stands, or None where names or bytes are translated."""

    @property
    def config(self) -> Mapping[str, Any]:
        """``config.json`` in Hugging Face terms."""

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """Every tensor by its Hugging Face checkpoint name."""

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """The files that hold the weights."""

    def file_of(self, name: str) -> Path:
        """The weight file that holds a tensor."""

    @property
    def as_opened(self) -> Mapping[Path, FileState]:
        """The files that the model is made from, as they were before any of them was read."""

    @property
    def stored_bytes(self) -> int:
        """Bytes the weights take as stored."""

    @property
    def stored_types(self) -> Mapping[str, tuple[str, int]]:
        """Each tensor's type as the file has it (a dtype, or a GGML type), and its bytes there."""

    @property
    def quantization(self) -> Quantization | None:
        """How the model is quantized already, as its files say; None where it is not."""

    @property
    def sidecars(self) -> Mapping[str, Path | bytes]:
        """Files that travel with the model (tokenizer, chat template, licence): name -> file or content.

        A name is that of a file at the top, or ``additional_chat_templates/NAME.jinja``.
        """

    @property
    def card(self) -> SourceCard:
        """What a new model card takes over: licence, languages, tags."""

    @property
    def left_behind(self) -> Mapping[str, str]:
        """Files and folders beside the weights that do not travel: name -> why."""

    @property
    def own_recipe(self) -> str | None:
        """A recipe, as YAML, that follows the types of the stored blocks; None where there are none."""

    def read_rows(self, name: str, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows ``start:stop`` of a tensor seen as a (rows, last axis) matrix.

        The numpy dtype is the stored one, except that BF16 comes as uint16 and FP8 as uint8.
        Safe to call from several threads.
        """

    def repack_format(self, name: str) -> Format | None:
        """The MLX format that holds this tensor's stored blocks exactly, or None where there is none."""

    def read_repacked(self, name: str, start: int, stop: int) -> dict[str, npt.NDArray[Any]]:
        """Rows ``start:stop`` in ``repack_format``: packed ``weight``, ``scales`` and ``biases``."""
