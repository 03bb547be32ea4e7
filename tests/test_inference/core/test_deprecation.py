"""Old names of the packages: they lead to the new ones, with a warning that says where."""

import importlib

import pytest

OLD = [("guides", "nearest_local", "local_gauss_newton"), ("zoo", "AutoregressiveLaw", "AutoregressiveDistribution")]


@pytest.mark.parametrize(("package", "old", "new"), OLD)
def test_an_old_name_leads_to_the_new_one_with_a_warning(package, old, new):
    module = importlib.import_module(package)
    with pytest.warns(DeprecationWarning, match=rf"{package}\.{old} is called {package}\.{new} now"):
        found = getattr(module, old)
    assert found is getattr(module, new)
    assert old not in module.__all__


@pytest.mark.parametrize("package", ["inference", "guides", "zoo"])
def test_a_name_that_never_was_is_an_attribute_error(package):
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        importlib.import_module(package).nothing  # noqa: B018
