"""From settings to what a run is made of: ``arguments``, ``data`` and ``models``, put together in ``build``."""
