"""Canaries: secrets planted where a run meets them reach no file and no line that a run leaves."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import rlft
from rlft._redact import LOGGERS, redact, secret_keys
from rlft.config import Config, ConfigError, load_config
from tests.bad_input.common import ANSWERS, MODEL, trainer, varied

ROOT = Path(__file__).parents[2]

#: In the environment, under names that say what they are; some have a shape that gives them away, some do not.
ENVIRONMENT = {
    "HF_TOKEN": "hf_" + "EnvCanary0123456789abcd",
    "WANDB_API_KEY": "plainenvironmentcanary",
    "SERVICE_PASSWORD": "open sesame canary",
    "AWS_SECRET_ACCESS_KEY": "wJalrCanaryKEY/abc+def",
    "KAGGLE_KEY": "0123456789canary0123456789",
    "PGPASSWORD": "correct-horse-canary",
    "MYSQL_PWD": "battery-staple-canary",
    "HF_TOKEN_READ": "plaincanarytoread",
    "OPENAI_KEY": "plaincanaryofopenai",
    "AZURE_STORAGE_KEY": "canarystorage1234==",
    "kaggle_pat": "lowercasecanary",
}
#: In a setting's value, by mistake.
SETTING = "sk-" + "SettingCanary0123456789"
#: In columns of the data that nobody asked for.
METADATA = {
    "api_key": "metadata-canary-one",
    "owner": "metadata-canary-two",
    "nested": {"token": "metadata-canary-three"},
}
#: In the text of an error that a library raises.
ERROR = "hf_" + "ErrorCanary0123456789abcd"
#: In a link, with what a password may hold.
LINK = "link/canary@home"
CANARIES = [*ENVIRONMENT.values(), SETTING, "metadata-canary", ERROR, "link/canary"]

REWARD = f"""
import logging, os

def fine(completions, **columns):
    return [float(len(c) % 5) + 0.1 * i for i, c in enumerate(completions)]

def fails(completions, **columns):
    for name in {sorted(set(ENVIRONMENT))}:
        logging.getLogger("rlft").warning("%s was %s", "it", os.environ[name])
        logging.getLogger("rlft.rewards").info(f"again {{os.environ[name]}}, postgres://u:{LINK}@host/db")
    raise RuntimeError(f"{{[os.environ[name] for name in {sorted(ENVIRONMENT)}]}} postgres://u:{LINK}@host/db "
        f"401 for https://user:{{os.environ['SERVICE_PASSWORD']}}@host, token {ERROR}, Bearer {{os.environ['HF_TOKEN']}}")
"""

#: Every command in one process: importing torch is most of the cost.
SCRIPT = """
import json, sys, warnings, logging
logging.basicConfig(level=logging.DEBUG)
for noisy in ("matplotlib", "PIL", "urllib3", "filelock"):
    logging.getLogger(noisy).setLevel(logging.WARNING)
from rlft import cli
for argv in json.load(open(sys.argv[1])):
    print("RUN", argv, flush=True)
    print("EXIT", cli.main(argv), flush=True)
