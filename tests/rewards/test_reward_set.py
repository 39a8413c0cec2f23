"""RewardSet: TRL's call convention, the sums, and every bad input of rows 33 to 42."""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
import time
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rlft.rewards import RewardError, RewardSet

NAN = float("nan")
PROMPTS = ["p", "p", "q"]
COMPLETIONS = ["a", "bb", "ccc"]
IDS = [[1], [1, 2], [1, 2, 3]]


def score(rewards, *, columns=None, state=None, **kwargs):
    return rewards(PROMPTS, COMPLETIONS, IDS, columns or {}, state, **kwargs)


def returning(value, name="judge"):
    def func(**_):
        return value

    func.__name__ = name
    return func


def test_functions_get_every_argument_by_keyword():
    seen = {}

    def judge(*args, **kwargs):
        assert not args
        seen.update(kwargs)
        return [1.0, 2.0, 3.0]

    state = SimpleNamespace(global_step=3)
    columns = {"answer": ["x", "y", "z"], "prompt": PROMPTS, "completion": COMPLETIONS}
    output = score(RewardSet(judge), columns=columns, state=state)
    assert seen == {
        "prompts": PROMPTS,
        "completions": COMPLETIONS,
        "completion_ids": IDS,
        "answer": ["x", "y", "z"],
        "trainer_state": state,
    }
    assert output.rewards.tolist() == [1.0, 2.0, 3.0]
    assert output.rewards.dtype == torch.float32
    assert output.names == ("judge",)


def test_a_function_without_kwargs_gets_only_what_it_names():
    def length(completions, answer):
        return [float(len(c)) + len(a) for c, a in zip(completions, answer, strict=True)]

    output = score(RewardSet(length), columns={"answer": ["x", "y", "z"], "other": [1, 2, 3]})
    assert output.rewards.tolist() == [2.0, 3.0, 4.0]


def test_a_missing_column_is_named_with_the_ones_there_are():
    def judge(completions, anwser):
        return [0.0] * 3

    with pytest.raises(ValueError, match=r"'judge' needs the parameter 'anwser'.*offers answer.*did you mean 'answer'"):
        score(RewardSet(judge), columns={"answer": ["x", "y", "z"]})


def test_weights_and_none_follow_nansum():
    first = returning([1.0, None, None], "first")
    second = returning([10.0, 20.0, None], "second")
    logged = returning([5.0, 5.0, 5.0], "logged")
    output = score(RewardSet([first, second, logged], weights=[2.0, 0.5, 0.0]))
    assert output.rewards[:2].tolist() == [2.0 * 1 + 0.5 * 10, 0.5 * 20]
    assert torch.isnan(output.rewards[2])  # scored only by a function of weight 0
    assert output.unscored == 1
    assert not output.all_unscored
    expected = torch.tensor([[1.0, 10, 5], [NAN, 20, 5], [NAN, NAN, 5]])
    torch.testing.assert_close(output.each, expected, equal_nan=True, rtol=0, atol=0)
    metrics = output.metrics()
    assert metrics["rewards/first/mean"] == 1.0
    assert metrics["rewards/first/std"] == 0.0
    assert metrics["rewards/second/mean"] == 15.0
    assert metrics["rewards/second/std"] == pytest.approx(50**0.5, rel=1e-12)  # unbiased: sqrt(2 * 25 / 1)
    assert metrics["rewards/unscored"] == pytest.approx(1 / 3)


def test_a_function_that_scored_nothing_has_no_mean():
    output = score(RewardSet([returning([None] * 3, "none"), returning([1.0] * 3, "one")]))
    assert "rewards/none/mean" not in output.metrics()
    assert output.rewards.tolist() == [1.0] * 3


def test_names_come_from_the_functions_and_never_collide():
    class Judge:
        def __call__(self, **_):
            return [0.0] * 3

    def judge(scale, **_):
        return [scale] * 3

    rewards = RewardSet([functools.partial(judge, 1.0), functools.partial(judge, 2.0), Judge()])
    assert rewards.names == ("judge", "judge_2", "Judge")
    assert score(rewards).rewards.tolist() == [3.0] * 3
    assert RewardSet([judge, Judge()], names=["x", "y"]).names == ("x", "y")


def test_async_functions_run_at_once_beside_plain_ones():
    gate_open = asyncio.Event

    class Pair:
        gate = None

    async def waits(completions, **_):
        Pair.gate = gate_open()
        await asyncio.wait_for(Pair.gate.wait(), 5)
        return [1.0] * len(completions)

    async def opens(completions, **_):
        while Pair.gate is None:
            await asyncio.sleep(0)
        Pair.gate.set()  # were they run one after the other, waits() would time out
        return [2.0] * len(completions)

    rewards = RewardSet([waits, returning([4.0] * 3), opens])
    assert score(rewards).each.tolist() == [[1.0, 4.0, 2.0]] * 3

    async def in_a_running_loop():
        return score(rewards)

    assert asyncio.run(in_a_running_loop()).rewards.tolist() == [7.0] * 3


