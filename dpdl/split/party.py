"""What one party has: its parts and their optimizer, its data, its noise, its ledger, and the door.

A party trains with one client (driver) after another, each under a plan and a ledger's run of its own, since each
brings records of its own. Noise and position come from that run: a step that was begun is recorded before anything is
computed for it, and its number, and with it its noise, is never used again, whatever becomes of the step.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor

from dpdl.errors import CheckpointError, ManifestError, ModelError, ParameterError, WrapError
from dpdl.execution import Execution
from dpdl.ledger import Ledger
from dpdl.ledger_file import LedgerFile
from dpdl.noise.gaussian import gaussian_mechanism
from dpdl.plan import PrivacyPlan
from dpdl.private import private_parameters
from dpdl.run_state import RunState
from dpdl.secure_random import RandomStream
from dpdl.split.client_run import Client, begun_run
from dpdl.split.clip import Clip, PartClip, clip_for
from dpdl.split.clipped_parts import ClippedParts
from dpdl.split.columns import Columns
from dpdl.split.door import ReleaseDoor
from dpdl.split.flow import Kit
from dpdl.split.graph import SplitGraph
from dpdl.split.manifest import Manifest
from dpdl.split.outlet import KeptOutlet, MixingOutlet, Outlet, as_they_are
from dpdl.split.part_run import PartRunner
from dpdl.split.row_loss import RowLoss

__all__ = ["Party"]


@final
class Party:
    """One party of a split network.

    Args:
        graph: all of it, with at least this party's modules and losses.
        name: which party this is.
        driver: the party that begins the steps.
        optimizer: holds parameters of this party's parts, and no others; None if none of them trains.
        columns: this party's data; None if it has none.
        outlet: the door; None to let rows leave as they are.
        ledger: where what is spent adds up, if this run is not the only one or there is a budget.
        execution: speed and memory; the same settings for all parts.

    Raises:
        ParameterError, ModelError, WrapError: the parts, the optimizer or the data do not fit; nothing was changed.
    """

    def __init__(
        self,
        graph: SplitGraph,
        name: str,
        *,
        driver: str,
        optimizer: torch.optim.Optimizer | None,
        columns: Columns | None,
        outlet: Outlet | None,
        ledger: Ledger | LedgerFile | None,
        execution: Execution | None,
    ) -> None:
        self.execution = execution or Execution()
        if name not in graph.parties:
            raise ParameterError(f"party must be one of {list(graph.parties)}, got {name!r}.")
        self.graph, self.name, self.driver = graph.seen_by(name), name, driver
        self.calls = graph.calls(driver)
        self.columns = columns
        self.optimizer = optimizer
        self._ledger = ledger
        seed = self.execution.insecure_seed
        self._randomness = RandomStream.from_os() if seed is None else RandomStream.from_insecure_seed(seed)
        self._clients: dict[str, Client] = {}
        self.terms: dict[str, Manifest] = {}  # what was signed, by client: rows are to be shaped so
        self.took_weights = False  # from outside: of what they know, only the ledger can tell
        self._refuse_settings_that_do_not_fit(outlet)
        self._refuse_missing_modules()
        self._refuse_wrong_columns()
        self._refuse_wrong_optimizer()
        own = [part for part in self.graph.order if part.party == name]
        self.kit = Kit(
            graph=self.graph,
            party=name,
            runners={
                part.name: PartRunner(part.name, part.module, trains=bool(part.trains), execution=self.execution)
                for part in own
                if part.module is not None
            },
            losses={head.name: RowLoss(head) for head in self.graph.heads if head.party == name},
            trainable=self.trainable,
            outlet=outlet or as_they_are,
        )
        private_parameters.update({id(p): p for part in own for p in self.trainable(part.name).values()})

    # ── what it has ─────────────────────────────────────────────────────────────────────────────────

    @property
    def trained_parts(self) -> tuple[str, ...]:
        """The names of its parts that train."""
        return tuple(part.name for part in self.graph.trained if part.party == self.name)

    def trainable(self, part: str) -> dict[str, Tensor]:
        """The parameters of a part that are trained, as of now."""
        module = self.graph.part(part).module
        if module is None or self.optimizer is None or not self.graph.part(part).trains:
            return {}
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        found: dict[str, Tensor] = {
            name: p for name, p in module.named_parameters() if p.requires_grad and id(p) in held
        }
        if not found:
            raise ModelError(
                f"Every parameter of part '{part}' is frozen, but the graph says that it trains. Unfreeze some with "
                "requires_grad_(True), or make a graph with trains=False."
            )
        return found

    def weights(self) -> dict[str, Tensor]:
        """Copies of all parameters and buffers of its parts, by "<part>/<name>"."""
        return {
            f"{part.name}/{name}": tensor.detach().clone()
            for part in self.graph.parts
            if part.module is not None
            for name, tensor in part.module.state_dict().items()
        }

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take over what `weights` returned, of this party or one with equal parts.

        Raises:
            ModelError: names, shapes or dtypes are others; nothing was changed.
        """
        self._refuse_weights(weights)
        self._copy_weights(weights)
        self.took_weights = True

    def _copy_weights(self, weights: Mapping[str, Tensor]) -> None:
        for part in self.graph.parts:
            if part.module is not None:
                of = f"{part.name}/"
                part.module.load_state_dict({n.removeprefix(of): t for n, t in weights.items() if n.startswith(of)})

    def _refuse_weights(self, weights: Mapping[str, Tensor]) -> None:
        own = self.weights()
        if not isinstance(weights, Mapping) or not all(isinstance(t, Tensor) for t in weights.values()):
            raise ModelError(f"Weights for '{self.name}' are tensors by name, got {type(weights).__name__}.")
        wrong = sorted(set(own) ^ set(weights)) or [
            name
            for name, tensor in weights.items()
            if (own[name].shape, own[name].dtype) != (tensor.shape, tensor.dtype)
        ]
        if wrong:
            raise ModelError(f"Weights for '{self.name}' do not fit its parts: {wrong}. Send those of equal parts.")

    def owns_columns(self, *, labels: bool) -> tuple[str, ...]:
        """Its columns that a walk needs; labels only where there are losses."""
        used = {name for part in self.graph.parts for name in part.inputs}
        return tuple(c for c, owner in self.graph.columns.items() if owner == self.name and (labels or c in used))

    # ── its clients ─────────────────────────────────────────────────────────────────────────────────

    def client(self, name: str) -> Client:
        """The client of that name.

        Raises:
            ManifestError: there is no plan for it.
        """
        if name not in self._clients:
            raise ManifestError(
                f"'{self.name}' has no plan for client '{name}'; it has for {sorted(self._clients)}. Agree on one, "
                "and give it to all parties."
            )
        return self._clients[name]

    @property
    def clients(self) -> tuple[Client, ...]:
        """All clients that there is a plan for."""
        return tuple(self._clients.values())

    def admit(self, client: str, plan: PrivacyPlan, clip: Clip | None) -> Client:
        """Be ready to train with a client under a plan.

        Raises:
            ParameterError: the clip is not the plan's; or the plan has noise, and the door lets rows meet.
            LedgerError: the ledger is of another neighbouring relation.
        """
        if not isinstance(plan, PrivacyPlan):
            raise ParameterError(f"plan must be a PrivacyPlan, got {type(plan).__name__}.")
        chosen = clip_for(self.graph, plan, clip)
        if plan.noise_multiplier and isinstance(self.kit.outlet, MixingOutlet) and self.kit.outlet.mixes_rows:
            raise ParameterError(
                f"The door of '{self.name}' compares the rows of a batch ({type(self.kit.outlet).__name__}), so that "
                f"clipping row by row bounds nothing, and the plan for '{client}' has noise_multiplier "
                f"{plan.noise_multiplier:g}: its epsilon would be wrong. Train without this door, or without noise."
            )
        if isinstance(outlet := self.kit.outlet, KeptOutlet):
            outlet.bind(self.graph, self.name, clip=chosen, noise_multiplier=plan.noise_multiplier)
        run = begun_run(
            plan,
            name=f"{client} at {self.name}",
            picked_elsewhere=self.columns is not None and self.name != self.driver,
            within=self._ledger,
            randomness=self._randomness.child(f"{self.name} for {client}"),
        )
        facts = {**self.graph.facts(), "driver": self.driver, "plan": plan.to_json(), "clip": _described(chosen)}
        agreement = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        self._clients[client] = Client(name=client, plan=plan, clip=chosen, run=run, agreement=agreement)
        return self._clients[client]

    # ── saving and resuming ─────────────────────────────────────────────────────────────────────────

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimizer, and what was spent for each client: plain values and tensors, no key of a secure run."""
        return {
            "party": self.name,
            "weights": self.weights(),
            "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
            "outlet": self.kit.outlet.state_dict() if isinstance(self.kit.outlet, KeptOutlet) else None,
            "clients": {
                client.name: {
                    "agreement": client.agreement,
                    "plan": client.plan.to_json(),
                    **client.run.state_dict(),
                }
                for client in self.clients
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned: spending is remembered, noise is never used again.

        Raises:
            CheckpointError: it is of another party or run, or damaged, or its ledger is missing.
            ModelError: its weights do not fit. In both cases nothing was changed.
        """
        _refuse_no_state(state)
        if state["party"] != self.name or set(state["clients"]) != set(self._clients):
            raise CheckpointError(
                f"The state is of '{state['party']}' with clients {sorted(state['clients'])}, this party is "
                f"'{self.name}' with {sorted(self._clients)}. Make the parties as they were."
            )
        self._refuse_weights(state["weights"])
        self._refuse_optimizer_state(state["optimizer"])
        outlet = self.kit.outlet if isinstance(self.kit.outlet, KeptOutlet) else None
        if (outlet is None) != (state["outlet"] is None):
            raise CheckpointError(
                f"The state was saved {'with' if outlet is None else 'without'} a door that keeps account of what it "
                f"released, and '{self.name}' has {'none' if outlet is None else 'one'}: spending would be forgotten. "
                "Make the party with the door that it had."
            )
        runs: list[tuple[RunState, RunState]] = []
        for name, client in self._clients.items():
            saved = state["clients"][name]
            if not isinstance(saved, dict) or saved.get("agreement") != client.agreement:
                raise CheckpointError(f"The state was saved under other settings for client '{name}'. Use those.")
            theirs = RunState.from_state_dict(saved, plan=client.run.plan)
            client.run.refuse_resuming(theirs)
            runs.append((client.run, theirs))
        if outlet is not None:  # first: it may refuse its share, and then changes nothing
            outlet.load_state_dict(state["outlet"])
        for mine, theirs in runs:
            mine.become(theirs, elsewhere=mine.elsewhere(theirs))
        self._copy_weights(state["weights"])
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state["optimizer"])

    def _refuse_optimizer_state(self, state: Any) -> None:
        """Try it on a copy."""
        if (self.optimizer is None) != (state is None):
            raise CheckpointError(
                f"The state has {'no' if state is None else 'an'} optimizer's; '{self.name}' differs."
            )
        try:
            if self.optimizer is not None:
                deepcopy(self.optimizer).load_state_dict(deepcopy(state))
        except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise CheckpointError(f"The state of the optimizer of '{self.name}' does not fit: {error!r}.") from error

    # ── stepping ────────────────────────────────────────────────────────────────────────────────────

    def update(self, client: Client, sums: ClippedParts, *, rows: int, position: int) -> None:
        """Noise, average, step: what leaves the private side of this party in one step.

        Args:
            client: whose step.
            sums: of this step, complete.
            rows: N.
            position: the step's, from `client.run.next_step()`; each is used once.
        """
        if self.optimizer is None or not self.trained_parts:
            return
        trainable = {part: self.trainable(part) for part in self.trained_parts}
        total = sums.total(trainable, rows=rows, accumulate_dtype=self.execution.accumulate_dtype)
        noisy = gaussian_mechanism(
            total,
            noise_multiplier=client.plan.noise_multiplier,
            stream=client.run.noise,
            step=position,
            reuse=True,
        )
        self.optimizer.zero_grad(set_to_none=True)  # what others may have left there is not part of the release
        for part, parameters in trainable.items():
            for name, p in parameters.items():
                p.grad = (noisy.tensors[f"{part}/{name}"] / client.plan.expected_batch_size).to(p.dtype)
        try:
            self.optimizer.step()
        finally:
            self.optimizer.zero_grad(set_to_none=True)

    # ── refusals ────────────────────────────────────────────────────────────────────────────────────

    def _refuse_settings_that_do_not_fit(self, door: Outlet | None) -> None:
        if self.execution.max_physical_batch_size is not None:
            raise ParameterError(
                "max_physical_batch_size is not supported in split learning: a batch crosses the cut whole. Leave it "
                "None; engine='vmap' with chunk_size bounds the memory of per-sample gradients."
            )
        once = isinstance(door, ReleaseDoor) and door.activations and door.activations.mode == "release_once"
        if once and not self.execution.self_check:
            raise ParameterError(
                "Rows are released once from an encoder that keeps them apart, and self_check=False would not look "
                "whether it does: a row could hold the whole batch. Leave self_check on."
            )
        self.execution = replace(self.execution, loss_reduction="sum")

    def _refuse_missing_modules(self) -> None:
        for part in self.graph.parts:
            if part.party == self.name and part.module is None:
                raise ParameterError(f"Part '{part.name}' is with '{self.name}', but has no module there. Give it one.")
        for head in self.graph.heads:
            if head.party == self.name and head.loss_fn is None:
                raise ParameterError(f"Head '{head.name}' is with '{self.name}' and has no loss_fn there. Give it one.")

    def _refuse_wrong_columns(self) -> None:
        needed, given = set(self.owns_columns(labels=True)), set(self.columns.names if self.columns else ())
        if needed != given:
            raise ParameterError(
                f"'{self.name}' needs the columns {sorted(needed)}, and was given {sorted(given)}. Name them as the "
                "graph does."
            )

    def _refuse_wrong_optimizer(self) -> None:
        if not self.trained_parts:
            if self.optimizer is not None:
                raise WrapError(f"No part of '{self.name}' trains, so its optimizer would do nothing. Give None.")
            return
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            raise WrapError(
                f"Parts {list(self.trained_parts)} of '{self.name}' train: give an optimizer that holds their "
                f"parameters, got {type(self.optimizer).__name__}."
            )
        if isinstance(self.optimizer, (torch.optim.LBFGS, torch.optim.SparseAdam)):
            raise WrapError(f"{type(self.optimizer).__name__} cannot step from noisy sums. Use SGD or Adam.")
        own = {id(p): name for name in self.trained_parts for p in _parameters(self.graph, name)}
        for index, group in enumerate(self.optimizer.param_groups):
            for position, p in enumerate(group["params"]):
                if id(p) not in own:
                    raise WrapError(
                        f"Parameter {position} of group {index} of the optimizer of '{self.name}' is in none of its "
                        f"parts that train ({list(self.trained_parts)}), so nothing would clip it. Build the optimizer "
                        "from their parameters."
                    )
                if private_parameters.get(id(p)) is p:
                    raise WrapError(
                        f"A parameter of part '{own[id(p)]}' is trained by another split run already, which would not "
                        "know what this one spends. Go on with that one, or start anew with copy.deepcopy."
                    )
        for name in self.trained_parts:
            self.trainable(name)


def _refuse_no_state(state: Mapping[str, Any]) -> None:
    needed = {"party", "weights", "optimizer", "outlet", "clients"}
    if not isinstance(state, Mapping) or (missing := sorted(needed - set(state))):
        raise CheckpointError(f"Not the state of a party: {missing if isinstance(state, Mapping) else 'no mapping'}.")
    if not isinstance(state["clients"], Mapping):
        raise CheckpointError("The state is damaged: it does not say which clients the party had.")


def _parameters(graph: SplitGraph, part: str) -> list[Tensor]:
    module = graph.part(part).module
    return [] if module is None else list(module.parameters())


def _described(clip: Clip) -> Any:
    kind = "part" if isinstance(clip, PartClip) else "joint"
    norm = clip.max_grad_norm
    return [kind, dict(norm) if isinstance(norm, Mapping) else norm]
