"""Each row is noised once: for any number of epochs, processes and restarts; another row or encoder is refused."""

from __future__ import annotations

import multiprocessing
import sqlite3
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from accountants import NeighboringRelation
from dpdl import LedgerFile
from dpdl.budget import Budget
from dpdl.errors import BudgetExceededError, CheckpointError, ParameterError, WrapError
from dpdl.ledger import Ledger
from dpdl.secure_random import RandomStream
from dpdl.split.cut_release import CutRelease
from dpdl.split.part_training import PartTraining
from dpdl.split.releaser import CachedRelease
from dpdl.split.row_account import RowAccount
from dpdl.split.row_cache import RowCache, encoder_digest

REPLACE_ONE = NeighboringRelation.REPLACE_ONE
ONCE = CutRelease(max_norm=1.0, noise_multiplier=2.0, mode="release_once")
X = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))


def encoder(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.Dropout(0.5)).requires_grad_(False)


def opened(
    path: Path | None = None,
    *,
    ledger: Ledger | LedgerFile | None = None,
    net: nn.Module | None = None,
    release: CutRelease = ONCE,
    cache: RowCache | None = None,
) -> CachedRelease:
    account = RowAccount(ledger=ledger or Ledger(relation=REPLACE_ONE), run="server", training=PartTraining.frozen())
    return CachedRelease(
        release,
        cache=cache or RowCache(path),
        encoder=net or encoder(),
        account=account,
        stream=RandomStream.from_os(),
    )


def rows(*places: int) -> tuple[Tensor, list[int]]:
    return X[list(places)], list(places)


