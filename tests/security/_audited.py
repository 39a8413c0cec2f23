"""Run by tests/security/test_audit.py: load and verify everything under an audit hook, and print what it heard.

First once on sound inputs, so that imports are over; then with the hook, on sound inputs and on hostile ones.
"""

from __future__ import annotations

import contextlib
import json
import random
import sys
import sysconfig
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

FORBIDDEN = (
    "pickle.find_class", "marshal.loads", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork",
    "os.forkpty", "socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo", "urllib.Request", "ctypes.dlopen",
    "code.__new__",
)  # fmt: skip
#: Code from here may run: the interpreter's library and what is installed; strings that they compile have no file.
INSTALLED = tuple({str(Path(sysconfig.get_path(name)).resolve()) for name in ("stdlib", "purelib", "platlib")})
OWN = str(Path(__file__).resolve().parents[2] / "src")

heard: list[str] = []
listening = False


def hook(event: str, args: tuple[Any, ...]) -> None:
    if not listening:
        return
    if event == "marshal.loads" and sys._getframe(1).f_code.co_filename.startswith("<frozen importlib"):
        return  # an import, from a compiled file of what is installed
    if event in FORBIDDEN:
        heard.append(f"{event} {args!r}"[:300])
    elif event in ("exec", "compile"):
        file = args[0].co_filename if event == "exec" and hasattr(args[0], "co_filename") else args[-1]
        file = file.decode(errors="replace") if isinstance(file, bytes) else str(file)
        caller = sys._getframe(1).f_code.co_filename
        for place in (file, caller):
            resolved = str(Path(place).resolve()) if place.startswith("/") else place
            if not (resolved.startswith((*INSTALLED, OWN)) or place.startswith("<frozen")):
                if place is file and str(Path(caller).resolve()).startswith(INSTALLED):
                    continue  # a library builds its own classes (dataclasses, namedtuple) from strings
                heard.append(f"{event} {file!r} called in {caller!r}")
                break


# -- every door through which a file or a text comes in --------------------------------------------------------------------------
def doors(folder: Path) -> dict[str, Callable[[], Any]]:
    """Name -> load or verify; those of ``hostile`` inputs may refuse with an error."""
    from rlft import cli, config, data, models, report
    from rlft.checkpoint import find_latest, inspect, load_latest
    from rlft.metrics import read_metrics
    from rlft.rewards import load_reward

    run = folder / "run"
    found: dict[str, Callable[[], Any]] = {
        "config": lambda: config.load_config(folder / "run.yaml", ["beta=0.1", "objective_args.x=[1, {a: 2}]"]),
        "checkpoint": lambda: (find_latest(run), load_latest(run), inspect(run)),
        "metrics": lambda: read_metrics(run),
        "model": lambda: models.load_causal_lm(run / "model"),
        "adapter": lambda: models.load_adapter(folder / "lora" / "model"),
        "reward model": lambda: models.ModelReward(folder / "scorer" / "model"),
        "tokenizer": lambda: models.load_tokenizer(run / "model"),
        "doctor": lambda: cli.main(["doctor", str(run)]),
        "report": lambda: report.write_report(run, folder / "r.html"),
        "resume": lambda: cli.main(["train", str(folder / "run.yaml")]),
        # online, inside a generation: its queue and the replay buffer come from the checkpoint
        "online resume": lambda: cli.main(["train", str(folder / "online.yaml")]),
        "streaming": lambda: cli.main(["train", str(folder / "stream.yaml")]),
        "streaming with workers": lambda: cli.main(["train", str(folder / "workers.yaml")]),
        "reference log-probs": lambda: cli.main(["train", str(folder / "cached.yaml")]),
        "value head": lambda: models.Policy(
            models.load_causal_lm(folder / "shared" / "model"), critic="shared"
        ).load_value_head(folder / "shared" / "model"),
        "critic": lambda: models.Policy(
            models.load_causal_lm(folder / "own" / "model"),
            critic=models.load_causal_lm(folder / "own" / "model" / "critic"),
        ).load_value_head(folder / "own" / "model"),
        "hub rows": lambda: hub_rows(folder / "hub", folder / "hub-cache"),
        "reward file": lambda: (
            load_reward(f"{folder / 'rewards.py'}:score"),
            load_reward(f"{folder / 'rewards.py'}:judge"),
        ),
        "symbolic checker": lambda: symbolic(["x+1", r"\frac{x^2-1}{x-1}"]),
    }
    for path in sorted((folder / "data").iterdir()):
        found[f"data {path.name}"] = lambda path=path: data.load_rows(str(path))
    return found


