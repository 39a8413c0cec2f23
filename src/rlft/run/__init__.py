"""The parts of a run, for :class:`rlft.trainer.Trainer` and for the command line; not for scripts.

Before it: ``setup`` builds what the settings name (``parts``), ``checks`` and ``selfcheck`` refuse what cannot work, ``plan`` says
what is optimised, ``display`` shows it. A step: ``online`` draws and scores (``pairwise``, ``old_logps``, ``correction``, ``watchdog``),
``micro`` cuts it up, ``update`` applies it, ``guard`` and ``first_step`` watch it, ``trust_step`` and ``controllers`` steer it, ``meter`` times
it. Beside it: ``evaluate``, ``state`` for checkpoints, ``ref_cache``, ``meeting`` of several processes and their ``signals``, ``memory`` when it
ends.
"""
