"""The loop that README points to runs and learns."""

from examples.own_loop import main


def test_it_learns():
    pass_rates = main(steps=30)
    assert len(pass_rates) == 31
    # Seeded: .508 at the start and .65 after 30 steps. Hopeless prompts bound it at 10 / 11.
    assert pass_rates[-1] > pass_rates[0] + 0.1
