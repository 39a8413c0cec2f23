"""load_reward: built-in names, options, a user's own code; nothing is evaluated."""

from __future__ import annotations

import sys

import pytest

from rlft.rewards import BUILTIN_REWARDS, MathVerifier, RewardSet, SoftOverlong, load_reward


def test_a_callable_is_returned():
    assert load_reward(len) is len


@pytest.mark.parametrize("name", sorted(set(BUILTIN_REWARDS) - {"regex"}))
def test_every_name_gives_a_working_reward(name):
    if name == "math_verify":
        pytest.importorskip("math_verify")
    reward = load_reward(name)
    columns = {"answer": ["5", "5"], "numbers": [[1.0], [1.0]]}
    output = RewardSet(reward)(["p", "p"], ["#### 5", "x"], [[1], [2]], columns)
    assert output.rewards.shape == (2,)
    assert output.names == (reward.__name__,)


def test_options():
    reward = load_reward({"name": "soft_overlong", "max_length": 10, "cache": 5})
    assert isinstance(reward, SoftOverlong)
    assert (reward.max_length, reward.cache) == (10, 5)
    assert isinstance(load_reward("math", tolerance=0.1), MathVerifier)
    pytest.importorskip("sympy")
    verifier = load_reward({"name": "math", "symbolic": True})
    verifier.symbolic.timeout = 20.0
    assert verifier(completions=["#### 1 + x", "#### x"], answer=["x + 1", "x + 1"]) == [1.0, 0.0]
    verifier.symbolic.close()


def test_a_pattern_is_an_option():
    assert load_reward("regex", pattern="a+")(completions=["aa"]) == [1.0]


@pytest.mark.parametrize(
    ("spec", "options", "match"),
    [
        ("maths", {}, "reward 'maths' is unknown; did you mean 'math'"),
        ("zzz", {}, "unknown; known: equation.*write 'module:function'"),
        ("math", {"tolerence": 1}, "does not take these options.*tolerence"),
        ("regex", {}, "does not take these options.*pattern"),
        ({"tolerance": 1}, {}, "needs a 'name'"),
        (5, {}, "a reward is a callable, a name or a mapping, got int"),
        ("os:system('x')", {}, "must read 'module:function'"),
        ("os.path :join", {}, "is no module name"),
        ("__import__('os'):getpid", {}, "is no module name"),
        (":f", {}, "must read 'module:function'"),
        ("no_such_module_at_all:f", {}, "cannot be imported"),
        ("no/such/file.py:f", {}, "does not exist"),
        ("json:lods", {}, "has no function 'lods'; did you mean 'loads'"),
        ("json:loads", {"a": 1}, "do nothing for 'json:loads'"),
    ],
)
def test_what_is_refused(spec, options, match):
    with pytest.raises(ValueError, match=match):
        load_reward(spec, **options)


def test_own_code_from_a_module_and_from_files_of_one_name(tmp_path):
    assert load_reward("rlft.rewards:math_reward").__name__ == "math_reward"
    for number in (1, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "own.py").write_text(f"def judge(completions, **_):\n    return [{number}.0] * len(completions)\n")
    first, second = (load_reward(f"{tmp_path / str(n) / 'own.py'}:judge") for n in (1, 2))
    assert (first(completions=["x"]), second(completions=["x"])) == ([1.0], [2.0])
    assert load_reward(f"{tmp_path / '1' / 'own.py'}:judge") is first
    assert "own" not in sys.modules


def test_a_file_that_fails_to_load_leaves_nothing_behind(tmp_path):
    (tmp_path / "bad.py").write_text("raise RuntimeError('no')\n")
    before = set(sys.modules)
    for _ in range(2):
        with pytest.raises(ValueError, match="cannot be run: RuntimeError: no; try"):
            load_reward(f"{tmp_path / 'bad.py'}:judge")
    assert set(sys.modules) == before
