from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlft.data.files import read_file


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_json_lines_know_their_line(tmp_path):
    path = write(tmp_path / "a.jsonl", '\ufeff{"prompt": "x", "n": [1, 2.5]}\n\n{"prompt": "\u2028é"}')
    rows, places = read_file(path)
    assert rows == [{"prompt": "x", "n": [1, 2.5]}, {"prompt": "\u2028é"}]
    assert places == [f"{path}:1", f"{path}:3"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "x"', "broken JSON"),
        ('{"prompt": x}', "column 12"),
        ("[1, 2]", "expected an object"),
        ('"text"', "expected an object"),
        ('{"prompt": "x", "prompt": "y"}', "key 'prompt' appears twice"),
        ('{"m": [{"role": "user", "role": "x"}]}', "key 'role' appears twice"),
        ('{"n": ' + "9" * 5000 + "}", "digit"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_broken_line_is_refused_with_file_and_line(tmp_path, line, said):
    path = write(tmp_path / "a.jsonl", '{"prompt": "ok"}\n' + line + "\n")
    with pytest.raises(ValueError, match=said) as error:
        read_file(path)
    assert f"{path}:2" in str(error.value)


def test_bad_utf8_reaches_the_row_as_lone_surrogates(tmp_path):
    rows, _ = read_file(write(tmp_path / "a.jsonl", b'{"prompt": "a\xff"}\n{"prompt": "b"}\n'))
    assert rows == [{"prompt": "a\udcff"}, {"prompt": "b"}]


def test_utf16_is_refused(tmp_path):
    with pytest.raises(ValueError, match="UTF-16"):
        read_file(write(tmp_path / "a.jsonl", '{"prompt": "x"}'.encode("utf-16")))


def test_json_list_lines_and_single_object(tmp_path):
    rows = [{"prompt": "x"}, {"prompt": "y"}]
    assert read_file(write(tmp_path / "a.json", json.dumps(rows, indent=1)))[0] == rows
    lines = write(tmp_path / "b.json", "\n".join(json.dumps(row) for row in rows))
    assert read_file(lines) == (rows, [f"{lines}:1", f"{lines}:2"])
    assert read_file(write(tmp_path / "c.json", '{"prompt": "x"}\n'))[0] == rows[:1]
    assert read_file(write(tmp_path / "d.json", ""))[0] == []
    with pytest.raises(ValueError, match=r"e\.json: expected a list of objects"):
        read_file(write(tmp_path / "e.json", '{\n"prompt": ["x"]\n}'))
    with pytest.raises(ValueError, match=r"f\.json\[1\]: expected an object"):
        read_file(write(tmp_path / "f.json", '[{"prompt": "x"}, 3]'))


def test_csv_converts_everything_but_text(tmp_path):
    path = write(
        tmp_path / "a.csv",
        'prompt,completion,label,margin,n,code\n"2, 2",4,True,0.5,1,007\n"a\nb",5,false,2,-3,7\nc,,TRUE,,4,8\n',
    )
    rows, places = read_file(path)
    assert rows == [
        {"prompt": "2, 2", "completion": "4", "label": True, "margin": 0.5, "n": 1, "code": "007"},
        {"prompt": "a\nb", "completion": "5", "label": False, "margin": 2.0, "n": -3, "code": "7"},
        {"prompt": "c", "completion": "", "label": True, "margin": None, "n": 4, "code": "8"},
    ]  # fmt: skip
    assert places == [f"{path}:2", f"{path}:3", f"{path}:5"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prompt,n\nx\n", r":2: expected 2 cells \(prompt, n\), got 1"),
        ("prompt,n\nx,1\ny,1,2\n", ":3: expected 2 cells"),
        ("prompt,prompt\nx,y\n", "'prompt' appears twice"),
        ("prompt,\nx,y\n", "no name"),
        ('prompt,n\n"x"y,2\n', ":2: broken CSV"),
        ('prompt,n\n"x,2\n', "broken CSV"),
    ],
)
def test_broken_csv_is_refused_with_file_and_line(tmp_path, text, said):
    with pytest.raises(ValueError, match=said):
        read_file(write(tmp_path / "a.csv", text))


def test_csv_reads_long_cells_and_leaves_the_global_limit(tmp_path):
    csv.field_size_limit(131_072)  # the module's own default
    rows, _ = read_file(write(tmp_path / "a.csv", "prompt\n" + "x" * 300_000 + "\n"))
    assert len(rows[0]["prompt"]) == 300_000
    assert csv.field_size_limit() == 131_072


def test_parquet_and_arrow(tmp_path):
    rows = [{"prompt": "x", "m": [{"role": "user"}]}, {"prompt": None, "m": []}]
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=1)
    assert read_file(tmp_path / "a.parquet") == (rows, [f"{tmp_path}/a.parquet[0]", f"{tmp_path}/a.parquet[1]"])
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    assert read_file(tmp_path / "a.arrow")[0] == rows


def test_parquet_with_bad_utf8(tmp_path):
    bad = pa.array([b"a\xff", None, b"b"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"prompt": bad}), tmp_path / "a.parquet")
    assert [row["prompt"] for row in read_file(tmp_path / "a.parquet")[0]] == ["a\udcff", None, "b"]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_damaged_table_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=name):
        read_file(write(tmp_path / name, b"PAR1 not really"))


def test_unknown_suffix_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected one of \.jsonl"):
        read_file(write(tmp_path / "a.pkl", b"\x80\x04."))
