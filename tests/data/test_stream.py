from __future__ import annotations

import json
import random
import warnings
from itertools import islice

import pytest

from rlft.data import TokenStream, tokenize


def rows(n):
    return [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(n)]


def prompts(stream, n):
    return [example.prompt for example in islice(stream, n)]


def test_same_examples_as_in_memory(char):
    stream = TokenStream(lambda: iter(rows(7)), char, max_completion_length=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = tokenize(rows(7), char, max_completion_length=2)
    assert list(islice(stream, 7)) == whole.examples
    assert stream.format == "prompt_completion"
    assert stream.report.kept == 7
    assert stream.report.truncated_completions == 7
    assert prompts(stream, 2) == ["p0", "p1"]  # the second epoch
    assert stream.epoch == 1


def test_shuffle_gives_every_row_once_an_epoch(char):
    stream = TokenStream(rows(20), char, shuffle_buffer=6, seed=1)
    state = random.getstate()
    first, second = prompts(stream, 20), prompts(stream, 20)
    assert random.getstate() == state
    assert sorted(first) == sorted(second) == sorted(row["prompt"] for row in rows(20))
    assert first != second
    assert first != [row["prompt"] for row in rows(20)]
    assert all(int(name[1:]) <= place + 6 for place, name in enumerate(first))  # the buffer is bounded
    assert prompts(TokenStream(rows(20), char, shuffle_buffer=6, seed=1), 20) == first
    assert prompts(TokenStream(rows(20), char, shuffle_buffer=6, seed=2), 20) != first


@pytest.mark.parametrize("buffer", [0, 1, 4, 50])
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 3)])
def test_resume_anywhere_equals_uninterrupted(char, buffer, rank, world_size):
    source = rows(13)
    source[4] = {"prompt": "", "completion": "x"}
    options = {"shuffle_buffer": buffer, "seed": 7, "rank": rank, "world_size": world_size, "max_bad_fraction": 1.0}
    straight = prompts(TokenStream(source, char, **options), 30)
    walker = TokenStream(source, char, **options)
    for step in range(30):
        resumed = TokenStream(source, char, **options)
        resumed.load_state_dict(json.loads(json.dumps(walker.state_dict())))
        assert prompts(resumed, 30 - step) == straight[step:]
        next(walker)


def test_ranks_are_disjoint_and_together_everything(char):
    parts = [prompts(TokenStream(rows(12), char, shuffle_buffer=5, rank=r, world_size=3), 4) for r in range(3)]
    assert sorted(name for part in parts for name in part) == sorted(row["prompt"] for row in rows(12))


def test_bad_rows_are_counted_and_refused(char):
    good, bad = rows(1)[0], {"prompt": "x", "completion": ""}
    stream = TokenStream([good, bad], char, max_bad_fraction=0.5)
    assert prompts(stream, 3) == ["p0"] * 3
    assert stream.report.skipped == {"empty completion": 2}
    with pytest.raises(ValueError, match="1 of 2 rows"):
        prompts(TokenStream([good, bad], char), 2)
    endless = TokenStream(lambda: (good if i % 10 else bad for i in range(10**9)), char)
    with pytest.raises(ValueError, match=r"20 of 20\d rows|21 of 20\d rows"):
        prompts(endless, 1000)
    with pytest.raises(ValueError, match="none of the 2 rows can be used"):
        next(TokenStream([bad, bad], char, max_bad_fraction=1.0))


def test_nothing_to_stream_is_refused(char):
    with pytest.raises(ValueError, match="holds no rows"):
        next(TokenStream([], char))
    with pytest.raises(ValueError, match="gave process 2 of 3 none"):
        next(TokenStream(rows(2), char, rank=2, world_size=3))


def test_a_generator_that_ends_is_refused(char):
    with pytest.raises(ValueError, match="the function that makes the generator"):
        TokenStream((row for row in rows(3)), char)
    with pytest.raises(ValueError, match="iterable"):
        TokenStream(3, char)