def test_async_call_method():
    class Judge:
        async def __call__(self, completions, **_):
            await asyncio.sleep(0)
            return [1.0] * len(completions)

    assert score(RewardSet(Judge())).rewards.tolist() == [1.0] * 3


def test_a_function_cannot_disturb_the_next():
    def pops(completions, answer, **_):
        completions.pop()
        answer.clear()
        return [0.0] * 3

    def counts(completions, answer, **_):
        return [float(len(completions) + len(answer))] * 3

    columns = {"answer": ["x", "y", "z"]}
    assert score(RewardSet([pops, counts]), columns=columns).rewards.tolist() == [6.0] * 3
    assert columns["answer"] == ["x", "y", "z"]


# -- bad inputs -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", [1.0, "abc", None, {"a": 1}, torch.tensor(1.0), torch.zeros(3, 1), np.zeros((3, 1))])
def test_33_not_one_scalar_per_row(value):
    with pytest.raises(RewardError, match=r"'judge' must return a list with one number or None per completion \(3\)"):
        score(RewardSet(returning(value)))


@pytest.mark.parametrize("value", [[0.0, [1.0], 0.0], [0.0, torch.zeros(2), 0.0], [0.0, np.zeros(2), 0.0]])
def test_33_a_list_in_a_row(value):
    with pytest.raises(RewardError, match=r"'judge' returned .* for row 1") as caught:
        score(RewardSet(returning(value)))
    assert (caught.value.function, caught.value.row) == ("judge", 1)


@pytest.mark.parametrize("bad", [NAN, float("inf"), -float("inf"), torch.tensor(NAN), np.float32("nan"), 10**400])
def test_34_not_finite(bad):
    with pytest.raises(
        RewardError, match=r"'judge' returned (nan|-?inf) for row 2 at step 8; a reward must be finite"
    ) as e:
        score(RewardSet(returning([0.0, 0.0, bad])), state=SimpleNamespace(global_step=7))
    assert (e.value.function, e.value.step, e.value.row) == ("judge", 8, 2)


def test_35_36_none_is_unscored_warned_once_and_counted(caplog):
    rewards = RewardSet(returning([None, None, None]))
    with caplog.at_level(logging.WARNING, logger="rlft.rewards"):
        for _ in range(3):
            output = score(rewards)
    assert output.all_unscored
    assert output.unscored == 3
    messages = [record.message for record in caplog.records]
    assert len(messages) == 2
    assert "'judge' returned None" in messages[0]
    assert "no completion of a batch has a reward" in messages[1]
    rewards.funcs = (returning([1.0, None, None]),)
    assert not score(rewards).all_unscored


@pytest.mark.parametrize("value", [1, True, np.float32(1), np.int64(1), np.bool_(True), Fraction(1), torch.tensor(1)])
def test_37_other_numbers_are_taken_as_floats(value, caplog):
    rewards = RewardSet(returning([value] * 3))
    with caplog.at_level(logging.WARNING, logger="rlft.rewards"):
        assert score(rewards).rewards.tolist() == [1.0] * 3
        score(rewards)
    kinds = [r.message for r in caplog.records if "taken as a float" in r.message]
    assert len(kinds) == (0 if isinstance(value, np.floating) else 1)


@pytest.mark.parametrize(
    "value", [torch.tensor([1.0, 2.0, 3.0]), np.array([1.0, 2, 3]), np.array([1, 2, 3]), (1.0, 2.0, 3.0)]
)
def test_plain_arrays_are_lists(value):
    assert score(RewardSet(returning(value))).rewards.tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (["1.0", 0.0, 0.0], "of type str"),
        ([torch.tensor(1.0, requires_grad=True), 0.0, 0.0], "requires grad"),
        (torch.ones(3, requires_grad=True), "requires grad"),
        ([1j, 0.0, 0.0], "of type complex"),
    ],
)
def test_38_strings_and_gradients_are_refused(value, what):
    with pytest.raises(RewardError, match=what):
        score(RewardSet(returning(value)))


@pytest.mark.parametrize("count", [0, 2, 4])
def test_39_wrong_count(count):
    with pytest.raises(RewardError, match=rf"'judge' returned {count} rewards for 3 completions at step 6"):
        score(RewardSet(returning([1.0] * count)), state={"global_step": 5})


