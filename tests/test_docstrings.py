"""What the docstring of every public name has to say: arguments, shapes, the guarantee, errors, the source.

`tests/public_names.py` says which names are public. Six rules; no name breaks one of them.

    docstring  there is one; a constant, which cannot have one, has a comment
    arguments  each parameter has an entry under Args or Attributes. Where there are one or two they may be in the text
               instead, two of them in backticks: most such docstrings are a sentence; and what reads what `to_json` or
               `state_dict` wrote says so. *args and **kwargs are another function's
    shapes     what is annotated as a tensor or an array has a shape where it is described
    errors     each of the project's exceptions that the body raises, itself or in functions of its own file that it
               calls, is under Raises, by its name or a base's; what only refuses may say "Raise an XError unless".
               What an argument's class refuses when it is made, and what other files raise, is said where that is
    guarantee  what bounds, reports, draws or releases says what holds, or that nothing does (GUARANTEES, BOUNDS)
    source     a published method names its paper (SOURCES)

A class or method also has what the docstring of its base, or of the method that it overrides, says, and what one that
it refers to says ("as in `other`"). One that overrides a method of another library (torch, Flower) has that library's
arguments, and need not repeat them.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable

import pytest

import accountants
from tests.public_names import Public, annotated, from_elsewhere, function_of, project, public_names, raised, short


def named(text: str) -> frozenset[str]:
    """The names in a text of lines `subject: Name Name`."""
    return frozenset(re.sub(r"[^:\n]*:", "", text).split())


GUARANTEES = named(
    """
    accountants: Accountant PRVAccountant RDPAccountant ZCDPAccountant GDPAccountant PrivacyFilter PrivacyOdometer
        IndividualAccountant IndividualAccountant.active Interval Estimate PrivacyFilter.request PrivacyFilter.spent
        PrivacyOdometer.spent rdp Comparison
    accountants.events: Event Gaussian Laplace DiscreteGaussian Skellam SkellamVector RandomizedResponse EpsilonDelta
        ZCDP PoissonSampled TruncatedPoissonSampled SampledWithoutReplacement Shuffled BallsInBins MatrixFactorization
        RepeatAndSelect Group Composed Repeated Repetitions participation_sensitivity
    accountants, questions: epsilon delta interval epsilon_curve noise_multiplier sample_rate steps trade_off advantage
        bayes_accuracy positive_predictive_value posterior reconstruction tpr_at_fpr
    dpdl: Budget Ledger LedgerFile PrivacyPlan PrivacyReport PrivateOptimizer PrivateLoader PrivateModel make_private
        clipped_sum per_sample_gradients per_sample_norms check Watchdog Spending PrivacyPlan.calibrated RandomStream
    dpdl, stages: flat_weights gaussian_mechanism standard_normals total_variation PoissonSampler PhysicalBatches
    dpdl.federated: AdaptiveClipping ClientLevelPlan ClientLevelPlan.calibrated ClientSampling PoissonClients
        FixedSizeClients EveryClient ClientSpending DPClient LocalUpdateDP PlainClient PrivateMoments Normalisation
        FederatedServer ServerOptimizer FedAvg FedAvgM FedAdagrad FedAdam FedYogi federated_report Release run_federated
    dpdl.split: CutRelease GradientRelease RowReleaser CachedRelease ReleaseDoor RowAccount RowCache JointClip PartClip
        MemoizedRandomizedResponse LabelStore SplitRun SplitClient SplitServer SplitFed NoPeek NoPeekOutlet split_report
        GrpcChannel LocalChannel WeightShelf TurnTaking PartTraining probe_rows ReplayGuard
    dpdl.audit: AuditResult MembershipResult assert_private audit_one_run audit_gradients audit_many_runs lira
        loss_threshold_attack decoder_attack distance_correlation biased_distance_correlation infer_labels invert_update
        inferred_label update_of_one_example DecoderResult InversionResult LabelInference
    dpdl.report: report_page report_text
    dpdl.tradeoff: sweep SweepResult Selection epsilon_of_selection
    dpdl.integrations: PrivateTraining private_training prepare_private
    dpdl.compat: PrivacyEngine PrivacyEngine.make_private PrivacyEngine.make_private_with_epsilon DPOptimizer
        AdaClipDPOptimizer DPPerLayerOptimizer GaussianAccountant IAccountant PrivacyWrapper PrivacyWatchdog
        UniformDataLoader UniformWORSubsampler
    """
)
OF_FLOWER = named(
    "dpdl.federated.flower: DPStrategy client_app update_clipping ask_moments release_inventory check_strategy"
)
# And whatever returns one of these, or is called so.
BOUNDS = re.compile(r"\b(Interval|Estimate|PrivacyReport|AdversaryReport|AuditResult|MembershipResult)\b")
EPSILONS = {
    "epsilon",
    "delta",
    "get_epsilon",
    "calc_epsilon",
    "current_epsilon",
    "odometer_epsilon",
    "epsilon_of_selection",
}
HOLDS = re.compile(
    r"[Gg]uarantee|\b([Uu]pper|[Ll]ower) bound|\b[Bb]ounds? on\b|[Cc]ertified|\b[Nn]o (privacy|bound|proof)"
    r"|proves nothing|differentially private|\b[Nn]eighbou?r|add_or_remove|\b[Ee]stimates?\b|\b[Dd]ominated\b"
    r"|\bclaim(s|ed)?\b|\bpromised\b|rounded up|known to lie|[Rr]enyi divergence|divergence is at most|[Rr]enyi curve"
)
SOURCES = named(
    """
    DP-SGD: make_private PrivateOptimizer PrivacyPlan dpsgd flat_weights gaussian_mechanism PoissonSampler
    norms without gradients: per_sample_norms clipped_sum
    accounting: PRVAccountant RDPAccountant rdp ZCDPAccountant GDPAccountant PrivacyFilter PrivacyOdometer
        IndividualAccountant GaussianAccountant
    mechanisms: Gaussian Laplace DiscreteGaussian Skellam SkellamVector RandomizedResponse ZCDP EpsilonDelta
        MatrixFactorization participation_sensitivity
    sampling and selection: PoissonSampled SampledWithoutReplacement BallsInBins RepeatAndSelect Repetitions Selection
        epsilon_of_selection
    meaning: trade_off advantage positive_predictive_value reconstruction tpr_at_fpr
    federated: AdaptiveClipping AdaClipDPOptimizer ClientLevelPlan LocalUpdateDP ServerOptimizer FedAvg FedAvgM
        FedAdagrad FedAdam FedYogi DPClient PlainClient dirichlet shards DPPerLayerOptimizer
    split: CutRelease GradientRelease MemoizedRandomizedResponse NoPeek NoPeekOutlet SplitFed vanilla u_shaped vertical
    attacks: audit_one_run audit_gradients audit_many_runs GradientCanaries DirectionsOnly lira loss_threshold_attack
        train_shadow_models logit_confidence decoder_attack distance_correlation biased_distance_correlation
        infer_labels invert_update inferred_label
    models: papernot_cnn tramer_boneh_cifar_cnn
    """
)
CITED = re.compile(
    r"arXiv:\d{4}\.\d{4,5}|\b[A-Z]\w+(?: et al\.|( and|,) [A-Z]\w+)[^.]*?,? \(?(?:19|20)\d\d|[Ss]ection \d"
)
# What a walk over the code takes for possible, and cannot happen.
UNREACHABLE = {
    ("IndividualAccountant.spent", "ParameterError"),  # it has no indices to refuse
    ("batch_norm_to_instance_norm", "ParameterError"),  # as many groups as channels
    ("batch_norm_to_layer_norm", "ParameterError"),  # one group
    ("RandomStream.from_state_dict", "ParameterError"),  # the seed is looked at before
    ("ModuleValidator.is_valid", "UnsupportedModuleError"),  # only a strict `validate` raises
}
SHAPE = re.compile(
    r"\[(?:[A-Za-z]|\.\.\.)[^\]]*\]|\b[Ss]haped?\b|\bshapes\b|\b[Ss]calar|\b[Bb]y (\w+ )?name\b|\bname to\b"
    r"|\b(n|N) names\b"
)
SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Guarantee|Raises|Example|Examples|References):$")
AS_IN = re.compile(r"\bas\s(?:(?:in|for|of)\s)?((?:`[\w.]+`(?:, | and )?)+)", re.IGNORECASE)
ARRAY = re.compile(r"\b(Tensor|ndarray|NDArray|Array|ArrayLike)\b")


# ── what a docstring says ───────────────────────────────────────────────────────────────────────────


def sections(doc: str) -> dict[str, str]:
    """The docstring's sections by their names; "" is the text before them and between them."""
    found = {"": ""}
    current = ""
    for line in doc.splitlines():
        head = SECTION.match(line)
        if head:
            current = head[1]
        elif line and not line.startswith(" "):
            current = ""
        found[current] = found.get(current, "") + ("" if head else line + "\n")
    return found


