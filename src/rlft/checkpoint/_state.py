"""State of random generators and optimizers as tensors and records, and fingerprints of tensors. No pickle."""

from __future__ import annotations

import hashlib
import random
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlft._json import canonical
from rlft.checkpoint._errors import CheckpointError, CheckpointWarning
from rlft.checkpoint._tensorfile import check_tensors, named_bytes, tensor_bytes

__all__ = ["fingerprint", "optimizer_from_tensors", "optimizer_to_tensors", "rng_state", "set_rng_state"]

_RNG_FORMAT = 1
_OPTIMIZER_FORMAT = 1
_SEPARATOR = "::"  # between a parameter's name and what is stored for it


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over sorted (name, dtype, shape, bytes): equal exactly when every bit is equal.

    Args:
        tensors: named tensors of any device; -0.0 and 0.0 differ, as do NaNs of different bits.
    """
    check_tensors(tensors, what="tensors")
    digest = hashlib.sha256(canonical(named_bytes(tensors)))
    for name in sorted(tensors):
        digest.update(tensor_bytes(tensors[name]))
    return digest.hexdigest()


# -- random generators --------------------------------------------------------------------------------------------


def rng_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State of every global random generator of this process.

    Returns:
        ``(tensors, record)``: torch's CPU and CUDA generators as uint8 tensors; Python's, and numpy's if numpy is
        loaded, in the record. CUDA is left out while it is unused.
    """
    tensors = {"cpu": torch.get_rng_state()}
    devices = torch.cuda.device_count() if torch.cuda.is_available() and torch.cuda.is_initialized() else 0
    tensors |= {f"cuda:{index}": torch.cuda.get_rng_state(index) for index in range(devices)}
    version, internal, gauss = random.getstate()
    record: dict[str, Any] = {"format": _RNG_FORMAT, "cuda": devices, "numpy": None}
    record["python"] = {"version": version, "internal": list(internal), "gauss": gauss}
    if "numpy" in sys.modules:
        record["numpy"] = _numpy_state()
    return tensors, record


def _numpy_state() -> dict[str, Any]:
    import numpy as np

    state: Any = np.random.get_state(legacy=False)
    if state["bit_generator"] != "MT19937":
        raise CheckpointError(
            f"numpy's global generator is {state['bit_generator']}, expected MT19937; "
            f"do not replace the global one: use numpy.random.default_rng() for your own"
        )
    return {
        "kind": "MT19937",
        "key": state["state"]["key"].tolist(),
        "position": int(state["state"]["pos"]),
        "has_gauss": int(state["has_gauss"]),
        "gauss": float(state["gauss"]),
    }


