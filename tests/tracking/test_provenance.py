"""A run records which code made it, also from a checkout that is on the path and not installed."""

from importlib.metadata import PackageNotFoundError, version

from segrl.tracking import provenance


def test_versions_are_those_of_the_installed_packages():
    tags = provenance.provenance("seed: 1")
    assert tags["version.torch"] == version("torch") and tags["version.segrl"] == version("segrl")


def test_a_package_that_is_not_installed_is_said_to_be_so(monkeypatch):
    def none_of_segrl(name):
        if name == "segrl":
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(provenance, "version", none_of_segrl)
    tags = provenance.provenance("seed: 1")
    assert tags["version.segrl"] == "not installed" and tags["version.torch"] == "1.0"