def test_a_row_is_the_same_in_every_epoch_batch_and_process(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    cut = opened(path)
    first = cut.release(*rows(0, 1, 2))
    assert not torch.equal(first[0], first[1])
    again = cut.release(*rows(2, 5, 0))
    assert torch.equal(again[[2, 0]], first[[0, 2]])
    another = opened(path).release(*rows(5, 1))
    assert torch.equal(another, torch.stack([again[1], first[1]]))
    assert cut._cache.count == 4


def test_rows_are_the_encoders_clipped_rows_with_noise_of_s_times_c() -> None:
    net = encoder().eval()
    many = torch.randn(3000, 6, generator=torch.Generator().manual_seed(2))
    noise = opened(net=net).release(many, range(3000)) - net(many) / net(many).norm(dim=1, keepdim=True).clamp_min(1)
    error = 2.0 / (2 * noise.numel()) ** 0.5
    assert abs(noise.std().item() - 2.0) < 5 * error
    assert abs(noise.std().item() - 2.0 * 0.95) > 5 * error


def test_rows_of_different_batches_have_noise_of_their_own() -> None:
    cut = opened()
    assert not torch.isclose(cut.release(X[[0, 0]], [0, 1]), cut.release(X[[0, 0]], [2, 3])).any()


def test_any_number_of_epochs_spends_one_release() -> None:
    cut = opened()
    for _ in range(5):
        for batch in (range(0, 10), range(10, 20)):
            cut.release(*rows(*batch))
    assert cut.account.ledger.releases == 1
    assert cut.account.epsilon(1e-5) == pytest.approx(4.3765, abs=1e-3)  # mu = 2 / s = 1


def test_restarts_spend_nothing_more_and_another_cache_does(tmp_path: Path) -> None:
    ledger = LedgerFile(tmp_path / "ledger", relation=REPLACE_ONE)
    for places in ((0, 1), (1, 2), (0, 3)):
        opened(tmp_path / "rows", ledger=ledger).release(*rows(*places))
    assert ledger.releases == 1
    opened(tmp_path / "others", ledger=ledger).release(*rows(0))
    assert ledger.releases == 2


def test_a_release_beyond_the_budget_does_not_happen() -> None:
    cut = opened(ledger=Ledger(relation=REPLACE_ONE, budget=Budget(epsilon=4.0, delta=1e-5)))
    with pytest.raises(BudgetExceededError):
        cut.release(*rows(0))
    assert cut._cache.count == 0


def test_a_changed_row_under_its_name_is_refused(tmp_path: Path) -> None:
    cut = opened(tmp_path / "rows")
    cut.release(*rows(0, 1))
    changed = X[[0, 1]].clone()
    changed[1, 0] += 1e-6
    with pytest.raises(CheckpointError, match="row 1 is not what it was"):
        opened(tmp_path / "rows").release(changed, [0, 1])
    with pytest.raises(CheckpointError, match="row 7 is not what it was"):
        cut.release(X[[0, 1]], [7, 7])
    assert 7 not in cut._cache


def test_a_changed_encoder_is_refused_and_so_is_another_release(tmp_path: Path) -> None:
    net = encoder()
    cut = opened(tmp_path / "rows", net=net)
    cut.release(*rows(0))
    with torch.no_grad():
        net[0].weight.data.add_(1e-6)  # type: ignore[operator, union-attr]
    with pytest.raises(CheckpointError, match="encoder has changed"):
        cut.release(*rows(1))
    with pytest.raises(CheckpointError, match="encoder was"):
        opened(tmp_path / "rows", net=encoder(1))
    with pytest.raises(CheckpointError, match=r"noise_multiplier was 2\.0, now 1\.0"):
        opened(tmp_path / "rows", release=CutRelease(max_norm=1.0, noise_multiplier=1.0, mode="release_once"))
    shared = RowCache()
    opened(cache=shared)
    with pytest.raises(CheckpointError, match="another encoder"):
        opened(cache=shared, net=encoder(1))


def test_a_trained_part_and_the_other_mode_are_refused() -> None:
    trained = RowAccount(
        ledger=Ledger(relation=REPLACE_ONE), run="server", training=PartTraining.private(noise_multiplier=1.0)
    )
    with pytest.raises(ParameterError, match="frozen and public"):
        CachedRelease(ONCE, cache=RowCache(), encoder=encoder(), account=trained, stream=RandomStream.from_os())
    with pytest.raises(ParameterError, match="frozen"):
        trained.spend_once("rows", ONCE.event, store="x")
    with pytest.raises(ParameterError, match="RowReleaser"):
        opened(release=CutRelease(max_norm=1.0, noise_multiplier=1.0))


def test_names_are_names_whether_numbers_or_texts() -> None:
    cut = opened()
    a = cut.release(X[[0, 0]], [7, "7"])
    assert not torch.equal(a[0], a[1])
    assert torch.equal(cut.release(X[[0]], torch.tensor([7]))[0], a[0])


def test_a_row_that_is_twice_in_a_batch_is_noised_once() -> None:
    sent = opened().release(X[[3, 3, 4]], [3, 3, 4])
    assert torch.equal(sent[0], sent[1])
    assert not torch.equal(sent[1], sent[2])


def test_an_empty_batch_spends_nothing() -> None:
    cut = opened()
    assert cut.release(X[:0], []).shape == (0, 3)
    assert cut.account.ledger.releases == 0


class Mixing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


def test_an_encoder_that_mixes_examples_is_run_on_each_alone() -> None:
    """Else a row would tell of the others that happened to be in its batch."""
    release = CutRelease(max_norm=1.0, noise_multiplier=1e-9, mode="release_once")
    assert opened(net=Mixing(), release=release).release(*rows(0, 1, 2)).norm() < 1e-6


def test_two_things_the_same_in_all_but_a_bit_have_other_digests() -> None:
    net = encoder()
    before = encoder_digest(net)
    assert before == encoder_digest(encoder())
    net[0].bias.data[0].nextafter_(torch.tensor(9.0))  # type: ignore[operator, union-attr, index]
    assert encoder_digest(net) != before
    assert encoder_digest(nn.ReLU()) != encoder_digest(nn.Tanh())


def test_a_draw_that_fails_leaves_nothing_and_can_be_tried_again() -> None:
    class Failing(nn.Module):
        fails = True

        def forward(self, x: Tensor) -> Tensor:
            if self.fails:
                raise RuntimeError("out of memory")
            return x

    net = Failing()
    cut = opened(net=net)
    with pytest.raises(RuntimeError, match="out of memory"):
        cut.release(*rows(0))
    assert cut._cache.count == 0
    net.fails = False
    assert cut.release(*rows(0)).shape == (1, 6)


def test_nobody_can_change_or_take_away_a_row(tmp_path: Path) -> None:
    opened(tmp_path / "rows").release(*rows(0))
    connection = sqlite3.connect(tmp_path / "rows")
    for statement in ("UPDATE rows SET value = x'00'", "DELETE FROM rows"):
        with pytest.raises(sqlite3.IntegrityError, match="drawn"):
            connection.execute(statement)


def test_a_damaged_value_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    cut = opened(path)
    sent = cut.release(*rows(0, 1, 2))
    cut._cache.close()
    content = path.read_bytes()
    at = content.index(sent[1].numpy().tobytes())
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    damaged = opened(path)
    assert torch.equal(damaged.release(*rows(0)), sent[:1])
    with pytest.raises(CheckpointError, match="damaged"):
        damaged.release(*rows(1))


@pytest.mark.parametrize("content", [b"not a database, but some text\n" * 50, b"SQLite format 3\0" + bytes(2000)])
def test_what_is_not_a_store_is_refused_and_left(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rows"
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        opened(path)
    assert path.read_bytes() == content


def test_another_database_is_refused(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "rows")
    connection.execute("CREATE TABLE header (name TEXT, value TEXT)")
    connection.close()
    with pytest.raises(CheckpointError, match="not a store"):
        opened(tmp_path / "rows")


def test_only_its_owner_may_read_the_file(tmp_path: Path) -> None:
    opened(tmp_path / "rows").release(*rows(0))
    assert (tmp_path / "rows").stat().st_mode & 0o077 == 0


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be opened"):
        opened(tmp_path / "no folder" / "rows")


def _forked(cut: CachedRelease, answers: multiprocessing.Queue[str]) -> None:
    try:
        cut.release(*rows(9))
        answers.put("released")
    except WrapError as error:
        answers.put(str(error))
    try:
        answers.put(str(cut.release(*rows(0)).tolist()))
    except WrapError as error:
        answers.put(str(error))


@pytest.mark.parametrize("in_a_file", [False, True])
def test_a_forked_process_draws_nothing_and_reads_a_file(tmp_path: Path, in_a_file: bool) -> None:
    cut = opened(
        tmp_path / "rows" if in_a_file else None,
        ledger=LedgerFile(tmp_path / "ledger", relation=REPLACE_ONE),
    )
    sent = cut.release(*rows(0))
    context = multiprocessing.get_context("fork")
    answers: multiprocessing.Queue[str] = context.Queue()
    process = context.Process(target=_forked, args=(cut, answers))
    process.start()
    drawn, read = answers.get(timeout=60), answers.get(timeout=60)
    process.join()
    assert drawn != "released"
    assert read == str(sent.tolist()) if in_a_file else "forked" in read
    assert torch.equal(cut.release(*rows(0, 1))[:1], sent)
