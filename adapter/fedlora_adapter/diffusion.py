"""Several LoRAs in one picture by turns, for pipelines of diffusers: Cached Multi-LoRA's schedule (arXiv:2502.04923).

At each denoising step one adapter leads and the others rest. Those that change fine detail (high frequencies: faces,
objects, style) take turns from the beginning; the one that changes the coarsest, such as a background, leads the end.

    from diffusers import StableDiffusionPipeline
    from fedlora_adapter.diffusion import Turns, by_frequency

    pipeline = StableDiffusionPipeline.from_pretrained(...)
    for name, folder in folders.items():
        pipeline.load_lora_weights(folder, adapter_name=name)
    turns = Turns(by_frequency(pipeline, list(folders), prompt), steps=50)
    turns.begin(pipeline)
    picture = pipeline(prompt, num_inference_steps=50, callback_on_step_end=turns).images[0]

The paper also reuses the U-Net features of the resting adapters from a cache, weighted by a decaying factor. That needs
a U-Net of its own and is not built: resting adapters add nothing here. FedLoRA does not train diffusion models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class Turns:
    """A callback that says which adapter leads each denoising step.

    Args:
        names: the adapters, from the one that changes the finest detail to the one that changes the coarsest.
        steps: number of denoising steps.
        every: steps after which the next adapter leads.
        late: share of the steps after which the last adapter leads to the end. With fewer than three adapters all of
            them take turns throughout.

    Raises:
        ValueError: there is no adapter, a name is given twice, or a number is out of range.
    """

    def __init__(self, names: Sequence[str], steps: int, every: int = 5, late: float = 0.6) -> None:
        if not names or len(set(names)) < len(names):
            raise ValueError(f"names is {list(names)}; give the names of at least one adapter, each once")
        if steps < 1 or every < 1 or not 0 <= late <= 1:
            raise ValueError(f"steps is {steps}, every {every} and late {late}; steps and every must be at least 1, "
                             "and late from 0 to 1")
        self._names, self._every, self._late = tuple(names), every, late * steps

    def leading(self, step: int) -> str:
        """Return the adapter that leads a step, counted from 0."""
        turn = step // self._every
        if len(self._names) < 3:
            return self._names[turn % len(self._names)]
        return self._names[-1] if step >= self._late else self._names[turn % (len(self._names) - 1)]

    def begin(self, pipeline: Any) -> None:
        """Have the first adapter lead, before the pipeline is called."""
        pipeline.set_adapters(self.leading(0))

    def __call__(self, pipeline: Any, step: int, timestep: object, given: dict[str, Any]) -> dict[str, Any]:
        """Have the next step's adapter lead, after each step (`callback_on_step_end`); change no tensor."""
        if self.leading(step + 1) != self.leading(step):
            pipeline.set_adapters(self.leading(step + 1))
        return {}


@torch.no_grad()
def by_frequency(pipeline: Any, names: Sequence[str], prompt: str, *, seed: int = 0) -> list[str]:
    """Return adapters from the one that changes the finest detail of a fixed latent to that of the coarsest.

    Args:
        pipeline: a pipeline of Stable Diffusion 1 or 2 with the adapters.
        names: the adapters.
        prompt: the prompt that they are compared under.
        seed: seed of the latent.
    """
    unet = pipeline.unet
    embedded = pipeline.encode_prompt(prompt, unet.device, 1, False)[0]
    shape = 1, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size
    latent = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(unet.device, unet.dtype)
    middle = pipeline.scheduler.config.num_train_timesteps // 2

    def noise() -> torch.Tensor:
        found: torch.Tensor = unet(latent, middle, encoder_hidden_states=embedded).sample
        return found.float()

    pipeline.disable_lora()
    without = noise()
    pipeline.enable_lora()
    shares = {}
    for name in names:
        pipeline.set_adapters(name)
        shares[name] = high_frequencies(noise() - without)
    return sorted(names, key=lambda name: -shares[name])


def high_frequencies(change: torch.Tensor, *, low: float = 0.4) -> float:
    """Return the share of a change's amplitude at high frequencies; 0 if there is no change.

    Args:
        change: [..., rows, columns] the change of a latent.
        low: share of each axis, around frequency 0, that counts as low frequencies.
    """
    amplitude = torch.fft.fft2(change.float()).abs()
    across, along = (torch.fft.fftfreq(size).abs() <= low / 2 for size in change.shape[-2:])
    is_low = (across[:, None] & along).to(amplitude.device)
    total = float(amplitude.sum())
    return float((amplitude * ~is_low).sum()) / total if total else 0.0
