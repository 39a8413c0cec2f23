"""Mutated settings and files: an error of the library's own, soon, in little memory; `make fuzz` runs 10,000 of each."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlft import cli
from tests.fuzz import configs, files
from tests.fuzz.bounds import Tally, memory, own

#: Share of the quick cases that goes to each kind of file.
QUICK = {"safetensors": 60, "manifests": 60, "adapters": 40, "models": 20, "data": 100, "logs": 20}


def test_mutated_settings(tmp_path: Path) -> None:
    tally = configs.series(300, tmp_path)
    tally.check()
    assert tally.accepted >= 10
    assert tally.refused["ConfigError"] >= 200


def test_mutated_settings_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said() -> str:
        captured = capsys.readouterr()
        return captured.out + captured.err

    tally = configs.commands(60, tmp_path, said)
    tally.check()
    assert tally.accepted >= 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", files.SERIES)
def test_mutated_files(kind: str, tmp_path: Path) -> None:
    tally = files.SERIES[kind](QUICK[kind], tmp_path)
    tally.check()
    assert 0 < tally.accepted < tally.cases


def test_what_is_not_the_librarys_own_is_seen(tmp_path: Path) -> None:
    def raises(error: Exception) -> None:
        raise error

    tally = Tally("control")
    for error in (KeyError("x"), ValueError("raised here"), OSError("x"), RuntimeError("x")):
        tally.run("case", lambda error=error: raises(error))
    assert len(tally.failures) == 4
    with pytest.raises(AssertionError, match=r"KeyError at test_inputs\.py"):
        tally.check()
    slow = Tally("slow")
    slow.run("imports", lambda: None)
    slow.run("case", lambda: sum(i * i for i in range(40_000_000)))
    assert "took" in slow.failures[0]
    hungry = Tally("hungry")
    hungry.run(
        "case", lambda: bytearray(b"x") * (memory() + 300 * 2**20)
    )  # what is measured is the peak of the process
    assert any("MiB" in failure for failure in hungry.failures)


def test_found_by_mutation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What earlier series found, each in its smallest form."""
    from rlft.config import ConfigError, load_config
    from rlft.data import load_rows
    from rlft.models.folder_checks import read_json

    for said in (
        "epsilon=!!int ''",
        "beta=!!timestamp x",
        f"beta=1{'0' * 400}",
        'separator="\\ud800"',
        'output_dir="a\\0b"',
    ):
        with pytest.raises(ConfigError):
            load_config(None, ["objective=dpo", said])
    with pytest.raises(ConfigError, match="columns must be dict"):
        load_config(None, ["columns={prompt: [1]}"])
    path = tmp_path / "deep.json"
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is not valid JSON"):
        read_json(path)
    assert cli.main(["train", "objective=dpo", "seed=!!int ''"]) == 2
    assert "Traceback" not in capsys.readouterr().err

    import pyarrow as pa

    table = pa.table({"prompt": ["a", "b"]})
    with pa.OSFile(str(tmp_path / "x.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    sound = (tmp_path / "x.arrow").read_bytes()
    offsets = b"".join(i.to_bytes(4, "little") for i in (0, 1, 2, 0)) + b"ab"
    assert sound.count(offsets) == 1
    # past the end of the text: reading it ended the process
    beyond = offsets[:8] + (2**30).to_bytes(4, "little") + offsets[12:]
    (tmp_path / "x.arrow").write_bytes(sound.replace(offsets, beyond))
    with pytest.raises(ValueError, match="is no readable Arrow stream") as caught:
        load_rows(tmp_path / "x.arrow")
    assert own(caught.value)
