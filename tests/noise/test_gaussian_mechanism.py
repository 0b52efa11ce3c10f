"""The mechanism adds N(0, (noise_multiplier * sensitivity)^2), fresh everywhere, or refuses."""

import math
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from scipy.stats import chi2
from torch import Tensor

from accountants import Gaussian
from dpdl.errors import ParameterError
from dpdl.noise import gaussian, gaussian_mechanism, standard_normals
from dpdl.noise.normals import UNIT
from dpdl.secure_random import RandomStream
from dpdl.types import ClippedSum, NoisyGradient

NOISE_MULTIPLIER, SENSITIVITY = 1.3, 0.05
STD = NOISE_MULTIPLIER * SENSITIVITY


class Untouchable(RandomStream):
    """A stream that fails the test when it is used."""

    def words(self, *args: object, **kwargs: object) -> None:  # type: ignore[override]
        raise AssertionError("the stream was used")


def clipped(tensors: dict[str, Tensor], sensitivity: float = SENSITIVITY) -> ClippedSum:
    return ClippedSum(tensors=tensors, sensitivity=sensitivity, examples=8, clipped=3, non_finite=0)


def zeros(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {"weight": torch.zeros(60, 100, dtype=dtype), "bias": torch.zeros(7, dtype=dtype)}


def add_noise(tensors: dict[str, Tensor], *, step: int = 0, seed: int = 0) -> NoisyGradient:
    return gaussian_mechanism(
        clipped(tensors),
        noise_multiplier=NOISE_MULTIPLIER,
        stream=RandomStream.from_insecure_seed(seed),
        step=step,
    )


def std_is(std: float, noise: Tensor) -> bool:
    """Chi-square test of a known mean's variance, p = 1e-4."""
    below = chi2.cdf(float((noise.double() / std).square().sum()), noise.numel())
    return bool(1e-4 < below < 1 - 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_std_is_multiplier_times_sensitivity_and_ten_percent_off_is_rejected(dtype: torch.dtype) -> None:
    noise = add_noise(zeros(dtype)).tensors["weight"]
    assert std_is(STD, noise)
    assert not std_is(0.9 * STD, noise)
    assert not std_is(1.1 * STD, noise)


@pytest.mark.parametrize("scale", [0.1, 10.0])
def test_std_follows_the_sensitivity(scale: float) -> None:
    noisy = gaussian_mechanism(
        clipped(zeros(), sensitivity=scale * SENSITIVITY),
        noise_multiplier=NOISE_MULTIPLIER,
        stream=RandomStream.from_insecure_seed(0),
        step=0,
    )
    noise = noisy.tensors["weight"]
    assert std_is(scale * STD, noise)
    assert not std_is(0.9 * scale * STD, noise)
    assert not std_is(1.1 * scale * STD, noise)


def test_std_does_not_depend_on_the_sum() -> None:
    total = {name: 1000 * torch.rand_like(zero) for name, zero in zeros(torch.float64).items()}
    noisy = add_noise(total).tensors
    assert std_is(STD, noisy["weight"] - total["weight"])
    assert not std_is(0.9 * STD, noisy["weight"] - total["weight"])
    assert not std_is(1.1 * STD, noisy["weight"] - total["weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_is_added_in_float64_on_the_grid_and_rounded_once(dtype: torch.dtype) -> None:
    total = {name: torch.rand_like(zero) for name, zero in zeros(dtype).items()}
    noisy = add_noise(total, step=9).tensors
    normals = standard_normals(RandomStream.from_insecure_seed(0), 6007, step=9)
    bias, weight = normals.split([7, 6000])  # name order
    for name, noise in (("bias", bias), ("weight", weight)):
        on_grid = (total[name].double() / (STD * UNIT)).round()
        expected = ((on_grid + (noise / UNIT).view_as(on_grid)) * (STD * UNIT)).to(dtype)
        assert noisy[name].dtype == dtype
        assert torch.allclose(noisy[name], expected, rtol=0, atol=STD * UNIT)
        assert float((noisy[name] == expected).double().mean()) > 0.99  # but for the rounding of 1 / (STD UNIT)
        plain = total[name].double() + STD * noise.view_as(on_grid)
        assert torch.allclose(noisy[name].double(), plain, rtol=0, atol=STD * UNIT + torch.finfo(dtype).eps)


def test_what_is_released_is_a_whole_number_of_grid_units() -> None:
    # Neighbours that differ by less than the grid release the same values; otherwise each could be told apart.
    total = {name: torch.rand_like(zero) for name, zero in zeros(torch.float64).items()}
    units = add_noise(total).tensors["weight"] / (STD * UNIT)
    assert (units - units.round()).abs().max() < 2**-10  # units are near 2^40
    plain = (total["weight"] + add_noise(zeros(torch.float64)).tensors["weight"]) / (STD * UNIT)
    assert (plain - plain.round()).abs().max() > 0.4


def test_a_sum_of_many_parameters_takes_one_draw_cut_at_their_ends() -> None:
    sizes = {"a": 5, "b": 0, "c": 65_531, "d": 1, "e": 140_000, "f": 0, "g": 3}
    noisy = add_noise({name: torch.zeros(size, dtype=torch.float64) for name, size in sizes.items()}, step=2).tensors
    normals = standard_normals(RandomStream.from_insecure_seed(0), sum(sizes.values()), step=2)
    got = torch.cat([noisy[name] for name in sorted(sizes)])
    assert torch.allclose(got, STD * normals, rtol=1e-15, atol=0)


def test_torch_adds_what_numpy_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    # Sums on other devices than the CPU go through torch.
    total = {name: torch.rand_like(zero) for name, zero in zeros().items()} | {"t": torch.rand(50, 1400).t()}
    expected = add_noise(total).tensors
    monkeypatch.setattr(gaussian, "_flat", lambda tensor: tensor.detach().reshape(-1))
    got = add_noise(total).tensors
    assert all(torch.equal(got[name], expected[name]) for name in total)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(("length", "pools"), [(300_001, []), (1_200_001, [2])])
def test_threads_share_many_chunks_and_change_no_value(
    threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, length: int, pools: list[int]
) -> None:
    total = {"a": torch.randn(length), "b": torch.randn(100_000, dtype=torch.float64), "c": torch.randn(17)}
    started: list[int] = []

    def pool(size: int) -> ThreadPoolExecutor:
        started.append(size)
        return ThreadPoolExecutor(size)

    threads(1)
    alone = add_noise(total, step=3).tensors
    threads(3)
    monkeypatch.setattr("dpdl.noise.gaussian.ThreadPoolExecutor", pool)
    shared = add_noise(total, step=3).tensors
    assert started == pools
    assert all(torch.equal(shared[name], alone[name]) for name in total)
    assert not torch.equal(alone["a"][:100_000], alone["a"][200_000:300_000])


def test_long_tensors_that_may_be_used_up_are_and_nothing_else_changes() -> None:
    def total() -> dict[str, Tensor]:
        long = torch.arange(200_000, dtype=torch.float32)
        return {
            "b": long.clone(),
            "a": torch.ones(3),
            "c": torch.ones(5, dtype=torch.float64),
            "d": long.view(2, -1).t(),
        }

    fresh, used = total(), total()
    expected = add_noise(fresh, step=4).tensors
    got = gaussian_mechanism(
        clipped(used), noise_multiplier=NOISE_MULTIPLIER, stream=RandomStream.from_insecure_seed(0), step=4, reuse=True
    ).tensors
    assert all(torch.equal(got[name], expected[name]) for name in fresh)
    assert got["b"].data_ptr() == used["b"].data_ptr()
    assert all(torch.equal(fresh[name], tensor) for name, tensor in total().items())
    assert all(torch.equal(used[name], fresh[name]) for name in "acd")


def test_noise_takes_no_array_as_long_as_the_sum(threads: Callable[[int], None]) -> None:
    total = {"weight": torch.zeros(4_000_000)}
    threads(1)
    tracemalloc.start()  # numpy's arrays; torch's are the result's 16 MB and a chunk's
    try:
        add_noise(total)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20


@pytest.mark.parametrize("noise_multiplier", [1e-260, 1e260])
def test_a_standard_deviation_that_leaves_float64_is_refused(noise_multiplier: float) -> None:
    with pytest.raises(ParameterError, match="standard deviation"):
        gaussian_mechanism(clipped(zeros()), noise_multiplier=noise_multiplier, stream=Untouchable(bytes(32)), step=0)


def correlation(a: Tensor, b: Tensor) -> float:
    """In standard errors."""
    a, b = a.flatten().double() / STD, b.flatten().double() / STD
    return abs(float(a @ b)) / math.sqrt(a.numel())


def test_every_step_gets_fresh_noise() -> None:
    first, second = (add_noise(zeros(), step=step).tensors["weight"] for step in (0, 1))
    assert correlation(first, second) < 4.5
    assert correlation(first, first) > 4.5


def test_parameters_of_equal_shape_get_different_noise() -> None:
    names = [f"layers.{i}.weight" for i in range(6)]
    noise = add_noise({name: torch.zeros(40, 50) for name in names}).tensors
    for i, first in enumerate(names):
        for second in names[:i]:
            assert not torch.equal(noise[first], noise[second])
            assert correlation(noise[first], noise[second]) < 4.5


def test_noise_does_not_depend_on_the_order_of_the_dict() -> None:
    forwards = add_noise(zeros()).tensors
    backwards = add_noise(dict(reversed(zeros().items()))).tensors
    assert list(backwards) == ["bias", "weight"]
    assert all(torch.equal(forwards[name], backwards[name]) for name in forwards)


def test_scalars_empty_tensors_and_strides_keep_their_shapes() -> None:
    tensors = {"scale": torch.zeros(()), "none": torch.zeros(0, 3), "t": torch.zeros(5, 4).t()}
    noisy = add_noise(tensors).tensors
    assert {name: tensor.shape for name, tensor in noisy.items()} == {
        name: tensor.shape for name, tensor in tensors.items()
    }
    assert noisy["scale"] != 0


def test_the_sum_is_left_as_it_was() -> None:
    total = zeros()
    add_noise(total)
    assert all((tensor == 0).all() for tensor in total.values())


def test_a_secure_stream_gives_other_noise_each_time() -> None:
    runs = [
        gaussian_mechanism(clipped(zeros()), noise_multiplier=1.0, stream=RandomStream.from_os(), step=0)
        for _ in range(2)
    ]
    assert not torch.equal(runs[0].tensors["weight"], runs[1].tensors["weight"])


def test_the_event_is_the_gaussian_that_was_added() -> None:
    assert add_noise(zeros()).event == Gaussian(NOISE_MULTIPLIER)


def test_noise_multiplier_zero_adds_nothing_and_leaves_the_stream_alone() -> None:
    total = {"weight": torch.rand(3, 4)}
    stream = Untouchable(bytes(32))
    noisy = gaussian_mechanism(clipped(total), noise_multiplier=0.0, stream=stream, step=0)
    assert torch.equal(noisy.tensors["weight"], total["weight"])
    assert noisy.event == Gaussian(0.0)
    with pytest.raises(AssertionError, match="the stream was used"):
        gaussian_mechanism(clipped(total), noise_multiplier=1.0, stream=stream, step=0)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_noise_multipliers_out_of_range_are_refused(value: float) -> None:
    with pytest.raises(ParameterError, match="noise_multiplier"):
        gaussian_mechanism(clipped(zeros()), noise_multiplier=value, stream=Untouchable(bytes(32)), step=0)


@pytest.mark.parametrize("noise_multiplier", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_non_finite_sum_is_refused_by_name(value: float, noise_multiplier: float) -> None:
    total = zeros()
    total["weight"][3, 4] = value
    with pytest.raises(AssertionError, match="weight is not finite"):
        gaussian_mechanism(clipped(total), noise_multiplier=noise_multiplier, stream=Untouchable(bytes(32)), step=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_sum_in_half_precision_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(AssertionError, match="float32 is the least"):
        add_noise(zeros(dtype))


@pytest.mark.parametrize("sensitivity", [0.0, -1.0, math.nan, math.inf])
def test_a_sensitivity_that_is_not_positive_is_refused(sensitivity: float) -> None:
    with pytest.raises(AssertionError, match="sensitivity"):
        gaussian_mechanism(clipped(zeros(), sensitivity), noise_multiplier=1.0, stream=Untouchable(bytes(32)), step=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_noise_goes_to_each_tensors_device() -> None:
    total = {"bias": torch.zeros(7), "weight": torch.zeros(60, 100, device="cuda")}
    noisy = add_noise(total).tensors
    assert noisy["bias"].device.type == "cpu"
    assert noisy["weight"].device.type == "cuda"
    expected = add_noise(zeros()).tensors
    assert torch.equal(noisy["weight"].cpu(), expected["weight"])
