"""The operators that a device may want its own kernel for; nothing here knows about the model.

One folder for each operator: `api.py` documents it and lists its backends, `reference.py` defines it in plain XLA
and is a real backend, the last resort everywhere. `dispatch.py` chooses.
"""
