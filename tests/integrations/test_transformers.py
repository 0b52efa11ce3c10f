"""The Hugging Face Trainer on private data: the steps of a plain loop, resumed; refusals of what cannot work."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset

import dpdl
from accountants import NeighboringRelation
from dpdl.errors import CheckpointError, LoaderError, LossError, ParameterError, WrapError
from dpdl.integrations.transformers import PrivateTraining
from tests.small_run import same, weights_of

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

N, BATCH, STEPS, VOCABULARY = 24, 8, 6, 40  # three steps in a pass
DELTA = 1e-3


class Texts(Dataset[dict[str, Any]]):
    """Sentences of 3 to 8 token numbers, class 1 where the first is large; with a label as a classifier wants it."""

    def __init__(self, n: int = N, *, numbers: bool = False) -> None:
        generator = torch.Generator().manual_seed(41)
        self._ids = [torch.randint(2, VOCABULARY, (3 + i % 6,), generator=generator).tolist() for i in range(n)]
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        label = self._ids[index][0] > VOCABULARY // 2
        return {"input_ids": self._ids[index], "labels": float(label) if self._numbers else int(label), "unused": "x"}


def padded(rows: list[dict[str, Any]]) -> Any:
    """As a tokenizer's collator does it, in a mapping that is no dict."""
    length = 8
    ids = [row["input_ids"] for row in rows]
    return transformers.BatchEncoding(
        {
            "input_ids": torch.tensor([row + [0] * (length - len(row)) for row in ids]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ids]),
            "labels": torch.tensor([row["labels"] for row in rows]),
        }
    )


def classifier(labels: int = 2) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(42)
        return transformers.BertForSequenceClassification(
            transformers.BertConfig(
                vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
                max_position_embeddings=16, num_labels=labels,
                hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            )
        )  # fmt: skip


def a_plan(steps: int = STEPS, noise_multiplier: float = 1.0) -> dpdl.PrivacyPlan:
    loader = DataLoader(Texts(), batch_size=BATCH)
    return dpdl.PrivacyPlan.for_loader(loader, steps=steps, noise_multiplier=noise_multiplier, max_grad_norm=1.0)


class PrivateTrainer(PrivateTraining, transformers.Trainer):  # type: ignore[misc]
    """As the guide has it."""


def arguments(folder: Path, **settings: Any) -> Any:
    settings = {"num_train_epochs": 2, "save_strategy": "no", "max_grad_norm": 0.0, "logging_steps": 100, **settings}
    return transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=BATCH, learning_rate=0.1, lr_scheduler_type="constant",
        optim="sgd", use_cpu=True, disable_tqdm=True, report_to="none", dataloader_pin_memory=False,
        remove_unused_columns=False, **settings,
    )  # fmt: skip


def trainer(
    folder: Path,
    model: nn.Module | None = None,
    *,
    data: Any = None,
    plan: Any = None,
    execution: dict[str, Any] | None = None,
    more: dict[str, Any] | None = None,
    **settings: Any,
) -> Any:
    return PrivateTrainer(
        model or classifier(),
        arguments(folder, **settings),
        data_collator=padded,
        train_dataset=Texts() if data is None else data,
        eval_dataset=Texts(10),
        plan=a_plan() if plan is None else plan,
        delta=DELTA,
        execution=dpdl.Execution(insecure_seed=43, **(execution or {})),
        **(more or {}),
    )


def plainly(model: nn.Module, *, loss: Any = None, data: Any = None, passes: int = 2, **execution: Any) -> Any:
    """The run that an ordinary loop makes, with the loss written out."""
    loader = DataLoader(data or Texts(), batch_size=BATCH, collate_fn=lambda rows: dict(padded(rows)))
    private = dpdl.make_private(
        model, torch.optim.SGD(model.parameters(), lr=0.1), loader, a_plan(),
        execution=dpdl.Execution(insecure_seed=43, **execution),
    )  # fmt: skip
    private.model.train()
    for _ in range(passes):
        for batch in private.loader:
            private.optimizer.zero_grad()
            labels = batch.pop("labels")
            logits = private.model(**batch).logits
            (F.cross_entropy(logits, labels) if loss is None else loss(logits, labels)).backward()
            private.optimizer.step()
    return private


def close(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.allclose(one[name], other[name], rtol=1e-4, atol=1e-6) for name in one | other)


def test_it_takes_the_steps_of_a_plain_loop(tmp_path: Path) -> None:
    run = trainer(tmp_path, logging_steps=2)
    before = weights_of(run.model)
    result = run.train()
    assert result.global_step == STEPS == run.private.optimizer.steps_taken
    assert run.private.model.engine_name == "tape"
    assert not same(before, weights_of(run.model))
    assert close(weights_of(run.model), weights_of(plainly(classifier()).model))
    logged = [row["epsilon"] for row in run.state.log_history if "epsilon" in row]
    assert len(logged) == STEPS // 2
    assert logged == sorted(logged)
    assert logged[-1] == run.private.optimizer.epsilon(DELTA)
    assert run.private.optimizer.report(DELTA).steps == STEPS
    assert not any("declared" in note for note in run.private.optimizer.report(DELTA).notes)  # the loss was checked


