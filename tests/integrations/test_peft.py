"""LoRA by PEFT: what is trained is the adapter, it truly moves, and it moves as plain training would move it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import dpdl
from tests.small_run import same, weights_of

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

N, T, VOCABULARY, STEPS, LR = 8, 5, 30, 3, 0.5


def decoder() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(51)
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
                num_key_value_heads=2, max_position_embeddings=8, use_cache=False, pad_token_id=0,
            )
        )  # fmt: skip


def adapted(**settings: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(52)
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **settings)
        return peft.get_peft_model(decoder(), config)


def next_word(logits: Tensor, ids: Tensor) -> Tensor:
    """The mean over examples of each one's own mean over positions."""
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").mean(1).mean()


def sentences() -> Tensor:
    return torch.randint(1, VOCABULARY, (N, T), generator=torch.Generator().manual_seed(53))


def trained(model: nn.Module, *, noise_multiplier: float, max_grad_norm: float, steps: int = STEPS) -> dpdl.Private:
    """As the guide has it; every example in every batch."""
    loader = DataLoader(TensorDataset(sentences()), batch_size=N)
    plan = dpdl.PrivacyPlan.for_loader(
        loader, steps=steps, noise_multiplier=noise_multiplier, max_grad_norm=max_grad_norm
    )
    trainable = [p for p in model.parameters() if p.requires_grad]
    private = dpdl.make_private(
        model, torch.optim.SGD(trainable, lr=LR), loader, plan, execution=dpdl.Execution(insecure_seed=54)
    )
    private.model.train()
    for _ in range(steps):
        for (ids,) in private.loader:
            private.optimizer.zero_grad()
            next_word(private.model(input_ids=ids).logits, ids).backward()
            private.optimizer.step()
    return private


def plainly_trained(model: nn.Module, steps: int = STEPS) -> nn.Module:
    """Without dpdl: full batches of the same examples."""
    twin = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=LR)
    for _ in range(steps):
        optimizer.zero_grad()
        next_word(twin(input_ids=sentences()).logits, sentences()).backward()
        optimizer.step()
    return twin


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name, value in after.items() if not torch.equal(before[name], value)}


def test_the_adapter_moves_and_nothing_else() -> None:
    model = adapted()
    before = weights_of(model)
    private = trained(model, noise_multiplier=1.0, max_grad_norm=1.0)
    after = weights_of(model)
    assert moved(before, after) == {name for name in after if "lora_" in name}
    assert len(moved(before, after)) == 4  # A and B, of two projections
    assert private.optimizer.epsilon(1e-3) > 0
    assert private.model.engine_name == "tape"
    assert set(private.optimizer.trainable()) == moved(before, after)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_without_noise_and_clipping_it_moves_as_in_plain_training(settings: dict[str, Any]) -> None:
    model = adapted(**settings)
    before, expected = weights_of(model), weights_of(plainly_trained(model))
    trained(model, noise_multiplier=0.0, max_grad_norm=1e9)
    after = weights_of(model)
    assert moved(before, after) == moved(before, expected)
    for name in moved(before, expected):
        change, wanted = after[name] - before[name], expected[name] - before[name]
        assert torch.allclose(change, wanted, rtol=1e-3, atol=1e-6 + 1e-3 * float(wanted.abs().max())), name


def test_the_first_step_moves_b_alone_because_b_starts_at_zero() -> None:
    """Not a bug of private training: the gradient of A is B's transpose times something."""
    model = adapted()
    before = weights_of(model)
    trained(model, noise_multiplier=0.0, max_grad_norm=1.0, steps=1)
    after = weights_of(model)
    assert moved(before, after) == {name for name in after if "lora_B" in name}


def test_what_is_saved_is_the_adapter_and_predicts_the_same(tmp_path: Path) -> None:
    model = adapted()
    private = trained(model, noise_multiplier=1.0, max_grad_norm=1.0)
    private.model.module.save_pretrained(str(tmp_path))
    loaded = peft.PeftModel.from_pretrained(decoder(), str(tmp_path)).eval()
    private.model.eval()
    with torch.no_grad():
        expected = private.model(input_ids=sentences()).logits
        assert torch.allclose(loaded(input_ids=sentences()).logits, expected, atol=1e-6)
        merged = loaded.merge_and_unload()(input_ids=sentences()).logits
    assert torch.allclose(merged, expected, atol=1e-5)
    assert not torch.allclose(expected, decoder().eval()(input_ids=sentences()).logits, atol=1e-3)


def test_a_second_stage_trains_the_base_in_a_run_of_its_own() -> None:
    """Freezing the adapter later and training the head: another optimizer, another run."""
    model = adapted()
    trained(model, noise_multiplier=1.0, max_grad_norm=1.0)
    before = weights_of(model)
    for name, p in model.named_parameters():
        p.requires_grad_("lm_head" in name)
    second = copy.deepcopy(model)  # parameters belong to one run each
    trained(second, noise_multiplier=1.0, max_grad_norm=1.0)
    assert moved(before, weights_of(second)) == {name for name in before if "lm_head" in name}
    assert same(before, weights_of(model))
