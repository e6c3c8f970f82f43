"""Use a sequence classifier with one output as a reward model, as TRL does.

    RolloutTrainer(model, [ClassifierReward.load("folder-or-hub-id"), "format_answer"], ...)

A string that names a folder or a hub id, and a bare `nn.Module`, become one by themselves. The text is
prompt and completion together, of a conversation by the chat template of the reward model's tokenizer;
it is read without further special tokens. Axes: N rollouts, T tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class ClassifierReward:
    """The first logit of a classifier; called as any other reward function.

    The model is put in evaluation mode and its weights are frozen. Rows are read in batches of similar
    length. It has no timeout (`untimed`): it computes as long as its rows take.

    Raises, when called:
        ValueError: a text with more tokens than the model has positions; the row fails.
    """

    untimed = True

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        name: str | None = None,
        batch_size: int = 32,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Take a model as it is.

        Args:
            model: called with `input_ids` and `attention_mask`, gives `.logits` of shape (N, 1).
            tokenizer: of the model. Default: loaded from where the model was.
            name: key in results. Default: the last part of where the model was loaded from.
            batch_size: rows read at once.
            chat_template_kwargs: passed on to the chat template.

        Raises:
            ValueError: no tokenizer and none to be found, one without pad and end token, or a model of
                several outputs.
        """
        config = getattr(model, "config", None)
        source = getattr(config, "_name_or_path", "") or ""
        if (outputs := getattr(config, "num_labels", 1)) != 1:
            raise ValueError(
                f"reward model {source or type(model).__name__} has {outputs} outputs; a reward is one: "
                "load it with num_labels=1"
            )
        if tokenizer is None:
            tokenizer = _tokenizer(source, type(model).__name__)
        if len(tokenizer.get_vocab()) <= len(tokenizer.get_added_vocab()):
            # What transformers makes of a folder with a model and no tokenizer.
            raise ValueError(
                f"the tokenizer of reward model {source or type(model).__name__} has no vocabulary: "
                "its files are missing; give it in reward_processing_classes"
            )
        if tokenizer.pad_token_id is None:
            if tokenizer.eos_token is None:
                raise ValueError(
                    f"the tokenizer of reward model {source or type(model).__name__} has neither a pad "
                    "nor an end token; set tokenizer.pad_token"
                )
            tokenizer.pad_token = tokenizer.eos_token
        if config is not None:  # the logit of the last token that is no padding is the reward
            getattr(
                config, "get_text_config", lambda: config
            )().pad_token_id = tokenizer.pad_token_id
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.max_length = getattr(config, "max_position_embeddings", None)
        self.__name__ = name or source.rstrip("/").split("/")[-1] or type(model).__name__

    @classmethod
    def load(cls, source: str, tokenizer: Any = None, **settings: Any) -> ClassifierReward:
        """A reward model from a folder or the hub.

        Raises:
            ValueError: nothing of that name can be loaded, or it is a model without a trained head,
                whose rewards would be random.
        """
        from transformers import AutoModelForSequenceClassification
        from transformers.utils import logging

        loading = logging.get_logger("transformers.modeling_utils")
        level = loading.level
        loading.setLevel(logging.ERROR)  # what it would warn of is an error below
        try:
            model, info = AutoModelForSequenceClassification.from_pretrained(
                source, num_labels=1, output_loading_info=True
            )
        except (OSError, ValueError) as error:
            raise ValueError(
                f"no reward model could be loaded from {source!r}: it must be a folder or a hub id of a "
                f"sequence classifier with one output. {type(error).__name__}: {error}"
            ) from error
        except RuntimeError as error:  # sizes that do not fit
            raise ValueError(
                f"reward model {source!r} does not have one output: {error}"
            ) from error
        finally:
            loading.setLevel(level)
        missing = sorted(info["missing_keys"]) + sorted(map(str, info.get("mismatched_keys", ())))
        if missing:
            raise ValueError(
                f"{source!r} is no reward model of one output: it has no trained {missing[0]}, so its "
                "rewards would be random"
            )
        return cls(model, tokenizer, **settings)

    def to(self, device: torch.device | str) -> ClassifierReward:
        """The same reward, with its model on a device."""
        self.model.to(device)
        return self

    def texts_of(self, prompts: list[Any], completions: list[Any]) -> list[str]:
        """What the model reads of each row."""
        return [
            prompt + completion
            if isinstance(prompt, str)
            else self.tokenizer.apply_chat_template(
                prompt + completion, tokenize=False, **self.chat_template_kwargs
            )
            for prompt, completion in zip(prompts, completions, strict=True)
        ]

    def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        """(N,) rewards."""
        texts = self.texts_of(prompts, completions)
        ids = self.tokenizer(text=texts, add_special_tokens=False)["input_ids"] if texts else []
        longest = max(map(len, ids), default=0)
        if self.max_length is not None and longest > self.max_length:
            raise ValueError(
                f"a text of {longest} tokens, and reward model {self.__name__} reads at most "
                f"{self.max_length}"
            )
        rewards = [0.0] * len(texts)
        order = sorted(range(len(texts)), key=lambda row: len(ids[row]))
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            for row, reward in zip(rows, self._logits([texts[row] for row in rows]), strict=True):
                rewards[row] = reward
        return rewards

    @torch.inference_mode()
    def _logits(self, texts: list[str]) -> list[float]:
        device = next((weight.device for weight in self.model.parameters()), torch.device("cpu"))
        inputs = self.tokenizer(
            text=texts,
            return_tensors="pt",
            padding=True,
            padding_side="right",
            add_special_tokens=False,
        )
        logit_NL = self.model(**{name: value.to(device) for name, value in inputs.items()}).logits
        if logit_NL.ndim != 2 or logit_NL.shape[1] != 1:
            raise ValueError(
                f"reward model {self.__name__} gave logits of shape {tuple(logit_NL.shape)} for "
                f"{len(texts)} texts; expected one per text"
            )
        return logit_NL[:, 0].float().tolist()


def _tokenizer(source: str, kind: str) -> Any:
    from transformers import AutoTokenizer

    if not source:
        raise ValueError(
            f"reward model {kind} was not loaded from anywhere; give its tokenizer in "
            "reward_processing_classes"
        )
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the tokenizer of reward model {source!r} could not be loaded; give it in "
            f"reward_processing_classes. {type(error).__name__}: {error}"
        ) from error
