"""Workers that read ahead change nothing: examples, order, state, counts and errors are those of one process.

Most tests put workers into this process that do everything at once when asked, so that they are as far ahead as they can
be; what is sent to them and comes back is pickled as on the real way. Some use real ones.
"""

from __future__ import annotations

import json
import random
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rlft import _workers
from rlft._workers import Trouble
from rlft.data import (
    Completion,
    DataWarning,
    Example,
    StreamOrder,
    TokenStream,
    stream_rows,
    tokenize,
    tokenize_stream,
)
from rlft.data.encoding import Encoder, Limits
from rlft.data.tokenizing import Tokenizer
from rlft.errors import DataError

BAD = {"prompt": "x", "completion": ""}


class Here:
    """Stands in for :class:`rlft._workers.Workers`: works in this process, and at once."""

    made: list[Here] = []  # noqa: RUF012

    def __init__(self, count: int, job: Any, arguments: Sequence[Sequence[Any]]) -> None:
        self.count, self.closed, self.received, self.looks = count, False, 0, 0
        Here.made.append(self)
        self.works, self.answers = [], [deque[Any]() for _ in range(count)]
        for given in arguments:
            try:
                self.works.append(self.sent(job).open(lambda: None, *self.sent(given)))
            except Exception as error:
                self.works.append(Trouble.of(error))

    @staticmethod
    def sent(thing: Any) -> Any:
        return _workers._loads(bytes(_workers._Pickler.dumps(thing)))

    def send(self, number: int, task: Any) -> None:
        work = self.works[number]
        try:
            self.answers[number].append(work if isinstance(work, Trouble) else self.sent(work(self.sent(task))))
        except Exception as error:
            self.answers[number].append(Trouble.of(error))

    def ready(self, number: int) -> bool:
        self.looks += 1
        return self.looks % 3 == 0

    def receive(self, number: int, waiting: Any = None) -> Any:
        self.received += 1
        answer = self.answers[number].popleft()
        if isinstance(answer, Trouble):
            raise answer.error()
        return answer

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[Here]:
    monkeypatch.setattr("rlft.data.ahead.Workers", Here)
    monkeypatch.setattr("rlft.data.ahead._seed", lambda *_: None)  # seeds a process that is the worker's alone
    monkeypatch.setattr("rlft.data.tokenizing.Workers", Here)
    monkeypatch.setattr(Here, "made", [])
    return Here.made


def rows(n: int) -> list[dict[str, str]]:
    return [{"prompt": f"p{i}", "completion": "c" * (1 + i % 3)} for i in range(n)]


def opened(
    source: Any, tokenizer: Any, workers: int = 0, *, block: int = 2, rank: int = 0, world: int = 1, **settings: Any
) -> TokenStream:
    """A stream whose first rows were not looked at: they may be bad here."""
    from rlft.data.ahead import WorkedStream

    settings = {"rank": rank, "world_size": world, "seed": 3, "max_bad_fraction": 1.0, **settings}
    source = stream_rows(source) if source else source
    if workers:
        stream = WorkedStream(source, tokenizer, workers=workers, block=block, waiting=None, **settings)
    else:
        stream = TokenStream(source, tokenizer, **settings)
    stream.settle("prompt_completion")
    return stream


def walk(stream: TokenStream, steps: int) -> list[Any]:
    """Each example with the state after it and the counts so far, and the error at the end if there is one."""
    seen: list[Any] = []
    try:
        for _ in range(steps):
            seen.append((next(stream), json.dumps(stream.state_dict()), str(stream.report)))
    except (ValueError, DataError) as error:
        seen.append((type(error), str(error).partition("\n")[0], stream.epoch, stream.consumed, str(stream.report)))
    finally:
        stream.close()
    return seen


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
@pytest.mark.parametrize("block", [1, 2, 5])
@pytest.mark.parametrize("buffer", [0, 4, 50])
def test_same_examples_places_and_counts(char: Any, here: list[Here], workers: int, block: int, buffer: int) -> None:
    """Over several epochs: 11 rows are no multiple of a block, and some cannot be used."""
    source = rows(11)
    source[4] = source[10] = BAD
    for rank, world in ((0, 1), (1, 3)):
        place = {"rank": rank, "world": world, "shuffle_buffer": buffer}
        assert walk(opened(source, char, workers, block=block, **place), 40) == walk(opened(source, char, **place), 40)
    assert [pool.count for pool in here] == [workers] * 2
    assert all(pool.closed for pool in here)


