"""Contextual sparsity (Deja Vu, ICML 2023) for vLLM.

Importing this package imports neither torch nor vLLM: vLLM loads its plugins in every process it starts, and
this module must cost nothing there. See `vllm_dejavu.plugin` for what registration does.
"""

import os as _os

__version__ = "0.1.0"

# In a checkout, kernels/ and predictor_training/ lie beside this package and not inside it (setup.py maps
# them in on installation). Appending the checkout's root makes `vllm_dejavu.kernels` importable from a bare
# checkout too.
_root = _os.path.dirname(_os.path.dirname(_os.path.abspath(__file__)))
if _os.path.isfile(_os.path.join(_root, "setup.py")) and _os.path.isdir(_os.path.join(_root, "kernels")):
    __path__.append(_root)


def register() -> None:
    """Entry point `vllm.general_plugins`: makes `--model-impl dejavu` select our model class. Idempotent."""
    from vllm_dejavu.plugin import register as _register

    _register()
