"""Sites that a user gives, without an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from toys import Toy, images, sites, toy_adapter

from lite3r_plugin import AttentionSite, Routed, apply_lite3r, describe, load_lite3r, remove_lite3r, save_lite3r
from lite3r_plugin.errors import AdapterError, CheckpointError, ConfigError, UnknownModelError
from lite3r_plugin.testing import TEST_CONFIG, check_adapter

__all__ = ["toy_adapter"]  # the fixture


@pytest.fixture
def toy() -> Toy:
    torch.manual_seed(0)
    return Toy().eval()


def output(model: Toy) -> torch.Tensor:
    with torch.no_grad():
        return model(images())


def test_they_take_the_place_of_an_adapter(toy: Toy) -> None:
    dense = output(toy)
    apply_lite3r(toy, TEST_CONFIG, sites=sites(toy))
    sparse = output(toy)
    assert not torch.equal(sparse, dense)
    assert "(adapter 'sites=')" in str(describe(toy))
    assert torch.equal(output(remove_lite3r(toy)), dense)


def test_check_adapter_takes_them(toy: Toy) -> None:
    assert check_adapter(toy, (images(),), sites=sites(toy)).scopes == {"global": 2}


def test_a_checkpoint_needs_them_again(toy: Toy, tmp_path: Path) -> None:
    apply_lite3r(toy, TEST_CONFIG, sites=sites(toy))
    for site in toy.cross:
        torch.nn.init.normal_(site.proj_lin.weight)
    save_lite3r(toy, tmp_path)
    expected = output(toy)
    remove_lite3r(toy)
    with pytest.raises(UnknownModelError, match=r"knows Toy, and the checkpoint is of a model whose sites were given.*sites=\[\.\.\.\]"):
        load_lite3r(toy, tmp_path)
    with pytest.raises(CheckpointError, match="the first that differs is 'cross.1'"):
        load_lite3r(toy, tmp_path, sites=[site for site in sites(toy) if site.fqn != "cross.1"])
    assert torch.equal(output(load_lite3r(toy, tmp_path, sites=sites(toy))), expected)


@pytest.mark.usefixtures("adapter")
def test_an_adapter_may_come_later_and_go(toy: Toy, tmp_path: Path) -> None:
    apply_lite3r(toy, TEST_CONFIG, sites=sites(toy))
    save_lite3r(toy, tmp_path / "given")
    load_lite3r(remove_lite3r(toy), tmp_path / "given")
    assert describe(toy).adapter == "toy"
    save_lite3r(toy, tmp_path / "adapter")
    load_lite3r(remove_lite3r(toy), tmp_path / "adapter", sites=sites(toy))
    assert describe(toy).adapter == "sites="


@pytest.mark.parametrize("wrong", ["cross.0", ["cross.0"], AttentionSite("cross.0", "global", 16, Routed())])
def test_what_is_no_list_of_sites_is_refused(toy: Toy, wrong: Any) -> None:
    with pytest.raises(ConfigError, match="sites is a list of AttentionSite, got"):
        apply_lite3r(toy, sites=wrong)


def test_a_site_that_is_not_there_is_named(toy: Toy) -> None:
    with pytest.raises(AdapterError, match="adapter 'sites=' names 'across', but the model has no such module"):
        apply_lite3r(toy, sites=[AttentionSite("across", "global", 16, Routed())])