def entries(section: str) -> dict[str, str]:
    """The entries of an Args, Attributes or Raises section; `a, b: ...` is an entry of both."""
    found: dict[str, str] = {}
    names: list[str] = []
    for line in inspect.cleandoc(section).splitlines():
        head = re.match(r"^([\w*]+(?:, [\w*]+)*)(?: \([^)]*\))?:(.*)", line)
        if head:
            names = [name.lstrip("*") for name in head[1].split(", ")]
        for name in names:
            found[name] = found.get(name, "") + (head[2] if head else line) + "\n"
    return found


def docs_of(public: Public, *, referred: bool = True) -> list[str]:
    """The name's own docstring, those that it adds to, and those that it refers to."""
    name = public.name.rpartition(".")[2]
    cls = public.value if inspect.isclass(public.value) else public.owner
    bases = [base for base in (cls.__mro__[1:] if cls else ()) if project(base)]
    inherited = bases if inspect.isclass(public.value) else [vars(base)[name] for base in bases if name in vars(base)]
    docs = [public.doc, *(inspect.cleandoc(function_of(value).__doc__ or "") for value in inherited)]
    for other in re.findall(r"`([\w.]+)`", " ".join(AS_IN.findall(public.doc if referred else ""))):
        first, *rest = other.split(".")
        home = function_of(public.value).__module__
        places = (cls, sys.modules[home], sys.modules[home.partition(".")[0]])
        found = next((getattr(place, first) for place in places if hasattr(place, first)), None)
        found = found or next(
            (known.value for name, known in public_names().items() if name.endswith(f".{first}")), None
        )
        docs.append(inspect.getdoc(functools.reduce(getattr, rest, found)) or "" if found else "")
    return docs


