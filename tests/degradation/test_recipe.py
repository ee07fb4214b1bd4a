"""Tests of drawn recipes, by statistics over thousands of them.

The expected ranges and probabilities are those of Real-ESRGAN (Wang et al., 2021).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from savl.degradation import Degradation
from savl.degradation.blur_kernels import BlurKernel, GaussianBlurKernel, SincBlurKernel
from savl.degradation.config import (
    METHODS,
    OPERATIONS,
    BlurConfig,
    DegradationConfig,
    FinalConfig,
    JpegConfig,
    NoiseConfig,
    ResizeConfig,
    SingleConfig,
    SpatialConfig,
    StageConfig,
)
from savl.degradation.recipe import Noise, Recipe, Resize, Stage, draw_recipe

RECIPE_COUNT, GROUP_SIZE = 4000, 2
SIZES = (7, 9, 11, 13, 15, 17, 19, 21)
# Published settings of each stage: the probability of blur, the largest sigma of a blur kernel, the probabilities of
# enlarging, reducing and keeping the size, the range of resize factors, the largest sigma of Gaussian noise in 8-bit
# units, and the largest scale of Poisson noise.
FIRST = (1.0, 3.0, (0.2, 0.7, 0.1), (0.15, 1.5), 30.0, 3.0)
SECOND = (0.8, 1.5, (0.3, 0.4, 0.3), (0.3, 1.2), 25.0, 2.5)
STAGES = pytest.mark.parametrize("stage_name", ["first", "second"])


def draw(config: DegradationConfig, count: int = 1, seed: int = 0) -> Recipe:
    return draw_recipe(config, count, np.random.default_rng(seed))


@pytest.fixture(scope="module")
def recipes() -> list[Recipe]:
    random = np.random.default_rng(20210722)
    return [draw_recipe(DegradationConfig(), GROUP_SIZE, random) for _ in range(RECIPE_COUNT)]


def stages(recipes: list[Recipe], stage_name: str) -> list[Stage]:
    found = [recipe.first if stage_name == "first" else recipe.second for recipe in recipes]
    assert None not in found
    return [stage for stage in found if stage is not None]


def expected(stage_name: str) -> tuple[float, float, tuple[float, float, float], tuple[float, float], float, float]:
    return FIRST if stage_name == "first" else SECOND


def assert_chance(hits: Iterable[object], probability: float) -> None:
    """Assert that the fraction of true outcomes is within 4 standard errors of a probability.

    For the probabilities 0 and 1, the fraction must be exact.
    """
    outcomes = [bool(hit) for hit in hits]
    assert len(outcomes) > 300
    error = math.sqrt(probability * (1 - probability) / len(outcomes))
    assert abs(sum(outcomes) / len(outcomes) - probability) <= 4 * error


def assert_choice(values: Sequence[object], probabilities: dict[object, float]) -> None:
    """Assert that the values occur with their probabilities, and that no other value occurs."""
    assert set(values) == set(probabilities)
    for value, probability in probabilities.items():
        assert_chance((other == value for other in values), probability)


def assert_uniform(values: Sequence[float], low: float, high: float) -> None:
    """Assert that values are uniformly distributed over a range.

    The smallest and the largest value must be close to the ends of the range, and a Kolmogorov–Smirnov test at the
    significance level 0.001 must pass.
    """
    places = (np.sort(np.asarray(values)) - low) / (high - low)
    count = len(places)
    assert count > 300
    assert 0 <= places[0] < 12 / count
    assert 1 - 12 / count < places[-1] <= 1
    steps = np.arange(count) / count
    assert max((places - steps).max(), (steps + 1 / count - places).max()) < 1.96 / math.sqrt(count)


def gaussians(recipes: list[Recipe], stage_name: str) -> list[GaussianBlurKernel]:
    return [k for stage in stages(recipes, stage_name) for k in stage.blur if isinstance(k, GaussianBlurKernel)]


def noises(recipes: list[Recipe], stage_name: str) -> list[Noise]:
    return [noise for stage in stages(recipes, stage_name) for noise in stage.noise if noise is not None]


@STAGES
def test_blur_and_sinc_kernels_have_the_published_probabilities(recipes: list[Recipe], stage_name: str) -> None:
    kernels = [kernel for stage in stages(recipes, stage_name) for kernel in stage.blur]
    assert_chance((kernel is not None for kernel in kernels), expected(stage_name)[0])
    drawn = [kernel for kernel in kernels if kernel is not None]
    assert_chance((isinstance(kernel, SincBlurKernel) for kernel in drawn), 0.1)
    assert_choice([kernel.size for kernel in drawn], dict.fromkeys(SIZES, 1 / 8))


@pytest.mark.parametrize(("small", "low"), [(True, math.pi / 3), (False, math.pi / 5)])
def test_the_cutoff_of_a_sinc_kernel_depends_on_its_size(recipes: list[Recipe], small: bool, low: float) -> None:
    drawn = [k for stage_name in ("first", "second") for stage in stages(recipes, stage_name) for k in stage.blur]
    sincs = [kernel for kernel in drawn if isinstance(kernel, SincBlurKernel)]
    assert_uniform([kernel.cutoff for kernel in sincs if (kernel.size < 13) == small], low, math.pi)
    assert {kernel.amount for kernel in sincs} == {1.0}


@STAGES
def test_the_shapes_of_blur_kernels_have_the_published_probabilities(recipes: list[Recipe], stage_name: str) -> None:
    names = ("iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso")
    chances = dict(zip(names, (0.45, 0.25, 0.12, 0.03, 0.12, 0.03), strict=True))
    assert_choice([kernel.shape for kernel in gaussians(recipes, stage_name)], dict(chances))


@STAGES
def test_sigma_and_rotation_cover_their_ranges(recipes: list[Recipe], stage_name: str) -> None:
    high = expected(stage_name)[1]
    kernels = gaussians(recipes, stage_name)
    aniso = [kernel for kernel in kernels if kernel.shape.endswith("aniso")]
    iso = [kernel for kernel in kernels if not kernel.shape.endswith("aniso")]
    assert_uniform([kernel.sigma[0] for kernel in iso], 0.2, high)
    for axis in (0, 1):
        assert_uniform([kernel.sigma[axis] for kernel in aniso], 0.2, high)
    assert_uniform([kernel.rotation for kernel in aniso], -math.pi, math.pi)
    assert all(kernel.sigma[0] == kernel.sigma[1] for kernel in iso)
    assert abs(np.corrcoef([kernel.sigma for kernel in aniso], rowvar=False)[0, 1]) < 4 / math.sqrt(len(aniso))


@STAGES
def test_beta_is_below_or_above_1_with_equal_probability(recipes: list[Recipe], stage_name: str) -> None:
    kernels = gaussians(recipes, stage_name)
    generalized = [kernel.beta for kernel in kernels if kernel.shape.startswith("generalized")]
    assert_chance((beta < 1 for beta in generalized), 0.5)
    assert_uniform([beta for beta in generalized if beta < 1], 0.5, 1.0)
    assert_uniform([beta for beta in generalized if beta >= 1], 1.0, 4.0)
    plateau = [kernel.beta for kernel in kernels if kernel.shape.startswith("plateau")]
    assert_chance((beta == 1 for beta in plateau), 0.5)
    assert_uniform([beta for beta in plateau if beta != 1], 1.0, 2.0)
    assert {kernel.beta for kernel in kernels if kernel.shape in ("iso", "aniso")} == {1.0}


@STAGES
def test_resize_factors_have_the_published_probabilities_and_ranges(recipes: list[Recipe], stage_name: str) -> None:
    resizes = [stage.resize for stage in stages(recipes, stage_name)]
    up, down, keep = expected(stage_name)[2]
    low, high = expected(stage_name)[3]
    factors = [resize.factor for resize in resizes]
    assert_chance((factor > 1 for factor in factors), up)
    assert_chance((factor < 1 for factor in factors), down)
    assert_chance((factor == 1 for factor in factors), keep)
    assert_uniform([factor for factor in factors if factor > 1], 1.0, high)
    assert_uniform([factor for factor in factors if factor < 1], low, 1.0)
    assert_choice([resize.method for resize in resizes], dict.fromkeys(METHODS, 1 / 3))


def test_the_last_resize_uses_all_methods_with_equal_probability(recipes: list[Recipe]) -> None:
    assert_choice([recipe.method for recipe in recipes], dict.fromkeys(METHODS, 1 / 3))


@STAGES
def test_noise_is_gaussian_or_poisson_and_coloured_or_gray(recipes: list[Recipe], stage_name: str) -> None:
    drawn = noises(recipes, stage_name)
    assert len(drawn) == GROUP_SIZE * RECIPE_COUNT, "every image must have noise in every stage"
    assert_chance((noise.kind == "gaussian" for noise in drawn), 0.5)
    largest = {"gaussian": expected(stage_name)[4], "poisson": expected(stage_name)[5]}
    for kind, smallest in (("gaussian", 1.0), ("poisson", 0.05)):
        these = [noise for noise in drawn if noise.kind == kind]
        assert_chance((noise.gray for noise in these), 0.4)
        assert_uniform([noise.amount for noise in these], smallest, largest[kind])


def test_jpeg_is_applied_in_the_first_stage_and_after_the_second_stage(recipes: list[Recipe]) -> None:
    first = [quality for stage in stages(recipes, "first") for quality in stage.quality]
    final = [quality for recipe in recipes for quality in recipe.quality]
    for qualities in (first, final):
        assert None not in qualities
        assert_uniform([quality for quality in qualities if quality is not None], 30.0, 95.0)
    assert {quality for stage in stages(recipes, "second") for quality in stage.quality} == {None}


def test_the_final_sinc_filter_and_the_position_of_jpeg_have_the_published_probabilities(recipes: list[Recipe]) -> None:
    sincs = [kernel for recipe in recipes for kernel in recipe.sinc]
    assert_chance((kernel is not None for kernel in sincs), 0.8)
    drawn = [kernel for kernel in sincs if kernel is not None]
    assert_choice([kernel.size for kernel in drawn], dict.fromkeys(SIZES, 1 / 8))
    assert_uniform([kernel.cutoff for kernel in drawn], math.pi / 3, math.pi)
    assert_chance((last for recipe in recipes for last in recipe.jpeg_last), 0.5)


def test_the_published_pipeline_has_full_strength_and_no_masks(recipes: list[Recipe]) -> None:
    assert {strength for recipe in recipes for strength in recipe.strength} == {1.0}
    assert {spatial for recipe in recipes for spatial in recipe.spatial} == {False}


def test_images_of_a_group_share_only_the_resize_parameters() -> None:
    recipe = draw(replace(DegradationConfig(), strength=(0.0, 1.0), spatial=SpatialConfig(probability=0.5)), 64)
    assert recipe.first is not None
    assert isinstance(recipe.method, str)
    for drawn in (recipe.first.blur, recipe.first.noise, recipe.first.quality, recipe.quality, recipe.strength):
        assert len(drawn) == 64
        assert len(set(drawn)) == 64
    for chances in (recipe.jpeg_last, recipe.spatial):
        assert set(Counter(chances)) == {True, False}


def test_equal_seeds_give_equal_recipes() -> None:
    assert draw(DegradationConfig(), 3, seed=1) == draw(DegradationConfig(), 3, seed=1)
    assert draw(DegradationConfig(), 3, seed=1) != draw(DegradationConfig(), 3, seed=2)


def test_strength_and_masks_are_drawn_for_every_image() -> None:
    config = replace(DegradationConfig(), strength=(0.25, 0.75), spatial=SpatialConfig(probability=0.3))
    recipe = draw(config, 4000)
    assert_uniform(recipe.strength, 0.25, 0.75)
    assert_chance(recipe.spatial, 0.3)


def test_full_strength_selects_the_upper_end_with_its_probability() -> None:
    recipe = draw(replace(DegradationConfig(), strength=(0.25, 0.75), full_strength=0.4), 4000)
    assert_chance((strength == 0.75 for strength in recipe.strength), 0.4)
    assert_uniform([strength for strength in recipe.strength if strength != 0.75], 0.25, 0.75)


def applied_operations(recipe: Recipe) -> list[str]:
    """Return the operations that a recipe of a single operation applies to the first image."""
    assert recipe.first is None
    assert recipe.second is not None
    assert recipe.second.resize.factor == 1.0
    assert recipe.sinc[0] is None
    assert recipe.second.quality[0] is None
    found = {"blur": recipe.second.blur[0], "noise": recipe.second.noise[0], "jpeg": recipe.quality[0]}
    return [name for name, parameters in found.items() if parameters is not None]


def test_a_single_operation_is_applied_with_its_probability() -> None:
    config = DegradationConfig(single_operation=0.6)
    random = np.random.default_rng(3)
    drawn = [draw_recipe(config, GROUP_SIZE, random) for _ in range(2000)]
    assert_chance((recipe.single for recipe in drawn), 0.6)
    found = [applied_operations(recipe) for recipe in drawn if recipe.single]
    assert {len(each) for each in found} == {1}
    assert_choice([each[0] for each in found], dict.fromkeys(OPERATIONS, 1 / 3))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_single_operation_has_ranges_of_its_own_and_keeps_the_strength(operation: str) -> None:
    single = SingleConfig(operations=(operation,))
    config = DegradationConfig(strength=(0.5, 0.5), single_operation=1.0, single=single)
    random = np.random.default_rng(4)
    drawn = [draw_recipe(config, GROUP_SIZE, random) for _ in range(1000)]
    assert {name for recipe in drawn for name in applied_operations(recipe)} == {operation}
    assert {strength for recipe in drawn for strength in recipe.strength} == {0.5}
    if operation == "blur":
        kernels = [k for k in gaussians(drawn, "second") if k.shape == "iso"]
        assert_uniform([kernel.sigma[0] for kernel in kernels], 0.1, 1.0)
    elif operation == "noise":
        drawn_noise = [noise for noise in noises(drawn, "second") if noise.kind == "gaussian"]
        assert_uniform([noise.amount for noise in drawn_noise], 1.0, 15.0)
    else:
        assert_uniform([quality for recipe in drawn for quality in recipe.quality if quality is not None], 60.0, 95.0)


def test_the_amounts_of_a_single_operation_are_known() -> None:
    random = np.random.default_rng(5)
    for operation, column, least, most in (("blur", 0, 0.2, 2.0), ("noise", 1, 0.5, 34.0), ("jpeg", 2, 10.0, 80.0)):
        config = DegradationConfig(single_operation=1.0, single=SingleConfig(operations=(operation,)))
        amounts = np.concatenate([draw_recipe(config, GROUP_SIZE, random).amounts() for _ in range(200)])
        assert np.all((amounts[:, column] >= least) & (amounts[:, column] <= most))
        assert np.all(np.delete(amounts, column, axis=1) == 0)
    assert np.isnan(draw_recipe(DegradationConfig(), GROUP_SIZE, random).amounts()).all()


def test_the_deviation_of_poisson_noise_is_that_at_medium_gray() -> None:
    gray = torch.linspace(0, 1, 256).repeat(64, 1)[None, None].repeat(1, 3, 1, 1)  # all 256 levels
    stage = Stage((None,), Resize(1.0, "area"), (Noise("poisson", 2.0, gray=False),), (None,))
    recipe = Recipe(stage, None, "area", (None,), (None,), (False,), (1.0,), (False,))
    y = Degradation(DegradationConfig(), scale=1).apply(gray, recipe, None, torch.Generator().manual_seed(0))
    measured = 255 * (y - gray)[..., 118:138].std().item()
    assert measured == pytest.approx(Noise("poisson", 2.0, gray=False).deviation, rel=0.05)


def test_an_unknown_single_operation_raises_an_error_that_names_it() -> None:
    with pytest.raises(ValueError, match="single.operations must be at least one of blur, noise, jpeg, got"):
        SingleConfig(operations=("fog",))


def test_stages_are_applied_with_their_probability() -> None:
    config = DegradationConfig(first=StageConfig(probability=0.4), second=StageConfig(probability=0.0))
    random = np.random.default_rng(0)
    drawn = [draw_recipe(config, 1, random) for _ in range(1000)]
    assert_chance((recipe.first is not None for recipe in drawn), 0.4)
    assert {recipe.second for recipe in drawn} == {None}


def assert_weakened(whole: BlurKernel | None, weak: BlurKernel | None, strength: float) -> None:
    assert (whole is None) == (weak is None)
    if isinstance(whole, GaussianBlurKernel):
        assert isinstance(weak, GaussianBlurKernel)
        assert weak.sigma == pytest.approx([strength * sigma for sigma in whole.sigma])
        assert replace(weak, sigma=whole.sigma) == whole
    elif isinstance(whole, SincBlurKernel):
        assert weak == replace(whole, amount=strength)


@pytest.mark.parametrize("strength", [0.25, 0.5])
def test_strength_scales_every_parameter_without_changing_the_random_draws(strength: float) -> None:
    for seed in range(20):
        whole = draw(DegradationConfig(), 2, seed)
        weak = draw(DegradationConfig(strength=(strength, strength)), 2, seed)
        assert weak.strength == (strength, strength)
        assert (weak.method, weak.jpeg_last) == (whole.method, whole.jpeg_last)
        for before, after in ((whole.first, weak.first), (whole.second, weak.second)):
            assert before is not None
            assert after is not None
            for blur, weaker in zip(before.blur, after.blur, strict=True):
                assert_weakened(blur, weaker, strength)
            assert after.resize.factor == pytest.approx(before.resize.factor**strength)
            for noise, less in zip(before.noise, after.noise, strict=True):
                assert noise is not None
                assert less is not None
                assert (less.kind, less.gray) == (noise.kind, noise.gray)
                assert less.amount == pytest.approx(strength * noise.amount)
        for kernel, weaker in zip(whole.sinc, weak.sinc, strict=True):
            assert_weakened(kernel, weaker, strength)
        assert weak.first is not None
        assert whole.first is not None
        qualities = [*whole.quality, *whole.first.quality]
        for quality, better in zip(qualities, [*weak.quality, *weak.first.quality], strict=True):
            assert quality is not None
            assert better == pytest.approx(100 - strength * (100 - quality))


def test_strength_0_disables_resizing_noise_and_jpeg() -> None:
    for seed in range(10):
        recipe = draw(DegradationConfig(strength=(0.0, 0.0)), 2, seed)
        assert recipe.quality == (None, None)
        assert recipe.first is not None
        assert recipe.first.quality == (None, None)
        assert recipe.first.resize.factor == 1
        assert [noise.amount for noise in recipe.first.noise if noise is not None] == [0, 0]


def test_settings_apply_to_every_drawn_parameter() -> None:
    blur = BlurConfig(probability=0.0)
    noise = NoiseConfig(gaussian_probability=1.0, gray_probability=0.0, sigma=(5.0, 5.0))
    stage = StageConfig(
        blur=blur, noise=noise, resize=ResizeConfig(0.0, 1.0, 0.0, (0.5, 1.0)), jpeg=JpegConfig(1.0, (50.0, 50.0))
    )
    config = DegradationConfig(
        first=stage, second=stage, final=FinalConfig(sinc_probability=0.0, jpeg_last=1.0, jpeg=JpegConfig(0.0))
    )
    recipe = draw(config, 50)
    assert recipe.sinc == (None,) * 50
    assert recipe.quality == (None,) * 50
    assert recipe.jpeg_last == (True,) * 50
    for drawn in (recipe.first, recipe.second):
        assert drawn is not None
        assert drawn.blur == (None,) * 50
        assert drawn.noise == (Noise("gaussian", 5.0, False),) * 50
        assert drawn.quality == (50.0,) * 50
        assert 0.5 <= drawn.resize.factor <= 1


def test_noise_can_be_disabled() -> None:
    recipe = draw(DegradationConfig(first=StageConfig(noise=NoiseConfig(probability=0.0))), 20)
    assert recipe.first is not None
    assert recipe.first.noise == (None,) * 20


def test_probabilities_rounded_to_few_digits_are_accepted() -> None:
    sixths = BlurConfig(shapes=(0.1666667,) * 6)
    thirds = ResizeConfig(up=0.3333334, down=0.3333333, keep=0.3333331)
    assert draw(DegradationConfig(first=StageConfig(blur=sixths, resize=thirds)), 5).first is not None


@pytest.mark.parametrize(
    ("beta", "ends"), [((0.5, 1.0), (0.5, 1.0)), ((2.0, 3.0), (2.0, 3.0)), ((0.3, 0.6), (0.3, 0.6))]
)
def test_beta_stays_within_a_range_on_one_side_of_1(beta: tuple[float, float], ends: tuple[float, float]) -> None:
    config = BlurConfig(shapes=(0, 0, 1.0, 0, 0, 0), beta_generalized=beta, sinc_probability=0.0)
    recipe = draw(DegradationConfig(first=StageConfig(blur=config)), 400)
    assert recipe.first is not None
    betas = [kernel.beta for kernel in recipe.first.blur if isinstance(kernel, GaussianBlurKernel)]
    assert len(betas) == 400
    assert ends[0] <= min(betas) < ends[0] + 0.05
    assert ends[1] - 0.05 < max(betas) <= ends[1]


def test_a_repeated_recipe_repeats_the_parameters_of_each_image() -> None:
    config = DegradationConfig(spatial=SpatialConfig(probability=0.5))
    recipe = next(drawn for drawn in (draw(config, 3, seed) for seed in range(99)) if drawn.second is not None)
    twice = recipe.repeated(2)
    assert recipe.repeated(1) == recipe
    pairs = [(recipe, twice), (recipe.first, twice.first), (recipe.second, twice.second)]
    for one, two in pairs:
        assert one is not None
        for name, value in vars(one).items():
            after = getattr(two, name)
            if isinstance(value, tuple):
                assert after == tuple(each for each in value for _ in range(2)), name
            elif not isinstance(value, Stage):
                assert after == value, name
