"""One optimizer step, in its order: ``source``, ``sampling``, ``passes``, ``micro_batches``, ``update``; ``watchers`` look on."""
