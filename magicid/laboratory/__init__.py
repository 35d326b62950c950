"""The laboratory: the method's claims measured on many people, training seeds and settings at once.

    python -m magicid.laboratory runs/lab                 small, in minutes
    python -m magicid.laboratory runs/lab --plan full     eight people, three trainings, every method

Where the trainer runs one adapter at a time on a cluster, the laboratory puts hundreds of them into one batch of one
process (`population.py`), so that a whole study fits one GPU for minutes or a CPU for a night. Losses, selection, draws
of noise levels, rewards and metrics are the trainer's own.

    people.py        people who were in no training, their photos and references
    methods.py       what is compared: methods, settings, steps
    study.py         one study: SFT, repository, selection, preference training, held-out clips
    population.py    many LoRAs on one transformer, trained and sampled in one batch
    training.py      SFT and HPO of such a population
    clips.py         sampled clips, their latents and rewards
    repositories.py  V_s, V_t, V_id and their copies, adapter by adapter
    pairs.py         other readings of the paper's pairs
    measuring.py     rewards and metrics in worker processes
    rows.py          what is measured, in files
    ceiling.py       what the autoencoder allows
    jitter.py        what R_dy pays for
"""
