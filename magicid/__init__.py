"""magicid: many people's reference photos in, one personal video adapter each out.

The library: plain functions and types over plain data. It imports neither Ray nor a web framework; `ray_jobs` is the
batch door. Data flows one way: Identity + Prompt -> Clip -> Rewards -> Pair -> Adapter -> Video.
"""

__version__ = "0.1.0"
