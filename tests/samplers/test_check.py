"""The contract test passes what keeps the contract and finds each way of breaking it."""

import numpy as np
import pytest

from samplers import allocation
from samplers.check import check_sampler
from samplers.selection import PosteriorMeanSelector, ThompsonSelector, UniformSelector, mopps
from samplers.selection.bands import OnlineBandSelector, StaticBandSelector
from samplers.selection.diverse import DiverseSelector


def number_of(key):
    return int(key.split()[-1])


SOUND = {
    "uniform": lambda p, keys: UniformSelector(len(keys), seed=0, keys=keys),
    "thompson": lambda p, keys: ThompsonSelector(p, keys=keys),
    "mopps": lambda p, keys: mopps(p, candidates=3, keys=keys),
    "mopps_band": lambda p, keys: OnlineBandSelector(
        p, rate="draw", candidates=2, short="nearest", keys=keys
    ),
    "posterior_mean": lambda p, keys: PosteriorMeanSelector(p, keys=keys),
    "online_band": lambda p, keys: OnlineBandSelector(p, short="uniform", keys=keys),
    "static_band": lambda p, keys: StaticBandSelector(
        [number_of(key) / 24 for key in keys], short="nearest", keys=keys
    ),
    "diverse": lambda p, keys: DiverseSelector(
        p, [[number_of(key) ** 0.5] for key in keys], gamma=0.2, keys=keys
    ),
}


@pytest.mark.parametrize("make", SOUND.values(), ids=SOUND)
def test_the_selectors_of_the_package_pass(make):
    check_sampler(selector=make)


@pytest.mark.parametrize(
    ("allocate", "minimum"), [(allocation.neyman, 1), (allocation.leave_one_out, 2)]
)
def test_the_allocators_of_the_package_pass(allocate, minimum):
    check_sampler(allocator=allocate, minimum=minimum)


def test_an_allocator_that_looks_at_no_scale_need_not_refuse_any():
    check_sampler(allocator=allocation.uniform, minimum=0, reads_scales=False)
    with pytest.raises(AssertionError, match="a scale that is NaN must be refused"):
        check_sampler(allocator=allocation.uniform)


def test_a_selector_of_rows_passes_without_the_promise_of_keys():
    check_sampler(selector=lambda p, keys: ThompsonSelector(p), by_key=False)
    with pytest.raises(AssertionError, match="a shuffle of the data set's rows changes the keys"):
        check_sampler(selector=lambda p, keys: ThompsonSelector(p))


class Broken:
    """A sound selector with one part replaced."""

    def __init__(self, posterior, keys):
        self.posterior = posterior
        self.sound = UniformSelector(len(keys), seed=0, keys=keys)

    def select(self, num_prompts, *, generator, exclude=()):
        return self.sound.select(num_prompts, generator=generator, exclude=exclude)

    def state_dict(self):
        return self.sound.state_dict()

    def load_state_dict(self, state):
        self.sound.load_state_dict(state)


class Repeats(Broken):
    def select(self, num_prompts, *, generator, exclude=()):
        return generator.integers(0, self.posterior.num_prompts, num_prompts)


class GivesALot(Broken):
    def select(self, num_prompts, *, generator, exclude=()):
        return super().select(num_prompts, generator=generator).astype(np.int32)


class IsOneOff(Broken):
    def select(self, num_prompts, *, generator, exclude=()):
        return super().select(num_prompts, generator=generator) + 1


class ReadsTheGlobalGenerator(Broken):
    def select(self, num_prompts, *, generator, exclude=()):
        chosen = super().select(num_prompts, generator=generator)
        return np.random.permutation(chosen)  # noqa: NPY002


class HandsOutItsOwn(Broken):
    def __init__(self, posterior, keys):
        self.order = np.arange(posterior.num_prompts)

    def select(self, num_prompts, *, generator, exclude=()):
        if not 1 <= num_prompts <= len(self.order):
            raise ValueError
        return self.order[:num_prompts]


class WritesThePosterior(Broken):
    def select(self, num_prompts, *, generator, exclude=()):
        self.posterior.alpha_D *= 0.9
        return super().select(num_prompts, generator=generator)


class GivesWhatItHas(Broken):
    def select(self, num_prompts, *, generator, exclude=()):
        if num_prompts > self.posterior.num_prompts:
            return np.arange(self.posterior.num_prompts)
        return super().select(num_prompts, generator=generator, exclude=exclude)


class Forgets(Broken):
    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class LeavesOutTheEpoch(Broken):
    def load_state_dict(self, state):
        self.sound.load_state_dict(state | {"epoch": 0})


class KeepsItsOwnGenerator(Broken):
    def __init__(self, posterior, keys):
        super().__init__(posterior, keys)
        self.generator = np.random.default_rng(0)

    def select(self, num_prompts, *, generator, exclude=()):
        chosen = super().select(num_prompts, generator=generator, exclude=exclude)
        return self.generator.permutation(chosen)


class SharesItsState(Broken):
    def __init__(self, posterior, keys):
        super().__init__(posterior, keys)
        self.visits = np.zeros(len(keys))

    def select(self, num_prompts, *, generator, exclude=()):
        chosen = super().select(num_prompts, generator=generator)
        self.visits[chosen] += 1
        return chosen

    def state_dict(self):
        return super().state_dict() | {"visits": self.visits}


class SavesAnObject(Broken):
    def state_dict(self):
        return {"sound": self.sound}


