"""Which settings go with which objective: pure functions, asked before anything heavy is loaded."""

from rlft.rules.settings import check_on_policy, check_settings

__all__ = ["check_on_policy", "check_settings"]
