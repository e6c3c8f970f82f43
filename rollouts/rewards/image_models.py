"""Image rewards that need weights: CLIP score, PickScore, LAION aesthetic, ImageReward, HPSv2.

Nothing is imported, downloaded or read before `load()`. Weights are read from safetensors, or by
torch with `weights_only=True`, never unpickled. The classes keep their contract otherwise: float64
rewards in row order, no gradient, no state between calls. A row's reward is the same up to rounding
whatever rows are scored with it, because texts are padded to one length. Of a video they score the
middle frame.

Rewards with weights are best run in a process of their own: `rollouts.rewards.remote`.

Axes: N images.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rollouts.rewards.image import ImageReward, Metadata, check_images
from rollouts.rewards.image_shapes import middle_frame

CLIP_NAME = "openai/clip-vit-large-patch14"
CLIP_H_NAME = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
PICKSCORE_NAME = "yuvalkirstain/PickScore_v1"
IMAGE_REWARD_NAME = "ImageReward-v1.0"
HPS_ARCHITECTURE = "ViT-H-14"


class ClipScore:
    """Cosine of the CLIP embeddings of image and prompt, in [-1, 1].

        cos = <image, text> / (|image| |text|)

    Hessel et al. (2021, arXiv:2104.08718) report 2.5 max(cos, 0); that is left to the caller,
    because the cut would hide how far off an image is. `load(CLIP_H_NAME)` takes the ViT-H-14 of
    LAION in place of OpenAI's ViT-L/14.
    """

    __name__ = "clip_score"

    def __init__(self, model: Any, processor: Any, *, batch_size: int = 32) -> None:
        """A loaded transformers CLIPModel and its processor; `load` gets them by name."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.model = model.eval()
        self.processor = processor
        self.batch_size = batch_size

    @classmethod
    def load(
        cls,
        name: str = CLIP_NAME,
        *,
        processor: str | None = None,
        revision: str | None = None,
        device: str = "cpu",
        batch_size: int = 32,
    ) -> ClipScore:
        """Read a CLIP checkpoint of transformers.

        Args:
            name: folder or hub name of the model.
            processor: folder or hub name of the processor; None takes the model's.
            revision: commit of the model, so that a later upload changes nothing; None takes the
                newest.
            device: where the model runs.
            batch_size: images at a time.
        """
        transformers = _library("transformers", cls.__name__, "transformers")
        model = transformers.CLIPModel.from_pretrained(
            name, revision=revision, use_safetensors=True
        )
        same = processor is None
        reader = transformers.CLIPProcessor.from_pretrained(
            name if same else processor, revision=revision if same else None
        )
        return cls(model.to(device), reader, batch_size=batch_size)

    @torch.no_grad()
    def __call__(
        self, image_NHWC: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> np.ndarray:
        """Rewards (N,) float64. A prompt is cut at the length that CLIP can read."""
        cosines = [torch.zeros(0, dtype=torch.float64)]
        for pictures, texts in _batches(image_NHWC, prompts, self.batch_size):
            inputs = self.processor(
                images=pictures,
                text=texts,
                return_tensors="pt",
                padding="max_length",
                max_length=self.model.config.text_config.max_position_embeddings,
                truncation=True,
            ).to(self.model.device)
            output = self.model(**inputs)
            image, text = output.image_embeds.double(), output.text_embeds.double()
            cosines.append(torch.nn.functional.cosine_similarity(image, text).cpu())
        return _finite(torch.cat(cosines) * self._scale(), type(self).__name__)

    def _scale(self) -> float:
        return 1.0


class PickScore(ClipScore):
    """What people preferred among images of one prompt, as a CLIP model predicts it; about 15 to 25.

        exp(logit_scale) cos

    (Kirstain et al., 2023, arXiv:2305.01569.)
    """

    __name__ = "pick_score"

    @classmethod
    def load(
        cls,
        name: str = PICKSCORE_NAME,
        *,
        processor: str | None = CLIP_H_NAME,
        revision: str | None = None,
        device: str = "cpu",
        batch_size: int = 32,
    ) -> ClipScore:
        """As `ClipScore.load`; the processor is that of the CLIP it was trained from."""
        return super().load(
            name, processor=processor, revision=revision, device=device, batch_size=batch_size
        )

    def _scale(self) -> float:
        return float(self.model.logit_scale.exp())


class Aesthetic:
    """LAION's aesthetic score of the image, about 1 to 10; the prompt does not count.

        head(image embedding / |image embedding|)

    with the CLIP ViT-L/14 and five linear layers (768, 1024, 128, 64, 16, 1), nothing between them.
    (Schuhmann, 2022, improved-aesthetic-predictor; the reward of DDPO.)
    """

    __name__ = "aesthetic"

    def __init__(
        self, model: Any, processor: Any, head: torch.nn.Module, *, batch_size: int = 32
    ) -> None:
        """A loaded transformers CLIPModel, its processor, and the head; `load` gets them."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.model = model.eval()
        self.processor = processor
        self.head = head.eval()
        self.batch_size = batch_size

    @classmethod
    def load(
        cls,
        head: str | Path,
        *,
        name: str = CLIP_NAME,
        revision: str | None = None,
        device: str = "cpu",
        batch_size: int = 32,
    ) -> Aesthetic:
        """Read the CLIP and the head.

        Args:
            head: the file sac+logos+ava1-l14-linearMSE.pth of the repository
                christophschuhmann/improved-aesthetic-predictor, or a safetensors file of it.
            name: folder or hub name of the CLIP.
            revision: commit of the CLIP; None takes the newest.
            device: where both run.
            batch_size: images at a time.
        """
        transformers = _library("transformers", cls.__name__, "transformers")
        model = transformers.CLIPModel.from_pretrained(
            name, revision=revision, use_safetensors=True
        )
        reader = transformers.CLIPProcessor.from_pretrained(name, revision=revision)
        layers = build_head(model.config.projection_dim)
        layers.load_state_dict(
            {key.removeprefix("layers."): value for key, value in read_weights(head).items()}
        )
        return cls(model.to(device), reader, layers.to(device), batch_size=batch_size)

    @torch.no_grad()
    def __call__(
        self, image_NHWC: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> np.ndarray:
        """Rewards (N,) float64."""
        scores = [torch.zeros(0, dtype=torch.float64)]
        for pictures, _ in _batches(image_NHWC, prompts, self.batch_size):
            inputs = self.processor(images=pictures, return_tensors="pt").to(self.model.device)
            pooled = self.model.vision_model(**inputs).pooler_output
            embedding = torch.nn.functional.normalize(self.model.visual_projection(pooled), dim=-1)
            scores.append(self.head(embedding)[:, 0].double().cpu())
        return _finite(torch.cat(scores), type(self).__name__)


def build_head(width: int) -> torch.nn.Sequential:
    """The aesthetic head, untrained. Layers 1, 3 and 5 are the dropouts of its training."""
    nn = torch.nn
    return nn.Sequential(
        nn.Linear(width, 1024),
        nn.Dropout(0.2),
        nn.Linear(1024, 128),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.Dropout(0.1),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    )


class ImageRewardScore:
    """ImageReward, a standardised score of image and prompt; about -2 to 2.

    (Xu et al., 2023, arXiv:2304.05977.) Optimised alone it is reported to corrupt images; watch
    another reward beside it.
    """

    __name__ = "image_reward"

    def __init__(self, model: Any) -> None:
        """What the library's `load` returns: it has `score(prompt, picture)`."""
        self.model = model

    @classmethod
    def load(cls, name: str = IMAGE_REWARD_NAME, *, device: str = "cpu") -> ImageRewardScore:
        """Read the model by its library; a file of it that needs unpickling is refused."""
        library = _library("ImageReward", cls.__name__, "image-reward")
        with _weights_only():
            return cls(library.load(name, device=device))

    @torch.no_grad()
    def __call__(
        self, image_NHWC: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> np.ndarray:
        """Rewards (N,) float64, one image at a time, as the library pairs a prompt with images."""
        scores = [
            float(self.model.score(texts[0], pictures[0]))
            for pictures, texts in _batches(image_NHWC, prompts, 1)
        ]
        return _finite(torch.tensor(scores, dtype=torch.float64), type(self).__name__)


class HumanPreference:
    """HPSv2: what people prefer, as a CLIP ViT-H-14 predicts it; about 0.2 to 0.4.

        cos of the embeddings of image and prompt

    (Wu et al., 2023, arXiv:2306.09341; the weights of version 2.1 are HPS_v2.1_compressed.pt of the
    hub's xswu/HPSv2.) Square images only: the authors pad others, open_clip crops them.
    """

    __name__ = "hps_v2"

    def __init__(
        self,
        model: Any,
        preprocess: Callable[[Image.Image], Tensor],
        tokenize: Callable[[list[str]], Tensor],
        *,
        device: str = "cpu",
        batch_size: int = 32,
    ) -> None:
        """A model of open_clip (`encode_image`, `encode_text`) and its two readers."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.model = model.eval()
        self.preprocess = preprocess
        self.tokenize = tokenize
        self.device = device
        self.batch_size = batch_size

    @classmethod
    def load(
        cls, weights: str | Path, *, device: str = "cpu", batch_size: int = 32
    ) -> HumanPreference:
        """Read the model.

        Args:
            weights: HPS_v2.1_compressed.pt, or a safetensors file of its state.
            device: where it runs.
            batch_size: images at a time.
        """
        library = _library("open_clip", cls.__name__, "open-clip-torch")
        model, _, preprocess = library.create_model_and_transforms(HPS_ARCHITECTURE)
        model.load_state_dict(read_weights(weights))
        tokenize = library.get_tokenizer(HPS_ARCHITECTURE)
        return cls(model.to(device), preprocess, tokenize, device=device, batch_size=batch_size)

    @torch.no_grad()
    def __call__(
        self, image_NHWC: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> np.ndarray:
        """Rewards (N,) float64.

        Raises:
            ValueError: images that are not square.
        """
        height, width = image_NHWC.shape[-3:-1]
        if height != width:
            raise ValueError(f"HPSv2 needs square images, got {(height, width)}")
        cosines = [torch.zeros(0, dtype=torch.float64)]
        for pictures, texts in _batches(image_NHWC, prompts, self.batch_size):
            pixels = torch.stack([self.preprocess(picture) for picture in pictures])
            image = self.model.encode_image(pixels.to(self.device)).double()
            text = self.model.encode_text(self.tokenize(texts).to(self.device)).double()
            cosines.append(torch.nn.functional.cosine_similarity(image, text).cpu())
        return _finite(torch.cat(cosines), type(self).__name__)


MODEL_REWARDS: dict[str, Callable[..., ImageReward]] = {
    "clip_score": ClipScore.load,
    "pick_score": PickScore.load,
    "image_reward": ImageRewardScore.load,
}
"""Names of rewards that are read from the hub, for `load_image_reward(spec, more=MODEL_REWARDS)`;
each takes `device=`, by default the CPU.
`Aesthetic` and `HumanPreference` need a file: load them in a reward file of one's own."""


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a torch file, which may hold nothing but tensors.

    A torch file that is a training checkpoint gives what is under "state_dict".

    Raises:
        ValueError: no such file, or one that cannot be read without unpickling objects.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no file of weights {str(path)!r}")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{str(path)!r} cannot be read as tensors alone, and is not unpickled, for that would "
            f"run code in it; convert it to safetensors where you trust it ({error})"
        ) from error
    return dict(state.get("state_dict", state))


# What they share.


def _library(module: str, user: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{user} needs the library {module}: pip install {package} ({error})"
        ) from error


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    """Within it torch.load reads tensors only, whatever a library asks for."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _batches(
    image_NHWC: np.ndarray, prompts: Sequence[str], size: int
) -> Iterator[tuple[list[Image.Image], list[str]]]:
    """Pictures and prompts, `size` rows at a time; of videos the middle frames."""
    image_NHWC = middle_frame(np.asarray(image_NHWC))
    check_images(image_NHWC)
    if len(image_NHWC) != len(prompts):
        raise ValueError(f"got {len(image_NHWC)} images for {len(prompts)} prompts")
    for start in range(0, len(prompts), size):
        rows = np.broadcast_to(
            image_NHWC[start : start + size],
            (*image_NHWC[start : start + size].shape[:3], 3),  # grey is shown as R = G = B
        )
        pictures = [Image.fromarray(np.ascontiguousarray(image)) for image in rows]
        yield pictures, list(prompts[start : start + size])


def _finite(score_N: Tensor, name: str) -> np.ndarray:
    bad = (~torch.isfinite(score_N)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"{name} gave {score_N[bad[0]]} for row {bad[0]}; it is no reward")
    return score_N.numpy()
