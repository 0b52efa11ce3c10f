"""Copies, forks, seeds and processes: whatever could let two runs share noise, or one run lose count."""

from __future__ import annotations

import copy
import os
import pickle
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F

import dpdl
from dpdl.errors import ModelError, WrapError
from tests.misuse.case import Trial, misuse
from tests.small_run import examples, network, released, same, small_run, step_once, weights_of

COPIES = "Copies and processes"


@misuse(
    COPIES,
    tried="copy.copy, copy.deepcopy or pickle of the private optimizer",
    peer="Opacus: AttributeError, and every later DPOptimizer of the process is broken",
    refused=WrapError,
)
def copying_the_optimizer(trial: Trial) -> None:
    private = small_run()
    for way in (copy.copy, copy.deepcopy, pickle.dumps):
        with trial.refused(private):
            way(private.optimizer)
    step_once(small_run())


@misuse(
    COPIES,
    tried="pickling the private model (torch.save(model))",
    peer="deepee (D7): saves the whole module",
    refused=TypeError,
)
def pickling_the_model(trial: Trial) -> None:
    private = small_run()
    with trial.refused(private):
        pickle.dumps(private.model)
    with trial.refused(private):
        torch.save(private.model, trial.folder / "model.pt")


@misuse(
    COPIES,
    tried="copy.deepcopy of the private model, trained by a plain optimizer",
    harmless="the copy is the plain module, with parameters of its own: the private run does not move",
)
def copying_the_model(trial: Trial) -> None:
    private = small_run()
    before = weights_of(private.model)
    twin = copy.deepcopy(private.model)
    F.cross_entropy(twin(examples()[0]), examples()[1]).backward()
    torch.optim.SGD(twin.parameters(), lr=1.0).step()
    assert not isinstance(twin, dpdl.PrivateModel)
    assert same(before, weights_of(private.model))
    assert not same(before, weights_of(twin))


def in_a_fork(attempt: Callable[[], object]) -> None:
    """Try it in a forked process, and raise here what it was refused with there."""
    into, out = os.pipe()
    child = os.fork()
    if child == 0:
        answer = ""
        try:
            attempt()
        except WrapError as error:
            answer = str(error)
        finally:
            os.write(out, answer.encode())
            os._exit(0)
    os.close(out)
    with os.fdopen(into, "rb") as answers:
        answer = answers.read().decode()
    os.waitpid(child, 0)
    if answer:
        raise WrapError(answer)


@misuse(
    COPIES,
    tried="os.fork() in the middle of a secure run: parent and child would draw the same noise",
    refused=WrapError,
)
def a_forked_run(trial: Trial) -> None:
    private = small_run(noise_multiplier=1.0, insecure_seed=None)
    with trial.refused(private):
        in_a_fork(lambda: step_once(private))
    step_once(private)  # the parent goes on


@misuse(
    COPIES,
    tried="os.fork(), then drawing batches in parent and child: both have the same ones",
    refused=WrapError,
)
def batches_drawn_in_a_fork(trial: Trial) -> None:
    private = small_run(batch_size=4, noise_multiplier=1.0, insecure_seed=None)
    with trial.refused(private):
        in_a_fork(lambda: next(iter(private.loader)))


@misuse(
    COPIES,
    tried="torch, numpy and Python seeds set anew before every step",
    peer="deepee (D3, by its own seed=): the same noise each step; the difference of two has none",
    harmless="noise and draws come from no such generator: each step has noise of its own",
)
def seeds_set_before_every_step(trial: Trial) -> None:
    data = torch.utils.data.TensorDataset(torch.zeros(12, 30).double())
    private = small_run(nn.Linear(30, 30).double(), dataset=data, noise_multiplier=1.0, insecure_seed=None)
    noises = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        (x,) = next(iter(private.loader))
        (0 * private.model(x)).mean().backward()
        private.optimizer.step()
        noises.append(released(private)["weight"])
    assert 0.9 < noises[0].std() < 1.1
    assert 1.3 < (noises[0] - noises[1]).std() < 1.53  # sqrt(2): independent


@misuse(
    COPIES,
    tried="parameters of the same shape, with a seed",
    peer="deepee (D3): equal-shaped parameters get identical noise",
    harmless="each number of each parameter has a draw of its own",
)
def parameters_of_equal_shape(trial: Trial) -> None:
    model = nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 30)).double()
    data = torch.utils.data.TensorDataset(torch.zeros(12, 30).double())
    private = small_run(model, dataset=data, noise_multiplier=1.0, insecure_seed=5)
    (x,) = next(iter(private.loader))
    (0 * private.model(x)).mean().backward()
    private.optimizer.step()
    noise = released(private)
    assert 1.3 < (noise["0.weight"] - noise["1.weight"]).std() < 1.53
    assert 0.9 < noise["1.weight"].std() < 1.1


@contextmanager
def process_group_of_one() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", store=dist.FileStore(str(Path(folder) / "store"), 1), rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


@misuse(
    COPIES,
    tried="DistributedDataParallel around the model",
    peer="Opacus: takes its DPDDP or DDP; deepee: none",
    refused=ModelError,
)
def distributed_data_parallel(trial: Trial) -> None:
    model = network()
    with process_group_of_one():
        parallel = nn.parallel.DistributedDataParallel(model)
        with trial.refused(model):
            small_run(parallel)


@misuse(
    COPIES,
    tried="a DataLoader with worker processes that shuffle by a seed of their own",
    harmless="workers fetch what the private sampler has drawn; the draws are those without workers",
)
def loader_workers(trial: Trial) -> None:
    data = torch.utils.data.TensorDataset(torch.arange(40))
    draws = []
    for workers in (0, 1):
        loader = torch.utils.data.DataLoader(data, batch_size=8, shuffle=True, num_workers=workers)
        private = small_run(nn.Linear(1, 1).double(), loader=loader)
        (rows,) = next(iter(private.loader))
        draws.append(rows.tolist())
    assert draws[0] == draws[1]


@misuse(
    COPIES,
    tried="an optimizer's hook that looks at p.grad during the step",
    harmless="what it sees is the noisy average that is applied",
)
def a_hook_on_the_plain_optimizer(trial: Trial) -> None:
    private = small_run(noise_multiplier=1.0)
    seen = []
    private.optimizer.inner.register_step_pre_hook(
        lambda optimizer, *_: seen.append([p.grad.clone() for p in optimizer.param_groups[0]["params"]])
    )
    step_once(private)
    assert same(seen, [[p.grad for p in private.model.parameters()]])
    assert float(torch.cat([gradient.flatten() for gradient in seen[0]]).std()) > 0.5 / 12
