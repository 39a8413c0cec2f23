"""What worker processes save: ``python -m benchmarks.workers``. Rows that take long to tokenise, and steps on a busy device.

A step on an accelerator leaves this process's core idle; it is stood in for by sleeping. The figures are in docs/data.md.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from rlft.data import StreamOrder, collate, dataset, stream_rows, tokenize, tokenize_stream
from rlft.models.vocabulary import train_tokenizer

ROWS_A_STEP, STEP_SECONDS, STEPS, WARM = 64, 0.25, 30, 6


def write_rows(path: Path, count: int) -> list[dict[str, str]]:
    """Preference pairs of about 750 tokens, in words that a byte-level tokenizer has to put together."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(3000)]
    rows = [
        {name: " ".join(draw.choices(words, k=k)) for name, k in (("prompt", 80), ("chosen", 120), ("rejected", 120))}
        for _ in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def stream(path: Path, tokenizer: Any, workers: int, step_seconds: float) -> dict[str, float]:
    """Milliseconds a step: how long it waits for its batch, and how long this process computes for it."""
    data = tokenize_stream(stream_rows(path), tokenizer, workers=workers, shuffle_buffer=256)
    order = StreamOrder(data.open(0, 1, block=-(-ROWS_A_STEP // max(1, workers))), ROWS_A_STEP)
    began = time.perf_counter()
    waits, computed, tokens = [], [], 0
    for step in range(WARM + STEPS):
        started, used = time.perf_counter(), time.process_time()
        examples = next(order)
        batch = collate(examples, pad_id=0)
        waits.append(time.perf_counter() - started)
        computed.append(time.process_time() - used)
        if step == 0:
            first = time.perf_counter() - began
        tokens = batch.num_tokens
        time.sleep(step_seconds)
    order.close()
    return {
        "workers": workers,
        "first batch, s": first,
        "wait, ms": 1e3 * statistics.median(waits[WARM:]),
        "own time, ms": 1e3 * statistics.median(computed[WARM:]),
        "tokens": tokens,
    }


def main() -> None:
    """Print a line for each number of workers."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.workers", description=__doc__)
    parser.add_argument("--rows", type=int, default=6000)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--step", type=float, default=STEP_SECONDS, help="seconds that the device is busy in a step")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        rows = write_rows(path, args.rows)
        tokenizer = train_tokenizer(rows[:300], kind="bpe", vocab_size=4000)
        for workers in args.workers:
            shown = stream(path, tokenizer, workers, args.step)
            print("stream:", ", ".join(f"{name} {value:.4g}" for name, value in shown.items()), flush=True)
        data = tokenize(rows[:ROWS_A_STEP], tokenizer)
        times = []
        for _ in range(30):
            used = time.process_time()
            batch = collate(data.examples, pad_id=0)
            times.append(time.process_time() - used)
        print(f"collating {batch.num_tokens} tokens: {1e3 * statistics.median(times):.3g} ms", flush=True)
        dataset._WORTH = 0
        for workers in args.workers:
            started, used = time.perf_counter(), time.process_time()
            tokenize(rows, tokenizer, workers=workers)
            whole, own = time.perf_counter() - started, time.process_time() - used
            print(f"data set of {len(rows)} rows: workers {workers}, {whole:.3g} s, own time {own:.3g} s", flush=True)


if __name__ == "__main__":
    main()
