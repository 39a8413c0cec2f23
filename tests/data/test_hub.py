"""Datasets of the hub by name: read whole or streamed, with a configuration, from a folder laid out as on the hub."""

from __future__ import annotations

import itertools
import json
import pickle
from pathlib import Path
from typing import Any

import datasets
import pytest

from rlft.config import Config, ConfigError, load_config
from rlft.data import load_rows, stream_rows
from rlft.data.hub import HubRows, is_hub_name
from rlft.run.setup.data import load_setting
from tests.trainer.common import resumed_equals_whole, run

NAME = "acme/sums"
CARD = """---
configs:
- config_name: easy
  data_files:
  - {split: train, path: easy/train-*.jsonl}
  - {split: test, path: easy/test.jsonl}
- config_name: hard
  data_files:
  - {split: train, path: hard/train.jsonl}
---
"""


def rows(start: int, count: int) -> list[dict[str, str]]:
    return [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(start, start + count)]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset with two configurations behind the name ``acme/sums``; the real loader reads it, and no network."""
    folder = tmp_path / "hub"
    for name, start, count in (
        ("easy/train-0", 0, 6),
        ("easy/train-1", 6, 6),
        ("easy/test", 50, 3),
        ("hard/train", 100, 8),
    ):
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows(start, count)))
    (folder / "README.md").write_text(CARD)
    real = datasets.load_dataset

    def load(path: str, **options: Any) -> Any:
        assert path == NAME, f"asked the hub for {path}"
        return real(str(folder), cache_dir=str(tmp_path / "cache"), **options)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.chdir(tmp_path)
    return folder


def prompts(found: Any) -> list[str]:
    return [row["prompt"] for row in found]


def test_what_is_a_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert all(is_hub_name(name) for name in (NAME, "gsm8k", "a.b/c-d_e"))
    assert not any(
        is_hub_name(name) for name in ("here", "a/b/c", "x.jsonl", "./a", "/a", "~a", "a/*", "", Path("a"), None)
    )


@pytest.mark.parametrize("name", ["easy", "hard"])
def test_streamed_rows_are_those_that_are_read_whole(hub: Path, name: str) -> None:
    whole, streamed = load_rows(NAME, name=name), stream_rows(NAME, name=name)
    expected = prompts(rows(0, 12)) if name == "easy" else prompts(rows(100, 8))
    assert prompts(whole) == prompts(streamed()) == prompts(streamed()) == expected
    assert dict(next(streamed())) == whole[0]
    assert prompts(stream_rows(NAME, name="easy", split="test")()) == prompts(rows(50, 3))
    renamed = stream_rows(NAME, name=name, columns={"completion": "prompt", "prompt": "completion"})
    assert next(renamed())["completion"] == expected[0]


def test_a_list_may_mix_names_and_files(hub: Path) -> None:
    own = hub / "hard" / "train.jsonl"
    assert prompts(stream_rows([NAME, str(own)], name="easy")()) == prompts(rows(0, 12) + rows(100, 8))


def test_a_reader_can_be_sent_to_another_process(hub: Path) -> None:
    again = pickle.loads(pickle.dumps(stream_rows(NAME, name="hard")))
    assert prompts(again()) == prompts(rows(100, 8))


def test_a_configuration_that_is_missing_or_unknown_says_which_there_are(hub: Path) -> None:
    for read in (lambda: load_rows(NAME), lambda: next(stream_rows(NAME)())):
        with pytest.raises(
            ValueError, match=r"could not be loaded from the hub.*configuration None.*easy.*hard.*set dataset_config"
        ):
            read()
    with pytest.raises(ValueError, match=r"configuration 'medium'.*not found.*easy"):
        next(stream_rows(NAME, name="medium")())


def test_a_connection_that_breaks_off_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def with_format(self, kind: Any) -> Any:
            return (json.loads(line) for line in ('{"prompt": "a"}', '{"prompt": "b"}', "no JSON"))

    monkeypatch.setattr(datasets, "load_dataset", lambda path, **options: Broken())
    read = HubRows("org/data")()
    assert prompts(itertools.islice(read, 2)) == ["a", "b"]
    with pytest.raises(OSError, match="'org/data' on the hub ended after 2 rows: JSONDecodeError"):
        next(read)


# -- in a run -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("streaming", [False, True])
def test_runs_train_on_the_configuration_that_is_named(hub: Path, tmp_path: Path, streaming: bool) -> None:
    t = run(
        tmp_path, "sft", rows=NAME, online=False, dataset_config="hard", eval_data=NAME, eval_dataset_config="easy", eval_rows=2,
        streaming=streaming, max_steps=2,
    )  # fmt: skip
    assert {e.prompt for e in t.train_data.examples} == {*prompts(rows(100, 8))}
    assert {e.prompt for e in t.eval_data.examples} == {*prompts(rows(0, 2))}
    assert "eval_loss" in t.train()
    assert "eval_loss" in t.evaluate([{"prompt": "2+2=", "completion": "4"}]), "rows of one's own have no configuration"


def test_a_streamed_run_resumes_at_the_row(hub: Path, tmp_path: Path) -> None:
    resumed_equals_whole(
        tmp_path,
        "sft",
        2,
        rows=NAME,
        online=False,
        dataset_config="easy",
        streaming=True,
        shuffle_buffer=4,
        max_steps=5,
    )


def test_the_configuration_is_part_of_what_a_run_is() -> None:
    one, other = (load_config(None, [f"dataset_config={name}", "train_data=acme/sums"]) for name in ("easy", "hard"))
    assert one.digest() != other.digest()


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("train_data", {"dataset_config": "easy", "train_data": "rows.jsonl"}, "train_data='rows.jsonl' names no hub dataset"),
    ("train_data", {"dataset_config": "easy", "train_data": "hub"}, "drop it, or name the sub-folder in train_data"),
    ("train_data", {"dataset_config": "easy", "train_data": [NAME, "hub"]}, "names no hub dataset"),
    ("train_data", {"dataset_config": "easy"}, "dataset_config='easy' does nothing: train_data is not given"),
    ("eval_data", {"eval_dataset_config": "easy"}, "eval_dataset_config='easy' does nothing: eval_data is not given"),
    ("eval_data", {"eval_dataset_config": "easy", "eval_data": "hub"}, "or name the sub-folder in eval_data"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "settings", "message"), REFUSED, ids=range(len(REFUSED)))
def test_a_configuration_of_nothing_is_refused(
    hub: Path, tmp_path: Path, name: str, settings: dict[str, Any], message: str
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows(0, 1)[0]) + "\n")
    config = Config.from_dict(settings)
    with pytest.raises(ConfigError, match=message):
        load_setting(config, name, None)


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_in_memory_have_no_configuration(tmp_path: Path, streaming: bool) -> None:
    with pytest.raises(ConfigError, match=r"dataset_config='easy' does nothing: rows are given in memory.*drop it"):
        run(tmp_path, "sft", rows=rows(0, 8), online=False, dataset_config="easy", streaming=streaming)