@pytest.mark.parametrize("options", [{"rank": 1}, {"shuffle_buffer": -1}, {"max_bad_fraction": 2}])
def test_bad_arguments(char, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        TokenStream(rows(2), char, **options)


def test_state_of_another_stream_is_refused(char):
    stream = TokenStream(rows(5), char, seed=1)
    with pytest.raises(ValueError, match="seed 2 -> 1"):
        stream.load_state_dict({**stream.state_dict(), "seed": 2})
    with pytest.raises(ValueError, match="another version"):
        stream.load_state_dict({})
    with pytest.raises(ValueError, match="ends after 5"):
        stream.load_state_dict({**stream.state_dict(), "consumed": 6})


def test_column_problems_name_the_columns(char):
    with pytest.raises(ValueError, match="did you mean 'prompt' by 'promt'"):
        next(TokenStream([{"promt": "x"}], char))
    with pytest.raises(ValueError, match="row 0: role 'human'"):
        next(TokenStream([{"prompt": [{"role": "human", "content": "x"}]}], char))


def walked(source, char, steps, **options):
    """Outcome of every call, up to the error that ends it: the prompt, or the error's words."""
    stream, found = TokenStream(source, char, **options), []
    for _ in range(steps):
        try:
            found.append(next(stream).prompt)
        except ValueError as error:
            return stream, [*found, str(error)]
    return stream, found


@pytest.mark.parametrize("bad", [range(660, 663), range(500, 512), range(190, 193), [*range(40, 44), 240]], ids=str)
@pytest.mark.parametrize("stop", [1, 150, 198, 450])
def test_unusable_rows_are_counted_over_a_stop(char, bad, stop):
    """A share of unusable rows refuses a resumed stream exactly where it refuses the one that was never stopped."""
    source = rows(700)
    for i in bad:
        source[i] = {"prompt": f"p{i}", "completion": ""}
    options = {"shuffle_buffer": 0, "seed": 7}
    whole, expected = walked(source, char, 900, **options)
    first, said = walked(source, char, stop, **options)
    if len(said) < stop or said[-1:] != expected[stop - 1 : stop]:
        assert said == expected  # refused before the stop
        return
    resumed = TokenStream(source, char, **options)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    found = list(said)
    for _ in range(900 - stop):
        try:
            found.append(next(resumed).prompt)
        except ValueError as error:
            found.append(str(error))
            break
    assert found == expected
    assert resumed.report == whole.report


@pytest.mark.parametrize("buffer", [0, 5])
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2)])
def test_rows_that_changed_before_the_place_are_noticed(char, buffer, rank, world_size):
    options = {"shuffle_buffer": buffer, "seed": 3, "rank": rank, "world_size": world_size}
    stream = TokenStream(rows(20), char, **options)
    given = prompts(stream, 14 // world_size)
    state = json.loads(json.dumps(stream.state_dict()))
    TokenStream(rows(20), char, **options).load_state_dict(state)
    for number in range(20):
        changed = rows(20)
        changed[number] = {"prompt": f"p{number}", "completion": "other"}
        again = TokenStream(changed, char, **options)
        if f"p{number}" in given:
            with pytest.raises(ValueError, match=r"training data changed: the first 1\d rows of epoch 1 .*\[data\]"):
                again.load_state_dict(state)
        else:  # not yet given out, or another process's
            again.load_state_dict(state)
    turned = rows(20)
    turned[:10] = turned[9::-1]
    with pytest.raises(ValueError, match="or come in another order"):
        TokenStream(turned, char, **options).load_state_dict(state)


def test_rows_are_compared_from_the_beginning_of_the_epoch(char):
    stream = TokenStream(rows(6), char)
    prompts(stream, 8)
    state = stream.state_dict()
    changed = rows(6)
    changed[1]["completion"] = "other"
    with pytest.raises(ValueError, match="the first 2 rows of epoch 2"):
        TokenStream(changed, char).load_state_dict(state)
    # where they were not compared once, they cannot be until the epoch is over
    again = TokenStream(changed, char)
    again.load_state_dict({**state, "rows_hash": ""})
    assert prompts(again, 2) == ["p2", "p3"]
    assert again.state_dict()["rows_hash"] == ""
    TokenStream(rows(6), char).load_state_dict(again.state_dict())
    assert prompts(again, 3) == ["p4", "p5", "p0"]
    assert again.state_dict()["rows_hash"]
    with pytest.raises(ValueError, match="in another order"):
        TokenStream(rows(6)[::-1], char).load_state_dict(again.state_dict())


def test_a_state_of_other_processes_or_of_an_older_version_gives_the_place(char):
    bad = [{"prompt": "", "completion": "x"}, *rows(11)]
    stream = TokenStream(bad, char, world_size=2, max_bad_fraction=0.5)
    prompts(stream, 2)
    state = stream.state_dict()
    assert state["counts"]["skipped"] == {"empty prompt": 1}
    alone = TokenStream(bad, char, max_bad_fraction=0.5)
    alone.load_state_dict(state)
    assert alone.report.rows == 0
    assert prompts(alone, 2) == [f"p{state['consumed'] - 1}", f"p{state['consumed']}"]
    old = TokenStream(bad, char, world_size=2, max_bad_fraction=0.5)
    old.load_state_dict({name: state[name] for name in ("epoch", "consumed", "seed", "shuffle_buffer")})
    assert prompts(old, 2) == prompts(stream, 2)
