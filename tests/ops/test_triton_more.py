"""The rest of the op's tests through the Triton kernels, under the interpreter: minutes."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="the Triton kernels need the package triton (Linux)")

from tests.ops.test_linear_logps import (  # noqa: F401
    test_autocast_changes_nothing,
    test_frozen_hidden_states_still_train_the_head,
    test_gradient_of_one_output_alone,
    test_no_row_and_one_row,
    test_non_contiguous_inputs,
    test_properties_hold_in_low_precision,
    test_reference_equal_to_policy_gives_exactly_nothing,
    test_target_in_every_tile,
    test_tile_size_changes_nothing,
    test_twice_in_one_graph,
    test_undeclared_gradient_is_an_error,
    test_values_and_gradients_are_the_definition,
)
from tests.ops.test_precision import (  # noqa: F401
    test_a_tile_of_the_head_gradient_is_float32_whatever_the_head,
    test_float32_sums_of_low_precision_inputs,
    test_gradient_of_a_small_kl_keeps_its_digits,
    test_small_kl_keeps_its_digits,
)
from tests.ops.test_triton import pytestmark as interpreted
from tests.ops.test_triton import through_the_kernels  # noqa: F401

pytestmark = [pytest.mark.slow, *interpreted]
