"""Packages that tests compare with, where importing them takes more than an import."""

import contextlib
import importlib
import importlib.util
import sys
import types

import pytest


def galore_torch():
    """galore_torch imports a version check from transformers, which it does not need; bitsandbytes for its 8-bit class."""
    pytest.importorskip("bitsandbytes", exc_type=ImportError)
    with contextlib.ExitStack() as stack:
        if importlib.util.find_spec("transformers") is None:
            names = ("transformers", "transformers.utils", "transformers.utils.versions")
            for name in names:
                sys.modules[name] = types.ModuleType(name)
                stack.callback(sys.modules.pop, name)
            sys.modules[names[-1]].require_version = lambda *_: None
        return pytest.importorskip("galore_torch", exc_type=ImportError)
