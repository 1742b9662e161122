"""Where work runs: shards over Ray actors, training on Ray Train. The only floor that knows Ray."""