def said(public: Public, *names: str) -> dict[str, str]:
    """The entries of sections of these names."""
    found: dict[str, str] = {}
    for doc in reversed(docs_of(public)):
        parts = sections(doc)
        for name in names:
            found |= entries(parts.get(name, ""))
    return found


# ── the rules ───────────────────────────────────────────────────────────────────────────────────────


def lacks_docstring(public: Public) -> str:
    inherits = public.owner is not None and any(docs_of(public, referred=False))
    return "" if public.doc or inherits else "has none"


def lacks_arguments(public: Public) -> str:
    if from_elsewhere(public):
        return ""
    wanted = [name for name in annotated(public) if name != "return"]
    missing = [name for name in wanted if name not in said(public, "Args", "Attributes")]
    text = " ".join(docs_of(public))
    if len(wanted) == 1:
        missing = [name for name in missing if not re.search(rf"\b{name}\b|`to_\w+`|`state_dict`", text)]
    if len(wanted) == 2:
        missing = [name for name in missing if f"`{name}`" not in text]
    return ", ".join(missing)


def lacks_shapes(public: Public) -> str:
    if from_elsewhere(public):
        return ""
    arguments, parts = said(public, "Args", "Attributes"), [sections(doc) for doc in docs_of(public)]
    missing = []
    for name, annotation in annotated(public).items():
        if not ARRAY.search(re.sub(r"Callable\[.*\]", "", annotation)):
            continue
        where = [arguments[name]] if name in arguments else [part[""] for part in parts]
        if name == "return":
            where = [part.get("Returns", part[""]) for part in parts]
        if not any(SHAPE.search(text) for text in where):
            missing.append(name)
    return ", ".join(missing)


