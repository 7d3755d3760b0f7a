"""The network as Flax NNX modules: pure functions of weights and arrays, with no idea of caches, batches or devices."""
