"""What is promised, to whom and about what: one claim for each adversary, NO GUARANTEE where there is none.

A run in which several parties see different things has no single epsilon: what DP-SGD promises to those who get the
model says nothing of a server that has seen activations. An `AdversaryReport` therefore names its adversaries first,
and cannot be made without a claim, or the word that there is none, for each of them.

Names come from other parties: a client calls itself what it likes. A claim is one line of printable characters, so that
no name can pass for a further claim.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from dpdl.claims_page import page
from dpdl.errors import ParameterError
from dpdl.privacy_report import rounded_up, shown_delta

__all__ = ["NO_GUARANTEE", "AdversaryReport", "Claim"]

NO_GUARANTEE = "NO GUARANTEE"  # what stands where an epsilon would
_SCHEMA = "dpdl.claims/1"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What one adversary can learn about one unit.

    Attributes:
        against: who: "server", "other clients", "model consumers", ...
        unit: what is protected: "record", "client", "label", ...
        because: what protects it, in words; for no guarantee, what the adversary sees unprotected.
        epsilon: an upper bound; None (or infinite) is no guarantee.
        delta: the probability that is given away; None only without a guarantee.
        relation: what neighbouring datasets differ in, in words.
        assumes: what must hold for the claim to hold.

    Raises:
        ParameterError: an epsilon without its delta, or out of range; an empty text, or one of several lines.
    """

    against: str
    unit: str
    because: str
    epsilon: float | None = None
    delta: float | None = None
    relation: str = ""
    assumes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("against", "unit", "because"):
            _refuse_unclear(f"{name} of a claim", getattr(self, name))
        if self.relation:
            _refuse_unclear("relation of a claim", self.relation)
        _refuse_unclear_list("assumes of a claim", self.assumes)
        for name in ("epsilon", "delta"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise ParameterError(f"{name} of the claim against {self.against} must be a number, got {value!r}.")
        if self.delta is not None and not 0 <= self.delta < 1:
            raise ParameterError(
                f"delta of the claim against {self.against} must be in [0, 1), got {self.delta!r}: what is given away "
                "with probability 1 is not protected."
            )
        if self.epsilon is not None and math.isinf(self.epsilon) and self.epsilon > 0:
            object.__setattr__(self, "epsilon", None)
        if self.epsilon is None:
            return
        if not self.epsilon >= 0:
            raise ParameterError(f"epsilon of the claim against {self.against} must be >= 0, got {self.epsilon!r}.")
        if self.delta is None:
            raise ParameterError(
                f"The claim against {self.against} has an epsilon and no delta: epsilon means nothing without one."
            )

    @property
    def guaranteed(self) -> bool:
        """Whether anything is promised."""
        return self.epsilon is not None

    def __str__(self) -> str:
        return self.sentence(f"assumes: {'; '.join(self.assumes)}" if self.assumes else "")

    def sentence(self, assumed: str) -> str:
        """The claim in a line, with what it assumes said in other words, or elsewhere."""
        about = f"against {self.against}, {self.unit}"
        if self.epsilon is None or self.delta is None:
            return f"{about}: {NO_GUARANTEE} ({self.because})"
        relation = f", {self.relation}" if self.relation else ""
        bound = f"epsilon <= {rounded_up(self.epsilon)} at delta = {shown_delta(self.delta)}{relation}"
        return f"{about}: {bound} ({self.because}{'; ' if assumed else ''}{assumed})"


@dataclass(frozen=True, kw_only=True)
class AdversaryReport:
    """All claims of a run with several parties, adversary by adversary.

    Attributes:
        title: what it is about.
        adversaries: everybody who may look, in the order of the report.
        claims: at least one against each of them.
        not_covered: what leaves without protection and is in none of the claims: batch sizes, timing, ...
        notes: what a reader should know.

    Raises:
        ParameterError: an adversary has no claim, or a claim is against nobody in the list; nobody is in the list, or
            somebody twice; a text is empty or of several lines.

    Example:
        >>> nothing = Claim(against="server", unit="record", because="it receives plain updates")
        >>> some = Claim(against="model consumers", unit="record", because="noise", epsilon=2.0, delta=1e-5)
        >>> print(AdversaryReport(title="A run", adversaries=("server", "model consumers"), claims=(some, nothing)))
        A run
          against server, record: NO GUARANTEE (it receives plain updates)
          against model consumers, record: epsilon <= 2.00 at delta = 1e-05 (noise)
    """

    title: str
    adversaries: tuple[str, ...]
    claims: tuple[Claim, ...]
    not_covered: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _refuse_unclear("title of a report", self.title)
        for name in ("adversaries", "not_covered", "notes"):
            _refuse_unclear_list(f"{name} of a report", getattr(self, name))
        if not isinstance(self.claims, tuple) or not all(isinstance(claim, Claim) for claim in self.claims):
            raise ParameterError(f"claims of a report are a tuple of Claim, got {self.claims!r}.")
        if not self.adversaries or len(set(self.adversaries)) < len(self.adversaries):
            raise ParameterError(
                f"adversaries of a report are those who may look, each named once; got {list(self.adversaries)}."
            )
        named = {claim.against for claim in self.claims}
        for adversary in self.adversaries:
            if adversary not in named:
                raise ParameterError(
                    f"Nothing is said about '{adversary}'. Give a Claim against it; one without an epsilon says that "
                    "there is no guarantee."
                )
        for adversary in named - set(self.adversaries):
            raise ParameterError(f"A claim is against '{adversary}', who is none of {list(self.adversaries)}.")

    def against(self, adversary: str) -> tuple[Claim, ...]:
        """The claims against one adversary.

        Raises:
            ParameterError: the report does not know it.
        """
        if adversary not in self.adversaries:
            raise ParameterError(f"adversary must be one of {list(self.adversaries)}, got {adversary!r}.")
        return tuple(claim for claim in self.claims if claim.against == adversary)

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What any of the claims assumes, each once, in the order of the report."""
        in_order = (claim for adversary in self.adversaries for claim in self.against(adversary))
        return tuple(dict.fromkeys(text for claim in in_order if claim.guaranteed for text in claim.assumes))

    def numbers(self, claim: Claim) -> tuple[int, ...]:
        """Which of `assumptions` a claim makes, counted from 1."""
        return tuple(number for number, text in enumerate(self.assumptions, start=1) if text in claim.assumes)

    def __str__(self) -> str:
        lines = [self.title]
        for adversary in self.adversaries:
            for claim in self.against(adversary):
                numbers = ", ".join(map(str, self.numbers(claim)))
                lines.append(f"  {claim.sentence(f'assumes {numbers}' if numbers else '')}")
        if self.assumptions:
            lines.append("  assumed:")
            lines += [f"    {number}. {text}" for number, text in enumerate(self.assumptions, start=1)]
        if self.not_covered:
            lines.append(f"  not covered: {'; '.join(self.not_covered)}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values; a claim without a guarantee has epsilon None."""
        claims = [{**asdict(claim), "guaranteed": claim.guaranteed} for claim in self.claims]
        return {"schema": _SCHEMA, "text": str(self), **asdict(self), "claims": claims}

    def to_json(self) -> str:
        """The report as JSON, with its schema."""
        return json.dumps(self.to_dict(), indent=2)

    def to_html(self) -> str:
        """The report as a page of its own, as `dpdl.claims_page` writes it."""
        return page(self)

    @classmethod
    def from_json(cls, text: str) -> AdversaryReport:
        """The report that `to_json` wrote, for instance at another party.

        It says what that party claims; nothing in it proves that it is so.

        Raises:
            ParameterError: it is damaged, or something else; or its text does not say what its claims do.
        """
        try:
            values = json.loads(text)
            if values["schema"] != _SCHEMA:
                raise ParameterError(f"Not an adversary report: schema {values['schema']!r}, expected {_SCHEMA!r}.")
            known = {field.name for field in fields(Claim)}
            claims = tuple(
                Claim(**{name: _unlisted(claim[name]) for name in known}) for claim in _listed(values["claims"])
            )
            report = cls(
                title=values["title"],
                claims=claims,
                **{name: tuple(_listed(values[name])) for name in ("adversaries", "not_covered", "notes")},
            )
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ParameterError(f"Not an adversary report: {error!r}. Give what to_json wrote.") from error
        if values.get("text") != str(report):
            raise ParameterError(
                "The report's text and its claims differ: one of them was changed. Ask whoever made it for another."
            )
        return report


def _refuse_unclear(name: str, text: object) -> None:
    """Raise unless this is a text in one line of printable characters."""
    if not isinstance(text, str):
        raise ParameterError(f"{name} must be a text, got {text!r}.")
    if not text.strip():
        raise ParameterError(f"{name} is empty. Say it in words.")
    if not text.isprintable():
        raise ParameterError(
            f"{name} must be one line of printable characters, got {text!r}: what follows a line break could be taken "
            "for another claim. Quote names that are not yours with repr()."
        )


def _refuse_unclear_list(name: str, texts: object) -> None:
    if not isinstance(texts, tuple):
        raise ParameterError(f"{name} must be a tuple of texts, got {texts!r}.")
    for text in texts:
        _refuse_unclear(f"an entry in {name}", text)


def _listed(values: object) -> list[Any]:
    if not isinstance(values, list):
        raise TypeError(f"{values!r} is not a list")
    return values


def _unlisted(value: object) -> Any:
    return tuple(value) if isinstance(value, list) else value
