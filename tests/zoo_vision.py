"""A tiny random model for every image-text-to-text model of the installed transformers, as `zoo` has them for causal
language models, called with one image a text (`example`) or with text alone (`text_example`).

No processor is needed: as many placeholder tokens are put into the text as the model makes features of the image.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import transformers
import zoo
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from zoo import WIDTH

NAMES: list[str] = list(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)

IMAGE, PATCH, MERGE = 16, 4, 2
"""Pixels of an image's side, of a patch's side, and patches of a side that are merged into one token."""

SIDE = IMAGE // PATCH

IMAGE_TOKEN, VIDEO_TOKEN, START_TOKEN, END_TOKEN, AUDIO_TOKEN = 250, 251, 252, 253, 254

SMALL: dict[str, Any] = {
    **zoo.SMALL,
    **dict.fromkeys(("image_token_id", "image_token_index"), IMAGE_TOKEN),
    **dict.fromkeys(("video_token_id", "video_token_index"), VIDEO_TOKEN),
    **dict.fromkeys(("vision_start_token_id", "image_start_token_id", "boi_token_id", "boi_token_index"), START_TOKEN),
    **dict.fromkeys(("vision_end_token_id", "image_end_token_id", "eoi_token_id", "eoi_token_index"), END_TOKEN),
    **dict.fromkeys(("video_start_token_id", "audio_start_token_id", "boa_token_id"), START_TOKEN),
    **dict.fromkeys(("video_end_token_id", "audio_end_token_id", "eoa_token_index"), END_TOKEN),
    **dict.fromkeys(("audio_token_id", "audio_token_index"), AUDIO_TOKEN),
    **dict.fromkeys(("image_size", "img_size"), IMAGE),
    "patch_size": PATCH,
    "spatial_merge_size": MERGE,
    **dict.fromkeys(("out_hidden_size", "projection_dim", "text_hidden_size", "projector_hidden_size"), WIDTH),
    **dict.fromkeys(("output_dim", "d_out", "adapter_in_dim", "adapter_out_dim", "adapter_input_size"), WIDTH),
    **dict.fromkeys(("mm_tokens_per_image", "num_query_tokens", "latent_query_num", "num_image_tokens"), 4),
    **dict.fromkeys(("pooling_kernel_size",), MERGE),
}

_PROJECTED = {"projector_input_dim": WIDTH, "projector_output_dim": WIDTH, "vision_output_dim": WIDTH}
_TOKENS = {"decoder_start_token_id": 1, "pad_token_id": 0}


def _mrope(*sections: int, **more: Any) -> dict[str, Any]:
    """Rotary embeddings of three positions, of time, height and width."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}
    return {"rope_parameters": rope | more}


_SAM = {"downsample_channels": [WIDTH, WIDTH], "global_attn_indexes": [0], "output_channels": WIDTH}

_ONE_TILE = {"image_grid_pinpoints": [[IMAGE, IMAGE]]}

