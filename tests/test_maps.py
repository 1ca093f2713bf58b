"""Plane maps of representations."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from evaluation.maps import plane_map
from utils import UserError


def test_a_map_keeps_near_what_is_near_by_direction():
    """Four directions in 32 dimensions, at lengths that say nothing: points of a direction lie together."""
    draws = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 4
    rows = torch.randn(4, 32, generator=draws)[labels] + 0.3 * torch.randn(120, 32, generator=draws)
    rows = rows * torch.logspace(-2, 2, 120)[:, None]
    points = np.array(plane_map(rows, seed=1))
    assert points.shape == (120, 2)
    assert 0.9 < abs(points).max() <= 1
    assert KNeighborsClassifier(5).fit(points, labels).score(points, labels) > 0.98
    assert plane_map(rows, seed=1) == points.tolist()


def test_few_images_make_no_map():
    with pytest.raises(UserError, match="9 images are too few for a map: give 10 or more"):
        plane_map(torch.randn(9, 4))
