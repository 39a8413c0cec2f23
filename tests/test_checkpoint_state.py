"""Random generators and optimizers come back so that training goes on bit for bit."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from rlft import checkpoint


def _draw() -> list[float]:
    return [
        random.random(),
        random.gauss(0, 1),
        np.random.rand(),
        np.random.randn(),
        float(torch.rand(())),
        float(torch.randn(3)[1]),
    ]


def _through_disk(tmp_path: Path, pair: tuple[dict, dict]) -> tuple[dict, dict]:
    path = checkpoint.save(
        tmp_path, 1, tensors={"x": pair[0]} if pair[0] else {}, records={"x": pair[1]}, config_hash=""
    )
    loaded = checkpoint.load(path)
    return loaded.tensors.get("x", {}), loaded.records["x"]


@pytest.fixture(autouse=True)
def _keep_global_generators():
    kept = checkpoint.rng_state()
    yield
    checkpoint.set_rng_state(*kept)


def test_random_state_round_trip(tmp_path: Path) -> None:
    random.seed(3)
    np.random.seed(4)
    torch.manual_seed(5)
    _draw()  # leaves a cached second gaussian in Python and numpy
    stored = _through_disk(tmp_path, checkpoint.rng_state())
    expected = [_draw() for _ in range(3)]
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    assert [_draw() for _ in range(3)] != expected
    checkpoint.set_rng_state(*stored)
    assert [_draw() for _ in range(3)] == expected


def test_random_state_is_checked_before_it_is_set() -> None:
    tensors, record = checkpoint.rng_state()
    bad = [
        ({}, record),
        ({"cpu": tensors["cpu"][:100]}, record),
        ({"cpu": tensors["cpu"].float()}, record),
        (tensors, {**record, "python": {**record["python"], "internal": [1, 2]}}),
        (tensors, {**record, "numpy": {**record["numpy"], "key": [1]}}),
        (tensors, {**record, "numpy": {**record["numpy"], "kind": "PCG64"}}),
        (tensors, {**record, "cuda": 1}),
        (tensors, {**record, "format": 2}),
        (tensors, {}),
    ]
    random.seed(1)
    torch.manual_seed(1)
    before = checkpoint.rng_state()
    for broken in bad:
        with pytest.raises(checkpoint.CheckpointError, match="random state cannot be restored"):
            checkpoint.set_rng_state(*broken)
        now = checkpoint.rng_state()
        assert now[1] == before[1]
        assert torch.equal(now[0]["cpu"], before[0]["cpu"])


def test_fewer_devices_than_when_saved_is_a_warning() -> None:
    tensors, record = checkpoint.rng_state()
    if torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    tensors["cuda:0"] = torch.zeros(16, dtype=torch.uint8)
    with pytest.warns(
        checkpoint.CheckpointWarning, match="1 CUDA devices and this process sees 0; .* not be bit-exact"
    ):
        checkpoint.set_rng_state(tensors, {**record, "cuda": 1})


# -- optimizers ---------------------------------------------------------------------------------------------------

Make = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


def _groups(parameters: list[torch.nn.Parameter]) -> list[dict]:
    return [
        {"params": parameters[:2], "weight_decay": 0.1},
        {"params": parameters[2:], "weight_decay": 0.0, "lr": 0.05},
    ]


OPTIMIZERS: dict[str, Make] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.8, 0.95)),
    "adamw_groups": lambda p: torch.optim.AdamW(_groups(p), lr=0.01),
    "adamw_amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adamw_tensor_lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01), foreach=False),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01),
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True, momentum=0.5),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}
NAMES = ["layer.weight", "layer.bias", "head.scale"]


def _parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in [(4, 3), (4,), (1,)]]


def _step(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    optimizer.step()


def _all_state(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter]) -> str:
    flat = {f"parameter {i}": parameter for i, parameter in enumerate(parameters)}
    for index, parameter in enumerate(parameters):
        for key, value in optimizer.state.get(parameter, {}).items():
            flat[f"{index} {key}"] = value if isinstance(value, torch.Tensor) else torch.tensor([hash(repr(value))])
    return checkpoint.fingerprint(flat)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("steps_before", [0, 3])
def test_training_goes_on_bit_for_bit(tmp_path: Path, kind: str, dtype: torch.dtype, steps_before: int) -> None:
    parameters = _parameters(dtype)
    optimizer = OPTIMIZERS[kind](parameters)
    for seed in range(steps_before):
        _step(optimizer, parameters, seed)
    optimizer.param_groups[0]["initial_lr"] = 0.5
    weights = [parameter.detach().clone() for parameter in parameters]
    tensors, record = _through_disk(tmp_path, checkpoint.optimizer_to_tensors(optimizer, NAMES))

    resumed = [torch.nn.Parameter(weight.clone()) for weight in weights]
    other = OPTIMIZERS[kind](resumed)
    _step(other, resumed, 99)  # what it knew before must be gone
    with torch.no_grad():
        for parameter, weight in zip(resumed, weights, strict=True):
            parameter.copy_(weight)
    for group in other.param_groups:
        group["lr"] = torch.tensor(123.0) if kind == "adamw_tensor_lr" else 123.0
        group["weight_decay"] = 77.0
        if "betas" in group:
            group["betas"] = (0.1, 0.2)
    checkpoint.optimizer_from_tensors(other, NAMES, tensors, record)
    assert repr([{k: v for k, v in g.items() if k != "params"} for g in other.param_groups]) == repr(
        [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    )
    for seed in range(10, 13):
        _step(optimizer, parameters, seed)
        _step(other, resumed, seed)
        assert _all_state(optimizer, parameters) == _all_state(other, resumed)


def test_dtypes_of_the_state_are_kept() -> None:
    parameters = _parameters(torch.bfloat16)
    optimizer = torch.optim.AdamW(parameters)
    _step(optimizer, parameters, 0)
    optimizer.state[parameters[0]]["exp_avg"] = torch.full((4, 3), 1.0 / 3)  # float32 moments of a bfloat16 weight
    tensors, record = checkpoint.optimizer_to_tensors(optimizer, NAMES)
    other = torch.optim.AdamW(parameters)
    checkpoint.optimizer_from_tensors(other, NAMES, tensors, record)
    back = other.state[parameters[0]]["exp_avg"]
    assert back.dtype == torch.float32
    assert torch.equal(back, torch.full((4, 3), 1.0 / 3))
    assert other.state[parameters[0]]["step"].device.type == "cpu"


def test_stored_state_is_not_shared_with_the_optimizer() -> None:
    parameters = _parameters()
    optimizer = torch.optim.AdamW(parameters)
    _step(optimizer, parameters, 0)
    tensors, record = checkpoint.optimizer_to_tensors(optimizer, NAMES)
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    other = torch.optim.AdamW(_parameters())
    checkpoint.optimizer_from_tensors(other, NAMES, kept, record)
    mark = checkpoint.fingerprint(kept)
    _step(other, [p for g in other.param_groups for p in g["params"]], 1)
    assert checkpoint.fingerprint(kept) == mark


def test_a_wrapped_optimizer_is_unwrapped() -> None:
    class Wrapper:
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

    parameters = _parameters()
    optimizer = torch.optim.AdamW(parameters)
    _step(optimizer, parameters, 0)
    wrapped = checkpoint.optimizer_to_tensors(Wrapper(optimizer), NAMES)  # type: ignore[arg-type]
    assert wrapped[1] == checkpoint.optimizer_to_tensors(optimizer, NAMES)[1]


def _stored() -> tuple[dict, dict]:
    parameters = _parameters()
    optimizer = torch.optim.AdamW(parameters)
    _step(optimizer, parameters, 0)
    return checkpoint.optimizer_to_tensors(optimizer, NAMES)


def test_names_must_match_the_parameters() -> None:
    optimizer = torch.optim.AdamW(_parameters())
    for names in (NAMES[:2], [*NAMES, "more"], ["a", "a", "b"]):
        with pytest.raises(ValueError, match="names must be 3 different names"):
            checkpoint.optimizer_to_tensors(optimizer, names)
        with pytest.raises(ValueError, match="names must be 3 different names"):
            checkpoint.optimizer_from_tensors(optimizer, names, *_stored())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("names", r"only stored: \['head.scale'\]; only here: \['tail'\]"),
        ("order", "their order differs"),
        ("class", "the stored state is of AdamW, this optimizer is SGD"),
        ("groups", "does not fit the parameters"),
        ("shape", r"'layer.weight' has shape \[3, 4\], its stored optimizer state is for \[4, 3\]"),
        ("missing tensor", "lacks 'layer.bias::exp_avg'"),
        ("extra tensor", r"has \['stranger::exp_avg'\], which belongs to no parameter"),
        ("extra parameter", r"has \['stranger'\], which belongs to no parameter"),
        ("format", "format 9 is unknown, expected 1"),
        ("empty", "incomplete"),
    ],
)
def test_state_of_something_else_is_refused_and_changes_nothing(change: str, message: str) -> None:
    tensors, record = _stored()
    parameters, names = _parameters(), list(NAMES)
    make: Make = torch.optim.AdamW
    if change == "names":
        names[2] = "tail"
    elif change == "order":
        names = [names[1], names[0], names[2]]
        parameters = [parameters[1], parameters[0], parameters[2]]
    elif change == "class":
        make = torch.optim.SGD
    elif change == "groups":
        make = lambda p: torch.optim.AdamW(_groups(p))  # noqa: E731
    elif change == "shape":
        parameters[0] = torch.nn.Parameter(torch.randn(3, 4))
    elif change == "missing tensor":
        del tensors["layer.bias::exp_avg"]
    elif change == "extra tensor":
        tensors["stranger::exp_avg"] = torch.zeros(1)
    elif change == "extra parameter":
        record["parameters"]["stranger"] = {"shape": [1], "tensors": {}, "values": {}}
    elif change == "format":
        record["format"] = 9
    elif change == "empty":
        record = {}
    optimizer = make(parameters)
    _step(optimizer, parameters, 5)
    before = _all_state(optimizer, parameters), repr(optimizer.param_groups)
    with pytest.raises(checkpoint.CheckpointError, match=message):
        checkpoint.optimizer_from_tensors(optimizer, names, tensors, record)
    assert (_all_state(optimizer, parameters), repr(optimizer.param_groups)) == before


def test_state_that_cannot_be_stored_is_named() -> None:
    parameters = _parameters()
    optimizer = torch.optim.SGD(parameters)
    optimizer.state[parameters[1]]["history"] = [torch.zeros(1)]
    with pytest.raises(checkpoint.CheckpointError, match=r"optimizer state .history. of .layer\.bias. is a list"):
        checkpoint.optimizer_to_tensors(optimizer, NAMES)


@pytest.mark.gpu
def test_cuda_state_and_moments_come_back_on_the_device(tmp_path: Path) -> None:
    parameters = [torch.nn.Parameter(p.detach().cuda()) for p in _parameters()]
    optimizer = torch.optim.AdamW(parameters, fused=True)
    _step_cuda(optimizer, parameters)
    stored = _through_disk(tmp_path, checkpoint.optimizer_to_tensors(optimizer, NAMES))
    resumed = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
    other = torch.optim.AdamW(resumed, fused=True)
    checkpoint.optimizer_from_tensors(other, NAMES, *stored)
    assert other.state[resumed[0]]["step"].is_cuda
    rng = checkpoint.rng_state()
    _step_cuda(optimizer, parameters)
    checkpoint.set_rng_state(*rng)
    _step_cuda(other, resumed)
    assert _all_state(optimizer, parameters) == _all_state(other, resumed)


def _step_cuda(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