VALUES: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "blip-2": {"image_token_index": IMAGE_TOKEN},
    "cohere_compass": {"text_config": zoo.VALUES["cohere_compass_text"]},
    "dots3_note": zoo.VALUES["dots3_note"],
    "deepseek_ocr2": {
        "vision_config": {"sam_config": _SAM},
        "text_config": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    },
    "deepseek_vl_hybrid": {"high_res_vision_config": {"global_attn_indexes": [0]}},
    "ernie4_5_vl_moe": {"text_config": _mrope(2, 2, 4) | {"moe_intermediate_size": [32, 32]}},
    **dict.fromkeys(("gemma4", "gemma4_unified"), {"vision_config": {}}),
    **dict.fromkeys(("glm46v", "glm4v", "glm_ocr", "glmga"), {"text_config": _mrope(2, 3, 3)}),
    "glm4v_moe": {"text_config": _mrope(1, 1, 2, partial_rotary_factor=0.5)},
    "glm5_next": {"text_config": {"index_kpool": 2, "qk_rope_head_dim": 0}},
    "hunyuan_vl": {"text_config": _mrope(2, 2, 2, 2) | {"head_dim": zoo.HEAD}},
    "kimi_k25": {"projection_hidden_size": WIDTH, "vision_config": {"projection_hidden_size": WIDTH}},
    "instructblip": {"image_token_index": IMAGE_TOKEN},
    "instructblipvideo": {"video_token_index": IMAGE_TOKEN},
    "llama4": {"vision_config": {"intermediate_size": 256, **_PROJECTED}, "text_config": {"moe_layers": [1]}},
    "llava_next": _ONE_TILE,
    "llava_next_video": _ONE_TILE,
    "llava_onevision": _ONE_TILE,
    "mistral4": {"head_dim": 2 * zoo.HEAD},
    "mllama": {
        "vision_config": {"vision_output_dim": 2 * WIDTH, "intermediate_layers_indices": [0], "num_global_layers": 1}
    },
    **dict.fromkeys(
        ("muse_glimmer", "muse_spark"),
        {"out_hidden_size": WIDTH * MERGE**2, "vision_config": {"out_hidden_size": WIDTH * MERGE**2}},
    ),
    "nemotron_h_omni": {
        "image_token_id": IMAGE_TOKEN,
        "vision_hidden_size": WIDTH,
        "vision_config": {"video_temporal_patch_size": 2},
    },
    "pp_formulanet": {"vision_config": {"decoder_hidden_size": WIDTH}},
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "paddleocr_vl"), {"text_config": _mrope(2, 3, 3)}),
    "qwen2_5_omni_thinker": {"vision_start_token_id": START_TOKEN, "text_config": _mrope(2, 3, 3)},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": START_TOKEN},
    "qwen4_exp": {"text_config": zoo.VALUES["qwen4_exp_text"]},
    "step3p7": {"text_config": {"sliding_window": 4}},
    "udop": _TOKENS,
    "vision-encoder-decoder": _TOKENS,
    "unlimited_ocr": {"vision_config": {"sam_config": _SAM}},
    "vipllava": {"vision_feature_layers": [-1, -2]},
}

UNBUILDABLE: dict[str, str] = {
    **dict.fromkeys(("gemma3n", "fast_vlm", "perception_lm"), "its vision tower needs the timm library"),
    "inkling_mm_model": "needs the scipy library",
    **dict.fromkeys(
        ("chameleon", "emu3"), "its tokens of images are in a map of the vocabulary that it is published with"
    ),
    **dict.fromkeys(("florence2", "molmo2"), "its configuration has a list of sizes where the others have a number"),
    "diffusion_gemma": "writes by removing noise, and has no loss",
    "granite4_vision": "its configuration maps layers of the vision tower to those of the language model",
    "pi0": "a policy: needs the state and the actions of a robot",
    "udop": "needs a box on the page for each word",
}


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """A tiny model of the type `name`, in training mode and without dropout."""
    model_class = getattr(transformers, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[name])
    return zoo.built(model_class, small_config(name), dtype, seed)


def small_config(name: str) -> PreTrainedConfig:
    return zoo.shrunk(CONFIG_MAPPING[name], VALUES.get(name, {}), SMALL)


