"""Compile the Triton kernels to machine code for some GPUs, none of which need be there.

``python -m tests.ops.compile_kernels [--all]`` prints a line for each variant; a kernel that does not compile is an error.
The interpreter, under which the kernels are tested, takes much that the compiler refuses.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator
from typing import Any


def variants(every: bool) -> Iterator[tuple[str, dict[str, Any], set[str], str]]:
    """(kernel, constants, pointers that are given, dtype of the factors); the common ones, or all that matter."""
    references = [(False, False), (True, False), (True, True)]  # HAS_REF, BY_DIFFERENCE
    for (ref, difference), cap, half in itertools.product(references, (False, True), ("bf16", "fp32", "fp64")):
        common = half == "bf16" and not cap and not difference  # half precision is never scored by difference
        if not common and not (every and (half == "fp32" or (half == "fp64" and ref and not cap))):
            continue
        shape = {"HAS_REF": ref, "BY_DIFFERENCE": difference, "SOFTCAP": cap, "ROWS": 1, "BLOCK": 2048}
        given = {"e_ptr", *(["ref_ptr", "ed_ptr"] if ref else [])} | ({"ez_ptr", "bias_ptr"} if cap else set())
        for first in (True, False) if every else (True,):
            yield "fold", {**shape, "FIRST": first, "WANT_KL": ref, "FAR": 30.0}, given, half
        asked = {"g_logps_ptr", "out_ptr"} | ({"ref_ptr", "mean_delta_ptr", "g_kl_ptr"} if ref else set())
        yield "d_logits", shape, asked | ({"entropy_ptr", "g_entropy_ptr"} if cap else set()), half


def signature(names: list[str], constants: dict[str, Any], given: set[str], half: str) -> dict[str, str]:
    """The type of each argument of a kernel; adds to ``constants`` the pointers that are None."""
    wide = "fp64" if half == "fp64" else "fp32"
    factors = {"e_ptr", "ez_ptr", "ed_ptr", "out_ptr"}
    types = {"targets_ptr": "*i64", "n": "i32", "v": "i32", "first_column": "i32", "bias_ptr": f"*{half}"}
    found = {}
    for name in names:
        always = name in ("z_ptr", "state_ptr", "lse_ptr", "targets_ptr", "scales_ptr")
        if name.endswith("_ptr") and not always and name not in given:
            constants[name] = None
        if name in constants:
            found[name] = "constexpr"
        else:
            found[name] = types.get(name) or f"*{half if name in factors else wide}"
    return found


def main(every: bool) -> None:
    """Compile, and print what came out."""
    os.environ.pop("TRITON_INTERPRET", None)
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from rlft.ops import kernels

    for capability in (80, 89, 90) if every else (90,):
        for name, constants, given, half in variants(every):
            kernel = getattr(kernels, name)
            types = signature(kernel.arg_names, constants, given, half)
            positions = {(kernel.arg_names.index(key),): value for key, value in constants.items()}
            source = ASTSource(kernel, signature=types, constexprs=positions)
            target = GPUTarget("cuda", capability, 32)
            made: Any = triton.compile(source, target=target, options={"enable_fp_fusion": False})
            print(f"sm_{capability} {name} {half} {constants} {len(made.asm['cubin'])} bytes", flush=True)


if __name__ == "__main__":
    main("--all" in sys.argv)
