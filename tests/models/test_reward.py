"""Reward models: the score at the last token, whatever surrounds it; and as a reward function over text."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from rlft.models import (
    LoraSettings,
    ModelReward,
    RewardScorer,
    add_lora,
    check_trainable,
    load_sequence_classifier,
)
from tests.models.oracle import batch, close, perturb, row_ids
from tests.tiny import (
    EOS_ID,
    char_tokenizer,
    random_batch,
    tiny_gemma2,
    tiny_gpt2,
    tiny_llama,
    tiny_mistral,
    tiny_qwen2,
)

FAMILIES = [tiny_llama, tiny_qwen2, tiny_mistral, tiny_gemma2, tiny_gpt2]


def classifier(build=tiny_llama, **settings):
    return build(head="classifier", num_labels=1, **settings)


def scores_alone(model, data) -> torch.Tensor:
    """Each row by itself, so that transformers cannot pick a pad as the last token."""
    return torch.stack([model(torch.cat(row_ids(data, i))[None]).logits[0, 0] for i in range(data.num_rows)])


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("build", FAMILIES, ids=lambda f: f.__name__)
def test_scores_equal_rows_alone(build, lora) -> None:
    model, data = classifier(build, dtype=torch.float64), batch()
    if lora:
        model = add_lora(model, LoraSettings(r=2))
        perturb(model)
        assert any("score" in name for name in check_trainable(model).names)
    scorer = RewardScorer(model)
    close(scorer(data)["scores"], scores_alone(model, data))
    parameters = [p for p in scorer.parameters() if p.requires_grad]
    mine = torch.autograd.grad(scorer(data)["scores"].square().sum(), parameters)
    theirs = torch.autograd.grad(scores_alone(model, data).square().sum(), parameters)
    for a, b in zip(mine, theirs, strict=True):
        close(a, b, 1e-6 if build is tiny_gemma2 else 1e-9)


def test_padding_side_and_garbage_change_nothing() -> None:
    scorer, data = RewardScorer(classifier(dtype=torch.float64)), batch()
    scores = scorer(data)["scores"]
    garbage = data.replace(
        prompt_ids=data.prompt_ids.where(data.prompt_mask, 55),
        completion_ids=data.completion_ids.where(data.completion_mask, 66),
    )
    assert torch.equal(scorer(garbage)["scores"], scores)
    wide = data.replace(
        prompt_ids=torch.nn.functional.pad(data.prompt_ids, (3, 2)),
        prompt_mask=torch.nn.functional.pad(data.prompt_mask, (3, 2)),
    )
    assert torch.equal(scorer(wide)["scores"], scores)
    one = data.select(torch.tensor([2]))
    close(scorer(one)["scores"][0], scores[2], 1e-12)


def test_dropout_is_off_and_wishes_are_checked() -> None:
    scorer, data = RewardScorer(classifier(tiny_gpt2, resid_pdrop=0.5, attn_pdrop=0.5)), batch()
    assert torch.equal(scorer(data)["scores"], scorer(data)["scores"])
    with pytest.raises(ValueError, match="want holds 'logps'"):
        scorer(data, want=frozenset({"logps"}))
    assert RewardScorer(classifier(dtype=torch.bfloat16))(data)["scores"].dtype == torch.float32


def test_checkpointing_changes_nothing() -> None:
    data, grads = batch(), []
    for checkpointing in (False, True):
        scorer = RewardScorer(classifier(dtype=torch.float64))
        if checkpointing:
            scorer.enable_gradient_checkpointing()
        grads.append(torch.autograd.grad(scorer(data)["scores"].sum(), list(scorer.parameters())))
    for a, b in zip(*grads, strict=True):
        close(a, b, 1e-11)


def test_other_models_are_refused() -> None:
    with pytest.raises(ValueError, match="got LlamaForCausalLM"):
        RewardScorer(tiny_llama())
    with pytest.raises(ValueError, match="num_labels=3"):
        RewardScorer(tiny_llama(head="classifier", num_labels=3))


@pytest.mark.parametrize("lora", [False, True])
def test_round_trip(lora, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    model = load_sequence_classifier(tmp_path / "base", seed=3)
    scorer, data = RewardScorer(add_lora(model, LoraSettings(r=2)) if lora else model), batch()
    perturb(scorer)
    expected = scorer(data)["scores"]
    state = scorer.trainable_state()
    perturb(scorer, seed=8)
    scorer.load_trainable_state(state)
    assert torch.equal(scorer(data)["scores"], expected)
    scorer.save_pretrained(tmp_path / "out")
    assert scorer.reference_state() == {}
    if not lora:
        again = RewardScorer(load_sequence_classifier(tmp_path / "out"))
        assert torch.equal(again(data)["scores"], expected)
        return
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {"adapter_model.safetensors"}
    again = load_sequence_classifier(tmp_path / "out")
    assert torch.equal(RewardScorer(again)(data)["scores"], expected)


# -- as a reward function ---------------------------------------------------------------------------------------------
PROMPTS = ["Say hi: ", "2+2=", "A long prompt that goes on: ", "x"]
ANSWERS = ["hi", "4", "yes, and so does the answer, for a while", ""]


def text_scores(model, tokenizer, texts: list[list[int]]) -> list[float]:
    with torch.no_grad():
        return [model(torch.tensor([ids])).logits[0, 0].item() for ids in texts]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_plain_text_scores(batch_size) -> None:
    model, tokenizer = classifier(), char_tokenizer(add_bos=True)
    reward = ModelReward(model, tokenizer, batch_size=batch_size, name="helpful")
    texts = [[*tokenizer(p + a)["input_ids"], EOS_ID] for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    got = reward(prompts=PROMPTS, completions=ANSWERS, completion_ids=None, label=[1] * 4, trainer_state=None)
    assert got == pytest.approx(text_scores(model, tokenizer, texts), rel=1e-5)
    assert all(isinstance(score, float) for score in got)
    assert reward.__name__ == "helpful"
    bare = ModelReward(model, tokenizer, add_eos=False)(PROMPTS[:1], ANSWERS[:1])
    assert bare == pytest.approx(text_scores(model, tokenizer, [texts[0][:-1]]), rel=1e-5)


def test_conversations_go_through_the_template_with_one_start_token() -> None:
    template = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{{ eos_token }}"
    model, tokenizer = classifier(), char_tokenizer(add_bos=True, chat_template=template)
    reward = ModelReward(model, tokenizer)
    prompt, answer = [{"role": "user", "content": "hi"}], [{"role": "assistant", "content": "yo"}]
    ids = tokenizer("<bos>[user]hi[assistant]yo<eos>", add_special_tokens=False)["input_ids"]
    assert ids.count(1) == 1
    assert reward([prompt], [answer]) == pytest.approx(text_scores(model, tokenizer, [ids]), rel=1e-5)
    with pytest.raises(ValueError, match="no chat template"):
        ModelReward(model, char_tokenizer())([prompt], [answer])


def test_scoring_leaves_no_gradient_and_no_mode_behind() -> None:
    model = classifier(tiny_gpt2, resid_pdrop=0.5)
    reward = ModelReward(model, char_tokenizer())
    assert not any(p.requires_grad for p in model.parameters())
    assert reward(PROMPTS, ANSWERS) == reward(PROMPTS, ANSWERS)


def test_texts_beyond_the_models_positions_are_unscored() -> None:
    reward = ModelReward(classifier(tiny_gpt2, n_positions=16), char_tokenizer())
    with pytest.warns(UserWarning, match="2 of 4 texts are longer than the reward model's 16 tokens|1 of 4"):
        got = reward(PROMPTS, ANSWERS)
    assert [score is None for score in got] == [False, False, True, False]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ModelReward(classifier(), char_tokenizer(), max_length=500)(PROMPTS, ANSWERS)[2] is not None


def test_from_a_folder(tmp_path: Path) -> None:
    model, tokenizer = classifier(), char_tokenizer()
    model.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    reward = ModelReward.from_pretrained(tmp_path / "judge", device="cpu")
    assert reward.__name__ == "judge"
    assert reward(PROMPTS, ANSWERS) == ModelReward(model, tokenizer)(PROMPTS, ANSWERS)


def test_unfit_reward_models_are_refused(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    tokenizer = char_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no trained score head \(score.weight is random\)"):
        ModelReward(tmp_path)
    fresh = load_sequence_classifier(tmp_path)
    with pytest.raises(ValueError, match="no trained score head"):
        ModelReward(fresh, tokenizer)
    with pytest.raises(ValueError, match="num_labels=3"):
        ModelReward(tiny_llama(head="classifier", num_labels=3), tokenizer)
    with pytest.raises(ValueError, match="needs its tokenizer"):
        ModelReward(classifier())
    with pytest.raises(ValueError, match="embeds 90"):
        ModelReward(classifier(vocab_size=90), tokenizer)
    with pytest.raises(ValueError, match="batch_size must be >= 1"):
        ModelReward(classifier(), tokenizer, batch_size=0)
    with pytest.raises(ValueError, match="2 prompts and 1 completions"):
        ModelReward(classifier(), tokenizer)(["a", "b"], ["c"])


# -- the shared layout ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("build", [tiny_llama, tiny_qwen2, tiny_gpt2])
def test_both_layouts_give_the_same_scores_and_gradients(build) -> None:
    data = random_batch(groups=4, per_group=3, prompt_lengths=(3, 14), lengths=(1, 6), seed=2)
    empty = data.completion_mask.clone()
    empty[4] = False  # an answer of no token is scored at the end of its prompt
    for rows in (data, data.replace(completion_mask=empty, mask=empty)):
        model = classifier(build, dtype=torch.float64)
        found = []
        for layout in ("padded", "shared"):
            scorer = RewardScorer(model, layout=layout)
            scores = scorer(rows)["scores"]
            (scores * torch.arange(1.0, 13.0, dtype=torch.float64)).sum().backward()
            found.append((scores, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
            model.zero_grad()
            tokens = int(rows.prompt_mask.sum() + rows.completion_mask.sum())
            assert (scorer.layout_used.computed == tokens) is (layout == "shared")
        torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-10, atol=1e-12)
        for name, grad in found[0][1].items():
            torch.testing.assert_close(grad, found[1][1][name], rtol=1e-9, atol=1e-11)


def test_answers_of_one_prompt_are_scored_with_it_once() -> None:
    prompts = [
        p
        for p in ("a long question about nothing much, ", "another one, not shorter than the first: ")
        for _ in range(4)
    ]
    answers = ["yes", "yes", "no", "no way", "perhaps", "", "p", "perhaps not"]
    order = [5, 0, 3, 7, 1, 4, 2, 6]
    model, tokenizer = classifier(), char_tokenizer(add_bos=True)
    reward = ModelReward(model, tokenizer)
    texts = [[*tokenizer(p + a)["input_ids"], EOS_ID] for p, a in zip(prompts, answers, strict=True)]
    got = reward([prompts[i] for i in order], [answers[i] for i in order])
    assert got == pytest.approx([text_scores(model, tokenizer, texts)[i] for i in order], rel=1e-5)
    assert reward.scorer.layout_used.computed < 0.5 * sum(map(len, texts))


# -- chunks by tokens -------------------------------------------------------------------------------------------------
class Sizes:
    """Texts x longest text of every pass of a reward model, and how many there were."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tokens: list[int] = []
        self.texts: list[int] = []
        forward = RewardScorer.forward

        def watched(scorer: RewardScorer, batch, **options):
            lengths = batch.prompt_mask.sum(-1)[batch.group_ids] + batch.completion_mask.sum(-1)
            self.tokens.append(int(len(lengths) * lengths.max()))
            self.texts.append(len(lengths))
            return forward(scorer, batch, **options)

        monkeypatch.setattr(RewardScorer, "forward", watched)