@pytest.mark.parametrize(("rank", "world"), [(0, 1), (1, 3)])
def test_resume_anywhere_with_another_number_of_workers(char: Any, here: list[Here], rank: int, world: int) -> None:
    """The state is that of what was given out, however far the workers are."""
    source = rows(13)
    source[4] = BAD
    options: dict[str, Any] = {"shuffle_buffer": 5, "rank": rank, "world": world}
    straight = [example for example, *_ in walk(opened(source, char, **options), 30)]
    walker = opened(source, char, 3, **options)
    for step in range(30):
        state = json.loads(json.dumps(walker.state_dict()))
        for workers in (0, 1, 2):
            resumed = opened(source, char, workers, block=1 + step % 3, **options)
            resumed.load_state_dict(state)
            assert [example for example, *_ in walk(resumed, 30 - step)] == straight[step:]
        next(walker)


def test_a_stream_that_was_closed_goes_on_where_it_was(char: Any, here: list[Here]) -> None:
    straight = walk(opened(rows(9), char), 20)
    stream = opened(rows(9), char, 2)
    found = []
    for _ in range(20):
        found += walk(stream, 1)  # which closes it
    assert found == straight
    assert len(here) == 20


def test_workers_are_no_further_ahead_than_two_blocks_each(
    char: Any, here: list[Here], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = 0

    class Counted:
        def __iter__(self) -> Iterator[dict[str, str]]:
            nonlocal read
            for row in rows(10**6):
                read += 1
                yield row

    monkeypatch.setattr(Here, "sent", staticmethod(lambda thing: thing))  # the workers share the counter
    monkeypatch.setattr(
        "tests.data.test_ahead.rows", lambda n: ({"prompt": f"p{i}", "completion": "c"} for i in range(n))
    )
    next(opened(Counted(), char, 2, block=5))
    # each reads to the end of its last block: the first was sent a third task in the place of the one that was taken
    assert read == 25 + 20


BROKEN = [*rows(7), {"prompt": [{"role": "human", "content": "x"}], "completion": "y"}, *rows(3)]


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("block", [1, 3, 4])
@pytest.mark.parametrize("buffer", [0, 3])
def test_errors_come_at_the_same_row_in_the_same_words(
    char: Any, here: list[Here], tmp_path: Path, workers: int, block: int, buffer: int
) -> None:
    """A row that refuses the data, a line that is broken, too many bad rows, an epoch without a row, an empty file."""
    broken = tmp_path / "broken.jsonl"
    lines = [json.dumps(row) for row in rows(9)]
    broken.write_text("\n".join([*lines[:6], '{"prompt": ', *lines[6:]]) + "\n")
    cases: dict[str, tuple[Any, dict[str, Any]]] = {
        "role": (BROKEN, {}),
        "line": (str(broken), {}),
        "too many": ([*rows(8), BAD], {"max_bad_fraction": 0.1}),
        "far too many": ([*rows(300), *[BAD] * 300], {"max_bad_fraction": 0.1}),
        "none": (rows(2), {"rank": 2, "world": 3}),
        "all bad": ([BAD, BAD], {}),
        "empty": ([], {}),
    }
    for name, (source, options) in cases.items():
        place = {"shuffle_buffer": buffer, **options}
        expected = walk(opened(source, char, **place), 700)
        assert isinstance(expected[-1][0], type), name
        assert walk(opened(source, char, workers, block=block, **place), 700) == expected, name


def test_an_epoch_that_became_empty_is_refused(char: Any, here: list[Here], tmp_path: Path) -> None:
    """Nobody looks for its rows for ever."""
    path = tmp_path / "rows.jsonl"
    for workers in (0, 2):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows(4)))
        stream = opened(str(path), char, workers, block=1)
        assert len(walk(stream, 4)) == 4
        stream.load_state_dict(stream.state_dict())
        path.write_text("")
        assert walk(stream, 1)[0][1] in (
            "the state is after 4 rows, the stream now ends after 0; give the same rows",
            "the stream holds no rows; give at least one per process",
        )


