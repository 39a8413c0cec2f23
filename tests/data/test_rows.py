from __future__ import annotations

import json
import random

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlft.data import Rows, load_rows
from rlft.data.rows import _load_hub


def lines(path, *prompts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    return path


def prompts(rows):
    return [row["prompt"] for row in rows]


def test_list_of_dicts_is_not_changed():
    source = [{"prompt": "x", "extra": 1}, {"prompt": "y"}]
    rows = load_rows(source)
    assert list(rows) == source
    assert rows.column_names == ["prompt", "extra"]
    rows[0]["prompt"] = "changed"
    assert source == [{"prompt": "x", "extra": 1}, {"prompt": "y"}]
    assert rows.where(1) == "row 1"
    assert load_rows(rows) is rows


def test_one_file_several_files_and_a_glob(tmp_path):
    a, b = lines(tmp_path / "a.jsonl", "1", "2"), lines(tmp_path / "b.jsonl", "3")
    assert prompts(load_rows(str(a))) == ["1", "2"]
    both = load_rows([b, str(a)])
    assert prompts(both) == ["3", "1", "2"]
    assert both.where(2) == f"{a}:2"
    assert prompts(load_rows(str(tmp_path / "*.jsonl"))) == ["1", "2", "3"]
    assert prompts(load_rows(str(tmp_path / "**" / "[ab].jsonl"))) == ["1", "2", "3"]
    with pytest.raises(ValueError, match="matches no file"):
        load_rows(str(tmp_path / "*.csv"))


@pytest.mark.parametrize("source", [[], "empty.jsonl", {}, 3, iter([{"prompt": "x"}]), [{"prompt": "x"}, "y"]])
def test_nothing_or_something_else_is_refused(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match=r"holds no rows|cannot read rows|row 1 must be a dict"):
        load_rows(source)


@pytest.mark.parametrize("source", ["no/such/file.jsonl", "./nothing", "/no/such", "two words", "a/b/c"])
def test_missing_file_is_not_looked_for_on_the_hub(source, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(ValueError, match="is not there"):
        load_rows(source)


class TestColumns:
    def test_rename(self, tmp_path):
        path = tmp_path / "a.jsonl"
        path.write_text('{"question": "x", "answer": "y", "n": 1}\n')
        rows = load_rows(path, columns={"prompt": "question", "completion": "answer"})
        assert list(rows) == [{"prompt": "x", "completion": "y", "n": 1}]
        assert rows[0] == {"prompt": "x", "completion": "y", "n": 1}
        assert rows.column_names == ["prompt", "completion", "n"]
        assert rows.where(0) == f"{path}:1"

    def test_missing_lists_a_near_miss(self):
        with pytest.raises(ValueError, match="did you mean 'question'"):
            load_rows([{"question": "x"}], columns={"prompt": "qestion"})

    def test_hiding_a_column_is_refused(self):
        with pytest.raises(ValueError, match="would hide the data's own column 'prompt'"):
            load_rows([{"question": "x", "prompt": "y"}], columns={"prompt": "question"})
        swapped = load_rows([{"a": "x", "prompt": "y"}], columns={"prompt": "a", "a": "prompt"})
        assert swapped[0] == {"prompt": "x", "a": "y"}

    def test_one_column_twice_is_refused(self):
        with pytest.raises(ValueError, match="under two names"):
            load_rows([{"q": "x"}], columns={"prompt": "q", "completion": "q"})


class TestFolder:
    def test_split_by_file_name_and_folder(self, tmp_path):
        lines(tmp_path / "train.jsonl", "1")
        lines(tmp_path / "dev.jsonl", "2")
        lines(tmp_path / "notes.jsonl", "9")
        lines(tmp_path / "test" / "part-1.jsonl", "3")
        lines(tmp_path / ".cache" / "train.jsonl", "8")
        (tmp_path / "dataset_infos.json").write_text("{}")
        (tmp_path / "README.md").write_text("no data")
        assert prompts(load_rows(tmp_path)) == ["1"]
        assert prompts(load_rows(str(tmp_path), split="validation")) == ["2"]
        assert prompts(load_rows(tmp_path, split="dev")) == ["2"]
        assert prompts(load_rows(tmp_path, split="test")) == ["3"]

    def test_hub_layout(self, tmp_path):
        for name, prompt in (
            ("train-00000-of-00002", "1"),
            ("train-00001-of-00002", "2"),
            ("test-00000-of-00001", "3"),
        ):
            (tmp_path / "data").mkdir(exist_ok=True)
            pq.write_table(pa.table({"prompt": [prompt]}), tmp_path / "data" / f"{name}.parquet")
        assert prompts(load_rows(tmp_path)) == ["1", "2"]
        assert prompts(load_rows(tmp_path, split="test")) == ["3"]

    def test_files_without_a_split_are_train(self, tmp_path):
        lines(tmp_path / "b.jsonl", "2")
        lines(tmp_path / "a.jsonl", "1")
        assert prompts(load_rows(tmp_path)) == ["1", "2"]
        with pytest.raises(ValueError, match="no split 'test'"):
            load_rows(tmp_path, split="test")

    def test_sub_folder_by_name(self, tmp_path):
        lines(tmp_path / "small" / "train.jsonl", "1")
        lines(tmp_path / "large" / "train.jsonl", "2")
        assert prompts(load_rows(tmp_path, name="small")) == ["1"]
        with pytest.raises(ValueError, match="is no folder"):
            load_rows(tmp_path, name="medium")

    def test_the_same_in_two_kinds_is_refused(self, tmp_path):
        lines(tmp_path / "train.jsonl", "1")
        (tmp_path / "train.csv").write_text("prompt\n1\n")
        with pytest.raises(ValueError, match=r"\.csv and \.jsonl"):
            load_rows(tmp_path)

    def test_without_data_is_refused(self, tmp_path):
        (tmp_path / "README.md").write_text("nothing")
        with pytest.raises(ValueError, match="holds no data file"):
            load_rows(tmp_path)

    def test_links_out_of_the_folder_are_refused(self, tmp_path):
        outside = lines(tmp_path / "outside" / "secret.jsonl", "s")
        folder = tmp_path / "data"
        folder.mkdir()
        (folder / "train.jsonl").symlink_to(outside)
        with pytest.raises(ValueError, match="link out of"):
            load_rows(folder)
        with pytest.raises(ValueError, match="link out of"):
            load_rows(str(folder / "*.jsonl"))
        inside = lines(folder / "real.txt", "1")
        (folder / "train.jsonl").unlink()
        (folder / "train.jsonl").symlink_to(inside)
        assert prompts(load_rows(folder)) == ["1"]

    def test_snapshot_of_the_hub_cache_links_to_its_blobs(self, tmp_path):
        blob = lines(tmp_path / "datasets--a--b" / "blobs" / "0123", "1")
        snapshot = tmp_path / "datasets--a--b" / "snapshots" / "main"
        snapshot.mkdir(parents=True)
        (snapshot / "train.jsonl").symlink_to(blob)
        assert prompts(load_rows(snapshot)) == ["1"]


class TestDatasets:
    def test_in_memory(self):
        source = datasets.Dataset.from_list([{"prompt": "x", "n": 1}, {"prompt": "y", "n": 2}])
        rows = load_rows(source.with_format("numpy"))
        assert list(rows) == [{"prompt": "x", "n": 1}, {"prompt": "y", "n": 2}]
        assert type(rows[0]["n"]) is int
        assert prompts(rows.select([1, 0])) == ["y", "x"]
        renamed = load_rows(source, columns={"answer": "n"})
        assert renamed[1] == {"prompt": "y", "answer": 2}

    def test_dict_of_splits(self):
        both = datasets.DatasetDict(
            train=datasets.Dataset.from_list([{"prompt": "x"}]), test=datasets.Dataset.from_list([{"prompt": "y"}])
        )
        assert prompts(load_rows(both)) == ["x"]
        assert prompts(load_rows(both, split="test")) == ["y"]
        with pytest.raises(ValueError, match="did you mean 'test'"):
            load_rows(both, split="tests")

    def test_iterable_is_sent_to_the_stream(self):
        source = datasets.Dataset.from_list([{"prompt": "x"}]).to_iterable_dataset()
        with pytest.raises(ValueError, match="streaming: true"):
            load_rows(source)

    def test_saved_to_disk(self, tmp_path):
        both = datasets.DatasetDict(
            train=datasets.Dataset.from_list([{"prompt": "x"}, {"prompt": "z"}]),
            test=datasets.Dataset.from_list([{"prompt": "y"}]),
        )
        both.save_to_disk(str(tmp_path / "saved"))
        assert prompts(load_rows(tmp_path / "saved")) == ["x", "z"]
        assert prompts(load_rows(tmp_path / "saved" / "test")) == ["y"]
        with pytest.raises(ValueError, match="no split 'dev'"):
            load_rows(tmp_path / "saved", split="dev")

    @pytest.mark.parametrize("name", ["../../secret.arrow", "/etc/passwd", "data.pkl", "sub/x.arrow"])
    def test_saved_state_cannot_name_other_files(self, tmp_path, name):
        datasets.Dataset.from_list([{"prompt": "x"}]).save_to_disk(str(tmp_path / "saved"))
        (tmp_path / "saved" / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
        with pytest.raises(ValueError, match=r"expected \.arrow files of the same folder"):
            load_rows(tmp_path / "saved")

    def test_hub_loader_on_a_local_folder(self, tmp_path):
        lines(tmp_path / "repo" / "train.jsonl", "1", "2")
        lines(tmp_path / "repo" / "test.jsonl", "3")
        cache = str(tmp_path / "cache")
        assert prompts(_load_hub(str(tmp_path / "repo"), "train", None, None, cache_dir=cache)) == ["1", "2"]
        assert prompts(_load_hub(str(tmp_path / "repo"), "test", None, None, cache_dir=cache)) == ["3"]
        with pytest.raises(ValueError, match=r"split 'dev'.*Unknown split"):
            _load_hub(str(tmp_path / "repo"), "dev", None, None, cache_dir=cache)

    def test_hub_scripts_are_refused(self, tmp_path):
        repo = tmp_path / "repo"
        repo.mkdir()
        (repo / "repo.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
        with pytest.raises(ValueError, match="could not be loaded from the hub"):
            _load_hub(str(repo), "train", None, None, cache_dir=str(tmp_path / "cache"))
        assert not (tmp_path / "ran").exists()

    def test_hub_name_reaches_the_hub_with_its_arguments(self, monkeypatch):
        seen = {}

        def fake(path, **kwargs):
            seen.update(path=path, **kwargs)
            return datasets.Dataset.from_list([{"prompt": "x"}])

        monkeypatch.setattr(datasets, "load_dataset", fake)
        load_rows("org/some-data", split="test", name="small", revision="abc")
        assert seen == {"path": "org/some-data", "split": "test", "name": "small", "revision": "abc"}

    def test_files_write_nothing_anywhere(self, tmp_path, monkeypatch):
        lines(tmp_path / "train.jsonl", "1")
        before = sorted(tmp_path.rglob("*"))
        opened = []
        import builtins

        real = builtins.open
        monkeypatch.setattr(builtins, "open", lambda *a, **k: opened.append((a, k)) or real(*a, **k))
        load_rows(tmp_path)
        assert sorted(tmp_path.rglob("*")) == before
        assert not any("w" in str(a[1:]) or "w" in str(k.get("mode", "")) for a, k in opened)


class TestRows:
    def test_slices_and_negative_indices(self):
        rows = Rows([{"prompt": str(i)} for i in range(6)])
        assert prompts(rows[1:5][::2]) == ["1", "3"]
        assert rows[-1] == {"prompt": "5"}
        assert rows[2:].where(1) == "row 3"
        with pytest.raises(IndexError):
            rows[6]
        with pytest.raises(IndexError):
            rows.select([6])

    def test_split_keeps_a_prompt_on_one_side(self):
        rows = Rows([{"prompt": f"p{i % 20}", "n": i} for i in range(100)])
        state = random.getstate()
        kept, held = rows.split(0.2, seed=1)
        assert random.getstate() == state
        assert len(kept) == 80
        assert len(held) == 20
        assert not {row["prompt"] for row in kept} & {row["prompt"] for row in held}
        assert sorted(row["n"] for part in (kept, held) for row in part) == list(range(100))
        assert [row["n"] for row in rows.split(0.2, seed=1)[1]] == [row["n"] for row in held]
        assert [row["n"] for row in rows.split(0.2, seed=2)[1]] != [row["n"] for row in held]

    @pytest.mark.parametrize("fraction", [0.0, 1.0, 1.5, float("nan")])
    def test_split_refuses_an_empty_side(self, fraction):
        with pytest.raises(ValueError, match=r"fraction|empty"):
            Rows([{"prompt": "a"}, {"prompt": "b"}]).split(fraction)
