"""The laboratory: the method's claims measured on many people, training seeds and settings at once.

    python -m magicid.laboratory runs/lab            small; runs/lab --full for all of it

Where the trainer runs one adapter at a time on a cluster, the laboratory puts hundreds of them into one batch of one
process (`population.py`), so that a whole study fits one GPU for minutes or a CPU for a night. Losses, selection, draws
of noise levels, rewards and metrics are the trainer's own.

    people.py        people who were in no training, their photos and references
    population.py    many LoRAs on one transformer, trained and sampled in one batch
    clips.py         sampled clips with rewards: V_s, V_t, V_id
    methods.py       what is compared: methods, settings, steps
    study.py         one study: SFT, repository, selection, preference training, held-out clips
    measuring.py     rewards and metrics in worker processes
"""
