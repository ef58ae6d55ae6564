"""LongCat's guidance as a patch on a MODEL, for every sampler of the host."""

from dataclasses import dataclass, replace
from typing import Any

import comfy.model_patcher
import comfy.patcher_extension
import torch

from .. import flow
from . import editing, formats


@dataclass(frozen=True)
class Guidance:
    """Guidance settings; outside (start, end) of the schedule the conditional velocity is used alone.

    ``renorm`` counts for text to image alone: the official edit pipeline has no renormalisation.
    """

    renorm: bool
    renorm_min: float
    start_sigma: float
    end_sigma: float

    def active(self, sigma: torch.Tensor) -> bool:
        """Whether the noise level is inside the guidance interval."""
        level = float(sigma.max())
        return self.end_sigma <= level <= self.start_sigma

    def __call__(self, args: dict[str, Any]) -> torch.Tensor:
        """ComfyUI's ``sampler_cfg_function``: works on, and returns, the velocity times sigma.

        As in the pipeline, a guidance of 1 or less means the conditional velocity alone.
        """
        cond: torch.Tensor = args["cond"]
        if args["cond_scale"] <= 1 or not self.active(args["sigma"]):
            return cond
        sigma = args["sigma"].reshape(-1, *[1] * (cond.ndim - 1))
        renorm = self.renorm and not editing.has_reference(args.get("input_cond"))
        velocity = flow.guide(cond / sigma, args["uncond"] / sigma, args["cond_scale"], renorm, self.renorm_min)
        return velocity * sigma

    def skip_unguided(
        self, executor: Any, model: Any, conds: list[Any], x: torch.Tensor, sigma: torch.Tensor, options: Any
    ) -> Any:
        """ComfyUI's CALC_COND_BATCH wrapper: no unconditional forward where it would not be used, no second picture.

        Raises:
            LongCatError: there are several reference images.
        """
        editing.require_one_reference(*conds)
        if len(conds) == 2 and not self.active(sigma):
            conds = [conds[0], None]
        return executor(model, conds, x, sigma, options)


def patch(
    model: comfy.model_patcher.ModelPatcher,
    renorm: bool = True,
    renorm_min: float = 0.0,
    start_percent: float = 0.0,
    end_percent: float = 1.0,
) -> comfy.model_patcher.ModelPatcher:
    """A clone of the MODEL with LongCat's guidance.

    Raises:
        LongCatError: the MODEL is no LongCat-Image.
    """
    formats.scheduler_config(model)
    sampling = model.get_model_object("model_sampling")
    start, end = sampling.percent_to_sigma(start_percent), sampling.percent_to_sigma(end_percent)
    return _with_guidance(model, Guidance(renorm, renorm_min, start, end))


def patch_renorm(
    model: comfy.model_patcher.ModelPatcher, renorm: bool, renorm_min: float
) -> comfy.model_patcher.ModelPatcher:
    """As :func:`patch`, but the guidance interval of an earlier patch stays.

    Raises:
        LongCatError: the MODEL is no LongCat-Image.
    """
    patched = patch(model, renorm, renorm_min)
    earlier = model.model_options.get("sampler_cfg_function")
    if not isinstance(earlier, Guidance):
        return patched
    return _with_guidance(model, replace(earlier, renorm=renorm, renorm_min=renorm_min))


def _with_guidance(model: comfy.model_patcher.ModelPatcher, guidance: Guidance) -> comfy.model_patcher.ModelPatcher:
    patched = model.clone()
    patched.set_model_sampler_cfg_function(guidance)
    wrapper = comfy.patcher_extension.WrappersMP.CALC_COND_BATCH
    patched.remove_wrappers_with_key(wrapper, "longcat_guidance")
    patched.add_wrapper_with_key(wrapper, "longcat_guidance", guidance.skip_unguided)
    return patched
