"""Checkpoints: finding them (`hub`), reading them (`reader`), what goes where (`mapping`) and filling a model (`loader`)."""
