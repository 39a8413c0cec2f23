"""Dataset rows -> token ids -> :class:`rlft.types.Batch`.

``load_rows`` reads files, folders and hub datasets; ``tokenize`` turns rows into examples, once; ``EpochSampler`` says
which come next; ``collate`` makes a batch of them. ``TokenStream`` is the same for rows that do not fit in memory.
"""

from __future__ import annotations

from rlft.data.batching import collate, pad_batch
from rlft.data.dataset import Overlap, TokenDataset, check_overlap, tokenize
from rlft.data.example import Completion, DataWarning, Example
from rlft.data.formats import FORMATS, detect_format
from rlft.data.report import DataReport, preview
from rlft.data.rows import Rows, load_rows
from rlft.data.sampler import EpochSampler
from rlft.data.stream import TokenStream
from rlft.data.streamed import StreamedDataset, StreamOrder, stream_rows, tokenize_stream

__all__ = [
    "FORMATS",
    "Completion",
    "DataReport",
    "DataWarning",
    "EpochSampler",
    "Example",
    "Overlap",
    "Rows",
    "StreamOrder",
    "StreamedDataset",
    "TokenDataset",
    "TokenStream",
    "check_overlap",
    "collate",
    "detect_format",
    "load_rows",
    "pad_batch",
    "preview",
    "stream_rows",
    "tokenize",
    "tokenize_stream",
]