def hub_rows(source: Path, cache: Path) -> list[Any]:
    """A dataset as the hub lays it out, whole and row by row; the name stands for a folder, since no network is there."""
    import datasets

    from rlft.data import hub

    real = datasets.load_dataset
    datasets.load_dataset = lambda path, **options: real(str(source), cache_dir=str(cache), **options)  # type: ignore[assignment]
    try:
        whole = hub.fetch("acme/sums", split="train", name=None, revision=None)
        return [*whole, *hub.HubRows("acme/sums")()]
    finally:
        datasets.load_dataset = real


def symbolic(texts: list[str]) -> list[Any]:
    """Every text as answer and as reference, in the checker's own process."""
    from rlft.rewards import SymbolicChecker

    with contextlib.closing(SymbolicChecker(timeout=1.0)) as checker:
        return [found for text in texts for found in (checker(text, "x+1"), checker("1+x", text))]


def hostile(folder: Path, sentinel: Path) -> dict[str, Callable[[], Any]]:
    """The same doors, with something behind each that wants to run: it would touch ``sentinel``."""
    import pickle
    import shutil

    from rlft import cli, config, data, models
    from rlft._files import hash_file
    from rlft._json import loads
    from rlft.checkpoint import find_latest, inspect, load
    from rlft.checkpoint._manifest import _sealed

    call = f"__import__('pathlib').Path({str(sentinel)!r}).touch()"

    class Boom:
        def __reduce__(self) -> Any:
            return Path.touch, (sentinel,)

    bomb = pickle.dumps(Boom())
    bad = folder / "hostile"
    bad.mkdir(exist_ok=True)
    yaml = {
        "object": f"objective: !!python/object/apply:os.system ['touch {sentinel}']\n",
        "name": "objective: !!python/name:os.system\n",
        "expression": f'objective: "{call}"\n',
        "aliases": "a: &a [1]\n" + "b: [*a, *a]\n",
    }
    found: dict[str, Callable[[], Any]] = {}
    for name, text in yaml.items():
        (bad / f"{name}.yaml").write_text(text)
        found[f"yaml {name}"] = lambda name=name: cli.main(["train", str(bad / f"{name}.yaml")])
    found["override"] = lambda: config.load_config(
        None, [f"objective={call}", f"beta=!!python/object/apply:os.system ['touch {sentinel}']"]
    )

    model = bad / "model"
    shutil.copytree(folder / "run" / "model", model, dirs_exist_ok=True)
    (model / "evil.py").write_text(f"{call}\nclass Evil: pass\n")
    for name in ("config.json", "tokenizer_config.json"):
        record = json.loads((model / name).read_text())
        record["auto_map"] = {
            "AutoModelForCausalLM": "evil.Evil",
            "AutoConfig": "evil.Evil",
            "AutoTokenizer": ["evil.Evil", None],
        }
        (model / name).write_text(json.dumps(record))
    found["model with auto_map"] = lambda: models.load_causal_lm(model)
    found["tokenizer with auto_map"] = lambda: models.load_tokenizer(model)
    pickled = bad / "pickled"
    shutil.copytree(folder / "run" / "model", pickled, dirs_exist_ok=True)
    for path in pickled.glob("*.safetensors*"):
        path.unlink()
    for name in ("pytorch_model.bin", "training_args.bin", "rng_state.pth", "optimizer.pt"):
        (pickled / name).write_bytes(bomb)
    found["pickled model"] = lambda: models.load_causal_lm(pickled)
    adapter = bad / "adapter"
    shutil.copytree(folder / "lora" / "model", adapter, dirs_exist_ok=True)
    for path in adapter.glob("*.safetensors"):
        path.unlink()
    (adapter / "adapter_model.bin").write_bytes(bomb)
    found["pickled adapter"] = lambda: models.load_adapter(adapter)

    head = bad / "head"
    shutil.copytree(folder / "shared" / "model", head, dirs_exist_ok=True)
    (head / "value_head.safetensors").write_bytes(bomb)
    found["value head of pickles"] = lambda: models.Policy(
        models.load_causal_lm(head), critic="shared"
    ).load_value_head(head)

    # a checkpoint whose manifest is sound, and whose files are pickles: the hashes do not say who wrote it
    online = bad / "online"
    shutil.copytree(folder / "online", online, dirs_exist_ok=True)
    for place in online.glob("checkpoint-*"):
        names = ["replay.safetensors", "source.safetensors", "trainable.safetensors"]
        for name in names:
            (place / name).write_bytes(bomb)
        body = {key: value for key, value in loads((place / "manifest.json").read_bytes()).items() if key != "seal"}
        body["files"] |= {name: hash_file(place / name)._asdict() for name in names}
        (place / "manifest.json").write_bytes(_sealed(body))
    settings = json.loads((folder / "online.yaml").read_text())
    (bad / "online.yaml").write_text(json.dumps({**settings, "output_dir": str(online)}))
    found["sealed checkpoint of pickles"] = lambda: cli.main(["train", str(bad / "online.yaml")])

    cache = bad / "cache"
    shutil.copytree(folder / "cache", cache, dirs_exist_ok=True)
    for path in [*cache.glob("*.safetensors"), *cache.glob("*.json")]:
        path.write_bytes(bomb)
    settings = json.loads((folder / "cached.yaml").read_text())
    (bad / "cached.yaml").write_text(
        json.dumps({**settings, "ref_cache_dir": str(cache), "output_dir": str(bad / "cached")})
    )
    found["reference log-probs of pickles"] = lambda: cli.main(["train", str(bad / "cached.yaml")])

    lines = "".join(json.dumps({"prompt": call, "completion": f"{{{{ {call} }}}}"}) + "\n" for _ in range(8))
    (bad / "stream.jsonl").write_text(lines)
    for name in ("stream", "workers"):
        settings = json.loads((folder / f"{name}.yaml").read_text())
        settings |= {
            "train_data": str(bad / "stream.jsonl"),
            "output_dir": str(bad / name),
            "model": str(folder / "run/model"),
        }
        settings |= {"max_prompt_length": 200, "max_completion_length": 200, "tokenizer": str(folder / "run/model")}
        (bad / f"{name}.yaml").write_text(json.dumps(settings))
        found[f"{name} of hostile text"] = lambda name=name: cli.main(["train", str(bad / f"{name}.yaml")])

    script = bad / "script"
    script.mkdir(exist_ok=True)
    (script / "script.py").write_text(f"{call}\n")
    (script / "data.pkl").write_bytes(bomb)
    found["hub dataset that is a script"] = lambda: hub_rows(script, bad / "hub-cache")
    found["symbolic checker"] = lambda: symbolic(answers(sentinel, 12))

    run = bad / "run"
    shutil.copytree(folder / "run", run, dirs_exist_ok=True)
    for path in [*run.glob("checkpoint-*/*.safetensors"), *run.glob("checkpoint-*/*.json")]:
        path.write_bytes(bomb)
    found["checkpoint of pickles"] = lambda: (inspect(run), load(next(run.glob("checkpoint-*"))))
    found["newest of pickles"] = lambda: find_latest(run)
    found["doctor of pickles"] = lambda: cli.main(["doctor", str(run)])
    for name in (
        "data.pkl",
        "data.pt",
        "data.npy",
        "data.jsonl",
        "data.json",
        "data.csv",
        "data.parquet",
        "data.arrow",
    ):
        (bad / name).write_bytes(bomb)
        found[f"data {name}"] = lambda name=name: data.load_rows(str(bad / name))
    (bad / "formula.csv").write_text(f'prompt,completion\n"=cmd|calc","{call}"\n')
    found["formulas"] = lambda: data.load_rows(str(bad / "formula.csv"))
    return found


