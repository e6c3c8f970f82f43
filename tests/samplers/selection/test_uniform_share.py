import numpy as np
import pytest

from samplers.check import check_sampler
from samplers.posterior import BetaPosterior
from samplers.selection import ThompsonSelector, UniformSelector
from samplers.selection.uniform_share import UniformShare


def of_thompson(posterior, keys, share=0.3):
    inner = ThompsonSelector(posterior, keys=keys)
    return UniformShare(inner, posterior.num_prompts, share=share, keys=keys)


@pytest.mark.slow
def test_it_is_a_selector():
    check_sampler(selector=of_thompson)


@pytest.mark.parametrize(("share", "num"), [(0.25, 8), (0.03, 32), (1.0, 5), (0.5, 1)])
def test_its_share_of_all_prompts_is_drawn_uniformly_on_average(share, num):
    # The other selector would never take row 0: it believes that it has failed without end.
    posterior = BetaPosterior(100)
    posterior.add(np.arange(40), np.zeros(40), np.full(40, 1e9))
    selector = of_thompson(posterior, None, share)
    generator = np.random.default_rng(0)
    hopeless, drawn = 0, 0.0
    for _ in range(600):
        chosen = selector.select(num, generator=generator)
        assert len(set(chosen.tolist())) == num
        hopeless += (chosen < 40).sum()
        drawn += selector.metrics()["uniform_share"] * num
    # Picks are 600 share num, of which 40 % are hopeless; standard error at most sqrt(600 num) / 2.
    assert abs(hopeless - 0.4 * 600 * share * num) < 4 * np.sqrt(600 * num) / 2
    assert abs(drawn - 600 * share * num) < 4 * np.sqrt(600) / 2


def test_the_rest_is_the_other_selectors_choice_best_first():
    posterior = BetaPosterior(30)
    plain = ThompsonSelector(posterior).select(10, generator=np.random.default_rng(3))
    mixed = of_thompson(posterior, None, 0.2).select(10, generator=np.random.default_rng(3))
    kept = [row for row in mixed.tolist() if row in plain[:8].tolist()]
    assert kept[: len(kept)] == [row for row in plain.tolist() if row in kept]
    none = of_thompson(posterior, None, 0.0).select(10, generator=np.random.default_rng(3))
    assert none.tolist() == plain.tolist()


def test_the_other_selectors_state_and_metrics_are_kept():
    made = [UniformShare(UniformSelector(20, seed=0), 20, share=0.5) for _ in range(2)]
    made[0].select(6, generator=np.random.default_rng(0))
    made[1].load_state_dict(made[0].state_dict())
    assert made[1].metrics() == made[0].metrics()
    one, other = (m.select(6, generator=np.random.default_rng(1)).tolist() for m in made)
    assert one == other
    with pytest.raises(ValueError, match="state of a uniform share lacks"):
        made[0].load_state_dict({})
    with pytest.raises(ValueError, match=r"uniform picks must be in \[0, 1\], got 1.5"):
        UniformShare(UniformSelector(20, seed=0), 20, share=1.5)
