"""A GGUF file as a source: its tensors under Hugging Face names, with the config and tokenizer it implies."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxq.errors import BadInputError
from mlxq.files import FileState, states_of
from mlxq.methods.formats import AFFINE, Format
from mlxq.recipe.match import layer_index
from mlxq.sources.card import SourceCard, card_of_gguf, model_of_gguf
from mlxq.sources.gguf_blocks import REPACKABLE, nearest_format, repack
from mlxq.sources.gguf_header import ROPE_FREQUENCIES, GGUFHeader, GGUFTensor
from mlxq.sources.gguf_names import (
    Layout,
    checkpoint_name,
    config_of,
    layout_of,
    permutation_width,
)
from mlxq.sources.gguf_parts import parts_of, read_gguf
from mlxq.sources.gguf_tokenizer import check_rows, check_tokenizer, tokenizer_files
from mlxq.sources.quantization import Quantization
from mlxq.sources.safetensors import pread_exactly
from mlxq.tensors import TensorSpec

if TYPE_CHECKING:
    import numpy.typing as npt

    from mlxq.sources.remote import HubModel, Scratch


@dataclass(frozen=True)
class BoundTensor:
    """A stored tensor as the checkpoint has it.

    ``head_dim`` is not 0 where rows (of a bias: elements) of each head are stored interleaved; ``shift`` is what
    the file added to every value.
    """

    spec: TensorSpec
    stored: GGUFTensor
    head_dim: int = 0
    shift: float = 0.0


@dataclass(frozen=True)
class GGUFSource:
    """A GGUF file, satisfying ``ModelSource``. ``scratch`` keeps a temporary folder with it in place."""

    name: str
    header: GGUFHeader
    config: Mapping[str, Any]
    bound: Mapping[str, BoundTensor]
    base_model: str | None = None
    revision: str | None = None
    trusted: bool = False
    kind: str = "gguf"
    weights_folder: Path | None = None
    remote: HubModel | None = None
    scratch: Scratch | None = None
    as_opened: Mapping[Path, FileState] = field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, TensorSpec]:
        """Every tensor by its checkpoint name; quantized ones count as F32, which their values are."""
        return {name: tensor.spec for name, tensor in self.bound.items()}

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """The file itself, or all parts of the model."""
        return self.header.files

    def file_of(self, name: str) -> Path:
        """The file or part that holds tensor ``name``."""
        return self.bound[name].stored.file

    @property
    def stored_bytes(self) -> int:
        """Bytes the weights take as stored."""
        return sum(tensor.stored.nbytes for tensor in self.bound.values())

    @property
    def stored_types(self) -> dict[str, tuple[str, int]]:
        """Each tensor's GGML type and bytes."""
        return {name: (tensor.stored.ggml_type, tensor.stored.nbytes) for name, tensor in self.bound.items()}

    @property
    def quantization(self) -> Quantization:
        """Always: a GGUF file holds blocks."""
        return Quantization("gguf", "blocks of its own types")

    @cached_property
    def sidecars(self) -> Mapping[str, Path | bytes]:
        """Tokenizer, chat template and generation config, rebuilt from the metadata."""
        metadata = self.header.metadata
        return dict(tokenizer_files(metadata, metadata["general.architecture"], str(self.header.path)))

    @property
    def card(self) -> SourceCard:
        """What the metadata gives a new card."""
        return card_of_gguf(self.header.metadata)

    @property
    def left_behind(self) -> Mapping[str, str]:
        """Nothing: the file is all there is."""
        return {}

    @property
    def own_recipe(self) -> str:
        """See ``recipe_yaml_from_gguf``."""
        return recipe_yaml_from_gguf(self)

    def read_rows(self, name: str, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows ``start:stop`` of tensor ``name``, dequantized to float32; see ``ModelSource.read_rows``."""
        import numpy as np
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        tensor = self.bound[name]
        raw = self._stored_rows(tensor, start, stop)
        if tensor.spec.dtype == "BF16":
            values: npt.NDArray[Any] = raw.view(np.uint16)
        elif tensor.spec.dtype == "F16":
            values = raw.view(np.float16)
        else:
            # Blocks may hold any bits; what they overflow to is what the file says.
            with np.errstate(all="ignore"):
                values = dequantize(raw, GGMLQuantizationType[tensor.stored.ggml_type])
        if tensor.head_dim and len(tensor.spec.shape) == 1:
            values = values[:, _interleaved(np.arange(tensor.spec.size), tensor.head_dim)]
        return values - np.float32(tensor.shift) if tensor.shift else values

    def repack_format(self, name: str) -> Format | None:
        """The MLX affine format whose values equal this tensor's blocks, or None."""
        tensor = self.bound[name]
        if tensor.shift or len(tensor.spec.shape) < 2:
            return None
        return REPACKABLE.get(tensor.stored.ggml_type)

    def read_repacked(self, name: str, start: int, stop: int) -> dict[str, npt.NDArray[Any]]:
        """Rows ``start:stop`` in ``repack_format``.

        ``weight`` (rows, columns * bits / 32) uint32, ``scales`` and ``biases`` (rows, columns / 32) float16.
        Raises MlxqError where an offset does not fit float16.
        """
        tensor = self.bound[name]
        return repack(self._stored_rows(tensor, start, stop), tensor.stored.ggml_type, name)

    def bit_map(self) -> dict[str, str]:
        """Module path -> GGML type, for every matrix in the file."""
        return {
            name.removesuffix(".weight"): tensor.stored.ggml_type
            for name, tensor in self.bound.items()
            if len(tensor.spec.shape) > 1
        }

    def _stored_rows(self, tensor: BoundTensor, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows ``start:stop`` in checkpoint order, as the bytes that store them: (rows, bytes per row)."""
        import numpy as np

        row_bytes = tensor.stored.nbytes // max(tensor.spec.rows, 1)
        if not tensor.head_dim or len(tensor.spec.shape) == 1 or stop <= start:
            return self._pread(tensor.stored, start, stop, row_bytes)
        rows = _interleaved(np.arange(start, stop), tensor.head_dim)
        # Rows move only within their head, so the span that holds them is at most two heads longer.
        first, last = int(rows.min()), int(rows.max())
        span = self._pread(tensor.stored, first, last + 1, row_bytes)
        picked: npt.NDArray[Any] = span[rows - first]
        return picked

    def _pread(self, stored: GGUFTensor, start: int, stop: int, row_bytes: int) -> npt.NDArray[Any]:
        """Rows ``start:stop`` in the order of the file."""
        assert self.remote is None, "the weights are still on the Hub"
        rows = stop - start
        descriptor = os.open(stored.file, os.O_RDONLY)
        try:
            return pread_exactly(descriptor, rows * row_bytes, stored.offset + start * row_bytes).reshape(
                rows, row_bytes
            )
        finally:
            os.close(descriptor)


def _interleaved(rows: npt.NDArray[Any], head_dim: int) -> npt.NDArray[Any]:
    """Where llama.cpp stores ``rows`` of a rotary projection: each head's two halves, row by row in turn."""
    head, within = rows // head_dim, rows % head_dim
    half, pair = within // (head_dim // 2), within % (head_dim // 2)
    stored: npt.NDArray[Any] = head * head_dim + 2 * pair + half
    return stored


def open_gguf(path: Path, name: str) -> GGUFSource:
    """Open a GGUF file by its header; where it is one of several parts, with the others beside it.

    Raises BadInputError where it is not GGUF, cut short, without one of its parts, of an architecture, tensor type or
    tokenizer that can't be rebuilt, or lacks what the model needs.
    """
    before = states_of(path.with_name(part) for part in parts_of(path.name))
    header = read_gguf(path)
    layout = layout_of(header)
    check_tokenizer(header.metadata, str(path))
    _check_types(header)
    config = config_of(header, layout, _rope_frequencies(header))
    check_rows(header.metadata, config["vocab_size"], str(path))
    bound = {
        tensor.spec.name: tensor
        for tensor in (
            _bind(header, layout, config, stored)
            for stored in header.tensors.values()
            if stored.name != ROPE_FREQUENCIES
        )
    }
    return GGUFSource(name, header, config, bound, model_of_gguf(header.metadata), as_opened=before)


def recipe_yaml_from_gguf(source: GGUFSource) -> str:
    """A recipe that gives each module the MLX format nearest to what the file stores it in.

    The most common format is the default; the rest are rules, one for each format and set of layers.
    """
    kinds = source.bit_map()
    formats = {path: nearest_format(kind) for path, kind in kinds.items()}
    default = Counter(formats.values()).most_common(1)[0][0]
    counted = ", ".join(f"{kind} x{count}" for kind, count in Counter(kinds.values()).most_common())
    lines = [f"# The bit map of {source.header.path.name} in MLX formats; it holds {counted}."]
    if source.base_model:
        lines.append(f"model: {source.base_model}")
    if default:
        lines.append(f"default: {{{_format_yaml(default, None)}}}")
    rules = _rules(formats, default)
    if rules:
        lines += ["rules:", *rules]
    return "\n".join(lines) + "\n"


def _rules(formats: Mapping[str, Format | None], default: Format | None) -> list[str]:
    """YAML lines of the rules for modules whose format is not ``default``."""
    layers_of: dict[str, set[int]] = defaultdict(set)
    wanted: dict[tuple[Format | None, str], set[int]] = defaultdict(set)
    outside: dict[Format | None, list[str]] = defaultdict(list)
    for path, fmt in formats.items():
        layer = layer_index(path)
        if layer is None:
            if fmt != default:
                outside[fmt].append(path.rpartition(".")[2])
            continue
        tail = path.partition(f".{layer}.")[2]
        layers_of[tail].add(layer)
        if fmt != default:
            wanted[fmt, tail].add(layer)
    together: dict[tuple[Format | None, tuple[int, ...] | None], list[str]] = defaultdict(list)
    for fmt, names in outside.items():
        together[fmt, None] += names
    for (fmt, tail), layers in wanted.items():
        whole = layers == layers_of[tail]
        together[fmt, None if whole else tuple(sorted(layers))].append(tail)
    lines = []
    for (fmt, where), tails in together.items():
        lines.append(f"  - match: {tails[0] if len(tails) == 1 else '[' + ', '.join(tails) + ']'}")
        if where is not None:
            lines.append(f"    layers: [{', '.join(_slices(where))}]")
        if fmt is None:
            lines.append("    keep: true")
        else:
            lines += [f"    {part}" for part in _format_yaml(fmt, default).split(", ")]
    return lines


def _format_yaml(fmt: Format, default: Format | None) -> str:
    parts = [f"bits: {fmt.bits}", f"group_size: {fmt.group_size}"]
    if fmt.mode != (default.mode if default else AFFINE.name):
        parts.insert(0, f"mode: {fmt.mode}")
    return ", ".join(parts)


def _slices(layers: Iterable[int]) -> list[str]:
    """Sorted layer numbers as few Python slices, each quoted: ``"0:4"``, ``"5:12:3"``."""
    left = list(layers)
    slices = []
    while left:
        step = left[1] - left[0] if len(left) > 1 else 1
        run = 1
        while run < len(left) and left[run] - left[run - 1] == step:
            run += 1
        # Two layers apart are no pattern.
        if run == 2 and step > 1:
            run = 1
        stop = left[run - 1] + 1
        slices.append(f'"{left[0]}:{stop}{f":{step}" if run > 1 and step > 1 else ""}"')
        del left[:run]
    return slices


def _bind(header: GGUFHeader, layout: Layout, config: dict[str, Any], stored: GGUFTensor) -> BoundTensor:
    name = checkpoint_name(header, layout, stored.name)
    # Stored as a vector, a matrix of one row in the checkpoint.
    shape = (1, *stored.shape) if name.endswith(".shared_expert_gate.weight") else stored.shape
    shift = 1.0 if layout.shifted_norms and name.endswith("norm.weight") else 0.0
    dtype = stored.ggml_type if stored.ggml_type in ("F16", "BF16") and not shift else "F32"
    head_dim = permutation_width(name, config) if layout.permuted else 0
    if head_dim and shape[0] % head_dim:
        raise BadInputError(f"{header.path}: {stored.name} has {shape[0]} rows, no multiple of the head's {head_dim}")
    return BoundTensor(TensorSpec(name, dtype, shape), stored, head_dim, shift)


def _check_types(header: GGUFHeader) -> None:
    """Raise BadInputError at a tensor whose type the ``gguf`` package can't read."""
    import numpy as np
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    for kind, name in {tensor.ggml_type: tensor.name for tensor in header.tensors.values()}.items():
        qtype = GGMLQuantizationType[kind]
        try:
            with np.errstate(all="ignore"):
                dequantize(np.zeros((1, GGML_QUANT_SIZES[qtype][1]), dtype=np.uint8), qtype)
        except NotImplementedError as exc:
            raise BadInputError(
                f"{header.path} stores {name!r} as {kind}, which the gguf package does not read",
                "Update it (pip install -U gguf), or quantize the original model from the Hub.",
            ) from exc


def _rope_frequencies(header: GGUFHeader) -> tuple[float, ...] | None:
    import numpy as np

    tensor = header.tensors.get(ROPE_FREQUENCIES)
    if tensor is None:
        return None
    if tensor.ggml_type != "F32":
        raise BadInputError(f"{header.path}: {ROPE_FREQUENCIES} is {tensor.ggml_type}, not F32")
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.offset)
        return tuple(np.frombuffer(stream.read(tensor.nbytes), dtype="<f4").tolist())