# -- answers of a model that would like to run something -------------------------------------------------------------------------
def answers(sentinel: Path, count: int) -> list[str]:
    """Payloads in the notations that the verifiers read, nested and mixed at random from a seed."""
    source = random.Random(0)
    call = f"__import__('pathlib').Path({str(sentinel)!r}).touch()"
    seeds = [
        call, f"eval({call!r})", f"exec({call!r})", f"(lambda: {call})()", f"[{call} for _ in (1,)][0]", "{{7*7}}", "${7*7}",
        "().__class__.__base__.__subclasses__()", "9^{9^{9}}", "9**9**9**9", "100000000!", r"\binom{10^9}{5*10^8}",
        r"\sum_{i=1}^{10^9} i", "1e999999999", "{" * 5000, "(" * 5000, "9" * 5000, "1/0", "nan", "inf", "-" * 3000, "\x00" * 50,
        r"\frac{1}{" * 200, r"\text{" + call + "}", "x'y" * 100, "٣" * 300, "\ud800", "(a+)+" * 200, "a" * 3000 + "!",
        r"\write18{touch x}", r"\input{/etc/passwd}", "$(touch x)", "`touch x`", "; import os", "number0" + "*number0" * 400,
    ]  # fmt: skip
    frames = [
        "{}",
        "#### {}",
        r"\boxed{{{}}}",
        "The final answer is {}.",
        "<answer>{}</answer>",
        r"$\frac{{{}}}{{2}}$",
        "x = {}",
        "{} = 24",
    ]
    made = []
    for _ in range(count):
        payload = "".join(source.choice(seeds) for _ in range(source.randint(1, 3)))
        made.append(source.choice(frames).format(payload))
    return made


