"""The examples in the docstrings do what they say."""

import doctest
import importlib
import pkgutil

import pytest
import torch

import calib_lightning

WITHOUT_EXAMPLES_OF_CODE = {"calib_lightning.__main__"}
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(calib_lightning.__path__, "calib_lightning.")
    if module.name not in WITHOUT_EXAMPLES_OF_CODE
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(module, extraglobs={"torch": torch}, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failed == 0
