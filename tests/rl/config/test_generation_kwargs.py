"""TRL's generation_kwargs: what becomes of each key."""

import pytest
from transformers import GenerationConfig

from rl.config.generation_kwargs import NEUTRAL, REASONS, SETTINGS
from rl.trainer import RolloutTrainer
from tests import tiny


def test_keys_become_the_settings_of_their_meaning(tmp_path):
    kwargs = {"max_new_tokens": 7, "top_k": 5, "repetition_penalty": 1.2, "stop_strings": "b"}
    config = tiny.config(tmp_path, max_completion_length=256, generation_kwargs=kwargs)
    assert (config.max_completion_length, config.top_k) == (7, 5)
    assert (config.repetition_penalty, config.stop) == (1.2, ["b"])
    # A copy made of the settings, as for a worker or a resumed run, says the same.
    again = tiny.config(
        tmp_path, **{n: getattr(config, n) for n in (*SETTINGS.values(), "generation_kwargs")}
    )
    assert again.generation_kwargs == kwargs and again.top_k == 5


def test_they_may_be_json_and_neutral_values_are_accepted(tmp_path):
    config = tiny.config(
        tmp_path, generation_kwargs='{"do_sample": true, "num_beams": 1, "top_p": 0.9}'
    )
    assert config.top_p == 0.9


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_beams": 4}, "num_beams=4 is not taken: a beam is no sample"),
        ({"do_sample": False}, "do_sample=False is not taken"),
        ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size=3 is not taken: .* do not offer it"),
        ({"suppress_tokens": [1]}, "suppress_tokens=.* do not offer it"),
        ({"temprature": 0.7}, "temprature=0.7 is not taken: .* Did you mean 'temperature'?"),
        ({"max_new_tokens": 9}, "max_new_tokens=9 contradicts max_completion_length=5"),
        ({"top_p": 2.0}, "top_p must be at most 1"),
        ({"top_k": "5"}, "top_k must be a whole number"),
        ([1], "generation_kwargs must be a mapping"),
        ("{x}", "generation_kwargs must be a mapping"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_key(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        tiny.config(tmp_path, generation_kwargs=kwargs)


def test_every_key_of_transformers_is_taken_or_refused_with_a_reason(tmp_path):
    for key in GenerationConfig().to_dict():
        if key in SETTINGS:
            continue
        with pytest.raises(
            ValueError, match=f"generation_kwargs: {key}=.* is not taken: ."
        ) as error:
            tiny.config(tmp_path, generation_kwargs={key: 3.25})
        assert "knows it" not in str(error.value)
    assert not {*SETTINGS} & {*NEUTRAL, *REASONS}


@pytest.mark.slow
def test_chat_template_kwargs_and_the_penalty_reach_the_run(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}{% if think %}b{% endif %}"
    rows = [{"prompt": [{"role": "user", "content": f"a{d}"}]} for d in tiny.DIGITS]
    settings = tiny.config(
        tmp_path, chat_template_kwargs='{"think": true}', repetition_penalty=1.5, max_steps=1
    )

    def first(completions, **_):
        return [float(text[0]["content"][:1] in "0123") for text in completions]

    made = RolloutTrainer(tiny.model(), first, settings, rows, processing_class=tokenizer)
    assert tokenizer.decode(made.prompts[0].token_ids).replace(" ", "") == "a0b"
    assert made.policy.sampling.repetition_penalty == 1.5
    made.train()
    assert settings.decisive_settings()["chat_template_kwargs"] == {"think": True}