def verify_all(texts: list[str]) -> float:
    """Score every text by every built-in reward, and use it as a reference too; the longest batch of ten, seconds."""
    from rlft.rewards import (
        EquationVerifier,
        ExactMatch,
        LengthReward,
        MathVerifier,
        RegexReward,
        RepetitionPenalty,
        SoftOverlong,
        TagFormat,
    )

    rewards = [
        MathVerifier(), MathVerifier(fallback="last_number"), EquationVerifier(), ExactMatch(), LengthReward(50),
        RepetitionPenalty(), RegexReward(r"\d+"), TagFormat(),
        SoftOverlong(max_length=60, cache=20),
    ]  # fmt: skip
    slowest = 0.0
    for start in range(0, len(texts), 10):
        chunk = texts[start : start + 10]
        ids = [[1] * min(len(text), 100) for text in chunk]
        started = time.process_time()
        for reward in rewards:
            for answer in (["24"] * len(chunk), chunk):
                reward(
                    prompts=["p"] * len(chunk), completions=chunk, completion_ids=ids, answer=answer,
                    numbers=[[1, 2, 3, 4]] * len(chunk), trainer_state=None,
                )  # fmt: skip
        slowest = max(slowest, time.process_time() - started)
    return slowest


def main(folder: Path, sentinel: Path) -> None:
    global listening
    warnings.simplefilter("ignore")
    result: dict[str, Any] = {"sound": {}, "hostile": {}}
    sys.addaudithook(hook)
    for name, open_door in doors(folder / "warm").items():
        open_door()  # whatever is imported on first use
        print("warm", name, flush=True)
    for open_door in hostile(folder / "warm", sentinel).values():
        outcome(open_door)
    verify_all(answers(sentinel, 10))
    planted = hostile(folder / "cold", sentinel)
    for kind, entries in (("sound", doors(folder / "cold")), ("hostile", planted)):
        for name, open_door in entries.items():
            heard.clear()
            listening = True
            said = outcome(open_door)
            listening = False
            result[kind][name] = {"heard": list(heard), "said": said}
    heard.clear()
    listening = True
    result["slowest"] = verify_all(answers(sentinel, 1000))
    listening = False
    result["answers"] = list(heard)
    heard.clear()
    listening = True
    exec(compile("1", "planted.py", "exec"))
    listening = False
    result["control"] = list(heard)  # the hook does hear
    result["touched"] = sentinel.exists()
    (folder / "result.json").write_text(json.dumps(result))


def outcome(open_door: Callable[[], Any]) -> str:
    try:
        value = open_door()
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]
    return f"returned {value!r}"[:80]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