def test_fewer_rows_than_the_state_says(char: Any, here: list[Here]) -> None:
    stream = opened(rows(5), char, 2)
    stream.load_state_dict({**stream.state_dict(), "consumed": 6})
    with pytest.raises(ValueError, match="ends after 5"):
        next(stream)


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_rows_that_changed_before_the_place_are_noticed_by_workers(char: Any, here: list[Here], workers: int) -> None:
    """Whoever read them first, and whoever reads them again."""
    for first in (0, 2):
        stream = opened(rows(9), char, first, block=2)
        for _ in range(5):
            next(stream)
        state = json.loads(json.dumps(stream.state_dict()))
        stream.close()
        same = opened(rows(9), char, workers, block=2)
        same.load_state_dict(state)
        assert next(same).prompt == "p5"
        same.close()
        changed = rows(9)
        changed[3] = {"prompt": "p3", "completion": "other"}
        other = opened(changed, char, workers, block=2)

        def go_on(other: TokenStream = other, state: Any = state) -> None:
            other.load_state_dict(state)
            next(other)

        with pytest.raises(ValueError, match="the first 5 rows of epoch 1 are not those that were trained on"):
            go_on()
        other.close()


class Odd:
    """Fails in a way that is no fault of data or files."""

    def __iter__(self) -> Iterator[dict[str, str]]:
        yield from rows(5)
        raise KeyError("shard 3")


def test_a_reader_that_fails_in_another_way_is_shown_with_its_place(char: Any, here: list[Here]) -> None:
    found = walk(opened(Odd(), char, 2), 9)
    assert len(found) == 6
    assert found[-1][0] is DataError
    assert found[-1][1] == "a data worker failed with KeyError: 'shard 3'"
    assert found[-1][2:4] == (0, 5)


def test_the_format_is_that_of_the_first_rows_everywhere(char: Any, here: list[Here]) -> None:
    """Where a process, a worker or a resumed run begins must not decide how it reads."""
    mixed = [*rows(3), *({**row, "label": True} for row in rows(9))]
    for workers in (0, 2):
        stream = tokenize_stream(stream_rows(mixed), char, workers=workers).open(0, 1)
        stream.load_state_dict({**stream.state_dict(), "consumed": 6})
        assert next(stream).completions[0].label is None
        stream.close()


def test_draws_of_a_step_and_its_error(char: Any, here: list[Here]) -> None:
    data = tokenize_stream(stream_rows(rows(7)), char, workers=2)
    order = StreamOrder(data.open(0, 1, block=2), 3)
    order.start()
    assert [e.prompt for e in next(order)] == ["p0", "p1", "p2"]
    assert order.state_dict()["consumed"] == 3
    order.load_state_dict({**order.state_dict(), "consumed": 99})
    with pytest.raises(DataError, match=r"cannot be read on, 99 rows into epoch 1: the state is after 99 rows"):
        next(order)
    order.close()


