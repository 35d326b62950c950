"""The metrics of a clip, one file each; no network here is a reward: what is optimised is not what is reported.

| column                 | file       | definition                                                                  |
|------------------------|------------|-----------------------------------------------------------------------------|
| `face_sim`             | faces.py   | cosine of the largest face with the references; frames without it left out  |
| `face_sim_missing0`    | faces.py   | the same, a frame without a face counts 0                                   |
| `face_detect_rate`     | faces.py   | share of these frames in which a face was found                             |
| `dynamic_degree`       | motion.py  | VBench: 1 when enough pairs of frames have large flow, else 0               |
| `..._vbench`           | vbench.py  | the same by VBench's own package, where it is installed                     |
| `dynamic_magnitude`    | motion.py  | the value behind it: mean top-5 % flow at a shorter side of 256 px          |
| `head_motion`          | pose.py    | path length of the smoothed head pose, half head heights per second         |
| `temporal_flickering`  | flicker.py | VBench: 1 - mean absolute difference of consecutive frames                  |
| `warp_error`           | flicker.py | what of that difference is left after the flow is taken out, grey levels    |
| `temporal_consistency` | clip.py    | mean cosine of the embeddings of adjacent frames                            |
| `clip_t`, `clip_i`     | clip.py    | 100 x cosine of frames with the prompt, with the reference photos           |
| `action`, `place`,     | actions.py | whether each is recognised; P(action) P(place) of the prompt                |
| `prompt_score`         |            |                                                                             |
| `video_features`       | video.py   | what the Fréchet video distance is made of                                  |

`Metrics` measures all of them over one decoding of the frames; none needs Ray.
"""

from magicid.evaluation.metrics.sample import Sample
from magicid.evaluation.metrics.suite import COLUMNS, Metrics

__all__ = ["COLUMNS", "Metrics", "Sample"]
