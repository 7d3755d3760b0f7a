"""From a loaded model to tokens: compiled steps, the cache, sampling and the engine that drives them."""