def example(model: nn.Module, batch: int = 2, seq: int = 9, seed: int = 0) -> dict[str, Any]:
    """A call of the model with an image and `seq` tokens of text in each row."""
    call = zoo.example(model, batch, seq, seed)
    parameters = inspect.signature(model.forward).parameters
    images = INPUTS.get(model.config.model_type, _images)(model, batch)
    images = {k: v.to(model.dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in images.items()}
    count = _tokens_of_image(model, images, batch)
    call = {**call, **_with_placeholders(call, count)}
    for key in ("mm_token_type_ids", "token_type_ids", "image_embeds_position_mask"):
        if key in parameters:
            call[key] = (call["input_ids"] == IMAGE_TOKEN).long()
    if "cross_attention_mask" in parameters:
        tiles = images["aspect_ratio_mask"].shape[-1]
        call["cross_attention_mask"] = torch.ones(*call["input_ids"].shape, 1, tiles, dtype=torch.long)
    if "image_attention_mask" in parameters:
        call["image_attention_mask"] = torch.ones(*call["input_ids"].shape, 1, dtype=torch.long)
    return call | images


def text_example(model: nn.Module, batch: int = 2, seq: int = 9, seed: int = 0) -> dict[str, Any]:
    """A call without images."""
    call = zoo.example(model, batch, seq, seed)
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        call["mm_token_type_ids"] = torch.zeros_like(call["input_ids"])
    return call


def _pixels(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(shape[0]))


def _images(model: nn.Module, batch: int) -> dict[str, Any]:
    """An image a row, in the form that most models take: pixels, or patches with a grid."""
    if "image_grid_thw" in inspect.signature(model.forward).parameters:
        vision = model.config.vision_config
        width = getattr(vision, "in_channels", 3) * getattr(vision, "temporal_patch_size", 1) * PATCH**2
        return _patches(batch, width)
    return {"pixel_values": _pixels(batch, 3, IMAGE, IMAGE)}


def _patches(batch: int, *width: int) -> dict[str, Any]:
    return {
        "pixel_values": _pixels(batch * SIDE**2, *width),
        "image_grid_thw": torch.tensor([[1, SIDE, SIDE]] * batch),
    }


def _merged(model: nn.Module, batch: int) -> dict[str, Any]:
    """Patches that are merged already; the grid is that of the merged ones."""
    rows = SIDE // MERGE
    pixels = _pixels(batch * rows**2, PATCH * MERGE, PATCH * MERGE, 3)
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, rows, rows]] * batch)}


def _numbered(model: nn.Module, batch: int) -> dict[str, Any]:
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    side = 2 * PATCH if model.config.model_type == "gemma4_unified" else PATCH
    places = torch.stack([columns.flatten(), rows.flatten()], dim=-1).expand(batch, -1, -1).clone()
    return {"pixel_values": _pixels(batch, SIDE**2, 3 * side**2), "image_position_ids": places}


def _tiles(model: nn.Module, batch: int) -> dict[str, Any]:
    """The image, and one tile of it."""
    return {"pixel_values": _pixels(batch, 2, 3, IMAGE, IMAGE), "image_sizes": torch.tensor([[IMAGE, IMAGE]] * batch)}


def _sized(model: nn.Module, batch: int) -> dict[str, Any]:
    return {"pixel_values": _pixels(batch, 3, IMAGE, IMAGE), "image_sizes": torch.tensor([[IMAGE, IMAGE]] * batch)}


def _several(model: nn.Module, batch: int) -> dict[str, Any]:
    """One of the images that a row may have."""
    return {"pixel_values": _pixels(batch, 1, 3, IMAGE, IMAGE)}


def _with_queries(model: nn.Module, batch: int) -> dict[str, Any]:
    frames = (4,) if model.config.model_type == "instructblipvideo" else ()
    return {
        "pixel_values": _pixels(batch, *frames, 3, IMAGE, IMAGE),
        "qformer_input_ids": torch.arange(3, 8).expand(batch, -1).clone(),
    }


def _flat(model: nn.Module, batch: int) -> dict[str, Any]:
    return {"pixel_values": _pixels(batch, SIDE**2, 3 * PATCH**2)}


def _with_shapes(model: nn.Module, batch: int) -> dict[str, Any]:
    shapes = torch.tensor([[SIDE, SIDE]] * batch)
    return {**_flat(model, batch), "spatial_shapes": shapes, "pixel_attention_mask": torch.ones(batch, SIDE**2).long()}


def _crossed(model: nn.Module, batch: int) -> dict[str, Any]:
    """An image that cross attention looks at, in four tiles at most, one of which is there."""
    tiles = model.config.vision_config.max_num_tiles
    mask = torch.zeros(batch, 1, tiles, dtype=torch.long)
    mask[..., 0] = 1
    return {
        "pixel_values": _pixels(batch, 1, tiles, 3, IMAGE, IMAGE),
        "aspect_ratio_ids": torch.ones(batch, 1, dtype=torch.long),
        "aspect_ratio_mask": mask,
    }


def _twice(model: nn.Module, batch: int) -> dict[str, Any]:
    """The image in two resolutions."""
    return {name: _pixels(batch, 3, IMAGE, IMAGE) for name in ("pixel_values", "high_res_pixel_values")}


