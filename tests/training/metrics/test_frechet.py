import numpy as np
import pytest
from scipy import linalg

from training.metrics.frechet import Gaussian, frechet_distance, require_covariance
from training.metrics.moments import Moments, moments_of, without


def gaussian(mean, covariance, n: int = 10_000) -> Moments:
    return Moments(n=n, mean=np.asarray(mean, float), m2=np.asarray(covariance, float) * (n - 1))


def draw(n: int, width: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, width)) @ rng.standard_normal((width, width))


def by_sqrtm(a: Moments, b: Moments) -> float:
    root = linalg.sqrtm(a.covariance @ b.covariance).real
    return float(np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance + b.covariance - 2 * root))


def exact_root_trace(x: np.ndarray, y: np.ndarray) -> float:
    """Tr (S_x S_y)^(1/2) from features: the nuclear norm of the cross-Gram of the centred rows."""
    cross = (x - x.mean(axis=0)) @ (y - y.mean(axis=0)).T
    return float(np.linalg.svd(cross, compute_uv=False).sum() / np.sqrt((len(x) - 1) * (len(y) - 1)))


def test_diagonal_gaussians_have_their_closed_form():
    rng = np.random.default_rng(0)
    var_a, var_b, mean_a, mean_b = rng.uniform(0.1, 5.0, (4, 40))
    expected = np.sum((mean_a - mean_b) ** 2) + np.sum((np.sqrt(var_a) - np.sqrt(var_b)) ** 2)
    result = frechet_distance(gaussian(mean_a, np.diag(var_a)), gaussian(mean_b, np.diag(var_b)))
    assert result.value == pytest.approx(expected, rel=1e-12)
    assert result.diagnostics.method == "cholesky"
    assert result.diagnostics.rank == (40, 40)
    assert not result.diagnostics.undersampled


@pytest.mark.parametrize("n", [30, 500])
@pytest.mark.parametrize("offset", [0.0, 10.0, 100.0])
def test_a_set_is_at_distance_zero_from_itself(n, offset):
    moments = moments_of(draw(n, 50, seed=1) + offset)
    result = frechet_distance(moments, moments)
    assert 0.0 <= result.value <= 1e-11 * np.trace(moments.covariance)


@pytest.mark.parametrize("n", [30, 500])
@pytest.mark.parametrize("offset", [0.0, 10.0, 100.0])
def test_a_shift_costs_its_squared_length(n, offset):
    x = draw(n, 50, seed=2) + offset
    shift = np.linspace(-1.0, 1.0, 50)
    result = frechet_distance(moments_of(x), moments_of(x + shift))
    assert result.value == pytest.approx(np.sum(shift**2), rel=1e-9)


@pytest.mark.parametrize("n", [30, 500])
def test_scaling_the_spread_by_s_costs_the_trace_times_one_minus_s_squared(n):
    x = draw(n, 50, seed=3)
    x -= x.mean(axis=0)
    a, b = moments_of(x), moments_of(1.5 * x)
    assert frechet_distance(a, b).value == pytest.approx(0.25 * np.trace(a.covariance), rel=1e-10)


def test_it_agrees_with_the_matrix_square_root_where_that_is_well_conditioned():
    a, b = moments_of(draw(2000, 40, seed=4)), moments_of(draw(2000, 40, seed=5) + 0.3)
    assert frechet_distance(a, b).value == pytest.approx(by_sqrtm(a, b), rel=1e-8)


def test_it_is_symmetric():
    a, b = moments_of(draw(500, 20, seed=6)), moments_of(draw(15, 20, seed=7))
    assert frechet_distance(a, b).value == pytest.approx(frechet_distance(b, a).value, rel=1e-11)


@pytest.mark.parametrize(("n", "m"), [(30, 40), (30, 900), (900, 30), (2, 2)])
def test_fewer_samples_than_dimensions_keep_every_digit(n, m):
    x, y = draw(n, 64, seed=8), draw(m, 64, seed=9) + 1.0
    a, b = moments_of(x), moments_of(y)
    result = frechet_distance(a, b)
    expected = result.diagnostics.mean_term + np.trace(a.covariance) + np.trace(b.covariance)
    assert result.value == pytest.approx(expected - 2 * exact_root_trace(x, y), rel=1e-11)
    assert result.diagnostics.method == "eigh"
    assert result.diagnostics.rank == (min(n - 1, 64), min(m - 1, 64))
    assert result.diagnostics.undersampled
    assert max(result.diagnostics.clipped) < 1e-12


