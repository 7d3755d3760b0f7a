"""Checkpoints: finding one (`hub`), reading it (`reader`), what goes where (`mapping`), filling a model (`loader`)."""