def lacks_errors(public: Public) -> str:
    listed = set(said(public, "Raises")) | set(re.findall(r"\bRaise an? (\w+)", public.doc))
    missing = [
        kind.__name__
        for kind in raised(public)
        if not any(base.__name__ in listed for base in kind.__mro__ if base is not accountants.PrivacyError)
    ]
    return ", ".join(sorted(name for name in missing if (short(public), name) not in UNREACHABLE))


def lacks_guarantee(public: Public) -> str:
    bounds = BOUNDS.search(annotated(public).get("return", "")) or public.name.rpartition(".")[2] in EPSILONS
    if not (bounds or short(public) in GUARANTEES | OF_FLOWER):
        return ""
    return "" if any(HOLDS.search(doc) for doc in docs_of(public, referred=False)) else "does not say what holds"


def lacks_source(public: Public) -> str:
    if short(public) not in SOURCES:
        return ""
    own = " ".join(docs_of(public, referred=False))
    if CITED.search(own):
        return ""
    references = own + (sys.modules[public.value.__module__].__doc__ or "")
    numbers = re.findall(r"\[(\d)[,\]]", own)
    cited = [re.search(rf"^ *\[{number}\] ([A-Z].*(?:\n {{8,}}.*)*)", references, re.MULTILINE) for number in numbers]
    return "" if any(found and re.search(r"(19|20)\d\d", found[1]) for found in cited) else "no source"


# ── the tests ───────────────────────────────────────────────────────────────────────────────────────

RULES: dict[str, Callable[[Public], str]] = {
    "docstring": lacks_docstring,
    "arguments": lacks_arguments,
    "shapes": lacks_shapes,
    "errors": lacks_errors,
    "guarantee": lacks_guarantee,
    "source": lacks_source,
}


@pytest.mark.parametrize("rule", RULES)
def test_no_public_name_lacks(rule: str) -> None:
    lacking = {name: what for name, public in public_names().items() if (what := RULES[rule](public))}
    assert not lacking, "\n".join(f"{name}: {what}" for name, what in sorted(lacking.items()))


def test_the_public_names_are_all_looked_at() -> None:
    assert len(public_names()) > 850
    looked_at = {short(public) for public in public_names().values()}
    listed = GUARANTEES | SOURCES | {name for name, _ in UNREACHABLE}
    if importlib.util.find_spec("flwr") is not None:
        listed |= OF_FLOWER
    assert listed <= looked_at, listed - looked_at


@pytest.mark.parametrize(
    ("name", "lacking"),
    [
        ("dpdl.private.make_private", {"arguments", "errors", "guarantee", "source"}),
        ("dpdl.clipping.flat.flat_weights", {"arguments", "shapes", "errors", "guarantee", "source"}),
        ("dpdl.plan.PrivacyPlan", {"arguments", "errors", "guarantee", "source"}),
        ("dpdl.ledger.Ledger.record", {"arguments", "errors"}),
        ("dpdl.per_sample.api.per_sample_norms", {"arguments", "shapes", "errors", "guarantee", "source"}),
        ("accountants.accountant.Accountant.interval", {"arguments", "guarantee"}),
        ("dpdl.federated.messages.FitReply.state", {"shapes"}),
    ],
)
def test_a_name_whose_docstring_is_one_sentence_lacks_the_rest(name: str, lacking: set[str]) -> None:
    public = dataclasses.replace(public_names()[name], doc="What it is.")
    assert {rule for rule, lacks in RULES.items() if lacks(public)} == lacking


def test_a_name_without_a_docstring_lacks_one() -> None:
    public = dataclasses.replace(public_names()["dpdl.private.make_private"], doc="")
    assert lacks_docstring(public)


def test_each_argument_and_each_error_is_looked_for_by_itself() -> None:
    public = public_names()["dpdl.private.make_private"]
    without = dataclasses.replace(public, doc=re.sub(r"(    plan: .*|    WrapError: .*)\n?", "", public.doc))
    assert lacks_arguments(without) == "plan"
    assert lacks_errors(without) == "WrapError"
    assert not lacks_errors(public)


def test_a_citation_is_no_shape() -> None:
    public = public_names()["dpdl.clipping.flat.flat_weights"]
    public = dataclasses.replace(
        public, doc="Args:\n    norms: as in the paper [1].\n\nReturns:\n    Weights [2, section 3]."
    )
    assert lacks_shapes(public) == "norms, return"