def test_dead_dimensions_keep_every_digit():
    x, y = draw(500, 20, seed=10), draw(500, 20, seed=11)
    padded = [moments_of(np.pad(rows, ((0, 0), (0, 5)))) for rows in (x, y)]
    result = frechet_distance(*padded)
    assert result.value == pytest.approx(frechet_distance(moments_of(x), moments_of(y)).value, rel=1e-12)
    assert result.diagnostics.rank == (20, 20)
    assert not result.diagnostics.undersampled


@pytest.mark.parametrize("seed", range(10))
def test_the_rounding_left_by_a_removed_part_adds_no_rank(seed):
    x = draw(5, 8, seed=seed)
    x[0] *= 100.0
    rest = without(moments_of(x), moments_of(x[:1]))
    assert frechet_distance(rest, moments_of(x[1:])).diagnostics.rank == (3, 3)


def test_a_nearly_flat_direction_keeps_every_digit():
    basis, _ = np.linalg.qr(np.random.default_rng(12).standard_normal((20, 20)))
    ones, fours = np.r_[np.ones(19), 1e-12], np.r_[np.full(19, 4.0), 1e-12]
    a, b = (gaussian(np.zeros(20), basis * variances @ basis.T) for variances in (ones, fours))
    assert frechet_distance(a, b).value == pytest.approx(19.0, rel=1e-12)


def test_disjoint_subspaces_have_no_root_trace():
    first, second = np.diag([1.0, 2.0, 0.0, 0.0]), np.diag([0.0, 0.0, 3.0, 4.0])
    assert frechet_distance(
        gaussian(np.zeros(4), first), gaussian(np.zeros(4), second)
    ).value == pytest.approx(10.0)


def test_constant_features_have_only_a_mean():
    a, b = moments_of(np.ones((5, 3))), moments_of(np.full((5, 3), 3.0))
    result = frechet_distance(a, b)
    assert result.value == 12.0
    assert result.diagnostics.rank == (0, 0)


def test_a_distance_is_never_negative_and_says_when_it_was_clamped():
    results = [frechet_distance(m, m) for m in (moments_of(draw(300, 30, seed=s)) for s in range(20))]
    assert all(result.value >= 0.0 for result in results)
    assert all(result.diagnostics.clamped == (result.diagnostics.covariance_term < 0.0) for result in results)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="width 3 and 4"):
        frechet_distance(moments_of(np.zeros((5, 3))), moments_of(np.zeros((5, 4))))
    with pytest.raises(ValueError, match="at least 2 samples"):
        frechet_distance(moments_of(np.zeros((1, 3))), moments_of(np.zeros((5, 3))))


@pytest.mark.parametrize(("n", "m"), [(30, 40), (30, 900), (900, 30), (2, 2)])
def test_rows_at_hand_replace_eigenvectors_where_they_are_few(n, m):
    x, y = draw(n, 64, seed=8), draw(m, 64, seed=9) + 1.0
    result = frechet_distance(Gaussian.fitted(x), Gaussian.fitted(y))
    by_moments = frechet_distance(moments_of(x), moments_of(y))
    assert result.diagnostics.method == "gram"
    assert result.diagnostics.rank == by_moments.diagnostics.rank
    assert result.value == pytest.approx(by_moments.value, rel=1e-11)
    rough = frechet_distance(Gaussian.fitted(x), Gaussian.fitted(y), exact=False)
    assert rough.value == pytest.approx(result.value, rel=1e-6)


def test_a_reference_of_unknown_size_is_taken_for_a_whole_population():
    cov = moments_of(draw(500, 20, seed=3)).covariance
    reference = Gaussian(np.zeros(20), cov, n=None)
    result = frechet_distance(reference, moments_of(draw(500, 20, seed=4)))
    assert result.diagnostics.num_samples == (None, 500)
    assert not result.diagnostics.undersampled


def test_a_matrix_that_is_no_covariance_is_refused():
    mean, wrong = np.zeros(8), np.eye(8)
    wrong[0, 1] = wrong[1, 0] = 50.0
    with pytest.raises(ValueError, match="no covariance: eigenvalues that one cannot have"):
        require_covariance(Gaussian(mean, wrong, None))
    with pytest.raises(ValueError, match="no covariance of 5 images"):
        require_covariance(Gaussian(mean, np.eye(8), 5))
    rows = np.random.default_rng(0).standard_normal((5, 8))
    require_covariance(Gaussian(mean, np.cov(rows, rowvar=False).astype(np.float32).astype(np.float64), None))
    require_covariance(Gaussian(mean, np.cov(rows, rowvar=False), 5))
    require_covariance(Gaussian(mean, np.zeros((8, 8)), None))


def test_statistics_beyond_float64_have_no_distance():
    vast = Gaussian(np.full(8, 1e300), np.eye(8), None)
    with np.errstate(over="ignore"), pytest.raises(ValueError, match="too large"):
        frechet_distance(vast, Gaussian(np.zeros(8), np.eye(8), None))