def many() -> tuple[list[str], list[str]]:
    prompts = [f"question {i}: " + "what is it? " * (i % 3) for i in range(6) for _ in range(4)]
    return prompts, ["yes" * (1 + (7 * i) % 5) for i in range(24)]


@pytest.mark.parametrize("layout", ["auto", "padded"])
@pytest.mark.parametrize("budget", [1, 70, 200, 10_000])
def test_a_reward_model_scores_by_tokens(monkeypatch: pytest.MonkeyPatch, budget: int, layout) -> None:
    model, tokenizer, (prompts, answers) = classifier(dtype=torch.float64), char_tokenizer(), many()
    truth = ModelReward(model, tokenizer, batch_size=1)(prompts, answers)
    sizes = Sizes(monkeypatch)
    reward = ModelReward(model, tokenizer, max_tokens=budget)
    reward.scorer.layout = layout
    assert reward(prompts, answers) == pytest.approx(truth, rel=1e-10)
    assert sum(sizes.texts) == 24
    for tokens, texts in zip(sizes.tokens, sizes.texts, strict=True):
        assert tokens <= budget or texts == 1
    assert len(sizes.texts) == {1: 24, 10_000: 1}.get(budget, len(sizes.texts))
    assert 1 <= len(sizes.texts) <= 24


def test_a_budget_takes_the_place_of_a_number_of_texts() -> None:
    model, tokenizer = classifier(), char_tokenizer()
    with pytest.raises(ValueError, match="max_tokens must be >= 1"):
        ModelReward(model, tokenizer, max_tokens=0)
    with pytest.raises(ValueError, match="batch_size=3 does nothing beside max_tokens=100; drop one"):
        ModelReward(model, tokenizer, batch_size=3, max_tokens=100)