def test_evaluation_and_prediction_are_the_trainers_own(tmp_path: Path) -> None:
    run = trainer(tmp_path, eval_strategy="epoch")
    run.train()
    metrics = run.evaluate()
    batch = dict(padded([Texts(10)[i] for i in range(10)]))
    with torch.no_grad():
        expected = run.model.eval()(**batch)
    assert metrics["eval_loss"] == pytest.approx(float(expected.loss), rel=1e-5)
    assert torch.allclose(torch.from_numpy(run.predict(Texts(10)).predictions), expected.logits, atol=1e-6)
    assert run.private.optimizer.steps_taken == STEPS


def test_parts_of_a_batch_are_one_step(tmp_path: Path) -> None:
    run = trainer(tmp_path, execution={"max_physical_batch_size": 3})
    assert run.train().global_step == STEPS == run.private.optimizer.steps_taken
    assert close(weights_of(run.model), weights_of(plainly(classifier()).model))


def test_the_model_computes_a_loss_that_is_not_known(tmp_path: Path) -> None:
    """A token's class each: the mean over an example's own tokens, then over examples."""

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.tags = nn.Embedding(VOCABULARY, 6), nn.Linear(6, 3)

        def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            logits = self.tags(self.words(input_ids))
            if labels is None:
                return {"logits": logits}
            return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}

    class Tags(Texts):
        def __getitem__(self, index: int) -> dict[str, Any]:
            row = super().__getitem__(index)
            ids = (row["input_ids"] * 3)[:8]
            return {"input_ids": ids, "labels": [i % 3 for i in ids]}

    torch.manual_seed(44)
    run = trainer(tmp_path, Tagger(), data=Tags(), eval_strategy="no")
    torch.manual_seed(44)
    twin = Tagger()
    run.train()

    def own_means(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(1).mean()

    class Attributes(nn.Module):
        def __init__(self, tagger: nn.Module) -> None:
            super().__init__()
            self.tagger = tagger

        def forward(self, **inputs: Tensor) -> Any:
            return transformers.modeling_outputs.TokenClassifierOutput(logits=self.tagger(**inputs)["logits"])

    expected = plainly(Attributes(twin), loss=own_means, data=Tags())
    assert run.private.model.engine_name == "vmap"
    assert close(weights_of(run.model), weights_of(twin))
    assert expected.optimizer.steps_taken == STEPS


def test_a_model_of_one_s_own_keeps_its_loss(tmp_path: Path) -> None:
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(45)
            self.words, self.out = nn.Embedding(VOCABULARY, 6), nn.Linear(6, 2)

        def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Any:
            logits = self.out(self.words(input_ids).mean(1))
            if labels is None:
                return transformers.modeling_outputs.SequenceClassifierOutput(logits=logits)
            return {"loss": 2 * F.cross_entropy(logits, labels)}

    run = trainer(tmp_path, Doubled(), eval_strategy="no")
    run.train()
    expected = plainly(Doubled(), loss=lambda logits, labels: 2 * F.cross_entropy(logits, labels))
    assert close(weights_of(run.model), weights_of(expected.model))
    assert run.private.model.engine_name == "vmap"


def test_a_ledger_of_the_data_set_holds_the_run(tmp_path: Path) -> None:
    data = dpdl.Ledger(relation=NeighboringRelation.ADD_OR_REMOVE)
    run = trainer(tmp_path, max_steps=2, more={"ledger": data})
    run.train()
    assert data.releases == 2 == run.private.optimizer.steps_taken


def test_ones_own_loss_and_smoothing(tmp_path: Path) -> None:
    def smooth(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=0.2)

    def own(outputs: Any, labels: Tensor, num_items_in_batch: Any) -> Tensor:
        assert num_items_in_batch is None
        return smooth(outputs.logits, labels)

    expected = weights_of(plainly(classifier(), loss=smooth).model)
    for settings in ({"more": {"compute_loss_func": own}}, {"label_smoothing_factor": 0.2}):
        run = trainer(tmp_path, **settings)
        run.train()
        assert close(weights_of(run.model), expected), settings


@pytest.mark.parametrize("kind", ["class", "number", "whole number", "several classes", "several numbers"])
def test_the_loss_is_the_classifier_s_own(tmp_path: Path, kind: str) -> None:
    labels = {
        "class": torch.tensor([1, 0, 1]),
        "number": torch.tensor([0.5, 2.0, -1.0]),
        "whole number": torch.tensor([3, 1, 2]),
        "several classes": torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]),
        "several numbers": torch.tensor([[1.5, 0.0], [-1.0, 1.0], [0.0, 0.5]]),
    }[kind]
    model = classifier(labels=1 if "number" in kind and labels.ndim == 1 else 2)
    model.config.problem_type = "regression" if kind == "several numbers" else None
    batch = {"input_ids": torch.randint(2, VOCABULARY, (3, 8)), "labels": labels}
    theirs = (
        copy.deepcopy(model).eval()(**{**batch, "labels": labels.float() if kind == "whole number" else labels}).loss
    )
    run = trainer(tmp_path, model)
    _ = run.private

    class Stand(torch.nn.Module):
        def forward(self, **inputs: Any) -> Any:
            return model.eval()(**inputs)

    stand = Stand()
    run._private = run._private._replace(model=stand)
    assert torch.allclose(run.compute_loss(stand, batch), theirs)


