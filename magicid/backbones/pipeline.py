"""What HunyuanVideo and Wan share: a diffusers pipeline of which only some parts are loaded.

Prompts, sampling and LoRA loading go through the pipeline's own code, so that a published adapter behaves here exactly
as it will in anybody's plain `pipeline(...)`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from magicid.backbones import adapter_slot, base_sha256
from magicid.backbones.base import TextEmbeddings, stack_text
from magicid.errors import BackboneError
from magicid.recipe import Recipe

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NEGATIVE = "negative_"  # prefix of the negative prompt's embeddings
_ONEDNN_FROM = 20480  # torch: a single clip's 3D convolution of fewer values (C x F x H) is not given to oneDNN


class PipelineBackbone:
    """A `VideoBackbone` over a diffusers text-to-video pipeline. Subclasses name the classes and their conventions.

    Not safe for several threads: sampling gives the pipeline a scheduler of its own each time.
    """

    pipeline_class: type[Any]
    transformer_class: type[Any]
    vae_class: type[Any]
    text_components: tuple[str, ...]
    vae_dtype: torch.dtype | None = None  # None: the transformer's

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        *,
        parts: tuple[str, ...],
        device: str | torch.device,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.recipe, self.folder, self.parts = recipe, folder, parts
        self.device = torch.device(device)
        self.dtype = dtype or _DTYPES[recipe.backbone.dtype]
        self.base_sha256 = base_sha256(recipe)
        self.pipeline = self._load()
        self._texts: dict[str, TextEmbeddings] = {}
        self._check_sizes()

    def _load(self) -> Any:
        """The pipeline; parts that are not asked for are None and not read from disk."""
        absent: dict[str, None] = {"vae": None} if "vae" not in self.parts else {}
        if "transformer" not in self.parts:
            absent["transformer"] = None
        if "text" not in self.parts:
            absent.update(dict.fromkeys(self.text_components))
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        try:
            pipeline = self.pipeline_class.from_pretrained(
                self.folder,
                dtype={"default": self.dtype, "vae": self.vae_dtype or self.dtype},
                use_safetensors=True,
                local_files_only=True,
                **absent,
            )
        except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
            raise BackboneError(
                f"cannot load the {self.pipeline_class.__name__} in {self.folder}: {error}", "download the model again"
            ) from error
        pipeline.set_progress_bar_config(disable=True)
        for component in pipeline.components.values():
            if isinstance(component, nn.Module):
                component.eval().requires_grad_(False)
        return pipeline.to(self.device)

    # ---- sizes -------------------------------------------------------------------------------------------------

    def _config(self, part: str) -> Any:
        """The configuration of the transformer or VAE, also where its weights are not loaded."""
        module = getattr(self.pipeline, part)
        if module is not None:
            return module.config
        cls = {"vae": self.vae_class, "transformer": self.transformer_class}[part]
        # Older folders name fewer settings than the class has (Wan 2.1: no compression ratios); its defaults hold.
        defaults = {key: value.default for key, value in inspect.signature(cls.__init__).parameters.items()}
        return {**defaults, **cls.load_config(self.folder / part)}

    def compression(self) -> tuple[int, int]:
        """The VAE's compression: frames per latent frame, pixels per latent pixel."""
        raise NotImplementedError(f"{type(self).__name__} must name its VAE's compression")

    def latent_shape(self) -> tuple[int, int, int, int]:
        """(C, F, H, W) of the recipe's clips."""
        temporal, spatial = self.compression()
        sampling = self.recipe.sampling
        return (
            int(self._config("transformer")["in_channels"]),
            (sampling.frames - 1) // temporal + 1,
            sampling.height // spatial,
            sampling.width // spatial,
        )

    def _check_sizes(self) -> None:
        temporal, spatial = self.compression()
        patch = self._config("transformer")["patch_size"]
        step = spatial * (patch if isinstance(patch, int) else patch[-1])
        step = max(step, 16)  # the pipelines themselves take multiples of 16 only
        sampling = self.recipe.sampling
        wrong = {
            "frames": ((sampling.frames - 1) % temporal != 0, f"1 more than a multiple of {temporal}"),
            "height": (sampling.height % step != 0, f"a multiple of {step}"),
            "width": (sampling.width % step != 0, f"a multiple of {step}"),
        }
        for key, (is_wrong, rule) in wrong.items():
            if is_wrong:
                raise BackboneError(
                    f"sampling.{key} = {getattr(sampling, key)} does not fit {self.folder}: it must be {rule}",
                    f"correct sampling.{key}",
                )

    def _need(self, part: str) -> Any:
        """A component by name; BackboneError when its part was not loaded."""
        component = getattr(self.pipeline, part)
        if component is None:
            raise BackboneError(
                f"the backbone was loaded without its {part}", "add the part to load_backbone(parts=...)"
            )
        return component

    # ---- the protocol ------------------------------------------------------------------------------------------

    @property
    def transformer(self) -> Any:
        """The denoising transformer."""
        return self._need("transformer")

    def encode_prompts(self, prompts: Sequence[str]) -> TextEmbeddings:
        """Text embeddings of B prompts, on the CPU, batch first; each prompt is encoded alone and once.

        With true classifier-free guidance those of the negative prompt are beside them, as `negative_<name>`, so that
        these embeddings are all the text that training and sampling need.

        Raises:
            BackboneError: a prompt is not cached and the text encoders are not loaded.
        """
        for prompt in prompts:
            if prompt not in self._texts:
                self._need(self.text_components[0])
                with torch.no_grad():
                    text = self._encode_prompt(prompt)
                    if self._true_cfg():
                        negative = self._encode_prompt(self.recipe.sampling.negative_prompt)
                        text.update({f"{_NEGATIVE}{name}": tensor for name, tensor in negative.items()})
                self._texts[prompt] = {name: tensor.cpu() for name, tensor in text.items()}
        return stack_text([self._texts[prompt] for prompt in prompts])

    def _encode_prompt(self, prompt: str) -> TextEmbeddings:
        raise NotImplementedError(f"{type(self).__name__} must encode one prompt")

    @torch.no_grad()
    def encode_video(self, frames_BFHWC: np.ndarray) -> Tensor:
        """uint8 RGB clips (B, F, H, W, 3) -> float32 latents (B, C, F', H', W') on the device: the posterior's mode."""
        vae = self._need("vae")
        video = torch.from_numpy(np.ascontiguousarray(frames_BFHWC)).to(self.device).permute(0, 4, 1, 2, 3)
        video = (video.float() / 127.5 - 1).to(vae.dtype)
        return self._to_transformer_scale(_in_twos(lambda clips: vae.encode(clips).latent_dist.mode(), video).float())

    @torch.no_grad()
    def decode(self, latents_BCFHW: Tensor) -> np.ndarray:
        """Latents -> uint8 RGB clips (B, F, H, W, 3)."""
        vae = self._need("vae")
        latents = self._to_vae_scale(latents_BCFHW.to(self.device).float()).to(vae.dtype)
        video = _in_twos(lambda clips: vae.decode(clips, return_dict=False)[0], latents).float()
        pixels = ((video / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        return pixels.permute(0, 2, 3, 4, 1).cpu().numpy()

    def _to_transformer_scale(self, latents_BCFHW: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must scale latents")

    def _to_vae_scale(self, latents_BCFHW: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must scale latents")

    def predict_velocity(
        self, latents_BCFHW: Tensor, sigma_B: Tensor, text: TextEmbeddings, guidance_scale: float | Tensor
    ) -> Tensor:
        """The transformer's velocity at sigma (0..1), float32 (B, C, F, H, W), with the adapters now active.

        Differentiable. The timestep is 1000 sigma; `guidance_scale` is the embedded guidance, one for all rows or a
        tensor (B,), ignored by models without one.
        """
        transformer = self.transformer
        inputs = self._velocity_inputs(text, guidance_scale, latents_BCFHW)
        return transformer(
            hidden_states=latents_BCFHW.to(transformer.dtype),
            timestep=1000 * sigma_B.to(latents_BCFHW.device, torch.float32),
            return_dict=False,
            **inputs,
        )[0].float()

    def _velocity_inputs(
        self, text: TextEmbeddings, guidance_scale: float | Tensor, latents: Tensor
    ) -> dict[str, Tensor]:
        """Text (in the transformer's dtype, on the latents' device) and guidance, as the transformer names them."""
        dtype = self.transformer.dtype
        return {name: t.to(latents.device, dtype) for name, t in text.items() if not name.startswith(_NEGATIVE)}

    def sample(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Sampled latents float32 (B, C, F, H, W) by the recipe's sampling settings, with the adapter now active.

        Raises:
            BackboneError: a prompt is not cached and the text encoders are not loaded.
            ValueError: not one seed for each prompt.
        """
        return self.sample_text(self.encode_prompts(prompts), seeds)

    @torch.no_grad()
    def sample_text(self, text: TextEmbeddings, seeds: Sequence[int]) -> Tensor:
        """`sample` from text embeddings: what a trainer without text encoders calls. Uses the adapter now active.

        Noise comes from one CPU generator per seed, so it is the same on every device and in every batch.

        Raises:
            ValueError: not one seed for each row of `text`.
        """
        rows = len(next(iter(text.values())))
        if rows != len(seeds):
            raise ValueError(f"{rows} prompts need as many seeds, not {len(seeds)}")
        sampling, shape = self.recipe.sampling, self.latent_shape()
        noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        self.pipeline.scheduler = self.new_scheduler()
        latents = self.pipeline(
            height=sampling.height,
            width=sampling.width,
            num_frames=sampling.frames,
            num_inference_steps=sampling.steps,
            latents=noise.to(self.device),
            output_type="latent",
            return_dict=False,
            **self.call_arguments({name: t.to(self.device, self.transformer.dtype) for name, t in text.items()}),
        )[0]
        return latents.float()

    def _true_cfg(self) -> bool:
        """Whether every step also takes a forward under the negative prompt."""
        return self.recipe.sampling.true_cfg_scale > 1

    def call_arguments(self, text: TextEmbeddings) -> dict[str, Any]:
        """Guidance and text embeddings as the pipeline's call names them."""
        raise NotImplementedError(f"{type(self).__name__} must name its pipeline's arguments")

    def new_scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        """A scheduler of its own for one call: schedulers are stateful."""
        shift = self.recipe.sampling.shift
        settings = copy.deepcopy(dict(self.pipeline.scheduler.config))
        if isinstance(self.pipeline.scheduler, FlowMatchEulerDiscreteScheduler):
            return FlowMatchEulerDiscreteScheduler.from_config(settings, shift=shift)
        return FlowMatchEulerDiscreteScheduler(shift=shift)

    def with_sampling(self, **changes: Any) -> PipelineBackbone:
        """The same model under other sampling settings, with a memory of prompts of its own.

        Raises:
            BackboneError: frames, height or width do not fit the model.
        """
        other = copy.copy(self)
        sampling = self.recipe.sampling.model_copy(update=changes)
        other.recipe = self.recipe.model_copy(update={"sampling": sampling})
        other._texts = {}
        other._check_sizes()
        return other

    # ---- LoRA --------------------------------------------------------------------------------------------------

    def lora_target_modules(self) -> str:
        """A regular expression that PEFT matches against whole module names."""
        raise NotImplementedError(f"{type(self).__name__} must name its attention projections")

    def lora_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """PEFT's LoRA tensors -> the names that the pipeline class's plain `load_lora_weights` reads.

        Values are unchanged: rank and alpha travel in the file's metadata (`adapters.to_bytes`).
        """
        return {f"transformer.{name.removeprefix('base_model.model.')}": tensor for name, tensor in state.items()}

    def load_adapter(self, lora_state: dict[str, Tensor] | None, name: str = "default") -> None:
        """Load LoRA tensors (published names) for sampling and make them the only active adapter; None: the base.

        Alpha is the recipe's. An adapter of the same modules and rank is copied over the one already there.

        Raises:
            AdapterError: the tensors do not fit this transformer.
        """
        adapter_slot.load(self.transformer, lora_state, name, self.recipe.lora.alpha)


def _in_twos(convolve: Callable[[Tensor], Tensor], clips_BCFHW: Tensor) -> Tensor:
    """`convolve` of a batch; a single small clip on a CPU goes in twice, which takes half the time: torch keeps 3D
    convolutions of one such clip from oneDNN (`use_mkldnn` in aten/src/ATen/native/Convolution.cpp)."""
    small = clips_BCFHW.device.type == "cpu" and len(clips_BCFHW) == 1 and clips_BCFHW[0, ..., 0].numel() < _ONEDNN_FROM
    return convolve(clips_BCFHW.expand(2, -1, -1, -1, -1))[:1] if small else convolve(clips_BCFHW)
