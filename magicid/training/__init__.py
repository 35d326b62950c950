"""Training: the initial LoRA (SFT), Hybrid Preference Optimization (HPO), and what both stand on.

`loss` is the mathematics, `pairs` the data and its seeded order, `lora` the two adapters on one base, `engine` the
update (plain torch or DeepSpeed), `checkpoint` the state on storage, `sft` and `hpo` the two loops.
"""
