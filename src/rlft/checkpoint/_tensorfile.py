"""Tensors to and from one safetensors file.

Written here rather than by the safetensors library for three reasons: the file is hashed while it is written (no second
pass over it), every write can be made to fail in a test, and tensors that share memory or are not contiguous need no
copy of the whole set. Read by the safetensors library, whose parser is built for hostile files.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from rlft._files import Written, write_file
from rlft.checkpoint._errors import CheckpointError

__all__ = ["check_tensors", "named_bytes", "read_tensors", "tensor_bytes", "write_tensors"]

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def check_tensors(tensors: Mapping[str, Tensor], *, what: str) -> int:
    """Refuse what has no exact form in the file; return the bytes that the rest will take.

    Raises:
        CheckpointError: names the tensor and what to do.
    """
    if sys.byteorder != "little":
        raise CheckpointError(f"checkpoints are little-endian and this machine is {sys.byteorder}-endian")
    total = 0
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not name or name == "__metadata__":
            raise CheckpointError(f"{what} has a tensor named {name!r}; names must be non-empty strings")
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{what}[{name!r}] must be a tensor, got {type(tensor).__name__}; put it in a record")
        if tensor.dtype not in _DTYPES or tensor.layout != torch.strided or tensor.device.type == "meta":
            raise CheckpointError(
                f"{what}[{name!r}] is a {tensor.dtype} tensor of layout {tensor.layout} on {tensor.device}, which "
                f"cannot be stored; expected a dense tensor with data, of {', '.join(str(d)[6:] for d in _DTYPES)}"
            )
        total += tensor.numel() * tensor.element_size()
    return total


def named_bytes(tensors: Mapping[str, Tensor]) -> list[tuple[str, str, list[int]]]:
    """``(name, dtype, shape)`` sorted by name."""
    return [(name, _DTYPES[tensors[name].dtype], list(tensors[name].shape)) for name in sorted(tensors)]


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The values of a tensor as bytes, row by row; copies only what is not contiguous or not on the CPU."""
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    if not plain.numel():
        return memoryview(b"")
    flat = plain.reshape(-1)
    # A single element counts as contiguous whatever its stride, but cannot be viewed as bytes under another one.
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8).numpy().data


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> Written:
    """Write and fsync one safetensors file; size and hash come back."""
    # Wide elements first keeps every tensor aligned to its element, which lets readers map the file.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, ensure_ascii=True, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)

    def chunks() -> Iterator[bytes | memoryview]:
        yield len(text).to_bytes(8, "little") + text
        for name in order:
            yield tensor_bytes(tensors[name])

    return write_file("checkpoint.tensors", path, chunks())


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU, in memory of their own.

    Raises:
        CheckpointError: when the file is not a safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            # A copy, because the reader maps the file: a later deletion or overwrite must not reach the values.
            return {name: file.get_tensor(name).clone() for name in file.keys()}
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a safetensors file that can be read: {error}") from error