"""


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of all runs, and everything that was printed."""
    folder = tmp_path_factory.mktemp("canaries")
    inputs = folder / "inputs"
    inputs.mkdir()
    (inputs / "canary_rewards.py").write_text(REWARD)
    rows = [{**row, **METADATA, "answer": row["completion"]} for row in ANSWERS]
    (inputs / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = {
        "model": MODEL, "tokenizer": {"kind": "char"}, "train_data": str(inputs / "data.jsonl"), "max_steps": 2, "save_steps": 1,
        "max_prompt_length": 8, "max_completion_length": 6, "run_name": f"canaries {SETTING}", "report": True, "eval_fraction": 0.25,
        "per_device_train_batch_size": 4, "log_completions": 1,
    }  # fmt: skip
    online = {"objective": "rloo", "beta": 0.1, "num_generations": 4}
    runs = {
        "offline": {"objective": "sft"},
        "online": {**online, "rewards": ["canary_rewards:fine"]},
        "failing": {**online, "rewards": ["canary_rewards:fails"], "eval_fraction": None},
        "refused": {"objective": "sft", "tokenizer": {"kind": "char", "hub_token": ENVIRONMENT["HF_TOKEN"]}},
        "typo": {"objective": "sft", "hub_token": ENVIRONMENT["HF_TOKEN"], "max_step": 3},
        "wrong type": {"objective": "sft", "max_steps": SETTING},
    }
    commands = []
    for name, settings in runs.items():
        path = inputs / f"{name}.yaml"
        path.write_text(json.dumps({**base, "output_dir": str(folder / "runs" / name), **settings}))
        commands.append(["train", str(path)])
    commands += [
        ["train", str(inputs / "failing.yaml"), "--traceback"],
        ["train", str(inputs / "online.yaml"), "max_steps=3"],
    ]
    commands += [["doctor", str(folder / "runs" / name)] for name in ("online", "failing")]
    commands += [
        [
            "report",
            str(folder / "runs" / "offline"),
            str(folder / "runs" / "online"),
            "--output",
            str(folder / "runs/r.html"),
        ]
    ]
    (inputs / "commands.json").write_text(json.dumps(commands))
    environment = {
        **os.environ,
        **ENVIRONMENT,
        "PYTHONPATH": f"{ROOT}:{inputs}",
        "OMP_NUM_THREADS": "1",
        "MPLBACKEND": "Agg",
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(inputs / "commands.json")],
        capture_output=True, text=True, timeout=560, check=False, env=environment, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout + done.stderr


def test_the_runs_did_what_they_should(outputs: tuple[Path, str]) -> None:
    """Else silence would prove nothing."""
    folder, printed = outputs
    codes = [int(line.split()[1]) for line in printed.splitlines() if line.startswith("EXIT")]
    assert codes[:9] == [0, 0, 1, 2, 2, 2, 1, 2, 0]
    assert (len(codes), codes[-1]) == (11, 0)
    assert "Traceback (most recent call last)" in printed
    assert "401 for https://" in printed
    assert "[redacted]" in printed
    files = {path.name for path in (folder / "runs").rglob("*") if path.is_file()}
    assert {
        "metrics.jsonl",
        "config.json",
        "summary.json",
        "run.json",
        "report.html",
        "r.html",
        "manifest.json",
    } <= files
    assert any(name.startswith("events.out.tfevents") for name in files) or not _has_tensorboard()


def _has_tensorboard() -> bool:
    import importlib.util

    return importlib.util.find_spec("tensorboard") is not None


@pytest.mark.parametrize("canary", CANARIES, ids=range(len(CANARIES)))
def test_no_canary_is_printed(outputs: tuple[Path, str], canary: str) -> None:
    where = outputs[1].find(canary)
    assert where < 0, outputs[1][max(0, where - 300) : where + 60]


@pytest.mark.parametrize("canary", CANARIES, ids=range(len(CANARIES)))
def test_no_canary_is_written(outputs: tuple[Path, str], canary: str) -> None:
    written = [path for path in (outputs[0] / "runs").rglob("*") if path.is_file()]
    assert len(written) > 30
    assert [str(path) for path in written if canary.encode() in path.read_bytes()] == []


# -- settings named like secrets --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "place"),
    [
        ({"rewards": [{"name": "math", "api_key": "x"}]}, r"rewards\[0\]\.api_key"),
        ({"tokenizer": {"kind": "char", "hf_token": "x"}}, r"tokenizer\.hf_token"),
        ({"model": {"model_type": "llama", "auth": {"password": 5}}}, r"model\.auth\.password"),
        ({"objective_args": {"secret": "x"}}, r"objective_args\.secret"),
    ],
)
def test_settings_that_look_like_secrets_are_refused(settings: dict, place: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{place} looks like a secret.*environment.*drop {place}"):
        Config(**settings)


def test_a_secret_on_the_command_line_is_refused_without_being_repeated() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["tokenizer.hub_token=quite-secret"])
    assert "quite-secret" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:.*repeat an earlier one", "ignore:.*a prompt that is trained on")
def test_samples_on_the_screen_are_redacted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The row that is shown before a run, the answers that an evaluation prints, and the library's own lines."""
    monkeypatch.setenv("SAMPLE_KEY", "Zq7xkW2v")
    rows = [{"prompt": "Zq7xkW2v", "completion": "ab"}] * 4
    settings = {"disable_tqdm": False, "log_completions": 2, "eval_dataset": [{"prompt": "Zq7xkW2v"}]}
    t = trainer(tmp_path / "a", "sft", rows, disable_tqdm=False)
    t.train()
    t = trainer(tmp_path / "b", "rloo", [{"prompt": "Zq7xkW2v"}] * 4, reward=varied, beta=0.0, **settings)
    t.evaluate()
    t.journal.say("saw Zq7xkW2v")
    t.journal.note("noted Zq7xkW2v")
    with pytest.warns(UserWarning, match=r"^warned of \[redacted\]$"):
        t.journal.warn("warned of Zq7xkW2v")
    printed = capsys.readouterr()
    assert "Zq7xkW2v" not in printed.out + printed.err
    for words in ("[redacted]", "] [redacted] -> ", "saw [redacted]", "noted [redacted]"):
        assert words in printed.out


def test_every_logger_of_the_library_is_guarded() -> None:
    """A filter of a logger sees that logger's own records alone, so each has to have one."""
    source = "".join(path.read_text() for path in Path(rlft.__file__).parent.rglob("*.py"))
    assert set(re.findall(r"getLogger\(\"([\w.]+)\"\)", source)) == set(LOGGERS)
    assert set(re.findall(r"getLogger\((?!\")(\w+)\)", source)) <= {"name"}  # where the filters are put on
    for name in LOGGERS:
        assert len(logging.getLogger(name).filters) == 1


@pytest.mark.parametrize(
    "text",
    [
        "http://localhost:8000/v1/models/meta@main", "see https://a.b/c?x=1 or me@x.org", "sort_key: abcdef", "PWD=/home/user",
        "OLDPWD=/tmp/x", "TOKENIZERS_PARALLELISM=false", "PAD_TOKEN=<pad>", "a_key=abcdef",
    ],
)  # fmt: skip
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == text


def test_long_lines_take_no_time() -> None:
    started = time.monotonic()
    for character in "-_A:@/":
        redact(character * 100_000)
    assert time.monotonic() - started < 30  # what grows with the square would take hours


def test_tokens_of_the_vocabulary_are_no_secrets() -> None:
    fine = {"pad_token": "<pad>", "eos_token_id": 2, "num_tokens": 3, "max_tokens": 4, "token": "", "password": None}
    assert secret_keys({"a": [fine]}) == []
    assert secret_keys({"a": [{"b": {"token": "x"}}]}) == ["a[0].b.token"]
