import torch
from tiny_multiview import TinyMultiView
from torch import nn

from lite3r_plugin.testing import check_adapter


def test_the_adapter_describes_the_model():
    report = check_adapter(TinyMultiView().eval(), (torch.rand(1, 3, 3, 64, 96),))
    assert report.adapter == "tiny_multiview"
    assert report.scopes == {"global": 2}


def test_the_model_is_found_inside_a_wrapper():
    check_adapter(nn.Sequential(TinyMultiView()).eval(), (torch.rand(1, 3, 3, 64, 96),))
