"""Cached Multi-LoRA's schedule: which adapter leads each denoising step of a pipeline of diffusers."""

import pytest
import torch

from fedlora_adapter.diffusion import Turns, by_frequency, high_frequencies


def test_fine_adapters_take_turns_and_the_coarsest_leads_the_end():
    turns = Turns(["face", "style", "background"], steps=50, every=5)
    assert [turns.leading(step) for step in (0, 4, 5, 9, 10, 29)] == ["face", "face", "style", "style", "face", "style"]
    assert {turns.leading(step) for step in range(30, 50)} == {"background"}
    two = Turns(["face", "background"], steps=20, every=2)
    assert [two.leading(step) for step in range(0, 20, 2)] == ["face", "background"] * 5


@pytest.mark.parametrize("wrong", [([], 5), (["a", "a"], 5), (["a"], 0)])
def test_turns_that_cannot_be_taken_are_refused(wrong):
    with pytest.raises(ValueError, match=r"names is|steps is"):
        Turns(*wrong)


def test_high_frequencies_are_those_of_fine_detail():
    waves = torch.arange(32) * 2 * torch.pi / 32
    fine, coarse = (torch.cos(waves * times).expand(4, 32, 32) for times in (14, 1))
    assert high_frequencies(fine) > 0.99 and high_frequencies(coarse) < 0.01
    assert high_frequencies(fine + coarse) == pytest.approx(0.5, abs=0.01)
    assert high_frequencies(torch.zeros(2, 8, 8)) == 0


def test_a_pipeline_of_diffusers_calls_the_schedule(tmp_path):
    import diffusers
    from peft import LoraConfig
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=16, attention_head_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
    vae = diffusers.AutoencoderKL(block_out_channels=(32,), norm_num_groups=8, sample_size=8)
    text = CLIPTextModel(CLIPTextConfig(vocab_size=10, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                                        num_attention_heads=2, max_position_embeddings=8))
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=None, unet=unet,
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False)
    embedded = torch.randn(1, 8, 16)
    pipeline.encode_prompt = lambda *_: (embedded, None)
    for name in ("one", "two"):
        unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), adapter_name=name)
    order = by_frequency(pipeline, ["one", "two"], "a ward")
    assert sorted(order) == ["one", "two"]
    del pipeline.encode_prompt
    turns, active = Turns(order, steps=4, every=1), []

    def noted(pipe, step, timestep, given):
        active.append(pipe.get_active_adapters())
        return turns(pipe, step, timestep, given)

    turns.begin(pipeline)
    pipeline(prompt_embeds=embedded, negative_prompt_embeds=embedded, num_inference_steps=4, output_type="latent",
             callback_on_step_end=noted)
    assert active == [[order[0]], [order[1]], [order[0]], [order[1]]]
