"""Packages are what an index has under a name: an address could be built, and so run, on this machine."""

import pytest
from rlm_environments.containers import image

from rlm_core import ConfigError
from rlm_core.environment import SandboxSpec, parse_spec
from rlm_core.requirements import checked


@pytest.mark.parametrize(
    "entry, form",
    [
        ("six", "six"),
        ("six==1.16.0", "six==1.16.0"),
        ("torch==2.9.1+cpu", "torch==2.9.1+cpu"),
        ("zope.interface", "zope.interface"),
        (" pandas[excel] >= 2, <4", "pandas[excel]<4,>=2"),
        ("tomli; python_version < '3.11'", 'tomli; python_version < "3.11"'),
    ],
)
def test_a_requirement_of_an_index_is_taken(entry: str, form: str) -> None:
    assert checked([entry]) == (form,) == checked([form])


def test_an_image_is_known_by_its_label_whatever_is_in_its_packages() -> None:
    made = image.recipe(None, ["tomli; python_version < '3.14'", "six==1.16.0"])
    assert image.Recipe.of_labels(made.labels) == made and image.Recipe.of_labels(made.labels).tag == made.tag


@pytest.mark.parametrize(
    "entry",
    [
        "x @ https://example.org/x-1.0.tar.gz",
        "x @ https://example.org/x-1.0-py3-none-any.whl",
        "x @ FILE:///x-1.0.tar.gz",
        "x@git+https://example.org/x",
        "git+https://example.org/x",
        "https://example.org/x.whl",
        "./x",
        "/x.whl",
        "wheels/x.whl",
        "-r x.txt",
        "--index-url=https://example.org",
        "six\n--index-url=https://example.org",
        "six --hash=sha256:0",
        "six # a remark",
        "a b",
        "x.whl",
        "x.tar.gz",
        "x.zip[a]; python_version > '3'",
        "x.tgz",
        "x===/../../../tmp/x",
        "x==1+a.zip",
        "x; platform_version != 'a\\nRUN echo injected\\n#'",
        "x; platform_version != 'a\\x00'",
        "",
    ],
)
def test_what_is_not_of_an_index_is_refused_in_every_environment(entry: str) -> None:
    with pytest.raises(ConfigError, match="packages"):
        parse_spec({"packages": [entry]}, SandboxSpec)
    with pytest.raises(ConfigError, match="packages"):
        image.recipe(None, [entry])
