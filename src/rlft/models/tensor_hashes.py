"""Hashes of tensors: has a weight moved, and is it the one that a run was begun with? Not for adversaries."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from rlft.checkpoint._tensorfile import tensor_bytes

__all__ = ["fingerprint", "sampled_hash"]

#: 64-bit words of a block whose sum is taken, and bytes of a word.
_WORDS, _WORD = 1024, 8
#: Blocks of a large tensor that are hashed, and their size in bytes; what is no larger than all of them is hashed whole.
_BLOCKS, _BLOCK = 64, 16 << 10


def fingerprint(tensor: Tensor) -> Tensor:
    """A cheap hash of a tensor's bits: sums of 64-bit words by blocks of 8 KiB, weighted by the block's place.

    It reads the memory once and makes no copy of a contiguous tensor.

    Args:
        tensor: of any shape and dtype.

    Returns:
        int64 ``[2]`` on the tensor's device.
    """
    flat = tensor.detach().contiguous()
    flat = flat.as_strided((flat.numel(),), (1,))  # one element may be contiguous with any stride
    if (flat.storage_offset() * flat.element_size()) % _WORD:
        flat = flat.clone()
    raw = flat.view(torch.uint8)
    size = raw.numel() // _WORD * _WORD
    words = raw[:size].view(torch.int64)
    whole = words.numel() // _WORDS * _WORDS
    blocks = [
        words[:whole].view(-1, _WORDS).sum(-1),
        words[whole:].sum().reshape(1),
        raw[size:].long().sum().reshape(1),
    ]
    sums = torch.cat(blocks)
    places = torch.arange(sums.numel(), device=sums.device) * 2 + 1
    return torch.stack([sums.sum(), (sums * places).sum()])


def sampled_hash(tensor: Tensor) -> str:
    """A hash of shape, type and bytes; of a tensor above 1 MiB, of 64 blocks of 16 KiB from its first byte to its last.

    Another training, another precision or another seed changes every block; a few rows exchanged in a large matrix may
    fall between them.

    Args:
        tensor: of any shape, type and device.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.blake2b(f"{tensor.dtype} {list(tensor.shape)}".encode(), digest_size=8)
    if tensor.is_meta or not tensor.numel():
        return digest.hexdigest()
    flat = tensor.detach().contiguous()
    flat = flat.as_strided((flat.numel(),), (1,)).view(torch.uint8)  # one element may be contiguous with any stride
    if len(flat) > _BLOCKS * _BLOCK:
        last = len(flat) - _BLOCK
        starts = [last * index // (_BLOCKS - 1) for index in range(_BLOCKS)]
        flat = torch.cat([flat[start : start + _BLOCK] for start in starts])
    digest.update(tensor_bytes(flat))
    return digest.hexdigest()