@pytest.mark.parametrize("timeout", [None, 5.0])
def test_40_raises_is_named_and_chained(timeout):
    def judge(**_):
        raise KeyError("boom")

    async def async_judge(**_):
        raise KeyError("boom")

    for func, name in ((judge, "judge"), (async_judge, "async_judge")):
        with pytest.raises(RewardError, match=rf"'{name}' raised KeyError: 'boom' at step 6") as caught:
            score(RewardSet(func, timeout=timeout), state=SimpleNamespace(global_step=5))
        assert isinstance(caught.value.__cause__, KeyError)
        assert caught.value.function == name


def test_41_a_hang_ends_at_the_limit():
    release = threading.Event()

    def hangs(**_):
        release.wait(20)

    async def hangs_async(**_):
        await asyncio.sleep(20)

    async def blocks(**_):
        release.wait(20)

    async def quick(**_):
        return [0.0] * 3

    for funcs, name in (([hangs], "hangs"), ([quick, hangs_async], "hangs_async"), ([blocks], "blocks")):
        start = time.monotonic()
        with pytest.raises(
            RewardError,
            match=rf"'{name}' did not return within 0.2 s at step 6, for rows 0 to 2; raise the reward timeout",
        ):
            score(RewardSet(funcs, timeout=0.2), state=SimpleNamespace(global_step=5))
        assert time.monotonic() - start < 10
    release.set()


def test_a_limit_that_is_kept_changes_nothing():
    def judge(completions, **_):
        assert not torch.is_grad_enabled()
        return [float(len(c)) for c in completions]

    with torch.no_grad():
        assert score(RewardSet(judge, timeout=10.0)).rewards.tolist() == [1.0, 2.0, 3.0]


def test_42_huge_is_finite_or_an_error():
    assert score(RewardSet(returning([1e30, -1e30, 0.0]))).rewards.tolist() == pytest.approx([1e30, -1e30, 0.0])
    for huge in ([1e39, 0.0, 0.0], [1e308, 0.0, 0.0]):
        with pytest.raises(RewardError, match=r"reward of row 0 .* does not fit float32"):
            score(RewardSet(returning(huge)))
    with pytest.raises(RewardError, match=r"row 0"):  # inf - inf must not pass for "unscored"
        score(RewardSet([returning([1e308] * 3, "a"), returning([1e308] * 3, "b")], weights=[1e10, -1e10]))


def test_poll_interrupts_between_and_within_functions():
    class Signal(Exception):
        pass

    calls = []

    def poll():
        calls.append(1)
        if len(calls) == 2:
            raise Signal

    with pytest.raises(Signal):
        score(RewardSet([returning([0.0] * 3), returning([0.0] * 3, "second")]), poll=poll)

    calls.clear()
    release = threading.Event()
    with pytest.raises(Signal):
        score(RewardSet(lambda **_: release.wait(20), timeout=20.0), poll=poll)
    release.set()


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"funcs": []}, "at least one reward function"),
        ({"funcs": ["math"]}, r"not callable: 'math'; turn a name into a function with load_reward"),
        ({"weights": [1.0, 2.0]}, r"one number per function \(1\), got 2"),
        ({"weights": [NAN]}, "reward_weights must be finite"),
        ({"weights": [0.0]}, "every reward weight is 0"),
        ({"names": ["a", "b"]}, "names must have one entry"),
        ({"timeout": 0.0}, "timeout must be > 0"),
        ({"funcs": [len, len], "names": ["a", "a"]}, "must differ"),
    ],
)
def test_wrong_settings(kwargs, match):
    with pytest.raises(ValueError, match=match):
        RewardSet(**{"funcs": [returning([0.0])], **kwargs})


def test_wrong_lengths_and_reserved_columns():
    rewards = RewardSet(returning([0.0] * 3))
    with pytest.raises(ValueError, match=r"answer must have one entry per completion \(3\), got 2"):
        score(rewards, columns={"answer": [1, 2]})
    with pytest.raises(ValueError, match=r"prompts must have one entry per completion \(3\), got 1"):
        rewards(["p"], COMPLETIONS, IDS)
    with pytest.raises(ValueError, match="column name 'completion_ids' is an argument"):
        score(rewards, columns={"completion_ids": IDS})


# -- whose thread it is ---------------------------------------------------------------------------------------------------
def limited(seconds: int, work):
    """As math-verify limits its parser: an alarm, which only the main thread may set."""
    import signal

    def late(number, frame):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        return work()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("timeout", [None, 30.0])
def test_a_reward_may_set_alarms_of_its_own(timeout):
    def judge(completions, **_):
        return limited(5, lambda: [float(len(c)) for c in completions])

    def late(completions, **_):
        return limited(1, lambda: time.sleep(20))

    assert score(RewardSet(judge, timeout=timeout), poll=lambda: None).rewards.tolist() == [1.0, 2.0, 3.0]
    with pytest.raises(RewardError, match=r"'late' raised TimeoutError: .*(in rows 0 to 2|for row 0)"):
        score(RewardSet(late, timeout=timeout and 2.5), poll=lambda: None)