class CopiesThePosterior(Broken):
    """Reads the state of its own copy, which a restart does not bring back."""

    def __init__(self, posterior, keys):
        self.posterior = posterior
        self.known = None

    def select(self, num_prompts, *, generator, exclude=()):
        if not 1 <= num_prompts <= self.posterior.num_prompts:
            raise ValueError
        if self.known is None:
            self.known = self.posterior.mean()
        return np.argsort(-self.known, kind="stable")[:num_prompts]

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class IgnoresExclusion(Broken):
    def select(self, num_prompts, *, generator, exclude=()):
        return super().select(num_prompts, generator=generator)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (Repeats, "must give distinct rows"),
        (GivesALot, "int64 rows"),
        (IsOneOff, "distinct rows in"),
        (ReadsTheGlobalGenerator, "differs between two selectors of equal state"),
        (HandsOutItsOwn, "distinct rows|differs between two"),
        (WritesThePosterior, "must leave the posterior as it is, alpha_D has changed"),
        (GivesWhatItHas, r"select\(25\) of 24 prompts must be refused"),
        (Forgets, "restored from its state before step 1"),
        (LeavesOutTheEpoch, "restored from its state before step 5"),
        (KeepsItsOwnGenerator, "restored from its state before step 1"),
        (SharesItsState, r"state_dict\(\) must be a copy"),
        (SavesAnObject, r"state_dict\(\)\['sound'\] is a UniformSelector"),
        (CopiesThePosterior, "restored from its state before step"),
        (IgnoresExclusion, r"must give 3 other rows"),
    ],
)
def test_a_broken_selector_is_found_out(broken, message):
    with pytest.raises(AssertionError, match=message):
        check_sampler(selector=broken)


def test_what_was_not_promised_is_not_tested():
    check_sampler(selector=IgnoresExclusion, passes_over=False)


def neyman(std_P, total, *, minimum, maximum):
    return allocation.neyman(std_P, total, minimum=minimum, maximum=maximum)


def floats(std_P, total, **box):
    return neyman(std_P, total, **box).astype(float)


def loses_one(std_P, total, *, minimum, maximum):
    budget_P = neyman(std_P, total, minimum=minimum, maximum=maximum)
    budget_P[budget_P.argmax()] -= total % 5 == 0
    return budget_P


def no_maximum(std_P, total, *, minimum, maximum):
    return neyman(std_P, total, minimum=minimum, maximum=None)


def no_minimum(std_P, total, *, minimum, maximum):
    return neyman(std_P, total, minimum=0, maximum=maximum)


def sorts_in_place(std_P, total, **box):
    budget_P = neyman(std_P, total, **box)
    std_P.sort()
    return budget_P


def by_place(std_P, total, *, minimum, maximum):
    std_P = std_P * np.linspace(1, 2, len(std_P))
    return neyman(std_P, total, minimum=minimum, maximum=maximum)


def takes_nan(std_P, total, **box):
    return neyman(np.nan_to_num(std_P, posinf=np.inf), total, **box)


def takes_negative(std_P, total, **box):
    return neyman(np.maximum(std_P, 0) if (std_P < 0).any() else std_P, total, **box)


def clamps(std_P, total, *, minimum, maximum):
    total = max(total, np.broadcast_to(minimum, std_P.shape).sum())
    return neyman(std_P, total, minimum=minimum, maximum=maximum)


class AtRandom:
    def __init__(self):
        self.generator = np.random.default_rng(0)

    def __call__(self, std_P, total, **box):
        return neyman(std_P + self.generator.random(len(std_P)), total, **box)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (floats, "int64 budgets"),
        (loses_one, "must spend exactly"),
        (no_maximum, "leaves its boxes|above the maxima"),
        (no_minimum, "leaves its boxes"),
        (sorts_in_place, "must leave the scales as they are"),
        (by_place, "must follow their prompts when these are reordered"),
        (takes_nan, "a scale that is NaN must be refused"),
        (takes_negative, "a scale below 0 must be refused"),
        (clamps, "a total below the minima must be refused"),
        (AtRandom(), "must decide the same when asked again"),
    ],
)
def test_a_broken_allocator_is_found_out(broken, message):
    with pytest.raises(AssertionError, match=message):
        check_sampler(allocator=broken)


def test_there_must_be_something_to_test():
    with pytest.raises(ValueError, match="needs a selector or an allocator"):
        check_sampler()
    with pytest.raises(ValueError, match="got num_prompts=3"):
        check_sampler(allocator=neyman, num_prompts=3)


def of_wrong_budgets(change):
    def allocate(a_P, b_P, total, **box):
        return change(allocation.knapsack_posterior(a_P, b_P, total, **box))

    return allocate


def takes_zero(a_P, b_P, total, **box):
    a_P, b_P = (np.where(column_P == 0, 1.0, column_P) for column_P in (a_P, b_P))
    return allocation.knapsack_posterior(a_P, b_P, total, **box)


def takes_a_negative_b(a_P, b_P, total, **box):
    return allocation.knapsack_posterior(a_P, np.abs(b_P), total, **box)


def sorts_b(a_P, b_P, total, **box):
    budget_P = allocation.knapsack_posterior(a_P, b_P, total, **box)
    b_P.sort()
    return budget_P


def test_an_allocator_of_the_posterior_passes():
    check_sampler(allocator=allocation.knapsack_posterior, takes_posterior=True, minimum=2)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (of_wrong_budgets(lambda budget_P: budget_P * 1.0), "int64 budgets"),
        (of_wrong_budgets(lambda budget_P: budget_P + 1), "must spend exactly"),
        (
            of_wrong_budgets(lambda budget_P: np.sort(budget_P)),
            "leaves its boxes|must follow their",
        ),
        (sorts_b, "must leave the scales as they are"),
        (takes_zero, "a parameter that is 0 must be refused"),
        (takes_a_negative_b, "a parameter below 0 must be refused"),
    ],
)
def test_a_broken_allocator_of_the_posterior_is_found_out(broken, message):
    with pytest.raises(AssertionError, match=message):
        check_sampler(allocator=broken, takes_posterior=True, minimum=2)
