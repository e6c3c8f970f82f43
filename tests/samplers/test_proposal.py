import numpy as np
import pytest

from samplers.proposal import Proposal, checked_rewards


def test_rewards_outside_the_unit_interval_are_told_what_to_write():
    proposal = Proposal(
        step=0,
        round=0,
        is_last=True,
        index_P=np.array([0]),
        budget_P=np.array([3]),
        draw_P=np.array([0]),
        first_slot_P=np.array([0]),
        pass_rate_P=np.array([0.5]),
        seed_N=np.arange(3),
    )
    given = dict(keys=["a"], in_unit_interval=True)
    with pytest.raises(ValueError, match=r"success_above: -98\.5, the median.*got -120\.0 for pro"):
        checked_rewards(proposal, [-120.0, -98.5, -3.0], [0, 0, 0], **given)
    checked_rewards(
        proposal, [-120.0, -98.5, -3.0], [0, 0, 0], **given | {"in_unit_interval": False}
    )
