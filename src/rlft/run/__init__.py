"""A run, for :class:`rlft.trainer.Trainer` and the command line; not for scripts. The rooms, in the order of a run:

``setup``      settings and what was passed in memory -> ``Parts``: what the run is made of
``checks``     what a run proves about itself: before its first step, and at it
``step``       one optimizer step: batches drawn or sampled and scored, cut up, passed through the model, applied; who watches
``measure``    metrics, words and times of a run; what became of the rows of a stream
``keep``       what survives a stop: checkpoints, the exported model, what the run is made of
``processes``  the processes that share a run, and the signals that stop it

``progress`` says how far it is, ``callbacks`` calls the user's, ``evaluate`` measures held-out data, ``display`` shows it all,
and ``wiring`` connects the objects that own what moves: there a new feature gets its line.

Imports point one way: progress, processes, measure < step < keep < checks, callbacks < setup < evaluate, display < wiring.
An object alone writes its state; what must survive a stop has ``state_dict`` and ``load_state_dict``.
"""