def set_rng_state(tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Inverse of :func:`rng_state`. Everything is checked before anything is set.

    Args:
        tensors: what :func:`rng_state` gave.
        record: what it gave beside them.

    Raises:
        CheckpointError: when a state is missing or of the wrong form.
    """
    try:
        if record["format"] != _RNG_FORMAT:
            raise ValueError(f"format {record['format']!r} is unknown")
        python = (record["python"]["version"], tuple(record["python"]["internal"]), record["python"]["gauss"])
        random.Random().setstate(python)
        if tensors["cpu"].dtype != torch.uint8 or tensors["cpu"].ndim != 1:
            raise ValueError(f"the CPU state must be a uint8 vector, got {tensors['cpu'].dtype}")
        torch.Generator().set_state(tensors["cpu"])
        numpy = _checked_numpy(record["numpy"])
        cuda = [tensors[f"cuda:{index}"] for index in range(record["cuda"])]
    except (LookupError, ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise CheckpointError(
            f"the random state cannot be restored: {error!r}; the resume would not be exact"
        ) from error
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if available != len(cuda) and (cuda or torch.cuda.is_initialized()):
        warnings.warn(
            f"the checkpoint has random states of {len(cuda)} CUDA devices and this process sees {available}; "
            f"the resumed run will not be bit-exact",
            CheckpointWarning,
            stacklevel=2,
        )
    random.setstate(python)
    torch.set_rng_state(tensors["cpu"])
    for index, state in enumerate(cuda[:available]):
        torch.cuda.set_rng_state(state, index)
    if numpy is not None:
        import numpy as np

        np.random.set_state(numpy)


def _checked_numpy(record: Mapping[str, Any] | None) -> tuple[Any, ...] | None:
    if record is None:
        return None
    import numpy as np

    key = np.array(record["key"], dtype=np.uint32)
    state = (record["kind"], key, record["position"], record["has_gauss"], record["gauss"])
    np.random.RandomState().set_state(state)
    return state


# -- optimizers ---------------------------------------------------------------------------------------------------


def optimizer_to_tensors(
    optimizer: torch.optim.Optimizer, names: Sequence[str], *, keep: bool = True
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State of an optimizer: its tensors by parameter name, the rest as a record.

    Tensors that are spread over processes (DTensor) come whole and on the CPU; then every process must call this.

    Args:
        optimizer: any optimizer whose state per parameter is tensors and plain values.
        names: one name per parameter, in the order of its param groups.
        keep: False takes part in gathering what is spread, and gives none of it: for processes that do not write.

    Returns:
        ``(tensors, record)`` for :func:`optimizer_from_tensors`.

    Raises:
        ValueError: when names do not match the parameters.
        CheckpointError: when a state cannot be stored.
    """
    optimizer = _unwrapped(optimizer)
    groups = _named_groups(optimizer, names)
    tensors: dict[str, Tensor] = {}
    parameters: dict[str, Any] = {}
    for name, parameter in (pair for group in groups for pair in group):
        state = optimizer.state[parameter] if parameter in optimizer.state else None
        if state is None:
            continue
        entry: dict[str, Any] = {"shape": list(parameter.shape), "tensors": {}, "values": {}}
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{name}{_SEPARATOR}{key}"] = _whole(value, keep=keep)
                entry["tensors"][key] = value.device == parameter.device
            elif value is None or isinstance(value, (bool, int, float, str)):
                entry["values"][key] = value
            else:
                raise CheckpointError(
                    f"optimizer state {key!r} of {name!r} is a {type(value).__name__}; "
                    f"expected a tensor or a plain value: use another optimizer"
                )
        parameters[name] = entry
    hyper = []
    for index, group in enumerate(optimizer.param_groups):
        values = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        inside = {key: value for key, value in values.items() if isinstance(value, Tensor)}
        tensors |= {f"group {index}{_SEPARATOR}{key}": value for key, value in inside.items()}
        plain = {key: value for key, value in values.items() if key not in inside}
        hyper.append({"values": plain, "tensors": sorted(inside), "names": [name for name, _ in groups[index]]})
    record = {
        "format": _OPTIMIZER_FORMAT,
        "optimizer": type(optimizer).__name__,
        "groups": hyper,
        "parameters": parameters,
    }
    return tensors, record


def optimizer_from_tensors(
    optimizer: torch.optim.Optimizer, names: Sequence[str], tensors: Mapping[str, Tensor], record: Mapping[str, Any]
) -> None:
    """Inverse of :func:`optimizer_to_tensors`, in place. Dtypes come back as they were, values bit for bit.

    Everything is checked before anything is changed.

    Args:
        optimizer: a fresh one over the same parameters.
        names: of its parameters, in its order.
        tensors: what :func:`optimizer_to_tensors` gave.
        record: what it gave beside them.

    Raises:
        ValueError: when names do not match the parameters.
        CheckpointError: when the stored state is of another optimizer or of other parameters.
    """
    optimizer = _unwrapped(optimizer)
    groups = _named_groups(optimizer, names)
    try:
        _check_same_optimizer(optimizer, groups, record)
        states, hyper = _stored_states(groups, tensors, record), _stored_groups(tensors, record)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the stored optimizer state lacks {error}; it is incomplete") from error
    optimizer.state.clear()
    for index, group in enumerate(optimizer.param_groups):
        for key, value in hyper[index].items():
            here = group.get(key)
            group[key] = value.to(here.device) if isinstance(value, Tensor) and isinstance(here, Tensor) else value
        on_device = bool(group.get("capturable") or group.get("fused"))
        for name, parameter in groups[index]:
            if name not in states:
                continue
            values, moved = states[name]
            for key, (tensor, with_parameter) in moved.items():
                # Plain Adam keeps its 0-dim step on the CPU whatever the device of the parameter; fused ones do not.
                stay = (not on_device) if key == "step" else (not with_parameter)
                values[key] = tensor.clone() if stay else _placed(tensor, parameter)
            optimizer.state[parameter] = values


def _whole(value: Any, *, keep: bool) -> Tensor:
    """A tensor as it is; one that is spread over processes gathered on the CPU."""
    if not hasattr(value, "full_tensor"):
        return value
    full = value.detach().full_tensor()
    return full.cpu() if keep else full.new_empty(0, device="cpu")


def _placed(tensor: Tensor, parameter: Any) -> Tensor:
    """A copy of a tensor where its parameter is: this process's part, where that one is spread and of its shape."""
    if not hasattr(parameter, "device_mesh") or tensor.shape != parameter.shape:
        return tensor.to(parameter.device, copy=True)
    from torch.distributed.tensor import distribute_tensor

    whole = tensor.to(parameter.device, copy=True)
    # every process read the whole of it: none has to wait for another
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside an accelerate wrapper, which proxies it."""
    inner = getattr(optimizer, "optimizer", None)
    return inner if isinstance(inner, torch.optim.Optimizer) else optimizer


def _named_groups(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> list[list[tuple[str, Tensor]]]:
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    if len(names) != count or len(set(names)) != len(names):
        raise ValueError(
            f"names must be {count} different names, one per parameter of the optimizer in its order, "
            f"got {len(names)} of which {len(set(names))} differ"
        )
    remaining = iter(names)
    return [[(next(remaining), parameter) for parameter in group["params"]] for group in optimizer.param_groups]


def _check_same_optimizer(
    optimizer: torch.optim.Optimizer, groups: list[list[tuple[str, Tensor]]], record: Mapping[str, Any]
) -> None:
    if record["format"] != _OPTIMIZER_FORMAT:
        raise CheckpointError(
            f"optimizer state of format {record['format']!r} is unknown, expected {_OPTIMIZER_FORMAT}"
        )
    if record["optimizer"] != type(optimizer).__name__:
        raise CheckpointError(
            f"the stored state is of {record['optimizer']}, this optimizer is {type(optimizer).__name__}; "
            f"resume with the optimizer that the run began with"
        )
    stored = [list(group["names"]) for group in record["groups"]]
    current = [[name for name, _ in group] for group in groups]
    if stored != current:
        before, now = {n for g in stored for n in g}, {n for g in current for n in g}
        absent, added = sorted(before - now), sorted(now - before)
        what = f"; only stored: {absent[:3]}; only here: {added[:3]}" if absent or added else "; their order differs"
        raise CheckpointError(
            f"the stored optimizer state does not fit the parameters: {len(before)} stored, {len(now)} here{what}; "
            f"resume with the model and adapter settings that the run began with"
        )


def _stored_states(
    groups: list[list[tuple[str, Tensor]]], tensors: Mapping[str, Tensor], record: Mapping[str, Any]
) -> dict[str, tuple[dict[str, Any], dict[str, tuple[Tensor, bool]]]]:
    states = {}
    expected = {f"group {i}{_SEPARATOR}{key}" for i, group in enumerate(record["groups"]) for key in group["tensors"]}
    for name, parameter in (pair for group in groups for pair in group):
        entry = record["parameters"].get(name)
        if entry is None:
            continue
        if list(parameter.shape) != entry["shape"]:
            raise CheckpointError(
                f"{name!r} has shape {list(parameter.shape)}, its stored optimizer state is for {entry['shape']}; "
                f"resume with the model and adapter settings that the run began with"
            )
        moved = {key: (tensors[f"{name}{_SEPARATOR}{key}"], flag) for key, flag in entry["tensors"].items()}
        expected |= {f"{name}{_SEPARATOR}{key}" for key in entry["tensors"]}
        states[name] = (dict(entry["values"]), moved)
    unknown = sorted((record["parameters"].keys() - {n for g in groups for n, _ in g}) | (tensors.keys() - expected))
    if unknown:
        raise CheckpointError(f"the stored optimizer state has {unknown[:3]}, which belongs to no parameter here")
    return states


def _stored_groups(tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {**group["values"], **{key: tensors[f"group {index}{_SEPARATOR}{key}"].clone() for key in group["tensors"]}}
        for index, group in enumerate(record["groups"])
    ]