def test_bfloat16(tmp_path: Path) -> None:
    run = trainer(tmp_path, bf16=True)
    seen: list[torch.dtype] = []
    run.model.bert.pooler.dense.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    run.train()
    assert run.private.optimizer.steps_taken == STEPS
    assert torch.bfloat16 in seen
    assert torch.float32 not in seen  # checks run in float64
    exact = weights_of(plainly(classifier()).model)
    assert all(torch.allclose(exact[name], value, atol=0.02) for name, value in weights_of(run.model).items())


def test_an_adapter_is_all_that_moves(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng(devices=[]):
        model = peft.get_peft_model(classifier(), peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    run = trainer(tmp_path, model, save_strategy="epoch")
    before = weights_of(model)
    run.train()
    moved = {name for name, value in weights_of(model).items() if not torch.equal(value, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("lora_A" in name for name in moved)
    assert any("lora_B" in name for name in moved)
    assert (tmp_path / "checkpoint-6" / "adapter_model.safetensors").exists()


def test_a_loss_that_is_no_mean_over_examples_is_refused(tmp_path: Path) -> None:
    """A mean weighted by class: how much one example counts depends on the others."""

    def weighted(outputs: Any, labels: Tensor, num_items_in_batch: Any) -> Tensor:
        return F.cross_entropy(outputs.logits, labels, weight=torch.tensor([1.0, 9.0]))

    run = trainer(tmp_path, more={"compute_loss_func": weighted})
    assert type(next(iter(run.get_train_dataloader()))) is dict  # whose labels the check can follow
    with pytest.raises(LossError, match="mean"):
        run.train()
    assert run.private.optimizer.ledger.releases == 0


# ── checkpoints ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("saved_at", [2, 3])  # in the middle and at the end of a pass
def test_resuming_goes_on_with_ledger_and_place(tmp_path: Path, saved_at: int) -> None:
    whole = trainer(tmp_path, save_strategy="steps", save_steps=saved_at)
    whole.train()
    resumed = trainer(tmp_path / "again")
    result = resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{saved_at}"))
    assert result.global_step == STEPS == resumed.private.optimizer.steps_taken
    assert resumed.private.optimizer.epsilon(DELTA) == whole.private.optimizer.epsilon(DELTA)
    assert same(weights_of(resumed.model), weights_of(whole.model))


def test_a_checkpoint_without_ledger_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, save_strategy="steps", save_steps=2, save_only_model=True).train()
    resumed = trainer(tmp_path / "again")
    with pytest.raises(CheckpointError, match=r"step 2, but the ledger knows of 0"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.private.optimizer.ledger.releases == 0


def test_a_checkpoint_of_plain_training_is_refused(tmp_path: Path) -> None:
    plain = transformers.Trainer(
        classifier(),
        arguments(tmp_path, save_strategy="steps", save_steps=2),
        train_dataset=Texts(),
        data_collator=padded,
    )
    plain.train()
    with pytest.raises(CheckpointError, match="no ledger"):
        trainer(tmp_path / "again").train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


# ── refusals ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_accumulation_steps": 2},
        {"max_grad_norm": 1.0},
        {"train_sampling_strategy": "group_by_length"},
        {"fp16": True},
        {"torch_compile": True},
        {"auto_find_batch_size": True},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_that_cannot_work_are_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    name = next(iter(settings))
    model = classifier()
    before = weights_of(model)
    with pytest.raises(ParameterError, match=f"cannot train privately with {name}="):
        trainer(tmp_path, model, **settings)
    assert same(before, weights_of(model))


def test_more_steps_than_planned_are_refused_before_the_first(tmp_path: Path) -> None:
    run = trainer(tmp_path, num_train_epochs=3)
    with pytest.raises(ParameterError, match=r"ask for 9 steps .* plan has 6"):
        run.train()
    assert run.private.optimizer.ledger.releases == 0


def test_streams_several_models_and_no_plan_are_refused(tmp_path: Path) -> None:
    class Stream(IterableDataset[dict[str, Any]]):
        def __iter__(self) -> Any:
            return (Texts()[i] for i in range(N))

    with pytest.raises(LoaderError, match="IterableDataset"):
        trainer(tmp_path, data=Stream(), max_steps=2).train()
    with pytest.raises(WrapError, match="plan must be a PrivacyPlan"):
        trainer(tmp_path, plan=3.0)
    with pytest.raises(WrapError, match="model_init"):
        PrivateTrainer(None, arguments(tmp_path), model_init=classifier, plan=a_plan(), delta=DELTA)