def test_a_hang_ends_inside_the_function_and_nothing_comes_after_it():
    """What it opened is closed, what it catches does not keep it, and the next calls are not disturbed."""
    import signal

    before, closed = signal.getsignal(signal.SIGURG), []

    def catches(**_):
        for _ in range(4):
            try:
                time.sleep(20)
            except BaseException:
                closed.append(1)
                continue
        return [0.0] * 3

    def tidy(**_):
        try:
            threading.Event().wait(20)
        finally:
            closed.append(2)

    for func, expected in ((catches, [1] * 4), (tidy, [2])):
        closed.clear()
        with pytest.raises(RewardError, match=r"did not return within 0.2 s"):
            score(RewardSet(func, timeout=0.2))
        assert closed == expected
    time.sleep(0.4)  # longer than the watcher takes between two signals
    assert signal.getsignal(signal.SIGURG) == before
    assert threading.active_count() < 20
    assert not [t for t in threading.enumerate() if t.name == "rlft-reward-watch"]


def test_a_set_inside_a_reward_keeps_its_own_limit_and_that_of_the_outer_one():
    def slow(**_):
        time.sleep(20)

    inner = RewardSet(slow, timeout=10.0)

    def outer(prompts, completions, completion_ids, **_):
        return inner(prompts, completions, completion_ids).rewards.tolist()

    start = time.monotonic()
    with pytest.raises(RewardError, match=r"'outer' did not return within 0.3 s"):
        score(RewardSet(outer, timeout=0.3))
    quick = RewardSet(slow, timeout=0.2)

    def around(prompts, completions, completion_ids, **_):
        return quick(prompts, completions, completion_ids).rewards.tolist()

    with pytest.raises(
        RewardError, match=r"'around' raised RewardError: reward function 'slow' did not return within 0.2"
    ):
        score(RewardSet(around, timeout=10.0))
    assert time.monotonic() - start < 8


def test_in_another_thread_the_limit_is_kept_too():
    said = []

    def hangs(**_):
        time.sleep(5)

    def work():
        try:
            score(RewardSet(hangs, timeout=0.2))
        except RewardError as error:
            said.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(4)
    assert "did not return within 0.2 s" in said[0]


# -- which step, which row ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["plain", "async"])
def test_the_row_that_raises_is_found(kind):
    def judge(completions, note, **_):
        return [1 / (len(c) - 2) for c in completions]  # the second row

    async def judge_async(completions, note, **_):
        return judge(completions, note)

    func = judge if kind == "plain" else judge_async
    columns = {"note": ["x", "y", "z"]}
    with pytest.raises(
        RewardError, match=r"at step 5, for row 1, found by scoring rows one by one; return None"
    ) as caught:
        score(RewardSet(func, timeout=5.0), columns=columns, state=SimpleNamespace(global_step=4))
    assert (caught.value.row, caught.value.step) == (1, 5)


def test_rows_are_named_where_none_raises_alone():
    def judge(completions, **_):
        if len(completions) > 1:
            raise ValueError("together only")
        return [0.0]

    with pytest.raises(RewardError, match=r"raised ValueError: together only, in rows 0 to 2; return None") as caught:
        score(RewardSet(judge))
    assert caught.value.row is None


def test_the_search_for_a_row_ends_with_the_limit():
    def judge(completions, **_):
        if len(completions) > 1:
            raise ValueError("gone")
        time.sleep(20)

    start = time.monotonic()
    with pytest.raises(RewardError, match=r"raised ValueError: gone, in rows 0 to 2"):
        score(RewardSet(judge, timeout=0.3))
    assert time.monotonic() - start < 15


def test_an_evaluation_is_named_as_such():
    with pytest.raises(RewardError, match=r"returned nan for row 0 after step 4, in evaluation; a reward") as caught:
        score(RewardSet(returning([NAN, 0.0, 0.0])), state=SimpleNamespace(global_step=4, is_training=False))
    assert caught.value.step == 4


@pytest.mark.parametrize("training", [True, False])
def test_memory_names_what_helps(training):
    calls = []

    def judge(**_):
        calls.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    size = f"lower per_device_{'train' if training else 'eval'}_batch_size"
    with pytest.raises(RewardError, match=rf"'judge' ran out of memory \(CUDA .*for rows 0 to 2; score fewer .*{size}"):
        score(RewardSet(judge), state={"global_step": 4, "is_training": training})
    assert calls == [1]  # once more would not fit either
