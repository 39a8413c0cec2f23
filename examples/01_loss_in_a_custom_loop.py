"""A loss in a loop of one's own: torch and `rlft.losses`, nothing else. Run: python examples/01_loss_in_a_custom_loop.py

A softmax policy over ten answers, no trainer, no model library. Off-policy AGRO learns from samples that another policy
drew, and reaches the best policy there is: pi* = ref exp(r / beta) / Z.
"""

import torch

from rlft import losses


def train(steps: int = 600, prompts: int = 64, n: int = 4, beta: float = 1.0, seed: int = 0) -> float:
    """Returns KL(policy || pi*) at the end, as a share of its start."""
    generator = torch.Generator().manual_seed(seed)
    reward = torch.randn(10, generator=generator)
    reference = torch.randn(10, generator=generator).log_softmax(-1)
    best = (reference + reward / beta).log_softmax(-1)
    behaviour = torch.full((10,), 0.1)  # the samples come from here, not from the policy
    logits = reference.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.03)
    group_ids = torch.arange(prompts).repeat_interleave(n)
    mask = torch.ones(prompts * n, 1, dtype=torch.bool)

    def distance() -> torch.Tensor:
        policy = logits.log_softmax(-1)
        return (policy.exp() * (policy - best)).sum()

    start = distance().item()
    for _ in range(steps):
        answers = torch.multinomial(behaviour, prompts * n, replacement=True, generator=generator)
        logps, ref_logps = logits.log_softmax(-1)[answers, None], reference[answers, None]
        out = losses.agro_off_policy(logps, ref_logps, reward[answers], group_ids, mask, beta=beta)
        optimizer.zero_grad()
        out.mean().backward()
        optimizer.step()
    return distance().item() / start


if __name__ == "__main__":
    print(f"KL to the optimum, as a share of its start: {train():.1e}")