def _of_target_sizes(model: nn.Module, batch: int) -> dict[str, Any]:
    """The patches of all images side by side."""
    pixels = _pixels(1, 3, PATCH, batch * SIDE**2 * PATCH)
    return {"pixel_values": pixels, "target_sizes": torch.tensor([[SIDE, SIDE]] * batch)}


def _masked_tiles(model: nn.Module, batch: int) -> dict[str, Any]:
    return {**_several(model, batch), "pixel_attention_mask": torch.ones(batch, 1, dtype=torch.bool)}


def _flattened(model: nn.Module, batch: int) -> dict[str, Any]:
    """Patches with their row and column in front."""
    places = torch.tensor([[row + 1, column + 1] for row in range(SIDE) for column in range(SIDE)])
    patches = _pixels(batch, SIDE**2, model.config.vision_config.patch_embed_hidden_size)
    return {
        "flattened_patches": torch.cat([places.expand(batch, -1, -1), patches], dim=-1),
        "attention_mask": torch.ones(batch, SIDE**2, dtype=torch.long),
    }


INPUTS: dict[str, Callable[[nn.Module, int], dict[str, Any]]] = {
    "deepseek_vl_hybrid": _twice,
    "fuyu": _flat,
    **dict.fromkeys(("gemma4", "gemma4_unified"), _numbered),
    "granite_docling": _masked_tiles,
    **dict.fromkeys(("idefics", "idefics2", "idefics3", "smolvlm"), _several),
    **dict.fromkeys(("instructblip", "instructblipvideo"), _with_queries),
    **dict.fromkeys(("kimi_k25", "paddleocr_vl"), lambda model, batch: _patches(batch, 3, PATCH, PATCH)),
    "inkling2": _merged,
    "lfm2_vl": _with_shapes,
    **dict.fromkeys(("minicpm_ocr", "minicpmv4_6", "minicpmv4_7"), _of_target_sizes),
    "pix2struct": _flattened,
    **dict.fromkeys(("lighton_ocr", "mistral3", "mistral_large4"), _sized),
    **dict.fromkeys(("llava_next", "llava_next_video", "llava_onevision", "granite4_vision"), _tiles),
    "mistral4": lambda model, batch: {},  # text alone
    "mllama": _crossed,
    "nemotron_h_omni": lambda model, batch: {
        "pixel_values": _pixels(batch * SIDE**2, 3 * PATCH**2),
        "image_grid_hw": torch.tensor([[SIDE, SIDE]] * batch),
    },
    **dict.fromkeys(("muse_glimmer", "muse_spark"), lambda model, batch: _patches(batch, 2 * 3 * PATCH**2)),
    "video_llama_3": lambda model, batch: (
        _patches(batch, 3 * PATCH**2) | {"image_merge_sizes": torch.tensor([MERGE] * batch)}
    ),
}
"""Of model types that take images in another form than most."""


def _tokens_of_image(model: nn.Module, images: dict[str, Any], batch: int) -> int:
    """How many features the model makes of an image: those that `get_image_features` gives, or queries."""
    features = next((f for m in (model, model.model if hasattr(model, "model") else model)
                     if (f := getattr(m, "get_image_features", None))), None)  # fmt: skip
    if count := getattr(model.config, "latent_query_num", None) or getattr(model.config, "num_query_tokens", None):
        return count * (images["pixel_values"].shape[1] if images["pixel_values"].ndim == 5 else 1)
    if features is None or not images:
        return 0
    with torch.no_grad():
        found = features(**images)
    if not isinstance(found, (Tensor, list, tuple)):
        found = found.last_hidden_state if found.pooler_output is None else found.pooler_output
    found = [found] if isinstance(found, Tensor) else found
    return sum(rows.numel() // rows.shape[-1] for rows in found) // batch


def _with_placeholders(call: dict[str, Any], count: int) -> dict[str, Tensor]:
    """The call with `count` placeholders amid the tokens of each row, which nobody has to predict."""
    found = {}
    for key, fill in {"input_ids": IMAGE_TOKEN, "attention_mask": 1, "labels": -100}.items():
        if key in call:
            rows = call[key]
            at = rows.shape[1] // 2
            found[key] = torch.cat([rows[:, :at], torch.full((len(rows), count), fill), rows[:, at:]], dim=1)
    return found