# -- a whole data set --------------------------------------------------------------------------------------------------
@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows are many chunks, and enough for workers."""
    monkeypatch.setattr("rlft.data.dataset._CHUNK", 3)
    monkeypatch.setattr("rlft.data.dataset._WORTH", 0)


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("count", [1, 3, 4, 40])
def test_a_data_set_is_the_same(char: Any, here: list[Here], small: None, workers: int, count: int) -> None:
    source: list[dict[str, Any]] = rows(count)
    if count > 30:
        source[5], source[20], source[21] = BAD, {**source[20], "completion": "é<s>" * 5}, source[20]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        alone = tokenize(source, char, max_completion_length=2, max_bad_fraction=1.0)
        helped = tokenize(source, char, max_completion_length=2, max_bad_fraction=1.0, workers=workers)
    messages = [str(warning.message) for warning in said if warning.category is DataWarning]
    assert messages[: len(messages) // 2] == messages[len(messages) // 2 :]
    assert helped.examples == alone.examples
    assert helped.report == alone.report
    assert helped.fingerprint == alone.fingerprint
    # no copy of a row's text comes back from a worker
    assert all(example.prompt is example.columns["prompt"] is source[example.index]["prompt"] for example in helped)
    if count == 1:
        assert here == []
        return
    assert here[0].closed
    assert here[0].count == min(workers, count // 3)
    # two chunks go to each worker; this process does the others where it would wait for the first ones
    chunks = -(-count // 3)
    assert here[0].received >= min(chunks, 2 * here[0].count)
    if chunks > 2 * here[0].count:
        assert here[0].received < chunks


def test_ids_stay_one_object_each(char: Any) -> None:
    """8 bytes a token: what comes from a worker is brought to the objects that are here."""
    work = Tokenizer(Encoder(char, limits=Limits()), "prompt_completion")
    row = {"prompt": "ab", "completion": "cd"}
    sent = Example(
        (1000, 2000), (Completion((1000, 3000), (True, True)), Completion((3000, 1000), (True, False))), row, "ab"
    )
    one, two = (work.shared(Here.sent(sent), row) for _ in range(2))
    assert one == two == sent
    tokens = [token for e in (one, two) for ids in (e.prompt_ids, *(c.ids for c in e.completions)) for token in ids]
    assert len({id(token) for token in tokens}) == 3
    assert one.completions[0].mask is two.completions[0].mask
    assert one.columns is row
    assert one.prompt is row["prompt"]


@pytest.mark.parametrize("workers", [1, 3])
def test_the_first_row_that_refuses_the_data_is_named(
    char: Any, here: list[Here], small: None, tmp_path: Path, workers: int
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*BROKEN, *BROKEN]))
    with pytest.raises(ValueError, match=r"rows\.jsonl:8: role 'human'"):
        tokenize(path, char, workers=workers)
    assert here[0].closed


def test_few_rows_start_nobody(char: Any, here: list[Here]) -> None:
    tokenize(rows(600), char, workers=2)
    assert here == []


# -- real ones ----------------------------------------------------------------------------------------------------------
def noisy() -> Iterator[dict[str, str]]:
    """Rows of a careless reader: global random numbers, and the order of a set of texts."""
    words = list({f"w{i}" for i in range(8)})
    for i in range(12):
        yield {"prompt": f"{i}{random.choice(words)}", "completion": str(torch.randint(100, ()).item())}


def test_real_workers_do_the_same(char: Any) -> None:
    """And random numbers that rows are made with are no worker's own, nor this process's."""
    source = rows(11)
    source[4] = BAD
    python, numbers = random.getstate(), torch.get_rng_state()
    assert walk(opened(source, char, 2, shuffle_buffer=4), 30) == walk(opened(source, char, shuffle_buffer=4), 30)
    assert random.getstate() == python
    assert torch.equal(torch.get_rng_state(), numbers)


@pytest.mark.slow
def test_rows_made_with_random_numbers_are_the_same_for_any_number_of_workers(char: Any) -> None:
    """Of the rows' own random numbers nothing is promised without workers; with them they come out alike."""
    two, three = (walk(opened(noisy, char, count), 40) for count in (2, 3))
    assert two == three
    epochs = [[example.prompt for example, *_ in two[i : i + 12]] for i in (0, 12)]
    assert epochs[0] != epochs[1]
    resumed = opened(noisy, char, 1)
    resumed.load_state_dict(json.loads(two[16][1]))
    assert [example for example, *_ in walk(resumed, 20)] == [example for example, *_ in two[17:37]]


@pytest.mark.slow
def test_real_workers_tokenise_a_data_set(char: Any, small: None) -> None:
    source = rows(50)
    assert tokenize(source, char, workers=3).examples == tokenize(source, char).examples
    with pytest.raises(ValueError, match="row 7: role 'human'"):
        tokenize(BROKEN, char, workers=2)
