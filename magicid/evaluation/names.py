"""What methods and measures are called in tables and figures, and in which order methods come."""

from __future__ import annotations

METHODS = {
    "base": "base model",
    "dreambooth": "DreamBooth-LoRA, single frames",
    "magicme": "MagicMe",
    "sft": "SFT only",
    "sft_moving": "SFT, moving photos too",
    "sft_captions": "SFT, a caption for each photo",
    "sft_moving_captions": "SFT, captions and moving photos",
    "p_id": "SFT + P_id",
    "p_dy": "SFT + P_dy",
    "rewards_id": "rewards: id",
    "rewards_id_dy": "rewards: id + dy",
    "paper": "HPO, the paper's letter",
    "own_prompt": "HPO, static winners under their caption",
    "hpo": "HPO",
    "two_rounds": "HPO in two rounds",
    "still_photos": "HPO, one caption for all photos",
    "moving_photos": "HPO, moving photos instead of captions",
    "no_copies": "HPO without still copies",
    "beyond": "HPO, others' clips and motion first",
    "true_clips": "SFT on the renderer's clips (nobody has them)",
    "renderer": "the renderer (truth)",
}
MOTIONS = ("dynamic_magnitude", "head_motion")  # both measures of motion: flow, which jitter raises, and the head's
MEASURES = {
    "face_sim": "face_sim",
    "face_sim_missing0": "face_sim, no face counts 0",
    "face_detect_rate": "faces found",
    "dynamic_degree": "dynamic degree",
    "dynamic_degree_vbench": "dynamic degree, VBench's own",
    "dynamic_magnitude": "dynamic_magnitude (px at 256)",
    "head_motion": "head motion (half heads / s)",
    "temporal_flickering": "temporal flickering",
    "warp_error": "warp error (grey levels)",
    "temporal_consistency": "temporal consistency",
    "clip_t": "CLIP-T",
    "clip_i": "CLIP-I",
    "action": "action recognised",
    "place": "place recognised",
    "prompt_score": "prompt score",
}


def method_name(method: str) -> str:
    """A method's name for people; one from elsewhere keeps its own."""
    return METHODS.get(method, method)


def order(method: str) -> int:
    """The place of a method in tables; others come last."""
    names = list(METHODS)
    return names.index(method) if method in names else len(names)
